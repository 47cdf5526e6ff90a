"""attention_varlen: sequences packed end to end equal separate calls, and never see each other."""

import attention_cases
import pytest
import torch
from attention_cases import DTYPES, SEED, device_of, largest_error

from bigkernel import ops
from bigkernel.ops.attention import op as attention_op
from bigkernel.ops.attention.reference import Rule, attention_reference

backend = attention_cases.backend_or_ptx

# Empty on either side or both, one token, within a tile, more than one tile.
LENGTHS = [(5, 9), (0, 3), (40, 40), (4, 0), (1, 1), (0, 0), (33, 150)]
HEADS, KV_HEADS, DIM = 4, 2, 24

FEATURES = {
    "plain": {},
    "causal_top_left": {"causal": True},
    "causal_bottom_right": {"causal": True, "align": "bottom_right"},
    "window": {"window": (7, 3), "align": "bottom_right"},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": "H", "align": "bottom_right"},
    "alibi_per_sequence": {"alibi_slopes": "BH", "causal": True},
    "dropout": {"dropout_p": 0.3},
    "everything": {
        "causal": True,
        "align": "bottom_right",
        "window": (30, 0),
        "softcap": 2.0,
        "alibi_slopes": "BH",
        "dropout_p": 0.2,
    },
    # One mask for all sequences. Of one row or column, it gets its gradient another way.
    "bias": {"mask": "HQK"},
    "bias_of_keys": {"mask": "K", "window": (9, 9)},
    "bias_of_rows": {"mask": "HQ1"},
    "bool": {"mask": "QK", "causal": True, "align": "bottom_right"},
}
FEATURES["bias_and_everything"] = {**FEATURES["everything"], "mask": "HQK"}
# More than the longest sequence has.
MOST = 42, 151


def cumulative(lengths, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def draw(dtype, device="cpu", lengths=LENGTHS, seed=3):
    """q, k, v, dout, dlse and both cu_seqlens."""
    torch.manual_seed(seed)
    rows, keys = (sum(side) for side in zip(*lengths, strict=True))
    q, k, v, dout = (
        torch.randn(n, h, DIM).to(device, dtype)
        for n, h in ((rows, HEADS), (keys, KV_HEADS), (keys, KV_HEADS), (rows, HEADS))
    )
    dlse = torch.randn(HEADS, rows).to(device)
    return (q, k, v), (dout, dlse), [cumulative(x, device) for x in zip(*lengths, strict=True)]


def options(feature, dtype=torch.float32, device="cpu"):
    found = dict(FEATURES[feature])
    if "mask" in found:
        torch.manual_seed(5)
        sizes = dict(zip("HQK", (HEADS, *MOST), strict=True))
        mask = torch.randn([sizes.get(dim, 1) for dim in found["mask"]]).to(device, dtype)
        found["mask"] = mask > -1 if feature == "bool" else mask
        found["max_seqlen_q"], found["max_seqlen_k"] = MOST
    if "alibi_slopes" in found:
        torch.manual_seed(4)
        shape = (len(LENGTHS), HEADS) if found["alibi_slopes"] == "BH" else (HEADS,)
        found["alibi_slopes"] = torch.rand(shape).to(device) * 0.3
    return found


def forward_backward(function, inputs, gradients):
    """(out, lse, gradients of the floating inputs) of ``function(q, k, v, mask)``."""
    inputs = [None if x is None else x.detach() for x in inputs]
    leaves = [x.requires_grad_() for x in inputs if x is not None and x.is_floating_point()]
    out, lse = function(*inputs)
    grads = torch.autograd.grad(
        [out, lse], leaves, [x.to(y.dtype) for x, y in zip(gradients, (out, lse), strict=True)]
    )
    return [x.detach().cpu() for x in (out, lse, *grads)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_attention_varlen_matches_reference(backend, feature, dtype):
    device = device_of(backend)
    qkv, gradients, (cu_q, cu_k) = draw(DTYPES[dtype], device)
    keywords = options(feature, DTYPES[dtype], device)
    inputs = (*qkv, keywords.pop("mask", None))
    actual = forward_backward(
        lambda q, k, v, mask: ops.attention_varlen(
            q, k, v, cu_q, cu_k, mask=mask, seed=SEED, return_lse=True, **keywords
        ),
        inputs,
        gradients,
    )
    left, right = (-1 if side is None else side for side in keywords.get("window", (None, None)))
    rule = Rule(
        DIM**-0.5,
        keywords.get("causal", False),
        keywords.get("align") == "bottom_right",
        left,
        right,
        keywords.get("softcap", 0.0),
        keywords.get("dropout_p", 0.0),
    )

    def reference(dtype, inputs=inputs, gradients=gradients):
        return forward_backward(
            lambda q, k, v, mask: attention_reference(
                q,
                k,
                v,
                rule,
                mask=mask if mask is None else mask[(None,) * (4 - mask.dim())],
                alibi_slopes=keywords.get("alibi_slopes"),
                seed=torch.tensor([SEED], device=device),
                cu_seqlens_q=cu_q,
                cu_seqlens_k=cu_k,
            ),
            [x if x is None or x.dtype == torch.bool else x.to(dtype) for x in inputs],
            [x.to(dtype) for x in gradients],
        )

    exact, errors = reference(torch.float64), []
    for seed in (3, 4, 5):  # PyTorch may be lucky once
        other, of_other, _ = draw(DTYPES[dtype], device, seed=seed)
        given = (*other, inputs[3]), of_other
        right, same = reference(torch.float64, *given), reference(DTYPES[dtype], *given)
        same[1] = reference(torch.float32, *given)[1]  # lse is kept in float32
        errors.append([largest_error(s, e) for s, e in zip(same, right, strict=True)])
    names = ("out", "lse", "dq", "dk", "dv", "dmask")[: len(actual)]
    for name, a, e, *errs in zip(names, actual, exact, *errors, strict=True):
        half_ulp = 0.5 * torch.finfo(a.dtype).eps * e[e.isfinite()].abs().max().item()
        error, allowed = largest_error(a, e), 2 * max(errs) + half_ulp
        assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}"


@pytest.mark.parametrize("feature", FEATURES)
def test_attention_varlen_equals_separate_calls(backend, feature):
    """Bit for bit forward; backward up to the order in which partial sums are added."""
    device = device_of(backend)
    qkv, gradients, (cu_q, cu_k) = draw(torch.float32, device)
    keywords = options(feature, device=device)
    slopes, mask = keywords.pop("alibi_slopes", None), keywords.pop("mask", None)
    packed = forward_backward(
        lambda q, k, v, mask: ops.attention_varlen(
            q, k, v, cu_q, cu_k, mask=mask, seed=SEED, alibi_slopes=slopes, return_lse=True,
            **keywords,
        ),
        (*qkv, mask),
        gradients,
    )  # fmt: skip
    for name in ("max_seqlen_q", "max_seqlen_k"):
        keywords.pop(name, None)

    def separate(q, k, v, mask):
        outs, lses = [], []
        parts = zip(*(x.split(n) for x, n in ((q, ROWS), (k, KEYS), (v, KEYS))), strict=True)
        for b, part in enumerate(parts):
            # Batch entry b, because dropout and slopes are keyed by it.
            one_q, one_k, one_v = (x.transpose(0, 1).expand(b + 1, -1, -1, -1) for x in part)
            own = slopes[: b + 1] if slopes is not None and slopes.dim() == 2 else slopes
            part = mask
            if mask is not None:  # a mask of one column or row has no more to take
                part = mask[..., : KEYS[b] if mask.shape[-1] > 1 else 1]
                part = part[..., : ROWS[b], :] if part.dim() > 1 else part
            out, lse = ops.attention(
                one_q, one_k, one_v, mask=part, seed=SEED, alibi_slopes=own, return_lse=True,
                **keywords,
            )  # fmt: skip
            outs.append(out[b].transpose(0, 1))
            lses.append(lse[b])
        return torch.cat(outs), torch.cat(lses, 1)

    expected = forward_backward(separate, (*qkv, mask), gradients)
    if backend.startswith("cpu"):
        assert torch.equal(packed[0], expected[0])
        assert torch.equal(packed[1], expected[1])
    for a, e in zip(packed, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-6)


ROWS, KEYS = ([pair[side] for pair in LENGTHS] for side in (0, 1))


def test_attention_varlen_nan_neighbours(backend):
    """A sequence of NaN changes no bit of the others, forward and backward."""
    device = device_of(backend)
    qkv, gradients, (cu_q, cu_k) = draw(torch.float32, device)

    def call(q, k, v):
        return ops.attention_varlen(q, k, v, cu_q, cu_k, causal=True, return_lse=True)

    clean = forward_backward(call, qkv, gradients)
    start_q, stop_q = cu_q[2:4].tolist()
    start_k, stop_k = cu_k[2:4].tolist()
    poisoned = [x.clone() for x in qkv]
    for x, start, stop in zip(
        poisoned, (start_q, start_k, start_k), (stop_q, stop_k, stop_k), strict=True
    ):
        x[start:stop] = torch.nan
    dirty = forward_backward(call, poisoned, gradients)
    rows = torch.ones(sum(ROWS), dtype=torch.bool)
    rows[start_q:stop_q] = False
    keys = torch.ones(sum(KEYS), dtype=torch.bool)
    keys[start_k:stop_k] = False
    for a, e, index in zip(dirty, clean, (rows, rows, rows, keys, keys), strict=True):
        a, e = (x.T if x.shape[0] == HEADS and x.dim() == 2 else x for x in (a, e))  # lse [H, T]
        assert torch.equal(a[index], e[index])
    assert dirty[0][~rows].isnan().all()


def test_attention_varlen_strided_nan(backend):
    """q, k and v as slices of one fused projection whose other columns are NaN."""
    device = device_of(backend)
    lengths = [(7, 7), (20, 20)]
    (q, _, _), gradients, (cu, _) = draw(torch.float32, device, lengths)
    fused = torch.full((27, 4, HEADS, DIM + 3), torch.nan, device=device)
    for i in range(3):
        fused[:, i, :, :DIM] = q * (i + 1)
    views = [fused[:, i, :, :DIM] for i in range(3)]

    def call(q, k, v):
        return ops.attention_varlen(q, k, v, cu, cu, window=(3, 3), return_lse=True)

    for a, e in zip(
        forward_backward(call, views, gradients),
        forward_backward(call, [x.contiguous() for x in views], gradients),
        strict=True,
    ):
        if backend.startswith("cpu"):
            assert torch.equal(a, e)
        torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 5), (0, 0)], [(5, 0), (2, 0)]], ids=str)
def test_attention_varlen_nothing_to_do(backend, lengths):
    """No sequences; no queries; no keys, which is a fully masked row."""
    device = device_of(backend)
    sides = list(zip(*lengths, strict=True)) or [(), ()]
    rows, keys = map(sum, sides)
    q = torch.randn(rows, HEADS, DIM, device=device, requires_grad=True)
    k, v = (torch.randn(keys, KV_HEADS, DIM, device=device, requires_grad=True) for _ in range(2))
    cu_q, cu_k = (cumulative(side, device) for side in sides)
    out, lse = ops.attention_varlen(q, k, v, cu_q, cu_k, return_lse=True)
    assert out.shape == (rows, HEADS, DIM)
    assert lse.shape == (HEADS, rows)
    out.sum().backward()
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    for x in (q, k, v):
        assert x.grad.shape == x.shape
        assert (x.grad == 0).all()


def test_attention_varlen_max_seqlen(backend):
    """The true maximum, or anything above it, changes nothing."""
    device = device_of(backend)
    (q, k, v), _, (cu_q, cu_k) = draw(torch.float32, device)
    out = ops.attention_varlen(q, k, v, cu_q, cu_k)
    same = ops.attention_varlen(q, k, v, cu_q, cu_k, max_seqlen_q=40, max_seqlen_k=150)
    more = ops.attention_varlen(q, k, v, cu_q, cu_k, max_seqlen_q=10**9, max_seqlen_k=10**9)
    assert torch.equal(out, same)
    assert torch.equal(out, more)


def test_offsets_on_the_cpu_bound_the_launch_and_wait_for_no_device(monkeypatch):
    """On a device without values, so that whoever read one there would fail."""
    given, run = [], attention_op.call

    def call(namespace, name, *arguments):
        given.append(arguments)
        return run(namespace, name, *arguments)

    monkeypatch.setattr(attention_op, "call", call)
    (q, k, v), _, offsets = draw(torch.float32)
    q, k, v = (x.to("meta") for x in (q, k, v))
    mask = torch.zeros(1, 1, device="meta")
    for keywords, most in (
        ({}, (40, 150)),
        ({"max_seqlen_q": 60}, (60, 150)),
        ({"mask": mask}, (len(q), len(k))),  # a mask may have a row for each
    ):
        out = ops.attention_varlen(q, k, v, *offsets, **keywords)
        assert (out.shape, out.device.type) == (q.shape, "meta")
        *_, cu_q, cu_k, longest_q, longest_k = given.pop()[:10]
        assert (longest_q, longest_k) == most
        assert {x.device.type for x in (cu_q, cu_k)} == {"meta"}
    for wrong, message in (
        ({"max_seqlen_k": 149}, "max_seqlen_k must be at least the longest sequence, 150"),
        ({"cu": offsets[0].long()}, "cu_seqlens_q must be int32"),
        ({"cu": offsets[0] + 1}, "cu_seqlens_q must be non-decreasing from 0"),
    ):
        cu_q = wrong.pop("cu", offsets[0])
        with pytest.raises((ValueError, TypeError), match=message):
            ops.attention_varlen(q, k, v, cu_q, offsets[1], **wrong)
    with pytest.raises(ValueError, match="cu_seqlens_q must be on q's device, cpu, got meta"):
        ops.attention_varlen(*draw(torch.float32)[0], offsets[0].to("meta"), offsets[1])


@pytest.mark.gpu
def test_offsets_on_the_cpu_give_the_same_on_a_gpu():
    qkv, _, offsets = draw(torch.bfloat16, "cuda")
    there = ops.attention_varlen(*qkv, *offsets, causal=True)
    here = ops.attention_varlen(*qkv, *(x.cpu() for x in offsets), causal=True)
    assert torch.equal(here, there)
