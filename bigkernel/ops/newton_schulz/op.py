"""The Newton-Schulz iteration: schema, checks, fake, and the public function.

What is computed is written down as a formula in ``reference.py``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigkernel import _library, registry
from bigkernel.backend import is_forced, select
from bigkernel.expect import Expect, shape_of
from bigkernel.ops.newton_schulz import reference

COEFFICIENTS = (3.4445, -4.775, 2.0315)
_EXPECT = Expect("newton_schulz")
_DTYPES = (torch.bfloat16, torch.float32)


def _fake(
    xs: Sequence[Tensor], a: float, b: float, c: float, steps: int, eps: float, narrow: bool
) -> list[Tensor]:
    dtype = torch.bfloat16 if narrow else torch.float32
    return [x.new_empty(x.shape, dtype=dtype) for x in xs]


_OP = registry.register(
    registry.Op(
        noun="newton_schulz",
        title="Newton-Schulz iteration of Muon",
        functions=(
            registry.Function(
                "newton_schulz",
                # xs: [.., rows, columns]; results of the same shapes, contiguous, in bfloat16 if
                # `narrow`, else in float32.
                "(Tensor[] xs, float a, float b, float c, int steps, float eps, bool narrow) "
                "-> Tensor[]",
                reference.newton_schulz,
                _fake,
            ),
        ),
        absent={"cuda": "its products are torch's there: batches of matrices fill a GPU"},
        no_contest="ours has a third less to multiply, and Muon leaves portable code to torch",
    )
)


def newton_schulz(
    x: Tensor,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A matrix, or each of a batch, with its singular values brought near 1.

    The quintic iteration of Muon (K. Jordan, 2024): x / max(norm(x), eps), then ``steps`` times
    a x + (b x x^T + c (x x^T)^2) x. With its coefficients singular values end between about 0.7 and
    1.2. There is no derivative.

    Args:
        x: [.., rows, columns], float16, bfloat16, float32 or float64; any strides.
        coefficients: a, b, c.
        steps: at least 0.
        eps: the least 2-norm by which a matrix is divided; above 0.
        dtype: what is computed in, and what every product is rounded to: torch.bfloat16 or
            torch.float32.

    Returns:
        [.., rows, columns], contiguous, of ``dtype``. A matrix's bits do not depend on the others
        of the batch nor, on the CPU, on the number of threads.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which it is.
    """
    _EXPECT.floating({"x": x})
    if x.dim() < 2:
        raise _EXPECT.error("x", "[.., rows, columns]", shape_of(x))
    whole = isinstance(steps, int) and steps >= 0
    _EXPECT(whole, "steps", "a whole number of at least 0", steps)
    _EXPECT(isinstance(eps, (int, float)) and eps > 0, "eps", "a number above 0", eps)
    three = len(coefficients) == 3 and all(isinstance(n, (int, float)) for n in coefficients)
    _EXPECT(three, "coefficients", "three numbers", coefficients)
    _EXPECT(dtype in _DTYPES, "dtype", "torch.bfloat16 or torch.float32", dtype)
    with torch.no_grad():
        ops = select("newton_schulz", x.device, _OP.why_not_native([x]))
        return _call(ops, [x], coefficients, steps, eps, dtype)[0]


def orthogonalize(
    xs: Sequence[Tensor],
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The same of many matrices, on one device and of one dtype, without the checks: for Muon.

    By whatever multiplies faster: where the native kernel has no vectors of the processor's own,
    or there is none, that is torch, without a word.
    """
    device, reason = xs[0].device, _OP.why_not_native(xs)
    ours = is_forced() or (
        reason is None
        and device.type == "cpu"
        and _library.native is not None
        and _library.native.cpu_isa() != "portable"
    )
    ops = select("newton_schulz", device, reason) if ours else _library.TORCH_OPS
    return _call(ops, xs, coefficients, steps, eps, dtype)


def _call(
    ops: Any,
    xs: Sequence[Tensor],
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    narrow = dtype == torch.bfloat16
    done: list[Tensor] = _library.call(
        ops, "newton_schulz", list(xs), *coefficients, steps, eps, narrow
    )
    return done
