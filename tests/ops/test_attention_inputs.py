"""What attention takes and refuses: strides, NaN around them, zero sizes, bad input, fallbacks."""

import re
import warnings

import attention_cases
import pytest
import torch
from attention_cases import Case, compare, device_of
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import bigkernel
from bigkernel import _library, ops
from bigkernel import backend as backends

backend = attention_cases.backend
needs_native = pytest.mark.skipif(
    not bigkernel.cpu_isas(), reason="the native library is not built"
)


@pytest.mark.parametrize("layout", ["bshd", "nan", "gap"])
@pytest.mark.parametrize("dtype", attention_cases.DTYPES)
def test_attention_noncontiguous(backend, dtype, layout):
    """Layouts of q, k, v and dout; nan: whatever lies between the rows is NaN and never used."""
    for dim in (5, 16, 64):
        case = Case(
            dtype=dtype, dim=dim, layout=layout, causal="bottom_right", mask="float:B1QK", dlse=True
        )
        compare(case, device_of(backend))


def test_attention_mask_strides(backend):
    """Masks that are transposed, cut out of NaN, or expanded from one row."""
    device = device_of(backend)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 8, device=device) for _ in range(3))
    plain = torch.randn(2, 3, 20, 20, device=device)
    room = torch.full((2, 3, 25, 43), torch.nan, device=device)
    room[:, :, 2:22, 1:41:2] = plain
    row = plain[:1, :1, :1]
    for strided in (
        plain.transpose(-1, -2).contiguous().transpose(-1, -2),
        plain.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        room[:, :, 2:22, 1:41:2],
        row.expand(2, 3, 20, 20),
    ):
        results = []
        for mask in (strided, strided.contiguous()):
            leaf = mask.detach().requires_grad_()
            out = ops.attention(q, k, v, mask=leaf)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


def test_attention_gradient_with_stride_zero(backend):
    """out.sum() has a gradient of stride 0; q, k and v may be expanded, too."""
    device = device_of(backend)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, device=device, requires_grad=True) for _ in range(3))
    grads = torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v))
    ones = torch.ones_like(q)
    expected = torch.autograd.grad(ops.attention(q, k, v), (q, k, v), ones)
    for a, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, e)
    one = torch.randn(1, 1, 9, 8, device=device, requires_grad=True)
    expanded = one.expand(2, 4, 9, 8)
    (grad,) = torch.autograd.grad(ops.attention(expanded, expanded, expanded).sum(), one)
    copied = expanded.contiguous()
    (expected,) = torch.autograd.grad(ops.attention(copied, copied, copied).sum(), one)
    torch.testing.assert_close(grad, expected)


class Calls(TorchDispatchMode):
    """Records the names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "nan"])
def test_attention_copies_nothing(layout):
    """Whatever has a contiguous last dimension reaches the kernel as it is."""
    q, k, v = (attention_cases.stored(torch.randn(2, 4, 9, 8), layout) for _ in range(3))
    with Calls() as calls:
        ops.attention(q, k, v, causal=True, mask=torch.zeros(9, 9))
        bigkernel.scaled_dot_product_attention(q, k[:1], v[:1], is_causal=True)
    copying = {name for name in calls.names if re.search("copy|clone|contiguous|pad|cat", name)}
    assert not copying
    assert calls.names.count("bigkernel::attention_fwd") == 2


@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [
        ((0, 4, 5, 8), (0, 2, 7, 8)),
        ((2, 4, 0, 8), (2, 2, 7, 8)),
        ((2, 4, 5, 8), (2, 2, 0, 8)),
        ((2, 4, 0, 8), (2, 2, 0, 8)),
        ((2, 0, 5, 8), (2, 0, 7, 8)),
        ((2, 0, 5, 8), (2, 2, 7, 8)),
    ],
    ids=["batch", "queries", "keys", "queries_keys", "heads", "query_heads"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_zero_sizes(backend, q_shape, k_shape, masked):
    """Nothing in, nothing out; without keys every row is a fully masked one."""
    device = device_of(backend)
    q = torch.randn(q_shape, device=device, requires_grad=True)
    k, v = (torch.randn(k_shape, device=device, requires_grad=True) for _ in range(2))
    mask = None
    if masked:
        mask = torch.randn(q_shape[2], k_shape[2], device=device, requires_grad=True)
    for keywords in ({}, {"causal": True, "align": "bottom_right", "dropout_p": 0.5}):
        out, lse = ops.attention(q, k, v, mask=mask, return_lse=True, **keywords)
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
        leaves = [q, k, v, *([mask] if masked else [])]
        for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert grad.shape == leaf.shape
            assert (grad == 0).all()


def tensors(q=(2, 4, 5, 8), k=(2, 2, 7, 8), v=None, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in (q, k, v or k)]


# What is wrong -> the sentence that says so.
BAD_VALUES = {
    "rank_q": (
        tensors(q=(4, 5, 8)),
        {},
        r"q must be a tensor \[B, H, S, D\], got shape \(4, 5, 8\)",
    ),
    "rank_v": (tensors(v=(2, 7, 8)), {}, r"v must be a tensor \[B, H, S, D\]"),
    "batch": (tensors(k=(3, 2, 7, 8)), {}, "k and v must be of q's batch size, 2, got 3"),
    "length": (tensors(v=(2, 2, 6, 8)), {}, r"v must be of k's shape \(2, 2, 7, 8\) up to"),
    "head_dim": (tensors(k=(2, 2, 7, 9)), {}, "k's head dim must be q's, 8"),
    "no_head_dim": (tensors((2, 4, 5, 0), (2, 2, 7, 0)), {}, "and positive, got 0"),
    "no_value_dim": (tensors(v=(2, 2, 7, 0)), {}, "v's head dim must be positive"),
    "heads": (
        tensors(k=(2, 3, 7, 8)),
        {},
        "q's number of heads must be a multiple of k's, 3, got 4",
    ),
    "value_heads": (tensors(v=(2, 4, 7, 8)), {}, "v must be of k's shape"),
    "mask_shape": (tensors(), {"mask": torch.zeros(5, 6)}, r"broadcastable to \(2, 4, 5, 7\)"),
    "mask_rank": (tensors(), {"mask": torch.zeros(1, 1, 1, 1, 1)}, "mask must be broadcastable"),
    "slopes": (
        tensors(),
        {"alibi_slopes": torch.zeros(3)},
        r"alibi_slopes must be of shape \(4,\)",
    ),
    "slopes_gradient": (
        tensors(),
        {"alibi_slopes": torch.zeros(4, requires_grad=True)},
        "alibi_slopes must be without requires_grad.*floating mask",
    ),
    "slopes_infinite": (
        tensors(),
        {"alibi_slopes": torch.tensor([1.0, torch.inf, 1.0, 1.0])},
        r"alibi_slopes must be finite in float32, got \[1.0, inf, 1.0, 1.0\]",
    ),
    "slopes_too_large": (
        tensors(),
        {"alibi_slopes": torch.full((4,), 1e300, dtype=torch.float64)},
        "alibi_slopes must be finite in float32",
    ),
    "align": (tensors(), {"align": "left"}, "align must be 'top_left' or 'bottom_right', got left"),
    "window": (tensors(), {"window": (-2, 0)}, "window must be two numbers of keys"),
    "window_pair": (tensors(), {"window": (1, 2, 3)}, "window must be a pair"),
    "softcap": (tensors(), {"softcap": -1.0}, "softcap must be 0 .off. or a positive"),
    "softcap_nan": (tensors(), {"softcap": float("nan")}, "softcap must be 0 .off. or a positive"),
    "softcap_tiny": (
        tensors(),
        {"softcap": 1e-46},
        "softcap must be 0 .off. .*1e-30 to 1e30, got",
    ),
    "softcap_huge": (tensors(), {"softcap": 1e39}, "softcap must be 0 .off. .*1e-30 to 1e30, got"),
    "scale_huge": (tensors(), {"scale": 1e39}, "scale must be finite in the dtype of sums, got 1e"),
    "scale": (tensors(), {"scale": float("inf")}, "scale must be finite"),
    "dropout": (tensors(), {"dropout_p": -0.1}, "dropout_p must be between 0 and 1, got -0.1"),
    "dropout_nan": (tensors(), {"dropout_p": float("nan")}, "dropout_p must be between 0 and 1"),
    "seed": (tensors(), {"dropout_p": 0.5, "seed": 2**64}, "seed must be a signed 64-bit integer"),
    "seeds": (
        tensors(),
        {"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)},
        "seed must be one number",
    ),
}
BAD_TYPES = {
    "q": (tensors(dtype=torch.int64), {}, "q must be float16, bfloat16, float32 or float64.*int64"),
    "k": ([*tensors()[:1], *tensors(dtype=torch.float16)[1:]], {}, "k must be of q's dtype"),
    "mask": (tensors(), {"mask": torch.zeros(5, 7, dtype=torch.uint8)}, r"mask.*uint8.*mask.bool"),
    "slopes": (tensors(), {"alibi_slopes": torch.zeros(4, dtype=torch.int32)}, "slopes.*floating"),
    "seed": (tensors(), {"dropout_p": 0.5, "seed": torch.zeros(1)}, "seed must be.*int64"),
    "seed_float": (tensors(), {"dropout_p": 0.5, "seed": 1.5}, "seed must be a whole number"),
    "seed_generator": (
        tensors(),
        {"dropout_p": 0.5, "seed": torch.Generator()},
        "seed must be a whole number",
    ),
    "window_float": (tensors(), {"window": (1.5, None)}, "window must be two whole numbers"),
    "window_complex": (tensors(), {"window": (1j, None)}, "window must be two whole numbers"),
    "softcap_text": (tensors(), {"softcap": "50"}, "softcap must be a number, got '50'"),
    "scale_text": (tensors(), {"scale": "1"}, "scale must be a number, got '1'"),
    "dropout_none": (tensors(), {"dropout_p": None}, "dropout_p must be a number, got None"),
    "causal_text": (tensors(), {"causal": "no"}, "causal must be True or False, got 'no'"),
    "none": ([None, *tensors()[1:]], {}, "q must be a tensor, got NoneType"),
    "array": ([tensors()[0].numpy(), *tensors()[1:]], {}, "q must be a tensor, got ndarray"),
    "list": (tensors(), {"alibi_slopes": [1.0] * 4}, "alibi_slopes must be a tensor, got list"),
    "sparse": (
        [tensors()[0].to_sparse(), *tensors()[1:]],
        {},
        "q must be a dense tensor, got torch.sparse_coo.*to_dense",
    ),
}


@pytest.mark.parametrize("wrong", BAD_VALUES)
def test_attention_rejects_bad_input(wrong):
    inputs, keywords, message = BAD_VALUES[wrong]
    with pytest.raises(ValueError, match=f"^bigkernel.attention: .*{message}"):
        ops.attention(*inputs, **keywords)


@pytest.mark.parametrize("wrong", BAD_TYPES)
def test_attention_rejects_bad_dtypes(wrong):
    inputs, keywords, message = BAD_TYPES[wrong]
    with pytest.raises(TypeError, match=f"^bigkernel.attention: .*{message}"):
        ops.attention(*inputs, **keywords)


def test_attention_none_is_no_limit():
    q, k, v = (torch.randn_like(x) for x in tensors())
    given = ops.attention(q, k, v, softcap=None, window=None, scale=None, seed=None, mask=None)
    assert torch.equal(given, ops.attention(q, k, v))
    arguments = packed()
    packed_given = ops.attention_varlen(*arguments, softcap=None, window=None)
    assert torch.equal(packed_given, ops.attention_varlen(*arguments))


def test_attention_on_the_meta_device():
    """Shapes alone, without a warning and without reading a value."""
    q, k, v = (x.to("meta").requires_grad_() for x in tensors())
    slopes = torch.ones(4, device="meta")
    out, lse = ops.attention(q, k, v, alibi_slopes=slopes, dropout_p=0.5, return_lse=True)
    out.sum().backward()
    assert (out.shape, lse.shape, k.grad.shape) == ((2, 4, 5, 8), (2, 4, 5), k.shape)
    assert {x.device.type for x in (out, lse, k.grad)} == {"meta"}


@pytest.mark.parametrize("place", range(4))
def test_attention_refuses_forward_mode(place):
    """A tangent that a custom op would drop without a word, so that the derivative were 0."""
    inputs = [*tensors(), torch.zeros(5, 7)]

    def call(x):
        q, k, v, mask = (x if i == place else given for i, given in enumerate(inputs))
        return bigkernel.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    x = inputs[place]
    with pytest.raises(NotImplementedError, match="forward-mode tangent, got a dual tensor"):
        torch.func.jvp(call, (x,), (x,))
    with forward_ad.dual_level():
        assert call(x).shape == (2, 4, 5, 8)
        with pytest.raises(NotImplementedError, match="forward-mode tangent, got a dual tensor"):
            call(forward_ad.make_dual(x, x))


def test_attention_refuses_functorch_gradients():
    """torch.func.vmap works, one call for each; grad has no way through a custom op."""
    q, k, v = tensors()
    with pytest.raises(NotImplementedError, match=r"q must be outside of torch\.func\.grad"):
        torch.func.grad(lambda q: ops.attention(q, k, v).sum())(q)
    mapped = torch.vmap(ops.attention)(*(torch.stack((x, 2 * x)) for x in (q, k, v)))
    assert torch.equal(mapped[0], ops.attention(q, k, v))


@pytest.mark.parametrize("moved", ["k", "v", "mask", "slopes"])
def test_attention_rejects_another_device(moved):
    q, k, v = tensors()
    keywords = {}
    if moved == "mask":
        keywords["mask"] = torch.zeros(5, 7, device="meta")
    elif moved == "slopes":
        keywords["alibi_slopes"] = torch.zeros(4, device="meta")
    elif moved == "k":
        k = k.to("meta")
    else:
        v = v.to("meta")
    with pytest.raises(ValueError, match=f"{moved} must be on q's device, cpu, got meta"):
        ops.attention(q, k, v, **keywords)


def packed(lengths_q=(0, 2, 5), lengths_k=(0, 3, 7), dtype=torch.int32, **shapes):
    q = torch.zeros(shapes.get("q", (5, 4, 8)))
    k, v = (torch.zeros(shapes.get("k", (7, 2, 8))) for _ in range(2))
    return q, k, v, torch.tensor(lengths_q, dtype=dtype), torch.tensor(lengths_k, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (
            packed(lengths_q=(0, 3, 2, 5)),
            {},
            r"cu_seqlens_q must be non-decreasing.*\[0, 3, 2, 5\]",
        ),
        (packed(lengths_q=(1, 2, 5)), {}, "cu_seqlens_q must be non-decreasing from 0"),
        (packed(lengths_k=(0, 3, 8)), {}, "cu_seqlens_k must be non-decreasing from 0 to .* 7"),
        (packed(lengths_k=(0, 3, 6)), {}, "cu_seqlens_k must be non-decreasing from 0 to .* 7"),
        (packed(lengths_k=(0, -3, 7)), {}, "cu_seqlens_k must be non-decreasing"),
        (packed(lengths_k=(0, 7)), {}, "cu_seqlens_k must be as long as cu_seqlens_q, 3, got 2"),
        (packed(lengths_q=()), {}, r"cu_seqlens_q must be of shape \[B \+ 1\]"),
        (packed(lengths_q=[[0, 5]]), {}, r"cu_seqlens_q must be of shape \[B \+ 1\]"),
        (packed(q=(1, 5, 4, 8)), {}, r"q must be a tensor \[T, H, D\]"),
        (packed(), {"max_seqlen_q": 2}, "max_seqlen_q must be at least the longest sequence, 3"),
        (packed(), {"alibi_slopes": torch.zeros(3, 4)}, r"of shape \(4,\) or \(2, 4\)"),
        (
            packed(),
            {"mask": torch.zeros(2, 1, 5, 7)},
            r"mask must be broadcastable to \(1, 4, 5, 7",
        ),
        (packed(), {"mask": torch.zeros(3, 4)}, r"mask must be broadcastable to \(1, 4, 5, 7"),
    ],
)
def test_attention_varlen_rejects_bad_input(arguments, keywords, message):
    with pytest.raises(ValueError, match=f"^bigkernel.attention_varlen: .*{message}"):
        ops.attention_varlen(*arguments, **keywords)


def test_attention_varlen_takes_strided_lengths(backend):
    q, k, v, lengths_q, lengths_k = (x.to(device_of(backend)) for x in packed())
    v = torch.randn_like(v)
    expected = ops.attention_varlen(q, k, v, lengths_q, lengths_k)
    gaps = [x.repeat_interleave(2)[::2] for x in (lengths_q, lengths_k)]
    assert torch.equal(ops.attention_varlen(q, k, v, *gaps), expected)


@pytest.mark.parametrize("lengths", [None, [0, 2, 5]])
def test_attention_varlen_rejects_what_is_no_tensor(lengths):
    with pytest.raises(TypeError, match=r"cu_seqlens_q must be a tensor, got (list|NoneType)"):
        ops.attention_varlen(*packed()[:3], lengths, packed()[4])


def test_attention_varlen_rejects_a_bound_that_is_no_whole_number():
    with pytest.raises(TypeError, match=r"max_seqlen_q must be a whole number, got 5\.0"):
        ops.attention_varlen(*packed(), max_seqlen_q=5.0)


def test_attention_varlen_rejects_int64_lengths():
    with pytest.raises(TypeError, match=r"cu_seqlens_q must be int32, got torch.int64.*int32"):
        ops.attention_varlen(*packed(dtype=torch.int64))


def raw(q, k, v, mask=None, slopes=None, seed=None, cu_q=None, cu_k=None, dropout_p=0.0, longest=9):
    """The op itself, past the checks of the public functions."""
    return torch.ops.bigkernel.attention_fwd(
        q, k, v, mask, slopes, seed, cu_q, cu_k, longest, longest,
        0.5, False, False, -1, -1, 0.0, dropout_p,
    )  # fmt: skip


@needs_native
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: raw(*tensors(k=(2, 2, 7, 9))), "head dim"),
        (lambda: raw(*tensors(k=(2, 3, 7, 8))), "multiple"),
        (lambda: raw(*tensors(k=(3, 2, 7, 8))), "batch size"),
        (lambda: raw(*tensors(q=(4, 5, 8))), "dimensions"),
        (lambda: raw(*tensors((2, 4, 5, 257), (2, 2, 7, 257))), "256"),
        (lambda: raw(*tensors(dtype=torch.float64)), "dtype|float"),
        (lambda: raw(*(x.transpose(-1, -2) for x in tensors())), "head dim|contiguous"),
        (lambda: raw(*(x[..., ::2] for x in tensors())), "contiguous last dimension"),
        (lambda: raw(*tensors(), mask=torch.zeros(1, 1, 5, 6)), "broadcastable"),
        (lambda: raw(*tensors(), slopes=torch.zeros(5)), "alibi_slopes"),
        (lambda: raw(*tensors(), dropout_p=0.5), "seed"),
        (lambda: raw(*packed(lengths_q=(0, 4, 3, 5))[:3]), "dimensions"),
        (lambda: raw_packed(lengths_q=(0, 4, 3, 5)), "must not decrease"),
        (lambda: raw_packed(lengths_k=(0, 3, 800)), "longest sequence|end with"),
        (lambda: raw_packed(lengths_k=(-5, 3, 7)), "start with 0"),
    ],
)
def test_attention_kernel_checks_what_memory_depends_on(arguments, message):
    """Called directly, the kernel refuses instead of reading where it must not."""
    with pytest.raises(RuntimeError, match=message):
        arguments()


def raw_packed(**lengths):
    q, k, v, cu_q, cu_k = packed(**lengths)
    if len(cu_q) != len(cu_k):
        cu_k = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    return raw(q, k, v, cu_q=cu_q, cu_k=cu_k)


def test_attention_fallback_is_an_error_when_strict():
    """float64 and head dims above 256 are all that native code leaves to PyTorch."""
    for inputs, reason in (
        (tensors(dtype=torch.float64), "float64 has no native kernel"),
        (tensors((1, 1, 2, 257), (1, 1, 3, 257)), "head dim 257 is above the native kernels' 256"),
        (tensors(v=(2, 2, 7, 300)), "head dim 300 is above"),
    ):
        if not _library.kernels["attention_fwd", "cpu"]:
            reason = "native library"
        with pytest.raises(RuntimeError, match=f"{reason}.*BIGKERNEL_STRICT=1"):
            ops.attention(*inputs)


def test_attention_fallback_is_said_once(monkeypatch):
    monkeypatch.delenv("BIGKERNEL_STRICT")
    monkeypatch.setattr(backends, "_warned", set())
    inputs = tensors((1, 1, 2, 300), (1, 1, 3, 300))
    with pytest.warns(backends.FallbackWarning, match=r"attention_fwd runs in plain PyTorch"):
        ops.attention(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.attention(*inputs)


@needs_native
def test_attention_named_backend_that_cannot_run_is_an_error():
    with (
        bigkernel.use_backend("cpu"),
        pytest.raises(RuntimeError, match="float64 has no native kernel"),
    ):
        ops.attention(*tensors(dtype=torch.float64))
