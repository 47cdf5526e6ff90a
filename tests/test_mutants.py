"""The runner of ``python -m tests.mutants``, on a made-up module; and its data fit the code."""

import shlex
from pathlib import Path

import pytest

from tests.mutants.__main__ import (
    ROOT,
    Mutant,
    MutantError,
    choose,
    put_back,
    read_mutants,
    try_mutant,
)

MODULE = "def largest(a, b):\n    return a if a > b else b\n"
TESTS = """
from module import largest

def test_order():
    assert largest(1, 2) == largest(2, 1) == 2
"""
MUTANTS = read_mutants()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "module.py").write_text(MODULE)
    (tmp_path / "test_module.py").write_text(TESTS)
    return tmp_path


def mutant(**changes: str) -> Mutant:
    fields = {"name": "made_up", "room": "none", "file": "module.py", "old": "a > b"}
    return Mutant(**{**fields, "new": "a < b", "tests": "test_module.py", **changes})


@pytest.mark.parametrize(("new", "noticed"), [("a < b", True), ("a >= b", False), ("a > c", True)])
def test_a_mutant_is_killed_or_survives_and_is_undone(tree, new, noticed):
    killed, said = try_mutant(mutant(new=new), tree)
    assert killed == noticed
    assert ("test_order" in said) == noticed
    assert (tree / "module.py").read_text() == MODULE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"old": "a != b"}, "occurs 0 times"),
        ({"old": "a"}, "occurs 4 times"),
        ({"new": "a >"}, "no Python"),
        ({"tests": "test_module.py -k nothing"}, "ended with 5"),
        ({"tests": "test_nothing.py"}, "ended with 4"),
    ],
)
def test_a_mutant_that_cannot_be_tried_is_an_error(tree, changes, expected):
    with pytest.raises(MutantError, match=expected):
        try_mutant(mutant(**changes), tree)
    assert (tree / "module.py").read_text() == MODULE


def test_what_a_stopped_call_set_aside_comes_back(tree):
    aside = tree / "build" / "aside" / "bigkernel" / "libbigkernel_ops.so"
    aside.parent.mkdir(parents=True)
    aside.write_text("built")
    (tree / "bigkernel").mkdir()
    put_back(tree)
    assert (tree / "bigkernel" / "libbigkernel_ops.so").read_text() == "built"
    assert not (tree / "build" / "aside").exists()
    put_back(tree)  # nothing to do


def test_names_rooms_and_patterns_choose():
    assert choose(MUTANTS, []) == MUTANTS
    assert {m.room for m in choose(MUTANTS, ["optim"])} == {"optim"}
    assert [m.name for m in choose(MUTANTS, ["fold_fill*"])] == ["fold_fill_after_normalize"]
    with pytest.raises(MutantError, match="no mutant and no room 'optimm'"):
        choose(MUTANTS, ["optim", "optimm"])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_has_its_place_and_its_tests(mutant):
    mutant.changed((ROOT / mutant.file).read_text())  # raises unless the place is the only one
    files = [word for word in shlex.split(mutant.tests) if word.startswith("tests/")]
    assert files
    assert all((ROOT / file.split("::")[0]).is_file() for file in files)
