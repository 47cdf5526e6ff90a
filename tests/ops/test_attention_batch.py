"""On the CPU what attention gives a sequence does not depend on what else is in the batch.

Every bit of a sequence's outputs and gradients is the same alone, at any place of a batch, packed
with others, padded on the right, and with any number of threads.
"""

import pytest
import torch
from fused_cases import DTYPES, normal, outputs_and_gradients, threads
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bigkernel import ops

SEARCH = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


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


@SEARCH
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


@st.composite
def paddings(draw):
    """A sequence, how much is added to its rows and keys, and what else a call is given."""
    length = st.sampled_from([1, 5, 100, 128, 130, 300, 520])
    more = st.sampled_from([0, 1, 40, 130, 400])
    causal = draw(st.booleans())
    rows, extra = draw(length), draw(more)
    side = st.sampled_from([None, 0, 17, 150])
    return {
        "rows": (rows, extra if causal else draw(more)),
        "keys": (rows, extra) if causal else (draw(length), draw(more)),
        "heads": draw(st.sampled_from([(1, 1), (2, 1)])),
        "dim": draw(st.sampled_from([8, 24])),
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "options": {
            "causal": causal,
            "align": draw(st.sampled_from(["top_left", "bottom_right"])) if causal else "top_left",
            "window": (draw(side), None if causal else draw(side)),
            "softcap": draw(st.sampled_from([0.0, 5.0])),
            "dropout_p": draw(st.sampled_from([0.0, 0.3])),
            "seed": 7,
        },
    }


@SEARCH
@given(case=paddings())
@example(  # from one tile of keys to two, where a row's delta would be summed otherwise
    {
        "rows": (100, 60),
        "keys": (100, 60),
        "heads": (2, 1),
        "dim": 24,
        "dtype": "f32",
        "options": {},
    }
)
@example(  # to more pieces of work, each with a share of dq
    {"rows": (5, 0), "keys": (300, 900), "heads": (1, 1), "dim": 8, "dtype": "f32", "options": {}}
)
def test_attention_of_padding_on_the_right_changes_nothing(cpu_isa, case):
    """Keys that a boolean mask hides, whatever they hold, and rows without a gradient."""
    (rows, more_rows), (keys, more_keys) = case["rows"], case["keys"]
    dtype, (heads, heads_kv), dim = DTYPES[case["dtype"]], case["heads"], case["dim"]
    total, total_k = rows + more_rows, keys + more_keys
    q, dout = (normal((2, heads, total, dim), dtype, seed) for seed in (0, 1))
    k, v = (normal((2, heads_kv, total_k, dim), dtype, seed) for seed in (2, 3))
    dout[0, :, rows:] = 0.0
    open_ = torch.ones(2, 1, 1, total_k, dtype=torch.bool)  # the second has no padding
    open_[0, ..., keys:] = False

    def alone(q, k, v):
        return ops.attention(q, k, v, **case["options"])

    def padded(q, k, v):
        return ops.attention(q, k, v, mask=open_, **case["options"])

    sizes = (rows, keys, keys, rows)
    one = [x[:1, :, :n] for x, n in zip((q, k, v, dout), sizes, strict=True)]
    with threads(1):
        (out,), gradients = outputs_and_gradients(alone, one[:3], [one[3]])
    with threads(2):
        (out_,), gradients_ = outputs_and_gradients(padded, (q, k, v), [dout])
    for a, b in zip((out, *gradients), (out_, *gradients_), strict=True):
        assert torch.equal(a[0], b[0, :, : a.shape[2]])
    for a, b in zip(gradients, gradients_, strict=True):
        assert not b[0, :, a.shape[2] :].any()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_of_padding_under_other_masks(cpu_isa, kind):
    """Outputs stay; so do gradients, where the padding makes for no more tiles of keys."""
    length, pad = 300, torch.nn.functional.pad
    *one, gradient = (normal((1, 2, length, 16), torch.float32, seed) for seed in range(4))
    seen = normal((length, length), torch.float32, 4) > -0.5
    for more, gradients_stay in ((80, True), (400, False)):
        masks = [seen, pad(seen, (0, more, 0, more))]
        if kind == "float":
            masks = [torch.zeros(x.shape).masked_fill(~x, -torch.inf) for x in masks]
        (out,), gradients = outputs_and_gradients(
            lambda q, k, v, mask=masks[0]: ops.attention(q, k, v, mask=mask), one, [gradient]
        )
        padded = [pad(x, (0, 0, 0, more)) for x in (*one, gradient)]
        (out_,), gradients_ = outputs_and_gradients(
            lambda q, k, v, mask=masks[1]: ops.attention(q, k, v, mask=mask), padded[:3], padded[3:]
        )
        assert torch.equal(out, out_[:, :, :length])
        for a, b in zip(gradients, gradients_, strict=True):
            if gradients_stay:
                assert torch.equal(a, b[:, :, :length])
            torch.testing.assert_close(a, b[:, :, :length], rtol=1e-5, atol=1e-5)
