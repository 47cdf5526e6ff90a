"""What the source of a function says: read, compared, and compiled again with a change."""

from __future__ import annotations
import __future__ as future

import ast
import functools
import inspect
import linecache
import textwrap
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers

from bigkernel.integrations.contract import codes

_TRANSFORMERS = str(Path(transformers.__file__).parent)
_CHECKPOINTING = "forward_with_checkpointing"  # put around a layer by its class, not by a decorator
_DOCUMENTS = "auto_docstring"  # a decorator that writes documentation and returns what it got


class UnknownSource(Exception):
    """A function whose source cannot be relied on; says why."""


def read(function: Callable[..., Any]) -> tuple[ast.FunctionDef, types.FunctionType]:
    """The definition of a function, as it stands in its file, and the function inside its wrappers.

    Raises:
        UnknownSource: it cannot be read, or is not what runs.
    """
    wrappers = []
    while hasattr(function, "__wrapped__"):
        wrappers.append(function)
        function = function.__wrapped__
    if not isinstance(function, types.FunctionType) or function.__code__.co_freevars:
        raise UnknownSource("its forward is not a plain function")
    try:
        text = textwrap.dedent(inspect.getsource(function))
        found = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError):
        raise UnknownSource("the source of its forward cannot be read") from None
    if not isinstance(found, ast.FunctionDef):
        raise UnknownSource("the source of its forward cannot be read")
    found.decorator_list = [d for d in found.decorator_list if not _only_documents(d, function)]
    kept = [w for w in wrappers if w.__code__.co_name != _CHECKPOINTING]
    if len(kept) != len(found.decorator_list) or any(
        not w.__code__.co_filename.startswith(_TRANSFORMERS) for w in wrappers
    ):
        raise UnknownSource("its forward is wrapped by something unknown")
    ast.increment_lineno(found, function.__code__.co_firstlineno - 1)
    if not _is_what_runs(function.__code__):
        raise UnknownSource("the source of its forward is not what runs")
    return found, function


@functools.cache
def names_in(cls: Any) -> tuple[str, ...]:
    """The names of globals and attributes in the forward of a class."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code.co_names if code is not None else ()


def compile_again(
    definition: ast.FunctionDef, function: types.FunctionType, names: Mapping[str, Any]
) -> Any:
    """The function that ``definition`` defines where ``function`` stands, with other ``names``.

    Its globals are the module's own, so what is changed there later holds for it too; a name in
    ``names`` means what stands there instead.
    """
    outer = ast.parse(f"def make({', '.join(names)}):\n    return {definition.name}")
    make = outer.body[0]
    assert isinstance(make, ast.FunctionDef)
    make.body.insert(0, definition)
    flags = function.__code__.co_flags & future.annotations.compiler_flag
    tree = ast.fix_missing_locations(outer)
    code = compile(tree, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    scope: dict[str, Any] = {}
    exec(code, function.__globals__, scope)
    return scope["make"](*names.values())


def at_place(new: Any, old: ast.AST) -> Any:
    """``new``, whose nodes say that they stand where ``old`` does."""
    for node in ast.walk(new):
        ast.copy_location(node, old)
    return new


def own_attribute(node: ast.AST) -> str | None:
    """``name`` of ``self.name``."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "self" else None
    return None


def _only_documents(decorator: ast.expr, function: types.FunctionType) -> bool:
    name = decorator.func if isinstance(decorator, ast.Call) else decorator
    if not isinstance(name, ast.Name) or name.id != _DOCUMENTS:
        return False
    module = getattr(function.__globals__.get(name.id), "__module__", None)
    return module == "transformers.utils.auto_docstring"


def _is_what_runs(code: types.CodeType) -> bool:
    """Whether a function's file compiles to its code, which may have changed, as the file may."""
    place = code.co_firstlineno, code.co_qualname
    return code.co_code == _codes_in(code.co_filename).get(place)


@functools.cache
def _codes_in(file: str) -> dict[tuple[int, str], bytes]:
    """The code of each function in a file, by its first line and name."""
    try:
        whole = compile("".join(linecache.getlines(file)), file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return {}
    return {(code.co_firstlineno, code.co_qualname): code.co_code for code in codes(whole)}


def normal_form(*texts: str | ast.FunctionDef) -> str:
    """Function definitions without documentation, types and names of their own.

    Two functions of one normal form compute the same from the same attributes of ``self``.
    """
    return "\n".join(_normal(text) for text in texts)


def _normal(text: str | ast.FunctionDef) -> str:
    text = textwrap.dedent(text) if isinstance(text, str) else ast.unparse(text)
    found = ast.parse(text).body[0]
    assert isinstance(found, ast.FunctionDef)
    found.decorator_list, found.returns = [], None
    first = found.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        found.body = found.body[1:]
    own: dict[str, str] = {}
    for node in ast.walk(found):
        if isinstance(node, ast.arg):
            node.annotation = None
            node.arg = own.setdefault(node.arg, f"v{len(own)}")
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.setdefault(node.id, f"v{len(own)}")
    for node in ast.walk(found):
        if isinstance(node, ast.Name):
            node.id = own.get(node.id, node.id)
    return ast.unparse(found)
