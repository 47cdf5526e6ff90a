"""The command line: every command, every complaint and its exit code.

Feature -> test: train text -> test_text_run_leaves_everything; train images ->
test_image_run_leaves_everything; generate -> test_generate_*; evaluate -> test_evaluate_*;
env -> test_env_*; python -m bigkernel -> test_module_is_the_command; --config ->
test_config_repeats_the_run; --force, --out -> test_a_run_is_not_overwritten; --init-from ->
test_init_from_*; bad input -> test_bad_usage, test_bad_text, test_bad_images. Resuming and Ctrl-C
are in test_cli_resume.py, settings and augmentation files in test_cli_settings.py.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from PIL import Image
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

import bigkernel
from bigkernel import optim
from bigkernel.cli import main
from bigkernel.cli.errors import guarded
from bigkernel.cli.progress import TerminalProgress
from bigkernel.recipes import UsageError, presets, progress, report, text
from bigkernel.recipes.settings import read_document

TINY_TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
TINY_VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
}
WORDS = "the quick brown fox jumps over the lazy dog and runs away from the small hill\n"


def sentence_of(captured: str) -> str:
    """The one line of complaint, checked to be one."""
    lines = [line for line in captured.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, captured
    assert "Traceback" not in captured
    return lines[0].removeprefix("Error: ")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, tiny configs, and one finished text run in ``run``."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "corpus.txt").write_text(WORDS * 40)
    (folder / "tiny.json").write_text(json.dumps(TINY_TEXT))
    assert main(train_text(folder, "run")) == 0
    return folder


def train_text(folder: Path, out: str, *more: str) -> list[str]:
    """Arguments of a text run that takes a moment."""
    return [
        *("train", "text", "--data", str(folder / "corpus.txt")),
        *("--model", str(folder / "tiny.json"), "--out", str(folder / out)),
        *("--max-length", "32", "--batch-size", "4", "--max-steps", "8", "--threads", "1"),
        *more,
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes, one unreadable image among them, and one finished image run."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for name, level in (("dark", 40), ("bright", 200)):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(12):
            noise = torch.randint(-30, 30, (14, 16 + number, 3), generator=generator)
            pixels = (noise + level).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / "data" / name / f"{number}.png")
    (folder / "data" / "dark" / "broken.png").write_bytes(b"\x89PNG no more")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY_VIT))
    with pytest.warns(UserWarning, match=r"broken.png \(not an image\)"):
        assert main(train_images(folder, "run")) == 0
    return folder


def train_images(folder: Path, out: str, *more: str) -> list[str]:
    """Arguments of an image run that takes a moment."""
    return [
        *("train", "images", "--data", str(folder / "data")),
        *("--model", str(folder / "tiny.yaml"), "--out", str(folder / out)),
        *("--image-size", "8", "--batch-size", "8", "--max-steps", "12", "--lr", "3e-3"),
        *("--augment", "photos-strong", "--threads", "1"),
        *more,
    ]


def test_text_run_leaves_everything(texts: Path) -> None:
    run = texts / "run"
    model = AutoModelForCausalLM.from_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert model.config.hidden_size == 32
    assert tokenizer.decode(tokenizer("fox 狐")["input_ids"]) == "fox 狐"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    wanted = {"loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "mfu"}
    assert wanted <= steps[-1].keys()
    assert any("eval_loss" in r for r in records)
    with Image.open(run / "loss.png") as image:
        assert image.width > 300
    assert (run / "sample.txt").read_text().startswith("The ")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["command"] == "train text"
    assert config["model"] == TINY_TEXT  # the file's content: the file may change or go
    assert len(config["record"]["sha256"]) == 64
    card = (run / "README.md").read_text()
    assert "bits per byte" in card
    assert "from_pretrained" in card
    assert not list(run.glob("*.bin")), "nothing that would need unpickling"


def test_image_run_leaves_everything(pictures: Path) -> None:
    run = pictures / "run"
    model = AutoModelForImageClassification.from_pretrained(run)
    assert model.config.id2label == {0: "bright", 1: "dark"}
    assert json.loads((run / "labels.json").read_text()) == ["bright", "dark"]
    assert json.loads((run / "preprocessor_config.json").read_text())["size"]["height"] == 8
    for name in ("loss.png", "sample.png", "confusion_matrix.png", "roc_curves.png"):
        with Image.open(run / name) as image:
            assert image.width > 100, name
    record = yaml.safe_load((run / "config.yaml").read_text())["record"]
    assert record["skipped"] == 1
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "images_per_second" in steps[0]
    assert "roc auc" in (run / "README.md").read_text()


def test_a_recipe_file_is_used_and_kept(pictures: Path) -> None:
    recipe = pictures / "recipe.yaml"
    recipe.write_text("- RandomRotation: {degrees: [90, 90]}\n- RandomVerticalFlip: {p: 1.0}\n")
    arguments = train_images(pictures, "recipe", "--augment", str(recipe), "--max-steps", "2")
    assert main(arguments) == 0
    config = yaml.safe_load((pictures / "recipe" / "config.yaml").read_text())
    assert config["augment"] == [
        {"RandomRotation": {"degrees": [90, 90]}},
        {"RandomVerticalFlip": {"p": 1.0}},
    ]
    grids = [(pictures / run / "sample.png").read_bytes() for run in ("run", "recipe")]
    assert grids[0] != grids[1]


def test_dtype_is_what_is_computed_in(texts: Path) -> None:
    assert main(train_text(texts, "bf16", "--dtype", "bfloat16")) == 0
    first = [
        json.loads((texts / run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for run in ("run", "bf16")
    ]
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=1e-2)


def test_shown_while_training(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train_text(texts, "shown")) == 0
    out = capsys.readouterr().out
    for part in ("replaced", "step 8/8", "loss", "lr", "grad_norm", "tokens/s", "left"):
        assert part in out, part
    assert re.search(r"\d [MG]iB ", out), "memory"  # GiB where other tests have filled it
    assert "nats per byte" in out
    assert str(texts / "shown") in out


OPTIMIZERS = {
    "adamw": optim.AdamW,
    "adam": optim.Adam,
    "sgd": torch.optim.SGD,
    "muon": optim.Muon,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_other_optimizers(texts: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    usual = transformers.Trainer.create_scheduler
    monkeypatch.setattr(
        "bigkernel.trainer.Trainer.create_scheduler",
        lambda self, *more, **options: used.append(self.optimizer) or usual(self, *more, **options),
    )
    assert main(train_text(texts, kind, "--optim", kind, "--max-steps", "2")) == 0
    assert {type(one.optimizer) for one in used} == {OPTIMIZERS[kind]}


@pytest.mark.parametrize("tokenizer", ["bpe", "wordpiece"])
def test_tokenizers_trained_on_the_corpus(
    texts: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_text(texts, tokenizer, "--tokenizer", tokenizer, "--vocab-size", "300")
    assert main([*arguments, "--max-length", "8", "--max-steps", "2"]) == 0
    assert main(["generate", str(texts / tokenizer), "--prompt", "the fox"]) == 0
    assert "the fox" in capsys.readouterr().out


def test_generate_is_repeatable_and_cut_to_length(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*more: str) -> str:
        run = str(texts / "run")
        assert main(["generate", run, "--prompt", "the ", "--max-new-tokens", "12", *more]) == 0
        return capsys.readouterr().out

    first = generate("--seed", "3")
    assert first.startswith("the ")
    assert len(first.rstrip("\n").encode()) <= 4 + 12
    assert generate("--seed", "3") == first
    assert generate("--temperature", "0") == generate("--temperature", "0", "--seed", "9")
    assert generate("--top-k", "1", "--seed", "5") == generate("--temperature", "0")
    generate("--top-p", "0.5", "--top-k", "0")


def test_generate_shows_no_broken_characters(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Hot sampling from a hardly trained model over bytes: mostly not UTF-8.
    run = str(texts / "run")
    assert main(["generate", run, "--prompt", "狐", "--temperature", "9", "--top-p", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("狐")
    assert "\ufffd" not in out


def test_an_empty_prompt_begins_with_nothing(texts: Path) -> None:
    assert main(train_text(texts, "empty-prompt", "--prompt", "", "--max-steps", "2")) == 0
    assert not (texts / "empty-prompt" / "sample.txt").read_text().startswith("The ")


def test_generate_from_nothing(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(texts / "run")]) == 0
    assert capsys.readouterr().err == ""


def test_evaluate_text(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(texts / "run")]) == 0
    assert "bits per byte" in capsys.readouterr().out
    figures = json.loads((texts / "run" / "evaluation.json").read_text())
    assert figures["bits_per_byte"] == pytest.approx(figures["nats_per_byte"] / 0.6931471805599453)
    assert f"{figures['loss']:.4f}" in (texts / "run" / "README.md").read_text()
    assert main(["evaluate", str(texts / "run"), "--data", str(texts / "corpus.txt")]) == 0


def test_evaluate_images(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = pictures / "run"
    with pytest.warns(UserWarning, match="broken.png"):
        assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    for name in ("accuracy", "precision", "recall", "f1", "roc auc", "confusion_matrix.png"):
        assert name in out
    assert json.loads((run / "evaluation.json").read_text())["images"] == 4


def test_env_says_what_runs_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for name in ("torch", "native library", "threads", "op attention_fwd on cpu", "op augment"):
        assert name in out, name


def test_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bigkernel", "evaluate", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not a run folder" in sentence_of(done.stderr)


def test_config_repeats_the_run(texts: Path) -> None:
    again = ["train", "text", "--config", str(texts / "run" / "config.yaml")]
    assert main([*again, "--out", str(texts / "again")]) == 0
    assert losses(texts / "again") == losses(texts / "run")


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def test_init_from_goes_on_with_a_model(texts: Path) -> None:
    arguments = train_text(texts, "tuned", "--init-from", str(texts / "run"))
    place = arguments.index("--model")
    del arguments[place : place + 2]
    assert main([*arguments, "--lr", "1e-4"]) == 0
    assert losses(texts / "tuned")[0][1] < losses(texts / "run")[0][1]


def test_init_from_with_other_classes(pictures: Path) -> None:
    arguments = ["train", "images", "--init-from", str(pictures / "run"), "--max-steps", "2"]
    assert main([*arguments, "--out", str(pictures / "digits"), "--threads", "1"]) == 0
    model = AutoModelForImageClassification.from_pretrained(pictures / "digits")
    assert model.config.num_labels == 10
    assert model.config.num_channels == 3


def test_a_run_is_not_overwritten(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = losses(texts / "run")
    assert main(train_text(texts, "run")) == 2
    assert "--force" in sentence_of(capsys.readouterr().err)
    assert losses(texts / "run") == before
    assert main(train_text(texts, "forced", "--max-steps", "2")) == 0
    (texts / "forced" / "left.txt").write_text("from before")
    assert main(train_text(texts, "forced", "--max-steps", "3", "--force")) == 0
    assert [step for step, _ in losses(texts / "forced")] == [1, 2, 3]
    assert not (texts / "forced" / "left.txt").exists()


def test_force_keeps_the_old_run_until_the_new_one_can_start(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    before = losses(texts / "run")
    arguments = train_text(texts, "run", "--force")
    arguments[arguments.index("--data") + 1] = str(tmp_path / "empty.txt")
    assert main(arguments) == 1
    assert "empty" in sentence_of(capsys.readouterr().err)
    assert losses(texts / "run") == before


def test_force_spares_a_folder_that_is_no_run(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    arguments = train_text(texts, "x", "--force")
    arguments[arguments.index("--out") + 1] = str(tmp_path)
    assert main(arguments) == 2
    assert "not a run" in sentence_of(capsys.readouterr().err)
    assert (tmp_path / "thesis.txt").exists()


BAD_USAGE = {
    "preset": (["train", "text", "--preset", "dmeo"], "Did you mean 'demo'"),
    "sample": (["train", "text", "--sample", "fr"], "There are: zh"),
    "sample-and-data": (["train", "text", "--sample", "zh", "--data", "x"], "one of the two"),
    "optim": (["train", "text", "--optim", "adagrad"], "adamw, adam, sgd, muon"),
    "dtype": (["train", "text", "--dtype", "int8"], "bfloat16"),
    "float16-on-cpu": (["train", "text", "--dtype", "float16", "--device", "cpu"], "GPU"),
    "device": (["train", "text", "--device", "quantum"], "cuda:N"),
    "lr": (["train", "text", "--lr", "0"], "--lr must be above 0"),
    "lr-inf": (["train", "text", "--lr", "inf"], "--lr must be above 0"),
    "steps": (["train", "text", "--max-steps", "0"], "--max-steps must be above 0"),
    "epochs": (["train", "images", "--epochs", "-1"], "--epochs must be above 0"),
    "epochs-inf": (["train", "images", "--epochs", "inf"], "--epochs must be above 0"),
    "batch": (["train", "images", "--batch-size", "0"], "--batch-size must be 1 or more"),
    "seed": (["train", "images", "--seed", "-1"], "--seed must be in"),
    "empty-data": (["train", "text", "--data", ""], "--data is empty"),
    "empty-init-from": (["train", "images", "--init-from", ""], "--init-from is empty"),
    "empty-out": (["train", "text", "--out", ""], "--out is empty"),
    "empty-resume": (["train", "text", "--resume", ""], "--resume is empty"),
    "empty-config": (["train", "images", "--config", ""], "--config is empty"),
    "empty-preset": (["train", "images", "--preset", ""], "--preset is empty"),
    "out-not-utf8": (["train", "text", "--out", "a\udcff"], r"--out is not UTF-8 text: 'a\udcff'"),
    "config-folder": (["train", "text", "--config", "/"], "/ cannot be read: Is a directory"),
    "huge-batch": (["train", "text", "--batch-size", "1" + "0" * 20], "--batch-size must be below"),
    "huge-vocabulary": (
        ["train", "text", "--vocab-size", "1" + "0" * 30],
        "--vocab-size must be",
    ),
    "threads": (["train", "images", "--threads", "0"], "--threads must be above 0"),
    "max-length": (["train", "text", "--max-length", "1"], "2 tokens or more"),
    "model": (["train", "text", "--model", "nope"], "neither a preset nor a config file"),
    "both-models": (["train", "text", "--model", "llama-1m", "--init-from", "x"], "one of the two"),
    "augment": (["train", "images", "--augment", "nope"], "Recipes: none, gentle"),
    "patches": (["train", "images", "--image-size", "9"], "multiple of 2"),
    "config": (["train", "text", "--config", "nope.yaml"], "no such config file"),
    "resume-without-out": (["train", "text", "--resume", "auto"], "--out RUN"),
    "resume-nothing": (["train", "text", "--resume", "/nowhere"], "no such folder"),
    "resume-and-force": (["train", "text", "--resume", "auto", "--force"], "one of the two"),
    "no-run": (["generate", "/nowhere"], "not a run folder"),
    "temperature": (["generate", "/nowhere", "--temperature", "-1"], "--temperature must be"),
    "temperature-tiny": (
        ["generate", "/nowhere", "--temperature", "1e-320"],
        "--temperature must be 0, or 1e-6 or more",
    ),
    "temperature-nan": (["generate", "/nowhere", "--temperature", "nan"], "--temperature must be"),
    "generate-seed": (["generate", "/nowhere", "--seed", "-1"], "--seed must be in"),
    "top-p": (["generate", "/nowhere", "--top-p", "0"], "--top-p must be"),
    "top-k": (["generate", "/nowhere", "--top-k", "-1"], "--top-k must be"),
    "new-tokens": (["generate", "/nowhere", "--max-new-tokens", "0"], "--max-new-tokens must be"),
}


@pytest.mark.parametrize(("arguments", "expected"), BAD_USAGE.values(), ids=BAD_USAGE)
def test_bad_usage(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert expected in sentence_of(capsys.readouterr().err)
    assert not list(tmp_path.iterdir()), "a command that is refused leaves nothing"


@pytest.mark.parametrize("arguments", [["tarin"], ["train", "text", "--nope"], ["generate"]])
def test_unknown_words_are_usage_errors(arguments: list[str]) -> None:
    assert main(arguments) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "text", "--device", "cuda"]) == 2
    assert "--device cpu" in sentence_of(capsys.readouterr().err)


BAD_TEXT = {
    "missing": (None, "there is no file or folder"),
    "empty": (b"", "empty"),
    "binary": (b"\x00\x01\x02" * 100, "binary"),
    "not-utf8": ("für ".encode("latin-1") * 100, "not UTF-8"),
    "short": (b"too short", "shorter than one sequence"),
}


@pytest.mark.parametrize(("content", "expected"), BAD_TEXT.values(), ids=BAD_TEXT)
def test_bad_text(
    content: bytes | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("corpus.txt").write_bytes(content)
    assert main(["train", "text", "--data", "corpus.txt"]) == 1
    assert expected in sentence_of(capsys.readouterr().err)
    assert not Path("runs").exists()


def test_missing_tokenizer_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The environment variable HF_HUB_OFFLINE is read once, at import.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "text", "--tokenizer", "bert-base-nowhere"]) == 1
    assert "bert-base-nowhere" in sentence_of(capsys.readouterr().err)


def test_missing_model_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The environment variable HF_HUB_OFFLINE is read once, at import.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "images", "--init-from", "vit-nowhere"]) == 1
    assert "vit-nowhere" in sentence_of(capsys.readouterr().err)
    for missing in (str(tmp_path / "missing"), "llama-nowhere"):
        assert main(["train", "text", "--init-from", missing]) == 1
        said = sentence_of(capsys.readouterr().err)
        assert missing in said
        assert "tokenizer" not in said


def test_bad_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def complaint(*more: str) -> str:
        assert main(["train", "images", "--data", "data", *more]) == 1
        return sentence_of(capsys.readouterr().err)

    assert "there is no folder" in complaint()
    Path("data/one").mkdir(parents=True)
    assert "no images" in complaint()
    picture = Image.new("RGB", (16, 16))
    picture.save("data/one/a.png")
    picture.save("data/one/b.png")
    assert "one class only" in complaint()
    Path("data/two").mkdir()
    picture.save("data/two/a.png")
    picture.save("data/two/b.png")
    Path("crop.yaml").write_text("- RandomCrop: {size: 64}\n")
    message = complaint("--augment", "crop.yaml")
    assert "64" in message
    assert "16" in message
    for file in Path("data").rglob("*.png"):
        file.write_bytes(b"gone")
    with pytest.warns(UserWarning, match="4 of 4 images"):
        assert "none of the 4 images" in complaint()


def test_changed_corpus_is_not_taken_for_the_old_one(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(WORDS * 40)
    arguments = train_text(texts, "changed", "--max-steps", "2")
    arguments[arguments.index("--data") + 1] = str(corpus)
    assert main(arguments) == 0
    corpus.write_text(WORDS * 41)
    assert main(["evaluate", str(texts / "changed")]) == 1
    assert "has changed" in sentence_of(capsys.readouterr().err)


def test_generate_refuses_what_does_not_fit(
    texts: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(texts / "run")
    assert main(["generate", run, "--prompt", "x" * 40]) == 1
    assert "context holds 32" in sentence_of(capsys.readouterr().err)
    assert main(["generate", run, "--prompt", "x", "--max-new-tokens", "32"]) == 1
    assert "31 at most" in sentence_of(capsys.readouterr().err)
    assert main(["generate", str(pictures / "run"), "--prompt", "x"]) == 2
    assert "needs a text run" in sentence_of(capsys.readouterr().err)


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_damaged_run_is_named(
    texts: Path, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(texts / "run", tmp_path / "run")
    (run / "tokenizer.json").write_text("{")
    assert main([command, str(run)]) == 1
    assert f"{run} holds no tokenizer that can be loaded" in sentence_of(capsys.readouterr().err)
    (run / "config.yaml").write_text("command: train text\nrecord: 5\n")
    if command == "evaluate":
        assert main([command, str(run)]) == 2
        assert "record must hold facts" in sentence_of(capsys.readouterr().err)


def test_a_prompt_without_room_after_it_is_refused_before_training(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_text(texts, "room", "--prompt", "x" * 40)) == 2
    assert "context holds 32" in sentence_of(capsys.readouterr().err)
    assert not (texts / "room").exists()


def test_a_prompt_that_is_not_utf8_is_a_usage_error(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What Python makes of the argument b"\xff".
    for arguments in (["generate", str(texts / "run")], train_text(texts, "undecoded")):
        assert main([*arguments, "--prompt", "\udcff"]) == 2
        assert "not UTF-8" in sentence_of(capsys.readouterr().err)
    assert not (texts / "undecoded").exists()


def test_sequences_too_short_for_the_usual_prompt(texts: Path) -> None:
    assert main(train_text(texts, "short", "--max-length", "4", "--max-steps", "2")) == 0
    assert (texts / "short" / "model.safetensors").is_file()


def test_a_terminal_without_the_characters_of_a_sample_loses_nothing(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    options = ("--max-steps", "2", "--prompt", "\u4f60\u597d")
    assert main(train_text(texts, "narrow", *options)) == 0
    assert (texts / "narrow" / "sample.txt").read_text("utf-8").startswith("\u4f60\u597d")


def test_full_disk_is_said(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("bigkernel.recipes.report.save_loss_curve", full)
    assert main(train_text(texts, "full")) == 1
    assert "disk is full" in sentence_of(capsys.readouterr().err)
    assert list((texts / "full").glob("checkpoint-*"))


def test_surprises_are_one_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def surprise() -> None:
        raise KeyError("unexpected")

    monkeypatch.setattr("bigkernel.cli.env.facts", surprise)
    assert main(["env"]) == 1
    assert "KeyError" in sentence_of(capsys.readouterr().err)
    monkeypatch.setenv("BIGKERNEL_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["env"])


def test_a_signal_while_torch_loads_is_no_traceback(tmp_path: Path) -> None:
    """The command is stopped at its first import of torch, before it could catch anything."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, os, signal, sys\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.Signals[os.environ['SENT']])\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    root = Path(__file__).parents[1]
    script = tmp_path / "bigkernel"  # as the console script that pip makes
    script.write_text("import sys\nfrom bigkernel.cli import main\nsys.exit(main())\n")
    for name, words, start in (
        ("SIGINT", "Interrupted.", ["-m", "bigkernel"]),
        ("SIGINT", "Interrupted.", [str(script)]),
        ("SIGTERM", "Stopped by SIGTERM.", ["-m", "bigkernel"]),
        ("SIGHUP", "Stopped by SIGHUP.", ["-m", "bigkernel"]),
        ("SIGUSR1", "Stopped by SIGUSR1.", [str(script)]),
    ):
        done = subprocess.run(
            [sys.executable, *start, "env"],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)]), "SENT": name},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 128 + signal.Signals[name], done.stderr
        assert done.stderr.strip() == words


def test_warnings_are_one_sentence_without_source() -> None:
    usual, seen = warnings.formatwarning, []

    @guarded
    def command() -> None:
        seen.append(warnings.formatwarning("1 of 25 images\n left out", UserWarning, "a.py", 3))

    command()
    assert seen == ["Warning: 1 of 25 images left out\n"]
    assert warnings.formatwarning is usual


EVIL = """
open({marker!r}, "w").write("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Config(LlamaConfig):
    model_type = "evil"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokens(PreTrainedTokenizerFast):
    pass
"""


def run_with_code(run: Path, marker: Path, model: bool, tokenizer: bool) -> Path:
    """Let a run folder name code of its own, as a stranger's may."""
    (run / "evil.py").write_text(EVIL.format(marker=str(marker)))
    if model:
        config = json.loads((run / "config.json").read_text())
        config["model_type"] = "evil"
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        (run / "config.json").write_text(json.dumps(config))
    if tokenizer:
        config = json.loads((run / "tokenizer_config.json").read_text())
        config["tokenizer_class"] = "Tokens"
        config["auto_map"] = {"AutoTokenizer": [None, "evil.Tokens"]}
        (run / "tokenizer_config.json").write_text(json.dumps(config))
    return run


@pytest.mark.parametrize("where", ["model", "tokenizer"])
def test_code_of_a_folder_runs_only_where_it_is_trusted(
    texts: Path, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    marker = tmp_path / "ran"
    run = run_with_code(
        shutil.copytree(texts / "run", tmp_path / "run"),
        marker,
        model=where == "model",
        tokenizer=where == "tokenizer",
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    arguments = train_text(texts, "never")
    place = arguments.index("--model")
    del arguments[place : place + 2]
    commands = [
        ["generate", str(run), "--prompt", "the"],
        ["evaluate", str(run)],
        [*arguments, "--init-from", str(run)],
        [*arguments, "--tokenizer", str(run), "--model", str(texts / "tiny.json")],
    ]
    for command in commands[: 3 if where == "model" else 4]:
        capsys.readouterr()
        assert main(command) == 1, command
        captured = capsys.readouterr()
        assert "--trust-remote-code" in sentence_of(captured.err)
        assert "custom code" not in captured.out
    assert not marker.exists()
    assert not (texts / "never").exists()
    # A config file cannot allow it, and the option does.
    (tmp_path / "trust.yaml").write_text("trust_remote_code: true\n")
    assert main([*arguments, "--config", str(tmp_path / "trust.yaml")]) == 2
    assert not marker.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*commands[0], "--max-new-tokens", "2", "--trust-remote-code"]) == 0
    assert marker.exists()


def test_a_model_file_with_code_and_pickled_weights_are_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**TINY_TEXT, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "code.json").write_text(json.dumps(config))
    arguments = train_text(texts, "never", "--model", str(tmp_path / "code.json"))
    assert main(arguments) == 2
    assert "auto_map" in sentence_of(capsys.readouterr().err)
    for kind in ("attn_implementation", "_attn_implementation"):
        (tmp_path / "code.json").write_text(json.dumps({**TINY_TEXT, kind: "some/kernels"}))
        assert main(arguments) == 2
        assert "kernels of a hub (some/kernels)" in sentence_of(capsys.readouterr().err)
    run = shutil.copytree(texts / "run", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "attn_implementation": "some/kernels"}))
    assert main(["generate", str(run)]) == 1
    assert "--trust-remote-code" in sentence_of(capsys.readouterr().err)
    # A model that transformers knows does without the code, which is said.
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (run / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    assert main(["generate", str(run), "--max-new-tokens", "2"]) == 0
    assert "transformers' own llama is used" in capsys.readouterr().err
    (run / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "unpickled"), "w")

    torch.save({"evil": Evil()}, run / "pytorch_model.bin")
    for command in (["generate", str(run)], ["evaluate", str(run)]):
        assert main(command) == 1
        assert "holds no model that can be loaded" in sentence_of(capsys.readouterr().err)
    assert not (tmp_path / "unpickled").exists()
    (run / "pytorch_model.bin").unlink()
    os.mkfifo(run / "model.safetensors")
    assert main(["generate", str(run)]) == 1
    assert "no regular file" in sentence_of(capsys.readouterr().err)


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
BOMBS = {
    "aliases": (ALIASES, "aliases unfold to more than 100,000 values"),
    "merges": (MERGES, "aliases unfold to more than 100,000 values"),
    "itself": ("lr: &a [*a]\n", "aliases unfold to more than"),
    "deep": ("lr: " + "[" * 5000, "nested too deeply"),
    "deep-and-closed": ("lr: " + "[" * 80 + "]" * 80, "nested too deeply"),
    "long": ("# " + "x" * (1 << 20), "too long for settings"),
    "no-date": ("lr: 2001-99-99", "is not valid YAML"),
    "digits": ("lr: " + "9" * 5000, "is not valid YAML"),
    "code": ("lr: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    "pipe": (None, "no regular file"),
}


@pytest.mark.parametrize("option", ["--config", "--augment", "--model"])
@pytest.mark.parametrize(("content", "expected"), BOMBS.values(), ids=BOMBS)
def test_bad_yaml_is_refused_at_once(
    option: str, content: str | None, expected: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "file.yaml"
    if content is None:
        os.mkfifo(file)
        expected = expected if option == "--config" else "neither a"
    else:
        file.write_text(content)
    assert main(["train", "images", option, str(file), "--out", str(tmp_path / "run")]) == 2
    said = sentence_of(capsys.readouterr().err)
    assert expected in said
    assert len(said) < 300
    assert not (tmp_path / "run").exists()


def test_usual_anchors_are_read(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("model: &m {model_type: vit, a: 1}\naugment:\n- <<: *m\n  b: 2\n")
    content = read_document(file)
    assert content["augment"] == [{"model_type": "vit", "a": 1, "b": 2}]
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    with pytest.raises(UsageError, match="nested too deeply"):
        read_document(deep)


def test_home_is_meant_by_a_tilde(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In every option that takes a path: a shell leaves the ~ of --out=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    shutil.copy(texts / "corpus.txt", tmp_path / "corpus.txt")
    shutil.copy(texts / "tiny.json", tmp_path / "tiny.json")
    (tmp_path / "settings.yaml").write_text("seed: 3\nlog_steps: 1\n")
    common = ["--max-steps", "2", "--max-length", "32", "--batch-size", "4", "--threads", "1"]
    assert main(["train", "text", "--data=~/corpus.txt", "--model=~/tiny.json", "--out=~/run",
                 "--config=~/settings.yaml", *common]) == 0  # fmt: skip
    run = tmp_path / "run"
    assert {"checkpoint-2", "model.safetensors", "config.yaml"} <= {f.name for f in run.iterdir()}
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 3
    assert main(["train", "text", "--resume=~/run", "--max-steps", "3"]) == 0
    assert main(["train", "text", "--resume=~/run/checkpoint-2", "--max-steps", "4"]) == 0
    assert main(["generate", "~/run", "--max-new-tokens", "2"]) == 0
    assert main(["evaluate", "~/run", "--data", "~/corpus.txt"]) == 0
    assert main(["train", "text", "--data=~/corpus.txt", "--init-from=~/run", "--tokenizer=~/run",
                 "--out=~/tuned", *common]) == 0  # fmt: skip
    assert (tmp_path / "tuned" / "model.safetensors").is_file()
    assert not list((tmp_path / "cwd").iterdir())
    # The files of a run are as readable as any file that is made here.
    modes = {file.stat().st_mode & 0o777 for file in run.rglob("*") if file.is_file()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}
    capsys.readouterr()
    (tmp_path / "crop.yaml").write_text("- RandomTeleport")
    for option, said in (
        ("--augment=~/crop.yaml", "no such transform"),
        ("--out=~nobody-here/run", "no home folder"),
        ("--init-from=~/missing", "there is no folder"),
        ("--init-from=../missing", "there is no folder"),
    ):
        assert main(["train", "images", option]) in (1, 2)
        message = sentence_of(capsys.readouterr().err)
        assert said in message
        assert "holds no model" not in message


def test_force_follows_links_and_works_inside_the_run(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(texts / "run", tmp_path / "real")
    (tmp_path / "link").symlink_to(run)
    (run / "left.txt").write_text("from before")
    arguments = [*train_text(texts, "x"), "--max-steps", "2", "--force", "--out"]
    assert main([*arguments, str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert not (run / "left.txt").exists()
    assert len(losses(run)) == 2
    monkeypatch.chdir(run)
    (run / "left.txt").write_text("from before")
    for out in (".", str(run / ".." / "real")):
        assert main([*arguments, out]) == 0
        assert Path.cwd() == run
        assert not (run / "left.txt").exists()
        assert len(losses(run)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert not list(run.glob(".*"))


HOSTILE = "a\nb\x1b[31m|<b>`*$x\u202e"


def test_names_are_escaped_and_paths_stay_out_of_the_card(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / HOSTILE
    folder.mkdir()
    corpus = folder / f"{HOSTILE}.txt"
    corpus.write_text(WORDS * 40)
    arguments = train_text(texts, "x", "--max-steps", "2", "--data", str(corpus))
    run = folder / HOSTILE
    assert main([*arguments, "--out", str(run), "--prompt", "the"]) == 0
    captured = capsys.readouterr()
    for shown in (captured.out, captured.err):
        assert "\x1b" not in shown
        assert "\u202e" not in shown
    card = (run / "README.md").read_text()
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", card)
    assert str(tmp_path) not in card
    assert "\n# a\\\\nb\\\\x1b\\[31m\\|\\<b\\>\\`\\*\\$x\\\\u202e\n" in card
    assert "`` a\\nb" in card or "``a\\nb" in card, "a code span that the name cannot leave"
    for line in card.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
    assert main(["evaluate", str(run / HOSTILE)]) == 2
    assert "\x1b" not in capsys.readouterr().err
    # Nor do words of the model drive the terminal.
    assert text.readable("a\x1b[2Jb\r\x07\ufffd\tc\n") == "a[2Jb\tc\n"


def test_the_card_has_parameters_versions_and_time_and_agrees_with_the_curve(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    drawn: list[Any] = []
    usual = report.save_loss_curve
    monkeypatch.setattr(
        "bigkernel.recipes.report.save_loss_curve", lambda *a: drawn.append(a[2:]) or usual(*a)
    )
    (tmp_path / "corpus.txt").write_text("".join(f"{n} {WORDS}" for n in range(300)))
    arguments = train_text(texts, "x", "--data", str(tmp_path / "corpus.txt"))
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    found = re.search(r"looking at 32 of the held-back (\w+) while training", out)
    assert found is not None
    assert found[1] == "sequences"
    card = (tmp_path / "run" / "README.md").read_text()
    figures = dict(re.findall(r"^\| ([a-z_ ]+) \| ([^|]+) \|$", card, re.M))
    assert int(figures["parameters"]) > 10_000
    assert figures["torch"] == str(torch.__version__)
    assert figures["transformers"] == transformers.__version__
    assert figures["steps"] == "8"
    assert re.fullmatch(r"\d+:\d\d", figures["time"])
    looked_at, final = drawn[0]
    assert final[0] == 8
    assert f"{final[1]:.4f}" == figures["loss"]
    assert re.fullmatch(r"32 of \d+ sequences", looked_at)
    assert "memorized" not in card


def test_a_memorized_text_is_called_so() -> None:
    records = [{"step": step, "loss": 5.0 / step} for step in range(1, 101)]
    said = report.memorized(records, 8.95)
    assert "0.05 nats" in said
    assert "8.95" in said
    assert "memorized its training part" in said
    assert report.memorized(records, 0.5) == ""
    assert report.memorized([], 8.95) == ""


def test_accuracy_is_shown_while_images_train(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = map(json.loads, (pictures / "run" / "metrics.jsonl").read_text().splitlines())
    shown = [r["eval_accuracy"] for r in records if "eval_accuracy" in r]
    assert len(shown) == 4
    assert all(0 <= value <= 1 for value in shown)
    assert f"{shown[-1]:.4f}" in (pictures / "run" / "README.md").read_text()


def test_a_split_of_the_folder_is_taken_and_said(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures / "data", data / "train")
    for name in ("dark", "bright"):
        (data / "val" / name).mkdir(parents=True)
        for number in range(3):
            (data / "train" / name / f"{number}.png").rename(data / "val" / name / f"{number}.png")
    arguments = train_images(pictures, "x", "--data", str(data), "--max-steps", "2")
    (data / "train" / "dark" / "broken.png").unlink()
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "the split of the folder: train to train, val held back." in out
    assert "18 training and 6 held-back images" in out
    assert json.loads((tmp_path / "run" / "labels.json").read_text()) == ["bright", "dark"]
    for more in ([], ["--data", str(data)], ["--data", str(data / "val")]):
        assert main(["evaluate", str(tmp_path / "run"), *more]) == 0
        figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        assert figures["images"] == 6


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_bar_keeps_the_time_left_in_a_narrow_terminal(width: int, tmp_path: Path) -> None:
    shown = TerminalProgress(progress.MetricsFile(tmp_path / "m.jsonl"), "tokens")
    screen = io.StringIO()
    shown.console = Console(file=screen, force_terminal=True, width=width)
    state = transformers.TrainerState(global_step=0, max_steps=12_000)
    control, arguments = transformers.TrainerControl(), transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to="none"
    )  # fmt: skip
    shown.on_train_begin(arguments, state, control)
    logs = {"loss": 2.3456, "learning_rate": 3e-3, "grad_norm": 1.5}
    logs |= {"tokens_per_second": 51234, "memory_bytes": 2**30}
    for step in range(1, 4):
        state.global_step = step
        shown.on_log(arguments, state, control, logs)
        shown.on_log(arguments, state, control, {"eval_loss": 2.5, "eval_accuracy": 0.975})
        shown.on_step_end(arguments, state, control)
        shown._bar.refresh()
    shown.on_train_end(arguments, state, control)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).split("\r")
    last = lines[-1].strip("\n")
    assert len(last) <= width
    for part in ("step 3/12000", "loss 2.346", " left"):
        assert part in last, lines
    assert "\u2026" not in last, "nothing is cut in the middle"
    assert "accuracy 97.5%" in last
    assert ("eval_loss 2.500" in last) == (width >= 80)
    assert ("tokens/s" in last) == (width >= 120)
    assert ("grad_norm" in last) == (width >= 200)


def test_help_shows_defaults_and_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bigkernel {bigkernel.__version__}\n"
    for kind, recipes in (("text", presets.TEXT_RECIPES), ("images", presets.IMAGE_RECIPES)):
        assert main(["train", kind, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        for name, value in recipes["demo"].items():
            option = f"--{name.replace('_', '-')} "
            if option in shown:
                after = shown.split(option, 1)[1].split("[default: ", 1)[1]
                assert after.startswith(f"{value}]"), option
        assert "--out <str> The run folder. [default: a free one under runs/]" in shown
        assert "Defaults are those of the preset demo" in shown


def test_a_line_comes_before_torch_is_loaded(tmp_path: Path) -> None:
    """Both lines of the first seconds: before torch, and before the data is read."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['torch'] = None\n"  # any import of it fails
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    command = [sys.executable, "-m", "bigkernel", "train", "text"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("loading PyTorch ...\n")


@pytest.mark.usefixtures("one_rank")
def test_main_leaves_its_caller_where_ranks_are_joined(capsys):
    """Only the program ends its process at once, as one of several; a script that calls goes on."""
    assert main(["bench", "atention"]) == 2
    assert "There are: adam" in capsys.readouterr().err
