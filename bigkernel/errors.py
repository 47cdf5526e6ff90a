"""What is raised for an argument that does not fit. The words for it are in ``expect.py``."""

import importlib
import os
import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad


class FallbackWarning(UserWarning):
    """Plain PyTorch runs although a native backend was expected."""


class BadArgument(ValueError):
    """An argument of a public function has the wrong shape, range or combination."""


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation follows ``x``.

    A custom op without a rule for it drops a tangent without a word, which would make the
    derivative a silent 0, in torch.compile too.
    """
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def level_of_caller() -> int:
    """The stack level, as a function that warns counts, of the first frame outside this package.

    And outside torch: its modules and decorators stand between a caller and a transform or an
    optimizer's step. Frames of an import do not count, as they do not for `warnings.warn`.
    """
    files = (__file__, torch.__file__, importlib.__file__)
    inner = tuple(os.path.dirname(file) + os.sep for file in files)
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        is_import = "importlib" in name and "_bootstrap" in name
        if not is_import and not name.startswith(inner):
            break
        level, frame = level + (not is_import), frame.f_back
    return level
