"""bigkernel's attention in the models that go through transformers' AttentionInterface.

The choice of attention stands in a model's config, which other models may share, so each model gets
a config of its own.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bigkernel.integrations import t5
from bigkernel.integrations import transformers as registered
from bigkernel.integrations.report import Change
from bigkernel.integrations.subclass import original_class


def apply(model: nn.Module, names: frozenset[str]) -> Change:
    """Switch the attention of every model of transformers in ``model``."""
    change = Change()
    reasons: dict[int, str] = {}  # by id of the config that was not switched
    before: dict[int, Any] = {}
    for top in _outermost(model, PreTrainedModel):
        configs = _configs(top)
        reason = _why_not(top, configs)
        if reason is not None:
            reasons.update({id(config): reason for config in configs})
            continue
        name = _name_for(top)
        if all(_now(config) == name for config in configs):  # a part of what is patched
            before.update({id(config): name for config in configs})
            continue
        owns = _give_own_configs(model, configs)
        before.update({id(own.config): _now(own.original) for own in owns})
        top.set_attn_implementation(name)
        for own in owns:
            own.note()
        change.undo += owns
        change.undo += t5.apply(top)
    _describe(model, before, reasons, change)
    return change


def is_stale(undo: Any) -> bool:
    """Whether another attention was chosen since `apply` returned this."""
    return isinstance(undo, _OwnConfig) and _now(undo.config) != undo.attention


@dataclass
class _OwnConfig:
    """A config that a model got in the place of one that other models may share."""

    config: Any
    original: Any
    users: list[tuple[nn.Module, str]]  # module, attribute
    attention: Any = None  # what apply chose
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


def _describe(
    model: nn.Module, before: dict[int, Any], reasons: dict[int, str], change: Change
) -> None:
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, nn.MultiheadAttention):
            change.leave(module, "attention", "torch.nn.MultiheadAttention has its own forward")
        elif _calls_interface(original_class(module)):
            config = getattr(module, "config", None)
            reason = reasons.get(id(config))
            if reason is not None:
                change.leave(module, "attention", reason)
            elif "bigkernel" in str(getattr(config, "_attn_implementation", "")):
                change.replace(module, "attention", f"was {before.get(id(config))}")
            else:
                change.leave(module, "attention", "its config could not be switched")
        elif "Attention" in kind and not any(
            "Attention" in type(c).__name__ for c in _inside(module)
        ):
            reason = "its attention does not go through transformers' AttentionInterface"
            change.leave(module, "attention", reason)


def _inside(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if child is not module]


def _calls_interface(cls: type) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError, AttributeError):
        return False
