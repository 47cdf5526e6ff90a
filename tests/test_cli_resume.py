"""Runs that end early: killed, interrupted, gone wrong, with a damaged checkpoint; and go on."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bigkernel.cli import main

VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    # Dropout draws too, and has to go on where it was.
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
STEPS = 30


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    """An image run with augmentation and dropout, a checkpoint every five steps."""
    return [
        *("train", "images", "--model", str(folder / "vit.json"), "--out", str(folder / out)),
        *("--batch-size", "16", "--max-steps", str(STEPS), "--save-steps", "5", "--threads", "1"),
        *more,
    ]


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run that was never interrupted, in ``whole``."""
    path = tmp_path_factory.mktemp("resume")
    (path / "vit.json").write_text(json.dumps(VIT))
    assert main(arguments(path, "whole")) == 0
    assert len(losses(path / "whole")) == STEPS
    return path


def weights(run: Path) -> bytes:
    """The trained weights as they are on disk."""
    return (run / "model.safetensors").read_bytes()


def stop_after(folder: Path, out: str, step: int, how: signal.Signals) -> tuple[int, str]:
    """Start a run, send a signal once it has logged ``step``; (exit code, stderr)."""
    command = [sys.executable, "-m", "bigkernel", *arguments(folder, out)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = folder / out / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def test_killed_run_goes_on_bit_for_bit(folder: Path) -> None:
    code, _ = stop_after(folder, "killed", 13, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (folder / "killed" / "model.safetensors").exists()
    assert main(arguments(folder, "killed", "--resume", "auto")) == 0
    assert losses(folder / "killed") == losses(folder / "whole")
    assert weights(folder / "killed") == weights(folder / "whole")


def test_ctrl_c_saves_and_exits_130(folder: Path) -> None:
    code, stderr = stop_after(folder, "stopped", 7, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in stderr
    assert "checkpoint" in stderr
    # Told nothing but where: config.yaml in the run says the rest.
    run = str(folder / "stopped")
    assert main(["train", "images", "--resume", "auto", "--out", run]) == 0
    assert losses(folder / "stopped") == losses(folder / "whole")
    assert weights(folder / "stopped") == weights(folder / "whole")


def truncate(checkpoint: Path) -> None:
    """Cut a file of a checkpoint short, as a full disk or a lost machine may."""
    file = checkpoint / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def test_damaged_checkpoint_gives_way_to_the_one_before(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, "damaged")) == 0
    truncate(checkpoints(folder / "damaged")[-1])
    capsys.readouterr()
    assert main(arguments(folder, "damaged", "--resume", "auto")) == 0
    assert f"checkpoint-{STEPS}" in capsys.readouterr().err
    assert losses(folder / "damaged") == losses(folder / "whole")
    for checkpoint in checkpoints(folder / "damaged"):
        truncate(checkpoint)
    assert main(["train", "images", "--resume", str(checkpoints(folder / "damaged")[-1])]) == 1
    assert "Error: " in capsys.readouterr().err


def test_stopped_between_the_last_checkpoint_and_the_model(folder: Path) -> None:
    # All steps are done: one more would be another run.
    ended = folder / "ended"
    shutil.copytree(folder / "whole", ended)
    (ended / "model.safetensors").unlink()
    assert main(arguments(folder, "ended", "--resume", "auto")) == 0
    assert losses(ended) == losses(folder / "whole")
    assert weights(ended) == weights(folder / "whole")
    assert checkpoints(ended) == [ended / c.name for c in checkpoints(folder / "whole")]


def test_a_resumed_run_keeps_its_thread_count(folder: Path) -> None:
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        few = [a for a in arguments(folder, "threads") if a not in ("--threads", "1")]
        assert main([*few, "--max-steps", "2"]) == 0
        torch.set_num_threads(3)
        assert main([*few, "--max-steps", "4", "--resume", "auto"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(usual)


def test_full_disk_while_resuming_keeps_the_metrics(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "whole", folder / "full")
    before = (folder / "full" / "metrics.jsonl").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bigkernel.checkpoint.os.fsync", full)
    assert main(arguments(folder, "full", "--resume", "auto")) == 1
    assert "full" in capsys.readouterr().err
    assert (folder / "full" / "metrics.jsonl").read_bytes() == before


def test_resume_auto_starts_where_there_is_nothing(folder: Path) -> None:
    assert main(arguments(folder, "fresh", "--resume", "auto")) == 0
    assert losses(folder / "fresh") == losses(folder / "whole")


def test_resume_refuses_another_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "whole", "--resume", "auto", "--lr", "0.5")) == 2
    assert "--lr" in capsys.readouterr().err
    run = str(folder / "whole")
    assert main(["train", "text", "--resume", run]) == 2
    assert "train images" in capsys.readouterr().err
    assert main(["train", "images", "--resume", run, "--out", str(folder / "other")]) == 2


def test_non_finite_loss_stops_and_names_the_step(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(arguments(folder, "burst", "--lr", "1e30", "--optim", "sgd"))
    message = capsys.readouterr().err
    assert code == 1, message
    assert "step" in message
    assert "Traceback" not in message
    for file in (folder / "burst").glob("checkpoint-*/model.safetensors"):
        from safetensors.torch import load_file

        assert all(torch.isfinite(t).all() for t in load_file(file).values())
