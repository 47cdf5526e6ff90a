"""The ops that there are: the one list, which every other room reads.

An op is a folder ``bigkernel/ops/<noun>/`` that calls ``register`` once. What it says there decides
where its calls go (``backend.py``), what ``explain``, ``bigkernel env``, ``bigkernel bench`` and
the documentation tell of it, and which files the tests ask for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bigkernel import _library

# What an op can have. "cpu" and "cuda" are native kernels; where there are CUDA kernels, the tests
# run them in the emulator. "benchmark" is a table of `bigkernel bench`.
Level = Literal["cpu", "cuda", "benchmark"]
LEVELS: tuple[Level, ...] = ("cpu", "cuda", "benchmark")
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Function(NamedTuple):
    """One operator of torch.library, defined in Python; native kernels are added to it.

    schema: what follows the name. impl: plain PyTorch. fake: shapes and dtypes alone.
    autograd: takes a namespace of ``torch.ops`` and returns (backward, setup_context).
    """

    name: str
    schema: str
    impl: Callable[..., Any]
    fake: Callable[..., Any]
    autograd: Callable[[Any], tuple[Callable[..., Any], Callable[..., Any]]] | None = None


class InModels(NamedTuple):
    """When a module of a patched model uses a function of an op, and not the torch code it has.

    smallest: from how many elements of its first tensor on it is faster: below, its call costs more
    in Python than it saves (`benchmarks/replacements.py`). compiled: it is faster inside
    torch.compile too, which makes one loop of a norm or a gated unit itself. contested: up to this
    size torch's own code may be taken, where it is faster (`Contest`); above, what the op saves in
    memory counts.
    """

    smallest: int
    compiled: bool = False
    contested: float = float("inf")


class Contest(NamedTuple):
    """torch's own code beside a function of an op; ``tuning.py`` finds out which is faster.

    It finds out for classes of calls, each a string of words, such as "fp32 n<=2^16 training".

    theirs: torch's code, in words. classes: those that ``bigkernel tune-kernels`` times. make: two
    calls on the same tensors, ours and torch's, for a class and a device. classes_of: those that a
    call on these tensors may be of, for ``explain``.
    """

    theirs: str
    classes: tuple[str, ...]
    make: Callable[[str, torch.device], tuple[Callable[[], object], Callable[[], object]]]
    classes_of: Callable[[Sequence[Tensor]], list[str]]


@dataclass(frozen=True)
class Op:
    """What an op says of itself.

    Attributes:
        noun: its name in every room: ``bigkernel/ops/<noun>``, ``csrc/<noun>``,
            ``tests/ops/test_<noun>.py``, ``bigkernel/bench/<noun>.py``.
        title: what it is, for tables in the documentation.
        functions: its operators, forward first; none if it is composed of torch's and other ops.
        in_models: what ``bigkernel.patch`` puts into models, by the names of public functions.
        absent: the levels that it does without, each with the reason.
        dtypes: what the native kernels take.
        limits: what else they take only, for tables ("head dims to 256").
        limit: the same as a function: why the native kernels cannot take these tensors (all of the
            dtypes above), or None if they can.
        contests: where torch's own code may be faster, by the names of public functions.
        no_contest: why it cannot be, or is not asked, where there are none.
    """

    noun: str
    title: str
    functions: tuple[Function, ...]
    absent: Mapping[Level, str] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = NATIVE_DTYPES
    limits: str = ""
    limit: Callable[[Sequence[Tensor]], str | None] | None = None
    in_models: Mapping[str, InModels] = field(default_factory=dict)
    contests: Mapping[str, Contest] = field(default_factory=dict)
    no_contest: str = ""

    def why_not_native(self, tensors: Sequence[Tensor]) -> str | None:
        """Why no native kernel can take these tensors, wherever they are; None if one can."""
        # Asked at every step of an optimizer, for thousands of tensors.
        if wrong := {tensor.dtype for tensor in tensors}.difference(self.dtypes):
            return self.why_not_dtype(min(wrong, key=str))
        return None if self.limit is None else self.limit(tensors)

    def why_not_dtype(self, dtype: torch.dtype) -> str | None:
        """The same for a tensor of this dtype."""
        if dtype in self.dtypes:
            return None
        return f"{str(dtype).removeprefix('torch.')} has no native kernel"


def no_second_derivative(
    what: str,
    instead: str = "Inside torch.func's transforms, which run it in plain PyTorch, it has one.",
) -> Callable[[Any], tuple[Callable[..., Any], Callable[..., Any]]]:
    """The autograd formula of a backward operator: an error, and not torch's silent zeros.

    instead: a sentence that says what has a second derivative.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"bigkernel: {what} has no second derivative. {instead}")

    return lambda namespace: (backward, setup_context)


_ops: dict[str, Op] = {}  # by noun and by the names of functions


def register(op: Op) -> Op:
    """Define the functions of ``op`` and put it on the list."""
    for name in (op.noun, *(function.name for function in op.functions)):
        if name in _ops:
            raise ValueError(f"registry.register: there is an op {name!r} already.")
    wrong = [level for level, why in op.absent.items() if level not in LEVELS or not why]
    if wrong:
        raise ValueError(
            f"registry.register: what {op.noun!r} lacks must be one of {', '.join(LEVELS)}, each "
            f"with a reason, got {wrong}."
        )
    for function in op.functions:
        _library.define(*function)
        _ops[function.name] = op
    _ops[op.noun] = op
    return op


def every() -> list[Op]:
    """All ops, in the order of their names."""
    return sorted({op.noun: op for op in _ops.values()}.values(), key=lambda op: op.noun)


def find(name: str) -> Op:
    """The op of this noun, or with a function of this name; ValueError if there is none."""
    if name not in _ops:
        raise ValueError(f"there is no op {name!r}. There are: {', '.join(sorted(_ops))}.")
    return _ops[name]
