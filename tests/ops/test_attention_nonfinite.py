"""NaN and infinities in one element of each input, forward and backward, beside PyTorch's.

Wherever PyTorch's result is finite, ours is the same; wherever it is not, neither is ours, or it is
by design:

- A row whose keys are all closed has out 0, lse -inf and no gradient, where PyTorch may have NaN
  (0 / 0). So it is for one whose only open scores are -inf.
- A score of +inf makes its row NaN (inf - inf), as in PyTorch.
- A key that a row does not see has no part in it, whatever it holds: PyTorch multiplies its value
  with a weight of 0, which gives NaN for NaN and infinities. So ours may be finite where PyTorch's
  is NaN, and then is what it is without that key.
- dS of a row that holds a NaN is NaN as a whole, and so are the gradients that it is a part of.
"""

import math

import attention_cases
import pytest
import torch
from attention_cases import device_of

from bigkernel.ops import attention
from bigkernel.ops.attention.reference import Rule, attention_reference

backend = attention_cases.backend

ROWS, KEYS, DIM = 5, 150, 8
AT = {  # one element, of batch entry 0 and head 0
    "q": (0, 0, 2, 3),
    "k": (0, 0, 3, 3),
    "v": (0, 0, 3, 3),
    "mask": (0, 0, 2, 1),
    "dout": (0, 0, 2, 3),
    "dlse": (0, 0, 2),
}
VALUES = (math.nan, math.inf, -math.inf)


def results(function, given):
    leaves = [given[name].detach().clone().requires_grad_() for name in ("q", "k", "v", "mask")]
    out, lse = function(*leaves)
    gradients = [given["dout"].to(out.dtype), given["dlse"].to(lse.dtype)]
    grads = torch.autograd.grad([out, lse], leaves, gradients)
    names = ("out", "lse", "dq", "dk", "dv", "dmask")
    return dict(zip(names, (x.detach().cpu() for x in (out, lse, *grads)), strict=True))


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("place", AT)
@pytest.mark.parametrize("dtype", attention_cases.DTYPES)
def test_attention_nonfinite(backend, dtype, place, value, causal):
    torch.manual_seed(0)
    kind, device = attention_cases.DTYPES[dtype], device_of(backend)
    shapes = {
        "q": (2, 2, ROWS, DIM),
        "k": (2, 1, KEYS, DIM),
        "v": (2, 1, KEYS, DIM),
        "mask": (2, 2, ROWS, KEYS),
        "dout": (2, 2, ROWS, DIM),
    }
    given = {name: torch.randn(shape).to(kind).to(device) for name, shape in shapes.items()}
    given["dlse"] = torch.randn(2, 2, ROWS, device=device)
    given[place][AT[place]] = value
    rule = Rule(DIM**-0.5, causal=causal)

    def ours(q, k, v, mask):
        return attention(q, k, v, mask=mask, causal=causal, return_lse=True)

    def theirs(q, k, v, mask):
        return attention_reference(q, k, v, rule, mask=mask)

    actual = results(ours, given)
    wide = results(theirs, {name: x.double() for name, x in given.items()})
    # What it would be if nobody read the element: PyTorch without it.
    clean = dict(given) | {place: given[place].clone()}
    clean[place][AT[place]] = 0.0
    without = results(theirs, {name: x.double() for name, x in clean.items()})
    tolerance = {"f32": 1e-5, "bf16": 3e-2, "f16": 4e-3}[dtype]
    for name, expected in wide.items():
        got, finite = actual[name].double(), expected.isfinite()
        assert got[finite].isfinite().all(), f"{name}: not finite where PyTorch is"
        torch.testing.assert_close(got[finite], expected[finite], rtol=tolerance, atol=tolerance)
        more = ~finite & got.isfinite()
        unread = without[name][more]
        torch.testing.assert_close(got[more], unread, rtol=tolerance, atol=tolerance)
        if not causal:  # then every row sees every key
            assert not more.any(), f"{name}: finite where PyTorch is not"
