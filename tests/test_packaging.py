"""What is in a source distribution and in a wheel, and what both say about themselves."""

import email
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WHEEL_INFO, WHEEL_CHECK, BUILD_COST = (
    runpy.run_path(str(ROOT / "tools" / f"{name}.py"))
    for name in ("wheel_info", "wheel_check", "build_cost")
)
# What a developer needs beside the package; .ci and .github go along.
FOLDERS = ("csrc", "tests", "docs", "examples", "benchmarks", "tools", "bigkernel")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# They pack the one tree, which setuptools copies to a folder beside it on the way.
pytestmark = pytest.mark.xdist_group("packaging")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution made where there is no nvcc, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    # Of a copy: on the way setuptools puts all files into a folder of the tree, and removes it.
    made = (
        ".git",
        ".venv*",
        "build",
        "dist",
        "runs",
        "*.egg-info",
        "*.so",
        "__pycache__",
        ".*_cache",
    )
    tree = shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*made))
    # With the list of files anew: an old one in the tree would be added to.
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", folder]
    command += ["sdist", "--dist-dir", folder]
    run(*command, cwd=tree, BIGKERNEL_NATIVE="0", PATH="/usr/bin:/bin", CUDA_HOME="")
    (archive,) = folder.glob("bigkernel-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def build_wheel(sources: Path, folder: Path, **env: str) -> Path:
    """A wheel built from a source distribution and from nothing else."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", folder]
    run(
        *[sys.executable, "-m", "pip", "wheel", *options, sources], cwd=folder, PYTHONPATH="", **env
    )
    (built,) = folder.glob("bigkernel-*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pure-Python wheel."""
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"), BIGKERNEL_NATIVE="0")


def test_sdist_without_nvcc_holds_sources_tests_and_docs(sdist):
    generated = ("__pycache__", "_generated", ".egg-info")
    missing = [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and path.suffix != ".so"
        and not any(part.endswith(generated) for part in path.relative_to(ROOT).parts)
        and not (sdist / path.relative_to(ROOT)).is_file()
    ]
    assert not missing
    assert list(sdist.glob("csrc/*/*.cu"))
    for name in ("LICENSE", "CHANGELOG.md", "Makefile", ".ci/run", ".github/workflows/ci.yml"):
        assert (sdist / name).is_file(), name
    assert not [*sdist.rglob("*.so"), *sdist.rglob("*.pyc")]


def test_wheel_from_the_sdist_has_licence_metadata_and_package_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        fields = email.message_from_bytes(archive.read(metadata))
        licence = archive.read(metadata.replace("METADATA", "licenses/LICENSE"))
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["License-File"] == "LICENSE"
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert licence.count(b"Apache License") >= 1
    assert b"END OF TERMS AND CONDITIONS" in licence
    for name in ("py.typed", "data/corpora/zh_ai.txt", "testing/ptx/README.md", "environment.py"):
        assert f"bigkernel/{name}" in names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "examples/"))]


def test_pure_wheel_is_for_every_system_and_the_same_bytes_again(sdist, wheel, tmp_path):
    assert wheel.name.endswith("-py3-none-any.whl")
    again = shutil.copytree(sdist, tmp_path / "another folder")
    for path in again.rglob("*"):
        os.utime(path, (0, 1))
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", tmp_path]
    run(*command, cwd=again, BIGKERNEL_NATIVE="0")
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_wheel_says_what_was_compiled(wheel):
    said = run(sys.executable, "tools/wheel_info.py", wheel, cwd=ROOT)
    assert said == f"bigkernel: {wheel} holds pure Python, nothing compiled.\n"


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ({"native": True, "cuda": None, "cuda_archs": ""}, "CPU kernels; NO CUDA kernels"),
        (
            {"native": True, "cuda": "13.0", "cuda_archs": "sm_80, PTX for sm_80"},
            "CPU kernels and CUDA kernels (toolkit 13.0; sm_80, PTX for sm_80)",
        ),
    ],
)
def test_a_native_wheel_says_whether_cuda_is_in_it(note, said, tmp_path):
    wheel = tmp_path / "bigkernel-1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("bigkernel/build_info.json", json.dumps(note))
    assert WHEEL_INFO["contents"](wheel) == said


NATIVE = {
    "bigkernel/build_info.json": '{"native": true, "cuda": null, "cuda_archs": ""}',
    "bigkernel-1.dist-info/licenses/LICENSE": "Apache",
}
MANYLINUX = "bigkernel-1-py3-none-manylinux_2_28_x86_64.whl"
LIBRARY = "bigkernel/libbigkernel_ops.so"


@pytest.mark.parametrize(
    ("name", "more", "fault"),
    [
        (MANYLINUX, {LIBRARY: "fits"}, ""),
        (MANYLINUX, {LIBRARY: "pow"}, "pow of GLIBC 2.29"),
        (MANYLINUX, {LIBRARY: "fits", "bigkernel/_C.so": "x"}, "its libraries are"),
        (MANYLINUX, {}, "its libraries are []"),
        (MANYLINUX, {LIBRARY: "fits /home/us/csrc/x.h"}, f"{LIBRARY} mentions /home/us"),
        (MANYLINUX, {LIBRARY: "fits /home/usual/csrc/x.h"}, ""),
        (MANYLINUX.replace("py3-none", "cp311-cp311"), {LIBRARY: "fits"}, "its name does not"),
        ("bigkernel-1-py3-none-linux_x86_64.whl", {LIBRARY: "fits"}, "its name does not end"),
    ],
)
def test_a_wheel_that_is_not_right_is_named(name, more, fault, tmp_path, monkeypatch):
    """The library is a text here, which says what the check of its names would find."""
    found = lambda path: ["pow of GLIBC 2.29"] if "pow" in Path(path).read_text() else []  # noqa: E731
    monkeypatch.setitem(WHEEL_INFO["OLD_GLIBC"], "too_new", found)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for file, text in (NATIVE | more).items():
            archive.writestr(file, text)
    faults = WHEEL_INFO["faults"](tmp_path / name, ["/home/us"])
    assert [each.startswith(fault) for each in faults] == [True] * bool(fault), faults


def test_a_wheel_without_licence_or_of_any_size_is_not_right(tmp_path, monkeypatch):
    monkeypatch.setitem(WHEEL_INFO["faults"].__globals__, "LARGEST", 100)
    wheel = tmp_path / "bigkernel-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("bigkernel/build_info.json", '{"native": false}' + 100 * " ")
    no_licence, too_large = WHEEL_INFO["faults"](wheel, [])
    assert no_licence == "it has no LICENSE"
    assert "more than" in too_large
    assert WHEEL_INFO["main"]([str(wheel)]) == 1


@pytest.mark.slow
def test_a_native_wheel_is_built_from_the_sdist(sdist, tmp_path):
    """Twice, in two folders: the same bytes."""
    wheels = []
    for name in ("one", "another"):
        sources = shutil.copytree(sdist, tmp_path / name / "sources")
        wheels.append(build_wheel(sources, tmp_path / name, BIGKERNEL_CUDA="0"))
    built, again = wheels
    assert built.name == again.name
    assert built.read_bytes() == again.read_bytes()
    assert WHEEL_INFO["faults"](built, [str(tmp_path)]) == []
    said = run(sys.executable, "tools/wheel_info.py", built, cwd=ROOT)
    assert "holds CPU kernels; NO CUDA kernels" in said
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "installed")
    shown = "import bigkernel; print(bigkernel.__file__, bigkernel.cpu_isas())"
    said = run(*[sys.executable, "-c", shown], cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert said.startswith(str(tmp_path / "installed"))
    assert "portable" in said


def test_make_wheel_ends_with_what_is_in_it():
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.split("\nwheel: ")[1].split("\n\n")[0]
    assert "tools/wheel_info.py" in recipe.splitlines()[-1]


# What `auditwheel show --json` says of a wheel of ours, and what is wrong with others.
AUDITED = {
    "sym_tag": "manylinux_2_27_x86_64",
    "external_libs": {"libtorch.so": None, "libtorch_cpu.so": None},
    "pyfpe": False,
    "ucs2": False,
    "unsupported_isa": False,
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"sym_tag": "manylinux_2_28_x86_64"}, None),
        ({"sym_tag": "manylinux_2_34_x86_64"}, "its symbols are those of manylinux_2_34_x86_64"),
        ({"sym_tag": "linux_x86_64"}, "its symbols are those of linux_x86_64"),
        ({"external_libs": {"libtorch.so": None, "libcudart.so.13": None}}, "needs libcudart.so"),
        ({"unsupported_isa": True}, "it has unsupported_isa"),
    ],
)
def test_a_wheel_that_an_auditor_finds_unlike_its_tag_is_named(change, fault):
    found = WHEEL_CHECK["unlike_its_tag"](AUDITED | change)
    assert found is None if fault is None else fault in found


def test_wheel_check_ends_with_a_line_for_the_wheel_and_each_cell(monkeypatch, capsys, tmp_path):
    """And goes on after one that fails, for whatever reason."""

    def cell(python, torch, wheel, more):
        assert more == ["-n", "0"]
        if python == "3.12":
            subprocess.run(["false", torch], check=True)
        if python == "3.13":
            WHEEL_CHECK["ABI"]["audit"](sys.executable, tmp_path / "missing")

    scope = WHEEL_CHECK["main"].__globals__
    monkeypatch.setitem(scope, "cell", cell)
    monkeypatch.setitem(scope, "audit", lambda wheel: None)
    monkeypatch.setitem(scope, "command_of", lambda python: python if python < "3.14" else None)
    monkeypatch.setattr(sys, "argv", ["wheel_check.py", "x.whl", "--pytest=-n 0"])
    assert WHEEL_CHECK["main"]() == 1
    said = [line.partition(" (")[0] for line in capsys.readouterr().out.splitlines()]
    first, *torches = WHEEL_CHECK["TORCHES"]
    assert said[0] == "bigkernel: wheel-check x.whl: passed"
    assert said[1] == f"bigkernel: wheel-check 3.11:{first}: passed"
    assert said[4] == f"bigkernel: wheel-check 3.12:{first}: false {first} .. ended with 1"
    assert "torch-abi-audit refuses" in said[7]
    assert len(said) == 1 + 3 * (1 + len(torches))
    monkeypatch.setattr(sys, "argv", ["wheel_check.py", "x.whl", "3.11:2.13.0", "--pytest=-n 0"])
    assert WHEEL_CHECK["main"]() == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_what_each_architecture_costs_is_told(tmp_path, monkeypatch, capsys):
    """A shell that counts, under the name of a compiler, and one under another name."""
    for name in ("ptxas", "cicc", "cc1plus", "other"):
        shutil.copy(shutil.which("bash"), tmp_path / name)
    count = "i=0; while ((i < 300000)); do ((i++)); done"
    script = "\n".join(
        f"{tmp_path / name} -c '{count}' {options}"
        for name, options in (
            ("ptxas", "-arch=sm_90a"),
            ("cicc", "x -arch compute_90a"),
            ("cc1plus", "-E -D__CUDA_ARCH__=1200 -D__CUDA_ARCH_LIST__=800,900,1200"),
            ("cc1plus", "-D__CUDA_ARCH__=1200"),
            ("other", "-arch=sm_80"),
        )
    )
    monkeypatch.setitem(BUILD_COST["main"].__globals__, "INTERVAL", 0.02)
    assert BUILD_COST["main"](["bash", "-c", f"{script}\nexit 3"]) == 3
    told = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    assert [what for _, what, _ in told] == [
        f"compiling for {what}" for what in ("the host", "sm_90", "sm_120")
    ]
    assert all(re.match(r"\d+ s of processor, at most [1-9]\d* MiB", cost) for *_, cost in told)


def test_version_is_told_once_in_every_place():
    version = PROJECT["version"]
    assert f'__version__ = "{version}"' in (ROOT / "bigkernel/__init__.py").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_citation_has_what_the_format_asks_for():
    """Citation File Format 1.2.0: these four are required, an author needs a name."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"] == PROJECT["name"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["authors"]
    assert all("name" in author or "family-names" in author for author in citation["authors"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.stem
)
def test_workflows_and_forms_are_yaml_and_call_targets_that_exist(path):
    content = yaml.safe_load(path.read_text())
    targets = (ROOT / "Makefile").read_text()
    if path.parent.name != "workflows":
        return
    jobs = content["jobs"].values()
    assert content[True]  # YAML 1.1 reads the key "on" so
    for step in (step for job in jobs for step in job["steps"]):
        assert "uses" in step or "run" in step
        for line in step.get("run", "").splitlines():
            if line.startswith("make "):
                assert f"\n{line.split()[1]}:" in targets, line
