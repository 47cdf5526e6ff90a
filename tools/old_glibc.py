"""Lets a linker see the C library as it was in glibc 2.28, on a machine with a later one.

A linker binds each function to the newest version that the C library has of it: pow of glibc 2.29,
pthread_create of 2.34. The older ones are still there, for programs of their time. `write_stubs`
makes libraries that have nothing but names, each in the newest version that is old enough, and
`needed` says which versions a finished library asks for.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# What the tag manylinux_2_28 promises to be there, as auditwheel's policies say.
LIMITS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
SYMBOL = re.compile(
    r"^ *\d+: [0-9a-f]+ +(\d+|0x[0-9a-f]+) +(\w+) +(?:GLOBAL|WEAK|UNIQUE) +\w+ +(\w+) +"
    r"([^@ ]+)@@?(\w+?)_([\d.]+)(?: |$)",
    re.M,
)

Version = tuple[int, ...]


def _symbols(library: str | Path) -> list[tuple[int, str, bool, str, str, Version]]:
    """(bytes, type, whether it is there, name, "GLIBC", version) of each versioned symbol."""
    listed = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", str(library)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [
        (int(size, 0), kind, section != "UND", name, family, tuple(map(int, version.split("."))))
        for size, kind, section, name, family, version in SYMBOL.findall(listed.stdout)
    ]


def needed(library: str | Path) -> dict[str, dict[Version, list[str]]]:
    """Family -> version -> names that a library asks others for: GLIBC -> 2.14 -> memcpy."""
    found: dict[str, dict[Version, list[str]]] = {}
    for _, _, there, name, family, version in _symbols(library):
        if not there:
            found.setdefault(family, {}).setdefault(version, []).append(name)
    return found


def too_new(library: str | Path) -> list[str]:
    """What a library asks for that manylinux_2_28 does not promise: "pow of GLIBC 2.29"."""
    return [
        f"{name} of {family} {'.'.join(map(str, version))}"
        for family, versions in sorted(needed(library).items())
        for version, names in sorted(versions.items())
        if family in LIMITS and version > LIMITS[family]
        for name in sorted(names)
    ]


def is_old() -> bool:
    """Whether this machine's own C library is no later than the limit, or none of GNU's."""
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):
        return True
    return name != "glibc" or tuple(map(int, version.split(".")[:2])) <= LIMITS["GLIBC"]


def _write_stub(library: Path, folder: Path) -> Path:
    """A library of the same name with the same symbols, those of later versions left out."""
    newest: dict[str, tuple[Version, int, str]] = {}
    for size, kind, there, name, family, version in _symbols(library):
        is_wanted = there and family == "GLIBC" and kind != "TLS" and version <= LIMITS["GLIBC"]
        if is_wanted and version > newest.get(name, ((), 0, ""))[0]:
            newest[name] = (version, size, kind)
    text, versions = ["\t.text"], {version for version, _, _ in newest.values()}
    for number, (name, (version, size, kind)) in enumerate(sorted(newest.items())):
        is_data = kind == "OBJECT"
        text.append(
            f"\t{'.data' if is_data else '.text'}\n\t.globl stub{number}\n"
            f"\t.type stub{number}, %{'object' if is_data else 'function'}\n"
            f"\t.size stub{number}, {max(size, 1)}\nstub{number}:\n\t.skip {max(size, 1)}\n"
            f"\t.symver stub{number}, {name}@@GLIBC_{'.'.join(map(str, version))}"
        )
    text.append('\t.section .note.GNU-stack,"",%progbits')
    source, script, stub = (folder / f"{library.name}{end}" for end in (".s", ".map", ""))
    source.write_text("\n".join(text) + "\n")
    nodes = (f"GLIBC_{'.'.join(map(str, version))} {{ }};" for version in sorted(versions))
    script.write_text("\n".join(nodes) + "\n")
    names = f"-Wl,-soname,{library.name},--version-script,{script}"
    command = ["c++", "-shared", "-nostdlib", names, "-o", str(stub), str(source)]
    subprocess.run(command, check=True)
    return stub


def _file(name: str) -> Path:
    asked = subprocess.run(
        ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return Path(asked.stdout.strip())


def write_stubs(folder: Path) -> list[str]:
    """Write the stubs; returns what the linker has to be told, nothing where none are needed."""
    if is_old():
        return []
    folder.mkdir(parents=True, exist_ok=True)
    loaders = ("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1")
    loader = next((path for path in map(_file, loaders) if path.is_absolute()), None)
    libc, libm = (_write_stub(_file(name), folder) for name in ("libc.so.6", "libm.so.6"))
    parts = [str(libc), str(_file("libc_nonshared.a"))]
    if loader is not None:
        parts.append(f"AS_NEEDED ( {_write_stub(loader, folder)} )")
    (folder / "libc.so").write_text(f"GROUP ( {' '.join(parts)} )\n")
    (folder / "libm.so").write_text(f"GROUP ( {libm} )\n")
    return [f"-L{folder}", "-Wl,-z,defs"]  # what the stubs lack is an error of the linker's


def main(libraries: Sequence[str]) -> int:
    """Says what libraries ask for that is too new; 1 if there is any."""
    found = [f"{library}: {what}" for library in libraries for what in too_new(library)]
    print("\n".join(found) or "old enough for manylinux_2_28")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
