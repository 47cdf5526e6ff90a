"""One writer for a run folder: nesting, other threads and processes, killed holders, no locks.

Feature list: the same thread nests; another thread, a forked child and another process are refused,
the process by its id and host; kill -9 leaves no lock, and a child of the killed holder keeps none;
the file goes at the end; a file system without locks is told; folders that cannot be written.
"""

import errno
import os
import signal
import socket
import threading
import time

import pytest

from bigkernel import checkpoint, run_lock
from bigkernel.checkpoint import CheckpointError
from bigkernel.run_lock import RunLockedError, writing_to


def hold_in_child(run, with_child=False):
    """Fork a process that holds the lock until it is killed; with a child that lives on."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with writing_to(run):
                if with_child and os.fork() == 0:
                    os.write(tell, str(os.getpid()).encode())
                    time.sleep(60)
                elif not with_child:
                    os.write(tell, b"0")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    child = int(os.read(ready, 20))
    os.close(ready)
    return pid, child


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_one_thread_nests_and_leaves_nothing(tmp_path):
    run = tmp_path / "new" / "run"
    with writing_to(run), writing_to(str(run)):
        assert os.listdir(run) == [".lock"]
        with writing_to(tmp_path):  # another folder is another lock
            pass
        (run / "config.yaml").touch()
    assert os.listdir(run) == ["config.yaml"]
    with pytest.raises(KeyError), writing_to(run):
        raise KeyError
    assert os.listdir(run) == ["config.yaml"]


def test_another_thread_is_refused(tmp_path):
    refused = []

    def write():
        try:
            with writing_to(tmp_path):
                refused.append(None)
        except RunLockedError as error:
            refused.append(str(error))

    with writing_to(tmp_path):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        link = tmp_path.with_name(tmp_path.name + "-link")
        link.symlink_to(tmp_path)
        with writing_to(link):  # the same folder by another name
            assert len(run_lock._held) == 1
    assert refused == [f"another thread of this process writes to {tmp_path}."]
    write()
    assert refused[1:] == [None]


def test_another_process_is_refused_by_name_until_it_is_killed(tmp_path):
    pid, _ = hold_in_child(tmp_path)
    try:
        expected = f"{tmp_path} is being written by process {pid} on {socket.gethostname()} since "
        with pytest.raises(RunLockedError) as caught, writing_to(tmp_path):
            pass
        assert str(caught.value).startswith(expected)
    finally:
        kill(pid)
    assert (tmp_path / ".lock").exists()  # which says nothing any more
    with writing_to(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_child_of_a_killed_holder_keeps_no_lock(tmp_path):
    pid, child = hold_in_child(tmp_path, with_child=True)
    kill(pid)
    try:
        os.kill(child, 0)  # still there, as a data-loading worker is for a while
        with writing_to(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_is_another_writer(tmp_path):
    with writing_to(tmp_path):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with writing_to(tmp_path):
                    code = 2
            except RunLockedError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert (tmp_path / ".lock").exists()


def test_many_processes_at_once_write_one_after_the_other(tmp_path):
    """Taking, removing and taking again never lets two in."""
    children = []
    for _ in range(6):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                done = 0
                while done < 40:
                    try:
                        with writing_to(tmp_path):
                            mine = os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL)
                            os.close(mine)
                            os.unlink(tmp_path / "inside")
                            done += 1
                    except RunLockedError:
                        time.sleep(0.0005)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 6
    assert os.listdir(tmp_path) == []


def test_a_lock_file_that_its_last_holder_removes_is_none(tmp_path, monkeypatch):
    """The holder before may end between this one's opening of the file and its locking."""
    flock, calls = run_lock.fcntl.flock, []

    def late(descriptor, how):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(how)
        return flock(descriptor, how)

    monkeypatch.setattr(run_lock.fcntl, "flock", late)
    with writing_to(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / ".lock").exists()
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(checkpoint, "notify", told.append)

    def none(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_lock.fcntl, "flock", none)
    with writing_to(tmp_path), writing_to(tmp_path):
        pass
    assert len(told) == 1
    assert f"the file system of {tmp_path} has no locks" in told[0]
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    below = writing_to(tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match="file/run cannot be written to: not a dir"), below:
        pass
    (tmp_path / ".lock").symlink_to(tmp_path / "file")  # nothing is written through a link
    with pytest.raises(CheckpointError, match="symbolic links"), writing_to(tmp_path):
        pass


def test_a_folder_that_goes_meanwhile(tmp_path):
    run = tmp_path / "run"
    with writing_to(run):
        run.rename(tmp_path / "moved")
        with writing_to(run):  # a new folder of that name is another one
            pass
    assert os.listdir(run) == []
    with writing_to(tmp_path / "moved"):
        pass
