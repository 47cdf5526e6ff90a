"""The words in which a function says what it asks of its arguments.

``expect = Expect("rope")`` belongs to one function. A check is one line::

    expect.dtype("q", q, FLOATING, "float16, bfloat16, float32 or float64", TO_FLOAT)
    expect.device("k", k, q.device, "q")
    expect(dim > 0, "k's head dim", "positive", dim)

and raises one sentence where an argument is otherwise. Ops are called hundreds of
times in a step: what takes time to say is put together only where it is said, by ``raise
expect.error(...)`` where no other word fits.
"""

from collections.abc import Container, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from bigkernel.errors import BadArgument

T = TypeVar("T")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOATING_NAMES = "float16, bfloat16, float32 or float64"
TO_FLOAT = "Convert it with .to(torch.float32)"
# Tensor types whose operations mean what torch says of their data.
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_DEFAULTS = (
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    torch._C._disabled_torch_function_impl,
)


class Expect:
    """Checks of the arguments of one function, whose name its sentences begin with."""

    def __init__(self, function: str) -> None:
        self.function = function

    def error(
        self,
        argument: str,
        expected: str,
        got: object,
        fix: str = "",
        cls: type[Exception] = BadArgument,
    ) -> Exception:
        """What to raise: which argument, what was expected, what was given, how to fix it."""
        hint = f" {fix.rstrip('.')}." if fix else ""
        return cls(f"bigkernel.{self.function}: {argument} must be {expected}, got {got}.{hint}")

    def __call__(
        self,
        condition: object,
        argument: str,
        expected: str,
        got: object,
        fix: str = "",
        cls: type[Exception] = BadArgument,
    ) -> None:
        if not condition:
            raise self.error(argument, expected, got, fix, cls)

    def kind(
        self,
        name: str,
        x: object,
        kinds: type[T] | tuple[type[T], ...],
        expected: str,
        fix: str = "",
    ) -> T:
        """``x``, which is of one of the classes."""
        if not isinstance(x, kinds):
            raise self.error(name, expected, type(x).__name__, fix, TypeError)
        return x

    def tensor(self, name: str, x: object, fix: str = "") -> Tensor:
        """``x``, which is a tensor."""
        if not isinstance(x, Tensor):
            raise self.error(name, "a tensor", type(x).__name__, fix, TypeError)
        return x

    def dense(
        self,
        name: str,
        x: Tensor,
        expected: str = "a dense tensor",
        fix: str = "Convert it with .to_dense()",
        cls: type[Exception] = TypeError,
    ) -> None:
        """Not sparse, and not one of mkldnn's."""
        if x.layout is not torch.strided:
            raise self.error(name, expected, x.layout, fix, cls)

    def meaning(self, name: str, x: Tensor, fix: str = "") -> None:
        """No subclass with a ``__torch_function__`` of its own: anything may stand in its data.

        Those with ``__torch_dispatch__`` alone (FakeTensor, wrappers) see the operator themselves.
        """
        kind = type(x)
        if kind in _PLAIN:
            return
        function = kind.__torch_function__
        if getattr(function, "__func__", function) not in _DEFAULTS:
            got = f"a {kind.__name__}, whose data alone may not say what it means"
            usual = "Convert it with .as_subclass(torch.Tensor), if its data is all there is to it"
            raise self.error(name, "a plain tensor", got, fix or usual, TypeError)

    def dtype(
        self,
        name: str,
        x: Tensor,
        allowed: Container[torch.dtype],
        expected: str,
        fix: str = "",
        cls: type[Exception] = TypeError,
    ) -> None:
        if x.dtype not in allowed:
            raise self.error(name, expected, x.dtype, fix, cls)

    def device(self, name: str, x: Tensor, device: torch.device, whose: str = "") -> None:
        """``whose`` names the argument that ``device`` is of."""
        if x.device != device:
            where = f"on {whose}'s device, {device}" if whose else f"on {device}"
            raise self.error(name, where, x.device)

    def like(self, name: str, x: Tensor, other: str, y: Tensor) -> None:
        """Of the dtype and on the device of ``y``, the argument ``other``."""
        if x.dtype != y.dtype:
            raise self.error(name, f"of {other}'s dtype, {y.dtype}", x.dtype, cls=TypeError)
        self.device(name, x, y.device, other)

    def rank(self, name: str, x: Tensor, rank: int, expected: str, fix: str = "") -> None:
        """``expected`` names the dimensions: "[N, C, H, W]"."""
        if x.dim() != rank:
            raise self.error(name, expected, shape_of(x), fix)

    def shape(self, name: str, x: Tensor, *shapes: Sequence[int], of: str = "shape") -> None:
        """One of ``shapes``, which ``of`` may explain: "x's shape"."""
        if x.shape not in shapes:
            expected = " or ".join(str(tuple(shape)) for shape in shapes)
            raise self.error(name, f"of {of} {expected}", tuple(x.shape))

    def broadcastable(self, name: str, x: Tensor, full: Sequence[int]) -> None:
        """To the shape ``full``."""
        sizes = zip(x.shape[::-1], full[::-1], strict=False)
        if x.dim() > len(full) or not all(size in (1, whole) for size, whole in sizes):
            raise self.error(name, f"broadcastable to {full}", shape_of(x))

    def one_of(self, name: str, value: object, *choices: str) -> None:
        """One of a few words."""
        if value not in choices:
            *others, last = map(repr, choices)
            raise self.error(name, f"{', '.join(others)} or {last}", repr(value))

    def floating(self, named: Mapping[str, object], optional: Container[str] = ()) -> None:
        """Each is a dense floating tensor on one device; None is one of ``optional`` left out."""
        device = None
        for name, x in named.items():
            if x is None and name in optional:
                continue
            if not isinstance(x, Tensor):
                raise self.error(name, "a tensor", type(x).__name__, cls=TypeError)
            if x.is_nested or x.layout is not torch.strided:
                got = "a nested one" if x.is_nested else x.layout
                fix = "Convert it with .to_dense()"
                raise self.error(name, "a dense tensor", got, fix, TypeError)
            self.meaning(name, x)
            if x.dtype not in FLOATING:
                raise self.error(name, FLOATING_NAMES, x.dtype, TO_FLOAT, TypeError)
            if device is None:
                device = x.device
            elif x.device != device:
                self.device(name, x, device, next(iter(named)))


def shape_of(x: Tensor) -> str:
    """As what was given."""
    return f"shape {tuple(x.shape)}"
