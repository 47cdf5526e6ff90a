"""Writes build/compile_commands.json: how setup.py compiles each file of csrc, for editors.

    python tools/compile_commands.py [INSTRUCTION SET]

setup.py runs as in a build, but nothing is compiled: what it asks ninja for is written down. A
header is listed too, with the flags of the C++ files, as if it were compiled alone, and as the body
of one instruction set: portable, unless another is named (cpu/amx.h: amx).
"""

import json
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "build" / "compile_commands.json"
# What is for ninja, and what nobody but nvcc understands.
LEFT_OUT = re.compile(
    r" -MM?D -MF \S+| -o \S+"
    r"| --expt-relaxed-constexpr| --compiler-options \S+| --threads \S+"
    r"| -Xcompiler=\S+| -lineinfo| -gencode=\S+"
)


def run_setup() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What setup.py defines, and the entries of all files that it would compile."""
    from distutils.ccompiler import CCompiler  # that of setuptools, which torch has imported

    entries: list[dict[str, Any]] = []

    def note(folder: str, *_: object, **__: object) -> None:
        listed = subprocess.check_output(["ninja", "-t", "compdb"], cwd=folder, text=True)
        entries.extend(
            {
                "directory": str(ROOT),
                "file": entry["file"],
                "arguments": shlex.split(LEFT_OUT.sub("", entry["command"])),
            }
            for entry in json.loads(listed)
            if Path(entry["file"]).suffix in (".cpp", ".cu")
        )

    cpp_extension._run_ninja_build = note
    CCompiler.link_shared_object = lambda *_, **__: None
    with tempfile.TemporaryDirectory() as folder:
        sys.argv[1:] = ["--quiet", "build_ext", "--build-temp", folder, "--build-lib", folder]
        return runpy.run_path(str(ROOT / "setup.py"), run_name="__main__"), entries


def body_flags(isas: dict[str, tuple[int, str]], isa: str) -> list[str]:
    """As the files that setup.py generates for an instruction set begin."""
    lanes, target = isas[isa]
    defined = [f"-DBK_ISA={isa}", f"-DBK_LANES={lanes}", f"-DBK_ISA_{isa.upper()}=1"]
    return defined + [f"-m{name}" for name in target.split(",") if name]


def header_entries(
    isas: dict[str, tuple[int, str]], sources: list[dict[str, Any]], isa: str
) -> list[dict[str, Any]]:
    """The headers that a C++ compiler can read: all but those of the CUDA kernels."""
    example = next(e for e in sources if e["file"].endswith("csrc/cpu/isa.cpp"))
    entries = []
    for path in sorted(ROOT.glob("csrc/*/*.h")):
        if path.parent.name == "cuda" or re.match(r"cuda|sm\d", path.name):
            continue
        flags = [word for word in example["arguments"] if word not in ("-c", example["file"])]
        body = body_flags(isas, "amx" if path.name == "amx.h" else isa)
        arguments = [*flags, *body, "-fsyntax-only", "-x", "c++", str(path)]
        entries.append({"directory": str(ROOT), "file": str(path), "arguments": arguments})
    return entries


def main(isa: str = "portable") -> None:
    """Writes the file and says how much is in it."""
    defined, sources = run_setup()
    if isa not in defined["ISAS"]:
        raise SystemExit(
            f"the instruction set must be one of {', '.join(defined['ISAS'])}, got {isa}."
        )
    entries = sources + header_entries(defined["ISAS"], sources, isa)
    RESULT.write_text(json.dumps(entries, indent=1) + "\n")
    print(
        f"{RESULT.relative_to(ROOT)}: {len(sources)} sources, {len(entries) - len(sources)} headers"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
