"""Our kernel or torch's own code: whichever is faster for a class of calls, as measured here.

An op's registration says where torch has code for the same (`registry.Contest`) and of which class
a call is: dtype, head dim, range of lengths or sizes, forward alone or training. ``measure`` times
both; the figures lie in a file of the user's cache folder, one for each machine, versions, build
and number of threads, and are read at the first call that asks. Where nothing was measured, a
short table of results on record decides, and else our kernel runs.

A process keeps what it has read, so that its numbers do not change while it runs; ``adopt``, and
another instruction set, are the exceptions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import gc
import hashlib
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigkernel import _library, registry
from bigkernel.measure import Plan, Timing, interleave

FORMAT = 1
# torch's code is taken where it is faster by more than this, and than the samples scatter.
MARGIN = 1.05
PLAN = Plan(share=0.5, rounds=25, least=3, warmups=2)
QUICK = Plan(share=0.06, rounds=15, least=3, warmups=1)
# What changes how fast torch computes and is told by no function of torch's.
_SETTINGS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")

Function = Callable[..., Any]
Class = tuple[str, str, str]  # public function, device type, words of the class
Facts = Mapping[str, Any]


class Figures(NamedTuple):
    """Seconds of a call of a class, ours and torch's, and whether torch's code is taken."""

    ours: float
    torch: float
    takes_torch: bool

    @property
    def ratio(self) -> float:
        """How many times as fast as torch's code our kernel is."""
        return self.torch / self.ours


class OnRecord(NamedTuple):
    """Classes in which torch's code was faster in a committed result, for the unmeasured.

    facts: values of `facts` of the machines that it holds for. classes: patterns (fnmatch). told:
    the figure, and where it stands.
    """

    facts: Mapping[str, tuple[Any, ...]]
    name: str
    classes: tuple[str, ...]
    told: str


_PORTABLE = {"isa": ("portable",), "torch_isa": ("AVX2", "AVX512")}
_TOLD = "slower by benchmarks/results/tune_{}.json"
# tests/test_tuning.py compares these with the results. Attention that is a little slower than
# torch's is not among them: by itself, length alone is not to change a sequence's bits.
ON_RECORD: tuple[OnRecord, ...] = (
    # Our portable kernels where torch has vectors of 8 or 16 numbers.
    OnRecord(
        _PORTABLE,
        "attention",
        ("fp32 *", "bf16 * full forward", "bf16 * mask forward"),
        _TOLD.format("portable"),
    ),
    OnRecord(
        {**_PORTABLE, "torch_isa": ("AVX512",), "best_isa": ("avx512_bf16", "amx")},
        "attention",
        ("bf16 * S>512 *", "bf16 * S<=512 full *", "bf16 * S<=512 mask *"),
        _TOLD.format("portable"),
    ),
    OnRecord(
        {**_PORTABLE, "torch_isa": ("AVX512",), "best_isa": ("avx512_bf16", "amx")},
        "linear_cross_entropy",
        ("bf16 *",),
        _TOLD.format("portable"),
    ),
    OnRecord(_PORTABLE, "cross_entropy", ("*",), _TOLD.format("portable")),
    OnRecord(
        _PORTABLE,
        "glu",
        ("bf16 *", "fp32 n<=2^20 *", "fp32 n>2^20 forward"),
        _TOLD.format("portable"),
    ),
    OnRecord(_PORTABLE, "layer_norm", ("bf16 *",), _TOLD.format("portable")),
    OnRecord(_PORTABLE, "rms_norm", ("bf16 n<=2^?? forward",), _TOLD.format("portable")),
    # AVX2 on both sides.
    OnRecord(
        {"isa": ("avx2",), "torch_isa": ("AVX2",)},
        "layer_norm",
        ("bf16 * forward",),
        _TOLD.format("avx2"),
    ),
)


class _Choices:
    """What is known of one device type."""

    def __init__(self, device_type: str) -> None:
        here = facts(device_type)
        self.figures: dict[tuple[str, str], Figures] = {}
        self.time: str | None = None
        self.on_record = [
            entry
            for entry in ON_RECORD
            if all(here.get(name) in values for name, values in entry.facts.items())
        ]
        self._known: dict[tuple[str, str], bool] = {}

    def adopt(self, figures: Mapping[tuple[str, str], Figures]) -> None:
        self.figures = dict(figures)
        self._known.clear()

    def contested(self, name: str) -> bool:
        return any(entry.name == name for entry in self.on_record) or any(
            figures.takes_torch for (of, _), figures in self.figures.items() if of == name
        )

    def takes_torch(self, name: str, words: str) -> bool:
        known = self._known.get((name, words))
        if known is None:
            measured = self.figures.get((name, words))
            known = self.recorded(name, words) is not None
            known = known if measured is None else measured.takes_torch
            self._known[name, words] = known
        return known

    def recorded(self, name: str, words: str) -> OnRecord | None:
        for entry in self.on_record:
            if entry.name == name and any(fnmatch.fnmatch(words, c) for c in entry.classes):
                return entry
        return None


_choices: dict[str, _Choices] = {}  # by device type
_contested: dict[tuple[str, str], bool] = {}  # by public function and device type
_seen: set[Class] | None = None
_ignored = False

# What calls ask


def contested(name: str, device_type: str) -> bool:
    """Whether a call of ``name`` need ask `takes_torch` at all."""
    known = _contested.get((name, device_type))
    return _look(name, device_type) if known is None else known


def takes_torch(name: str, device_type: str, words: str) -> bool:
    """Whether torch's own code runs calls of this class."""
    if _seen is not None:
        _seen.add((name, device_type, words))
    return not _ignored and _of(device_type).takes_torch(name, words)


# torch.compile calls these while it traces and keeps the answers: they read files.
for _function in (contested, takes_torch):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010 - mypy knows no such name


def _look(name: str, device_type: str) -> bool:
    if _seen is not None:
        return _has_kernel(name, device_type)
    found = not _ignored and _has_kernel(name, device_type) and _of(device_type).contested(name)
    _contested[name, device_type] = found
    return found


def _of(device_type: str) -> _Choices:
    if device_type not in _choices:
        choices = _Choices(device_type)
        read = load(device_type)
        if read is not None:
            choices.time, figures = read
            choices.adopt(figures)
        _choices[device_type] = choices
    return _choices[device_type]


def _has_kernel(name: str, device_type: str) -> bool:
    for op in registry.every():
        if name in op.contests:
            return _library.kernels.get((op.functions[0].name, device_type), False)
    return False


def size_class(dtype: torch.dtype, size: int, tensors: Sequence[Tensor | None]) -> str:
    """The class of a call whose cost is that of its elements: dtype, size, mode."""
    for limit in _LIMITS:
        if size <= 1 << limit:
            return f"{registry.SHORT[dtype]} n<=2^{limit} {mode(tensors)}"
    return f"{registry.SHORT[dtype]} n>2^{_LIMITS[-1]} {mode(tensors)}"


_LIMITS = (16, 20)
_ELEMENTS = {"n<=2^16": 1 << 16, "n<=2^20": 1 << 20, "n>2^20": 1 << 22}
MODES = ("forward", "training")


def mode(tensors: Sequence[Tensor | None]) -> str:
    """Whether a call on these is followed by a backward pass."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return "training"
    return "forward"


# What is known


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Inside, our kernels run as if nothing were known: to time and to test them."""
    global _ignored
    before, _ignored = _ignored, True
    _contested.clear()
    try:
        yield
    finally:
        _ignored = before
        _contested.clear()


@contextlib.contextmanager
def noting() -> Iterator[set[Class]]:
    """Inside, the classes of all calls are gathered in the set that is handed out."""
    global _seen
    before, _seen = _seen, set()
    _contested.clear()
    try:
        yield _seen
    finally:
        _seen = before
        _contested.clear()


def forget() -> None:
    """Read again at the next call."""
    _choices.clear()
    _contested.clear()


def adopt(device_type: str, figures: Mapping[tuple[str, str], Figures]) -> None:
    """Choose by these figures alone from now on, in this process."""
    _of(device_type).adopt(figures)
    _contested.clear()


def known(device_type: str) -> dict[tuple[str, str], Figures]:
    """The figures that this process chooses by: (public function, words of the class)."""
    return dict(_of(device_type).figures)


def told(op: registry.Op, device_type: str, tensors: Sequence[Tensor]) -> str:
    """What is known of calls on these tensors, in a sentence or more; "" if nothing."""
    choices, parts = _of(device_type), []
    for name, contest in op.contests.items():
        taken = "is what models keep" if name in op.in_models else "is taken"
        slower: dict[str, list[str]] = {}
        for words in contest.classes_of(tensors):
            figures, entry = choices.figures.get((name, words)), choices.recorded(name, words)
            if figures is not None:
                end = f", which {taken}" if figures.takes_torch else ""
                parts.append(
                    f"{name} {words}: {1e3 * figures.ours:.3g} ms, {contest.theirs} "
                    f"{1e3 * figures.torch:.3g} ms{end}"
                )
            elif entry is not None:
                slower.setdefault(entry.told, []).append(words)
        for where, group in slower.items():
            parts.append(f"{name} {', '.join(group)}: {where}, so {contest.theirs} {taken}")
    return "; ".join(parts)


# Measuring


def classes(names: Iterable[str], device_type: str) -> list[Class]:
    """What `measure` is to be given for all classes of some ops, by their nouns."""
    return [
        (name, device_type, words)
        for noun in names
        for name, contest in registry.find(noun).contests.items()
        if _has_kernel(name, device_type)
        for words in contest.classes
    ]


def measure(
    wanted: Sequence[Class],
    plan: Plan = PLAN,
    seconds: float | None = None,
    tell: Callable[[Class, Figures], None] | None = None,
) -> dict[Class, Figures]:
    """Time both sides of these classes, in turn; what ``seconds`` has no room for is left out.

    Tensors are drawn by a generator of its own.
    """
    gc.freeze()  # what is there already need not be looked through before each
    try:
        return _measure(wanted, plan, seconds, tell)
    finally:
        gc.unfreeze()


def _measure(
    wanted: Sequence[Class],
    plan: Plan,
    seconds: float | None,
    tell: Callable[[Class, Figures], None] | None,
) -> dict[Class, Figures]:
    contests = {name: c for op in registry.every() for name, c in op.contests.items()}
    begin, found = time.perf_counter(), dict[Class, Figures]()
    for count, one in enumerate(wanted):
        name, device_type, words = one
        if seconds is not None:
            left = begin + seconds - time.perf_counter()
            if left <= 0:
                break
            share = left / (2 * (len(wanted) - count))
            # A first call also pays for what is made once; after it there are two more of each.
            plan = dataclasses.replace(QUICK, share=share / 2, least=2, patience=left / 6)
        device = torch.device(device_type)
        with ignored(), torch.enable_grad():
            ours, theirs = contests[name].make(words, device)
            runs = {"ours": _timed(ours, device), "torch": _timed(theirs, device)}
            timings = interleave(runs, plan)
        if min(len(timing.samples) for timing in timings.values()) < 2:
            continue  # too slow for so little time
        found[one] = _judge(timings["ours"], timings["torch"])
        if tell is not None:
            tell(one, found[one])
    return found


def _timed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    if device.type != "cuda":
        return run

    def call() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    return call


def _judge(ours: Timing, theirs: Timing) -> Figures:
    faster = theirs.median * MARGIN < ours.median and theirs.quartiles[1] < ours.quartiles[0]
    return Figures(ours.median, theirs.median, faster)


def sized(
    theirs: str,
    draw: Callable[[int, torch.dtype, torch.Generator], Sequence[Tensor]],
    ours: Function,
    torchs: Function,
    smallest: int = 0,
) -> registry.Contest:
    """A contest of calls whose cost is that of their elements, of which ``draw`` gets the number.

    Both functions take the tensors that it draws. smallest: as in `registry.InModels`; below it
    models call torch's anyhow.
    """

    def make(words: str, device: torch.device) -> tuple[Any, Any]:
        dtype, size, kind = words.split()
        inputs = draw(_ELEMENTS[size], _DTYPES[dtype], torch.Generator().manual_seed(0))
        return calls((ours, torchs), inputs, device, kind)

    def classes_of(tensors: Sequence[Tensor]) -> list[str]:
        if not tensors or tensors[0].dtype not in registry.SHORT:
            return []
        words = size_class(tensors[0].dtype, tensors[0].numel(), []).rsplit(" ", 1)[0]
        return [f"{words} {kind}" for kind in MODES]

    last = list(_ELEMENTS)[-1]
    sizes = [words for words, n in _ELEMENTS.items() if n >= smallest or words == last]
    every = [f"{t} {n} {kind}" for t in ("fp32", "bf16") for n in sizes for kind in MODES]
    return registry.Contest(theirs, tuple(every), make, classes_of)


_DTYPES = {short: dtype for dtype, short in registry.SHORT.items()}


def calls(
    functions: tuple[Function, Function],
    inputs: Sequence[Tensor],
    device: torch.device,
    kind: str,
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Calls of both functions on these tensors, with their backward pass where ``kind`` says so."""
    training = kind == "training"
    given = [x.to(device) for x in inputs]
    leaves = [x.requires_grad_(training) for x in given if x.is_floating_point()]

    def call(function: Function) -> object:
        out = function(*given)
        results = [out] if isinstance(out, Tensor) else list(out)
        if not training:
            return results
        return torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])

    return functools.partial(call, functions[0]), functools.partial(call, functions[1])


# The file


@functools.cache
def cpu_name() -> str:
    """The processor's name as the system knows it."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith(("model name", "Model")):
                    return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return platform.machine()


def facts(device_type: str) -> dict[str, Any]:
    """What a measurement holds for: the machine, versions, the build, and how many threads."""
    native = _library.native
    found: dict[str, Any] = {"torch": str(torch.__version__), "build": _build()}
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return found | {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
    return found | {
        "cpu": cpu_name(),
        "isa": None if native is None else native.cpu_isa(),
        "best_isa": None if native is None else native.cpu_isas()[-1],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def _build() -> str | None:
    """Tells one build of the native library from another."""
    if _library.native is None:
        return None
    status = os.stat(_library.native.path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def path(device_type: str) -> Path | None:
    """Where the figures for this machine lie; None where there is no home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    except RuntimeError:
        return None
    digest = hashlib.sha256(json.dumps(facts(device_type), sort_keys=True).encode())
    return folder / "bigkernel" / f"kernels-{digest.hexdigest()[:16]}.json"


_Read = tuple[str, dict[tuple[str, str], Figures]]


def load(device_type: str) -> _Read | None:
    """(when it was measured, the figures) of this machine's file; None if there is none.

    One that is damaged, or not of this machine, is passed over with a warning.
    """
    read = _read(device_type)
    if isinstance(read, str):
        warnings.warn(
            f"bigkernel: {path(device_type)} is ignored, as if no kernel had been measured: "
            f"{' '.join(read.split())}. `bigkernel tune-kernels` writes it anew.",
            stacklevel=2,
        )
        return None
    return read


def _read(device_type: str) -> _Read | str | None:
    """As `load`, with the reason in place of a warning."""
    file = path(device_type)
    if file is None:
        return None
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT or content["facts"] != facts(device_type):
            return "it is of another machine, version or build"
        figures = {
            (str(name), str(words)): Figures(float(ours), float(torchs), bool(taken))
            for name, of in content["figures"].items()
            for words, (ours, torchs, taken) in of.items()
        }
        if not all(f.ours > 0 and f.torch > 0 for f in figures.values()):
            return "seconds that are not positive"
        return str(content["time"]), figures
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return str(error)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def save(device_type: str, figures: Mapping[tuple[str, str], Figures]) -> Path:
    """Add figures to this machine's file, which appears whole or not at all.

    Of two processes that write at a time the later one wins; what it had not read is lost, and
    measured again by whoever wants it.

    Raises:
        OSError: it cannot be written.
    """
    file = path(device_type)
    if file is None:
        raise OSError("there is no home folder; set XDG_CACHE_HOME")
    before = _read(device_type)  # a damaged one is replaced
    known = before[1] if isinstance(before, tuple) else {}
    of: dict[str, dict[str, Figures]] = {}
    for (name, words), found in {**known, **figures}.items():
        of.setdefault(name, {})[words] = found
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"format": FORMAT, "facts": facts(device_type), "time": now, "figures": of}
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=file.parent, prefix=".kernels-")
    try:
        with os.fdopen(descriptor, "w") as out:
            json.dump(content, out, indent=1)
        os.replace(aside, file)
    except BaseException:
        os.unlink(aside)
        raise
    return file


def clear(device_type: str) -> bool:
    """Remove this machine's file; whether there was one."""
    file = path(device_type)
    forget()
    if file is None or not file.exists():
        return False
    file.unlink()
    return True
