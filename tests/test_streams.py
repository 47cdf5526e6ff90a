"""Resuming in the middle of a stream (`IterableDataset`).

What was trained on is not read again, and the run is the uninterrupted one bit for bit: in any pass
of the stream, packed, with accumulated batches, with workers, with Hugging Face's `datasets`. A
stream that cannot be entered is read from its start, which is said, with the same losses. On two
ranks: `test_ranks.py`.
"""

import pytest
from families import build
from ranks import documents
from streams import Plain, Stream
from test_trainer import arguments, assert_equal_runs

from bigkernel import Trainer, checkpoint
from bigkernel.data import PaddingCollator
from bigkernel.data.streams import _beginning_with, _Note

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def told(monkeypatch):
    sentences = []
    monkeypatch.setattr(checkpoint, "notify", sentences.append)
    return sentences


class Sized(Stream):
    def __len__(self):
        return len(self.documents)


class Unspeakable(Stream):
    def state_dict(self):
        return {"at": self.at, "file": self.file}


def train(folder, data, resume=None, **changes):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8, **changes}
    collator = None if options.get("packing") else PaddingCollator()
    trainer = Trainer(build("llama"), arguments(folder, **options), collator, data)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


CASES = {
    # Documents in a pass, and how many have been trained on at a step. The last batch is short.
    "padded": (Stream, 11, {}, {5: 10, 6: 11, 7: 13}),
    "packed": (Stream, 11, {"packing": True}, {7: 13}),
    # A batch is left over that makes no step by itself.
    "accumulated": (Stream, 13, {"gradient_accumulation_steps": 2}, {3: 12, 4: 17}),
    "sized": (Sized, 11, {"gradient_accumulation_steps": 2}, {4: 15}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_trained_on_is_not_read_again(tmp_path, told, case):
    cls, count, options, steps = CASES[case]
    stream = cls(tmp_path / "whole", documents(count))
    whole = train(tmp_path / "run", stream, **options)
    for step, trained in steps.items():
        again = cls(tmp_path / f"from {step}", documents(count))
        resumed = train(
            tmp_path / f"run from {step}", again, tmp_path / "run" / f"checkpoint-{step}", **options
        )
        assert_equal_runs(resumed, whole, ("loss", "grad_norm", "learning_rate", "epoch"))
        assert again.reads() == stream.reads()[trained:]
    assert all(line.startswith("resuming from") for line in told)


@pytest.mark.parametrize("persistent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_workers_go_on_where_they_were(tmp_path, told, persistent):
    """Three, with parts of 2, 2 and 1 batches, also where they live on for the next pass."""
    options = {"dataloader_num_workers": 3, "dataloader_persistent_workers": persistent}
    whole = train(
        tmp_path / "run", Stream(tmp_path / "whole", documents(8)), max_steps=7, **options
    )
    for step in (1, 2, 4) if persistent else (3, 5):
        stream = Stream(tmp_path / f"from {step}", documents(8))
        source = tmp_path / "run" / f"checkpoint-{step}"
        resumed = train(tmp_path / f"run from {step}", stream, source, max_steps=7, **options)
        assert_equal_runs(resumed, whole, ("loss", "grad_norm", "epoch"))
        of_first_pass = [read for read in stream.reads() if read.startswith("0:")]
        parts = [[0, 3], [1, 4], [2, 5], [6], [7]]  # of two rounds
        if not persistent:  # they are not told of the second pass
            assert sorted(of_first_pass) == sorted(f"0:{i}" for part in parts[step:] for i in part)
    assert all(line.startswith("resuming from") for line in told)


def test_turns_of_workers():
    """From any worker on, also where some have come to their end."""
    lengths = [3, 1, 4, 2]
    turns = [w for turn in range(4) for w in range(4) if turn < lengths[w]]
    for behind in range(len(turns)):
        left = [n - turns[:behind].count(w) for w, n in enumerate(lengths)]
        first = (turns[behind - 1] + 1) % 4 if behind else 0
        loaded = [(t, w) for t in range(4) for w in range(4) if t < left[w]]
        pairs = ((pair, _Note(pair[1], None)) for pair in loaded)
        assert [note.worker for _, note in _beginning_with(first, pairs)] == turns[behind:]


def of_shards(shards):
    for shard in shards:
        yield from documents(24)[shard::3]


def test_streams_of_datasets(tmp_path, told):
    """Of shards, mapped and filtered; one with a shuffle buffer, which its state has not."""
    datasets = pytest.importorskip("datasets")

    def stream(buffer=None):
        made = datasets.IterableDataset.from_generator(of_shards, gen_kwargs={"shards": [0, 1, 2]})
        made = (
            made.shuffle(seed=1, buffer_size=buffer, max_buffer_input_shards=1) if buffer else made
        )
        return made.map(lambda d: {"input_ids": d["input_ids"][:12]}).filter(
            lambda d: len(d["input_ids"]) > 4
        )

    for workers in (0, 2):
        options = {"dataloader_num_workers": workers, "max_steps": 14}
        whole = train(tmp_path / f"run {workers}", stream(), **options)
        for step in (3, 13):
            source = tmp_path / f"run {workers}" / f"checkpoint-{step}"
            assert_equal_runs(train(tmp_path / "again", stream(), source, **options), whole)
    assert all(line.startswith("resuming from") for line in told)
    whole = train(tmp_path / "buffer", stream(buffer=7))
    again = train(tmp_path / "again", stream(buffer=7), tmp_path / "buffer" / "checkpoint-5")
    assert_equal_runs(again, whole)
    assert told[-1].startswith("the shuffle buffer of the stream IterableDataset is no part of its")


CANNOT = {
    "plain": (Plain, {}, "the stream Plain has no state_dict and load_state_dict, so"),
    "workers": (Stream, {"dataloader_num_workers": 1}, None),
    "state": (Unspeakable, {}, "the checkpoint does not say where the stream was, so"),
    "gone": (Stream, {}, "the checkpoint does not say where the stream was, so"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_entered_is_read_again_and_said(tmp_path, told, case):
    """In the second pass of the stream too, which transformers alone would begin from its start."""
    cls, options, reason = CANNOT[case]
    stream = cls(tmp_path / "whole", documents(11))
    whole = train(tmp_path / "run", stream)
    source = tmp_path / "run" / "checkpoint-7"
    expected = "the state of the stream Unspeakable must be made of numbers, strings"
    assert [line[: len(expected)] for line in told] == [expected] * (case == "state")
    if case == "gone":
        (source / "stream_0.pt").unlink()
    again = cls(tmp_path / "again", documents(11))
    resumed = train(tmp_path / "run again", again, source, **options)
    assert_equal_runs(resumed, whole)
    if case == "workers":  # one reads as none does
        assert again.reads()[0] == "1:3"
        return
    assert again.reads() == stream.reads()[11:]
    assert f"{reason} its first 1 batches are read again." in told


def test_other_workers_are_said(tmp_path, told):
    """Whose parts of the stream are others."""
    train(tmp_path / "run", Stream(tmp_path / "whole", documents(11)), max_steps=2)
    source = tmp_path / "run" / "checkpoint-2"
    train(
        tmp_path / "again",
        Stream(tmp_path / "read", documents(11)),
        source,
        dataloader_num_workers=2,
        max_steps=3,
    )
    assert told[-1].startswith("the stream was read by 1 workers, and is by 2 now, so its first 2")


def test_a_stream_that_was_entered_begins_anew(tmp_path):
    """In the next training, though `datasets` keeps what it was told."""
    train(tmp_path / "run", Stream(tmp_path / "whole", documents(11)), max_steps=2)
    stream = Stream(tmp_path / "again", documents(11))
    train(tmp_path / "again-run", stream, tmp_path / "run" / "checkpoint-2", max_steps=3)
    stream.file.unlink()
    train(tmp_path / "anew", stream, max_steps=1)
    assert stream.reads()[0] == "0:0"


def test_data_may_be_skipped_by_choice(tmp_path, told):
    """`ignore_data_skip`: the stream begins anew."""
    train(tmp_path / "run", Stream(tmp_path / "whole", documents(11)), max_steps=2)
    stream = Stream(tmp_path / "again", documents(11))
    source = tmp_path / "run" / "checkpoint-2"
    train(tmp_path / "again-run", stream, source, ignore_data_skip=True, max_steps=3)
    assert stream.reads() == ["0:0", "0:1", "0:2", "0:3"]
    assert len(told) == 1
