"""Freed memory that stays in the process while a model is trained, and goes back afterwards."""

import ctypes
import platform
import resource
from pathlib import Path

import pytest
import torch
from families import Rows, collate, text_model

from bigkernel import Trainer, TrainingArguments, heap

_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
glibc = pytest.mark.skipif(
    not heap._is_ours() or (_HUGE.exists() and "[always]" in _HUGE.read_text()),
    reason="of glibc as it comes, and pages that are counted one by one",
)
_BUFFERS, _BYTES = 8, 16 << 20
_PAGES = _BUFFERS * _BYTES // resource.getpagesize()


def faults_of_a_step():
    """Pages that the system has to give for some buffers, all of them freed at the end."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [torch.ones(_BYTES // 4) for _ in range(_BUFFERS)]
    del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


@glibc
def test_memory_stays_inside_and_goes_back_at_the_end():
    with heap.kept():
        faults_of_a_step()
        assert faults_of_a_step() < _PAGES / 4  # a buffer may not fit where another one was
        held = resident()
    assert resident() < held - _PAGES / 2
    assert faults_of_a_step() > _PAGES / 2


@glibc
def test_the_trainer_keeps_it(tmp_path):
    found = []

    class Watching(Trainer):
        def training_step(self, *args, **kwargs):
            found.append(faults_of_a_step())
            return super().training_step(*args, **kwargs)

    args = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to="none", save_strategy="no"
    )
    Watching(model=text_model(), args=args, train_dataset=Rows(), data_collator=collate).train()
    assert max(found[1:]) < _PAGES / 4
    assert faults_of_a_step() > _PAGES / 2


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_an_allocator_that_is_set_up_is_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(ctypes, "CDLL", None)
    with heap.kept():
        pass


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    with heap.kept():
        pass
