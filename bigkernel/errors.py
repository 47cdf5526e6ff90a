"""What is raised for an argument that does not fit. The words for it are in ``expect.py``."""

from torch import Tensor
from torch.autograd import forward_ad


class BadArgument(ValueError):
    """An argument of a public function has the wrong shape, range or combination."""


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation follows ``x``.

    A custom op without a rule for it drops a tangent without a word, which would make the
    derivative a silent 0, in torch.compile too.
    """
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
