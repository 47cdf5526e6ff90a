"""The demo's recipes, trained whole: they must reach the figures that the README states.

Each run is trained once, through the command line in a process of its own, as `make demo` does. Or
it is the one that `make demo` has just trained: BIGKERNEL_DEMO_RUNS names its folder, for those
who ran both from the same sources, as .ci/run does.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

import bigkernel

PROMPT = "这是我的第一篇AI博客"


def run(folder: Path, *arguments: str) -> str:
    """Run the command in ``folder``, two threads at most; its stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "bigkernel", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(bigkernel.__file__).parents[1])},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def trained(factory: pytest.TempPathFactory, name: str, *arguments: str) -> Path:
    """The run folder of a demo, which `make demo` calls ``name``."""
    folder = factory.mktemp("end_to_end")
    if "BIGKERNEL_DEMO_RUNS" in os.environ:
        shutil.copytree(Path(os.environ["BIGKERNEL_DEMO_RUNS"]) / name, folder / "run")
        return folder / "run"
    threads = str(min(2, os.cpu_count() or 1))
    run(folder, *arguments, "--preset", "demo", "--out", "run", "--threads", threads)
    return folder / "run"


def figures(folder: Path) -> dict[str, Any]:
    """What `bigkernel evaluate` measures on the held-back part; `make demo` has done it."""
    if not (folder / "evaluation.json").exists():
        run(folder.parent, "evaluate", folder.name)
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return content


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on the Chinese sample."""
    return trained(tmp_path_factory, "demo-zh", "train", "text", "--sample", "zh")


def test_text_reaches_its_loss(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = trained(tmp_path_factory, "demo-text", "train", "text")
    measured = figures(folder)
    assert measured["nats_per_byte"] <= 1.9, measured
    text = run(folder.parent, "generate", "run", "--prompt", "The for statement")
    assert text.startswith("The for statement")
    # Any program can load it, without bigkernel.
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("The for statement is used to iterate over")["input_ids"]])
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 2.4


def test_digits_reach_their_accuracy(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = trained(tmp_path_factory, "demo-images", "train", "images")
    measured = figures(folder)
    assert measured["accuracy"] >= 0.96, measured
    assert measured["f1"] >= 0.95, measured
    assert measured["roc_auc"] >= 0.99, measured
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert [model.config.id2label[i] for i in range(10)] == [str(i) for i in range(10)]


def test_chinese_prompt_goes_on_in_chinese(chinese: Path) -> None:
    text = run(chinese.parent, "generate", "run", "--prompt", PROMPT)
    assert text.startswith(PROMPT)
    continued = text[len(PROMPT) :].strip()
    han = [c for c in continued if "\u4e00" <= c <= "\u9fff"]
    assert len(han) >= 20, text
    assert len(han) >= 0.7 * len(continued.replace("\n", "")), text
    assert "\ufffd" not in text


def test_chinese_continuation_is_language_not_noise(chinese: Path) -> None:
    source = (Path(bigkernel.__file__).parent / "data/corpora/zh_ai.txt").read_text("utf-8")
    pairs = {source[i : i + 2] for i in range(len(source) - 1)}
    text = run(chinese.parent, "generate", "run", "--prompt", PROMPT, "--seed", "1")
    continued = text[len(PROMPT) :].strip()
    known = [continued[i : i + 2] in pairs for i in range(len(continued) - 1)]
    # Two characters drawn apart from each other are a pair of the source one time in a hundred.
    assert sum(known) >= 0.7 * len(known), text
