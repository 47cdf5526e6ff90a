"""What the README says is true: its snippets run, its commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import ledger

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_set_up_commands_come_first():
    first = re.search(r"^```console\n(.*?)^```", README, re.M | re.S)
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


def test_snippets_run(tmp_path):
    """In a process of their own, as a reader would run them, one after another."""
    alone = "exec(compile({!r}, 'README.md', 'exec'), {{'__name__': '__main__'}})"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(alone.format(code) for code in SNIPPETS)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_seconds_to_the_target_are_those_of_the_ledger():
    entries = ledger.entries()
    share = {entry.side: f"{ledger.ratio(entry, entries):.2f}" for entry in entries}
    adamw, muon = share["bigkernel-adamw"], share["bigkernel-muon"]
    text = " ".join(README.split())
    assert f'{adamw} of the time with our AdamW, {muon} with `optim="muon"`' in text


def test_chart_licence_and_documentation_are_at_the_top():
    """Relative links; tests/test_docs.py sees that they lead somewhere."""
    top = README[: README.index("```python")]
    for target in ("LICENSE", "docs/index.md", "docs/images/speed.svg"):
        assert f"({target})" in top
