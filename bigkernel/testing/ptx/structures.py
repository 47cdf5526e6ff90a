"""C structs as ctypes, read from the header that declares them, so that nobody copies a layout.

After ``layout = Structures(include, "op/cuda.h")``, ``layout.Args`` is the ctypes.Structure of
``struct Args`` in that header or one that it includes, and ``layout.Kind`` the IntEnum of
``enum class Kind : int32_t``. Members are numbers, pointers, enums, arrays and other such structs;
a struct may have a base. What else a struct holds is refused.
"""

from __future__ import annotations

import ctypes
import enum
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TYPES: dict[str, Any] = {
    f"{sign}int{bits}_t": getattr(ctypes, f"c_{sign}int{bits}")
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
} | {
    "bool": ctypes.c_bool,
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "size_t": ctypes.c_size_t,
    "uintptr_t": ctypes.c_size_t,
}
_DECLARATOR = re.compile(r"(\**)\s*(\w+)\s*((?:\[\d+\]\s*)*)(?:=\s*[\w.:]+)?")


class Structures:
    """The structs and enums of a header and of what it includes from ``include``."""

    def __init__(self, include: Path, *headers: str) -> None:
        self._include, self._seen = include, set[str]()
        self._text = "\n".join(map(self._read, headers))
        self._made: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _read(self, header: str) -> str:
        path = self._include / header
        if header in self._seen or not path.exists():
            return ""
        self._seen.add(header)
        text = re.sub(r"//.*|/\*.*?\*/", "", path.read_text(), flags=re.MULTILINE)
        return re.sub(r'#include "(.*)"', lambda found: self._read(found[1]), text)

    def _make(self, name: str) -> Any:
        found = re.search(rf"enum(?: class)? {name} : \w+ \{{([^}}]*)\}}", self._text)
        if found:
            return enum.IntEnum(name, dict(_values(found[1])))
        found = re.search(rf"struct {name}(?: : (\w+))? \{{([^{{}}]*)\}};", self._text)
        if not found:
            raise AttributeError(f"no struct or enum {name} of plain members in {self._seen}")
        base = getattr(self, found[1]) if found[1] else ctypes.Structure
        fields = [
            field for line in found[2].split(";") if line.strip() for field in self._members(line)
        ]
        return type(name, (base,), {"_fields_": fields})

    def _members(self, line: str) -> Iterator[tuple[str, Any]]:
        """Those of one declaration: ``const float *a, *b``."""
        kind, rest = re.sub(r"^const ", "", line.strip()).partition(" ")[::2]
        star = "*" if kind.endswith("*") else ""  # "void* data" is "void *data"
        kind, rest = kind.rstrip("*"), star + rest
        for part in rest.split(","):
            found = _DECLARATOR.fullmatch(part.strip())
            if not found:
                raise NotImplementedError(f"not understood in a struct: {line.strip()}")
            stars, name, sizes = found.groups()
            member: Any = ctypes.c_void_p if stars else self._type(kind)
            if (kind, stars) == ("char", "*"):
                member = ctypes.c_char_p
            for size in reversed(re.findall(r"\d+", sizes)):
                member = member * int(size)
            yield name, member

    def _type(self, name: str) -> Any:
        if name in _TYPES:
            return _TYPES[name]
        found = re.search(rf"enum(?: class)? {name} : (\w+)", self._text)
        return _TYPES[found[1]] if found else getattr(self, name)


def _values(body: str) -> Iterator[tuple[str, int]]:
    value = -1
    for part in body.split(","):
        if part.strip():
            name, _, given = part.partition("=")
            value = int(given, 0) if given.strip() else value + 1
            yield name.strip(), value
