"""One way to say what is wrong with an argument, and what several ops look for in theirs."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Tensor types whose operations mean what torch says of their data.
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_DEFAULTS = (
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    torch._C._disabled_torch_function_impl,
)


class BadArgument(ValueError):
    """An argument of a public function has the wrong shape, range or combination."""


def check(
    condition: bool,
    op: str,
    argument: str,
    expected: str,
    got: object,
    mend: str = "",
    cls: type[Exception] = BadArgument,
) -> None:
    """Raise ``cls`` unless ``condition``: which op, which argument, expected, got, how to mend."""
    if not condition:
        hint = f" {mend.rstrip('.')}." if mend else ""
        raise cls(f"bigkernel.{op}: {argument} must be {expected}, got {got}.{hint}")


def check_meaning(op: str, name: str, x: Tensor, mend: str = "") -> None:
    """Refuse a subclass with a ``__torch_function__`` of its own: anything may stand in its data.

    Those with ``__torch_dispatch__`` alone (FakeTensor, wrappers) see the operator themselves.
    """
    kind = type(x)
    if kind in _PLAIN:
        return
    function = kind.__torch_function__
    check(
        getattr(function, "__func__", function) in _DEFAULTS,
        op,
        name,
        "a plain tensor",
        f"a {kind.__name__}, whose data alone may not say what it means",
        mend or "Convert it with .as_subclass(torch.Tensor), if its data is all there is to it",
        TypeError,
    )


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation follows ``x``.

    A custom op without a rule for it drops a tangent without a word, which would make the
    derivative a silent 0, in torch.compile too.
    """
    return forward_ad.unpack_dual(x).tangent is not None


def check_floating(op: str, named: Mapping[str, object], optional: Sequence[str] = ()) -> None:
    """Each is a dense floating tensor on one device; None is one of ``optional`` left out.

    For ops that a step calls a hundred times: sentences are put together only where one is needed.
    """
    device = None
    for name, x in named.items():
        if not isinstance(x, Tensor):
            if x is None and name in optional:
                continue
            check(False, op, name, "a tensor", type(x).__name__, cls=TypeError)
            continue
        if x.is_nested or x.layout is not torch.strided:
            got = "a nested one" if x.is_nested else x.layout
            check(False, op, name, "a dense tensor", got, "Convert it with .to_dense()", TypeError)
        check_meaning(op, name, x)
        if x.dtype not in FLOATING:
            expected = "float16, bfloat16, float32 or float64"
            mend = "Convert it with .to(torch.float32)"
            check(False, op, name, expected, x.dtype, mend, TypeError)
        if device is None:
            device = x.device
        elif x.device != device:
            first = next(iter(named))
            check(False, op, name, f"on {first}'s device, {device}", x.device)
