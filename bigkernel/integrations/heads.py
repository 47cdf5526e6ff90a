"""Language models' loss from what goes into their head, where nobody wants the logits.

In the forward of a model::

    logits = self.lm_head(hidden)       a Linear, or a module that ends in one
    logits = softcap(logits)            Gemma 2 writes it out in three lines
    loss = self.loss_function(logits, labels, ..)     or torch's CrossEntropyLoss
    return Output(loss=loss, logits=logits, ..)

the forward is read and compiled again (`source`) with the head's call as `_head`, which leaves the
product to the loss: `bigkernel.ops.linear_cross_entropy` makes it in chunks. ``logits`` of the
output is None then, and so it is only in calls that say so: with ``skip_logits=True``, or in
training under ``patch(model, logits=False)``, and with labels. A value that is made when it is
asked for would be another one after the optimizer's step, in silence; None is noticed.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _modules
from transformers import PreTrainedModel

from bigkernel import precision
from bigkernel.integrations import loss, native
from bigkernel.integrations.report import Change
from bigkernel.integrations.source import (
    UnknownSource,
    at_place,
    compile_again,
    names_in,
    normal_form,
    own_attribute,
    read,
)
from bigkernel.integrations.subclass import give_subclass, original_class, why_no_subclass

OP = "linear_cross_entropy"
SKIP = "skip_logits"  # the argument's name is that of transformers' Trainer for Liger's kernels
_SETTING = "_bigkernel_skips_logits"
_MARK = "_bigkernel_head"
_HEAD, _CAP, _LOSS, _TORCHS, _SKIPS = (
    f"_bigkernel_{name}" for name in ("head", "cap", "loss", "torchs_loss", "skips")
)
_HELD = "_bigkernel_skip"


def apply(model: nn.Module, names: frozenset[str]) -> Change:
    """Rewrite the forwards of the language models in ``model``.

    With ``skip_logits`` among the names they return no logits in training.
    """
    change = Change()
    note = "in training" if SKIP in names else f"in calls with {SKIP}=True, as the Trainer's are"
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        if not getattr(type(module), _MARK, False):
            found = _find(module)
            if found is None:
                continue
            reason = found[0] or native.why_not(OP, module)
            if reason is not None:
                change.leave(module, OP, reason)
                continue
            change.undo += give_subclass(module, subclass, found[1])
        change.replace(module, OP, note)
        if SKIP in names:
            vars(module)[_SETTING] = True
            change.undo.append(_Setting(module))
    return change


@dataclass
class _Setting:
    """A model that returns no logits in training."""

    model: nn.Module

    def give_back(self) -> None:
        vars(self.model).pop(_SETTING, None)


def can_skip_logits(model: nn.Module) -> bool:
    """Whether ``model(.., skip_logits=True)`` is understood, and no hook sees what it returns."""
    inner: Any = model
    if type(model).__module__.startswith("peft."):
        inner = model.get_base_model()  # type: ignore[operator]
    watched = model._forward_hooks or inner._forward_hooks or _modules._global_forward_hooks
    return getattr(type(inner), _MARK, False) and not watched


# What stands in the places of a forward's expressions


class Logits:
    """Those of a language model, not made yet; what a forward may ask of them before its loss.

    Attributes:
        hidden: what goes into the last Linear, ``linear``.
        softcap: as in the op.
    """

    def __init__(self, hidden: Tensor, linear: nn.Linear) -> None:
        self.hidden, self.linear = hidden, linear
        self.softcap: Any = None

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def size(self, at: int) -> int:
        return self.linear.out_features if at == -1 else self.hidden.size(at)

    def view(self, *shape: int) -> Any:
        """These, for the rows that a loss wants; made, for anything else."""
        return self if shape == (-1, self.linear.out_features) else self.made().view(*shape)

    def contiguous(self) -> Logits:
        return self

    def made(self) -> Tensor:
        made: Tensor = _capped(self.linear(self.hidden), self.softcap)
        return made


def _skips(model: nn.Module, asked: Any, labels: Any) -> bool:
    """Whether a call returns no logits."""
    if labels is None:
        return False
    if asked is None:
        return model.training and getattr(model, _SETTING, False)
    return bool(asked)


def _head(skip: bool, head: nn.Module, x: Any) -> Any:
    """``head(x)``, or what it is to be."""
    split = _split(head) if skip else None
    if split is None or any(map(native.is_watched, split.modules)):
        return head(x)
    hidden = split.before(x)
    return Logits(hidden, split.linear) if _serves(hidden, split.linear) else split.linear(hidden)


def _serves(hidden: Any, linear: nn.Linear) -> bool:
    weight, bias = linear.weight, linear.bias
    same = hidden.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)
    cast = precision.autocast_dtype(hidden.device.type)
    dtype = cast or hidden.dtype
    size = hidden.numel() // hidden.shape[-1] * weight.shape[0] * dtype.itemsize
    return (same or cast is not None) and native.takes(
        OP, hidden, weight, bias, size=size, dtype=dtype
    )


def _capped(logits: Any, limit: Any) -> Any:
    if limit is None:
        return logits
    if isinstance(logits, Logits):
        logits.softcap = limit
        return logits
    return torch.tanh(logits / limit) * limit


def _loss(function: Any, logits: Any, *arguments: Any, **options: Any) -> Any:
    """``function(logits, ..)``, a loss."""
    if not isinstance(logits, Logits):
        return function(logits, *arguments, **options)
    parts = logits.hidden, logits.linear, logits.softcap
    made = loss.of_linear(function, *parts, *arguments, **options)
    return function(logits.made(), *arguments, **options) if made is None else made


def _torchs_loss(function: Any, logits: Any, labels: Any) -> Any:
    """``function(logits, labels)``, torch's cross-entropy with what it is called with by itself."""
    # A module that is made where it is called is nothing to ask for its type while compiling.
    if isinstance(logits, Logits) and (
        torch.compiler.is_compiling() or type(function) is nn.CrossEntropyLoss
    ):
        parts = logits.hidden, logits.linear, logits.softcap
        made = loss.of_linear(F.cross_entropy, *parts, labels)
        if made is not None:
            return made
    return function(logits.made() if isinstance(logits, Logits) else logits, labels)


# Heads


class _Split(NamedTuple):
    """A head as what comes before its last Linear and that, and the modules that are not called."""

    before: Callable[[Any], Any]
    linear: nn.Linear
    modules: tuple[nn.Module, ...]


_BERT_OUTSIDE = normal_form(
    """def forward(self, sequence_output):
        prediction_scores = self.predictions(sequence_output)
        return prediction_scores
    """
)
_BERT = normal_form(
    """def forward(self, hidden_states):
        hidden_states = self.transform(hidden_states)
        hidden_states = self.decoder(hidden_states)
        return hidden_states
    """
)
_ROBERTA = normal_form(
    """def forward(self, features, **kwargs):
        x = self.dense(features)
        x = gelu(x)
        x = self.layer_norm(x)
        x = self.decoder(x)
        return x
    """
)


def _split(head: Any) -> _Split | None:
    """The parts of a head; None: not known."""
    if original_class(head) is nn.Linear:
        return _Split(lambda x: x, head, (head,))
    cls = original_class(head)
    form = _form(cls)
    if form == _BERT_OUTSIDE:
        inner = _split(head.predictions)
        return inner and inner._replace(modules=(head, *inner.modules))
    if form not in (_BERT, _ROBERTA) or original_class(head.decoder) is not nn.Linear:
        return None
    parts = (head, head.decoder)
    if form == _BERT:
        return _Split(head.transform, head.decoder, parts)
    gelu = inspect.unwrap(cls.forward).__globals__["gelu"]
    return _Split(lambda x: head.layer_norm(gelu(head.dense(x))), head.decoder, parts)


_forms: dict[Any, str | None] = {}


def _form(cls: Any) -> str | None:
    if cls not in _forms:
        try:
            _forms[cls] = normal_form(read(cls.forward)[0])
        except UnknownSource:
            _forms[cls] = None
    return _forms[cls]


# Forwards


def _find(module: Any) -> tuple[str | None, str] | None:
    """(why the forward of a model is not rewritten, its head); None: it is no language model."""
    cls = original_class(module)
    used = names_in(cls)
    asks = "loss_function" in used and loss.is_known(module.loss_function)
    own = inspect.unwrap(cls.forward).__globals__.get("CrossEntropyLoss") is nn.CrossEntropyLoss
    linear = module.get_output_embeddings()
    if linear is None or not (asks or (own and "CrossEntropyLoss" in used)):
        return None
    reason = why_no_subclass(module)
    if reason is not None:
        return reason, ""
    splits = {name: _split(child) for name, child in module.named_children()}
    heads = [name for name, split in splits.items() if split and split.linear is linear]
    if len(heads) != 1:
        return "its head is none that is known", ""
    try:
        definition, _ = read(cls.forward)
    except UnknownSource as error:
        return str(error), ""
    if _Rewrite(definition, heads[0]).known:
        return None, heads[0]
    # As with the loss: one that is torch's own is none of those that are promised.
    return ("its logits are used between its head and its loss", "") if asks else None


def subclass(base: Any, head: str) -> dict[str, Any]:
    """The body of a subclass of ``base``, a model whose head has this name."""
    definition, function = read(base.forward)
    rewritten = _Rewrite(definition, head).definition
    names = {_HEAD: _head, _CAP: _capped, _LOSS: _loss, _TORCHS: _torchs_loss, _SKIPS: _skips}
    forward = compile_again(rewritten, function, names)
    forward.__doc__ = base.forward.__doc__
    return {
        "forward": forward,
        _MARK: True,
        "from_pretrained": base.from_pretrained,  # what is loaded is as it ever was
    }


class _Rewrite(ast.NodeTransformer):
    """A forward with a head whose product may be left to the loss.

    Attributes:
        known: whether that is its form; ``definition`` is no use else.
        definition: the forward, rewritten.
    """

    def __init__(self, definition: ast.FunctionDef, head: str) -> None:
        self.definition = copy.deepcopy(definition)
        self.known = False
        arguments = self.definition.args
        names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        calls: list[Any] = [n for n in ast.walk(self.definition) if _is_call(n, head)]
        places = [s for s in self.definition.body if _made_by(s) in calls]
        if arguments.kwarg is None or "labels" not in names or len(calls) != 1 or not places:
            return
        (place,), (call,) = places, calls
        target: Any = place.targets[0]  # type: ignore[attr-defined]
        self.logits: str = target.id
        uses = {id(n) for n in ast.walk(self.definition) if self._is_logits(n)}
        self.seen: list[ast.AST] = [target]
        self.losses = 0
        self.functions = {
            n.targets[0].id
            for n in ast.walk(self.definition)
            if isinstance(n, ast.Assign)
            and isinstance(n.targets[0], ast.Name)
            and ast.unparse(n.value) in _TORCHS_LOSSES
        }
        self.visit(self.definition)
        self.known = self.losses == 1 and uses == set(map(id, self.seen))
        call.args = [ast.Name(_HELD, ast.Load()), call.func, *call.args]
        call.func = ast.Name(_HEAD, ast.Load())
        text = f"{_HELD} = {_SKIPS}(self, {arguments.kwarg.arg}.pop({SKIP!r}, None), labels)"
        first = at_place(ast.parse(text).body[0], self.definition.body[0])
        self.definition.body.insert(0, first)

    def _is_logits(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.logits

    def visit_If(self, node: ast.If) -> Any:
        softcap = ast.parse(_SOFTCAP.format(logits=self.logits)).body[0]
        if ast.dump(node) != ast.dump(softcap):
            return self.generic_visit(node)
        self.seen += [n for n in ast.walk(node) if self._is_logits(n)]
        limit: Any = node.test.left  # type: ignore[attr-defined]
        call = ast.Call(ast.Name(_CAP, ast.Load()), [ast.Name(self.logits, ast.Load()), limit], [])
        return at_place(ast.Assign([ast.Name(self.logits, ast.Store())], call), node)

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if self._is_logits(node.value) and node.attr == "device":
            self.seen.append(node.value)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        """A loss."""
        named = isinstance(node.func, ast.Name) and node.func.id in self.functions
        if not named and own_attribute(node.func) != "loss_function":
            return self.generic_visit(node)
        given = [*node.args[:1], *(k.value for k in node.keywords if k.arg == "logits")]
        if len(given) != 1 or (named and (len(node.args) != 2 or node.keywords)):
            return self.generic_visit(node)
        if self._is_logits(given[0]):
            self.seen.append(given[0])
        elif (
            isinstance(view := given[0], ast.Call)
            and isinstance(view.func, ast.Attribute)
            and view.func.attr == "view"
            and self._is_logits(view.func.value)
        ):
            self.seen.append(view.func.value)
            self.seen += [
                n.func.value
                for n in view.args
                if isinstance(n, ast.Call)
                and isinstance(n.func, ast.Attribute)
                and n.func.attr == "size"
                and self._is_logits(n.func.value)
            ]
        else:
            return self.generic_visit(node)
        self.losses += 1
        rest = [a for a in node.args if a is not given[0]]
        options = [k for k in node.keywords if k.value is not given[0]]
        name = _TORCHS if named else _LOSS
        call = ast.Call(ast.Name(name, ast.Load()), [node.func, given[0], *rest], options)
        return ast.copy_location(call, node)

    def visit_Return(self, node: ast.Return) -> Any:
        if isinstance(node.value, ast.Call):
            for keyword in node.value.keywords:
                if keyword.arg == "logits" and self._is_logits(keyword.value):
                    self.seen.append(keyword.value)
                    shown = ast.parse(f"None if {_HELD} else {self.logits}", mode="eval").body
                    keyword.value = at_place(shown, keyword.value)
        return self.generic_visit(node)


_TORCHS_LOSSES = ("CrossEntropyLoss()", "CrossEntropyLoss(ignore_index=-100)")
_SOFTCAP = """
if self.config.final_logit_softcapping is not None:
    {logits} = {logits} / self.config.final_logit_softcapping
    {logits} = torch.tanh({logits})
    {logits} = {logits} * self.config.final_logit_softcapping
"""


def _is_call(node: ast.AST, name: str) -> bool:
    """Whether this is ``self.name(x)``."""
    if not isinstance(node, ast.Call) or own_attribute(node.func) != name:
        return False
    return len(node.args) == 1 and not node.keywords


def _made_by(statement: ast.stmt) -> ast.expr | None:
    """What a name is given, without ``.contiguous()``."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    value = statement.value
    if (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and value.func.attr == "contiguous"
    ):
        value = value.func.value
    return value if isinstance(statement.targets[0], ast.Name) else None
