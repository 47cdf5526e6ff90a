"""What each part needs beside torch and NumPy, and what is said where it is missing."""

import email
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import bigkernel
from bigkernel import data, extras

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Modules that are not called as the distribution that brings them.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}

# One op, one optimizer step and one transform, and what the environment has.
CORE = """
import torch, bigkernel
from bigkernel import transforms as T

q = torch.randn(1, 2, 8, 16, requires_grad=True)
bigkernel.ops.attention(q, q, q, causal=True).sum().backward()
bigkernel.scaled_dot_product_attention(q, q, q).sum().backward()
layer = torch.nn.Linear(4, 4)
optimizer = bigkernel.optim.AdamW(layer.parameters(), max_grad_norm=1.0)
layer(torch.ones(2, 4)).sum().backward()
optimizer.step()
chain = T.Compose([T.RandomResizedCrop(8), T.ColorJitter(0.4), T.Normalize([0.5] * 3, [0.5] * 3)])
assert chain(torch.zeros(2, 3, 9, 9, dtype=torch.uint8)).shape == (2, 3, 8, 8)
print(bigkernel.explain("attention", q))
"""

# Before anything else is imported: modules that are not to be found.
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if {condition}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def closure(*names: str) -> list[importlib.metadata.Distribution]:
    """The installed distributions of these names, and those that they need here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        found[name] = distribution = importlib.metadata.distribution(name)
        for need in map(Requirement, distribution.requires or ()):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                left.append(need.name)
    return list(found.values())


def top_level(distribution: importlib.metadata.Distribution) -> set[str]:
    """The files and folders that it puts into site-packages."""
    return {file.parts[0] for file in distribution.files or () if ".." not in file.parts}


def python(code: str, condition: str) -> subprocess.CompletedProcess[str]:
    """Code in a process of its own, where modules of which ``condition`` holds are not found."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(condition=condition) + code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def without(code: str, *modules: str) -> subprocess.CompletedProcess[str]:
    return python(code, f"name.partition('.')[0] in {modules}")


def torch_and_numpy_alone() -> str:
    """A condition of `python`: nothing but these two can be imported, and what they need."""
    tops = {top.partition(".")[0] for d in closure("torch", "numpy") for top in top_level(d)}
    allowed = sorted({"bigkernel", *tops} - {"setuptools", "pkg_resources", "_distutils_hack"})
    return (
        f"name.partition('.')[0] not in {allowed} + sorted(sys.stdlib_module_names)"
        " and not name.startswith('_sysconfigdata')"  # its name has the platform's in it
        # torch asks where some are, by importlib.util.find_spec, which imports nothing.
        " and sys._getframe(2).f_code.co_name != 'find_spec'"
    )


def test_core_needs_torch_and_numpy_alone():
    condition = torch_and_numpy_alone()
    ran = python(CORE, condition)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("attention: ")
    assert python("import packaging", condition).returncode != 0


# The first case of each table, and no times.
DOCTOR = """
from bigkernel.bench import doctor

checks, cases_of = doctor.checks, doctor.cases_of
doctor.checks = lambda: [check for check in checks() if not check.name.startswith("speed")]
doctor.cases_of = lambda *given: cases_of(*given)[:1]
sys.exit(doctor.main())
"""


def test_the_doctor_needs_torch_and_numpy_alone():
    ran = python(DOCTOR, torch_and_numpy_alone())
    assert ran.returncode == int(bigkernel._library.native is None), ran.stdout + ran.stderr
    assert ran.stdout.startswith("native library ")
    assert not ran.stderr or "every op runs in plain PyTorch" in ran.stderr


@pytest.mark.slow
def test_wheel_in_an_environment_with_torch_and_numpy_alone(tmp_path):
    """A true one: the wheel is installed beside torch, NumPy and what these need."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    built = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        *options,
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(built, check=True, env={**os.environ, "BIGKERNEL_NATIVE": "0"})
    (wheel,) = tmp_path.glob("bigkernel-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        needs = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    always = {Requirement(need).name for need in needs if "extra ==" not in need}
    assert always == {"torch", "numpy"}
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    for distribution in closure("torch", "numpy"):
        for top in top_level(distribution):
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (packages / top).exists():
                (packages / top).symlink_to(source)
    # Without what PYTHONPATH names, which pip would take for installed.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    install = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install"]
    install += ["--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run(install, check=True, env=env)

    def inside(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(venv / "bin" / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=env,
        )

    ran = inside("python", "-c", CORE)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("attention: torch")
    ran = inside("bigkernel", "env")
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].endswith("pip install 'bigkernel[cli]'")


@pytest.mark.parametrize(
    ("code", "module", "said"),
    [
        ("bigkernel.Trainer", "transformers", "bigkernel.Trainer needs transformers"),
        ("bigkernel.accelerate", "transformers", "bigkernel.integrations needs transformers"),
        ("bigkernel.data", "tokenizers", "bigkernel.data needs tokenizers"),
        ("bigkernel.recipes.load", "torchmetrics", "bigkernel.recipes needs torchmetrics"),
    ],
)
def test_a_missing_extra_is_one_sentence_with_the_command(code, module, said):
    ran = without(f"import bigkernel; {code}", module)
    assert ran.returncode == 1
    expected = f"{said}, which is not installed: pip install 'bigkernel[train]'"
    assert ran.stderr.splitlines()[-1] == f"bigkernel.extras.MissingExtraError: {expected}"


@pytest.mark.parametrize("module", ["typer", "transformers"])
def test_the_command_line_says_what_it_lacks(module):
    said = without("import bigkernel.cli as c; sys.exit(c.main(['train', 'text']))", module)
    assert said.returncode == 1
    assert said.stderr.splitlines()[-1].startswith("Error: ")
    assert said.stderr.splitlines()[-1].endswith("pip install 'bigkernel[cli]'")
    assert "Traceback" not in said.stderr


def test_data_says_which_extra_it_needs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        data.DataError, match=r"pip install 'bigkernel\[images\]', or give a folder"
    ):
        data.load_digits()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(extras.MissingExtraError, match=r"needs PIL, .*'bigkernel\[images\]'"):
        data.load_image_folder(tmp_path)


def test_another_missing_module_is_not_taken_for_an_extra():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), extras.needs("train", "x"):
        importlib.import_module("no_such_module")


def test_extras_are_those_of_the_metadata():
    """The modules that are looked for are brought by the extra that is named."""
    named = PROJECT["optional-dependencies"]

    def brought(extra: str) -> set[str]:
        needs = [Requirement(line) for line in named[extra]]
        own = [need for need in needs if need.name == "bigkernel"]
        return {need.name.lower() for need in needs}.union(
            *(brought(extra) for need in own for extra in need.extras)
        )

    comes_along = {"huggingface_hub"}  # with transformers
    for extra, modules in extras.MODULES.items():
        wanted = {DISTRIBUTIONS.get(m, m) for m in modules if m not in comes_along}
        assert wanted <= brought(extra)
        assert brought(extra) <= wanted | {"bigkernel"}
    assert set(named) == {"train", "cli", "images", "all", "test", "docs", "bench"}
    assert {"transformers", "typer", "pillow"} <= brought("all")
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {"torch", "numpy"}
