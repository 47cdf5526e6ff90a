"""RMS norms and layer norms of a model, by what their forward computes.

The forms that are known stand below as code: a class whose forward has the same normal form
(`source.normal_form`) is that norm, whatever it is called. torch's own LayerNorm is a fused kernel
already and as fast as ours, so it stays, except where a residual is added before it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigkernel.integrations import native
from bigkernel.integrations.report import Change
from bigkernel.integrations.source import UnknownSource, normal_form, read
from bigkernel.integrations.subclass import (
    give_subclass,
    is_swapped,
    original_class,
    why_no_subclass,
)
from bigkernel.ops.norm import layer_norm, rms_norm


class Form(NamedTuple):
    """How a class normalises.

    eps: the attribute that holds it. offset, casting: as in `bigkernel.ops.rms_norm`. one_dtype:
    whether it rounds as said only where the input has the weight's dtype.
    """

    op: str  # "rms_norm", "layer_norm"
    eps: str
    offset: float = 0.0
    casting: Any = "llama"
    one_dtype: bool = False


# LLaMA, Mistral, Qwen and most others.
_LLAMA = """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.EPS)
    return self.weight * hidden_states.to(input_dtype)
"""
# GPT-OSS
_LAST = """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.EPS)
    return (self.weight * hidden_states).to(input_dtype)
"""
_T5 = """
def forward(self, hidden_states):
    variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.EPS)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        hidden_states = hidden_states.to(self.weight.dtype)
    return self.weight * hidden_states
"""
_GEMMA = (
    """
def forward(self, x):
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)
""",
    """
def _norm(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.EPS)
""",
)


_LLAMA4 = (
    """
def forward(self, x):
    output = self._norm(x.float()).type_as(x)
    return output * self.weight
""",
    _GEMMA[1],
)


def _known() -> dict[str, Form]:
    forms = {}
    for eps in ("variance_epsilon", "eps", "epsilon"):
        for texts, form in (
            ((_LLAMA,), Form("rms_norm", eps)),
            (_LLAMA4, Form("rms_norm", eps)),
            ((_LAST,), Form("rms_norm", eps, casting="gemma")),
            ((_T5,), Form("rms_norm", eps, one_dtype=True)),
            (_GEMMA, Form("rms_norm", eps, 1.0, "gemma")),
        ):
            forms[normal_form(*(text.replace("EPS", eps) for text in texts))] = form
    return forms


_FORMS = _known()


@functools.cache
def _form_of_class(cls: type[nn.Module]) -> Form | None:
    if cls.forward is nn.LayerNorm.forward:
        return Form("layer_norm", "eps")
    try:
        parts = [read(cls.forward)[0]]
        if hasattr(cls, "_norm"):
            parts.append(read(cls._norm)[0])
    except UnknownSource:
        return None
    return _FORMS.get(normal_form(*parts))


def form_of(module: nn.Module) -> Form | None:
    """How this module normalises the last dimension of what it is given, or None."""
    form = _form_of_class(original_class(module))
    if form is None or not isinstance(getattr(module, form.eps, None), float):
        return None
    if form.op == "layer_norm":
        assert isinstance(module, nn.LayerNorm)
        return form if len(module.normalized_shape) == 1 else None
    weight = module._parameters.get("weight")
    return form if weight is not None and weight.dim() == 1 else None


def _looks_like_a_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        "norm" in type(module).__name__.lower()
        and weight is not None
        and weight.dim() == 1
        and not isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
    )


def apply(model: nn.Module, names: frozenset[str]) -> Change:
    """Replace the norms of ``model``; with "residual" alone, prepare them for `add_norm`."""
    change = Change()
    for module in model.modules():
        form = form_of(module)
        if form is None:
            if "norm" in names and _looks_like_a_norm(module):
                change.leave(module, "norm", "its forward is none that is known")
            continue
        reason = why_no_subclass(module) or native.why_not(form.op, module)
        if reason is not None:
            if "norm" in names:
                change.leave(module, form.op, reason)
            continue
        change.undo += give_subclass(module, subclass, form, "norm" in names)
        if "norm" in names and form.op == "layer_norm":
            change.keep(module, form.op, "torch's kernel is as fast")
        elif "norm" in names:
            change.replace(module, form.op)
    return change


def subclass(base: type[nn.Module], form: Form, alone: bool) -> dict[str, Any]:
    """A norm that can add a residual first, and, where it is ``alone``, is the op by itself."""
    op, eps, offset, casting, one_dtype = form

    def run(module: Any, x: Tensor, residual: Tensor | None) -> Any:
        """The op's result, or None where what was there before is to be used."""
        weight, bias = module.weight, getattr(module, "bias", None)
        if one_dtype and any(t is not None and t.dtype != weight.dtype for t in (x, residual)):
            return None
        if op == "layer_norm":
            if not native.takes(op, x, weight, bias, residual):
                return None
            return layer_norm(x, weight, bias, module.eps, residual=residual)  # type: ignore[call-overload]
        if not native.takes(op, x, weight, residual):
            return None
        return rms_norm(  # type: ignore[call-overload]
            x, weight, getattr(module, eps), residual=residual, offset=offset, casting=casting
        )

    body: dict[str, Any] = {"_bigkernel_run": run}
    if alone and op != "layer_norm":

        def forward(self: Any, hidden_states: Tensor) -> Tensor:
            y = run(self, hidden_states, None)
            return base.forward(self, hidden_states) if y is None else y  # type: ignore[no-any-return]

        body["forward"] = forward
    return body


def add_norm(norm: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """(a + b, norm(a + b)), in one op where ``norm`` is one that was prepared for it."""
    run = getattr(norm, "_bigkernel_run", None)
    if (
        run is not None
        and isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape == b.shape
        and not native.is_watched(norm)
    ):
        # The op mixes its own dtype with a float32 residual.
        wide_first = a.dtype == torch.float32 and b.dtype != torch.float32
        done = run(b, a) if wide_first else run(a, b)
        if done is not None:
            y, total = done
            return total, y
    total = a + b
    return total, norm(total)


def can_add(module: nn.Module) -> bool:
    """Whether `add_norm` has an op for this norm."""
    return is_swapped(module) and hasattr(module, "_bigkernel_run")
