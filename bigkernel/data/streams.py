"""Where a stream (`IterableDataset`) is: what lets a run go on in the middle of one.

A stream that has ``state_dict`` and ``load_state_dict`` is asked for its state after each batch, in
the process that reads it. The state travels with its batch, as loaders and their workers read
ahead; a checkpoint gets what came with the last batches that were trained on, one for each worker.
"""

from __future__ import annotations

import copy
import io
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

# What a loader is made of, beside what it loads.
_OPTIONS = (
    "batch_size",
    "num_workers",
    "pin_memory",
    "drop_last",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


@dataclass
class _Note:
    """What comes with a batch: who read it, and the state of the stream then; None at its end."""

    worker: int
    state: Any


class _Entered(IterableDataset[Any]):
    """A stream, read from its start, or once from where it is told to."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.states: dict[int, Any] = {}
        self.ended = False

    def __iter__(self) -> Iterator[Any]:
        states, self.states = self.states, {}
        return self._read(states)

    def _read(self, states: dict[int, Any]) -> Iterator[Any]:
        worker = _worker()
        self.ended = worker in states and states[worker] is None
        if self.ended:  # some streams would begin anew
            return
        if worker in states:
            self.stream.load_state_dict(states[worker])
        yield from self.stream
        self.ended = True

    def __len__(self) -> int:
        return len(self.stream)

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # while this is unpickled
            raise AttributeError(name)
        return getattr(self.stream, name)  # such as `set_epoch`, which accelerate calls


@dataclass
class _Noting:
    """A collator whose batches are pairs with a note."""

    collate: Any
    data: _Entered

    def __call__(self, examples: Any) -> tuple[Any, _Note]:
        # A copy: a worker's batch is pickled later.
        state = None if self.data.ended else copy.deepcopy(self.data.stream.state_dict())
        return self.collate(examples), _Note(_worker(), state)


class _Loader(DataLoader[Any]):
    """A loader that keeps the notes, in order, and gives the batches alone."""

    track: StreamTrack

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        pairs, first = super().__iter__(), self.track.first
        self.track.first = 0
        if self.num_workers > 0:
            self.track.data.states = {}  # the workers have been started, with copies
        return self._batches(_beginning_with(first, pairs))

    def _batches(self, pairs: Iterable[tuple[Any, _Note]]) -> Iterator[Any]:
        for batch, note in pairs:
            self.track.ahead.append(note)
            yield batch


def _beginning_with(first: int, pairs: Iterable[tuple[Any, _Note]]) -> Iterator[tuple[Any, _Note]]:
    """The batches of workers that take turns from worker 0 on, as if from ``first`` on."""
    waiting: list[tuple[Any, _Note]] = []
    last = -1
    for pair in pairs:
        worker = pair[1].worker
        if worker <= last:  # the next turn of all
            yield from waiting
            waiting = []
        last = worker
        if worker < first:
            waiting.append(pair)
        else:
            yield pair
    yield from waiting


class _Resumed(IterableDataset[Any]):
    """The batches of a loader in an epoch of which some have been trained on.

    transformers leaves those out, of what it is given. If the loader begins behind them, others are
    given in their place; if not, they are read again.
    """

    def __init__(self, track: StreamTrack, batches: int, read_again: bool) -> None:
        self.track, self.batches, self.read_again = track, batches, read_again

    def __iter__(self) -> Iterator[Any]:
        yield from repeat(None, self.batches)
        batches = iter(self.track.loader)
        if self.read_again:
            for _ in range(self.batches):
                next(batches, None)
            self.track.begin_behind(self.batches)
        yield from batches


class StreamTrack:
    """Where the stream of a training loader is.

    Args:
        loader: what `accelerator.prepare` made of a loader of an `IterableDataset`.
        ranks: how many processes train together.

    Attributes:
        unable: why the stream cannot be entered in the middle, or None.
        own: whether each rank reads another part of the stream, rather than the whole of it.
        epoch: how often the stream has been passed, where it has no length too.
        began: the step at which this pass of it began.
    """

    def __init__(self, loader: Any, ranks: int) -> None:
        self.loader, self.ranks = loader, ranks
        self.ahead: deque[_Note] = deque()
        self.behind: dict[int, Any] | None = {}
        self.first = self.epoch = self.began = self._next = 0
        self._before: Any = None
        data = loader.dataset
        cut = isinstance(data, IterableDatasetShard)
        stream = data.dataset if cut else data
        dealt = type(loader) is DataLoaderDispatcher
        self.own = ranks > 1 and not cut and not dealt
        self.per_step = ranks if dealt and not loader.split_batches else 1
        self.unable = _why_unable(stream, loader)
        if self.unable is not None:
            return
        self.data = _Entered(stream)
        if cut:
            data.dataset = self.data
        base = loader.base_dataloader
        loader.base_dataloader = made = _Loader(
            data if cut else self.data,
            collate_fn=_Noting(base.collate_fn, self.data),
            **{name: getattr(base, name) for name in _OPTIONS},
        )
        made.track = self

    def begin(self, epoch: int, step: int) -> None:
        """A pass of the stream begins, at a step of the training."""
        self.epoch, self.began = epoch, step
        self.first, self._next, self.behind = 0, 0, {}
        self.ahead.clear()

    def begin_behind(self, batches: int) -> None:
        """So many batches have been loaded that were trained on before."""
        self.behind = {}
        for _ in range(batches):
            self.advance()

    def advance(self) -> None:
        """A batch has been trained on."""
        for _ in range(self.per_step):
            if self.ahead and self.behind is not None:
                note = self.ahead.popleft()
                self.behind[note.worker] = note.state
                self._next = note.worker + 1

    def _is_at_end(self) -> bool:
        return bool(getattr(self.loader, "end_of_dataloader", False))

    def place(self, step: int) -> dict[str, int]:
        """For a checkpoint: the pass that comes next, and the step at which it begins or began."""
        if self._is_at_end():
            return {"epoch": self.epoch + 1, "began": step}
        return {"epoch": self.epoch, "began": self.began}

    def save(self, folder: Path, rank: int) -> str | None:
        """Write the states to a checkpoint; returns why they cannot be."""
        if self.unable or self.behind is None or self._is_at_end() or (rank > 0 and not self.own):
            return None
        workers = max(1, self.loader.num_workers)
        saved = {
            "ranks": self.ranks if self.own else None,
            "workers": workers,
            "first": self._next % workers,
            "states": self.behind,
        }
        content = io.BytesIO()
        try:
            torch.save(saved, content)
            content.seek(0)
            torch.load(content, weights_only=True)
        except Exception:  # of as many kinds as there are things to pickle
            self.unable = (
                f"the state of {_name(self.data.stream)} must be made of numbers, strings, bytes, "
                "tuples, lists, dicts and tensors to be kept in a checkpoint"
            )
            return self.unable
        (folder / file_of(rank)).write_bytes(content.getvalue())
        return None

    def read(self, folder: Path, rank: int) -> Any:
        """What `save` wrote, or None."""
        try:
            file = folder / file_of(rank if self.own else 0)
            return torch.load(file, weights_only=True)
        except Exception:  # damaged ones have been found out before
            return None

    def enter(self, saved: Any) -> str | None:
        """Have the next pass begin where the stream was; returns why it cannot."""
        workers = max(1, self.loader.num_workers)
        self.behind = None
        if self.unable is not None:
            return self.unable
        if saved is None:
            return "the checkpoint does not say where the stream was"
        if saved["ranks"] != (self.ranks if self.own else None):
            return f"parts of the stream were read by {saved['ranks'] or 1} processes"
        if saved["workers"] != workers:
            return f"the stream was read by {saved['workers']} workers, and is by {workers} now"
        if self.loader.num_workers == 0:
            self._before = copy.deepcopy(self.data.stream.state_dict())
        self.first = self._next = saved["first"]
        self.data.states, self.behind = dict(saved["states"]), dict(saved["states"])
        return None

    def resumed(self, batches: int, read_again: bool) -> DataLoader[Any]:
        """The loader of an epoch of which so many batches have been trained on."""
        return DataLoader(
            _Resumed(self, batches, read_again), batch_size=None, collate_fn=_unchanged
        )

    def leave(self) -> None:
        """Put a stream that was entered back to its start, for whoever reads it next."""
        if self._before is not None:
            self.data.stream.load_state_dict(self._before)
            self._before = None


def file_of(rank: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"stream_{rank}.pt"


def _unchanged(batch: Any) -> Any:
    return batch


def _worker() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id


def _name(stream: Any) -> str:
    return f"the stream {type(stream).__name__}"


def _why_unable(stream: Any, loader: Any) -> str | None:
    if not all(callable(getattr(stream, name, None)) for name in ("state_dict", "load_state_dict")):
        return f"{_name(stream)} has no state_dict and load_state_dict"
    if _shuffles_in_a_buffer(stream):
        return f"the shuffle buffer of {_name(stream)} is no part of its state"
    ours = type(loader) in (DataLoaderShard, DataLoaderDispatcher)
    if not ours or getattr(loader, "submesh_tp", None) is not None:
        return f"the loader of {_name(stream)} is a {type(loader).__name__} of another kind"
    return None


def _shuffles_in_a_buffer(stream: Any) -> bool:
    """Whether `datasets` would leave out what is in a buffer, and fill it anew."""
    inner: list[Any] = [getattr(stream, "_ex_iterable", None)]
    while inner:
        one = inner.pop()
        if type(one).__name__ == "BufferShuffledExamplesIterable":
            return True
        inner += [one.ex_iterable] if hasattr(one, "ex_iterable") else []
        inner += getattr(one, "ex_iterables", [])
    return False
