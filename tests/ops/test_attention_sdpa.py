"""bigkernel.scaled_dot_product_attention in the place of torch's: signature, shapes, results."""

import copy
import inspect

import attention_cases
import pytest
import torch
from attention_cases import DTYPES, device_of
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import bigkernel
from bigkernel.testing.tolerance import assert_as_accurate

backend = attention_cases.backend
sdpa = bigkernel.scaled_dot_product_attention


def draw(*shapes, dtype=torch.float32, device="cpu"):
    torch.manual_seed(len(shapes[0]))
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def with_gradients(function, inputs, **keywords):
    out = function(*inputs, **keywords)
    leaves = [*inputs, *(x for x in keywords.values() if getattr(x, "requires_grad", False))]
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, dout))]


def as_torch(shapes, device, mask=None, **keywords):
    """At most twice the error of torch's own in float32, both against float64.

    torch's error on so few numbers is a matter of luck: it is the largest of its two kernels' over
    some draws, as in attention_cases.py.
    """
    theirs = functional.scaled_dot_product_attention

    def double(x):
        floating = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.detach().double().requires_grad_() if floating else x

    errors = []
    for seed in range(5):
        torch.manual_seed(seed)
        inputs = [torch.randn(shape).to(device).requires_grad_() for shape in shapes]
        if mask is not None:
            keywords["attn_mask"] = mask.to(device).requires_grad_(mask.is_floating_point())
        in_double = {name: double(x) for name, x in keywords.items()}
        exact = with_gradients(theirs, [double(x) for x in inputs], **in_double)
        for kernels in ([SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            with sdpa_kernel(kernels):
                same = with_gradients(theirs, inputs, **keywords)
            errors.append([(s - e).abs().max() for s, e in zip(same, exact, strict=True)])
    actual = with_gradients(sdpa, inputs, **keywords)
    for a, e, error in zip(actual, exact, torch.tensor(errors).amax(0), strict=True):
        assert_as_accurate(a, e, e + error)


def test_sdpa_has_torchs_signature():
    documented = functional.scaled_dot_product_attention.__doc__
    names = list(inspect.signature(sdpa).parameters)
    assert names == [
        "query",
        "key",
        "value",
        "attn_mask",
        "dropout_p",
        "is_causal",
        "scale",
        "enable_gqa",
    ]
    assert all(name in documented for name in names)


# Shapes of query, key, value that torch takes.
SHAPES = {
    "4d": ((2, 3, 17, 8), (2, 3, 23, 8), (2, 3, 23, 8)),
    "3d": ((4, 17, 8), (4, 23, 8), (4, 23, 8)),
    "2d": ((17, 8), (23, 8), (23, 8)),
    "5d": ((2, 3, 2, 17, 8), (2, 3, 2, 23, 8), (2, 3, 2, 23, 8)),
    "6d": ((1, 2, 2, 2, 9, 8), (1, 2, 2, 2, 11, 8), (1, 2, 2, 2, 11, 8)),
    "value_dim": ((2, 3, 17, 8), (2, 3, 23, 8), (2, 3, 23, 20)),
    "batch_broadcast": ((2, 3, 17, 8), (1, 3, 23, 8), (2, 3, 23, 8)),
    "query_broadcast": ((1, 1, 17, 8), (2, 3, 23, 8), (2, 3, 23, 8)),
    "one_key_head": ((2, 3, 17, 8), (2, 1, 23, 8), (2, 1, 23, 8)),
    "heads_broadcast": ((2, 3, 17, 8), (2, 1, 23, 8), (1, 3, 23, 8)),
    "ranks_differ": ((2, 3, 17, 8), (23, 8), (3, 23, 8)),
    "5d_broadcast": ((1, 2, 3, 17, 8), (2, 1, 1, 23, 8), (3, 23, 8)),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
def test_sdpa_shapes(backend, shapes, causal):
    as_torch(SHAPES[shapes], device_of(backend), is_causal=causal)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 6, 17, 8), (2, 2, 23, 8), (2, 2, 23, 8)),
        ((2, 6, 17, 8), (2, 1, 23, 8), (2, 1, 23, 8)),
        ((6, 17, 8), (2, 3, 23, 8), (2, 3, 23, 8)),
        ((2, 6, 17, 8), (2, 2, 23, 8), (2, 3, 23, 8)),
    ],
    ids=["gqa", "mqa", "ranks_differ", "value_heads_differ"],
)
def test_sdpa_enable_gqa(backend, shapes):
    as_torch(shapes, device_of(backend), enable_gqa=True)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    ("inputs", "shape"),
    [
        ("4d", (17, 23)),
        ("4d", (2, 1, 17, 23)),
        ("4d", (3, 1, 23)),
        ("4d", (2, 3, 17, 23)),
        ("4d", (1, 1)),
        ("3d", (4, 17, 23)),
        ("3d", (17, 1)),
        ("2d", (17, 23)),
        ("5d", (2, 3, 1, 17, 23)),
        ("5d", (3, 1, 1, 23)),
        ("5d", (17, 23)),
    ],
    ids=str,
)
def test_sdpa_masks(backend, inputs, shape, kind):
    torch.manual_seed(1)
    mask = torch.randn(shape)
    if kind == "bool":
        mask = (mask > -0.5) | (torch.ones(shape[-1]).cumsum(0) == 1)  # each row sees a key
    as_torch(SHAPES[inputs], device_of(backend), mask)


def test_sdpa_scale(backend):
    as_torch(SHAPES["4d"], device_of(backend), scale=0.3)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_sdpa_half_is_as_accurate_as_torchs_fused_kernel(backend, dtype):
    """Not only as the computation in half precision, but as torch's kernel with float32 sums."""
    inputs = draw(*[(2, 4, 200, 64)] * 3, dtype=DTYPES[dtype], device=device_of(backend))
    for causal in (False, True):
        actual = with_gradients(sdpa, inputs, is_causal=causal)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            function = functional.scaled_dot_product_attention
            same = with_gradients(function, inputs, is_causal=causal)
        double = [x.detach().double().requires_grad_() for x in inputs]
        exact = with_gradients(function, double, is_causal=causal)
        for a, e, s in zip(actual, exact, same, strict=True):
            assert_as_accurate(a, e, s)


@pytest.mark.parametrize(("width", "value_width"), [(0, 4), (8, 0), (0, 0)])
def test_sdpa_head_dim_zero_as_in_torch(width, value_width):
    shapes = ((2, 3, 5, width), (2, 3, 7, width), (2, 3, 7, value_width))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = []
    for function in (sdpa, functional.scaled_dot_product_attention):
        out = function(*inputs, is_causal=True)
        results.append((out, *torch.autograd.grad(out.sum(), inputs, allow_unused=True)))
    for ours, theirs in zip(*results, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs)


def test_sdpa_fully_masked_row_is_zero(backend):
    q, k, v = draw(*SHAPES["4d"], device=device_of(backend))
    mask = torch.ones(17, 23, dtype=torch.bool, device=q.device)
    mask[3] = False
    out = sdpa(q, k, v, attn_mask=mask)
    assert (out[:, :, 3] == 0).all()
    assert not (out[:, :, 4] == 0).all()


def test_sdpa_dropout(backend):
    """Seeded by torch's default generator, unbiased, and drawn anew for each call."""
    device = device_of(backend)
    q, k, v = draw(*[(4, 4, 64, 16)] * 3, device=device)
    torch.manual_seed(11)
    first = sdpa(q, k, v, dropout_p=0.2)
    second = sdpa(q, k, v, dropout_p=0.2)
    torch.manual_seed(11)
    assert torch.equal(first, sdpa(q, k, v, dropout_p=0.2))
    assert not torch.equal(first, second)
    mean = torch.stack([sdpa(q, k, v, dropout_p=0.2).detach() for _ in range(50)]).mean(0)
    assert (mean - sdpa(q, k, v)).abs().mean() < 0.02


def test_sdpa_keeps_the_layout_of_a_projection(backend):
    """[B, S, H, D] in, [B, S, H, D] in memory out: the next reshape is free."""
    x = torch.randn(2, 17, 4, 8, device=device_of(backend))
    q = x.transpose(1, 2)
    assert sdpa(q, q, q).transpose(1, 2).is_contiguous()
    contiguous = q.contiguous()
    assert sdpa(contiguous, contiguous, contiguous).is_contiguous()


def test_sdpa_in_the_place_of_torchs(backend, monkeypatch):
    """torch's own MultiheadAttention runs on it unchanged."""
    device = device_of(backend)
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True).to(device)
    x = torch.randn(3, 11, 32, device=device, requires_grad=True)
    padding = torch.zeros(3, 11, dtype=torch.bool, device=device)
    padding[1, 7:] = True

    def run(dtype=torch.float32):
        module, wide = copy.deepcopy(layer).to(dtype), x.to(dtype)
        out, _ = module(wide, wide, wide, key_padding_mask=padding, need_weights=False)
        return out, *torch.autograd.grad(out.square().sum(), [wide, *module.parameters()])

    exact, same = run(torch.float64), run()
    calls = []

    def ours(*args, **keywords):
        calls.append(1)
        return sdpa(*args, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", ours)
    for a, e, s in zip(run(), exact, same, strict=True):
        assert_as_accurate(a.detach().cpu(), e.detach().cpu(), s.detach().cpu())
    assert calls


def test_sdpa_mask_and_causal_together_raise_as_in_torch():
    q, k, v = draw(*SHAPES["4d"])
    mask = torch.zeros(17, 23)
    # Before 2.14 some calls of torch's pass over one of the two.
    theirs = [functional.scaled_dot_product_attention] * (torch.__version__ >= "2.14")
    for function in (*theirs, sdpa):
        with pytest.raises(RuntimeError, match="is_causal=True"):
            function(q, k, v, attn_mask=mask, is_causal=True)


@pytest.mark.parametrize(
    ("shapes", "keywords", "message"),
    [
        (((8,), (8,), (8,)), {}, "query must be at least 2-dimensional"),
        (((2, 4, 5, 8), (3, 4, 5, 8), (3, 4, 5, 8)), {}, "batch dimensions must be the same or 1"),
        (((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)), {}, "enable_gqa=True"),
        (((2, 4, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)), {"enable_gqa": True}, "a multiple of key's"),
        (((2, 4, 5, 8), (2, 4, 5, 9), (2, 4, 5, 9)), {}, "head dim must be q's, 8"),
        (((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 6, 8)), {}, "v must be of k's shape"),
        (((2, 4, 5, 8),) * 3, {"attn_mask": torch.zeros(5, 4)}, "attn_mask must be broadcastable"),
        (((4, 5, 8),) * 3, {"attn_mask": torch.zeros(1, 4, 5, 5)}, "attn_mask must be broadcast"),
        (((2, 4, 5, 8),) * 3, {"dropout_p": 1.5}, "dropout_p must be between 0 and 1, got 1.5"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_sdpa_rejects_bad_input(shapes, keywords, message):
    with pytest.raises(ValueError, match=message):
        sdpa(*draw(*shapes), **keywords)


def test_sdpa_rejects_bad_dtypes():
    q, k, v = draw(*SHAPES["4d"])
    with pytest.raises(TypeError, match="k must be of q's dtype"):
        sdpa(q, k.half(), v)
    with pytest.raises(TypeError, match=r"mask must be bool, float32 or of q's dtype.*mask.bool"):
        sdpa(q, k, v, attn_mask=torch.ones(17, 23, dtype=torch.int64))
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with pytest.raises(TypeError, match="attention_varlen"):
        sdpa(nested, nested, nested)
