"""One way to say what is wrong with an argument. The words for it are in ``expect.py``."""

from torch import Tensor
from torch.autograd import forward_ad


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
        raise cls(sentence(op, argument, expected, got, mend))


def sentence(op: str, argument: str, expected: str, got: object, mend: str = "") -> str:
    """What every refusal of an argument says."""
    hint = f" {mend.rstrip('.')}." if mend else ""
    return f"bigkernel.{op}: {argument} must be {expected}, got {got}.{hint}"


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation follows ``x``.

    A custom op without a rule for it drops a tangent without a word, which would make the
    derivative a silent 0, in torch.compile too.
    """
    return forward_ad.unpack_dual(x).tangent is not None
