"""Counter-based random numbers: the same for every backend, batch size and order.

Philox4x32-10 after Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011);
``csrc/common/philox.h`` is the same function in C++ and CUDA.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mul(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``multiplier * x`` for x < 2^32, without overflowing int64."""
    low = multiplier * (x & 0xFFFF)
    high = multiplier * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    seed: Tensor | int,
    c0: Tensor | int,
    c1: Tensor | int,
    c2: Tensor | int,
    c3: Tensor | int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter (c0, c1, c2, c3) under the 64-bit key ``seed``.

    Arguments are int64 tensors (broadcast together) or Python ints; counters are taken modulo
    2^32. Returns four int64 tensors with values in 0..2^32-1.
    """
    given = [x for x in (seed, c0, c1, c2, c3) if isinstance(x, Tensor)]
    device = given[-1].device if given else torch.device("cpu")

    def as_int64(x: Tensor | int) -> Tensor:
        if isinstance(x, Tensor):
            return x.to(device=device, dtype=torch.int64)
        x &= 0xFFFFFFFFFFFFFFFF
        return torch.tensor(x - (1 << 64) if x >> 63 else x, dtype=torch.int64, device=device)

    key = as_int64(seed)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    x0, x1, x2, x3 = (as_int64(c) & _MASK for c in (c0, c1, c2, c3))
    for _ in range(10):
        a_high, a_low = _mul(_MULTIPLIERS[0], x0)
        b_high, b_low = _mul(_MULTIPLIERS[1], x2)
        x0, x1, x2, x3 = b_high ^ x1 ^ k0, b_low, a_high ^ x3 ^ k1, a_low
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def uniform01(word: Tensor) -> Tensor:
    """float32 in [0, 1) from the upper 24 bits of a 32-bit word."""
    return (word >> 8).to(torch.float32) * 2.0**-24
