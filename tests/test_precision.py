"""bf16=None: training steps compute in bfloat16 where that is faster, and nothing else does.

What the machine multiplies faster is given by the tests, so that they say the same on each.
"""

import pytest
import torch
import transformers
from torch import nn

import bigkernel
from bigkernel import checkpoint, precision


@pytest.fixture
def fast(monkeypatch):
    """A machine that multiplies bfloat16 three times as fast."""
    monkeypatch.setattr(precision, "speedup", lambda device, dtype: 3.0)


def wide_model(hidden=128, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    config = transformers.LlamaConfig(
        vocab_size=64, num_hidden_layers=1, num_attention_heads=4, **sizes, **options
    )
    return transformers.LlamaForCausalLM(config)


def rows(count=16, length=12):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(folder, model, cls=bigkernel.Trainer, arguments=bigkernel.TrainingArguments, **options):
    options = {"max_steps": 3, "save_strategy": "no", "logging_steps": 1, **options}
    args = arguments(
        str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return cls(model, args, train_dataset=rows(), eval_dataset=rows(4))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def dtypes_of_products(model):
    """What the model's layers give out, in training steps and in evaluation."""
    seen = {True: set(), False: set()}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda module, given, out: seen[module.training].add(out.dtype)
            )
    return seen


def test_training_steps_are_in_bf16_and_nothing_else(tmp_path, fast, capsys):
    model = wide_model()
    seen = dtypes_of_products(model)
    ours = trainer(tmp_path, model)
    ours.train()
    ours.evaluate()
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {
        value.dtype
        for state in ours.optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    } == {torch.float32}
    assert model(rows(1)[0]["input_ids"][None]).logits.dtype == torch.float32
    assert "training steps compute in bfloat16" in capsys.readouterr().out
    assert ours.args.bf16 is None  # the caller's arguments stay theirs


def test_as_with_bf16_true(tmp_path, fast):
    """The same losses as where bfloat16 is asked for, which evaluates in it too."""
    chosen = trainer(tmp_path / "none", wide_model())
    asked = trainer(tmp_path / "true", wide_model(), bf16=True)
    chosen.train()
    asked.train()
    torch.testing.assert_close(losses(chosen), losses(asked), rtol=1e-3, atol=0)
    exact = trainer(tmp_path / "false", wide_model(), bf16=False)
    exact.train()
    assert losses(exact) != losses(chosen)


class OwnLoss(bigkernel.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert not torch.is_autocast_enabled("cpu")
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 256), nn.Linear(256, 64)
        self.inner = nn.Linear(256, 256)

    def forward(self, input_ids, labels):
        logits = self.head(self.inner(self.embed(input_ids)))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize(
    ("model", "cls", "options"),
    [
        pytest.param(wide_model, bigkernel.Trainer, {"bf16": False}, id="said"),
        pytest.param(lambda: wide_model(96), bigkernel.Trainer, {}, id="narrow"),
        pytest.param(wide_model, OwnLoss, {}, id="loss of one's own"),
        pytest.param(Plain, bigkernel.Trainer, {}, id="a plain module"),
    ],
)
def test_float32_stays(tmp_path, fast, capsys, model, cls, options):
    model = model()
    seen = dtypes_of_products(model)
    trainer(tmp_path, model, cls, **options).train()
    assert seen[True] == {torch.float32}
    assert "bfloat16" not in capsys.readouterr().out


def test_a_loss_function_keeps_float32(tmp_path, fast):
    model = wide_model()
    seen = dtypes_of_products(model)
    ours = trainer(tmp_path, model)
    ours.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: (
        nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())
    )
    ours.train()
    assert seen[True] == {torch.float32}


def test_transformers_own_arguments_are_obeyed(tmp_path, fast):
    model = wide_model()
    seen = dtypes_of_products(model)
    trainer(tmp_path, model, arguments=transformers.TrainingArguments).train()
    assert seen[True] == {torch.float32}


def test_a_bf16_model_is_left_as_it_is(tmp_path, fast, capsys):
    trainer(tmp_path, wide_model().bfloat16()).train()
    assert "training steps compute in" not in capsys.readouterr().out


@pytest.mark.parametrize("value", ["no", "bf16"])
def test_a_launcher_decides(tmp_path, fast, monkeypatch, value):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
    args = bigkernel.TrainingArguments(str(tmp_path), use_cpu=True)
    assert (args.bf16, args.mixed_precision) == (False, value)


def test_the_command_lines_argument(tmp_path):
    parser = transformers.HfArgumentParser(bigkernel.TrainingArguments)
    for words, expected in (([], None), (["--bf16"], True), (["--bf16", "false"], False)):
        (args,) = parser.parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--use_cpu", *words]
        )
        assert args.bf16 is expected


def test_resuming_on_another_machine_is_said(tmp_path, fast, monkeypatch):
    sentences = []
    monkeypatch.setattr(checkpoint, "notify", sentences.append)
    trainer(tmp_path, wide_model(), save_strategy="steps", save_steps=2).train()
    again = trainer(tmp_path, wide_model(), save_strategy="steps", save_steps=2, max_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not any("goes on in" in sentence for sentence in sentences)
    monkeypatch.setattr(precision, "speedup", lambda device, dtype: 1.0)
    slow = trainer(tmp_path, wide_model(), save_strategy="steps", save_steps=2, max_steps=5)
    slow.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert any("computed in bfloat16 and goes on in float32" in sentence for sentence in sentences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_speedup_is_measured_once(dtype):
    device = torch.device("cpu")
    assert 0 < precision.speedup(device, dtype) < 100
    assert precision.speedup(device, dtype) == precision.speedup(device, dtype)
    assert precision.speedup(torch.device("meta"), dtype) == 0


@pytest.mark.parametrize(
    ("speedup", "expected"), [(0.01, False), (0.5, False), (1.0, True), (3.0, True)]
)
def test_products_that_are_loops_or_emulated_are_none(speedup, expected, monkeypatch):
    monkeypatch.setattr(precision, "speedup", lambda device, dtype: speedup)
    assert precision.multiplies(torch.device("cpu"), torch.bfloat16) == expected
    assert precision.multiplies(torch.device("meta"), torch.bfloat16)


@pytest.mark.slow
def test_as_much_is_learned(tmp_path, fast):
    """300 steps: the curve differs from float32's by less than float32's of another seed does."""
    text = [torch.tensor([(3 * i * i + start) % 61 for i in range(33)]) for start in range(64)]
    data = [{"input_ids": row, "labels": row} for row in text]

    def curve(seed, **options):
        ours = trainer(tmp_path, wide_model(), max_steps=300, seed=seed, **options)
        ours.train_dataset = data
        ours.train()
        return torch.tensor(losses(ours)).unfold(0, 20, 20).mean(1)

    exact, other, ours = curve(1, bf16=False), curve(2, bf16=False), curve(1)
    assert (ours - exact).abs().mean() < (other - exact).abs().mean()
    assert ours[-1] < 1.05 * exact[-1] + 0.01
