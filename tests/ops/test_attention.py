"""Attention against its definition, alone and in combination, forward and backward, every backend.

Which test shows which feature (files tests/ops/test_attention*.py):

  float32, bfloat16, float16        test_attention_matches_reference, _pairs
  float64                           test_attention_gradcheck_torch_backend (_contract)
  head dims 1 to 256                test_attention_head_dims, test_attention_value_head_dim
  different lengths of q and k      test_attention_lengths, test_attention_long
  causal, top-left and bottom-right test_attention_matches_reference, test_attention_cross
  GQA, MQA                          test_attention_matches_reference, _pairs
  sliding window                    test_attention_windows
  softcap, ALiBi                    test_attention_matches_reference, test_attention_cross
  masks and their gradient          test_attention_masks
  dropout                           test_attention_dropout* (_dropout)
  packed sequences                  test_attention_varlen* (_packed)
  log-sum-exp and its gradient      test_attention_matches_reference, all pairs and crosses
  strides without copies, NaN       test_attention_noncontiguous, *_nan_* (_inputs)
  fully masked rows                 test_attention_fully_masked_rows, _hugely_masked_rows
  memory linear in length           test_attention_memory_is_linear (_contract)
  deterministic                     test_attention_is_deterministic (_contract)
  bad input, zero sizes, fallbacks  (_inputs)
  torch's scaled_dot_product_attention, its signature and semantics    (_sdpa)
  opcheck, compile, autocast        (_contract)
"""

import itertools

import attention_cases
import pytest
import torch
from attention_cases import (
    Case,
    all_pairs,
    build,
    compare,
    device_of,
    largest_error,
    part_of,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bigkernel import ops
from bigkernel.ops.attention.reference import Rule, attention_reference
from bigkernel.testing.tolerance import assert_as_accurate

backend = attention_cases.backend_or_ptx

ALONE = {
    "plain": {},
    "causal_top_left": {"causal": "top_left"},
    "causal_bottom_right": {"causal": "bottom_right"},
    "window": {"window": (5, 3)},
    "window_bottom_right": {"window": (4, 0), "align": "bottom_right"},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi": "H"},
    "alibi_per_batch": {"alibi": "BH", "align": "bottom_right"},
    "mask_bool": {"mask": "bool:BHQK"},
    "mask_float": {"mask": "float:BHQK"},
    "dropout": {"dropout": 0.3},
    "no_gqa": {"heads": (4, 4)},
    "mqa": {"heads": (4, 1)},
    "lse_gradient": {"dlse": True},
    "value_head_dim": {"dim": 24, "dim_v": 40},
    "bshd": {"layout": "bshd"},
    "everything": {
        "causal": "bottom_right",
        "window": (20, 0),
        "softcap": 2.0,
        "alibi": "BH",
        "mask": "float:BHQK",
        "dropout": 0.2,
        "layout": "nan",
        "dlse": True,
        "dim": 33,
    },
}


@pytest.mark.parametrize("dtype", attention_cases.DTYPES)
@pytest.mark.parametrize("feature", ALONE)
def test_attention_matches_reference(backend, feature, dtype):
    """Each feature alone, then all of them, in each dtype."""
    compare(Case(dtype=dtype, **ALONE[feature]), device_of(backend))


# One value per branch that a kernel is likely to have: below, at and above a vector of 4, 8 or 16
# lanes, and one or more tiles of 64 or 128 rows.
AXES = {
    "dtype": ["f32", "bf16", "f16"],
    "dim": [1, 7, 16, 33, 64, 80, 128, 256],
    "lengths": [(1, 1), (1, 70), (13, 8), (33, 33), (17, 131), (130, 17)],
    "heads": [(4, 4), (4, 2), (3, 1)],
    "causal": ["", "top_left", "bottom_right"],
    "align": ["top_left", "bottom_right"],
    "window": [(None, None), (6, 0), (None, 2), (0, None), (40, 9)],
    "softcap": [0.0, 1.5],
    "alibi": ["", "H", "BH"],
    "mask": ["", "bool:BHQK", "bool:B11K", "bool:QK", "float:BHQK", "float:1H1K", "f32:BHQ1"],
    "dropout": [0.0, 0.4],
    "layout": ["bhsd", "bshd", "nan", "gap"],
    "dlse": [False, True],
}


@pytest.mark.parametrize("case", list(all_pairs(AXES)), ids=str)
def test_attention_pairs(backend, case):
    """Every value of every feature together with every value of every other feature."""
    compare(case, device_of(backend))


@pytest.mark.parametrize("window", [(None, None), (4, 2)], ids=str)
@pytest.mark.parametrize(
    ("causal", "lengths"),
    [("", (9, 21)), ("top_left", (9, 21)), ("bottom_right", (21, 9))],
    ids=str,
)
def test_attention_cross(backend, lengths, causal, window):
    """The full cross of what changes a score, at one small size where each call is fast.

    Each alignment comes with one pair of lengths: pairs of the two are in test_attention_pairs.
    """
    features = itertools.product(
        [0.0, 1.0], ["", "BH"], ["", "bool:B1QK", "float:1HQK"], [0.0, 0.25]
    )
    for softcap, alibi, mask, dropout in part_of(features, backend, 5):
        case = Case(
            dim=8,
            lengths=lengths,
            causal=causal,
            align="bottom_right",
            window=window,
            softcap=softcap,
            alibi=alibi,
            mask=mask,
            dropout=dropout,
            dlse=True,
        )
        compare(case, device_of(backend))


@pytest.mark.parametrize(
    "dims", ["".join(dims) for dims in itertools.product("B1", "H1", "Q1", "K1")]
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_masks(backend, kind, dims):
    """All sixteen ways to broadcast a mask; a floating one gets a gradient of its own shape."""
    case = Case(dtype="bf16", mask=f"{kind}:{dims}", causal="bottom_right", dim=8)
    actual = compare(case, device_of(backend))
    assert ("dmask" in actual) == (kind == "float")


@pytest.mark.parametrize("dims", ["BHQ1", "1HQ1", "Q1", "BH11", "1"])
def test_attention_masks_along_the_keys_and_the_gradient_of_lse(backend, dims):
    """A number common to all keys of a row moves its lse alone: each row has a gradient of its own.

    Rows of one tile, a single one, and rows of several.
    """
    for rows in part_of([19, 1, 150], backend, 3):
        case = Case(mask=f"f32:{dims}", dim=8, lengths=(rows, 9), dlse=True)
        compare(case, device_of(backend))


@pytest.mark.parametrize("mask", ["bool:K", "float:QK", "f32:HQK", "float:1", "f32:B11K"])
def test_attention_masks_of_lower_rank(backend, mask):
    compare(Case(dtype="f16", mask=mask, dim=8), device_of(backend))


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", [(40, 70), (70, 40)], ids=str)
def test_attention_windows(backend, lengths, align):
    """Windows narrower and wider than a tile, one-sided, and wider than the sequence."""
    sides = [None, 0, 17, 1000]
    for window in part_of(itertools.product(sides, sides), backend, 3):
        case = Case(lengths=lengths, align=align, window=window, dim=4, heads=(1, 1), batch=1)
        compare(case, device_of(backend))
    huge = Case(lengths=lengths, align=align, window=(2**40, 2**40), dim=4, heads=(1, 1), batch=1)
    compare(huge, device_of(backend))


# Around every vector width and its multiples; then what models use, up to the largest.
HEAD_DIMS = [
    *range(1, 10),
    15,
    16,
    17,
    31,
    32,
    33,
    48,
    63,
    72,
    96,
    100,
    127,
    129,
    160,
    192,
    255,
    256,
]


@pytest.mark.parametrize("dtype", attention_cases.DTYPES)
def test_attention_head_dims(backend, dtype):
    for dim in part_of(HEAD_DIMS, backend, 3):
        case = Case(dtype=dtype, dim=dim, lengths=(11, 18), heads=(2, 1), causal="bottom_right")
        compare(case, device_of(backend))


@pytest.mark.parametrize("dims", [(8, 24), (24, 8), (1, 256), (65, 3)], ids=str)
def test_attention_value_head_dim(backend, dims):
    """The head dim of v, and so of out, may differ from that of q and k."""
    for dtype in attention_cases.DTYPES:
        case = Case(dtype=dtype, dim=dims[0], dim_v=dims[1], mask="float:QK", layout="bshd")
        compare(case, device_of(backend))


def test_attention_lengths(backend):
    """Each length from 1 to twice the widest vector and past it, of queries and of keys."""
    for length in part_of(range(1, 34), backend, 4):
        for lengths in ((length, 7), (5, length)):
            case = Case(dim=3, lengths=lengths, heads=(2, 1), batch=1, causal="bottom_right")
            compare(case, device_of(backend))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("lengths", [(300, 300), (257, 700), (520, 130)], ids=str)
def test_attention_long(backend, lengths, dtype):
    """Several tiles of rows and of keys, some whole, some cut by causality, some skipped."""
    base = {"dtype": dtype, "lengths": lengths, "heads": (2, 1), "batch": 1, "dim": 40}
    compare(Case(causal="bottom_right", dropout=0.1, **base), device_of(backend))
    compare(Case(causal="top_left", window=(90, 0), mask="bool:QK", **base), device_of(backend))
    compare(Case(softcap=3.0, alibi="H", dlse=True, **base), device_of(backend))


def test_attention_fully_masked_rows(backend):
    """Output 0, lse -inf, gradients 0, and nothing of it in the other rows."""
    device = device_of(backend)
    case = Case(lengths=(9, 5), causal="bottom_right", mask="float:BHQK", dim=8, dlse=True)
    inputs = build(case).map(lambda x: x.to(device))
    result = {name: x.cpu() for name, x in run(case, inputs).items()}
    dead = result["lse"] == -torch.inf
    assert dead[..., :4].all()  # rows 0 to 3 lie before the first key
    assert not dead[..., -1].any()
    assert (result["out"][dead] == 0).all()
    assert (result["dq"][dead] == 0).all()
    assert (result["dmask"][dead] == 0).all()
    assert all(result[name].isfinite().all() for name in ("out", "dq", "dk", "dv", "dmask"))

    q, k, v = (torch.randn(1, 2, 6, 8, device=device, requires_grad=True) for _ in range(3))
    nothing = torch.zeros(6, dtype=torch.bool, device=device)
    out, lse = ops.attention(q, k, v, mask=nothing, return_lse=True)
    out.sum().backward()
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all((x.grad == 0).all() for x in (q, k, v))


@pytest.mark.parametrize("softcap", [1e-30, 1e30])
def test_attention_extreme_softcaps(backend, softcap):
    """The smallest makes all scores alike, the largest changes none."""
    compare(Case(softcap=softcap, dlse=True, lengths=(9, 12)), device_of(backend))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("alike", ["q", "k"])
def test_attention_hugely_masked_rows(backend, alike, dtype):
    """Rows whose additive mask is huge and finite at every key that is open.

    A constant cancels in the softmax: exact is what a mask of 0 gives. So that nothing is lost when
    it is added to the scores, these are all alike in such a row: q is 0 there, or k the same.
    """
    device, kind = device_of(backend), attention_cases.DTYPES[dtype]
    hidden = torch.arange(9) % 3 == 0
    rule = Rule(24**-0.5)

    def results(function, dtype, mask, tensors, gradients, **options):
        leaves = [x.to(device, dtype).requires_grad_() for x in (*tensors, mask)]
        outputs = function(*leaves[:3], mask=leaves[3], **options)
        gradients = [g.to(o) for g, o in zip(gradients, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, leaves, gradients)
        return [x.detach().cpu() for x in (outputs[0], *grads)]

    def draw(huge, seed):
        """q, k, v; the mask without the constant, and with it; gradients of out and lse."""
        generator = torch.Generator().manual_seed(seed)
        q, k, v, dout, mask = (
            torch.randn(2, heads, rows, columns, generator=generator).to(kind)
            for heads, rows, columns in (
                (2, 9, 24),
                (2, 70, 24),
                (2, 70, 24),
                (2, 9, 24),
                (1, 9, 70),
            )
        )
        if alike == "q":
            q[:, :, hidden] = 0
        else:
            k[:] = k[:, :, :1]
        mask[:, :, hidden] = 0.0
        mask[:, :, :, 1::2] = -torch.inf
        shift = torch.zeros_like(mask)
        shift[:, :, hidden] = max(huge, torch.finfo(kind).min)
        return (q, k, v), mask, mask + shift, (dout, torch.randn(2, 2, 9, generator=generator))

    for huge in part_of([-1e4, -1e9, torch.finfo(kind).min, 3e4], backend, 2):
        errors = torch.zeros(5)  # PyTorch's, the largest of several draws
        for seed in range(8):
            tensors, mask, shifted, gradients = draw(huge, seed)
            exact = results(attention_reference, torch.float64, mask, tensors, gradients, rule=rule)
            same = results(attention_reference, kind, shifted, tensors, gradients, rule=rule)
            pairs = zip(same, exact, strict=True)
            errors = errors.maximum(torch.tensor([largest_error(x, y) for x, y in pairs]))
        given = results(ops.attention, kind, shifted, tensors, gradients, return_lse=True)
        for mine, right, error in zip(given, exact, errors.tolist(), strict=True):
            half_ulp = 0.5 * torch.finfo(kind).eps * right.abs().max().item()
            assert largest_error(mine, right) <= 2 * error + half_ulp


def test_attention_closed_keys_may_hold_anything(backend):
    """A boolean mask closes a key, whatever its score; NaN there reaches nobody."""
    q, k, v = (torch.randn(1, 2, 9, 8).to(device_of(backend)) for _ in range(3))
    mask = torch.ones(9, 9, dtype=torch.bool, device=q.device)
    mask[:, 3] = False
    expected = ops.attention(q, k, v, mask=mask, return_lse=True)
    for value in (torch.nan, torch.inf, -torch.inf):
        wild = k.clone()
        wild[:, :, 3] = value
        actual = ops.attention(q, wild, v, mask=mask, return_lse=True)
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y), value


def test_attention_large_scores(backend):
    """Scores beyond what exp can hold: only their differences count."""
    device = device_of(backend)
    q, k, v = (torch.randn(1, 1, 20, 16, device=device) for _ in range(3))
    out, lse = ops.attention(q * 100, k * 100, v, return_lse=True)
    exact = attention_reference(q.double() * 100, k.double() * 100, v.double(), Rule(0.25))
    same = attention_reference(q * 100, k * 100, v, Rule(0.25))
    assert_as_accurate(out.cpu(), exact[0].cpu(), same[0].cpu())
    assert_as_accurate(lse.cpu(), exact[1].cpu(), same[1].cpu())
    shift = torch.full((20,), -3e4, device=device)
    shifted = ops.attention(q, k, v, mask=shift)
    assert torch.allclose(shifted, ops.attention(q, k, v), atol=5e-3)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_attention_infinite_scores(backend, bad, dtype):
    """A row that sees a score of +inf or NaN has out and lse NaN; the others know nothing of it."""
    device, kind = device_of(backend), attention_cases.DTYPES[dtype]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 70, 16).to(device, kind) for _ in range(3))
    mask = torch.zeros(70, 70, device=device)
    mask[3, 5] = mask[40, 69] = bad
    for causal in (False, True):
        out, lse = ops.attention(q, k, v, mask=mask, causal=causal, return_lse=True)
        # In float32: some of torch's bf16 products let a row's NaN into the row beside it.
        wide = (x.float() for x in (q, k, v))
        exact = attention_reference(*wide, Rule(0.25, causal), mask=mask)
        # Key 5 lies behind row 3, and key 69 behind row 40: causal attention sees neither.
        seen = [] if causal else [3, 40]
        for mine in (out.isnan().all(-1), out.isnan().any(-1), lse.isnan()):
            assert mine[0, 0].nonzero().flatten().tolist() == seen
        for x in exact:
            assert torch.equal(x.isnan().flatten(3).any(-1) if x.dim() > 3 else x.isnan(), mine)


def test_attention_huge_values(backend):
    """As large as is promised: below 2e37 / Sk, in rows whose highest score comes last."""
    device = device_of(backend)
    keys, largest = 70, 1.99e37 / 70
    q = torch.ones(1, 1, 9, 16, device=device)
    k = torch.linspace(0, 2.7, keys, device=device)[:, None].expand(1, 1, keys, 16) / 4
    v = torch.full((1, 1, keys, 16), largest, device=device)
    torch.testing.assert_close(ops.attention(q, k, v), v[:, :, :9], rtol=1e-5, atol=0)


@pytest.mark.parametrize("slope", [-3.0, -0.02, 0.02, 0.3, 3.0])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_attention_slanting_scores(backend, dtype, slope):
    """Scores that rise or fall with the key: each tile's highest is far above that of the tile
    before, or a little, or below."""
    device, kind = device_of(backend), attention_cases.DTYPES[dtype]
    rule = Rule(0.25, causal=True, bottom_right=True)
    errors = torch.zeros(5)  # PyTorch's, the largest of several draws
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        q, k, v, dout = (
            torch.randn(1, 2, rows, 16, generator=generator) for rows in (8, 200, 200, 8)
        )
        q[..., 0], k[..., 0] = 1.0, slope / rule.scale * torch.arange(200)
        dlse = torch.randn(1, 2, 8, generator=generator)

        def results(function, dtype, *given, tensors=(q, k, v), gradients=(dout, dlse), **options):
            leaves = [x.to(kind).to(device, dtype).requires_grad_() for x in tensors]
            outputs = function(*leaves, *given, **options)
            gradients = [g.to(kind).to(o) for g, o in zip(gradients, outputs, strict=True)]
            grads = torch.autograd.grad(outputs, leaves, gradients)
            return [x.detach().cpu() for x in (*outputs, *grads)]

        exact = results(attention_reference, torch.float64, rule)
        pairs = zip(results(attention_reference, kind, rule), exact, strict=True)
        errors = errors.maximum(torch.tensor([largest_error(x, y) for x, y in pairs]))
    actual = results(
        ops.attention, kind, scale=0.25, causal=True, align="bottom_right", return_lse=True
    )
    for mine, right, error in zip(actual, exact, errors.tolist(), strict=True):
        half_ulp = 0.5 * torch.finfo(kind).eps * right.abs().max().item()
        assert largest_error(mine, right) <= 2 * error + half_ulp


@pytest.mark.parametrize("height", [1e4, 1e6, 3e7])
def test_attention_probabilities_add_up(backend, height):
    """However large the scores, backward's probabilities add up to 1, as those of softmax do.

    Where forward and backward round a score in different ways, they do not: what all keys have in
    common then no longer cancels in dq, and a part of it is left that grows with the scores.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, rows, 24) for rows in (9, 200, 200))
    q[..., 0], k[..., 0] = height, 1.0
    q, k, v = (x.to(device_of(backend)).requires_grad_() for x in (q, k, v))
    _, lse = ops.attention(q, k, v, return_lse=True)
    (dq,) = torch.autograd.grad(lse.sum(), q)
    total = dq[..., 0] * 24**0.5  # each key adds its probability
    assert (total - 1).abs().max() <= 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("scale", "size"), [(1e-40, 4e18), (1e-37, 4e18), (3e38, 0.0)])
def test_attention_extreme_scales(backend, scale, size):
    """Products that fill what float32 holds, and scales near its ends: scores are near 1 or 0."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, rows, 8).to(device_of(backend)) for rows in (9, 70, 70))
    out, lse = ops.attention(q * size, k * size, v, scale=scale, return_lse=True)
    exact = attention_reference(q.double() * size, k.double() * size, v.double(), Rule(scale))
    same = attention_reference(q * size, k * size, v, Rule(scale))
    assert_as_accurate(out.cpu(), exact[0].cpu(), same[0].cpu())
    assert_as_accurate(lse.cpu(), exact[1].cpu(), same[1].cpu())


@st.composite
def cases(draw) -> Case:
    kv_heads = draw(st.integers(1, 3))
    sides = st.one_of(st.none(), st.integers(0, 40))
    dims = draw(st.sampled_from(["BHQK", "B11K", "1H1K", "QK", "B1Q1", "K"]))
    return Case(
        dtype=draw(st.sampled_from(sorted(attention_cases.DTYPES))),
        dim=draw(st.integers(1, 40)),
        lengths=(draw(st.integers(1, 34)), draw(st.integers(1, 34))),
        heads=(kv_heads * draw(st.integers(1, 3)), kv_heads),
        batch=draw(st.integers(1, 3)),
        causal=draw(st.sampled_from(["", "top_left", "bottom_right"])),
        align=draw(st.sampled_from(["top_left", "bottom_right"])),
        window=(draw(sides), draw(sides)),
        softcap=draw(st.sampled_from([0.0, 0.5, 20.0])),
        alibi=draw(st.sampled_from(["", "H", "BH"])),
        mask=draw(st.sampled_from(["", "bool:", "float:", "f32:"])),
        dropout=draw(st.sampled_from([0.0, 0.1, 0.9])),
        layout=draw(st.sampled_from(["bhsd", "bshd", "nan", "gap"])),
        dlse=draw(st.booleans()),
    ).with_mask_dims(dims)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_attention_hypothesis(case):
    """Any combination, on all backends at once so that one definition serves them all."""
    for name in attention_cases.CPU_BACKENDS:
        with attention_cases.on_backend(name), attention_cases.threads(1):
            compare(case)
