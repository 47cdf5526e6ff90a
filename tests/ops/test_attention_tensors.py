"""What is no plain tensor, and what is done to functions: each gives the right numbers, or is
refused in one sentence.

Subclasses -> test_attention_takes_*, test_attention_refuses_what_*; DTensors ->
test_attention_of_dtensors_*; forward mode, vmap, torch.func and second derivatives, eager and
compiled -> test_attention_under_*; script, trace and fx -> test_attention_in_*.
"""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils._python_dispatch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.masked import masked_tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as torchs

import bigkernel
from bigkernel import ops
from bigkernel.ops import attention, attention_varlen

sdpa = bigkernel.scaled_dot_product_attention


def draw(rows=4, keys=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, n, 8, generator=generator) for n in (rows, keys, keys)]


def cuts(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def varlen(q, k, v):
    """The same by packed sequences, so that one list of transforms does for all."""
    b, h, rows, d = q.shape
    keys = k.shape[2]
    q, k, v = (x.transpose(1, 2).reshape(-1, h, d) for x in (q, k, v))
    lengths = (cuts(*range(0, (b + 1) * n, n)) for n in (rows, keys))
    return attention_varlen(q, k, v, *lengths).view(b, rows, h, d).transpose(1, 2)


FUNCTIONS = {"attention": attention, "attention_varlen": varlen, "sdpa": sdpa}


# ---- subclasses ----


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("sizes", [(4, 6), (6, 6), (1, 5)], ids=str)
@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_attention_takes_torchs_causal_biases(bias, sizes, compiled):
    """Their data means nothing: they were read as a mask, and the numbers were wrong."""
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in draw(*sizes)]
    function = torch.compile(sdpa, backend="aot_eager") if compiled else sdpa
    results = [f(*inputs, attn_mask=bias(*sizes)) for f in (function, torchs)]
    torch.testing.assert_close(*results)
    dout = torch.randn_like(results[0])
    for ours, theirs in zip(*(torch.autograd.grad(x, inputs, dout) for x in results), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_attention_refuses_a_causal_bias_elsewhere():
    q, k, v = draw()
    with pytest.raises(ValueError, match=r"causal attn_mask must be of the lengths \(4, 6\)"):
        sdpa(q, k, v, causal_lower_right(6, 6))
    with pytest.raises(ValueError, match="is_causal must be False with a causal attn_mask"):
        sdpa(q, k, v, causal_lower_right(4, 6), is_causal=True)
    with pytest.raises(TypeError, match=r"mask must be a plain tensor, got a CausalBias.*align"):
        attention(q, k, v, mask=causal_lower_right(4, 6))


class Tagged(torch.Tensor):
    """Data and a name for it."""


class Opaque(torch.Tensor):
    """One that means something else than its data: twice as much."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("place", ["q", "k", "v", "mask"])
def test_attention_takes_tensors_that_are_their_data(place):
    given = dict(zip("qkv", draw(), strict=True)) | {"mask": torch.randn(4, 6)}
    expected = attention(**given)
    for convert in (torch.nn.Parameter, lambda x: x.as_subclass(Tagged)):
        assert torch.equal(attention(**(given | {place: convert(given[place])})), expected)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in given.items()}
        slopes, lengths = torch.rand(4), torch.zeros(3, dtype=torch.int32)
        assert attention(**fake, alibi_slopes=slopes).shape == expected.shape
        packed = [fake[x][0].transpose(0, 1) for x in "qkv"]
        assert attention_varlen(*packed, lengths, lengths).shape == (4, 4, 8)


UNKNOWN = {
    "own __torch_function__": (
        lambda x: x.as_subclass(Opaque),
        r"must be a plain tensor, got a Opaque.*as_subclass",
    ),
    "MaskedTensor": (
        lambda x: masked_tensor(x, x > 0),
        "must be a plain tensor, got a Masked",
    ),
    "quantised": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "float16, bfloat16, float32|q's dtype|bool, float32",
    ),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[0]]), "got a nested one.*Pack"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x[0], x[0]], layout=torch.jagged),
        "got a nested one.*Pack",
    ),
    "sparse": (lambda x: x.to_sparse(), "must be a dense tensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["query", "key", "value", "attn_mask"])
@pytest.mark.parametrize("kind", UNKNOWN)
def test_attention_refuses_what_it_does_not_know(kind, place):
    convert, message = UNKNOWN[kind]
    names = ("query", "key", "value", "attn_mask")
    given = dict(zip(names, [*draw(), torch.randn(2, 4, 4, 6)], strict=True))
    with pytest.raises(TypeError, match=message):
        sdpa(**(given | {place: convert(given[place])}))


RANKS = Path(__file__).with_name("attention_ranks.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_attention_of_dtensors_over_two_ranks(tmp_path):
    """Split over batch or heads, forward and backward, is what one process computes; what is
    split otherwise is refused. The cases are in attention_ranks.py."""
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    assert all("all cases" in output for output in outputs)


# ---- transforms ----


def double_backward(f):
    def call(x):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    return call


def dual(f):
    def call(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent

    return call


def batched_gradients(f):
    def call(x):
        x = x.clone().requires_grad_()
        out = f(x)
        grads = torch.stack((torch.ones_like(out), torch.full_like(out, 2)))
        return torch.autograd.grad(out, x, grads, is_grads_batched=True)[0]

    return call


TRANSFORMS = {
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
    "dual": dual,
    "jacfwd": torch.func.jacfwd,
    "linearize": lambda f: lambda x: torch.func.linearize(f, x)[1](x),
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](x)[0],
    "jacrev": torch.func.jacrev,
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum()),
    "vmap": lambda f: lambda x: torch.vmap(f)(torch.stack((x, 2 * x))),
    "functionalize": torch.func.functionalize,
    "double backward": double_backward,
    "batched gradients": batched_gradients,
    "autograd jvp": lambda f: lambda x: torch.autograd.functional.jvp(f, x, x)[1],
    "jacobian": lambda f: lambda x: torch.autograd.functional.jacobian(f, x, vectorize=True),
}
RIGHT = {"vmap", "functionalize", "batched gradients", "jacobian"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["eager", "of a compiled function", "compiled"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_attention_under_a_transform(name, transform, where):
    """Right, as torch's own attention gives it, or refused; a silent 0 is what it was."""
    torch._dynamo.reset()
    q, k, v = (x[:1, :1] for x in draw(2, 3))

    def ours(x):
        return FUNCTIONS[name](x, k, v)

    def theirs(x):  # the definition, which has every derivative
        return torch.softmax(x @ k.mT / 8**0.5, -1) @ v

    if where == "of a compiled function":
        ours = torch.compile(ours, backend="aot_eager")
    call = TRANSFORMS[transform](ours)
    if where == "compiled":
        call = torch.compile(call, backend="aot_eager")
    expected = TRANSFORMS[transform](theirs)(q)
    actual = error = None
    try:
        actual = call(q)
    except Exception as raised:
        error = raised
    if where == "eager":
        assert (error is None) == (transform in RIGHT), repr(error)
        assert isinstance(error, NotImplementedError | None), repr(error)
    if error is not None:
        assert len(str(error)) > 30  # torch.compile has sentences of its own, too
        return
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_attention_under_vmap_of_each_argument():
    """Slopes, masks, seeds and lengths too, whose values can't be looked at there."""
    q, k, v = draw()
    slopes, masks = torch.rand(3, 4), torch.randn(3, 4, 6)
    seeds = torch.arange(3)[:, None]

    def call(slopes, mask, seed):
        return attention(q, k, v, mask=mask, alibi_slopes=slopes, dropout_p=0.5, seed=seed)

    expected = torch.stack([call(*x) for x in zip(slopes, masks, seeds, strict=True)])
    assert torch.equal(torch.vmap(call)(slopes, masks, seeds), expected)
    tokens = torch.randn(6, 4, 8)
    lengths = torch.stack((cuts(0, 2, 6), cuts(0, 6, 6)))

    def packed(cu):
        return attention_varlen(tokens, tokens, tokens, cu, cu)

    assert torch.equal(torch.vmap(packed)(lengths), torch.stack([packed(x) for x in lengths]))


# ---- programs made of functions ----


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(8, 8)

    def forward(self, q, k, v):
        return sdpa(self.proj(q), k, v, is_causal=True)


class Plain(torch.nn.Module):
    def forward(self, q, k, v):
        return attention(q, k, v, causal=True)


class Packed(torch.nn.Module):
    def forward(self, q, k, v, cu_q, cu_k):
        return attention_varlen(q, k, v, cu_q, cu_k, causal=True, max_seqlen_q=16, max_seqlen_k=16)


def models():
    packed = [x[0].transpose(0, 1) for x in draw()]
    other = [x[0].transpose(0, 1) for x in draw(9, 7)]
    return {
        "sdpa": (Model(), draw(), draw(9, 7)),
        "attention": (Plain(), draw(), draw(9, 7)),
        "attention_varlen": (
            Packed(),
            [*packed, cuts(0, 1, 4), cuts(0, 3, 6)],
            [*other, cuts(0, 5, 9), cuts(0, 3, 7)],
        ),
    }


@pytest.mark.parametrize("name", models())
def test_attention_in_a_symbolic_trace(name):
    """fx keeps the call as a node."""
    model, example, _ = models()[name]
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(*example), model(*example))
    assert any("attention" in str(node.target) for node in traced.graph.nodes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", models())
def test_attention_in_a_jit_trace(name):
    """Saved and loaded too, and for other lengths than those it was traced with."""
    model, example, other = models()[name]
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, tuple(example)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert torch.equal(loaded(*example), model(*example))
    assert torch.equal(loaded(*other), model(*other))


def test_attention_in_a_jit_trace_needs_bounds():
    """Those of the example, which a trace would keep, may be too small for what comes."""
    _, example, _ = models()["attention_varlen"]
    with pytest.raises(ValueError, match=r"given in torch\.jit\.trace.*Pass upper bounds"):
        torch.jit.trace(attention_varlen, tuple(example))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", models())
def test_attention_in_a_script(name):
    """torch.jit.script reads source code, and not all of this; tracing takes its place."""
    model, _, _ = models()[name]
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace, torch\.export"):
        torch.jit.script(model)


@pytest.mark.parametrize("name", models())
def test_attention_in_an_export(name):
    model, example, _ = models()[name]
    exported = torch.export.export(model, tuple(example)).module()
    assert torch.equal(exported(*example), model(*example))


def test_public_names_are_those_tested():
    assert {"attention", "attention_varlen"} <= set(dir(ops))
