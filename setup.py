"""Builds libbigkernel_ops.so: the kernels of the ops, behind LibTorch's stable ABI, without Python.

The environment variables that it heeds are in bigkernel/environment.py, and at the end of __doc__.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLD_GLIBC = runpy.run_path(str(ROOT / "tools" / "old_glibc.py"))
__doc__ += runpy.run_path(str(ROOT / "bigkernel" / "environment.py"))["as_text"]("build")
DEVELOPER_ARCHS = "8.0;9.0+PTX"
OLDEST = 80  # the generation of GPUs that kernels are for unless their file names another
ALL_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"  # PTX for those to come

# The stable ABI's version that the binary asks for; any torch from 2.11 on loads it.
TORCH_TARGET = "0x020b000000000000"

# libtorch.so has no function that we call, but needs libtorch_cuda.so in a torch with CUDA, whose
# stream is looked up weakly (csrc/cuda/stream.h): a linker that drops what is not needed, as some
# are told to, would leave every call on a GPU without its stream.
KEEP_TORCH = ("-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state")

# name -> (lanes of float, what GCC and Clang must be told)
ISAS = {
    "portable": (4, ""),
    "avx2": (8, "avx2,fma,f16c"),
    "avx512": (16, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"),
    "avx512_bf16": (16, "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"),
    "amx": (16, "amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"),
}


def flag(name: str) -> bool | None:
    """An on/off environment variable; None when it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}.")
    return None if value == "" else value == "1"


def find_toolkit() -> tuple[str, str] | str:
    """The CUDA toolkit's (folder, version), or a sentence that says why there is none.

    nvcc on the path may be a wrapper script somewhere else, so nvcc itself is asked where its
    toolkit lies.
    """
    nvcc = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc")
    if not os.path.exists(nvcc):
        return "nvcc was found neither on PATH nor in CUDA_HOME"
    dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dryrun.stdout + dryrun.stderr, re.M)
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+\.\d+)", version.stdout)
    if top is None or release is None:
        return f"{nvcc} does not say where its toolkit is"
    return os.path.realpath(top.group(1).strip()), release.group(1)


def choose_cuda(toolkit: tuple[str, str] | str) -> tuple[str, str] | None:
    """What ``find_toolkit`` found if CUDA kernels are to be built; None, and a line saying why."""
    import torch

    wanted = flag("BIGKERNEL_CUDA")
    if wanted is False:
        print("bigkernel: building for the CPU only (BIGKERNEL_CUDA=0)")
        return None
    if isinstance(toolkit, str):
        missing = toolkit
    elif torch.version.cuda is None and not wanted:
        missing = (
            "the installed torch has no CUDA (BIGKERNEL_CUDA=1 builds the kernels all the same)"
        )
    elif torch.version.cuda and toolkit[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        missing = f"nvcc is {toolkit[1]} but torch was built with CUDA {torch.version.cuda}"
    else:
        return toolkit
    if wanted:
        raise SystemExit(f"BIGKERNEL_CUDA=1, but the CUDA kernels cannot be built: {missing}.")
    print(f"bigkernel: building for the CPU only: {missing}")
    return None


def write_if_changed(path: Path, text: str) -> None:
    """Write a generated file; an unchanged one keeps its time, so that nothing is rebuilt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def multiplies(folder: Path) -> bool:
    """Whether an op has products of matrices, which AMX computes: its body asks for the header."""
    return any('"cpu/amx.h"' in path.read_text() for path in folder.glob("cpu_*.h"))


def isa_sources() -> list[str]:
    """One generated file per op and instruction set: flags, then the op's only vector body."""
    folder = ROOT / "build" / "generated"
    x86 = os.uname().machine in ("x86_64", "amd64")
    sources = []
    for body in sorted(ROOT.glob("csrc/*/cpu_body.h")):
        op = body.parent.name
        for isa, (lanes, target) in ISAS.items():
            if target and not x86:
                continue
            if isa == "avx512" and flag("BIGKERNEL_SANITIZE"):  # BK_AVX512_COPY in csrc/cpu/isa.h
                continue
            if isa == "amx" and not multiplies(body.parent):
                continue
            text = (
                f"#define BK_ISA {isa}\n#define BK_LANES {lanes}\n"
                f"#define BK_ISA_{isa.upper()} 1\n"
                '#include "cpu/isa_prologue.h"\n'
            )
            if target:
                text += (
                    "#if defined(__clang__)\n"
                    f'#pragma clang attribute push(__attribute__((target("{target}"))), '
                    "apply_to = function)\n#else\n"
                    f'#pragma GCC push_options\n#pragma GCC target("{target}")\n#endif\n'
                )
            text += f'#include "cpu/vec.h"\n#include "{op}/cpu_body.h"\n'
            if target:
                text += (
                    "#if defined(__clang__)\n#pragma clang attribute pop\n#else\n"
                    "#pragma GCC pop_options\n#endif\n"
                )
            path = folder / f"{op}_{isa}.cpp"
            write_if_changed(path, text)
            sources.append(str(path.relative_to(ROOT)))
    return sources


def write_headers() -> None:
    """Headers of csrc that are written from Python, which says the same things once for both."""
    table = runpy.run_path(str(ROOT / "bigkernel" / "ops" / "augment" / "table.py"))
    write_if_changed(ROOT / "csrc" / "augment" / "codes.h", table["header"]())


def codes_of(flags: Sequence[str]) -> set[tuple[bool, str]]:
    """What nvcc is told to compile for: (False, "80") machine code, (True, "90") PTX."""
    codes = [re.fullmatch(r"-gencode=arch=\w+,code=(sm|compute)_(\w+)", f) for f in flags]
    return {(code[1] == "compute", code[2]) for code in codes if code}


def names_of_archs(flags: Sequence[str]) -> str:
    """The same in words: "sm_80, sm_90, PTX for sm_90"."""
    found = codes_of(flags)
    ordered = sorted(found, key=lambda x: (x[0], int(re.sub(r"\D", "", x[1])), x[1]))
    return ", ".join(f"PTX for sm_{arch}" if ptx else f"sm_{arch}" for ptx, arch in ordered)


def generation_of(source: str) -> int:
    """The GPUs that a file is for: 90 of ``sm90_fwd.cu``; the oldest of all where it names none."""
    named = re.fullmatch(r"sm(\d+)_\w+\.cu", Path(source).name)
    return int(named[1]) if named else OLDEST


def flags_of_generation(generation: int, flags: Sequence[str]) -> tuple[str, ...]:
    """Those of nvcc's flags for architectures that kernels of a generation are compiled with.

    What sm_80 has, all later ones have too. Each of these has instructions that the next one lacks
    again: sm90's kernels are compiled for sm_90a alone, if sm_90 is wanted at all, and without PTX,
    which no other GPU could take.
    """
    number = {flag: int(re.sub(r"\D", "", a)) for flag in flags for _, a in codes_of([flag])}
    if generation == OLDEST:
        return tuple(flag for flag in flags if number.get(flag, generation) >= generation)
    own = f"{generation}a"
    wanted = generation in number.values()
    return (f"-gencode=arch=compute_{own},code=sm_{own}",) if wanted else ()


def where_archs_come_from() -> str:
    """Who named the architectures."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return f"TORCH_CUDA_ARCH_LIST={given}" if given else "what is in this machine"


def choose_generations(files: Sequence[str], flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """The CUDA files that are compiled, and what says to the others which later ones are there.

    Kernels of a later generation are left out where its architecture is not wanted: a plan that
    may take those of sm90 asks ``#ifdef BIGKERNEL_SM90``.
    """
    there = {g for g in map(generation_of, files) if flags_of_generation(g, flags)}
    older = [f for f in flags if f not in flags_of_generation(OLDEST, flags) and codes_of([f])]
    if OLDEST not in there:
        raise SystemExit(
            f"The CUDA kernels need GPUs of compute capability {OLDEST / 10} or later, got "
            f"{names_of_archs(older)} ({where_archs_come_from()}). "
            "BIGKERNEL_CUDA=0 builds for the CPU only."
        )
    if older:
        print(
            f"bigkernel: nothing is built for {names_of_archs(older)} ({where_archs_come_from()}): "
            f"the CUDA kernels need compute capability {OLDEST / 10} or later"
        )
    defines = [f"-DBIGKERNEL_SM{generation}" for generation in sorted(there - {OLDEST})]
    return [file for file in files if generation_of(file) in there], defines


def compile_by_generation(compiler: Callable[..., list[str]], flags: Sequence[str]) -> Any:
    """The compiler's ``compile``, once for each generation: it gives all files the same flags."""

    def compile_groups(sources: list[str], *args: Any, **options: Any) -> list[str]:
        given, objects = options.pop("extra_postargs"), []
        for generation in sorted({*map(generation_of, sources)}):
            group = [source for source in sources if generation_of(source) == generation]
            archs = flags_of_generation(generation, flags)
            postargs = {**given, "nvcc": [*given["nvcc"], *archs]}
            objects += compiler(group, *args, extra_postargs=postargs, **options)
        return objects

    return compile_groups


def count_kernels(objects: dict[str, list[Path]]) -> Counter[str]:
    """CUDA kernels an op: each is registered under its mangled name, a string in the object."""
    counts: Counter[str] = Counter()
    strings = ["readelf", "-p", ".rodata.str1.1", "-p", ".rodata.str1.8"]
    for op, paths in objects.items():
        for path in paths:
            listed = subprocess.run([*strings, str(path)], capture_output=True, text=True)
            counts[op] += len(re.findall(r"\] +_Z", listed.stdout))
    return counts


def extension() -> Extension:
    """bigkernel/libbigkernel_ops.so: what it is made of, and how."""
    import torch
    from torch.utils import cpp_extension

    def relative(pattern: str) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern))]

    sources = relative("csrc/*/cpu.cpp") + relative("csrc/cpu/*.cpp")
    sources += isa_sources()
    write_headers()
    include = [
        str(ROOT / "csrc"),
        str(ROOT / "build" / "generated"),
        *cpp_extension.include_paths(),
    ]
    libraries = ["torch_cpu"]
    library_dirs = cpp_extension.library_paths()
    cxx = [
        "-O3",
        "-g0",
        "-std=c++20",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-unknown-pragmas",
        "-Wno-maybe-uninitialized",  # false alarms in GCC 12's own AVX-512 headers
    ]
    cxx += ["-ffp-contract=fast", "-fno-math-errno", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    nvcc = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", "--threads", "2"]
    link = [*KEEP_TORCH]
    if flag("BIGKERNEL_SANITIZE"):
        sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1"]
        cxx = [
            *(f for f in cxx if f not in ("-O3", "-g0")),
            "-O1",
            *sanitize,
            "-fno-sanitize-recover=undefined",
        ]
        link += sanitize
    archs = ""
    found = find_toolkit()
    toolkit = choose_cuda(found)
    if not isinstance(found, str):
        # On the include path even of a CPU-only build: every file is then compiled with the same
        # flags, and turning CUDA on later compiles the CUDA files alone.
        target = f"{found[0]}/targets/{os.uname().machine}-linux"
        target = target if os.path.isdir(target) else found[0]
        include.append(f"{target}/include")
    # What __FILE__ says has no folder of this machine in it. The last one that fits is taken.
    folders = {str(ROOT): "bigkernel"} | dict.fromkeys(include[2:], "include")
    maps = [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]
    cxx += maps
    nvcc.append(f"-Xcompiler={','.join(maps)}")
    if toolkit is not None:
        sources += relative("csrc/*/cuda.cpp") + relative("csrc/cuda/*.cpp")
        cpp_extension.CUDA_HOME = toolkit[0]
        if torch.version.cuda is None:
            cpp_extension._check_cuda_version = lambda *_: None
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if wanted == "all":
            os.environ["TORCH_CUDA_ARCH_LIST"] = ALL_ARCHS
        elif not wanted and not torch.cuda.is_available():
            os.environ["TORCH_CUDA_ARCH_LIST"] = DEVELOPER_ARCHS
        arch_flags = cpp_extension._get_cuda_arch_flags()
        kernels, defines = choose_generations(relative("csrc/*/*.cu"), arch_flags)
        sources += kernels
        nvcc += defines
        compiled = {
            f for file in kernels for f in flags_of_generation(generation_of(file), arch_flags)
        }
        archs = names_of_archs(sorted(compiled))
        print(
            f"bigkernel: building for CPU and CUDA (toolkit {toolkit[1]} in {toolkit[0]}; {archs})"
        )
        library_dirs.append(
            f"{target}/lib" if os.path.isdir(f"{target}/lib") else f"{target}/lib64"
        )
        # The runtime goes in statically: the file then loads beside any torch.
        libraries += ["cudart_static", "rt", "pthread", "dl"]
    write_if_changed(
        ROOT / "build" / "generated" / "build_config.h",
        f'#define BIGKERNEL_CUDA_VERSION "{toolkit[1] if toolkit else ""}"\n'
        f'#define BIGKERNEL_CUDA_ARCHS "{archs}"\n',
    )
    return Extension(
        "bigkernel.libbigkernel_ops",
        sources=sources,
        include_dirs=include,
        libraries=libraries,
        library_dirs=library_dirs,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        depends=relative("csrc/**/*.h"),
        language="c++",
    )


class BuildPython(build_py):
    """Leaves a note in the package of what was compiled; tools/wheel_info.py reads it."""

    native = True

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        config = ROOT / "build" / "generated" / "build_config.h"
        defined = dict(
            re.findall(r'#define BIGKERNEL_(\w+) "(.*)"', config.read_text() if self.native else "")
        )
        note = {
            "native": self.native,
            "cuda": defined.get("CUDA_VERSION") or None,
            "cuda_archs": defined.get("CUDA_ARCHS", ""),
        }
        write_if_changed(
            Path(self.build_lib, "bigkernel", "build_info.json"), json.dumps(note) + "\n"
        )


class Wheel(bdist_wheel):
    """A wheel for every Python 3: nothing in it was compiled against one."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        if platform.startswith("linux_") and os.confstr("CS_GNU_LIBC_VERSION"):
            platform = platform.replace("linux", "manylinux_2_28")  # `check_names` has seen to it
        return "py3", "none", platform


def is_for_wheel(build_ext: Any) -> bool:
    """Whether a library is built to be packed, and not to be used where it is."""
    packs = build_ext.distribution.get_command_obj("bdist_wheel", create=False)
    return packs is not None and not build_ext.inplace


def make_small(extension: Extension) -> None:
    """Leave out of a wheel's library what only developers need: names, lines of device code.

    They hold folders of this machine, too. Kernels are packed as well as nvcc can.
    """
    nvcc = extension.extra_compile_args["nvcc"]
    nvcc.remove("-lineinfo")
    toolkit = find_toolkit()
    if not isinstance(toolkit, str) and tuple(map(int, toolkit[1].split("."))) >= (12, 8):
        nvcc.append("--compress-mode=size")
    extension.extra_link_args.append("-Wl,--strip-all")


def check_names(library: str) -> None:
    """Stop the build of a library that asks for functions which manylinux_2_28 does not promise."""
    if found := OLD_GLIBC["too_new"](library):
        raise SystemExit(
            f"{library} must need nothing later than manylinux_2_28 has, got {', '.join(found)}. "
            "tools/old_glibc.py says how the linker is kept from it."
        )


class BuildPurePython(BuildPython):
    """The same of a package without compiled kernels."""

    native = False


# The time that files have in a wheel, which is then the same bytes whenever it is made: the first
# that a zip archive can hold.
os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")

if flag("BIGKERNEL_NATIVE") is False:
    if flag("BIGKERNEL_CUDA"):
        sys.exit("BIGKERNEL_CUDA=1 asks for compiled kernels, BIGKERNEL_NATIVE=0 forbids them.")
    print("bigkernel: pure-Python package (BIGKERNEL_NATIVE=0)")
    setup(cmdclass={"build_py": BuildPurePython})
else:
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        raise SystemExit(
            "bigkernel: building the kernels needs torch in this environment: pip install torch, "
            "then pip install --no-build-isolation (or set BIGKERNEL_NATIVE=0)."
        ) from error

    class Build(BuildExtension):
        """Gives each CUDA file its architectures, and counts the kernels that were compiled."""

        def build_extension(self, ext: Extension) -> None:
            if any(source.endswith(".cu") for source in ext.sources):
                from torch.utils.cpp_extension import _get_cuda_arch_flags

                flags = _get_cuda_arch_flags()
                self.compiler.compile = compile_by_generation(self.compiler.compile, flags)
            if is_for_wheel(self):
                make_small(ext)
            if not flag("BIGKERNEL_SANITIZE"):
                ext.extra_link_args += OLD_GLIBC["write_stubs"](ROOT / "build" / "old_glibc")
            super().build_extension(ext)
            library = self.get_ext_fullpath(ext.name)
            if not flag("BIGKERNEL_SANITIZE") and os.path.exists(library):
                check_names(library)  # tools/compile_commands.py links none

        def build_extensions(self) -> None:
            super().build_extensions()
            objects: dict[str, list[Path]] = {}
            for source in map(Path, self.extensions[0].sources):
                if source.suffix == ".cu":
                    path = Path(self.build_temp, source).with_suffix(".o")
                    objects.setdefault(source.parent.name, []).append(path)
            counts = count_kernels(objects)
            if counts:
                each = ", ".join(f"{op} {n}" for op, n in sorted(counts.items()))
                print(f"bigkernel: {counts.total()} CUDA kernels for each architecture ({each})")

    setup(
        ext_modules=[extension()],
        cmdclass={
            "build_ext": Build.with_options(no_python_abi_suffix=True),
            "build_py": BuildPython,
            "bdist_wheel": Wheel,
        },
    )
