"""``accelerate(model)``: bigkernel's attention in a model that exists already, and back again."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from bigkernel.errors import check

ModelT = TypeVar("ModelT", bound=nn.Module)
_UNDO = "_bigkernel_undo"


@dataclass
class Report:
    """What ``accelerate`` did: a line for each kind of layer, with how many there are."""

    replaced: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"bigkernel: replaced {line}" for line in self.replaced]
        lines += [f"bigkernel: left {line}" for line in self.left]
        return "\n".join(lines or ["bigkernel: found no attention to replace"])


def accelerate(model: ModelT, quiet: bool = False) -> ModelT:
    """Switch the attention of a model to bigkernel's, in place, and print what was switched.

    Every transformers model in ``model`` (itself, or one inside it) whose layers go through
    transformers' AttentionInterface is switched. Parameters, results and saved checkpoints stay
    what they were: the choice is not saved, and a model that is loaded again needs this call again.
    The choice of attention stands in the config, which other models may share, so the model gets a
    config of its own: ``model.config`` is another object until :func:`restore` puts the old one
    back, with what was changed in the meantime.

    Calling it twice is the same as once, unless another attention was chosen in between; parts that
    were accelerated by themselves belong to the whole from then on.

    Args:
        model: any module.
        quiet: print nothing; ``report(model)`` still tells.

    Returns:
        the same model.
    """
    check(
        isinstance(model, nn.Module),
        "accelerate",
        "model",
        "a torch.nn.Module",
        type(model).__name__,
        cls=TypeError,
    )
    known = model.__dict__.get(_UNDO)
    if known is None or any(_now(own.config) != own.attention for own in known[1]):
        for part in model.modules():
            restore(part)
        # Through __dict__: nn.Module would take a module in the list for a child.
        model.__dict__[_UNDO] = _switch(model)
    if not quiet:
        print(report(model))
    return model


def restore(model: ModelT) -> ModelT:
    """Undo :func:`accelerate` exactly; a model that was not accelerated is left as it is.

    So is a part for which another attention was chosen since, or that was restored by itself.
    """
    check(
        isinstance(model, nn.Module),
        "restore",
        "model",
        "a torch.nn.Module",
        type(model).__name__,
        cls=TypeError,
    )
    _, undo = model.__dict__.pop(_UNDO, (None, []))
    for own in reversed(undo):
        own.give_back()
    return model


@dataclass
class _OwnConfig:
    """A config that a model got in the place of one that other models may share."""

    config: Any
    original: Any
    users: list[tuple[nn.Module, str]]  # module, attribute
    attention: Any = None  # what accelerate chose
    known: dict[str, Any] = field(default_factory=dict)  # the config's attributes since then

    def note(self) -> None:
        self.attention = _now(self.config)
        self.known = dict(vars(self.config))

    def give_back(self) -> None:
        """Put the original in its place again, with what was changed in the other one since."""
        own, original = vars(self.config), vars(self.original)
        missing = object()
        for name in own.keys() | self.known.keys():
            value = own.get(name, missing)
            if value is missing:
                original.pop(name, None)
            elif value is not self.known.get(name, missing):
                original[name] = value
        for module, name in self.users:
            if module.__dict__.get(name) is self.config:
                module.__dict__[name] = self.original


def _give_own_configs(model: nn.Module, configs: list[Any]) -> list[_OwnConfig]:
    """Copy the configs that the modules of ``model`` hold, and put the copies in their places."""
    owns = {id(config): _OwnConfig(copy.copy(config), config, []) for config in configs}
    for own in owns.values():  # sub-configs
        for name, value in vars(own.config).items():
            if id(value) in owns:
                vars(own.config)[name] = owns[id(value)].config
    for module in model.modules():
        for name, value in module.__dict__.items():
            if id(value) in owns:
                module.__dict__[name] = owns[id(value)].config
                owns[id(value)].users.append((module, name))
    return list(owns.values())


def _now(config: Any) -> Any:
    return config._attn_implementation_internal


def report(model: nn.Module) -> Report:
    """What ``accelerate`` replaced in this model and what it could not; empty before it ran."""
    known = model.__dict__.get(_UNDO)
    return known[0] if known is not None else Report()


def _switch(model: nn.Module) -> tuple[Report, list[_OwnConfig]]:
    """The report, and what the configs were replaced by."""
    from transformers import PreTrainedModel

    undo: list[_OwnConfig] = []
    reasons: dict[int, str] = {}  # by id of the config that was not switched
    before: dict[int, Any] = {}
    for top in _outermost(model, PreTrainedModel):
        configs = _configs(top)
        reason = _why_not(top, configs)
        if reason is not None:
            reasons.update({id(config): reason for config in configs})
            continue
        name = _name_for(top)
        if all(_now(config) == name for config in configs):  # a part of what is accelerated
            before.update({id(config): name for config in configs})
            continue
        owns = _give_own_configs(model, configs)
        before.update({id(own.config): _now(own.original) for own in owns})
        top.set_attn_implementation(name)
        for own in owns:
            own.note()
        undo += owns
    return _describe(model, before, reasons), undo


def _outermost(model: nn.Module, kind: type) -> list[Any]:
    if isinstance(model, kind):
        return [model]
    return [found for child in model.children() for found in _outermost(child, kind)]


def _configs(model: Any) -> list[Any]:
    """The configs of a model, its parts and their sub-configs, each once."""
    found: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if config is None or id(config) in found or not hasattr(config, "_attn_implementation"):
            return
        found[id(config)] = config
        for name in config.sub_configs:
            visit(getattr(config, name, None))

    for module in model.modules():
        visit(getattr(module, "config", None))
    return list(found.values())


def _why_not(model: Any, configs: list[Any]) -> str | None:
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface"
    if any(getattr(config, "output_attentions", False) for config in configs):
        return "config.output_attentions asks for attention weights, which are never formed"
    if any("paged" in str(config._attn_implementation) for config in configs):
        return "it uses a paged cache"
    return None


def _name_for(model: Any) -> str:
    """The compact form of masks where the model's source shows that it can be relied on.

    Its attention must be written for FlashAttention, whose masks have the same form, hand
    ``sliding_window`` to the attention function, and not look into a mask on the way there.
    """
    from transformers import PreTrainedModel

    from bigkernel.integrations import transformers as registered

    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        source = _source(type(part))
        window = getattr(part.config, "sliding_window", None) is not None
        if (
            not getattr(part, "_supports_flash_attn", False)
            or "is_flash_attention_requested(" in source
            or "attention_mask[:, :" in source
            or "causal_mask[:, :" in source
            or (window and "sliding_window=" not in source)
        ):
            return registered.NAME
    return registered.COMPACT_NAME


def _source(cls: type) -> str:
    module = inspect.getmodule(cls)
    try:
        return inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):
        return "attention_mask[:, :"  # cannot be read, so nothing can be relied on


def _describe(model: nn.Module, before: dict[int, Any], reasons: dict[int, str]) -> Report:
    replaced: Counter[str] = Counter()
    left: Counter[tuple[str, str]] = Counter()
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, nn.MultiheadAttention):
            left[kind, "torch.nn.MultiheadAttention has its own forward"] += 1
        elif _calls_interface(type(module)):
            config = getattr(module, "config", None)
            reason = reasons.get(id(config))
            if reason is not None:
                left[kind, reason] += 1
            elif "bigkernel" in str(getattr(config, "_attn_implementation", "")):
                replaced[f"{kind} (was {before.get(id(config))})"] += 1
            else:
                left[kind, "its config could not be switched"] += 1
        elif "Attention" in kind and not any(
            "Attention" in type(c).__name__ for c in _inside(module)
        ):
            reason = "its attention does not go through transformers' AttentionInterface"
            left[kind, reason] += 1
    return Report(
        [f"attention in {count} x {kind}" for kind, count in replaced.items()],
        [f"{count} x {kind} as it is: {reason}" for (kind, reason), count in left.items()],
    )


def _inside(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if child is not module]


def _calls_interface(cls: type) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError, AttributeError):
        return False
