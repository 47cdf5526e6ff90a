"""``bigkernel.patch`` and linear layers of 16 bits, on a processor that multiplies none.

What the machine multiplies is given by the tests, so that they say the same on each. Feature ->
test: which layers, what is said -> replaced_*; results -> as_accurate_*, autocast_*, compile*;
models that are changed afterwards -> moved_*, adapters, tied_*, copies_*, unpatch_*; calls that
stay torch's -> calls_*, few_rows_*, left_*.
"""

import copy
import pickle

import pytest
import torch
from families import build, tokens
from test_patch import assert_as_accurate_as_eager
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import bigkernel
from bigkernel import precision
from bigkernel.integrations import activations, linears, loss, native
from bigkernel.integrations.patching import report
from bigkernel.integrations.subclass import is_swapped
from bigkernel.testing import assert_as_accurate

BF16 = torch.bfloat16
pytestmark = [
    pytest.mark.filterwarnings("ignore::bigkernel.backend.FallbackWarning"),
    pytest.mark.usefixtures("every_call"),
]


@pytest.fixture(autouse=True)
def without_products(monkeypatch):
    monkeypatch.setattr(precision, "multiplies", lambda device, dtype: False)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the weights that the op is called with."""
    seen = []
    right = linears.linear

    def linear(input, weight, bias=None):
        seen.append(tuple(weight.shape))
        return right(input, weight, bias)

    monkeypatch.setattr(linears, "linear", linear)
    return seen


def patched(model, **options):
    return bigkernel.patch(model, quiet=True, **options)


def lines_of(model):
    return [line for line in report(model).replaced if line.startswith("linear in")]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_bias_of_a_replaced_layer_goes_into_the_activation_all_the_same(
    name, calls, monkeypatch
):
    seen, right = [], activations.bias_act
    monkeypatch.setattr(activations, "bias_act", lambda *given: seen.append(1) or right(*given))
    model = patched(build(name).to(BF16))
    plain = patched(build(name).to(BF16), only=["linear"])
    loss_and_gradients(plain)
    expected = len(calls)
    calls.clear()
    loss_and_gradients(model)
    assert len(calls) == expected
    assert len(seen) >= 2


def loss_and_gradients(model, **options):
    model.zero_grad()
    out = model(input_ids=tokens(), labels=tokens(), **options)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", BF16), ("gpt2", BF16), ("bert", BF16), ("t5 gated", BF16), ("gpt2", torch.float16)],
    ids=str,
)
def test_a_model_of_16_bits_is_as_accurate_as_eager(name, dtype, calls):
    assert_as_accurate_as_eager(name, "padded", dtype)
    assert len(calls) > 8


def test_replaced_are_layers_of_16_bits_where_the_processor_multiplies_none(monkeypatch):
    assert lines_of(patched(build("llama").to(BF16))) == ["linear in 15 x Linear"]
    assert lines_of(patched(build("gpt2").half())) == [
        "linear in 8 x Conv1D",
        "linear in 1 x Linear",
    ]
    assert lines_of(patched(build("llama"))) == ["linear in 15 x Linear (under autocast)"]
    assert lines_of(patched(build("llama").double())) == []
    assert lines_of(patched(build("llama").to("meta"), only=["linear"])) == []
    monkeypatch.setattr(precision, "multiplies", lambda device, dtype: dtype == BF16)
    assert lines_of(patched(build("llama").to(BF16))) == []
    assert lines_of(patched(build("llama"))) == []
    assert lines_of(patched(build("llama").half())) == ["linear in 15 x Linear"]


def test_every_layer_calls_the_op(calls):
    model = patched(build("gpt2").to(BF16), only=["linear"])
    loss_and_gradients(model)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    shapes = [m.weight.T.shape if isinstance(m, Conv1D) else m.weight.shape for m in layers]
    assert sorted(calls) == sorted(map(tuple, shapes))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_loss_without_logits_finds_a_head_of_another_class(name, monkeypatch):
    seen = []
    right = loss.linear_cross_entropy
    monkeypatch.setattr(
        loss, "linear_cross_entropy", lambda *a, **k: seen.append(a[1].shape) or right(*a, **k)
    )
    model = patched(build(name).to(BF16))
    want, gradients = loss_and_gradients(model)
    assert seen == []
    got, without = loss_and_gradients(model, skip_logits=True)
    assert seen == [(61, 32)]
    torch.testing.assert_close(got.float(), want.float(), rtol=1e-2, atol=1e-2)
    assert without.keys() == gradients.keys()


def test_autocast_is_as_accurate_as_torchs(calls):
    """The weights stay of float32, and so do their gradients."""
    model = build("llama")
    given = {"input_ids": tokens()}
    exact = copy.deepcopy(model).double()(**given).logits
    ours = patched(copy.deepcopy(model), only=["linear"])
    with torch.autocast("cpu", BF16):
        theirs, got = model(**given).logits, ours(**given).logits
    assert got.dtype == theirs.dtype
    assert len(calls) == 15
    assert_as_accurate(got.detach(), exact.detach(), theirs.detach())
    got.float().sum().backward()
    assert ours.lm_head.weight.grad.dtype == torch.float32
    assert torch.equal(ours(**given).logits, model(**given).logits)
    assert len(calls) == 15


def test_moved_to_float32_it_is_torchs_bit_for_bit(calls):
    model = patched(build("gpt2").to(BF16), only=["linear"]).float()
    plain = build("gpt2").to(BF16).float()
    (a, x), (b, y) = map(loss_and_gradients, (model, plain))
    assert torch.equal(a, b)
    assert all(torch.equal(x[key], y[key]) for key in y)
    assert calls == []


def test_unpatch_restores_what_was_there_and_tied_weights_stay_tied(tmp_path):
    model = build("gpt2").to(BF16)
    classes = [type(m) for m in model.modules()]
    state = {key: t.clone() for key, t in model.state_dict().items()}
    printed = str(model)
    patched(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert str(model) == printed
    assert list(model.state_dict()) == list(state)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=BF16)
    assert all(torch.equal(t, state[key]) for key, t in loaded.state_dict().items())
    assert not any(map(is_swapped, loaded.modules()))
    _, gradients = loss_and_gradients(model)
    bigkernel.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    _, wanted = loss_and_gradients(model)
    key = "transformer.wte.weight"  # of both its uses
    torch.testing.assert_close(gradients[key], wanted[key], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_run_by_themselves(way, calls):
    model = patched(build("gpt2").to(BF16), only=["linear"])
    want = model(tokens()).logits
    count = len(calls)
    clone = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(clone(tokens()).logits, want)
    assert len(calls) == 2 * count
    bigkernel.unpatch(clone)
    assert not any(map(is_swapped, clone.modules()))
    assert is_swapped(model.lm_head)


class Adapter(nn.Module):
    """As PEFT's LoRA stands around a layer, in float32."""

    def __init__(self, base_layer, width, outputs):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.a, self.b = nn.Linear(width, 4, bias=False), nn.Linear(4, outputs, bias=False)

    def forward(self, x):
        y = self.base_layer(x)
        return y + self.b(self.a(x.to(self.a.weight.dtype))).to(y.dtype)


def test_adapters_stand_around_a_replaced_layer(calls):
    model = patched(build("gpt2").to(BF16).requires_grad_(False), only=["linear"])
    for block in model.transformer.h:
        torch.manual_seed(3)
        block.attn.c_attn = Adapter(block.attn.c_attn, 32, 96)
    plain = bigkernel.unpatch(copy.deepcopy(model))
    (a, x), (b, y) = (loss_and_gradients(m) for m in (model, plain))
    assert calls.count((96, 32)) == 2
    torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-2)
    assert x.keys() == y.keys()
    assert len(x) == 4
    for key in y:
        scale = y[key].abs().max()
        torch.testing.assert_close(x[key] / scale, y[key] / scale, rtol=0, atol=0.05)


def test_a_patched_model_with_pefts_lora():
    peft = pytest.importorskip("peft")
    model = patched(build("llama").to(BF16), only=["linear"])
    config = peft.LoraConfig(target_modules=["q_proj", "gate_proj"], r=4)
    wrapped = peft.get_peft_model(model, config)
    _, gradients = loss_and_gradients(wrapped)
    assert len(gradients) == 8
    merged = wrapped.merge_and_unload()
    assert is_swapped(merged.model.layers[0].self_attn.q_proj)


def test_calls_that_the_op_is_not_for_stay_torchs(calls, monkeypatch):
    layer, x = nn.Linear(8, 6, dtype=BF16), torch.randn(20, 8, dtype=BF16)
    patched(layer)
    layer(x)
    assert len(calls) == 1
    for other, given in ((layer, x.float()), (patched(nn.Linear(8, 6)), x)):
        with pytest.raises(RuntimeError, match="dtype"):
            other(given)

    class Labelled(torch.Tensor):
        pass

    assert type(layer(x.as_subclass(Labelled))) is Labelled
    assert layer(input=x).shape == (20, 6)
    assert len(calls) == 2
    torch.func.grad(lambda x: layer(x).float().sum())(x)
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == (20, 6)
    monkeypatch.setitem(native.SMALLEST, "linear", 20 * 8 * 6 + 1)
    layer(x)
    assert len(calls) == 2
    monkeypatch.setattr(precision, "multiplies", lambda device, dtype: True)
    monkeypatch.setitem(native.SMALLEST, "linear", 0)
    layer(x)
    assert len(calls) == 2


def test_few_rows_are_torchs_where_nothing_is_learned(calls):
    layer, x = patched(nn.Linear(8, 6, dtype=BF16)), torch.randn(3, 8, dtype=BF16)
    with torch.no_grad():
        layer(x)
        assert calls == []
        layer(x.repeat(8, 1))
        assert len(calls) == 1
    layer(x)
    assert len(calls) == 2


def test_hooks_fire(calls):
    layer, seen = patched(nn.Linear(8, 6, dtype=BF16)), []
    layer.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    layer.register_full_backward_hook(lambda module, given, out: seen.append("backward"))
    layer(torch.randn(20, 8, dtype=BF16, requires_grad=True)).sum().backward()
    assert seen == [(20, 6), "backward"]
    assert len(calls) == 1


def test_left_are_layers_that_depend_on_their_class():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).to(BF16)
    parametrizations.weight_norm(model[0])  # of another class by now
    model[1].forward = lambda x: x
    patched(model)
    assert [is_swapped(m) for m in model] == [False, False, True]
    (line,) = report(model).left
    assert line.startswith("linear in 1 x Linear: something else has replaced its forward")


def test_it_compiles_whole():
    torch._dynamo.reset()
    model = patched(build("llama").to(BF16))
    want, gradients = loss_and_gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    got = compiled(input_ids=tokens(), labels=tokens()).loss
    got.backward()
    torch.testing.assert_close(got.float(), want.float(), rtol=1e-2, atol=1e-2)
    for name, p in model.named_parameters():
        scale = gradients[name].abs().max()
        torch.testing.assert_close(p.grad / scale, gradients[name] / scale, rtol=0, atol=0.1)
