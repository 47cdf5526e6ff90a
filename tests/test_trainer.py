"""The Trainer: what transformers' does, and what it adds.

Feature list: the same losses, logs, callbacks and metrics as transformers' Trainer; gradient
accumulation; bf16 autocast; clipping once; other optimizers; augmentation keyed by sample and
epoch; resuming bit for bit (text with dropout, images with augmentation, kill -9 while saving,
a cut-off checkpoint, one that its user has changed, a checkpoint of transformers' own); Ctrl-C and
other signals at any moment, with workers and on two ranks; a loss that is not finite; a full disk;
what cannot be saved, before the first step; a second writer; rotation, best model, moved folders.
"""

import dataclasses
import errno
import functools
import json
import operator
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import image_model, text_model
from torch.utils.data import Dataset

import bigkernel
import bigkernel.optim
from bigkernel import checkpoint, precision, utilization
from bigkernel.checkpoint import CheckpointError, NonFiniteLossError, TrainingInterrupted
from bigkernel.data import ImageData, ImageDataset, PackedDataset, PackingCollator, build_tokenizer
from bigkernel.data.augmentation import BatchAugmentation
from bigkernel.data.images import collate_images
from bigkernel.run_lock import RunLockedError, writing_to
from bigkernel.trainer import Trainer, TrainingArguments

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def told(monkeypatch):
    sentences = []
    monkeypatch.setattr(checkpoint, "notify", sentences.append)
    return sentences


# Two small tasks


def text_data():
    return PackedDataset(
        ["abcdefgh" * 14, "the cat sat on the mat. " * 6], build_tokenizer("bytes"), 16
    )


def image_data(count=20):
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % 3
    return ImageDataset(ImageData(pixels.byte(), labels, ["a", "b", "c"], "noise", ""))


def arguments(out, cls=TrainingArguments, **changes):
    options = {
        "output_dir": str(out),
        "max_steps": 8,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": True,
    }
    if issubclass(cls, TrainingArguments):
        options["announce"] = False
    return cls(**{**options, **changes})


def text_trainer(out, cls=Trainer, dropout=0.2, trainer=None, **changes):
    kind = TrainingArguments if issubclass(cls, Trainer) else transformers.TrainingArguments
    data = text_data()
    return cls(
        text_model(dropout),
        arguments(out, kind, **changes),
        train_dataset=data,
        eval_dataset=data,
        data_collator=PackingCollator(16),
        **(trainer or {}),
    )


def noted_losses(trainer):
    """A list that the losses of the trainer's steps will be in."""
    losses, training_step = [], trainer.training_step

    def note(*args, **kwargs):
        losses.append(training_step(*args, **kwargs))
        return losses[-1]

    trainer.training_step = note
    return losses


class Noise:
    """Float images plus noise that is drawn as bigkernel.transforms draw: by (seed, id)."""

    def __init__(self):
        self.calls = []

    def __call__(self, images, generator=None, ids=None):
        seed = generator.initial_seed()
        self.calls.append((seed, ids.tolist(), torch.is_grad_enabled()))
        out = []
        for image, number in zip(images, ids.tolist(), strict=True):
            own = torch.Generator().manual_seed((seed + number) % 2**63)
            out.append(image[:, :8, :8] / 255.0 + 0.1 * torch.randn(1, 8, 8, generator=own))
        return torch.stack(out)


def scale_only(images, generator=None, ids=None):
    return images / 255.0


def image_trainer(out, dropout=0.0, trainer=None, **changes):
    options = {"augmentation": Noise(), "eval_augmentation": scale_only, **(trainer or {})}
    return Trainer(
        image_model(dropout),
        arguments(out, **changes),
        train_dataset=image_data(),
        eval_dataset=image_data(6),
        data_collator=collate_images,
        **options,
    )


def losses(trainer, names=("loss", "grad_norm", "eval_loss")):
    return [
        (log["step"], name, log[name])
        for log in trainer.state.log_history
        for name in names
        if name in log
    ]


def parameters(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def assert_equal_runs(a, b, names=("loss", "grad_norm", "eval_loss")):
    assert losses(a, names) == losses(b, names)
    for x, y in zip(parameters(a), parameters(b), strict=True):
        assert torch.equal(x, y)


# The same as transformers' Trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_grad_norm": 0.05, "gradient_accumulation_steps": 3, "weight_decay": 0.1},
        {"max_grad_norm": 0.0, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"bf16": True},
    ],
    ids=["defaults", "accumulate-clip", "no-clip", "bf16"],
)
def test_trains_as_transformers_trainer_does(tmp_path, changes):
    runs = []
    for cls in (transformers.Trainer, Trainer):
        trainer = text_trainer(
            tmp_path, cls, dropout=0.0, eval_strategy="steps", eval_steps=4, **changes
        )
        result = trainer.train()
        runs.append((trainer.state.log_history, result, parameters(trainer)))
    (expected, their_result, theirs), (actual, our_result, ours) = runs
    added = {"tokens_per_second", "memory_bytes", "mfu"}
    for ours_log, theirs_log in zip(actual, expected, strict=True):
        more = added if "loss" in theirs_log else set()
        assert set(ours_log) == set(theirs_log) | more
    tolerance = {"rel": 3e-2 if changes.get("bf16") else 1e-4, "abs": 1e-6}
    for ours_log, theirs_log in zip(actual, expected, strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "eval_loss", "epoch"):
            if name in theirs_log:
                assert ours_log[name] == pytest.approx(theirs_log[name], **tolerance), name
    assert our_result.training_loss == pytest.approx(their_result.training_loss, **tolerance)
    if "bf16" not in changes:
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-4)


def test_the_log_has_speed_memory_and_share_of_the_matrix_rate(tmp_path, monkeypatch):
    """Of training alone: an evaluation that takes long makes nothing slower."""
    asked, late = [], [0.0]
    right, usual = precision.matrix_rate, Trainer.evaluation_loop
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0])
    for module in (utilization, sys.modules[Trainer.__module__]):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(
        precision, "matrix_rate", lambda *given: asked.append(given) or right(*given)
    )

    def slow(self, *args, **options):
        late[0] += 1e6
        return usual(self, *args, **options)

    monkeypatch.setattr(Trainer, "evaluation_loop", slow)
    trainer = text_trainer(
        tmp_path, max_steps=6, logging_steps=2, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    logs = trainer.state.log_history
    steps = [log for log in logs if "loss" in log]
    assert [log["step"] for log in steps] == [2, 4, 6]
    for log in steps:
        assert log["memory_bytes"] > 2**20
        assert 0 < log["mfu"] < 1.5
        assert log["tokens_per_second"] > 1  # with the evaluations it would be 0.0
    assert set(asked) == {(torch.device("cpu"), torch.float32)}
    assert not any("tokens_per_second" in log for log in logs if "eval_loss" in log)


def test_epochs_metrics_callbacks_and_prediction(tmp_path):
    class Counter(transformers.TrainerCallback):
        def __init__(self):
            self.events = []

        def on_step_end(self, args, state, control, **kwargs):
            assert kwargs["model"] is not None
            assert kwargs["optimizer"] is not None
            self.events.append("step")

        def on_epoch_end(self, args, state, control, **kwargs):
            self.events.append("epoch")

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            self.events.append(round(metrics["eval_accuracy"], 3))

    counter = Counter()
    trainer = image_trainer(
        tmp_path,
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        eval_strategy="epoch",
        trainer={
            "callbacks": [counter],
            "compute_metrics": lambda p: {"accuracy": (p[0].argmax(-1) == p[1]).mean()},
        },
    )
    trainer.train()
    assert [event for event in counter.events if isinstance(event, str)] == [
        *["step"] * 3,
        "epoch",
        *["step"] * 3,
        "epoch",
    ]
    assert len(counter.events) == 10
    prediction = trainer.predict(image_data(5))
    assert prediction.predictions.shape == (5, 3)
    assert prediction.label_ids.tolist() == [0, 1, 2, 0, 1]


def test_a_padded_batch_without_collator_or_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from bigkernel.data import TextDataset

    tokenizer = build_tokenizer("bytes")

    class WithLabels(TextDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {
                **item,
                "labels": item["input_ids"].masked_fill(item["attention_mask"] == 0, -100),
            }

    data = WithLabels(["short", "a longer text", "x"], tokenizer, 16)
    results = []
    for cls in (transformers.Trainer, Trainer):
        trainer = cls(text_model(0.0), train_dataset=data)
        trainer.args.use_cpu = True
        results.append(trainer.train().training_loss)
    assert trainer.args.output_dir == "tmp_trainer"
    assert results[1] == pytest.approx(results[0], rel=1e-4)


def test_what_is_replaced_is_announced_and_can_be_switched_off(tmp_path, capsys):
    trainer = text_trainer(tmp_path, announce=True, max_steps=1)
    trainer.train()
    out = capsys.readouterr().out
    assert "replaced attention in 1 x LlamaAttention (was sdpa)" in out
    assert "bigkernel.optim.AdamW, clipping at norm 1 inside its step" in out
    off = text_trainer(
        tmp_path, use_bigkernel_attention=False, use_bigkernel_optimizer=False, max_steps=1
    )
    off.train()
    assert off.model.config._attn_implementation == "sdpa"
    assert type(off.optimizer.optimizer) is torch.optim.AdamW


def test_plain_transformers_arguments_and_model_init_work(tmp_path):
    trainer = Trainer(
        args=arguments(tmp_path, transformers.TrainingArguments, max_steps=2),
        model_init=lambda: text_model(),
        train_dataset=text_data(),
        data_collator=PackingCollator(16),
    )
    trainer.train()
    assert trainer.model.config._attn_implementation.startswith("bigkernel")
    assert isinstance(trainer.optimizer.optimizer, bigkernel.optim.AdamW)


@pytest.mark.parametrize("kind", ["sgd", "cls", "instance"])
def test_other_optimizers_are_left_alone(tmp_path, kind):
    if kind == "sgd":
        expected, options = torch.optim.SGD, {}
        trainer = text_trainer(tmp_path, optim="sgd", max_steps=2)
    elif kind == "cls":
        expected = bigkernel.optim.Adam
        options = {"optimizer_cls_and_kwargs": (expected, {"lr": 1e-2, "max_grad_norm": 0.5})}
        trainer = text_trainer(tmp_path, trainer=options, max_steps=2)
    else:
        expected = torch.optim.AdamW
        model = text_model()
        trainer = Trainer(
            model,
            arguments(tmp_path, max_steps=2),
            train_dataset=text_data(),
            data_collator=PackingCollator(16),
            optimizers=(torch.optim.AdamW(model.parameters(), lr=1e-2), None),
        )
    trainer.train()
    assert type(trainer.optimizer.optimizer) is expected
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert len(norms) == 2
    assert min(norms) > 0


MUON_ARGS = "muon_lr=0.02, momentum=0.9,nesterov=false,ns_steps=4,ns_dtype=float32"


def test_muon_steps_as_in_a_loop_of_ones_own(tmp_path, capsys):
    """One learning rate unless another is given; schedules, clipping and decay act on both."""
    options = {"optim": "muon", "max_steps": 4, "weight_decay": 0.1, "warmup_steps": 2}
    options |= {"adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_grad_norm": 0.05}
    trainer = text_trainer(tmp_path, dropout=0.0, announce=True, optim_args=MUON_ARGS, **options)
    trainer.train()
    said = "is bigkernel.optim.Muon of 7 weights, with AdamW for 5 other parameters, clipping at"
    assert said in capsys.readouterr().out
    model = text_model(0.0)
    groups = bigkernel.optim.muon_groups(
        model, muon={"lr": 0.02}, adamw={"betas": (0.9, 0.95), "eps": 1e-6}
    )
    own = bigkernel.optim.Muon(
        groups, lr=1e-2, weight_decay=0.1, momentum=0.9, nesterov=False, ns_steps=4,
        ns_dtype=torch.float32, adjust_lr_fn="match_rms_adamw", max_grad_norm=0.05,
    )  # fmt: skip
    schedule = transformers.get_scheduler("linear", own, 2, 4)
    other = text_trainer(tmp_path, dropout=0.0, **options)
    other = Trainer(
        model, other.args, train_dataset=text_data(), data_collator=PackingCollator(16),
        optimizers=(own, schedule),
    )  # fmt: skip
    other.train()
    assert_equal_runs(trainer, other)
    usual = text_trainer(tmp_path, **options)
    usual.create_optimizer()
    assert [group["lr"] for group in usual.optimizer.param_groups] == [1e-2] * 3
    assert {g["adjust_lr_fn"] for g in usual.optimizer.param_groups if g["use_muon"]} == {
        "match_rms_adamw"
    }


class MomentumSeen(transformers.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **_):
        self.seen += {g["momentum"] for g in optimizer.param_groups if g["use_muon"]}


@pytest.mark.parametrize("given", [None, "momentum=0.7"])
def test_muons_momentum_rises_unless_it_is_given(tmp_path, monkeypatch, given):
    monkeypatch.setattr("bigkernel.trainer._MomentumWarmup.steps", 4)
    expected = [0.85, 0.875, 0.9, 0.925, 0.95, 0.95] if given is None else [0.7] * 6
    options = {"optim": "muon", "optim_args": given, "max_steps": 6}
    options |= {"save_strategy": "steps", "save_steps": 3}
    for resume, count in ((False, 6), (tmp_path / "checkpoint-3", 3)):
        seen = MomentumSeen()
        trainer = text_trainer(tmp_path, **options)
        trainer.add_callback(seen)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        assert seen.seen == pytest.approx(expected[-count:])


def test_muon_is_an_argument_like_others(tmp_path):
    (parsed,) = transformers.HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim", "muon", "--optim_args", "momentum=0.9"]
    )
    for args in (
        parsed,
        TrainingArguments(**{"output_dir": str(tmp_path), "optim": "muon"}),
        dataclasses.replace(arguments(tmp_path, optim="muon"), seed=3),
        arguments(tmp_path).set_optimizer("muon", learning_rate=0.1),
    ):
        assert args.optim == "muon"
        assert json.loads(args.to_json_string())["optim"] == "muon"
    assert arguments(tmp_path).set_optimizer("sgd").optim == "sgd"
    assert arguments(tmp_path).optim == arguments(tmp_path, transformers.TrainingArguments).optim
    with pytest.raises(ValueError, match="moun is not a valid OptimizerNames"):
        arguments(tmp_path, optim="moun")


def test_the_command_line_takes_all_that_theirs_takes(tmp_path):
    """By HfArgumentParser, as transformers' example scripts read theirs."""
    pairs = (
        (transformers.TrainingArguments, TrainingArguments),
        (transformers.Seq2SeqTrainingArguments, bigkernel.Seq2SeqTrainingArguments),
    )
    for kinds in pairs:
        parsers = [transformers.HfArgumentParser(kind) for kind in kinds]
        theirs, ours = ({a.dest: a for a in parser._actions} for parser in parsers)
        assert "use_bigkernel_attention" in parsers[1].format_help()
        for name, action in theirs.items():
            for what in ("option_strings", "nargs", "const", "required", "default", "choices"):
                if (name, what) not in (("bf16", "default"), ("optim", "choices")):
                    values = getattr(ours[name], what), getattr(action, what)
                    assert values[0] == values[1], (name, what)
        for name in ours.keys() - theirs.keys():  # and may be switched on and off in both ways
            expected = not ours[name].default
            words = (f"--no_{name}",) if ours[name].default else (f"--{name}",)
            for given in (words, (f"--{name}", str(expected))):
                (args,) = parsers[1].parse_args_into_dataclasses(
                    ["--output_dir", str(tmp_path), *given]
                )
                assert getattr(args, name) is expected
    args = arguments(tmp_path, packing=True, bf16=None, announce=False)
    file = tmp_path / "arguments.json"
    file.write_text(args.to_json_string())
    (again,) = parsers[1].parse_json_file(str(file))
    assert (again.packing, again.bf16, again.announce) == (True, None, False)


def test_a_script_in_the_form_of_transformers_examples(tmp_path):
    """Train, save, evaluate, with metrics of predictions, and go on from a checkpoint."""
    rows = torch.randint(0, 32, (8, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    words = ["--do_train", "--do_eval", "--max_steps", "4", "--use_cpu", "--learning_rate", "0.01"]
    words += ["--save_steps", "2", "--gradient_accumulation_steps", "2", "--report_to", "none"]
    words += ["--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "1"]

    def keep_best(logits, labels):
        return logits.argmax(-1)

    def accuracy(both):
        return {"accuracy": float((both[0][:, :-1] == both[1][:, 1:]).mean())}

    def run(cls, kind, *further):
        (args,) = transformers.HfArgumentParser(kind).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path / kind.__module__), *words, *further]
        )
        assert args.do_train
        assert args.do_eval
        transformers.set_seed(args.seed)
        trainer = cls(
            model=text_model(0.0),
            args=args,
            train_dataset=data,
            eval_dataset=data,
            data_collator=transformers.default_data_collator,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=keep_best,
        )
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        trainer.create_model_card(tasks="text-generation")
        return trainer

    theirs = run(transformers.Trainer, transformers.TrainingArguments)
    ours = run(Trainer, TrainingArguments)
    names = ("loss", "grad_norm", "eval_loss", "eval_accuracy")
    for mine, other in zip(losses(ours, names), losses(theirs, names), strict=True):
        assert mine[:2] == other[:2]
        assert mine[2] == pytest.approx(other[2], rel=1e-4)
    outs = [Path(trainer.args.output_dir) for trainer in (theirs, ours)]
    files = [{path.name for path in out.iterdir()} for out in outs]
    assert files[0] <= files[1]
    results = [json.loads((out / "all_results.json").read_text()) for out in outs]
    assert results[0].keys() <= results[1].keys()
    checkpoint = str(outs[1] / "checkpoint-2")
    again = run(Trainer, TrainingArguments, "--resume_from_checkpoint", checkpoint)
    assert_equal_runs(ours, again, names)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("muon_lr", r"muon_lr in optim_args must be a number, got ''"),
        ("muon_lr=-1", "muon_lr in optim_args must be at least 0, got -1.0"),
        ("lr=0.1", "optim_args must be NAME=VALUE,.. of muon_lr, .*, got 'lr=0.1'"),
        ("nesterov=1", "nesterov in optim_args must be true or false, got '1'"),
        ("ns_dtype=fp8", "ns_dtype in optim_args must be bfloat16 or float32, got 'fp8'"),
        ("momentum=2", "momentum must be at least 0 and below 1, got 2.0"),
        ("adjust_lr_fn=none", "adjust_lr_fn must be None, 'original', .* got 'none'"),
    ],
)
def test_bad_arguments_of_muon_are_named(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        text_trainer(tmp_path, optim="muon", optim_args=given).create_optimizer()


def test_muon_is_refused_where_it_cannot_be(tmp_path):
    class Plain(torch.nn.Linear):
        pass

    trainer = Trainer(Plain(3, 4), arguments(tmp_path, optim="muon"), train_dataset=text_data())
    with pytest.raises(ValueError, match="head must be given, got None for a Plain"):
        trainer.create_optimizer()
    trainer = text_trainer(tmp_path, optim="muon")
    trainer.args.deepspeed = {"zero_optimization": {}}
    with pytest.raises(ValueError, match=r"deepspeed must be left out with optim='muon'.*whole"):
        trainer.create_optimizer()


def test_a_script_may_put_ours_in_the_place_of_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers, "Trainer", Trainer)
    trainer = text_trainer(tmp_path, max_steps=1)
    trainer.create_optimizer()
    assert isinstance(trainer.optimizer, bigkernel.optim.AdamW)


class Gradients(transformers.TrainerCallback):
    """The norm of the gradients beside each step."""

    def __init__(self):
        self.norms = []

    def note(self, model):
        self.norms.append(
            float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        )


class Before(Gradients):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.note(model)


class After(Gradients):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.note(model)


@pytest.mark.parametrize("kind", [Before, After])
def test_callbacks_beside_the_step_see_clipped_gradients(tmp_path, kind):
    runs = []
    for cls in (transformers.Trainer, Trainer):
        seen = kind()
        trainer = text_trainer(
            tmp_path,
            cls,
            dropout=0.0,
            trainer={"callbacks": [seen]},
            max_steps=4,
            max_grad_norm=0.05,
            logging_strategy="epoch",
        )
        trainer.train()
        runs.append((seen.norms, losses(trainer, ("loss", "grad_norm")), parameters(trainer)))
    (expected, their_logs, theirs), (actual, our_logs, ours) = runs
    assert max(expected) == pytest.approx(0.05, rel=1e-3)
    assert actual == pytest.approx(expected, rel=1e-4)
    assert [log[:2] for log in our_logs] == [log[:2] for log in their_logs]
    for (_, _, a), (_, _, b) in zip(our_logs, their_logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-4)


def test_clipping_goes_on_after_a_callback_that_fails_or_goes(tmp_path):
    class Fails(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            raise KeyError("mine")

    plain = text_trainer(tmp_path, dropout=0.0, max_steps=3, max_grad_norm=0.05)
    plain.train()
    trainer = text_trainer(tmp_path, dropout=0.0, max_steps=3, max_grad_norm=0.05)
    callback = Fails()
    trainer.add_callback(callback)
    with pytest.raises(KeyError, match="mine"):
        trainer.train()
    trainer.remove_callback(callback)
    trainer.train()
    assert trainer.optimizer.optimizer.max_grad_norm == 0.05
    assert_equal_runs(trainer, plain)


def test_the_list_of_callbacks_is_transformers_own(tmp_path):
    def kinds(trainer):
        return [type(callback) for callback in trainer.callback_handler.callbacks]

    theirs = kinds(text_trainer(tmp_path, transformers.Trainer))
    assert kinds(text_trainer(tmp_path)) == theirs


def test_models_that_share_a_config_are_not_switched_by_a_trainer(tmp_path):
    model = text_model()
    other = type(model)(model.config)
    config = model.config
    Trainer(model, arguments(tmp_path), train_dataset=text_data())
    assert other.config is config
    assert config._attn_implementation == "sdpa"
    assert model.config._attn_implementation.startswith("bigkernel")


class Pairs(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        ids = torch.arange(index, index + 5) % 20 + 2
        return {"input_ids": ids, "labels": ids.flip(0)}


def test_seq2seq_trainer_generates_as_transformers(tmp_path):
    config = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    kinds = [
        (transformers.Seq2SeqTrainer, transformers.Seq2SeqTrainingArguments),
        (bigkernel.Seq2SeqTrainer, bigkernel.Seq2SeqTrainingArguments),
    ]
    results = []
    for cls, own in kinds:
        torch.manual_seed(0)
        options = {
            **{"predict_with_generate": True, "generation_max_length": 7},
            **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"},
            **{"eval_steps": 2, "include_num_input_tokens_seen": True},
        }
        trainer = cls(
            transformers.T5ForConditionalGeneration(config),
            arguments(tmp_path / cls.__module__, own, **options),
            train_dataset=Pairs(),
            eval_dataset=Pairs(),
            compute_metrics=lambda p: {"first": float(p.predictions[:, 1].sum())},
        )
        trainer.train()
        prediction = trainer.predict(Pairs(), max_length=6)
        results.append((trainer, prediction))
    (theirs, expected), (ours, actual) = results
    assert isinstance(ours, Trainer)
    assert isinstance(ours.optimizer.optimizer, bigkernel.optim.AdamW)
    assert actual.predictions.shape == expected.predictions.shape
    assert (actual.predictions == expected.predictions).all()
    for a, b in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert set(a) - {"tokens_per_second", "memory_bytes"} == set(b)
        for name in ("loss", "eval_loss", "grad_norm", "eval_first", "num_input_tokens_seen"):
            assert (name in a) == (name in b)
            assert name not in a or a[name] == pytest.approx(b[name], rel=1e-4), name
    checkpoint.verify_checkpoint(tmp_path / "bigkernel.trainer" / "checkpoint-4")


def test_seq2seq_trainer_without_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = bigkernel.Seq2SeqTrainer(text_model(), train_dataset=text_data())
    assert type(trainer.args) is bigkernel.Seq2SeqTrainingArguments


# Augmentation


def test_augmentation_is_for_training_and_keyed_by_sample(tmp_path):
    trainer = image_trainer(
        tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=6
    )
    trainer.train()
    calls = trainer.augmentation.calls
    epochs = [calls[:4], calls[4:]]
    assert [
        sorted(functools.reduce(operator.iadd, (ids for _, ids, _ in epoch), []))
        for epoch in epochs
    ] == [[*range(20)]] * 2
    seeds = [{seed for seed, _, _ in epoch} for epoch in epochs]
    assert len(seeds[0]) == len(seeds[1]) == 1
    assert seeds[0] != seeds[1]
    trainer.evaluate()
    assert len(trainer.augmentation.calls) == 8
    other = image_trainer(tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=3)
    other.train()
    assert {seed for seed, _, _ in other.augmentation.calls} == seeds[0] | seeds[1]
    reseeded = image_trainer(tmp_path, max_steps=1, data_seed=7)
    reseeded.train()
    assert reseeded.augmentation.calls[0][0] not in seeds[0] | seeds[1]


def test_augmentation_of_images_of_different_sizes(tmp_path):
    sizes = [(8, 9), (12, 8), (10, 10), (8, 8)]
    images = [torch.full((1, h, w), 9, dtype=torch.uint8) for h, w in sizes]
    data = ImageDataset(ImageData(images, torch.tensor([0, 1, 2, 0]), ["a", "b", "c"], "r", ""))

    def crop(images, generator=None, ids=None):
        return torch.stack([image[:, :8, :8] / 255.0 for image in images])

    trainer = Trainer(
        image_model(),
        arguments(tmp_path, max_steps=2, remove_unused_columns=False),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate_images,
        augmentation=crop,
        eval_augmentation=crop,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_images_without_sample_ids_are_numbered(tmp_path):
    class Bare(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {"pixel_values": torch.zeros(1, 8, 8), "labels": index % 3}

    noise = Noise()
    trainer = Trainer(
        image_model(), arguments(tmp_path, max_steps=5), train_dataset=Bare(), augmentation=noise
    )
    trainer.train()
    assert [ids for _, ids, _ in noise.calls] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert len({seed for seed, _, _ in noise.calls}) == 1


def test_evaluation_does_not_count_among_the_images_of_training():
    runner, images, seen = BatchAugmentation(0), torch.zeros(2, 1, 4, 4), []

    def note(images, generator, ids):
        seen.append((generator.initial_seed(), ids.tolist()))
        return images

    for epoch in (0, None, 0, None, 1):
        runner(note, images, None, epoch)
    assert [ids for _, ids in seen] == [[0, 1], [0, 1], [2, 3], [0, 1], [4, 5]]
    assert seen[1] == seen[3]
    assert seen[0] != seen[1]
    assert runner.state_dict() == {"seed": 0, "seen": 6}


def test_augmentation_must_give_float_images_of_one_size():
    images, ids = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.arange(2)
    runner = BatchAugmentation(0)
    with pytest.raises(ValueError, match=r"must give float images, got torch\.uint8"):
        runner(lambda images, generator, ids: images, images, ids, 0)
    with pytest.raises(ValueError, match=r"one \[N, C, H, W\] tensor, got list"):
        runner(lambda images, generator, ids: list(images), images, ids, 0)


# Resuming


@pytest.mark.parametrize(
    ("accumulate", "optim"), [(1, "adamw_torch"), (2, "adamw_torch"), (1, "muon")]
)
def test_resumed_text_run_is_the_uninterrupted_one(tmp_path, told, accumulate, optim):
    # Nine steps over more than one epoch, logs every 2 and checkpoints every 3 steps, evaluation
    # in between: nothing falls on the same step by itself.
    options = {
        "max_steps": 9,
        "logging_steps": 2,
        "save_steps": 3,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "eval_steps": 4,
        "gradient_accumulation_steps": accumulate,
        "per_device_train_batch_size": 4,
        "optim": optim,
    }
    whole = text_trainer(tmp_path / "a", **options)
    whole.train()
    assert whole.state.epoch > 1
    for step in (3, 6):
        resumed = text_trainer(tmp_path / f"b{step}", **options)
        losses = noted_losses(resumed)
        result = resumed.train(resume_from_checkpoint=tmp_path / "a" / f"checkpoint-{step}")
        assert_equal_runs(resumed, whole)
        # The average of the steps of this call, without what the checkpoint had summed up.
        assert result.training_loss == pytest.approx(float(sum(losses)) / (9 - step), rel=1e-5)
    assert [text for text in told if "resuming from" in text]


def test_resumed_image_run_is_the_uninterrupted_one(tmp_path, told):
    options = {
        "dropout": 0.1,
        "max_steps": -1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "epoch",
    }
    whole = image_trainer(tmp_path / "a", **options)
    whole.train()
    for step in (2, 4):  # 4 is the end of the first epoch
        resumed = image_trainer(tmp_path / f"b{step}", seed=42, **options)
        resumed.train(resume_from_checkpoint=tmp_path / "a" / f"checkpoint-{step}")
        # The checkpoint at the end of an epoch is older than that epoch's evaluation.
        assert_equal_runs(resumed, whole, ("loss", "grad_norm"))
        assert resumed.augmentation.calls == whole.augmentation.calls[step:]


def test_a_cut_off_checkpoint_is_passed_over(tmp_path, told):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = text_trainer(tmp_path, **options)
    whole.train()
    for step, name in ((6, "optimizer.pt"), (4, "model.safetensors")):
        file = tmp_path / f"checkpoint-{step}" / name
        file.write_bytes(file.read_bytes()[:-10])
    resumed = text_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint="auto")
    assert_equal_runs(resumed, whole)
    assert ["damaged" in text for text in told] == [True, True, False]
    assert "checkpoint-6 is damaged: optimizer.pt has" in told[0]
    assert told[2].startswith("resuming from")
    assert told[2].endswith("checkpoint-2.")
    checkpoint.verify_checkpoint(tmp_path / "checkpoint-6")


def test_auto_starts_anew_where_there_is_nothing(tmp_path, told):
    text_trainer(tmp_path, max_steps=1).train(resume_from_checkpoint="auto")
    assert "starting anew" in told[0]
    with pytest.raises(ValueError, match="train without resuming first"):
        text_trainer(tmp_path, max_steps=1).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_transformers_own_trainer(tmp_path, told):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "dropout": 0.0}
    theirs = text_trainer(tmp_path / "a", transformers.Trainer, **options)
    theirs.train()
    ours = text_trainer(tmp_path / "b", **options)
    ours.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for (step, name, a), (_, _, b) in zip(losses(ours), losses(theirs), strict=True):
        assert a == pytest.approx(b, rel=1e-4), (step, name)
    back = text_trainer(tmp_path / "c", transformers.Trainer, **options)
    back.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-6"))


@pytest.mark.parametrize("task", [text_trainer, image_trainer], ids=["text", "images"])
def test_rotation_and_best_model(tmp_path, task):
    trainer = task(
        tmp_path,
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    kept = [path.name for path in checkpoint.find_checkpoints(tmp_path)]
    assert len(kept) <= 3
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    loaded = type(trainer.model).from_pretrained(best)
    for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob(".*"))


def test_a_clock_that_goes_back_leaves_the_last_steps(tmp_path):
    class ClockGoesBack(transformers.TrainerCallback):
        """Each checkpoint seems an hour older than the one before."""

        def on_save(self, args, state, control, **_):
            then = 1e9 - 3600 * state.global_step
            os.utime(tmp_path / f"checkpoint-{state.global_step}", (then, then))

    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    for steps, resume in ((5, None), (7, True)):
        trainer = text_trainer(
            tmp_path, max_steps=steps, trainer={"callbacks": [ClockGoesBack()]}, **options
        )
        trainer.train(resume_from_checkpoint=resume)
        kept = [path.name for path in checkpoint.find_checkpoints(tmp_path)]
        assert kept == [f"checkpoint-{steps}", f"checkpoint-{steps - 1}"]


def test_weights_that_do_not_fit_are_refused(tmp_path, told):
    image_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = image_trainer(tmp_path, max_steps=2)
    other.model.classifier = torch.nn.Linear(16, 5)
    other.model.config.num_labels = 5
    with pytest.raises(CheckpointError, match="do not fit a ViTForImageClassification"):
        other.train(resume_from_checkpoint=True)


# Accidents


def killed_while_saving(out, optim="adamw_torch"):
    """Train, and die by kill -9 while the checkpoint of step 4 is half written."""
    torch.set_num_threads(1)

    class Killed(Trainer):
        def _save_rng_state(self, output_dir):
            if self.state.global_step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            super()._save_rng_state(output_dir)

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": optim}
    text_trainer(out, Killed, **options).train()


def killed_while_saving_muon(out):
    killed_while_saving(out, "muon")


def interrupted(out):
    """Train, and get Ctrl-C in step 3."""
    torch.set_num_threads(1)

    class CtrlC(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    text_trainer(out, max_steps=6, trainer={"callbacks": [CtrlC()]}).train()


def in_another_process(function, out, **options):
    tests = os.path.dirname(__file__)
    path = f"import sys; sys.path.insert(0, {tests!r})"
    code = f"{path}; import test_trainer as t; t.{function}({str(out)!r})"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(tests),
        check=False,
        **options,
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "muon"])
def test_kill_9_while_saving_then_resume_bit_for_bit(tmp_path, told, optim):
    function = "killed_while_saving_muon" if optim == "muon" else "killed_while_saving"
    done = in_another_process(function, tmp_path / "run")
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(os.listdir(tmp_path / "run"))
    assert left == [".checkpoint-4.partial", ".lock", "checkpoint-2"]
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": optim}
    resumed = text_trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint="auto")
    whole = text_trainer(tmp_path / "whole", **options)
    whole.train()
    assert_equal_runs(resumed, whole)
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_ctrl_c_saves_and_ends_as_ctrl_c_does(tmp_path, told):
    done = in_another_process("interrupted", tmp_path / "run")
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "finishing this step, then saving" in done.stderr
    assert "interrupted after step 3; saved" in done.stderr
    resumed = text_trainer(tmp_path / "run", max_steps=6)
    resumed.train(resume_from_checkpoint="auto")
    whole = text_trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    assert_equal_runs(resumed, whole)


class Signals(transformers.TrainerCallback):
    def __init__(self, count):
        self.count = count

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for _ in range(self.count):
                signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_an_exception_with_the_step_and_the_checkpoint(tmp_path, told):
    text_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, seed=1).train()
    before = (tmp_path / "checkpoint-2" / "manifest.json").read_text()
    trainer = text_trainer(tmp_path, trainer={"callbacks": [Signals(1)]})
    with pytest.raises(TrainingInterrupted, match="after step 2") as caught:
        trainer.train()
    assert caught.value.step == 2
    assert caught.value.checkpoint == tmp_path / "checkpoint-2"
    checkpoint.verify_checkpoint(caught.value.checkpoint)
    # Not the one that an earlier run left under the same name.
    assert (tmp_path / "checkpoint-2" / "manifest.json").read_text() != before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not trainer.is_in_train


def test_ctrl_c_twice_stops_at_once(tmp_path, told):
    with pytest.raises(KeyboardInterrupt) as caught:
        text_trainer(tmp_path, trainer={"callbacks": [Signals(2)]}).train()
    assert not isinstance(caught.value, TrainingInterrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        text_trainer(tmp_path, trainer={"callbacks": [Signals(1)]}, save_on_interrupt=False).train()
    assert not isinstance(caught.value, TrainingInterrupted)
    assert checkpoint.find_checkpoints(tmp_path) == []


SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT]
MOMENTS = ["on_train_begin", "on_step_end", "on_prediction_step", "on_save", "on_train_end"]


class Signalled(transformers.TrainerCallback):
    """Raises a signal at one of the trainer's events, the first time that step 2 is reached."""

    def __init__(self, number, moment):
        self.number, self.moment = number, moment

    def on_event(self, moment, args, state, control, **kwargs):
        if self.moment == moment and (state.global_step >= 2 or moment == "on_train_begin"):
            self.moment = None
            signal.raise_signal(self.number)


for _moment in MOMENTS:
    setattr(Signalled, _moment, functools.partialmethod(Signalled.on_event, _moment))


SIGNALLED = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
}


@pytest.fixture(scope="module")
def signalled(tmp_path_factory):
    """A run that no signal reached."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # the tests run under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)
    trainer = text_trainer(tmp_path_factory.mktemp("whole"), **SIGNALLED)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGTERM, moment) for moment in MOMENTS] + [(n, "on_step_end") for n in SIGNALS[1:]],
    ids=str,
)
def test_a_signal_saves_and_the_run_goes_on(tmp_path, told, signalled, number, moment):
    """Whenever it comes; an evaluation is left at once and made up for."""
    before = signal.getsignal(number)
    trainer = text_trainer(
        tmp_path, trainer={"callbacks": [Signalled(number, moment)]}, **SIGNALLED
    )
    name = "" if number == signal.SIGINT else f" by {number.name}"
    step = {"on_train_begin": 1, "on_train_end": 6}.get(moment, 2)
    with pytest.raises(
        TrainingInterrupted, match=f"interrupted{name} after step {step};"
    ) as caught:
        trainer.train()
    assert (caught.value.signal, caught.value.code) == (number, 128 + number)
    checkpoint.verify_checkpoint(caught.value.checkpoint)
    assert sum("finishing this step" in text for text in told) == 1
    assert signal.getsignal(number) is before
    if moment == "on_prediction_step":
        assert not losses(trainer, ["eval_loss"])
    resumed = text_trainer(tmp_path, **SIGNALLED)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_runs(resumed, signalled)
    assert resumed.state.best_global_step == signalled.state.best_global_step
    for path in checkpoint.find_checkpoints(tmp_path):
        checkpoint.verify_checkpoint(path)


def signalled_in_group(out):
    """Train with workers, and get SIGTERM in step 3 together with them, from another process."""
    torch.set_num_threads(1)

    class Group(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                # Of their parent's own signal torch's workers would end as if all were well.
                subprocess.run(["kill", "-TERM", "--", f"-{os.getpgid(0)}"], start_new_session=True)

    text_trainer(
        out, max_steps=6, dataloader_num_workers=2, trainer={"callbacks": [Group()]}
    ).train()


def test_a_signal_to_the_whole_group_finds_the_workers_prepared(tmp_path, told):
    done = in_another_process("signalled_in_group", tmp_path, start_new_session=True)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert "interrupted by SIGTERM after step 3; saved" in done.stderr
    assert [path.name for path in checkpoint.find_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_handlers_of_the_user_are_left_alone(tmp_path, told):
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        callbacks = [Signalled(signal.SIGUSR1, "on_step_end")]
        text_trainer(tmp_path, max_steps=4, trainer={"callbacks": callbacks}).train()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_trains_in_another_thread(tmp_path, told):
    trainer = text_trainer(tmp_path, max_steps=2)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 2


def test_a_second_writer_is_refused(tmp_path, told):
    text_trainer(tmp_path, max_steps=1, save_strategy="steps").train()
    before = sorted(os.listdir(tmp_path))
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with writing_to(tmp_path):
            os.write(tell, b".")
            time.sleep(60)
        os._exit(1)
    os.read(ready, 1)
    try:
        for resume in (None, True):
            with pytest.raises(RunLockedError, match=rf"is being written by process {pid} on"):
                text_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=resume)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    (tmp_path / ".lock").unlink()
    assert sorted(os.listdir(tmp_path)) == before


# What its user has changed


@pytest.mark.parametrize(
    "gone", [["scheduler.pt"], ["optimizer.pt"], ["optimizer.pt", "scheduler.pt"]]
)
def test_what_is_left_of_optimizer_and_schedule_is_used(tmp_path, told, gone):
    """transformers loads both or neither, and starts the schedule from its beginning."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "warmup_steps": 4}
    whole = text_trainer(tmp_path, **options)
    whole.train()
    for name in gone:
        (tmp_path / "checkpoint-3" / name).unlink()
    resumed = text_trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert losses(resumed, ["learning_rate"]) == losses(whole, ["learning_rate"])
    assert all(f"{name} is missing" in told[0] for name in gone)
    if gone == ["scheduler.pt"]:
        assert_equal_runs(resumed, whole)
    else:
        assert losses(resumed)[6] == losses(whole)[6]  # before the first step without moments
        assert losses(resumed)[-1] != losses(whole)[-1]


def test_resharded_weights_and_an_edited_state_go_on(tmp_path, told):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = text_trainer(tmp_path, **options)
    whole.train()
    folder = tmp_path / "checkpoint-3"
    model = type(whole.model).from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**state, "trial_name": "mine"}))
    resumed = text_trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=folder)
    assert_equal_runs(resumed, whole)
    assert "model.safetensors is missing, the weights are in other files" in told[0]
    assert "trainer_state.json has been edited" in told[0]


def test_weights_that_lack_some_are_refused(tmp_path, told):
    from safetensors.torch import load_file, save_file

    text_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(file)
    lost = weights.pop("model.layers.0.mlp.up_proj.weight")
    assert lost.numel()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of .* model\.layers\.0\.mlp\.up_proj"):
        text_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=file.parent)


def test_a_moved_run_ends_with_its_best_model(tmp_path, told):
    class Worse(Trainer):
        """Each evaluation is worse than the one before, so the first checkpoint is the best."""

        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            return {**metrics, "eval_loss": float(self.state.global_step)}

    options = {**SIGNALLED, "save_total_limit": 2}
    whole = text_trainer(tmp_path / "a", Worse, **options)
    whole.train()
    assert whole.state.best_model_checkpoint == str(tmp_path / "a" / "checkpoint-2")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    for moved in (tmp_path / "copy", (tmp_path / "a").rename(tmp_path / "b")):
        resumed = text_trainer(moved, Worse, **options)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.best_model_checkpoint == str(moved / "checkpoint-2")
        for x, y in zip(parameters(resumed), parameters(whole), strict=True):
            assert torch.equal(x, y)
    assert not [text for text in told if "is gone" in text]
    shutil.rmtree(tmp_path / "b" / "checkpoint-2")
    text_trainer(tmp_path / "b", Worse, **options).train(resume_from_checkpoint=True)
    assert [text for text in told if "the best checkpoint so far" in text and "is gone" in text]


# What cannot be saved


class Plain(torch.nn.Module):
    """A model of one's own, with one parameter under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(259, 8)
        self.head = torch.nn.Linear(8, 259, bias=False)
        self.head.weight = self.embed.weight
        self.turned = torch.nn.Parameter(torch.randn(8, 8).t())  # not contiguous

    def forward(self, input_ids, labels=None, **_):
        logits = self.head(self.embed(input_ids) @ self.turned)
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class Extra(Plain):
    def get_extra_state(self):
        return "not a tensor"

    def set_extra_state(self, state):
        pass


def plain_trainer(out, model, **changes):
    row = torch.arange(16)
    rows = [{"input_ids": row + i, "labels": row + i} for i in range(20)]
    return Trainer(model, arguments(out, **changes), train_dataset=rows)


def test_tied_weights_of_a_plain_module_are_saved_and_go_on(tmp_path, told):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = plain_trainer(tmp_path / "a", Plain(), **options)
    whole.train()
    resumed = plain_trainer(tmp_path / "b", Plain(), **options)
    resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-3")
    assert_equal_runs(resumed, whole)
    assert resumed.model.head.weight is resumed.model.embed.weight
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "a" / "checkpoint-6" / "model.safetensors")
    Plain().load_state_dict(saved)  # strictly
    assert torch.equal(saved["turned"], whole.model.turned)


def unsaveable(kind, out):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    if kind == "model.safetensors":
        return plain_trainer(out, Extra(), **options)
    trainer = text_trainer(out, **options)
    if kind == "generation_config.json":
        trainer.model.generation_config.do_sample = False
        trainer.model.generation_config.temperature = 0.3
    elif kind == "config.json":
        trainer.model.config.note = object()
    elif kind == "tokenizer_config.json":
        trainer.processing_class = build_tokenizer("bytes")
        trainer.processing_class.init_kwargs["note"] = object()
    elif kind == "training_args.bin":
        trainer.args.note = lambda: None
    elif kind == "trainer_state.json":

        class Stateful(transformers.TrainerCallback, transformers.trainer_callback.ExportableState):
            def state(self):
                return {"args": {"x": object()}, "attributes": {}}

        trainer.add_callback(Stateful())
    elif kind == "optimizer.pt":
        trainer.create_optimizer().param_groups[0]["note"] = lambda: None
    elif kind == "scheduler.pt":
        trainer.create_optimizer()
        scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0)
        scheduler.note = lambda: None
        trainer.lr_scheduler = scheduler
    return trainer


@pytest.mark.parametrize(
    "kind",
    [
        "generation_config.json",
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
        "training_args.bin",
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
    ],
)
def test_what_cannot_be_saved_is_named_before_the_first_step(tmp_path, told, kind):
    trainer = unsaveable(kind, tmp_path)
    with pytest.raises(CheckpointError, match=f"^{kind} could not be saved, so there would be no"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert os.listdir(tmp_path) == []
    free = unsaveable(kind, tmp_path)
    free.args.save_strategy = transformers.trainer_utils.SaveStrategy.NO
    free.train()  # nothing is to be saved


def test_a_signal_that_cannot_save_says_so(tmp_path, told):
    """Without checkpoints nothing was tried before; the reason is the end's, not a traceback's."""
    callbacks = {"callbacks": [Signalled(signal.SIGTERM, "on_step_end")]}
    trainer = text_trainer(tmp_path, trainer=callbacks)
    trainer.model.config.note = object()
    with pytest.raises(
        CheckpointError, match=r"by SIGTERM after step 2, and .* could not be saved"
    ):
        trainer.train()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_matters_where_something_is_saved(
    tmp_path, told, monkeypatch
):
    trainer = text_trainer(tmp_path, max_steps=2)

    def read_only(*_):
        raise CheckpointError("read-only file system")

    monkeypatch.setattr("bigkernel.run_lock._take", read_only)
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(CheckpointError, match="read-only"):
        text_trainer(tmp_path, max_steps=2, save_strategy="steps").train()


@pytest.mark.parametrize("optim", ["adamw_torch", "muon"])
def test_a_disk_without_room_is_refused_before_the_first_step(tmp_path, told, monkeypatch, optim):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "optim": optim}
    trainer = text_trainer(tmp_path, **options)
    needed = 3 * sum(p.nbytes for p in trainer.model.parameters())
    if optim == "muon":  # one momentum in the place of two moments
        groups = bigkernel.optim.muon_groups(trainer.model)
        needed -= sum(p.nbytes for g in groups if g["use_muon"] for _, p in g["params"])
    usual = shutil.disk_usage(tmp_path)

    def left(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usual._replace(free=free))

    left(needed - 1)
    with pytest.raises(CheckpointError, match=r"0\.\d MB free, and a checkpoint takes about 0\.\d"):
        trainer.train()
    assert os.listdir(tmp_path) == []
    left(needed)
    text_trainer(tmp_path, **options).train()


class Poisoned(Trainer):
    """The loss of step 4 is NaN."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == 3:
            self.before = parameters(self)
            loss = loss * float("nan")
        return loss


def test_a_loss_that_is_not_finite_stops_after_the_last_good_checkpoint(tmp_path, told):
    trainer = text_trainer(tmp_path, Poisoned, save_strategy="steps", save_steps=2)
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 4; .*checkpoint-2") as e:
        trainer.train()
    assert e.value.step == 4
    assert e.value.last_checkpoint == tmp_path / "checkpoint-2"
    for a, b in zip(trainer.before, parameters(trainer), strict=True):
        assert torch.equal(a, b)
    assert len(checkpoint.find_checkpoints(tmp_path)) == 1
    with pytest.raises(NonFiniteLossError, match="there is no checkpoint yet"):
        text_trainer(tmp_path / "other", Poisoned).train()
    off = text_trainer(tmp_path / "off", Poisoned, stop_on_nonfinite_loss=False, max_steps=4)
    off.train()


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, told):
    class Broken(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 4:
                model.lm_head.weight.data[0, 0] = float("inf")

    options = {"save_strategy": "steps", "save_steps": 2, "trainer": {"callbacks": [Broken()]}}
    with pytest.raises(NonFiniteLossError, match=r"lm_head.* after step 4; .*checkpoint-2"):
        text_trainer(tmp_path, **options).train()
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, told, monkeypatch):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    sync = os.fsync

    def full(descriptor):
        if "checkpoint-4" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written: no space left"):
        text_trainer(tmp_path, **options).train()
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    monkeypatch.setattr(os, "fsync", sync)
    resumed = text_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint="auto")
    whole = text_trainer(tmp_path / "whole", **options)
    whole.train()
    assert_equal_runs(resumed, whole)


def test_a_checkpoint_holds_what_is_documented(tmp_path):
    trainer = text_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.processing_class = build_tokenizer("bytes")
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(listed) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {"model.safetensors", "tokenizer.json", "bigkernel_state.json"} <= set(listed)
    state = json.loads((folder / "bigkernel_state.json").read_text())
    assert state["augmentation"] == {"seed": 42, "seen": 0}
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder)


RANKS = """
import json, sys
from pathlib import Path
import test_trainer

trainer = test_trainer.text_trainer(
    sys.argv[1], dropout=0.1, max_steps=4, save_strategy="steps", save_steps=2
)
trainer.train(resume_from_checkpoint="auto")
if trainer.is_world_process_zero():
    Path(sys.argv[1], "losses.json").write_text(json.dumps(test_trainer.losses(trainer)))
"""


# Not by the end of the interpreter, which aborts a process in which one of gloo's threads wants the
# interpreter's lock once more; DistributedDataParallel keeps them beyond the group.
LEAVE = """
import os, sys, torch
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def on_two_ranks(tmp_path, code, *arguments):
    script = tmp_path / "ranks.py"
    script.write_text(code + LEAVE)
    here = os.path.dirname(__file__)
    path = os.pathsep.join((here, os.path.dirname(here)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node", "2", str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # test_ranks.py goes on in one process, and from one, in every run
def test_two_processes_write_one_checkpoint_and_go_on_from_it(tmp_path):
    """Every process writes its part to the folder that the first puts in place."""
    run = tmp_path / "run"

    def train():
        on_two_ranks(tmp_path, RANKS, run)
        return json.loads((run / "losses.json").read_text())

    whole = train()
    assert [step for step, name, _ in whole if name == "loss"] == [1, 2, 3, 4]
    last = run / "checkpoint-4"
    checkpoint.verify_checkpoint(last)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in last.iterdir()}
    assert sorted(os.listdir(run)) == ["checkpoint-2", "checkpoint-4", "losses.json"]
    (last / "optimizer.pt").write_bytes(b"cut off")
    assert train() == whole
