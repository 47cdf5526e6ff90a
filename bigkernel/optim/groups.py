"""Which of a model's parameters are Muon's: read from the modules that hold them."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from bigkernel.expect import Expect, shape_of

__all__ = ["muon_groups"]

_EXPECT = Expect("optim.muon_groups")
# The matrices of nn.MultiheadAttention; the one after attention is a Linear of its own.
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def muon_groups(
    model: nn.Module,
    *,
    head: str | Iterable[str] | None = None,
    decay: Iterable[str] | None = None,
    muon: Mapping[str, Any] | None = None,
    adamw: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A model's trained parameters in groups for :class:`Muon`, sorted by the modules they are in.

    Muon's are the weights of ``nn.Linear``, of transformers' ``Conv1D`` and the projections of
    ``nn.MultiheadAttention``, and three-dimensional weights of experts: those whose first size is
    a number of experts that the module names (``num_experts``). AdamW's is all else: embeddings
    and what is tied to one, the head, norms, biases, convolutions, and parameters of modules that
    are not known here. Each group has the names of its parameters under "param_names".

    Args:
        model: any module. Parameters without ``requires_grad`` are left out.
        head: names of the modules that make the output, with all inside them: AdamW's. None asks
            the model: of one of transformers all that is outside its base model, and its output
            embeddings; of one of timm its classifier. ``()`` is a model without one.
        decay: names of the parameters that are decayed. None: those of two dimensions and more.
            The others' groups have weight_decay 0.
        muon: options of Muon's groups, such as ``{"lr": 0.02}``.
        adamw: options of AdamW's groups, such as ``{"lr": 3e-4, "betas": (0.9, 0.95)}``.

    Returns:
        Groups, none of them empty: first Muon's, then AdamW's.

    Raises:
        ValueError: a head that is not known or not there, a weight that is not whole, or no
            parameter for Muon.
        TypeError: ``model`` is no module.
    """
    _EXPECT.kind("model", model, nn.Module, "a module")
    outside = _inside(_head(model, head))
    decayed = None if decay is None else set(decay)
    # A tied parameter is in several modules, and Muon's only if it is in all of them.
    kinds: dict[int, list[tuple[bool, bool | None]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=True):
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            kind = (False, False) if id(module) in outside else _kind(module, name, p, prefix)
            kinds.setdefault(id(p), []).append(kind)
    sorted_: dict[tuple[bool, bool, bool | None], list[tuple[str, Tensor]]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_muon = all(kind[0] for kind in kinds[id(p)])
            decays = p.ndim >= 2 if decayed is None else name in decayed
            key = not is_muon, not decays, kinds[id(p)][0][1] if is_muon else False
            sorted_.setdefault(key, []).append((name, p))
    if all(key[0] for key in sorted_):
        what = "at least one trained parameter"
        expected = "a weight between layers: of a Linear outside the head, or of experts"
        names = [name for named in sorted_.values() for name, _ in named]
        got = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "none"
        raise _EXPECT.error(what, expected, got, "Use bigkernel.optim.AdamW")
    groups = []
    for (rest, undecayed, transposed), params in sorted(sorted_.items(), key=_order):
        group = {"params": params, "use_muon": not rest, **((adamw if rest else muon) or {})}
        if not rest:
            group.setdefault("transposed", transposed)
        if undecayed:
            group["weight_decay"] = 0.0
        groups.append(group)
    return groups


def _order(item: tuple[tuple[bool, bool, bool | None], Any]) -> tuple[bool, bool, str]:
    (rest, undecayed, transposed), _ = item
    return rest, undecayed, str(transposed)


def _kind(module: nn.Module, name: str, p: Tensor, prefix: str) -> tuple[bool, bool | None]:
    """Whether a parameter is Muon's, and whether it is stored [in, out] (None: who knows)."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    conv1d = getattr(transformers, "Conv1D", ())
    if name == "weight" and isinstance(module, (nn.Linear, conv1d)):
        fix = "Shard with FSDP2 (fully_shard), or sort the parameters before they are flattened"
        whole = f"{prefix}.{name}".lstrip(".")
        _EXPECT(p.ndim == 2, whole, "a whole matrix", shape_of(p), fix)
        return True, not isinstance(module, nn.Linear)
    if isinstance(module, nn.MultiheadAttention):
        return name in _PROJECTIONS, False
    if p.ndim == 3 and _has_experts(module, p.shape[0]):
        stored = getattr(module, "is_transposed", None)
        return True, stored if isinstance(stored, bool) else None
    return False, False


def _has_experts(module: nn.Module, count: int) -> bool:
    return any(
        "expert" in name and type(value) is int and value == count
        for name, value in vars(module).items()
    )


def _head(model: nn.Module, given: str | Iterable[str] | None) -> list[nn.Module]:
    """The modules that make the output."""
    if given is not None:
        modules = dict(model.named_modules())
        names = [given] if isinstance(given, str) else list(given)
        for name in names:
            there = name in modules and name != ""
            expected = "names of modules of the model, as in model.named_modules()"
            _EXPECT(there, "head", expected, repr(name))
        return [modules[name] for name in names]
    body = _unwrapped(model)
    base = getattr(body, "base_model", body)
    asked = False
    heads: list[Any] = []
    for owner in (body, base):
        for ask in ("get_output_embeddings", "get_classifier"):
            method = getattr(owner, ask, None)
            if callable(method):
                asked, found = True, method()
                heads += found if isinstance(found, (tuple, list)) else [found]
    fix = "Name the output layer, as in head='fc', or say head=() if there is none"
    got = f"None for a {type(body).__name__}, which does not say"
    _EXPECT(asked, "head", "given", got, fix)
    children = list(body.children())
    if any(child is base for child in children):
        heads += [child for child in children if child is not base]
    return [head for head in heads if isinstance(head, nn.Module)]


def _unwrapped(model: Any) -> Any:
    """The model inside what torch.compile, DistributedDataParallel and PEFT put around it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            return model.get_base_model()
        else:
            return model


def _inside(modules: Iterable[nn.Module]) -> set[int]:
    return {id(inner) for module in modules for inner in module.modules()}
