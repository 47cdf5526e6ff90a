"""``patch(model)``: bigkernel in a model that exists already, and back again.

What can be replaced is a list, `REPLACEMENTS`. Each entry looks through a model for what it knows,
replaces it, and returns what undoes that and what is to be said about it (`report.Change`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from torch import nn

from bigkernel.expect import Expect
from bigkernel.integrations import activations, attention, forwards, heads, linears, loss, norms
from bigkernel.integrations.report import Change, Report

ModelT = TypeVar("ModelT", bound=nn.Module)
_PATCHED = "_bigkernel_patched"


class Replacement(NamedTuple):
    """What replaces something in models.

    names: as in ``patch(only=...)``. apply: called with the model and the names that are wanted,
    these and others, and ``skip_logits`` for ``patch(logits=False)``. It changes instances, no
    class, no parameter, nothing that is saved; a module that it has changed before counts as
    replaced, with nothing to undo.
    """

    names: tuple[str, ...]
    apply: Callable[[nn.Module, frozenset[str]], Change]


# In this order: layers are rewritten for the norms and activations that stand in them.
REPLACEMENTS = (
    Replacement(("attention",), attention.apply),
    Replacement(("norm", "residual"), norms.apply),
    Replacement(("gelu",), activations.apply),
    Replacement(("residual", "glu", "bias_act", "rope", "projections"), forwards.apply),
    Replacement(("cross_entropy",), loss.apply),
    Replacement(("linear_cross_entropy",), heads.apply),
    Replacement(("linear",), linears.apply),
)
NAMES = tuple(dict.fromkeys(name for entry in REPLACEMENTS for name in entry.names))


class _Patched(NamedTuple):
    """What a patched model keeps."""

    names: frozenset[str]
    report: Report
    undo: list[Any]


def patch(
    model: ModelT,
    quiet: bool = False,
    strict: bool = False,
    only: Iterable[str] | None = None,
    *,
    logits: bool = True,
) -> ModelT:
    """Put bigkernel's ops into a model, in place, and print what was replaced.

    - attention: of every model of transformers in ``model`` whose layers go through transformers'
      AttentionInterface;
    - norm: RMS norms, and residual: additions to the residual stream that a norm follows;
    - rope: rotary position embedding; glu: SwiGLU, GeGLU and so on; bias_act: the bias of a
      linear layer with the activation after it; gelu: where it is written out;
    - projections: linear layers of one input, such as q, k and v, as one product under autocast;
    - cross_entropy: the loss of causal and masked language models;
    - linear_cross_entropy: that and the head before it, in calls whose logits nobody wants;
    - linear: torch's Linear and transformers' Conv1D, in 16 bits, on processors that multiply none.

    A module is known by what it computes, not by its name; what cannot be served stays as it is and
    is named. So does a call that no kernel is for, at run time: another dtype or device, a tensor
    subclass, a module with hooks in the middle of what would be one op. Instances are changed, no
    class: parameters, results, hooks and saved checkpoints stay what they were. The choice is not
    saved, and a model that is loaded again needs this call again; a model that is copied or
    pickled whole stays patched. The patched modules have a subclass of their class, and the models
    a config of their own, until :func:`unpatch` puts the old ones back, with what was changed in
    the configs in the meantime.

    Calling it twice is the same as once, unless another attention was chosen in between; parts that
    were patched by themselves belong to the whole from then on.

    Args:
        model: any module.
        quiet: print nothing; ``report(model)`` still tells.
        strict: what cannot be replaced is an error, and the model stays as it was.
        only: the names above that are wanted; all of them if left out.
        logits: False: in training, with labels, language models return ``logits=None`` beside their
            loss, and never hold them whole. In evaluation, and without labels, logits are there. A
            call with ``skip_logits=True`` or ``False`` decides for itself; so do the Trainer's.

    Returns:
        the same model.

    Raises:
        RuntimeError: with strict, naming every miss.
        ValueError, TypeError: an argument does not fit.
    """
    _check_module("patch", model)
    names = frozenset(NAMES if only is None else only)
    unknown = sorted(names.difference(NAMES))
    Expect("patch")(not unknown, "only", f"some of {', '.join(NAMES)}", ", ".join(unknown))
    Expect("patch").kind("logits", logits, bool, "True or False")
    names |= frozenset() if logits else {heads.SKIP}
    known = model.__dict__.get(_PATCHED)
    if known is None or known.names != names or any(map(attention.is_stale, known.undo)):
        for part in model.modules():
            unpatch(part)
        made = Report()
        undo: list[Any] = []
        # Through __dict__: nn.Module would take a module in the list for a child.
        model.__dict__[_PATCHED] = _Patched(names, made, undo)
        for entry in REPLACEMENTS:
            if names.intersection(entry.names):
                change = entry.apply(model, names)
                undo += change.undo
                change.add_to(made)
    told = report(model)
    missed = told.left or ([] if told.replaced else ["all of it: there is nothing to replace"])
    if strict and missed:
        unpatch(model)
        raise RuntimeError(
            f"bigkernel.patch: strict=True, and this would be left: {'; '.join(missed)}. Leave out "
            "strict, or name what is wanted in only=."
        )
    if not quiet:
        print(told)
    return model


def unpatch(model: ModelT) -> ModelT:
    """Undo :func:`patch` exactly; a model that was not patched is left as it is.

    So is a part for which something else was chosen since, or that was restored by itself.
    """
    _check_module("unpatch", model)
    patched = model.__dict__.pop(_PATCHED, None)
    for change in reversed(patched.undo if patched is not None else []):
        change.give_back()
    return model


def report(model: nn.Module) -> Report:
    """What ``patch`` replaced in this model and what it could not; empty before it ran."""
    patched = model.__dict__.get(_PATCHED)
    return patched.report if patched is not None else Report()


def _check_module(name: str, model: object) -> None:
    Expect(name).kind("model", model, nn.Module, "a torch.nn.Module")


# The names that these had when attention was all they knew.
accelerate, restore = patch, unpatch
