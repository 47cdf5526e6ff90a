"""Folders that appear whole or not at all, and what happens to checkpoints that are not whole.

Feature list: atomic folders and files; full disk (a real file-size limit, and a full file system
where one can be had), killed writers; manifests; checkpoints of transformers' own Trainer; choosing
the checkpoint to resume from, what its user has changed in it; rotation by step; no pickle.
"""

import errno
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bigkernel import checkpoint
from bigkernel.checkpoint import (
    CheckpointError,
    NoCheckpointError,
    atomic_folder,
    clean_up,
    find_checkpoints,
    newest_whole_checkpoint,
    resolve_checkpoint,
    rotate,
    verify_checkpoint,
    write_file_atomically,
)


@pytest.fixture
def told(monkeypatch):
    """The sentences that the user is told."""
    sentences = []
    monkeypatch.setattr(checkpoint, "notify", sentences.append)
    return sentences


def make(run, step, manifest=True):
    with atomic_folder(run / f"checkpoint-{step}", manifest) as folder:
        save_file({"w": torch.full((100,), float(step))}, folder / "model.safetensors")
        torch.save({"step": step}, folder / "optimizer.pt")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "inner").mkdir()
        (folder / "inner" / "notes.txt").write_text("x" * step)
    return run / f"checkpoint-{step}"


def fill(path, write):
    with atomic_folder(path) as folder:
        write(folder)


# Writing


def test_folder_appears_whole_with_a_manifest(tmp_path):
    path = tmp_path / "new" / "checkpoint-3"
    with atomic_folder(path) as folder:
        (folder / "a").write_text("one")
        assert not path.exists()
    assert (path / "a").read_text() == "one"
    assert list(json.loads((path / "manifest.json").read_text())["files"]) == ["a"]
    assert os.listdir(path.parent) == ["checkpoint-3"]


def test_folder_does_not_appear_when_writing_fails(tmp_path):
    path = make(tmp_path, 3)

    def fail(folder):
        (folder / "a").write_text("half")
        raise KeyError

    with pytest.raises(KeyError):
        fill(path, fail)
    verify_checkpoint(path)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "checkpoint-4"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["checkpoint-3"]


def test_folder_is_replaced_whole(tmp_path):
    path = make(tmp_path, 3)
    with atomic_folder(path) as folder:
        (folder / "only").write_text("this")
    assert sorted(os.listdir(path)) == ["manifest.json", "only"]
    assert os.listdir(tmp_path) == ["checkpoint-3"]


def test_folder_before_comes_back_when_the_rename_fails(tmp_path, monkeypatch):
    path = make(tmp_path, 3)
    rename = os.rename

    def fail_on_new(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_on_new)
    with pytest.raises(CheckpointError, match="input/output error"), atomic_folder(path) as folder:
        (folder / "a").write_text("new")
    verify_checkpoint(path)
    assert os.listdir(tmp_path) == ["checkpoint-3"]


def test_every_file_is_synced_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def note_sync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    make(tmp_path, 3)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {"model.safetensors", "optimizer.pt", "notes.txt", "inner", "manifest.json"} <= set(
        before
    )
    assert before[-1] == ".checkpoint-3.partial"
    assert after == [tmp_path.name]


def test_clean_up_settles_what_a_killed_writer_left(tmp_path):
    make(tmp_path, 1)
    make(tmp_path, 2)
    (tmp_path / "checkpoint-1").rename(tmp_path / ".checkpoint-1.replaced")  # between two renames
    (tmp_path / ".checkpoint-2.replaced").mkdir()
    (tmp_path / ".checkpoint-9.partial").mkdir()
    (tmp_path / ".checkpoint-9.partial" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".mine.partial").mkdir()
    clean_up(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".mine.partial", "checkpoint-1", "checkpoint-2"]
    verify_checkpoint(tmp_path / "checkpoint-1")
    clean_up(tmp_path / "nowhere")


def test_file_is_old_or_new(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "metrics.json"
    write_file_atomically(file, "old")
    write_file_atomically(file, b"new")
    assert file.read_bytes() == b"new"

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"no space left on device .* free some space"):
        write_file_atomically(file, "lost")
    assert file.read_bytes() == b"new"
    assert os.listdir(file.parent) == ["metrics.json"]


@pytest.mark.parametrize("writer", ["safetensors", "torch", "python"])
def test_full_disk_leaves_the_checkpoint_before_usable(tmp_path, writer, told):
    make(tmp_path, 1)
    large = torch.zeros(300_000)

    def write(folder):
        if writer == "safetensors":
            save_file({"w": large}, folder / "model.safetensors")
        elif writer == "torch":
            torch.save({"w": large}, folder / "optimizer.pt")
        else:
            (folder / "blob").write_bytes(bytes(1 << 20))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # Files beyond this size fail to be written as on a full disk (with EFBIG).
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written: .*MB free"):
            fill(tmp_path / "checkpoint-2", write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert resolve_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-1"
    assert told == []


def test_full_file_system_leaves_the_checkpoint_before_usable(tmp_path):
    """The same on a file system of 1 MB that runs full, in a mount namespace of its own."""
    script = textwrap.dedent(
        """
        import os, sys
        import torch
        from safetensors.torch import save_file
        from bigkernel.checkpoint import CheckpointError, atomic_folder, resolve_checkpoint
        run = sys.argv[1]
        with atomic_folder(run + "/checkpoint-1") as folder:
            save_file({"w": torch.zeros(1000)}, folder / "model.safetensors")
        for name in ("model.safetensors", "optimizer.pt"):
            try:
                with atomic_folder(run + "/checkpoint-2") as folder:
                    if name.endswith("pt"):
                        torch.save(torch.zeros(500_000), folder / name)
                    else:
                        save_file({"w": torch.zeros(500_000)}, folder / name)
            except CheckpointError as error:
                assert "could not be written" in str(error) and "free some space" in str(error)
            else:
                sys.exit("was written")
        assert os.listdir(run) == ["checkpoint-1"], os.listdir(run)
        assert str(resolve_checkpoint("auto", run)).endswith("checkpoint-1")
        print("usable")
        """
    )
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*unshare, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let users mount; the file-size limit test still ran")
    command = f"{mount} && exec {sys.executable} -c '{script}' {tmp_path}"
    done = subprocess.run([*unshare, command], capture_output=True, text=True, cwd=os.getcwd())
    assert done.stdout.strip() == "usable", done.stderr


# Verifying


DAMAGE = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "changed": lambda file: file.write_bytes(
        file.read_bytes()[:-20] + bytes([file.read_bytes()[-20] ^ 1]) + file.read_bytes()[-19:]
    ),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_damage_is_found_and_named(tmp_path, name, damage):
    path = make(tmp_path, 30)
    verify_checkpoint(path)
    file = path / name
    if name == "trainer_state.json" and damage == "changed":
        file.write_text(file.read_text().replace("30", "31"))
    else:
        DAMAGE[damage](file)
    with pytest.raises(CheckpointError, match=rf"checkpoint-30 is damaged: .*{name}"):
        verify_checkpoint(path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {"a": 3}}', '{"files": []}'])
def test_a_bad_manifest_is_damage(tmp_path, content):
    path = make(tmp_path, 1)
    (path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"bad manifest\.json"):
        verify_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize("keep", [0, 5, 40, -3])
def test_without_a_manifest_the_files_themselves_are_checked(tmp_path, name, keep):
    path = make(tmp_path, 1, manifest=False)
    verify_checkpoint(path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:keep] if keep < len(content) else content[:-1])
    with pytest.raises(CheckpointError, match=rf"{name} is cut off or changed"):
        verify_checkpoint(path)


def test_any_damage_without_a_manifest_is_named(tmp_path):
    """Whatever the readers of JSON, safetensors and zip files make of bytes that have changed."""
    path = make(tmp_path, 1, manifest=False)
    dice = random.Random(0)
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.suffix != ".json"]
    damaged = 0
    for _ in range(600):
        file = dice.choice(files)
        content = file.read_bytes()
        changed = bytearray(content)
        at = dice.randrange(min(len(content), dice.choice([12, 100, 10**6])))
        changed[at] ^= 1 << dice.randrange(8)
        file.write_bytes(changed)
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damaged += file.name in str(error)
        file.write_bytes(content)
    assert damaged > 100  # a flipped bit in a tensor is none that a format sees


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        verify_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is no checkpoint: trainer_state\.json is missing"):
        verify_checkpoint(tmp_path)


# Choosing


def test_the_newest_whole_one_is_taken(tmp_path, told):
    for step in (9, 10, 100):
        make(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    names = [path.name for path in find_checkpoints(tmp_path)]
    assert names == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-100"
    DAMAGE["cut off"](tmp_path / "checkpoint-100" / "model.safetensors")
    for source in ("auto", True, tmp_path, str(tmp_path / "checkpoint-100")):
        assert resolve_checkpoint(source, tmp_path).name == "checkpoint-10"
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-10"
    assert all("checkpoint-100 is damaged: model.safetensors has" in text for text in told)
    assert len(told) == 5
    assert resolve_checkpoint(tmp_path / "checkpoint-9", tmp_path).name == "checkpoint-9"


def test_nothing_to_resume_from(tmp_path, told):
    assert resolve_checkpoint("auto", tmp_path) is None
    assert resolve_checkpoint("auto", tmp_path / "nowhere") is None
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(NoCheckpointError, match="train without resuming first"):
        resolve_checkpoint(True, tmp_path)
    with pytest.raises(ValueError, match="no checkpoint or run folder"):
        resolve_checkpoint(tmp_path / "nowhere", tmp_path)
    path = make(tmp_path, 1)
    DAMAGE["cut off"](path / "optimizer.pt")
    for source in ("auto", True, path):
        with pytest.raises(
            NoCheckpointError,
            match=r"none of the 1 checkpoints .*damaged: optimizer\.pt has \d+ bytes",
        ):
            resolve_checkpoint(source, tmp_path)


def edit_state(path):
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps({**state, "note": "by hand"}, indent=2))


def reshard(path):
    (path / "model.safetensors").unlink()
    save_file({"w": torch.full((100,), 7.0)}, path / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def save_again(path):
    torch.save({"step": 1, "edited": True}, path / "optimizer.pt")


def other_weights(path):
    save_file({"w": torch.zeros(50)}, path / "model.safetensors")


CHANGES = {
    "optimizer": (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "scheduler": (lambda path: (path / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "scaler": (lambda path: (path / "scaler.pt").unlink(), "scaler.pt is missing"),
    "rng": (lambda path: (path / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "rng-of-rank": (lambda path: (path / "rng_state_0.pth").unlink(), "rng_state_0.pth is missing"),
    "own-state": (
        lambda path: (path / "bigkernel_state.json").unlink(),
        "bigkernel_state.json is missing",
    ),
    "arguments": (lambda path: (path / "training_args.bin").unlink(), "training_args.bin is mis"),
    "tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "state": (edit_state, "trainer_state.json has been edited"),
    "optimizer-edited": (save_again, "optimizer.pt has been edited"),
    "weights-edited": (other_weights, "model.safetensors has been edited"),
    "resharded": (reshard, "model.safetensors is missing, the weights are in other files"),
    "manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
}


def make_full(run, step):
    path = make(run, step)
    with atomic_folder(path) as folder:
        save_file({"w": torch.full((100,), float(step))}, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin"):
            torch.save({"step": step}, folder / name)
        torch.save({}, folder / "rng_state.pth")
        torch.save({}, folder / "rng_state_0.pth")
        (folder / "bigkernel_state.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.parametrize("change", CHANGES)
def test_what_its_user_has_changed_is_taken_by_name_and_said(tmp_path, told, change):
    older, newer = make_full(tmp_path, 1), make_full(tmp_path, 2)
    do, expected = CHANGES[change]
    do(newer)
    assert resolve_checkpoint(newer, tmp_path) == newer
    assert len(told) == 1
    assert str(newer) in told[0]
    assert expected in told[0]
    if change != "manifest":  # without one, as transformers writes it, it counts as whole
        assert resolve_checkpoint("auto", tmp_path) == older
        assert expected in told[1]
        assert newest_whole_checkpoint(tmp_path) == older
    (older / "model.safetensors").unlink()
    (older / "manifest.json").unlink()
    DAMAGE["cut off"](older / "optimizer.pt")
    del told[:]
    for source in ("auto", True, tmp_path):  # nothing better is there
        assert resolve_checkpoint(source, tmp_path) == newer
    assert [expected in text for text in told] == [True] * 3


def test_files_that_somebody_added_do_not_matter(tmp_path, told):
    path = make_full(tmp_path, 1)
    (path / "notes.md").write_text("a good one")
    (path / "samples").mkdir()
    (path / "samples" / "a.json").write_text("{")
    assert resolve_checkpoint(path, tmp_path) == path
    verify_checkpoint(path)
    assert told == []


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_damage_is_refused_by_name_too(tmp_path, told, name, keep):
    path = make_full(tmp_path, 1)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:keep] if keep < len(content) else content[:-1])
    with pytest.raises(NoCheckpointError, match=rf"damaged: {name} has \d+ bytes, expected"):
        resolve_checkpoint(path, tmp_path)


def test_what_cannot_be_told_from_damage_is_refused(tmp_path, told):
    path = make_full(tmp_path, 1)
    DAMAGE["changed"](path / "model.safetensors")  # the same size: one bit, or new weights
    with pytest.raises(NoCheckpointError, match=r"changed it yourself, delete manifest\.json"):
        resolve_checkpoint(path, tmp_path)
    (path / "manifest.json").unlink()
    assert resolve_checkpoint(path, tmp_path) == path


@pytest.mark.parametrize("content", ["[]", "{}", '{"global_step": "7"}', '{"global_step": -1}'])
def test_an_edited_state_has_to_be_one(tmp_path, told, content):
    path = make_full(tmp_path, 1)
    (path / "trainer_state.json").write_text(content)
    with pytest.raises(NoCheckpointError, match=r"trainer_state\.json"):
        resolve_checkpoint(path, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_what_is_needed_and_gone_is_damage(tmp_path, told, name):
    path = make_full(tmp_path, 1)
    (path / name).unlink()
    with pytest.raises(NoCheckpointError, match=rf"{name} is missing, and there is no going on"):
        resolve_checkpoint(path, tmp_path)


def test_shards_are_checked_too(tmp_path, told):
    path = make_full(tmp_path, 1)
    reshard(path)
    DAMAGE["cut off"](path / "model-00001-of-00001.safetensors")
    with pytest.raises(NoCheckpointError, match=r"model-00001-of-00001\.safetensors is cut off"):
        resolve_checkpoint(path, tmp_path)
    (path / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(NoCheckpointError, match=r"model\.safetensors is missing, and"):
        resolve_checkpoint(path, tmp_path)


# Keeping few


def test_rotation_is_by_step_whatever_the_clock_says(tmp_path):
    for at, step in enumerate((5, 10, 15, 20, 100)):
        path = make(tmp_path, step)
        os.utime(path, (1e9 - at, 1e9 - at))  # the newest has the oldest time
    last = tmp_path / "checkpoint-100"
    rotate(tmp_path, None, [last])
    rotate(tmp_path, 0, [last])
    assert len(find_checkpoints(tmp_path)) == 5
    rotate(tmp_path, 3, [last, tmp_path / "checkpoint-5"])
    kept = [path.name for path in find_checkpoints(tmp_path)]
    assert kept == ["checkpoint-100", "checkpoint-20", "checkpoint-5"]
    rotate(tmp_path, 1, [last, tmp_path / "checkpoint-5"])
    kept = [path.name for path in find_checkpoints(tmp_path)]
    assert kept == ["checkpoint-100", "checkpoint-5"]
    rotate(tmp_path, 1, [tmp_path / "checkpoint-5"])  # just saved, in a folder of an earlier run
    assert os.listdir(tmp_path) == ["checkpoint-5"]


@pytest.mark.parametrize("form", ["relative", "absolute", "link"])
def test_what_is_to_be_kept_may_be_named_by_any_path(tmp_path, monkeypatch, form):
    run, link = tmp_path / "run", tmp_path / "link"
    for step in (1, 2, 3):
        make(run, step)
    link.symlink_to(run)
    monkeypatch.chdir(tmp_path)
    folder = {"relative": Path("run"), "absolute": run, "link": link}[form]
    for other in (Path("run"), run, link):
        rotate(other, 1, [folder / "checkpoint-1"])
        assert [path.name for path in find_checkpoints(run)] == ["checkpoint-1"]
        make(run, 2)


def test_a_link_goes_and_what_it_names_stays(tmp_path):
    """Also a plain file where a folder is to be written."""
    other = make(tmp_path / "other", 1)
    make(tmp_path, 2)
    (tmp_path / "checkpoint-1").symlink_to(other)
    (tmp_path / ".checkpoint-3.removed").symlink_to(other)
    (tmp_path / ".checkpoint-3.partial").write_text("")
    rotate(tmp_path, 1, [tmp_path / "checkpoint-2"])
    clean_up(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "other"]
    verify_checkpoint(other)
    (tmp_path / ".checkpoint-3.partial").symlink_to(other)
    make(tmp_path, 3)
    verify_checkpoint(tmp_path / "checkpoint-3")
    verify_checkpoint(other)


def test_a_checkpoint_that_is_being_deleted_is_none(tmp_path, monkeypatch):
    """Killed in the middle: what is left has no name that is read, and goes at the next start."""
    for step in (1, 2):
        make(tmp_path, step)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: None)
    rotate(tmp_path, 1, [tmp_path / "checkpoint-2"])
    assert sorted(os.listdir(tmp_path)) == [".checkpoint-1.removed", "checkpoint-2"]
    monkeypatch.undo()
    clean_up(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_a_checkpoint_under_another_name(tmp_path):
    renamed = make(tmp_path, 1).rename(tmp_path / "best")
    assert resolve_checkpoint(renamed, tmp_path) == renamed
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        resolve_checkpoint(tmp_path / "empty", tmp_path)


# Loading


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/bigkernel-pickle-was-run",))


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path):
    """transformers loads rng_state.pth, optimizer.pt and scheduler.pt; all with weights_only."""
    import inspect

    import transformers.trainer as trainer

    for loading in ("_load_rng_state", "_load_optimizer_and_scheduler", "_load_scaler"):
        source = inspect.getsource(getattr(trainer.Trainer, loading))
        assert source.count("torch.load(") == source.count("weights_only=True")
    torch.save(Trap(), tmp_path / "rng_state.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "rng_state.pth", weights_only=True)
    assert not os.path.exists("/tmp/bigkernel-pickle-was-run")
