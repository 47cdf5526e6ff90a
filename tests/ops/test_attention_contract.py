"""What holds for attention as an op: opcheck, compile, gradcheck, autocast, determinism, memory."""

import subprocess
import sys

import attention_cases
import pytest
import torch
import torch._dynamo.testing
from attention_cases import SEED, device_of, threads
from test_attention_packed import cumulative

import bigkernel
from bigkernel import ops
from bigkernel.ops.attention import blocks as attention_blocks
from bigkernel.ops.attention.reference import TENSORS, Params, Rule, attention_reference
from bigkernel.testing.tolerance import assert_as_accurate

backend = attention_cases.backend


def namespace(backend):
    return torch.ops.bigkernel_torch if "torch" in backend else torch.ops.bigkernel


def everything(device="cpu", dtype=torch.float32, packed=False, batch=2, rows=9, keys=13):
    """Arguments of the op attention_fwd with every option on."""
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape).to(device, dtype).requires_grad_()

    slopes = torch.rand(batch, 4, device=device)
    seed = torch.tensor([SEED], device=device)
    scalars = (0.3, True, True, 8, 2, 1.5, 0.2)
    if packed:
        cu_q, cu_k = (cumulative([n] * batch, device) for n in (rows, keys))
        q, k, v = leaf(batch * rows, 4, 8), leaf(batch * keys, 2, 8), leaf(batch * keys, 2, 8)
        return (q, k, v, leaf(1, 4, rows, keys), slopes, seed, cu_q, cu_k, rows, keys, *scalars)
    q = leaf(batch, rows, 4, 8).detach().transpose(1, 2).requires_grad_()
    k, v = leaf(batch, 2, keys, 8), leaf(batch, 2, keys, 8)
    mask = leaf(batch, 1, rows, keys)
    return (q, k, v, mask, slopes, seed, None, None, rows, keys, *scalars)


def test_attention_params_are_those_of_the_schema():
    """By name and in order, forward and backward; the tensors first."""
    names = [*Params._fields[:-1], *Rule._fields]
    for op, before, after in (("attention_fwd", 3, 0), ("attention_bwd", 7, 1)):
        arguments = getattr(torch.ops.bigkernel, op).default._schema.arguments
        assert [a.name for a in arguments][before : len(arguments) - after] == names
        kinds = [str(a.type) for a in arguments[before:]]
        assert kinds[:TENSORS] == ["Optional[Tensor]"] * TENSORS
        assert not any("Tensor" in kind for kind in kinds[TENSORS:])
    assert Params.of(range(len(names))).arguments == tuple(range(len(names)))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_attention_opcheck(backend, packed):
    """All four of opcheck's tests: schema, autograd, fake tensors, AOT dispatch."""
    device = device_of(backend)
    forward = namespace(backend).attention_fwd.default
    args = everything(device, packed=packed)
    torch.library.opcheck(forward, args)
    params = Params.of(args[3:])
    rule = params.rule._replace(dropout_p=0.0)
    plain = params._replace(mask=None, alibi_slopes=None, seed=None, rule=rule).arguments
    torch.library.opcheck(forward, (*(x.detach() for x in args[:3]), *plain))

    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    out, lse = forward(*args)
    q, k, v, *rest = args
    backward = namespace(backend).attention_bwd.default
    for dlse, needs_dmask in ((None, False), (torch.ones_like(lse[..., 0]), True)):
        given = (torch.ones_like(out), dlse, q, k, v, out, lse, *rest, needs_dmask)
        torch.library.opcheck(backward, given)


def model(q, k, v, mask, slopes):
    """Everything public in one traced function, dropout's own seed included."""
    dense = ops.attention(
        q, k, v, mask=mask, causal=True, align="bottom_right", window=(20, None), softcap=3.0,
        alibi_slopes=slopes,
    )  # fmt: skip
    causal = bigkernel.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    packed, lse = ops.attention_varlen(
        *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)),
        torch.arange(0, q.shape[0] + 1, dtype=torch.int32) * q.shape[2],
        torch.arange(0, q.shape[0] + 1, dtype=torch.int32) * k.shape[2],
        return_lse=True,
    )
    return dense, causal, packed, lse


# aot_eager traces forward and backward as inductor does, without waiting for its C++ compiler.
def test_attention_compile(backend):
    device = device_of(backend)
    torch._dynamo.reset()
    args = everything(device)[:5]
    leaves = args[:4]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*args), model(*args), strict=True):
        torch.testing.assert_close(actual, expected)
        dout = torch.randn_like(expected)
        results = [
            torch.autograd.grad(x, leaves, dout, retain_graph=True, allow_unused=True)
            for x in (actual, expected)
        ]
        for leaf, a, e in zip(leaves, *results, strict=True):
            # Where a result does not depend on a leaf, one of the two may say so with None.
            a, e = (torch.zeros_like(leaf) if x is None else x for x in (a, e))
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def test_attention_compile_dynamic(backend):
    """Lengths after the second compile nothing more."""
    device = device_of(backend)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: ops.attention(q, k, v, causal=True), fullgraph=True, backend=counter,
        dynamic=True,
    )  # fmt: skip
    for length in (5, 9, 13, 21):
        q, k, v = (torch.randn(2, 4, length, 8, device=device) for _ in range(3))
        torch.testing.assert_close(compiled(q, k, v), ops.attention(q, k, v, causal=True))
    assert counter.frame_count <= 2


def test_attention_compile_dropout():
    """The seed is drawn inside the compiled function, anew for each call."""
    torch._dynamo.reset()
    compiled = torch.compile(
        bigkernel.scaled_dot_product_attention, fullgraph=True, backend="aot_eager"
    )
    with bigkernel.use_backend("torch"), threads(1):
        q, k, v = (torch.randn(2, 4, 12, 8, requires_grad=True) for _ in range(3))
        torch.manual_seed(0)
        first, second = (compiled(q, k, v, dropout_p=0.5) for _ in range(2))
        torch.manual_seed(0)
        again = compiled(q, k, v, dropout_p=0.5)
        grads = torch.autograd.grad(first.sum(), (q, k, v))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert all(grad.isfinite().all() for grad in grads)


GRADCHECK = {
    "plain": {},
    "causal_window": {"causal": True, "bottom_right": True, "window_left": 2},
    "softcap": {"softcap": 0.7},
    "dropout": {"dropout_p": 0.4},
    "everything": {
        "causal": True,
        "bottom_right": True,
        "window_left": 3,
        "softcap": 0.9,
        "dropout_p": 0.3,
    },
}


def gradcheck(function, rule, masked, packed):
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    options = {"alibi_slopes": torch.rand(2, 4), "seed": torch.tensor([SEED])}
    if packed:
        options |= {"cu_seqlens_q": cumulative([3, 2]), "cu_seqlens_k": cumulative([2, 4])}
        inputs = (leaf(5, 4, 3), leaf(6, 2, 3), leaf(6, 2, 2))
    else:
        inputs = (leaf(2, 4, 3, 3), leaf(2, 2, 5, 3), leaf(2, 2, 5, 2))
    if masked:
        inputs = (*inputs, leaf(1, 4, 3, 1))

    def call(q, k, v, mask=None):
        out, lse = function(q, k, v, rule, mask=mask, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    with threads(1):  # thousands of tiny calls
        return torch.autograd.gradcheck(call, inputs, fast_mode=True)


def torch_backend(q, k, v, rule, *, mask=None, alibi_slopes=None, seed=None, **cu_seqlens):
    cu_q, cu_k = cu_seqlens.get("cu_seqlens_q"), cu_seqlens.get("cu_seqlens_k")
    out, lse = torch.ops.bigkernel_torch.attention_fwd(
        q, k, v, mask, alibi_slopes, seed, cu_q, cu_k, 99, 99, *rule
    )
    return out, lse.sum(-1)


@pytest.mark.parametrize("kind", ["dense", "masked", "packed"])
@pytest.mark.parametrize("feature", GRADCHECK)
def test_attention_gradcheck_reference(feature, kind):
    """The definition's gradient against finite differences in float64."""
    rule = Rule(0.6, **GRADCHECK[feature])
    assert gradcheck(attention_reference, rule, kind == "masked", kind == "packed")


@pytest.mark.parametrize("kind", ["dense", "masked", "packed"])
@pytest.mark.parametrize("feature", GRADCHECK)
def test_attention_gradcheck_torch_backend(feature, kind, monkeypatch):
    """The blockwise backward pass, written by hand, in blocks of one row."""
    monkeypatch.setitem(attention_blocks.SCORE_BUDGET, "cpu", 8)
    monkeypatch.setattr(attention_blocks, "FEWEST_ROWS", 1)
    rule = Rule(0.6, **GRADCHECK[feature])
    assert gradcheck(torch_backend, rule, kind == "masked", kind == "packed")


@pytest.mark.parametrize("budget", [1, 100, 1000, 30000])
def test_attention_torch_backend_in_blocks(budget, monkeypatch):
    """Any block size gives the same, also where blocks of a window see no key."""
    monkeypatch.setitem(attention_blocks.SCORE_BUDGET, "cpu", budget)
    monkeypatch.setattr(attention_blocks, "FEWEST_ROWS", 1)
    with bigkernel.use_backend("torch"), threads(1):
        for case in (
            attention_cases.Case(lengths=(40, 9), causal="bottom_right", mask="float:B1QK"),
            attention_cases.Case(lengths=(150, 20), window=(3, 2), mask="float:1HQ1", dropout=0.3),
            attention_cases.Case(lengths=(20, 150), window=(3, 2), align="bottom_right"),
            attention_cases.Case(batch=3, alibi="BH", mask="float:BH1K", dropout=0.2, softcap=1.0),
        ):
            attention_cases.compare(case)


def test_attention_reference_is_torchs_attention():
    """The definition itself, against torch's in float64, mask and gradients included."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (7, 9, 9))
    mask = torch.randn(3, 7, 9, dtype=torch.float64, requires_grad=True)
    out, lse = attention_reference(q, k, v, Rule(8**-0.5), mask=mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected)
    scores = q @ k.transpose(-1, -2) * 8**-0.5 + mask
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())
    leaves = (q, k, v, mask)
    for a, e in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


def test_attention_second_derivative_is_refused(backend):
    q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    q, k, v = (x.to(device_of(backend)) for x in (q, k, v))
    (grad,) = torch.autograd.grad(ops.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_reference"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_autocast(backend, dtype):
    """As torch's own: inputs are cast, the result is of autocast's dtype, sums stay float32."""
    device = device_of(backend)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 33, 16, device=device) for _ in range(3))
    mask = torch.randn(33, 33, device=device)
    with torch.autocast(device, dtype=dtype):
        out = bigkernel.scaled_dot_product_attention(q, k.to(dtype), v, attn_mask=mask)
        mixed, lse = ops.attention(q, k, v.to(dtype), mask=mask, return_lse=True)
        cu = cumulative([33], device)
        packed = ops.attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), cu, cu)
    low = [x.to(dtype) for x in (q, k, v)]
    expected = ops.attention(*low, mask=mask.to(dtype))
    assert out.dtype == mixed.dtype == packed.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, expected)
    assert torch.equal(mixed, expected)
    exact, _ = attention_reference(
        *(x.double() for x in low), Rule(0.25), mask=mask.to(dtype).double()
    )
    same = torch.nn.functional.scaled_dot_product_attention(*low, attn_mask=mask.to(dtype))
    assert_as_accurate(out.cpu(), exact.cpu(), same.cpu())


def forward_backward(args, ops_namespace):
    out, lse = ops_namespace.attention_fwd(*args)
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    return [out, lse, *torch.autograd.grad((out, lse), leaves, (out.detach(), lse.detach()))]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", attention_cases.DTYPES)
def test_attention_is_deterministic(backend, dtype, packed):
    """The same bits at each run; from the kernels, with any number of threads, too."""
    args = everything(
        device_of(backend), attention_cases.DTYPES[dtype], packed, batch=3, rows=150, keys=190
    )
    first = forward_backward(args, namespace(backend))
    for count in (1, 1) if "torch" in backend else (1, 2, 3, 5):
        with threads(count):
            for a, e in zip(forward_backward(args, namespace(backend)), first, strict=True):
                assert torch.equal(a, e)


def test_attention_with_several_threads(backend):
    """The cases that the rest of the suite runs on one thread, here on several."""
    device = device_of(backend)
    with threads(3):
        for keywords in (
            {"lengths": (200, 300), "causal": "bottom_right", "dropout": 0.1, "batch": 3},
            {"lengths": (65, 130), "mask": "float:1H1K", "alibi": "BH", "dlse": True},
            {"lengths": (1, 500), "heads": (8, 2), "dtype": "bf16", "mask": "bool:B11K"},
        ):
            attention_cases.compare(attention_cases.Case(**keywords), device)


MEMORY = """
import resource, sys, torch, bigkernel
from bigkernel import ops
from bigkernel.ops.attention import blocks as attention_blocks
attention_blocks.SCORE_BUDGET["cpu"] = 1 << 18
torch.set_num_threads(2)
bigkernel.use_backend(sys.argv[1] if sys.argv[1] == "torch" else None)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def run(length):
    q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    mask = torch.zeros(length, requires_grad=True)
    # Philox in plain PyTorch takes its time; its words live as long as a block of scores does.
    p = 0.0 if sys.argv[1] == "torch" else 0.1
    out = ops.attention(q, k, v, mask=mask, window=(None, length // 2), dropout_p=p, seed=1)
    out.sum().backward()
run(512)
before = peak()
run(int(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["torch", "cpu"])
def test_attention_memory_is_linear(kind):
    """Forward and backward at 4096 x 4096, one head: a score matrix alone would take 64 MiB."""
    if kind == "cpu" and not bigkernel.cpu_isas():
        pytest.skip("the native library is not built")
    command = [sys.executable, "-c", MEMORY, kind, "4096"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    grown = int(result.stdout)
    # Inputs and results are 2 MiB; the blocks of scores that the torch backend holds, 1 MiB each.
    assert grown < 36 * 2**20


LONG = """
import resource, torch
from bigkernel import scaled_dot_product_attention as attend
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def run(length):
    q, k, v = (torch.randn(1, 8, length, 64).bfloat16().requires_grad_() for _ in range(3))
    dout = torch.randn(1, 8, length, 64).bfloat16()
    before = peak()
    attend(q, k, v, is_causal=True).backward(dout)
    return peak() - before
run(64)
print(run(16384))
"""


@pytest.mark.skipif(not bigkernel.cpu_isas(), reason="the native library is not built")
def test_attention_long_sequences_fit():
    """Forward and backward at 16384 x 16384, 8 heads, whose scores would take 8 GiB in fp32."""
    command = [sys.executable, "-c", LONG]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(result.stdout) < 2**30
