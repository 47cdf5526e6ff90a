"""The one rule for "close enough": at most twice PyTorch's own error, both against float64."""

import torch
from torch import Tensor


def assert_as_accurate(
    actual: Tensor, exact: Tensor, same_dtype: Tensor, factor: float = 2.0
) -> None:
    """Assert max|actual - exact| <= factor * max|same_dtype - exact| + half an ulp.

    ``exact`` is the float64 result, ``same_dtype`` what PyTorch gives when it computes in the
    dtype under test. The half ulp (of ``actual``'s dtype, at the largest exact value) is the
    rounding of a result that is stored in that dtype, for cases in which PyTorch happens to hit it.
    NaN and infinities must stand in the same places.
    """
    assert actual.shape == exact.shape == same_dtype.shape, (
        f"shapes differ: {tuple(actual.shape)}, {tuple(exact.shape)}, {tuple(same_dtype.shape)}"
    )
    assert exact.dtype == torch.float64, "the reference must be float64"
    a, b = actual.double(), same_dtype.double()
    finite = exact.isfinite()
    special = ~finite
    assert torch.equal(a[special].nan_to_num(nan=7.5), exact[special].nan_to_num(nan=7.5)), (
        "NaN or infinity in different places than in the reference"
    )
    if not finite.any():
        return
    error = (a[finite] - exact[finite]).abs().max().item()
    baseline = (b[finite] - exact[finite]).abs().max().item()
    assert error == error, "NaN where the reference is finite"
    largest = exact[finite].abs().max().item()
    eps = torch.finfo(actual.dtype).eps if actual.dtype.is_floating_point else 1.0
    allowed = factor * baseline + 0.5 * eps * largest
    assert error <= allowed, (
        f"error {error:.3e} exceeds {allowed:.3e} (= {factor} * PyTorch's {baseline:.3e} + half an "
        f"ulp of {largest:.3e} in {actual.dtype})"
    )
