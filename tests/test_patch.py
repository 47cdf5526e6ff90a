"""``bigkernel.patch``: every op that it puts into a model, beside what stood there.

Feature list: LLaMA, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3, Phi, GPT-2, GPT-NeoX, BERT, RoBERTa,
ModernBERT, ViT, T5 (plain and gated), CLIP; no padding, padded left and right, packed; logits and
gradients in float32 and bfloat16; what is replaced, kept, left; undoing it; copies, pickles, hooks,
saved files; torch.compile, gradient checkpointing; losses; calls that no kernel is for; modules
that only look like those that are known; the Trainer's switches and losses. Linear
layers: test_linears.py.
"""

import copy
import functools
import pickle

import pytest
import torch
import transformers
from families import VOCAB, Rows, build, clip, collate, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.models.cohere import modeling_cohere
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

import bigkernel
from bigkernel.integrations import activations, loss, native, norms, rotary
from bigkernel.integrations.patching import NAMES, report
from bigkernel.integrations.subclass import is_swapped
from bigkernel.ops.norm import reference
from bigkernel.testing.tolerance import assert_as_accurate

# What is replaced in each, with counts of modules for two layers.
LOSSES = ", cross_entropy 1, linear_cross_entropy 1"
FAMILIES = {
    "llama": "attention 2, rms_norm 5, residual 2, rope 2, projections 2, glu 2, projections 2"
    + LOSSES,
    "mistral": "attention 2, rms_norm 5, residual 2, rope 2, projections 2, glu 2, projections 2"
    + LOSSES,
    "qwen2": "attention 2, rms_norm 5, residual 2, rope 2, projections 2, glu 2, projections 2"
    + LOSSES,
    "qwen3": "attention 2, rms_norm 9, residual 2, rope 2, projections 2, glu 2, projections 2"
    + LOSSES,
    "gemma2": "attention 2, rms_norm 9, residual 2, rope 2, projections 2, glu 2, projections 2"
    + LOSSES,
    "gemma3": "attention 2, rms_norm 13, residual 2, rope 2, projections 2, glu 2, projections 2"
    + LOSSES,
    "phi": "attention 2, gelu 2, rope 2, projections 2, bias_act 2" + LOSSES,
    "gpt2": "attention 2, gelu 2, bias_act 2" + LOSSES,
    "gpt_neox": "attention 2, residual 2, rope 2, bias_act 2" + LOSSES,
    "bert": "attention 2, residual 1, projections 2, residual 2, bias_act 2, residual 2, "
    "bias_act 1, linear_cross_entropy 1",
    "roberta": "attention 2, residual 1, projections 2, residual 2, bias_act 2, residual 2, "
    "linear_cross_entropy 1",
    "modernbert": "attention 2, residual 2, rope 2, glu 2, bias_act 1" + LOSSES,
    "vit": "attention 2, residual 2, projections 2, bias_act 2",
    "t5": "attention 6, rms_norm 12, projections 6, linear_cross_entropy 1",
    "t5 gated": "attention 6, rms_norm 12, gelu 4, projections 6, glu 4, projections 4, "
    "linear_cross_entropy 1",
    "clip": "attention 2, residual 2, projections 2, bias_act 2",
}
QUICK = ["llama", "gemma2", "gpt2", "bert", "modernbert", "t5 gated"]
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "gpt2", "gpt_neox"]


pytestmark = [
    pytest.mark.filterwarnings("ignore::bigkernel.backend.FallbackWarning"),
    pytest.mark.usefixtures("every_call", "with_products"),
]


def patched(model, **options):
    return bigkernel.patch(model, quiet=True, **options)


def inputs_of(name, case):
    """Inputs, and where the outputs mean something."""
    if name == "vit":
        return {"pixel_values": torch.rand(3, 1, 8, 8)}, None
    if name == "clip":
        size = clip().vision_config.image_size
        ids = tokens(3)
        ids[:, -1] = 2
        return {"input_ids": ids, "pixel_values": torch.rand(3, 3, size, size)}, None
    ids, mask = tokens(3), torch.ones(3, 11, dtype=torch.long)
    if case == "packed":
        at = torch.tensor([[*range(5), *range(6)], [*range(11)], [0, *range(7), *range(3)]])
        return {"input_ids": ids, "position_ids": at, "use_cache": False}, None
    if case == "padded":
        mask[0, :4], mask[1, 7:] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask}
    if name.startswith("t5"):
        given["decoder_input_ids"] = tokens(3, 5, 1)
        return given, None
    return given, mask.bool()


def run(model, name, case, autocast=False):
    """Outputs and the gradients of all parameters."""
    torch.manual_seed(1)
    given, real = inputs_of(name, case)
    dtype = next(model.parameters()).dtype
    given = {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in given.items()
    }
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made = model(**given)
    out = made.text_embeds if name == "clip" else made.logits
    if name == "clip":
        out = torch.cat([out, made.image_embeds])
    out = out if real is None else out[real]
    (out * torch.randn(out.shape).to(out.dtype)).sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients


def exact_norm(module, x):
    """What a norm computes, in float64; its own forward rounds to float32 on the way.

    How it does so is not asked of what is tested here, which would then agree with itself.
    """
    eps = next(name for name in ("variance_epsilon", "eps") if hasattr(module, name))
    bias = getattr(module, "bias", None)
    return reference.norm_fwd(
        x.double(),
        None,
        module.weight.double(),
        None if bias is None else bias.double(),
        getattr(module, eps),
        1.0 if "Gemma" in type(module).__name__ else 0.0,
        isinstance(module, nn.LayerNorm),
        False,
    )[0]


def with_exact_norms(model):
    for module in model.modules():
        if norms.form_of(module) is not None:
            module.forward = functools.partial(exact_norm, module)
    return model


def assert_as_accurate_as_eager(name, case, dtype, autocast=False):
    """Outputs, and gradients, each in the scale of its largest, to the rule of accuracy."""
    model = build(name).to(dtype)
    # transformers' eager attention rounds to float32 too, and gives NaN in float64 with padding.
    exact = patched(with_exact_norms(copy.deepcopy(model).double()), only=["attention"])
    theirs, ours = copy.deepcopy(model), patched(model)
    theirs.set_attn_implementation("eager")
    wanted = run(exact, name, case)
    expected, got = (run(m, name, case, autocast) for m in (theirs, ours))
    assert_as_accurate(got[0], wanted[0], expected[0])
    assert got[1].keys() == wanted[1].keys() == expected[1].keys()
    # Some are zero but for rounding, those of the biases of keys: in a scale of their own they
    # would hide the errors of all others.
    least = 1e-2 * max(float(g.abs().max()) for g in wanted[1].values())
    scales = {key: g.abs().max().clamp(min=least) for key, g in wanted[1].items()}
    flat = [
        torch.cat([(g.double() / scales[key]).flatten() for key, g in gradients.items()])
        for _, gradients in (got, wanted, expected)
    ]
    assert_as_accurate(flat[0].to(dtype), flat[1], flat[2].to(dtype))


@pytest.mark.parametrize("name", QUICK)
def test_outputs_and_gradients_are_as_accurate_as_eagers(name):
    assert_as_accurate_as_eager(name, "padded", torch.float32)


@pytest.mark.parametrize("name", ["llama", "gemma2", "modernbert"])
def test_outputs_and_gradients_are_as_accurate_as_eagers_in_bf16(name):
    assert_as_accurate_as_eager(name, "padded", torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "phi", "bert", "t5 gated"])
def test_outputs_and_gradients_are_as_accurate_as_eagers_under_autocast(name):
    assert_as_accurate_as_eager(name, "padded", torch.float32, autocast=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_as_accurate_as_eager_under_autocast(name):
    assert_as_accurate_as_eager(name, "padded", torch.float32, autocast=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", ["plain", "padded", "packed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_as_accurate_as_eager(name, case, dtype):
    if case == "packed" and name not in DECODERS:
        pytest.skip("transformers' eager attention does not keep its packed documents apart")
    assert_as_accurate_as_eager(name, case, dtype)


# What is said


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_replaced_in_a_family(name):
    model = patched(build(name), strict=True)
    told = report(model)
    found = [line.split(" in ", 1) for line in told.replaced]
    assert ", ".join(f"{op} {rest.split(' ')[0]}" for op, rest in found) == FAMILIES[name]
    assert told.left == []


def test_lines_say_what_runs_what_stays_and_why(capsys):
    bigkernel.patch(build("gemma2"))
    out = capsys.readouterr().out
    assert "replaced residual in 2 x Gemma2DecoderLayer (and pre_feedforward_layernorm)" in out
    assert "replaced glu in 2 x Gemma2MLP (gelu_tanh)" in out
    bigkernel.patch(build("bert"))
    out = capsys.readouterr().out
    assert "kept layer_norm in 6 x LayerNorm: torch's kernel is as fast" in out
    assert "kept cross_entropy in 1 x BertForMaskedLM: its forward calls torch's" in out
    bigkernel.patch(build("llama").double())
    out = capsys.readouterr().out
    assert "left rms_norm in 5 x LlamaRMSNorm: float64 has no native kernel" in out
    assert "left rope in 2 x LlamaAttention: float64 has no native kernel" in out


def test_strict_names_what_would_be_left_and_leaves_everything():
    model = build("bloom")
    with pytest.raises(RuntimeError, match=r"left: attention in 2 x BloomAttention: its attention"):
        bigkernel.patch(model, strict=True)
    assert not vars(model).keys() & {"_loss_function", "_bigkernel_patched"}
    assert not any(map(is_swapped, model.modules()))
    with pytest.raises(RuntimeError, match="nothing to replace"):
        bigkernel.patch(nn.Linear(2, 2), strict=True)
    patched(model, strict=True, only=["cross_entropy"])


def test_only_what_is_named_is_replaced():
    model = build("llama")
    for name in NAMES:
        patched(model, only=[name])
        told = {line.split(" ")[0].replace("rms_norm", "norm") for line in report(model).replaced}
        assert told == ({name} if name not in ("gelu", "linear") else set())
    with pytest.raises(ValueError, match=r"only must be some of attention, norm, .*, got norms"):
        bigkernel.patch(model, only=["norms"])
    with pytest.raises(TypeError, match=r"patch: model must be a torch\.nn\.Module, got int\."):
        bigkernel.patch(3)


# Back again, and what a patched model still is


@pytest.mark.parametrize("name", QUICK)
def test_unpatch_restores_bit_for_bit(name):
    model = build(name)
    classes = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    before = run(model, name, "padded")
    patched(model)
    assert [type(m) for m in model.modules()] != classes
    bigkernel.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    after = run(model, name, "padded")
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[1][key], g) for key, g in before[1].items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5 gated"])
def test_a_patched_model_saves_as_before(name, tmp_path):
    model = build(name)
    printed, state = str(model), {key: t.clone() for key, t in model.state_dict().items()}
    owned = list(model.parameters())
    patched(model)
    assert str(model) == printed
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), owned, strict=True))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not any(map(is_swapped, loaded.modules()))
    assert loaded.config.architectures == [type(model).__name__]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "copy"])
def test_copies_and_pickles_run_by_themselves(way):
    model = patched(build("llama"))
    expected = model(tokens()).logits
    if way == "copy":
        # As DataParallel copies a module for each device.
        norm = model.model.norm
        other = copy.copy(norm)
        other._parameters = {"weight": nn.Parameter(norm.weight * 2)}
        x = torch.randn(3, 32)
        assert torch.equal(other(x), norm(x) * 2)
        return
    clone = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(clone(tokens()).logits, expected)
    with torch.no_grad():
        clone.model.norm.weight.mul_(3)
    assert torch.equal(model(tokens()).logits, expected)
    assert not torch.equal(clone(tokens()).logits, expected)
    bigkernel.unpatch(clone)
    assert not any(map(is_swapped, clone.modules()))
    assert is_swapped(model.model.norm)


def test_hooks_on_every_module_still_fire():
    model = patched(build("llama"))
    expected = model(tokens()).logits
    called = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    theirs = model(tokens()).logits
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    silent = {name for name, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    assert silent - called == set()


def test_hidden_states_are_those_of_the_layers():
    model = build("llama")
    expected = model(tokens(), output_hidden_states=True).hidden_states
    actual = patched(model)(tokens(), output_hidden_states=True).hidden_states
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_runs_each_layer_again():
    model = patched(build("llama")).train()
    _, expected = run(model, "llama", "padded")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    _, actual = run(model, "llama", "padded")
    assert len(calls) == 2
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ops", [False, True], ids=["as it chooses", "with every op"])
@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_a_patched_model_compiles_whole(name, ops, monkeypatch):
    if ops:
        monkeypatch.setattr(native, "COMPILED", frozenset(native.SMALLEST))
    model = patched(build(name))
    expected, gradients = run(model, name, "padded")
    seen = set()

    def backend(graph, inputs):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    given, real = inputs_of(name, "padded")
    torch.manual_seed(1)
    model.zero_grad()
    actual = compiled(**given).logits[real]
    for op, function in (("rms_norm", "norm_fwd"), ("rope", "rope_fwd"), ("glu", "glu_fwd")):
        assert any(function in target for target in seen) == (op in native.COMPILED), op
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    (actual * torch.randn(actual.shape)).sum().backward()
    for key, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            model.get_parameter(key).grad, gradient, atol=1e-5 * scale, rtol=1e-4
        )


# Losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 3},
        {"shift_labels": True},
    ],
    ids=["mean", "items", "items as tensor", "ignore_index", "shift_labels"],
)
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(ForCausalLMLoss, loss.causal_lm_loss), (ForMaskedLMLoss, loss.masked_lm_loss)],
)
def test_losses_are_those_of_transformers(theirs, ours, options, dtype):
    labels = tokens(3, 9, seed=2)
    labels[1, 2:5] = -100 if "ignore_index" not in options else 3
    options = dict(options)
    if options.get("shift_labels"):
        options["shift_labels"] = labels.roll(1, -1)
    logits = (4 * torch.randn(3, 9, VOCAB)).to(dtype)
    wide = logits.double().requires_grad_()
    if "shift_labels" in options and theirs is ForCausalLMLoss:
        target = options["shift_labels"]
    else:
        target = (
            labels
            if theirs is ForMaskedLMLoss
            else nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        )
    ignored = options.get("ignore_index", -100)
    target = target.masked_fill(target == -100, ignored)
    exact = nn.functional.cross_entropy(
        wide.view(-1, VOCAB), target.reshape(-1), ignore_index=ignored, reduction="sum"
    )
    exact = exact / options.get("num_items_in_batch", (target != ignored).sum())
    exact.backward()
    results = []
    for function in (ours, theirs):
        given = logits.clone().requires_grad_()
        value = function(given, labels, VOCAB, **options)
        value.backward()
        results.append((value.detach(), given.grad))
    (value, gradient), (_, their_gradient) = results
    assert value.dtype == torch.float32
    assert_as_accurate(gradient, wide.grad, their_gradient)
    torch.testing.assert_close(value.double(), exact.detach(), atol=0, rtol=3e-7)


def test_losses_that_have_no_kernel_are_transformers_own():
    labels = tokens(2, 5)
    logits = torch.randn(2, 5, VOCAB, dtype=torch.float64)
    assert torch.equal(
        loss.causal_lm_loss(logits, labels, VOCAB), ForCausalLMLoss(logits, labels, VOCAB)
    )
    logits = logits.float().requires_grad_()
    ignored = torch.full((2, 5), -100)
    assert loss.causal_lm_loss(logits, ignored, VOCAB).isnan()
    assert loss.causal_lm_loss(logits, ignored, VOCAB, num_items_in_batch=3) == 0


def test_logits_that_are_used_after_backward_are_still_there():
    model = patched(build("llama"))
    out = model(tokens(), labels=tokens())
    before = out.logits.clone()
    out.loss.backward()
    assert torch.equal(out.logits, before)


def test_a_loss_function_of_the_users_own_stays():
    def own(logits, labels, vocab_size, **kwargs):
        return logits.mean()

    model = build("llama")
    model.loss_function = own
    patched(model)
    assert model.loss_function is own
    assert bigkernel.unpatch(model).loss_function is own
    # And one that was chosen over ours.
    model = patched(build("llama"))
    model.loss_function = own
    assert bigkernel.unpatch(model).loss_function is own


# Calls that no kernel is for


def calls_of(monkeypatch, module, name):
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or function(*a, **k))
    return calls


def test_another_dtype_runs_what_was_there(monkeypatch):
    model = build("llama")
    expected = copy.deepcopy(model).double()
    expected.set_attn_implementation("bigkernel_compact")
    calls = calls_of(monkeypatch, norms, "rms_norm") + calls_of(monkeypatch, rotary, "rope")
    patched(model).double()
    actual = model(tokens(), labels=tokens())
    wanted = expected(tokens(), labels=tokens())
    assert torch.equal(actual.logits, wanted.logits)
    assert torch.equal(actual.loss, wanted.loss)
    assert calls == []


def test_shapes_only_run_what_was_there():
    model = patched(build("llama"), only=[name for name in NAMES if name != "attention"])
    assert model.to("meta")(tokens().to("meta")).logits.shape == (2, 11, VOCAB)


def test_a_tensor_subclass_runs_what_was_there(monkeypatch):
    class Noted(Tensor):
        pass

    calls = calls_of(monkeypatch, norms, "rms_norm")
    norm = build("llama").model.norm
    expected = norm(torch.ones(2, 32))
    patched(norm)
    assert torch.equal(norm(torch.ones(2, 32).as_subclass(Noted)), expected)
    assert calls == []
    norm(torch.ones(2, 32))
    assert calls == ["rms_norm"]


@pytest.mark.parametrize("a", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("b", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "bert"])
def test_a_sum_of_two_dtypes_is_normalised_as_before(name, a, b, weight):
    module = next(m for m in build(name).modules() if norms.form_of(m) is not None).to(weight)
    with torch.no_grad():
        module.weight.normal_(1)
    x, y = torch.randn(2, 5, 32).to(a), torch.randn(2, 5, 32).to(b)
    total = x + y
    try:
        expected = module(total)
    except RuntimeError:  # torch's layer norm does not take all of these
        return
    exact = exact_norm(module, total)
    patched(module, only=["norm", "residual"])
    got_total, got = norms.add_norm(module, x, y)
    assert torch.equal(got_total, total)
    assert got.dtype == expected.dtype == module(total).dtype
    assert_as_accurate(got, exact, expected)


def test_small_calls_are_left_to_torch(monkeypatch):
    monkeypatch.setitem(native.SMALLEST, "glu", 1000)
    calls = calls_of(monkeypatch, activations, "glu")
    mlp = patched(build("llama").model.layers[0].mlp)
    mlp(torch.randn(1, 2, 32))
    assert calls == []
    mlp(torch.randn(1, 30, 32))
    assert calls == ["glu"]
    monkeypatch.setitem(native.SMALLEST, "glu", 10**9)
    with bigkernel.use_backend("cpu"):
        mlp(torch.randn(1, 2, 32))
    assert calls == ["glu"] * 2


def test_rotary_tables_of_another_dtype_keep_the_results_dtype():
    """q * cos is float32 where cos is, and rounding it would lose what the model asked for."""
    function = rotary.in_place_of(modeling_llama.apply_rotary_pos_emb)
    q, k = torch.randn(2, 1, 2, 5, 8, dtype=torch.bfloat16)
    cos, sin = torch.randn(2, 1, 5, 8)
    assert function(q, k, cos, sin)[0].dtype == torch.float32
    assert function(q, k, cos.bfloat16(), sin.bfloat16())[0].dtype == torch.bfloat16


# Modules that only look like those that are known


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.variance_epsilon = 1e-6


class OutsideNorm(Norm):
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states / (torch.sqrt(variance) + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class RenamedNorm(Norm):
    def forward(self, x):
        """LLaMA's, in other words."""
        kind = x.dtype
        x = x.to(torch.float32)
        v = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(v + self.variance_epsilon)
        return self.weight * x.to(kind)


def test_a_norm_is_known_by_what_it_computes():
    model = nn.ModuleList([OutsideNorm(), RenamedNorm()])
    patched(model)
    assert report(model).left == ["norm in 1 x OutsideNorm: its forward is none that is known"]
    assert report(model).replaced == ["rms_norm in 1 x RenamedNorm"]


class Block(nn.Module):
    """A layer of a user's own."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up = RenamedNorm(), nn.Linear(8, 8), nn.Linear(8, 8)
        self.act = nn.SiLU()

    def forward(self, x, y):
        x = x + y
        residual = x
        x = self.norm(x)
        return residual + self.act(self.gate(x)) * self.up(x)


class Perhaps(Block):
    def forward(self, x, y):
        x = x + y
        x = self.norm(x) if y.sum() > 0 else x
        return self.up(x) * self.act(x)


class Overwritten(Block):
    def forward(self, x, y):
        gate = self.act(x)
        gate = self.up(y)
        x = gate * x
        return x


class Between(Block):
    def forward(self, x, y):
        x = x + y
        x = 2 * x
        return self.norm(x)


def test_layers_of_a_users_own_are_rewritten_where_that_is_safe(monkeypatch):
    calls = calls_of(monkeypatch, activations, "glu")
    for kind, lines in (
        (
            Block,
            [
                "residual in 1 x Block (and norm)",
                "glu in 1 x Block (silu)",
                "projections in 1 x Block (gate and up)",
            ],
        ),
        (Perhaps, []),
        (Between, []),
        (Overwritten, []),
    ):
        block = kind()
        x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        expected = block(x, y)
        patched(block)
        assert [line for line in report(block).replaced if "rms_norm" not in line] == lines
        torch.testing.assert_close(block(x, y), expected, atol=1e-5, rtol=1e-5)
    assert calls == ["glu"]


def test_what_is_put_in_an_activations_place_is_used():
    mlp = patched(build("llama").model.layers[0].mlp)
    x = torch.randn(2, 3, 32)
    mlp.act_fn = nn.ReLU()
    expected = mlp.down_proj(torch.relu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("name", sorted(transformers.activations.ACT2CLS))
def test_activations_are_known_by_their_values(name):
    known = {
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "quick_gelu": "quick_gelu",
        "relu": "relu",
        "relu2": "relu2",
        "sigmoid": "sigmoid",
        "silu": "silu",
        "swish": "silu",
    }
    act = transformers.activations.ACT2FN[name]
    assert activations.name_of(act) == known.get(name)
    model = nn.Sequential(act)
    patched(model)
    slow = name in ("gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
    assert is_swapped(act) == slow
    if slow:
        x = torch.linspace(-6, 6, 100)
        actual = act(x)
        torch.testing.assert_close(actual, bigkernel.unpatch(model)(x), atol=1e-6, rtol=1e-5)


class Fused(nn.Module):
    """An activation on what a linear layer gives."""

    def __init__(self):
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)

    def forward(self, x):
        return self.out(self.act(self.fc(x)))


class ByName(Fused):
    def forward(self, x):
        x = self.fc(x)
        x = self.act(x)
        return self.out(x)


class UsedTwice(Fused):
    """What the linear layer gives is wanted later too."""

    def forward(self, x):
        h = self.fc(x)
        y = self.act(h)
        return self.out(y + h)


class Relu(Fused):
    """torch keeps its result alone, which the next product keeps anyway."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()


@pytest.mark.parametrize(
    ("kind", "served"), [(Fused, True), (ByName, True), (UsedTwice, False), (Relu, False)]
)
def test_an_activation_after_a_linear_layer_is_one_op_with_its_bias(monkeypatch, kind, served):
    calls = calls_of(monkeypatch, activations, "bias_act")
    module = kind()
    x, grads = torch.randn(2, 3, 8), []
    for patch in (lambda m: m, patched):
        y = patch(module)(x)
        grads.append([y, *torch.autograd.grad(y.square().sum(), module.parameters())])
    assert report(module).replaced == ([f"bias_act in 1 x {kind.__name__} (gelu)"] * served)
    assert calls == ["bias_act"] * served
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_what_stands_in_a_linear_layers_place_is_called(monkeypatch):
    """A hook on it, another module in its place, weights of another dtype: as it was."""
    calls = calls_of(monkeypatch, activations, "bias_act")
    module = patched(Fused())
    x, seen = torch.randn(3, 8), []
    handle = module.fc.register_forward_hook(lambda m, given, out: seen.append(out) or 2 * out)
    torch.testing.assert_close(module(x), module.out(F.gelu(module.fc(x))))
    assert len(seen) == 2
    handle.remove()
    module.fc = nn.Sequential(module.fc, nn.Tanh())
    torch.testing.assert_close(module(x), module.out(F.gelu(module.fc(x))))
    assert calls == []


def test_a_bias_stays_in_fp32_inside_autocast(monkeypatch):
    calls = calls_of(monkeypatch, activations, "bias_act")
    module, x = Fused(), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(x)
        got = patched(module)(x)
    assert calls == ["bias_act"]
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
    got.float().sum().backward()
    assert module.fc.bias.grad.dtype == torch.float32


def test_rotations_are_known_by_their_values():
    def halves(x):
        return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)

    def llama(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + halves(q) * sin, k * cos + halves(k) * sin

    def other_way(q, k, cos, sin):
        return llama(q, k, cos, -sin)

    def q_alone(q, k, cos, sin):
        return llama(q, k, cos, sin)[0], k

    def other_names(q, k, sin, cos):
        return llama(q, k, cos, sin)

    assert rotary.form_of(llama) == (False, False, False)
    assert rotary.form_of(modeling_gpt_neox.apply_rotary_pos_emb).partial
    assert rotary.form_of(modeling_cohere.apply_rotary_pos_emb).interleaved
    for function in (other_way, q_alone, other_names):
        assert rotary.form_of(function) is None


def test_a_forward_that_is_not_what_its_file_says_stays(monkeypatch):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) + 1)

    original = modeling_llama.LlamaMLP.forward
    changed = forward.__code__.replace(
        co_filename=original.__code__.co_filename,
        co_firstlineno=original.__code__.co_firstlineno,
        co_qualname=original.__code__.co_qualname,
    )
    mlp = build("llama").model.layers[0].mlp

    class Other(modeling_llama.LlamaMLP):
        pass

    Other.forward = type(forward)(changed, forward.__globals__, "forward")
    mlp.__class__ = Other
    patched(mlp)
    reason = "in 1 x Other: the source of its forward is not what runs"
    assert report(mlp).left == [f"glu {reason}", f"bias_act {reason}"]


def test_a_forward_that_someone_has_replaced_stays():
    model = build("llama")
    norm = model.model.norm
    norm.forward = norm.forward
    patched(model)
    assert any("1 x LlamaRMSNorm: something else has" in line for line in report(model).left)
    assert not is_swapped(norm)


def test_parametrized_modules_stay():
    model = build("llama")
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)
    mlp = model.model.layers[0].mlp
    torch.nn.utils.parametrize.register_parametrization(model.model.norm, "weight", nn.Identity())
    patched(model)
    assert is_swapped(mlp)
    assert not is_swapped(model.model.norm)


# The Trainer


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_losses_of_the_trainer_are_transformers_own(name, tmp_path):
    """Padded batches of unequal lengths, accumulated."""
    found = []
    for kind, arguments in (
        (transformers.Trainer, transformers.TrainingArguments),
        (bigkernel.Trainer, bigkernel.TrainingArguments),
    ):
        given = arguments(
            str(tmp_path),
            max_steps=10,
            learning_rate=1e-3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        torch.manual_seed(0)
        model = build(name)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        trainer = kind(model, given, train_dataset=Rows(), data_collator=collate)
        found.append(losses_of(trainer))
    assert len(found[0]) == 10
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) < 1e-4
    assert found[0][0] != found[0][-1]


@pytest.mark.parametrize("attention_too", [True, False])
@pytest.mark.parametrize("kernels_too", [True, False])
def test_the_trainers_switches(attention_too, kernels_too, tmp_path, capsys):
    given = bigkernel.TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        use_bigkernel_attention=attention_too,
        use_bigkernel_kernels=kernels_too,
    )
    trainer = bigkernel.Trainer(build("llama"), given, train_dataset=Rows())
    out = capsys.readouterr().out
    assert ("replaced attention" in out) == attention_too
    assert all(
        (f"replaced {name}" in out) == kernels_too
        for name in ("rms_norm", "residual", "rope", "glu", "cross_entropy")
    )
    assert is_swapped(trainer.model.model.norm) == kernels_too
