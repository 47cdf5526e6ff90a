"""Language models' losses without their logits: what they compute, when, and what stays as it was.

Feature list: every family, float32, bfloat16 and autocast, padding, items of a step, tied and
frozen heads, heads with a bias, softcaps; when logits are there; losses and heads of a user's own,
hooks, adapters; unpatch, copies, checkpointing, torch.compile; calls that are left to torch; the
Trainer's curve, metrics, label smoothing, losses of a subclass's own; memory.
"""

import copy
import importlib
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from families import VOCAB, Rows, build, collate, tokens
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

import bigkernel
from bigkernel.integrations import heads, loss, native
from bigkernel.integrations.patching import report
from bigkernel.integrations.subclass import is_swapped
from bigkernel.testing.tolerance import assert_as_accurate

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "gpt2", "gpt_neox"]
MASKED = ["bert", "roberta", "modernbert"]
OTHERS = ["t5", "opt", "gpt_oss"]
F32, BF16 = torch.float32, torch.bfloat16

pytestmark = [
    pytest.mark.filterwarnings("ignore::bigkernel.backend.FallbackWarning"),
    pytest.mark.usefixtures("every_call"),
]


@pytest.fixture
def calls(monkeypatch):
    """The sizes of the inputs of linear_cross_entropy."""
    seen, function = [], loss.linear_cross_entropy

    def counted(x, *arguments, **options):
        seen.append(tuple(x.shape))
        return function(x, *arguments, **options)

    monkeypatch.setattr(loss, "linear_cross_entropy", counted)
    return seen


def patched(model, **options):
    return bigkernel.patch(model, quiet=True, only=["linear_cross_entropy"], **options)


def batch(name="llama", items=None):
    ids, mask = tokens(3), torch.ones(3, 11, dtype=torch.long)
    mask[0, :4], mask[1, 7:] = 0, 0
    labels = tokens(3, seed=1).masked_fill(mask == 0, -100)
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if name == "t5":
        del given["attention_mask"]
    if items is not None:
        given["num_items_in_batch"] = items
    return given


def run(model, given, **options):
    model.zero_grad()
    out = model(**given, **options)
    out.loss.backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got, wanted, tolerance=2e-5):
    assert got.keys() == wanted.keys()
    least = 1e-2 * max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), least)
        torch.testing.assert_close(got[name], gradient, atol=tolerance * scale, rtol=0, msg=name)


# Numbers


class Stub(nn.Module):
    """What a model has before its head: always the same hidden states."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = nn.Parameter(hidden)

    def forward(self, *arguments, **options):
        assert heads.SKIP not in options
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)


@pytest.mark.parametrize("dtype", [F32, BF16, "autocast"], ids=["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("name", [*DECODERS, *MASKED])
def test_loss_and_gradients_are_as_accurate_as_eagers(name, dtype, calls):
    """Of several draws: the error of one mean of 29 losses may be next to nothing by luck."""
    items = torch.tensor(29) if name in DECODERS else None
    given, draws = batch(name, items), 6
    plain = build(name).to(F32 if dtype == "autocast" else dtype)
    wanted, theirs, ours = [], [], []
    for _ in range(draws):
        stub = Stub((3 * torch.randn(3, 11, 32)).to(plain.dtype))
        for found, skip in ((theirs, {}), (ours, {"skip_logits": True})):
            model = patched(copy.deepcopy(plain)) if skip else copy.deepcopy(plain)
            setattr(model, model.base_model_prefix, copy.deepcopy(stub))
            with torch.autocast("cpu", BF16, enabled=dtype == "autocast"):
                out = model(**given, **skip)
            out.loss.backward()
            assert not skip or out.loss.dtype == torch.float32
            assert (out.logits is None) == bool(skip)
            found.append([out.loss.detach(), *(p.grad for p in model.parameters())])
        exact, labels = copy.deepcopy(plain), given["labels"]
        setattr(exact, exact.base_model_prefix, stub)
        exact = exact.double()
        if name in DECODERS:
            labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        logits = exact(given["input_ids"]).logits.view(-1, VOCAB)
        loss = F.cross_entropy(logits, labels.reshape(-1), reduction="sum")
        loss = loss / (29 if items is not None else (labels != -100).sum())
        loss.backward()
        wanted.append([loss.detach(), *(p.grad for p in exact.parameters())])
    assert calls == [(33, 32)] * draws
    for i, (got, reference, expected) in enumerate(
        zip(*(zip(*found, strict=True) for found in (ours, wanted, theirs)), strict=True)
    ):
        assert i == 0 or got[0].dtype == expected[0].dtype
        assert_as_accurate(torch.stack(got), torch.stack(reference), torch.stack(expected))


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "gpt2", "bert", *OTHERS])
def test_the_whole_model_learns_the_same(name, calls):
    """Through shared weights too, and with the losses that a model adds to it."""
    model, given = build(name), batch(name)
    more = {"output_router_logits": True} if name == "gpt_oss" else {}
    out, wanted = run(model, given, **more)
    value = out.loss.detach()
    got_out, got = run(patched(model), given, skip_logits=True, **more)
    assert_close(got, wanted)
    torch.testing.assert_close(got_out.loss.detach(), value, atol=0, rtol=1e-6)
    assert len(calls) == 1


def test_a_frozen_head_gets_no_gradient(calls):
    model, given = patched(build("llama")), batch()
    _, wanted = run(model, given)
    model.lm_head.requires_grad_(False)
    _, got = run(model, given, skip_logits=True)
    del wanted["lm_head.weight"]
    assert_close(got, wanted)
    assert len(calls) == 1


# When logits are there


def test_logits_are_missing_only_where_that_was_asked_for(calls):
    model, given = patched(build("llama")), batch()
    without = {key: value for key, value in given.items() if key != "labels"}
    for training in (False, True):
        model.train(training)
        assert model(**given).logits.shape == (3, 11, VOCAB)
        assert model(**given, skip_logits=False).logits is not None
        assert calls == []
        assert model(**given, skip_logits=True).logits is None
        assert model(**without, skip_logits=True).logits is not None
        assert len(calls) == 1
        calls.clear()
    patched(model, logits=False)
    assert model.eval()(**given).logits is not None
    assert calls == []
    assert model(**given, skip_logits=True).logits is None
    model.train()
    assert model(**given).logits is None
    assert model(**given, return_dict=False)[0].shape == ()
    assert len(calls) == 3
    assert model(**given, skip_logits=False).logits is not None
    assert model(**without).logits is not None
    assert len(calls) == 3
    patched(model)
    assert model(**given).logits is not None
    with pytest.raises(TypeError, match="logits must be True or False, got None"):
        bigkernel.patch(model, logits=None)


def test_the_report_says_when(capsys):
    model = build("llama")
    bigkernel.patch(model)
    line = "replaced linear_cross_entropy in 1 x LlamaForCausalLM (in calls with skip_logits=True"
    assert line in capsys.readouterr().out
    bigkernel.patch(model, logits=False)
    line = "replaced linear_cross_entropy in 1 x LlamaForCausalLM (in training)"
    assert line in capsys.readouterr().out
    bloom = patched(build("bloom"))
    (line,) = report(bloom).left
    assert "BloomForCausalLM: its logits are used between its head and its loss" in line
    with pytest.raises(RuntimeError, match="its logits are used between"):
        patched(bloom, strict=True)
    (line,) = report(patched(build("llama").double())).left
    assert "float64 has no native kernel" in line


def test_a_call_without_logits_makes_none_even_where_torch_computes_it(calls, monkeypatch):
    """So that what a script sees does not hang on sizes or devices."""
    model, given = patched(build("llama")), batch()
    expected = model(**given)
    monkeypatch.setitem(native.SMALLEST, "linear_cross_entropy", 33 * VOCAB * 4 + 1)
    got = model(**given, skip_logits=True)
    assert got.logits is None
    assert torch.equal(got.loss, expected.loss)
    assert calls == []
    monkeypatch.setitem(native.SMALLEST, "linear_cross_entropy", 33 * VOCAB * 4)
    assert model(**given, skip_logits=True).loss.isfinite()
    assert len(calls) == 1


def test_rows_that_are_kept_are_those_that_count(calls):
    model, given = patched(build("llama")), batch()
    ids = given["input_ids"]
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(2)) > 0.4
    chosen = given["labels"][mask].masked_fill(torch.arange(int(mask.sum())) == 1, 7)
    options = {"labels": given["labels"], "shift_labels": chosen, "logits_to_keep": mask}
    expected = model(ids, **options)
    got = model(ids, **options, skip_logits=True)
    torch.testing.assert_close(got.loss, expected.loss, atol=0, rtol=1e-6)
    assert calls == [(int(mask.sum()), 32)]
    for skip in (False, True):  # as transformers has it
        with pytest.raises((ValueError, RuntimeError), match="batch"):
            model(ids, labels=ids, logits_to_keep=2, skip_logits=skip)
    assert model(ids, logits_to_keep=2).logits.shape == (3, 2, VOCAB)
    assert model.generate(ids[2:], max_new_tokens=2, do_sample=False).shape == (1, 13)


# What is not ours to compute


def test_a_loss_of_the_users_own_gets_its_logits(calls):
    model, given = patched(build("gemma2")), batch()
    seen = []

    def own(logits, labels, vocab_size, **options):
        seen.append(logits)
        return logits.square().mean()

    model.loss_function = own
    expected = model(**given)
    got = model(**given, skip_logits=True)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(seen[1], expected.logits)
    assert calls == []


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_hooks_of_a_head_see_it_called(name, calls):
    model, given = patched(build(name)), batch(name)
    expected = model(**given)
    head = model.get_output_embeddings()
    seen = []
    hook = head.register_forward_hook(lambda *given: seen.append(given[2]))
    got = model(**given, skip_logits=True)
    assert torch.equal(seen[0], expected.logits)
    assert torch.equal(got.loss, expected.loss)
    assert calls == []
    hook.remove()
    model(**given, skip_logits=True)
    assert len(calls) == 1


def test_a_head_that_has_become_another_is_called(calls):
    """As adapters do it (LoRA on the head)."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.more = base, nn.Linear(32, VOCAB)

        def forward(self, x):
            return self.base(x) + self.more(x)

    model, given = patched(build("llama")), batch()
    model.lm_head = Adapted(model.lm_head)
    expected = model(**given)
    got = model(**given, skip_logits=True)
    assert torch.equal(got.loss, expected.loss)
    assert calls == []
    (line,) = report(patched(bigkernel.unpatch(model))).left
    assert "its head is none that is known" in line


def test_classes_that_are_not_the_heads_rows_are_an_error_as_before(calls):
    model, given = patched(build("llama")), batch()
    model.config.vocab_size = VOCAB + 1
    for skip in (False, True):
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            model(**given, skip_logits=skip)
    assert calls == []


@pytest.mark.parametrize(
    "changed",
    [
        "logits = self.lm_head(hidden_states) * 2",
        "logits = self.lm_head(hidden_states); logits = logits * 2",
        "logits = self.lm_head(self.lm_head.weight[:1] @ self.lm_head.weight.T)"
        " if labels is None else self.lm_head(hidden_states)",
    ],
)
def test_forwards_that_use_their_logits_otherwise_stay(changed, tmp_path, monkeypatch):
    text = FORWARD.replace("logits = self.lm_head(hidden_states)", changed)
    (tmp_path / "own_model.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    model = importlib.import_module("own_model").Own(build("llama").config)
    (line,) = report(patched(model)).left
    assert "its logits are used between its head and its loss" in line


def test_a_forward_of_the_users_own_is_served(tmp_path, monkeypatch, calls):
    (tmp_path / "own_model.py").write_text(FORWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    model = patched(importlib.import_module("own_model").Own(build("llama").config))
    expected = model(**batch())
    got = model(**batch(), skip_logits=True)
    torch.testing.assert_close(got.loss, expected.loss)
    assert len(calls) == 1


FORWARD = """
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast


class Own(transformers.LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        hidden_states = self.model(input_ids, attention_mask=attention_mask, **kwargs)[0]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)
"""


# Back again, and what a model still is


def test_unpatch_forgets_the_setting():
    model = build("llama")
    before, cls = dict(vars(model)), type(model)
    patched(model, logits=False)
    assert is_swapped(model)
    bigkernel.unpatch(model)
    assert type(model) is cls
    assert vars(model) == before
    assert model(**batch(), skip_logits=True).logits is not None


def test_copies_keep_the_setting_and_loaded_models_have_none(tmp_path, calls):
    model = patched(build("llama"), logits=False).train()
    clone = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert clone(**batch()).logits is None
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    assert not is_swapped(loaded)
    assert loaded(**batch()).logits is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same(reentrant, calls):
    model, given = patched(build("llama")).train(), batch()
    _, wanted = run(model, given)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, got = run(model, given, skip_logits=True)
    assert_close(got, wanted)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "roberta", "modernbert"])
def test_it_compiles_whole(name):
    model, given = patched(build(name)), batch(name)
    _, wanted = run(model, given)
    expected = model(**given).loss.detach()
    seen = set()

    def backend(graph, inputs):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    model.zero_grad()
    out = torch.compile(model, backend=backend, fullgraph=True)(**given, skip_logits=True)
    out.loss.backward()
    assert any("linear_cross_entropy_fwd" in target for target in seen)
    assert out.logits is None
    torch.testing.assert_close(out.loss.detach(), expected, atol=0, rtol=1e-6)
    assert_close({n: p.grad for n, p in model.named_parameters()}, wanted)


# The Trainer


def trainer_of(folder, name="llama", kind=bigkernel.Trainer, model=None, **options):
    given = {
        "output_dir": str(folder),
        "max_steps": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    own = {n: options.pop(n) for n in ("compute_metrics", "compute_loss_func") if n in options}
    ours = issubclass(kind, bigkernel.Trainer)
    arguments = bigkernel.TrainingArguments if ours else transformers.TrainingArguments
    if ours:
        given["announce"] = False
    torch.manual_seed(0)
    return kind(
        build(name) if model is None else model,
        arguments(**{**given, **options}),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        data_collator=collate,
        **own,
    )


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_twenty_steps_of_the_trainer_are_those_with_logits(name, tmp_path, calls, monkeypatch):
    """Padded batches of unequal lengths, accumulated; AdamW and no dropout."""
    options = {"max_steps": 20, "model": build(name)}
    for module in options["model"].modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = []
    for fused in (True, False):
        given = {**options, "model": copy.deepcopy(options["model"])}
        trainer = trainer_of(tmp_path, name, **given)
        if not fused:
            monkeypatch.setattr(heads, "can_skip_logits", lambda model: False)
        found.append(losses_of(trainer))
        assert len(calls) == 40
    assert len(found[0]) == 20
    assert found[0][0] != found[0][-1]
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing_factor": 0.1}, {"bf16": True}, {"average_tokens_across_devices": False}],
    ids=["plain", "label smoothing", "bf16", "items of one device"],
)
def test_losses_of_the_trainer_are_transformers_own(options, tmp_path, calls):
    tolerance = 3e-2 if options.get("bf16") else 1e-4
    ours = losses_of(trainer_of(tmp_path, **options))
    theirs = losses_of(trainer_of(tmp_path, kind=transformers.Trainer, **options))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < tolerance
    assert len(calls) == (0 if "label_smoothing_factor" in options else 4)


def test_evaluation_has_logits_where_they_are_wanted(tmp_path, calls):
    plain = trainer_of(tmp_path, kind=transformers.Trainer)
    trainer = trainer_of(tmp_path)
    expected = plain.predict(Rows())
    got = trainer.predict(Rows())
    assert got.predictions.shape == expected.predictions.shape
    assert abs(got.predictions - expected.predictions).max() < 1e-3
    assert calls == []
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"accuracy": 0.5}

    assert trainer_of(tmp_path, compute_metrics=metrics).evaluate()["eval_accuracy"] == 0.5
    assert seen == [expected.predictions.shape]
    assert calls == []
    loss = trainer.evaluate()["eval_loss"]  # nobody sees more than this
    assert len(calls) == 4
    assert loss == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5)


def test_losses_of_a_scripts_own_get_logits(tmp_path, calls):
    def total(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].reshape(-1, VOCAB)
        return F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / 100

    class Weighted(bigkernel.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = loss + 0 * outputs.logits.sum()
            return (loss, outputs) if return_outputs else loss

    class Halved(bigkernel.Trainer):
        def compute_loss(self, *arguments, **options):
            return super().compute_loss(*arguments, **options) / 2

    trainer_of(tmp_path, compute_loss_func=total).train()
    trainer = trainer_of(tmp_path, kind=Weighted)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert calls == []
    trainer_of(tmp_path, kind=Halved).train()
    assert len(calls) == 4


def test_hooks_of_a_model_see_its_logits(tmp_path, calls):
    trainer = trainer_of(tmp_path)
    seen = []
    hook = trainer.model.register_forward_hook(lambda *given: seen.append(given[2].logits.shape))
    trainer.train()
    assert len(seen) == 4
    assert calls == []
    hook.remove()


def test_other_models_are_not_asked_to_skip(tmp_path, calls):
    """A teacher that a script gives to the Trainer's compute_loss, and a model inside another."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = build("llama")

        def forward(self, input_ids, attention_mask, labels, num_items_in_batch=None):
            return self.inside(input_ids, attention_mask=attention_mask, labels=labels)

    class Taught(bigkernel.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(Around(), inputs), {}

    trainer_of(tmp_path, model=Around()).train()
    assert trainer_of(tmp_path, kind=Taught).evaluate()["eval_loss"] > 0
    assert calls == []


MEMORY = """
import torch, transformers, bigkernel

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=65536, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2,
)
for logits in (False, True):
    model = transformers.LlamaForCausalLM(config).train()
    bigkernel.patch(model, quiet=True, logits=logits)
    x = torch.randint(0, 65536, (1, 8))
    model(x, labels=x).loss.backward()  # the gradients exist, and what the first call sets up
    x = torch.randint(0, 65536, (2, 512))
    # The most since now; getrusage's is also that of the process that started this one.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    peak = lambda: 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
    before = peak()
    model(x, labels=x).loss.backward()
    print((peak() - before) / (x.numel() * 65536 * 4))
"""


@pytest.mark.skipif(
    os.environ.get("BIGKERNEL_EXPECT_SANITIZER") == "1",
    reason="AddressSanitizer keeps memory that was given back",
)
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_memory_above_the_gradients_is_a_fraction_of_the_logits():
    """Which the head's gradients are too: a sixteenth of the logits, and two of a chunk."""
    run = [sys.executable, "-c", MEMORY]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    without, with_logits = map(float, done.stdout.split())
    assert with_logits > 1
    assert without < 0.3
