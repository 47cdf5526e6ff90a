"""setup.py's choices: native or not, CUDA or not, and what it says about them."""

import ctypes
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from torch.utils import cpp_extension

from bigkernel import _library

ROOT = Path(__file__).resolve().parent.parent
old_glibc = runpy.run_path(str(ROOT / "tools" / "old_glibc.py"))
needs_ninja = pytest.mark.skipif(
    not (shutil.which("ninja") and shutil.which("c++")), reason="no ninja or no c++ on the path"
)


def setup_py(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


def test_pure_python_package_says_so():
    done = setup_py("--name", BIGKERNEL_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert "bigkernel: pure-Python package (BIGKERNEL_NATIVE=0)" in done.stdout


def test_cpu_only_build_says_so_in_one_line():
    done = setup_py("--name", BIGKERNEL_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "bigkernel: building for the CPU only (BIGKERNEL_CUDA=0)" in done.stdout


def test_asking_for_cuda_without_nvcc_is_an_error(tmp_path):
    done = setup_py("--name", BIGKERNEL_CUDA="1", PATH="/nonexistent", CUDA_HOME="")
    assert done.returncode != 0
    assert "BIGKERNEL_CUDA=1, but the CUDA kernels cannot be built: nvcc was found" in done.stderr


def test_without_nvcc_the_build_is_for_the_cpu():
    done = setup_py("--name", BIGKERNEL_CUDA="", PATH="/nonexistent", CUDA_HOME="")
    assert done.returncode == 0, done.stderr
    assert "building for the CPU only: nvcc was found neither" in done.stdout


FAKE_NVCC = """#!/bin/sh
case "$1" in
--dryrun) printf '#$ _SPACE_=\\n#$ TOP={top}\\n#$ PATH=/usr/bin\\n' >&2 ;;
--version) echo 'Cuda compilation tools, release 99.3, V99.3.1' ;;
esac
"""


def test_nvcc_itself_is_asked_where_its_toolkit_is(tmp_path):
    """nvcc on the path is a wrapper in another place, as it often is."""
    toolkit, wrapper = tmp_path / "toolkit 99", tmp_path / "bin" / "nvcc"
    toolkit.mkdir()
    wrapper.parent.mkdir()
    (tmp_path / "link").symlink_to(toolkit)
    path = f"{wrapper.parent}:{os.environ['PATH']}"
    show = "import setuptools; setuptools.setup = lambda **_: None; import setup; "
    show += "print(setup.find_toolkit())"

    def found(script):
        wrapper.write_text(script)
        wrapper.chmod(0o755)
        environment = {**os.environ, "PATH": path, "BIGKERNEL_NATIVE": "0", "CUDA_HOME": "/nowhere"}
        done = subprocess.run(
            [sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    assert found(FAKE_NVCC.format(top=tmp_path / "link" / ".")) == str((str(toolkit), "99.3"))
    assert found("#!/bin/sh\n") == f"{wrapper} does not say where its toolkit is"


@pytest.mark.parametrize("variable", ["BIGKERNEL_CUDA", "BIGKERNEL_NATIVE"])
def test_nonsense_in_a_switch_is_refused(variable):
    done = setup_py("--name", **{variable: "yes"})
    assert done.returncode != 0
    assert f"{variable} must be 0 or 1, got 'yes'" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize(
    ("wanted", "compiled"),
    [
        ("all", "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, PTX for sm_120"),
        ("8.6;9.0+PTX", "sm_86, sm_90, PTX for sm_90"),
    ],
)
def test_architectures_are_chosen_and_named(wanted, compiled):
    done = setup_py("--name", BIGKERNEL_CUDA="1", TORCH_CUDA_ARCH_LIST=wanted)
    assert done.returncode == 0, done.stderr
    assert f"; {compiled})" in done.stdout


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module, with nothing set up."""
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, BIGKERNEL_NATIVE="0"):
        return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def archs(*names: str) -> list[str]:
    """nvcc's flags for sm_80, PTX for compute_90 ..."""
    number = re.compile(r"\w+_(\w+)")
    return [f"-gencode=arch=compute_{number.match(n)[1]},code={n}" for n in names]


def test_each_generation_has_its_own_architectures(setup):
    wanted = archs("sm_80", "sm_86", "sm_90", "sm_120", "compute_120")
    of = {name: setup["generation_of"](f"csrc/op/{name}.cu")
          for name in ("fwd", "sm80_fwd", "sm90_fwd", "sm100_fwd")}  # fmt: skip
    assert of == {"fwd": 80, "sm80_fwd": 80, "sm90_fwd": 90, "sm100_fwd": 100}
    flags = setup["flags_of_generation"]
    assert flags(80, wanted) == tuple(wanted)
    assert flags(80, archs("sm_75", "sm_80")) == tuple(archs("sm_80"))
    assert flags(90, wanted) == tuple(archs("sm_90a"))
    assert flags(90, archs("sm_80", "sm_90a")) == tuple(archs("sm_90a"))
    assert flags(90, archs("sm_80", "sm_100")) == flags(100, wanted) == ()


def test_kernels_of_a_generation_that_is_not_wanted_are_left_out(setup):
    files = ["csrc/op/fwd.cu", "csrc/op/sm80_fwd.cu", "csrc/op/sm90_fwd.cu"]
    choose = setup["choose_generations"]
    assert choose(files, archs("sm_80", "sm_90")) == (files, ["-DBIGKERNEL_SM90"])
    assert choose(files, archs("sm_80")) == (files[:2], [])
    with pytest.raises(SystemExit, match=r"compute capability 8\.0 or later, got sm_75 \("):
        choose(files, archs("sm_75"))


def test_the_compiler_is_told_the_architectures_of_each_file(setup):
    calls = []

    def compiler(sources, *, extra_postargs, output_dir):
        calls.append((sources, extra_postargs, output_dir))
        return [f"{output_dir}/{source}.o" for source in sources]

    wanted = archs("sm_80", "sm_90", "compute_90")
    compile_all = setup["compile_by_generation"](compiler, wanted)
    given = {"cxx": ["-O3"], "nvcc": ["-lineinfo"]}
    sources = ["op/cpu.cpp", "op/sm90_fwd.cu", "op/sm80_fwd.cu", "op/fwd.cu"]
    objects = compile_all(sources, extra_postargs=given, output_dir="o")
    assert sorted(objects) == sorted(f"o/{source}.o" for source in sources)
    assert calls == [
        (["op/cpu.cpp", "op/sm80_fwd.cu", "op/fwd.cu"],
         {"cxx": ["-O3"], "nvcc": ["-lineinfo", *wanted]}, "o"),
        (["op/sm90_fwd.cu"], {"cxx": ["-O3"], "nvcc": ["-lineinfo", *archs("sm_90a")]}, "o"),
    ]  # fmt: skip
    assert given == {"cxx": ["-O3"], "nvcc": ["-lineinfo"]}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_architectures_that_no_kernel_takes_are_refused():
    done = setup_py("--name", BIGKERNEL_CUDA="1", TORCH_CUDA_ARCH_LIST="7.5")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "The CUDA kernels need GPUs of compute capability 8.0 or later, got sm_75 "
        "(TORCH_CUDA_ARCH_LIST=7.5). BIGKERNEL_CUDA=0 builds for the CPU only."
    )
    done = setup_py("--name", BIGKERNEL_CUDA="1", TORCH_CUDA_ARCH_LIST="7.5;8.0")
    assert "nothing is built for sm_75 (TORCH_CUDA_ARCH_LIST=7.5;8.0)" in done.stdout
    assert "; sm_80)" in done.stdout


def test_a_gpu_of_this_machine_that_is_too_old_is_named(setup, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    with pytest.raises(SystemExit, match=r"got sm_75 \(what is in this machine\)"):
        setup["choose_generations"](["csrc/op/fwd.cu"], archs("sm_75"))


def test_instruction_sets_are_those_of_the_table(monkeypatch):
    """What `setup.py` compiles a body for is declared, named and chosen in csrc/cpu."""
    monkeypatch.setenv("BIGKERNEL_NATIVE", "0")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    isas = [*runpy.run_path(str(ROOT / "setup.py"))["ISAS"]]
    declared, names = ((ROOT / "csrc" / "cpu" / f"isa.{end}").read_text() for end in ("h", "cpp"))
    x86, other = declared.split("#define BK_DECLARE_PER_ISA(...)")[1:]
    assert re.findall(r"namespace (\w+) {", x86) == isas
    assert re.findall(r"namespace (\w+) {", other) == isas[:1]
    assert re.search(r"kNames\[\] = {(.*)}", names)[1] == ", ".join(f'"{isa}"' for isa in isas)
    order = re.search(r"enum class Isa : int {(.*)}", declared)[1]
    spelt = [
        f"k{''.join(word.title() for word in isa.split('_'))} = {i}" for i, isa in enumerate(isas)
    ]
    assert order.strip() == ", ".join(spelt)


ARM = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.skipif(ARM is None, reason="no aarch64-linux-gnu-g++ on the path")
def test_cpu_sources_compile_for_arm():
    """Of the generated files ARM gets the portable ones; `setup.py` makes them in every build."""
    generated = ROOT / "build" / "generated"
    if not (generated / "attention_portable.cpp").exists():
        pytest.skip("the native library was not built here")
    sources = [*generated.glob("*_portable.cpp"), *ROOT.glob("csrc/*/cpu.cpp")]
    sources += ROOT.glob("csrc/cpu/*.cpp")
    assert len(sources) >= 7
    folders = [ROOT / "csrc", generated, *cpp_extension.include_paths()]
    options = [
        "-std=c++20",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-unknown-pragmas",
        "-fsyntax-only",
    ]
    options += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-I{folder}" for folder in folders)]
    done = subprocess.run([ARM, *options, *map(str, sources)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def compile_commands():
    """The entries of build/compile_commands.json, by their files."""
    tool = [sys.executable, "tools/compile_commands.py"]
    environment = {**os.environ, "BIGKERNEL_CUDA": "0"}
    done = subprocess.run(tool, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads((ROOT / "build" / "compile_commands.json").read_text())
    return {str(Path(entry["file"]).relative_to(ROOT)): entry for entry in entries}


@needs_ninja
def test_editors_are_told_the_flags_of_every_file(compile_commands):
    native = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    kernels = {name for name in native if re.search(r"/cuda/|/cuda|/sm\d+_|\.cu$", name)}
    assert {n for n in native - kernels if n.endswith((".h", ".cpp"))} <= set(compile_commands)
    assert "-ffp-contract=fast" in compile_commands["csrc/norm/cpu.cpp"]["arguments"]
    assert "-DBK_ISA=amx" in compile_commands["csrc/cpu/amx.h"]["arguments"]


@needs_ninja
def test_no_folder_of_this_machine_is_compiled_in(compile_commands, tmp_path):
    """A registration keeps the name of the file that it stands in."""
    command = compile_commands["csrc/cpu/facts.cpp"]["arguments"]
    subprocess.run([*command, "-o", tmp_path / "facts.o"], cwd=ROOT, check=True)
    compiled = (tmp_path / "facts.o").read_bytes()
    assert b"bigkernel/csrc/cpu/facts.cpp" in compiled
    assert str(ROOT).encode() not in compiled
    assert sys.prefix.encode() not in compiled


# A body, what it includes in the middle of others, the words of all, and the one for AMX.
FEW = ["norm/cpu_body.h", "attention/cpu_scores.h", "cpu/vec.h", "cpu/amx.h"]
HEADERS = [f"csrc/{path.parent.name}/{path.name}" for path in sorted(ROOT.glob("csrc/*/*.h"))]
HEADERS = [name for name in HEADERS if not re.search(r"/cuda/|/cuda|/sm\d+_", name)]


@needs_ninja
@pytest.mark.parametrize(
    "header",
    [
        pytest.param(name, marks=() if name.removeprefix("csrc/") in FEW else pytest.mark.slow)
        for name in HEADERS
    ],
)
def test_a_header_stands_alone(compile_commands, header):
    if header.endswith("amx.h") and platform.machine() != "x86_64":
        pytest.skip("AMX is of x86")
    done = subprocess.run(
        compile_commands[header]["arguments"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_ninja
@pytest.mark.parametrize(
    ("signature", "fits"),
    [
        ("std::tuple<Tensor, Tensor> run(std::vector<Tensor> x, double scale, int64_t n)", True),
        ("Tensor run(const Tensor& x, float scale)", False),
        ("Tensor run(const Tensor& x, std::optional<int> n)", False),
        ("std::tuple<Tensor, float> run(const Tensor& x)", False),
    ],
)
def test_a_kernel_of_other_types_than_a_schemas_does_not_compile(
    compile_commands, tmp_path, signature, fits
):
    """Torch would read a float of the schema, a double, as the lower half of its bits."""
    source = tmp_path / "run.h"
    source.write_text(
        '#include "common/box.h"\nusing torch::stable::Tensor;\n'
        f"{signature};\nauto* boxed = BK_BOX(run);\n"
    )
    box = "csrc/common/box.h"
    command = compile_commands[box]["arguments"]
    given = [str(source) if word.endswith(box) else word for word in command]
    assert given != command
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == fits, done.stderr
    assert fits or "static assertion failed: what a schema calls" in done.stderr


def test_contradicting_switches_are_refused():
    done = setup_py("--name", BIGKERNEL_CUDA="1", BIGKERNEL_NATIVE="0")
    assert done.returncode != 0
    assert "BIGKERNEL_NATIVE=0 forbids them" in done.stderr


needs_library = pytest.mark.skipif(
    _library.native is None, reason="the native library is not built"
)


@needs_library
def test_library_needs_torch_and_neither_cuda_nor_python():
    dynamic = subprocess.run(
        ["readelf", "--dynamic", "--dyn-syms", "--wide", _library.native.path],
        capture_output=True,
        text=True,
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert {"libtorch.so", "libtorch_cpu.so"} <= {*needed}  # the first for the CUDA stream
    assert not [n for n in needed if re.search("cuda|python|^libc10", n)], needed
    symbols = re.findall(r"^ *\d+: .* (\S+)$", dynamic, re.M)
    assert any(name.startswith("torch_library_impl") for name in symbols)
    assert not [name for name in symbols if re.match("_?Py", name)]


FAKE_TORCH = """
extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  *stream = reinterpret_cast<void*>(1000 + device);
  return device == 9;
}
"""
STREAM = """
#include "cuda/stream.h"
extern "C" const char* stream_of(int device, void** stream) {
  static std::string said;
  said.clear();
  try {
    *stream = bigkernel::current_cuda_stream(device);
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
"""
ASK = """
import ctypes, sys
stream_of, stream = ctypes.CDLL(sys.argv[1]).stream_of, ctypes.c_void_p()
stream_of.restype = ctypes.c_char_p
for device in (3, 9):
    said = stream_of(device, ctypes.byref(stream)).decode().splitlines()
    print(said[0] if said else stream.value)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the path")
def test_the_current_stream_is_found_through_libtorch(setup, tmp_path):
    """A torch with CUDA, as far as its names: libtorch.so needs libtorch_cuda.so, the function's.

    The linker is told to drop what is not needed, as some distributions tell theirs; what setup.py
    says to it has to win. In a process without torch, whose libtorch.so would be taken.
    """

    def build(name, source, *options):
        (tmp_path / f"{name}.cpp").write_text(source)
        include = [f"-I{ROOT}/csrc", *(f"-I{path}" for path in cpp_extension.include_paths())]
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-fvisibility=default", *include]
        command += [f"{tmp_path}/{name}.cpp", "-o", f"{tmp_path}/{name}.so", f"-L{tmp_path}"]
        subprocess.run([*command, "-Wl,-rpath,$ORIGIN", *options], check=True)

    build("libtorch_cuda", FAKE_TORCH)
    build("libtorch", "", "-Wl,--no-as-needed", "-ltorch_cuda")
    said = {}
    for name, link in (("kept", setup["KEEP_TORCH"]), ("dropped", ["-ltorch"])):
        build(name, STREAM, "-Wl,--as-needed", *link)
        command = [sys.executable, "-c", ASK, str(tmp_path / f"{name}.so")]
        said[name] = subprocess.check_output(command, text=True).splitlines()
    assert said["kept"][0] == "1003"
    assert "torch could not name the current stream of CUDA device 9" in said["kept"][1]
    assert all("this torch was built without CUDA" in line for line in said["dropped"])


@needs_library
def test_library_asks_for_nothing_later_than_manylinux_2_28():
    if _library.native.build_info().sanitizer:
        pytest.skip("a sanitized library is for this machine")
    assert old_glibc["too_new"](_library.native.path) == []
    assert old_glibc["needed"](_library.native.path)["GLIBC"]


@pytest.mark.skipif(old_glibc["is_old"](), reason="the machine's own C library is an old one")
@pytest.mark.parametrize("folder", [None, "stubs"])
def test_a_linker_is_kept_from_what_a_later_glibc_has(folder, tmp_path):
    """The functions that got a new version after 2.28, one of each library."""
    source, library = tmp_path / "new.cpp", tmp_path / "libnew.so"
    source.write_text(
        "#include <cmath>\n#include <pthread.h>\n"
        "double power(double x, double y) { return std::pow(x, y) + std::hypot(x, y); }\n"
        "int thread(pthread_t* t, void* (*run)(void*)) { return pthread_create(t, 0, run, 0); }\n"
    )
    options = old_glibc["write_stubs"](tmp_path / folder) if folder else []
    command = ["g++", "-shared", "-fPIC", "-O1", source, "-o", library, *options]
    subprocess.run(command, check=True)
    found = old_glibc["too_new"](library)
    if folder:
        assert found == []
        assert ctypes.CDLL(str(library))._Z5powerdd is not None  # and it can be loaded here
    else:
        assert {line.split()[0] for line in found} >= {"pow"}


@pytest.mark.skipif(old_glibc["is_old"](), reason="the machine's own C library is an old one")
def test_what_old_glibc_lacks_is_an_error_of_the_linker(tmp_path):
    source = tmp_path / "new.cpp"
    source.write_text("#include <sys/single_threaded.h>\nbool f() {return __libc_single_threaded;}")
    options = old_glibc["write_stubs"](tmp_path / "stubs")
    command = ["g++", "-shared", "-fPIC", source, "-o", tmp_path / "libnew.so", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "__libc_single_threaded" in done.stderr


def test_a_library_that_needs_too_much_stops_the_build(setup, monkeypatch):
    monkeypatch.setitem(setup["OLD_GLIBC"], "too_new", lambda _: ["pow of GLIBC 2.29"])
    with pytest.raises(SystemExit, match=r"nothing later than manylinux_2_28.*pow of GLIBC 2\.29"):
        setup["check_names"]("lib.so")


@needs_library
def test_build_info_names_what_was_compiled():
    info = _library.native.build_info()
    assert (info.cuda is None) == (info.cuda_archs == "")
    assert _library.kernels["adam_step_", "cuda"] == (info.cuda is not None)


@needs_library
def test_library_loads_without_torch_imported_first():
    done = subprocess.run(
        [sys.executable, "-c", "import bigkernel; print(bigkernel.cpu_isas())"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "portable" in done.stdout
