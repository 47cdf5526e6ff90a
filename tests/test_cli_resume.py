"""Runs that end early: killed, interrupted, gone wrong, with a damaged checkpoint; and go on.

Also what keeps two runs apart: folders taken one by one, locks, no launchers, moved folders.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bigkernel.cli import main
from bigkernel.interrupts import stop_at_once
from bigkernel.recipes import run_folder
from bigkernel.recipes.progress import TrainingProgress

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


def stop_after(
    folder: Path, out: str, step: int, how: signal.Signals, *more: str
) -> tuple[int, str]:
    """Start a run, send a signal once it has logged ``step``; (exit code, stderr)."""
    command = [sys.executable, "-m", "bigkernel", *arguments(folder, out, *more)]
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


@pytest.mark.parametrize(("optim", "whole"), [("adamw", "whole"), ("muon", "whole-muon")])
def test_killed_run_goes_on_bit_for_bit(folder: Path, optim: str, whole: str) -> None:
    if not (folder / whole).exists():
        assert main(arguments(folder, whole, "--optim", optim)) == 0
        assert losses(folder / whole) != losses(folder / "whole")
    run = folder / f"killed-{optim}"
    code, _ = stop_after(folder, run.name, 13, signal.SIGKILL, "--optim", optim)
    assert code == -signal.SIGKILL
    assert not (run / "model.safetensors").exists()
    assert main(arguments(folder, run.name, "--optim", optim, "--resume", "auto")) == 0
    assert losses(run) == losses(folder / whole)
    assert weights(run) == weights(folder / whole)


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_save_and_exit_128_and_their_number(
    folder: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = TrainingProgress.on_step_end
    # Compilers that ran in this process leave native handlers, and one of SIGUSR1 is respected.
    signal.signal(number, signal.SIG_DFL)

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        usual(self, args, state, control, **more)
        if state.global_step == 7:
            signal.raise_signal(number)

    monkeypatch.setattr(TrainingProgress, "on_step_end", on_step_end)
    assert main(arguments(folder, number.name)) == 128 + number
    said = capsys.readouterr().err
    run = folder / number.name
    assert f"interrupted by {number.name} after step 7; saved {run / 'checkpoint-7'}" in said
    assert not list(run.glob(".*"))
    monkeypatch.undo()
    assert main(["train", "images", "--resume", "auto", "--out", str(run)]) == 0
    assert losses(run) == losses(folder / "whole")
    assert weights(run) == weights(folder / "whole")


def test_a_signal_after_training_says_what_is_left_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        stop_at_once(signal.SIGTERM, None)  # as the handler of the command does

    monkeypatch.setattr("bigkernel.recipes.report.save_loss_curve", stopped)
    assert main(arguments(folder, "late")) == 143
    said = capsys.readouterr().err
    assert "The training was done and is saved" in said
    assert "Stopped by SIGTERM." in said
    monkeypatch.undo()
    assert main(arguments(folder, "late", "--resume", "auto")) == 0
    assert weights(folder / "late") == weights(folder / "whole")


def test_runs_started_together_keep_apart(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two without --out take two folders, and nobody else may write there while they do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    usual = ["train", "images", "--model", str(folder / "vit.json"), "--threads", "1"]
    usual += ["--batch-size", "16", "--max-steps", "100000", "--save-steps", "50000"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bigkernel", *usual, "--seed", str(seed)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    runs = [Path("runs/images"), Path("runs/images-2")]
    try:
        deadline = time.monotonic() + 300
        while not all((run / "metrics.jsonl").exists() for run in runs):
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for more in (["--force"], ["--resume", "auto"]):
            given = usual if more == ["--force"] else usual[:2]
            assert main([*given, "--out", str(runs[0]), *more]) == 1
            said = capsys.readouterr().err
            refused = re.search(r"runs/images is being written by process (\d+) on \S+ since", said)
            assert refused, said
            assert int(refused[1]) in {process.pid for process in processes}
    finally:
        for process, number in zip(processes, (signal.SIGTERM, signal.SIGHUP), strict=True):
            process.send_signal(number)
        ended = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 129], ended
    seeds = [yaml.safe_load((run / "config.yaml").read_text())["seed"] for run in runs]
    assert sorted(seeds) == [1, 2]
    for run in runs:
        assert len(checkpoints(run)) == 1
        assert not (run / ".lock").exists()


def test_a_moved_run_needs_nothing_of_its_old_place(folder: Path, tmp_path: Path) -> None:
    """Every path that a run stores: it is resumed and measured where it is now."""
    shutil.copytree(folder / "whole", tmp_path / "a")
    moved = (tmp_path / "a").rename(tmp_path / "b")
    (moved / "model.safetensors").unlink()
    assert main(["train", "images", "--resume", str(moved)]) == 0
    assert weights(moved) == weights(folder / "whole")
    assert main(["evaluate", str(moved)]) == 0
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("names", [("WORLD_SIZE", "RANK"), ("PMI_SIZE", "PMI_RANK")])
def test_a_launcher_is_refused_before_anything_is_touched(
    folder: Path,
    names: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    size, rank = names
    before = {file: file.stat().st_mtime_ns for file in (folder / "whole").rglob("*")}
    commands = [
        arguments(folder, "whole", "--force"),
        arguments(folder, "whole", "--resume", "auto"),
        arguments(folder, "never"),
        ["evaluate", str(folder / "whole")],
        ["generate", str(folder / "whole")],
        ["bench", "adam"],
    ]
    monkeypatch.setenv(size, "2")
    for number, lines in (("0", 1), ("1", 0)):  # one process says it for all
        monkeypatch.setenv(rank, number)
        for command in commands:
            assert main(command) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == lines
            assert ("a launcher such as torchrun has started it in 2" in said) == bool(lines)
    assert {file: file.stat().st_mtime_ns for file in (folder / "whole").rglob("*")} == before
    assert not (folder / "never").exists()


def test_force_keeps_the_old_run_if_the_new_one_could_not_be_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "whole", folder / "kept")

    def refuse(*_: object, **__: object) -> None:
        raise TypeError("Object of type set is not JSON serializable")

    monkeypatch.setattr("transformers.PreTrainedConfig.save_pretrained", refuse)
    assert main(arguments(folder, "kept", "--force")) == 1
    assert "config.json could not be saved" in capsys.readouterr().err
    assert weights(folder / "kept") == weights(folder / "whole")
    assert sorted(os.listdir(folder / "kept")) == sorted(os.listdir(folder / "whole"))


def test_killed_while_it_replaced_a_run(folder: Path) -> None:
    """What it had put aside goes; the folder counts as the run until nothing of it is left."""
    half, empty = folder / "half", folder / "emptied"
    for run in (half, empty):
        shutil.copytree(folder / "whole", run / ".replaced-1")
    (half / ".replaced-1" / "config.yaml").rename(half / "config.yaml")
    assert main(arguments(folder, "half", "--max-steps", "2")) == 2
    assert main(arguments(folder, "half", "--max-steps", "2", "--force")) == 0
    assert main(arguments(folder, "emptied", "--max-steps", "2")) == 0
    assert not [*half.glob(".*"), *empty.glob(".*")]


def test_a_folder_stays_a_run_until_all_else_is_put_aside(tmp_path, monkeypatch) -> None:
    """Stopped at any moment of that, --force takes it again."""
    rename, moved = Path.rename, []
    for name in ("README.md", "config.yaml", "metrics.jsonl", "zebra"):
        (tmp_path / name).write_text(name)

    def note(file: Path, target: Path) -> Path:
        assert run_folder.is_run(tmp_path)
        moved.append(file.name)
        return rename(file, target)

    monkeypatch.setattr(Path, "rename", note)
    run_folder.clear(tmp_path)
    assert moved[-1] == "config.yaml"
    assert len(moved) == 4
    assert os.listdir(tmp_path) == []


def test_force_through_a_link_replaces_the_run_and_keeps_the_link(folder: Path) -> None:
    shutil.copytree(folder / "whole", folder / "target")
    (folder / "link").symlink_to("target")
    assert main(arguments(folder, "link", "--force", "--max-steps", "2")) == 0
    assert (folder / "link").is_symlink()
    assert [step for step, _ in losses(folder / "target")] == [1, 2]
    assert not list(folder.glob(".link*"))
    assert not list((folder / "target").glob(".*"))


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
