"""transformers' example scripts, unchanged and with nothing changed but the import.

Run by ``tests.peers``, which says where the scripts lie. The side "theirs" shows that a script
works here; the side "ours" runs it on both and compares what the runs logged and wrote. Data,
tokenizer and models are made here; the models are without dropout, whose draws are not shared.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SCRIPTS = Path(os.environ["BIGKERNEL_PEER_PATH"])
SIDE = os.environ["BIGKERNEL_PEER"].split(":")[1]
STEPS = 20
IMPORT = "from bigkernel import Trainer, TrainingArguments\n"
# Losses of float32 steps that differ by rounding alone, after STEPS of them.
TOLERANCE = 1e-4
COMMON = (
    *("--do_train", "--do_eval", "--bf16", "False", "--seed", "3", "--learning_rate", "3e-3"),
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"),
    *("--max_steps", str(STEPS), "--logging_steps", "1", "--report_to", "none"),
    *("--save_steps", str(STEPS // 2)),
)
GPT2 = "vocab_size=600,n_embd=64,n_layer=2,n_head=4,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"
BERT = (
    "vocab_size=600,hidden_size=64,num_hidden_layers=2,num_attention_heads=4,intermediate_size=128,"
    "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
)
TEXT = ("--train_file", "train.txt", "--validation_file", "held_back.txt", "--tokenizer_name", ".")
CASES = {
    "clm": (
        *("language-modeling/run_clm.py", *TEXT, "--block_size", "64"),
        *("--model_type", "gpt2", "--config_overrides", GPT2),
        # Here alone: with theirs an evaluation draws from what random masks and crops go on with.
        *("--eval_strategy", "steps", "--eval_steps", "10"),
    ),
    "mlm": (
        *("language-modeling/run_mlm.py", *TEXT, "--max_seq_length", "64"),
        *("--model_type", "bert", "--config_overrides", BERT),
    ),
    "mlm by line": (  # padded batches
        *("language-modeling/run_mlm.py", *TEXT, "--max_seq_length", "64", "--line_by_line"),
        *("--model_type", "bert", "--config_overrides", BERT),
    ),
    "images": (
        *("image-classification/run_image_classification.py", "--model_name_or_path", "vit"),
        *("--train_dir", "images", "--remove_unused_columns", "False"),
    ),
}
# The scripts take one function of the package, whose metrics lie on a hub.
EVALUATE = """
class Accuracy:
    def compute(self, predictions, references):
        return {"accuracy": float((predictions == references).mean())}


def load(name, **_):
    assert name == "accuracy", name
    return Accuracy()
"""


def _write_text(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    lines = (HERE.parent.parent / "CONTRIBUTING.md").read_text().splitlines(keepends=True)
    lines = [line for line in lines if line.strip()]
    (folder / "train.txt").write_text("".join(lines[20:]))
    (folder / "held_back.txt").write_text("".join(lines[:20]))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        lines, trainers.WordPieceTrainer(vocab_size=600, special_tokens=special)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        **dict(zip(names, special, strict=True)),
    ).save_pretrained(folder)


def _write_images(folder: Path) -> None:
    import torch
    from PIL import Image
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

    pixels, labels = load_digits(return_X_y=True)
    for i, label in enumerate(labels[:200]):
        place = folder / "images" / f"digit {label}"
        place.mkdir(parents=True, exist_ok=True)
        image = pixels[i].reshape(8, 8) * 15
        Image.fromarray(image.astype("uint8")).resize((16, 16)).save(place / f"{i}.png")
    set_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=64,
        intermediate_size=128,
        num_labels=10,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    assert config.hidden_dropout_prob == 0
    assert torch.get_default_dtype() == torch.float32
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, a tokenizer, images and a model, as the scripts of both sides read them."""
    folder = tmp_path_factory.mktemp("examples")
    _write_text(folder)
    _write_images(folder)
    (folder / "evaluate.py").write_text(EVALUATE)
    return folder


def _run(folder: Path, side: str, case: str, *further: str) -> tuple[Path, str]:
    """One run of a script: its output folder and what it printed."""
    name, *words = CASES[case]
    text = (SCRIPTS / name).read_text()
    if side == "ours":
        text, count = re.subn(r"(?m)^(from transformers import \([^)]*\)\n)", rf"\1{IMPORT}", text)
        assert count == 1, f"{name} imports transformers' names in another form"
    script = folder / f"{side}_{Path(name).name}"
    script.write_text(text)
    out = folder / f"{side} {case}{' resumed' if further else ''}"
    places = {"PYTHONPATH": os.pathsep.join((str(folder), os.environ["PYTHONPATH"]))}
    # The scripts are copies, and without it each of them compiles all that it imports.
    places["PYTHONDONTWRITEBYTECODE"] = ""
    done = subprocess.run(
        [sys.executable, str(script), *words, *COMMON, "--output_dir", str(out), *further],
        cwd=folder,
        env={**os.environ, **places, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return out, done.stdout


def _log(out: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads((out / "trainer_state.json").read_text())[
        "log_history"
    ]
    return history


def _results(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "all_results.json").read_text())
    return results


# What depends on the clock and the machine, and what says how much was computed.
_TIMES = re.compile(r"runtime|per_second|memory_bytes|mfu|flos")


def _assert_same(ours: dict[str, Any], theirs: dict[str, Any], what: str) -> None:
    """Whatever theirs says, ours says as well, with the same value."""
    for key, value in theirs.items():
        assert key in ours, f"{what}: no {key}"
        if not _TIMES.search(key):
            assert ours[key] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), f"{what}: {key}"


@pytest.mark.parametrize("case", CASES)
def test_an_example_needs_no_change_but_the_import(case: str, folder: Path) -> None:
    theirs, _ = _run(folder, "theirs", case)
    assert sum("loss" in entry for entry in _log(theirs)) == STEPS
    if SIDE == "theirs":
        return
    ours, said = _run(folder, "ours", case)
    assert "bigkernel: the optimizer is bigkernel.optim.AdamW" in said
    logs = _log(ours), _log(theirs)
    assert len(logs[0]) == len(logs[1])
    for entry, other in zip(*logs, strict=True):
        _assert_same(entry, other, f"step {other['step']}")
    _assert_same(_results(ours), _results(theirs), "all_results.json")
    files = [{path.name for path in out.iterdir()} for out in (theirs, ours)]
    assert files[0] <= files[1]


# Not those that draw masks or crops from torch's own generator: they go on with others, theirs too.
@pytest.mark.parametrize("case", ["clm"])
def test_an_example_resumes(case: str, folder: Path) -> None:
    whole = folder / f"{SIDE} {case}"
    if not whole.is_dir():
        whole, _ = _run(folder, SIDE, case)
    checkpoint = whole / f"checkpoint-{STEPS // 2}"
    resumed, _ = _run(folder, SIDE, case, "--resume_from_checkpoint", str(checkpoint))
    for entry, other in zip(_log(resumed), _log(whole), strict=True):
        other.pop("train_loss", None)  # a resumed run's is of its own steps
        _assert_same(entry, other, f"step {other['step']}")


@pytest.mark.parametrize("script", sorted({words[0] for words in CASES.values()}))
def test_an_example_says_what_it_takes(script: str, folder: Path) -> None:
    _, said = _run(folder, SIDE, next(c for c in CASES if CASES[c][0] == script), "--help")
    assert "--per_device_train_batch_size" in said
    assert ("--use_bigkernel_attention" in said) is (SIDE == "ours")
