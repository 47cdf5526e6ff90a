"""The ledger of the CPU speedrun (benchmarks/records), and the script that writes it."""

import dataclasses
import json
import math
from statistics import mean

import pytest
import torch

from benchmarks import ledger, speedrun
from benchmarks.budget import choose, try_all
from bigkernel.data import load_corpus
from bigkernel.recipes import presets, text

ENTRIES = ledger.entries()
FACTS = {
    "side", "optimizer", "lr", "steps", "corpus", "command", "cpu", "cores", "system", "threads",
    "isa", "torch_isa", "versions", "commit", "time",
}  # fmt: skip


# The ledger may be empty: a run of record takes a quiet machine for a quarter of an hour, and is
# made after the code that it measures, in a commit of its own.
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.number:02d}-{entry.side}")
def test_an_entry_is_whole(entry):
    check(entry, ENTRIES)
    assert (ledger.RECORDS / f"{entry.number:02d}-{entry.side}").is_dir()
    assert "with changes" not in str(entry.facts["commit"])


def check(entry, entries):
    facts = entry.facts
    assert set(facts) >= FACTS
    assert {"bigkernel", "torch", "transformers", "python"} <= set(facts["versions"])
    assert entry.side in speedrun.SIDES
    assert len(entry.logs) == ledger.SEEDS
    for log in entry.logs.values():
        steps = [line["step"] for line in log]
        assert steps == sorted(set(steps))
        assert steps[-1] <= facts["steps"]
        assert all(set(line) == {"step", "seconds", "nats_per_byte"} for line in log)
        seconds = [line["seconds"] for line in log]
        assert seconds[0] > 0
        assert seconds == sorted(set(seconds))
        # At the target, and not before: the clock stops at the first look that sees it.
        assert [line["nats_per_byte"] <= ledger.TARGET for line in log] == [False] * (
            len(log) - 1
        ) + [True]
    (theirs,) = (e for e in entries if (e.side, e.session) == (ledger.BASELINE, entry.session))
    for name in ("cpu", "cores", "isa", "torch_isa", "threads", "versions", "commit", "corpus"):
        assert facts[name] == theirs.facts[name], name
    assert entry.logs.keys() == theirs.logs.keys(), "other seeds than transformers'"
    last = [log[-1]["seconds"] for log in entry.logs.values()]
    assert ledger.ratio(entry, entries) == mean(last) / mean(theirs.seconds)


def test_entries_are_numbered_and_none_is_there_twice():
    assert [entry.number for entry in ENTRIES] == list(range(len(ENTRIES)))
    assert len({(entry.side, entry.session) for entry in ENTRIES}) == len(ENTRIES)


def test_what_was_tuned_has_one_budget():
    tuned = json.loads(ledger.TUNED.read_text())
    assert set(tuned) == set(speedrun.SIDES)
    budgets = []
    for side in tuned.values():
        by_rate, by_length = (
            {float(point): tried for point, tried in of.items()}
            for name, of in side.items()
            if name.endswith(("_lr", "_length"))
        )
        budgets.append((list(by_rate), list(by_length), side["seeds"]))
        assert side["lr"] == min(by_rate, key=lambda lr: mean(by_rate[lr]))
        assert None not in by_length[side["steps"]]
        reached = [mean(tried) for tried in by_length.values() if None not in tried]
        assert mean(by_length[side["steps"]]) == min(reached)
        assert all(len(tried) == len(side["seeds"]) for tried in by_rate.values())
    assert all(budget == budgets[0] for budget in budgets)


def test_each_tries_the_same_points_and_the_best_is_chosen(capsys):
    asked = []

    def score(name, point, seed):
        asked.append((name, point, seed))
        return abs(point - 2) + seed if name == "a" else math.inf if point < 3 else point

    scores = try_all(["a", "b"], [1.0, 2.0, 3.0], [0, 1], score)
    assert asked[:3] == [("a", 1.0, 0), ("b", 1.0, 0), ("a", 2.0, 0)]
    assert {name: {point: len(n) for point, n in of.items()} for name, of in scores.items()} == {
        name: {1.0: 2, 2.0: 2, 3.0: 2} for name in "ab"
    }
    assert choose(scores, "--points") == {"a": 2.0, "b": 3.0}
    assert capsys.readouterr().out == "b: 3 is at the end of the list: give more with --points\n"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The script with a tiny model and a target that is soon reached, in this process."""
    tiny = {**presets.TEXT_MODELS["llama-1m"], "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    monkeypatch.setitem(presets.TEXT_MODELS, "llama-1m", tiny)
    whole = load_corpus(None)
    few = dataclasses.replace(whole, documents=whole.documents[:12])
    monkeypatch.setattr(text, "load_corpus", lambda source: few)
    monkeypatch.setattr(ledger, "TARGET", 5.45)
    monkeypatch.setattr(ledger, "SEEDS", 2)
    monkeypatch.setattr(ledger, "TUNED", tmp_path / "tuning.json")

    def here(run):
        return speedrun.train(speedrun.Run(**{**vars(run), "every": 2, "target": ledger.TARGET}))

    monkeypatch.setattr(speedrun, "alone", here)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_small_run_writes_an_entry_for_each_side(small, capsys):
    tuned = {"lr": 3e-3, "steps": 8, "seeds": [0]}
    ledger.TUNED.write_text(json.dumps(dict.fromkeys(speedrun.SIDES, tuned)))
    arguments = ["run", "--threads", "1", "--records", str(small)]
    assert speedrun.main([*arguments, "--part", "2"]) == 0
    assert "minutes of training at most" in capsys.readouterr().out
    assert ledger.entries(small) == []
    assert speedrun.main(arguments) == 0
    found = ledger.entries(small)
    assert [(entry.number, entry.side) for entry in found] == list(enumerate(speedrun.SIDES))
    for entry in found:
        check(entry, found)
    ours, theirs = found[1], found[0]
    # The same weights, batches and steps: what the two Trainers reach differs by rounding, and by
    # rows in which theirs sees more than one document.
    for seed, log in ours.logs.items():
        for mine, other in zip(log, theirs.logs[seed], strict=True):
            assert mine["nats_per_byte"] == pytest.approx(other["nats_per_byte"], rel=2e-3)
    capsys.readouterr()
    assert speedrun.main(["table", "--records", str(small)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n") == 2 + len(found)
    assert f"{ledger.ratio(ours, found):.2f}x" in shown


def test_a_side_that_misses_the_target_has_no_entry(small, capsys, monkeypatch):
    monkeypatch.setattr(ledger, "TARGET", 0.5)
    tuned = {"lr": 3e-3, "steps": 2, "seeds": [0]}
    ledger.TUNED.write_text(json.dumps(dict.fromkeys(speedrun.SIDES, tuned)))
    speedrun.main(["run", "--sides", "bigkernel-muon", "--threads", "1", "--records", str(small)])
    assert "no entry, seeds [1, 2] did not reach 0.5" in capsys.readouterr().out
    assert ledger.entries(small) == []


def test_tuning_takes_the_rate_and_then_the_length(small, monkeypatch):
    monkeypatch.setitem(presets.TEXT_RECIPES["demo"], "max_steps", 4)
    monkeypatch.setattr(speedrun, "EVERY", 2)
    short, long = (
        speedrun.train(speedrun.Run("bigkernel-adamw", 0, 3e-3, steps, every=2, target=0.0))
        for steps in (2, 6)
    )
    between = (short[-1]["nats_per_byte"] + long[-1]["nats_per_byte"]) / 2
    monkeypatch.setattr(ledger, "TARGET", between)
    assert speedrun.main(["tune", "--sides", "bigkernel-adamw", "--lrs", "1e-4", "3e-3",
                          "--lengths", "2", "6", "--threads", "1"]) == 0  # fmt: skip
    tuned = json.loads(ledger.TUNED.read_text())["bigkernel-adamw"]
    assert tuned["lr"] == 3e-3
    assert tuned["nats_per_byte_after_4_steps_by_lr"].keys() == {"0.0001", "0.003"}
    assert tuned["steps_to_target_by_length"]["2.0"] == [None]
    assert tuned["steps"] == 6
