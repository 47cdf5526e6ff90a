"""The runner of the peers' own suites (tests/peers), on a peer made up here."""

import pytest

from tests.peers.__main__ import SUITES, compare, main, read_exceptions

PEER = """
import pytest
import torch
from torch.optim import Adam, AdamW


def small(cls, **options):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = cls([weight], lr=0.1, **options)
    optimizer.step()
    return weight, type(optimizer)


@pytest.mark.parametrize("cls", [Adam, AdamW, torch.optim.SGD])
def test_step(cls):
    assert small(cls)[0].sum() < 2


def test_differentiable_adam():
    Adam([torch.nn.Parameter(torch.ones(2))], differentiable=True)


def test_module_of_adam():
    assert small(torch.optim.Adam)[1].__module__ == "torch.optim.adam"


def test_adam_says_no_in_its_own_words():
    with pytest.raises(ValueError, match="Invalid learning rate"):
        Adam([torch.nn.Parameter(torch.ones(2))], lr=-1.0)


def test_adam_is_wrong():
    raise AssertionError


def test_sgd_is_another_matter():
    raise AssertionError
"""


@pytest.mark.slow  # two runs of pytest, each in a process of its own
def test_a_peers_tests_run_on_theirs_and_on_ours(tmp_path, capfd):
    peer = tmp_path / "test_peer.py"
    peer.write_text(PEER)
    reasons = tmp_path / "optim.txt"
    reasons.write_text("# why\n*differentiable*: refused\nnothing: is called so\n")
    assert main(["optim", str(peer)], tmp_path) == 1
    out = capfd.readouterr().out
    assert "fails with ours: test_module_of_adam\n" in out
    assert "fails with ours: test_differentiable_adam" not in out
    assert "not needed in this run: the exception nothing" in out
    assert "optim: 5 pass with theirs, 3 pass with ours, 1 are exceptions" in out
    assert "1 fail with ours, 1 do not pass with theirs" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optim.txt", "test_peer.py"]


def test_what_passes_with_neither_counts_for_nothing():
    theirs = {"a": "passed", "b": "failed", "c": "passed", "d": "passed", "e": "skipped"}
    ours = {"a": "passed", "b": "failed", "c": "failed", "e": "passed"}
    counts, wrong, unneeded = compare(theirs, ours, {"d*": "not collected", "a": "passes"})
    assert wrong == ["c"]
    assert unneeded == ["a"]
    assert counts == {
        "pass with theirs": 3,
        "do not pass with theirs": 2,
        "pass with ours": 1,
        "are exceptions": 1,
        "fail with ours": 1,
    }


def test_a_missing_path_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["optim", str(tmp_path / "gone.py")])
    assert error.value.code == 2
    assert "gone.py does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("suite", SUITES)
def test_every_exception_has_a_reason(suite):
    assert all(len(reason) > 8 for reason in read_exceptions(suite).values())
