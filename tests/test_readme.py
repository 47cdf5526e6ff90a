"""What the README says is true: its snippets run, its commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_set_up_commands_come_first():
    first = re.search(r"^```\n(.*?)^```", README, re.M | re.S)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first.group(1).splitlines()] == [
        "make demo",
        "make test",
    ]
    assert README.index("make demo") < README.index("```python")


def test_snippets_come_in_the_stated_order():
    imports = [re.search(r"from bigkernel\S* import ([\w, ]+)", code).group(1) for code in SNIPPETS]
    assert imports == [
        "scaled_dot_product_attention",
        "AdamW",
        "transforms as T",
        "Trainer, TrainingArguments",
    ]


@pytest.mark.parametrize("code", SNIPPETS, ids=["attention", "optimiser", "transforms", "trainer"])
def test_snippet_runs(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"(?:^|`)make ([a-z][a-z-]+)", README, re.M)))
)
def test_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize(
    "words",
    sorted({m.strip() for m in re.findall(r"^bigkernel ((?:train )?[a-z]+)", README, re.M)}),
)
def test_command_exists(words):
    done = subprocess.run(
        [sys.executable, "-m", "bigkernel", *words.split(), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
