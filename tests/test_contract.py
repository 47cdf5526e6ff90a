"""What we rely on in transformers beside its documented interface: all in one table, and checked.

`make test-transformers` runs this file, and what else matters, at both ends of the range.
"""

import ast
import inspect
import re
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from bigkernel import Trainer
from bigkernel.integrations import contract

ROOT = Path(__file__).resolve().parent.parent
NEEDS = [need for group in contract.NEEDS.values() for need in group]
NAMES = {need.name for need in NEEDS}
THEIRS = (
    transformers.Trainer,
    transformers.PreTrainedModel,
    transformers.PreTrainedConfig,
    transformers.PreTrainedTokenizerBase,
)


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: f"{need.owner}.{need.name}")
def test_transformers_has_it_as_expected(need):
    need.check()


def test_what_the_trainer_overrides_is_in_the_contract():
    own = {name for name, member in vars(Trainer).items() if inspect.isfunction(member)}
    own |= {name for name, member in vars(Trainer).items() if isinstance(member, staticmethod)}
    overridden = {name for name in own if hasattr(transformers.Trainer, name)} - {"__init__"}
    assert len(overridden) > 20
    assert overridden <= NAMES


def test_every_private_name_of_transformers_is_in_the_contract():
    """Private names that we read or import and that transformers has."""
    private = re.compile(r"_[a-z]\w*")
    theirs = set().union(*(set(dir(cls)) | contract._names_in(cls) for cls in THEIRS))
    theirs -= {*dir(torch.Tensor), *dir(torch.nn.Module)}
    seen = set()
    for path in (ROOT / "bigkernel").rglob("*.py"):
        text = path.read_text()
        if "transformers" not in text or path.name == "contract.py":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and private.fullmatch(node.attr):
                seen |= {node.attr} & theirs
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                seen |= {node.value} & {name for name in theirs if private.fullmatch(name)}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "transformers"
            ):
                names = {alias.name for alias in node.names} | {*node.module.split(".")}
                seen |= {name for name in names if private.fullmatch(name)}
    assert {"_clip_grad_norm", "_attn_implementation"} <= seen
    assert seen <= NAMES


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda self, model, norm: None, "(self, model, norm)"),
        (None, "nothing"),
        (3, "a value of type int"),
    ],
    ids=["signature", "gone", "no-function"],
)
def test_what_changed_is_one_sentence_and_no_trainer(change, found, monkeypatch, tmp_path):
    if change is None:
        monkeypatch.delattr(transformers.Trainer, "_clip_grad_norm")
    else:
        monkeypatch.setattr(transformers.Trainer, "_clip_grad_norm", change)
    contract.check.cache_clear()
    expected = (
        "bigkernel relies on transformers.trainer.Trainer._clip_grad_norm being (self, model), and "
        f"transformers {transformers.__version__} has {found} there; versions known to work: "
        f"{contract.OLDEST} to {contract.NEWEST}."
    )
    with pytest.raises(contract.TransformersChangedError, match=f"^{re.escape(expected)}$"):
        Trainer(model=None, args=None)
    monkeypatch.undo()
    contract.check("trainer")


def test_variables_of_closures_and_attributes_are_compared(monkeypatch):
    (need,) = (need for need in NEEDS if need.name == "remap_positions_for_packed_sequence")

    def renamed(mask_function, position_ids):
        places = position_ids

        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return mask_function(batch_idx, head_idx, places[q_idx], places[kv_idx])

        return inner_mask

    monkeypatch.setattr(f"{need.owner}.{need.name}", renamed)
    assert need.found() == "(mask_function, position_ids) -> closure of mask_function, places"
    absent = contract.Need("transformers.trainer.Trainer", "_no_such", "an instance attribute")
    with pytest.raises(contract.TransformersChangedError, match="has nothing there"):
        absent.check()


def test_the_range_is_what_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (line,) = (
        line
        for line in project["optional-dependencies"]["train"]
        if line.startswith("transformers")
    )
    accepted = SpecifierSet(line.removeprefix("transformers"))
    oldest, newest = Version(contract.OLDEST), Version(contract.NEWEST)
    assert oldest in accepted
    assert newest in accepted
    assert Version(f"{oldest.major}.{oldest.minor - 1}.99") not in accepted
    assert Version(f"{newest.major}.{newest.minor + 1}") not in accepted
    makefile = (ROOT / "Makefile").read_text()
    assert f"\nTRANSFORMERS ?= {contract.OLDEST} {contract.NEWEST}\n" in makefile
    assert Version(transformers.__version__) in accepted
