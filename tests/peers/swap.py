"""pytest plugin of ``tests.peers``: puts our names where a peer's tests look for its own.

``BIGKERNEL_PEER`` is ``SUITE:SIDE``; with the side "theirs" nothing is swapped, but the same tests
are chosen. Everything happens before the tests are imported.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch

SUITE, SIDE = os.environ["BIGKERNEL_PEER"].split(":")

# Which tests concern what is swapped, by their ids.
CHOSEN = {
    "optim": re.compile(r"(?<![A-Za-z])Adam(W)?(?![a-z])|adamw?(?![a-z])"),
    "sdpa": re.compile(r"sdp|scaled_dot|attn_bias|causal", re.IGNORECASE),
    "flash": re.compile(r"test_flash_attn_(output|varlen_output|causal|varlen_causal)\["),
    "transforms": re.compile(
        # The classes that we have, and not torchvision's own functions.
        r"^Test(Resize|ResizedCrop|(Horizontal|Vertical)Flip|Affine|Rotate|ToDtype|Crop|CenterCrop|Pad"
        r"|Normalize|ColorJitter|RgbToGrayscale|ToImage|ContainerTransforms)::(?!test_(kernel|functional))"
    ),
}


def swap_optim() -> None:
    import bigkernel

    torch.optim.Adam = bigkernel.optim.Adam
    torch.optim.AdamW = bigkernel.optim.AdamW


def swap_sdpa() -> None:
    import bigkernel

    torch.nn.functional.scaled_dot_product_attention = bigkernel.scaled_dot_product_attention


def swap_transforms() -> None:
    from torchvision.transforms import v2

    import bigkernel

    for name in vars(bigkernel.transforms):
        if isinstance(getattr(v2, name, None), type) and name not in ("InterpolationMode",):
            setattr(v2, name, getattr(bigkernel.transforms, name))
    # Their tests make every warning an error; float64 is computed by PyTorch, which ours says.
    bigkernel.backend._fall_back = lambda op, why: None


def swap_trainer() -> None:
    import transformers

    import bigkernel

    # Where tests import them from, and not in their own modules: there, pickle and the contract
    # with transformers look for theirs.
    for name in ("Trainer", "TrainingArguments", "Seq2SeqTrainer", "Seq2SeqTrainingArguments"):
        setattr(transformers, name, getattr(bigkernel, name))


def swap_examples() -> None:
    """Nothing here: what imports ours is the script itself (examples.py)."""


class _OnTheCpu(torch.overrides.TorchFunctionMode):
    """What asks for "cuda" gets the CPU."""

    def __torch_function__(
        self, function: Any, kinds: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        keywords = dict(keywords or {})
        if str(keywords.get("device", "")).startswith("cuda"):
            keywords["device"] = "cpu"
        return function(*arguments, **keywords)


def _flash(attend: Any, attend_packed: Any) -> dict[str, Any]:
    """flash-attention's functions on attention [B, H, S, D] and on packed attention."""

    def sides(window: Any, causal: bool) -> tuple[Any, Any]:
        left, right = (None if side < 0 else side for side in window)
        return left, None if causal else right

    def options(causal: bool, window: Any, softcap: float, slopes: Any, scale: Any) -> Any:
        window = sides(window, causal)
        return {"causal": causal, "window": window, "softcap": softcap, "alibi_slopes": slopes} | {
            "scale": scale
        }

    def result(out: Any, wanted: bool) -> Any:
        return (out, None, None) if wanted else out

    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Any = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        if dropout_p:
            pytest.skip("dropout draws other numbers")
        given = options(causal, window_size, softcap, alibi_slopes, softmax_scale)
        out = attend(*(x.transpose(1, 2) for x in (q, k, v)), **given)
        return result(out.transpose(1, 2), return_attn_probs)

    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Any = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Any = None,
    ) -> Any:
        if dropout_p:
            pytest.skip("dropout draws other numbers")
        if block_table is not None:
            pytest.skip("paged keys")
        given = options(causal, window_size, softcap, alibi_slopes, softmax_scale)
        lengths = (int(max_seqlen_q), int(max_seqlen_k))
        out = attend_packed(q, k, v, (cu_seqlens_q, cu_seqlens_k), lengths, given)
        return result(out, return_attn_probs)

    def with_packed(function: Any, dimension: int, parts: int) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            states = list(arguments[:parts])
            states[-1:] = states[-1].unbind(dimension)
            return function(*states, *arguments[parts:], **keywords)

        return call

    def not_here(*arguments: Any, **keywords: Any) -> Any:
        pytest.skip("caches are not ours")

    return {
        "flash_attn_func": flash_attn_func,
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_kvpacked_func": with_packed(flash_attn_func, 2, 2),
        "flash_attn_varlen_kvpacked_func": with_packed(flash_attn_varlen_func, 1, 2),
        "flash_attn_qkvpacked_func": with_packed(flash_attn_func, 2, 1),
        "flash_attn_varlen_qkvpacked_func": not_here,
        "flash_attn_with_kvcache": not_here,
    }


def swap_flash() -> None:
    """A stand-in for the package, which needs a GPU; "theirs" is PyTorch in its place."""
    from bigkernel import use_backend
    from bigkernel.ops import attention, attention_varlen

    def attend(q: Any, k: Any, v: Any, **given: Any) -> Any:
        with use_backend("torch" if SIDE == "theirs" else None):
            return attention(q, k, v, align="bottom_right", **given)

    def attend_packed(q: Any, k: Any, v: Any, offsets: Any, lengths: Any, given: Any) -> Any:
        with use_backend("torch" if SIDE == "theirs" else None):
            return attention_varlen(
                q,
                k,
                v,
                *(offset.to(torch.int32) for offset in offsets),
                max_seqlen_q=lengths[0],
                max_seqlen_k=lengths[1],
                align="bottom_right",
                **given,
            )

    def unpad_input(x: Any, mask: Any, unused: Any = None) -> Any:
        lengths = mask.sum(-1, dtype=torch.int32)
        indices = mask.flatten().nonzero().flatten()
        offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return x.flatten(0, 1)[indices], indices, offsets, int(lengths.max()), lengths

    def pad_input(x: Any, indices: Any, batch: int, length: int) -> Any:
        out = x.new_zeros(batch * length, *x.shape[1:])
        return out.index_copy(0, indices, x).unflatten(0, (batch, length))

    modules = {
        "flash_attn": _flash(attend, attend_packed),
        "flash_attn.bert_padding": {"pad_input": pad_input, "unpad_input": unpad_input},
        "flash_attn.flash_attn_interface": {
            "_get_block_size_n": lambda *arguments: 64,
            "USE_TRITON_ROCM": False,
        },
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": {"apply_rotary_emb": None},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        total_memory=8 * 2**30
    )
    torch.cuda.synchronize = lambda device=None: None
    _OnTheCpu().__enter__()


def _leave_out_differentiable() -> None:
    """Many tests loop over every option; the one that we refuse would hide the others.

    Read only now, since the table holds the classes that it finds when it is imported.
    """
    try:
        from torch.testing._internal.common_optimizers import optim_db
    except ModuleNotFoundError:  # expecttest, without which no test here can have imported it
        return
    for info in optim_db:
        info.supported_impls = tuple(x for x in info.supported_impls if x != "differentiable")


def _leave_out_samples(modules: set[Any]) -> None:
    """Most tests end with checks that would hide what they are about: of samples, with boxes, masks
    and anything else beside the images, and of the class in torchvision.transforms (v1).
    """
    for module in modules:
        for name in ("sample_input_smoke", "v1_compatibility"):
            setattr(module, f"_check_transform_{name}", lambda *arguments, **keywords: None)


def _in_our_words_too(ask: Any) -> Any:
    """``pytest.raises`` or ``warns``, to which ours may say it in words of their own.

    Of the class that theirs expect it has to be all the same.
    """

    @functools.wraps(ask)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if keywords.get("match") is not None:
            keywords["match"] = _or_ours(keywords["match"])
        return ask(*arguments, **keywords)

    return call


def _or_ours(expected: Any) -> Any:
    text, flags = getattr(expected, "pattern", expected), getattr(expected, "flags", 0)
    return re.compile(rf"(?:{text})|\Abigkernel\b", flags)


def _take_our_words() -> None:
    raises_regex = unittest.TestCase.assertRaisesRegex

    @functools.wraps(raises_regex)
    def in_unittest(case: Any, kind: Any, expected: Any, *arguments: Any, **keywords: Any) -> Any:
        return raises_regex(case, kind, _or_ours(expected), *arguments, **keywords)

    unittest.TestCase.assertRaisesRegex = in_unittest  # type: ignore[method-assign]
    pytest.raises, pytest.warns = map(_in_our_words_too, (pytest.raises, pytest.warns))


class _Thinned:
    """``pytest.mark`` with a grid that can be collected: flash-attention's has 200,000 points."""

    _LENGTHS = 2**17  # the largest product of two lengths

    def __init__(self, mark: Any) -> None:
        self._mark = mark

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mark, name)

    def parametrize(self, names: str, values: Any, **keywords: Any) -> Any:
        if names in ("dropout_p", "deterministic"):  # draws are not shared; ours always is
            values = values[:1]
        elif names == "d":
            values = [32, 59, 128]
        elif names == "seqlen_q,seqlen_k":
            values = [pair for pair in values if pair[0] * pair[1] <= self._LENGTHS]
        return self._mark.parametrize(names, values, **keywords)


def pytest_configure(config: pytest.Config) -> None:
    if SIDE == "ours" or SUITE == "flash":
        globals()[f"swap_{SUITE}"]()
    if SIDE == "ours":
        _take_our_words()
    if SUITE == "optim":
        _leave_out_differentiable()
    if SUITE == "flash":
        pytest.mark = _Thinned(pytest.mark)  # type: ignore[assignment]


def _id(node: str) -> str:
    """The id without the file: files of a suite have no two tests of one class and name."""
    return node.split("::", 1)[-1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = CHOSEN.get(SUITE)
    if chosen is not None:
        items[:] = [item for item in items if chosen.search(_id(item.nodeid))]
    if SUITE == "transforms":
        _leave_out_samples({item.module for item in items})


_outcomes: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = _id(report.nodeid)
    tells = report.when == "call" or report.outcome != "passed"
    if tells and _outcomes.get(name) != "failed":
        _outcomes[name] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # not in a process of pytest-xdist
        Path(os.environ["BIGKERNEL_PEER_RESULT"]).write_text(json.dumps(_outcomes))
