"""On the CPU what attention gives a sequence does not depend on what else is in the batch.

Every bit of a sequence's outputs and gradients is the same alone, at any place of a batch, packed
with others, and with any number of threads.
"""

import pytest
import torch
from fused_cases import DTYPES, normal, outputs_and_gradients, threads
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bigkernel import ops


@st.composite
def batches(draw):
    """Lengths of some sequences, and what else a call is given."""
    # 128 keys are a tile of backward, and from 512 on its work is cut into pieces.
    length = st.sampled_from([1, 5, 64, 129, 200, 530, 800])
    causal = draw(st.booleans())
    side = st.sampled_from([None, 0, 17, 150])
    return {
        "lengths": draw(st.lists(length, min_size=2, max_size=4)),
        "heads": draw(st.sampled_from([(1, 1), (2, 1), (4, 2)])),
        "dim": draw(st.sampled_from([8, 24, 64])),
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "options": {
            "causal": causal,
            "window": (draw(side), None if causal else draw(side)),
            "softcap": draw(st.sampled_from([0.0, 5.0])),
        },
    }


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(batch=batches())
@example(  # work that a smaller batch would cut into more pieces
    {"lengths": [800, 3], "heads": (12, 12), "dim": 8, "dtype": "f32", "options": {}}
)
def test_attention_of_a_sequence_depends_on_nothing_else(cpu_isa, batch):
    lengths, options = batch["lengths"], batch["options"]
    dtype, (heads, heads_kv), dim = DTYPES[batch["dtype"]], batch["heads"], batch["dim"]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    q, dout = (normal((sum(lengths), heads, dim), dtype, seed) for seed in (0, 1))
    k, v = (normal((sum(lengths), heads_kv, dim), dtype, seed) for seed in (2, 3))

    def packed(q, k, v):
        return ops.attention_varlen(q, k, v, offsets, offsets, **options)

    def dense(q, k, v):
        return ops.attention(q, k, v, **options)

    def run(function, inputs, gradient):
        out, gradients = outputs_and_gradients(function, inputs, [gradient])
        return [*out, *gradients]

    with threads(1):
        together = run(packed, (q, k, v), dout)
    with threads(2):
        for a, b in zip(run(packed, (q, k, v), dout), together, strict=True):
            assert torch.equal(a, b)
        for begin, length in zip(offsets.tolist(), lengths, strict=False):
            rows = slice(begin, begin + length)
            *one, gradient = (x[rows].transpose(0, 1)[None] for x in (q, k, v, dout))
            alone = run(dense, one, gradient)
            among = [torch.cat([x.flip(2), x, 2 * x]) for x in (*one, gradient)]
            for a, b, c in zip(alone, run(dense, among[:3], among[3]), together, strict=True):
                assert torch.equal(b[1], a[0])
                assert torch.equal(c[rows], a[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_padding_on_the_right_changes_nothing(cpu_isa, dtype):
    """Where all rows of a sequence see the same number of tiles as without it."""
    length, more = 300, 80
    *one, gradient = (normal((1, 2, length, 16), DTYPES[dtype], seed) for seed in range(4))
    pad = torch.nn.functional.pad
    open_ = (torch.arange(length + more) < length)[None, None, None]
    padded = [pad(x, (0, 0, 0, more)) for x in (*one, gradient)]

    def masked(q, k, v):
        return ops.attention(q, k, v, mask=open_)

    out, gradients = outputs_and_gradients(ops.attention, one, [gradient])
    out_, gradients_ = outputs_and_gradients(masked, padded[:3], [padded[3]])
    for a, b in zip([*out, *gradients], [*out_, *gradients_], strict=True):
        assert torch.equal(a, b[:, :, :length])
