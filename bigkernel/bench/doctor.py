"""Whether an installation is sound: ``bigkernel doctor``.

Whether the native library is there; whether every op's numbers are right on this machine, under
each instruction set of its processor and on its GPU; whether the kernels are as fast beside torch's
own code as they were on record. Nothing is listed here: the ops are those of the registry, their
numbers are checked on the small cases of their benchmarks, by the checks that go before each
measurement, and what is timed are classes of ``bigkernel tune-kernels``.

It needs torch and NumPy alone: ``python -m bigkernel.bench.doctor`` does the same without the extra
that the command line needs.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch

import bigkernel
import bigkernel.ops  # registers the ops
from bigkernel import _library, _native, backend, registry, tuning
from bigkernel.bench.case import judged, native_backend, strict, with_threads, without_peers
from bigkernel.bench.suite import cases_of

# (our instruction set, torch's) -> (public function, class) -> how many times as fast as torch's
# code ours was, with THREADS threads (benchmarks/results/tune_*.json). Other processors of a kind
# and other work on the machine are worth a factor of two; less than SHARE of it is a fault.
SHARE, THREADS = 1 / 3, 2
Kind = tuple[str, str]
RATIOS: dict[Kind, dict[tuple[str, str], float]] = {
    ("avx2", "AVX2"): {
        ("attention", "fp32 D64 S<=512 causal training"): 1.87,
        ("attention", "bf16 D64 S<=512 causal forward"): 2.1,
        ("rms_norm", "fp32 n<=2^16 forward"): 1.32,
        ("layer_norm", "fp32 n<=2^20 forward"): 1.24,
        ("glu", "fp32 n<=2^20 forward"): 1.63,
        ("cross_entropy", "fp32 n<=2^20 forward"): 1.61,
        ("rope", "fp32 n<=2^16 forward"): 3.23,
    },
    ("avx512_bf16", "AVX512"): {
        ("attention", "fp32 D64 S<=512 causal training"): 2.0,
        ("attention", "bf16 D64 S<=512 causal forward"): 3.8,
        ("rms_norm", "fp32 n<=2^16 forward"): 1.26,
        ("layer_norm", "fp32 n<=2^20 forward"): 0.97,
        ("glu", "fp32 n<=2^20 forward"): 2.08,
        ("bias_act", "bf16 n<=2^20 forward"): 0.96,
        ("cross_entropy", "fp32 n<=2^20 forward"): 1.35,
        ("linear_cross_entropy", "fp32 n>2^20 forward"): 1.13,
        ("rope", "fp32 n<=2^16 forward"): 3.17,
    },
    ("portable", "AVX512"): {
        ("attention", "fp32 D64 S<=512 causal training"): 0.68,
        ("attention", "bf16 D64 S<=512 causal forward"): 0.83,
        ("rms_norm", "fp32 n<=2^16 forward"): 1.41,
        ("layer_norm", "fp32 n<=2^20 forward"): 1.01,
        ("glu", "fp32 n<=2^20 forward"): 0.32,
        ("cross_entropy", "fp32 n<=2^20 forward"): 0.4,
        ("linear_cross_entropy", "fp32 n>2^20 forward"): 1.15,
        ("rope", "fp32 n<=2^16 forward"): 2.52,
    },
    ("portable", "AVX2"): {
        ("attention", "fp32 D64 S<=512 causal training"): 0.78,
        ("attention", "bf16 D64 S<=512 causal forward"): 0.75,
        ("rms_norm", "fp32 n<=2^16 forward"): 1.33,
        ("layer_norm", "fp32 n<=2^20 forward"): 0.81,
        ("glu", "fp32 n<=2^20 forward"): 0.61,
        ("cross_entropy", "fp32 n<=2^20 forward"): 0.62,
        ("rope", "fp32 n<=2^16 forward"): 2.57,
    },
}


class Outcome(NamedTuple):
    """What a check found. held: None where there was nothing to hold it against."""

    held: bool | None
    told: str


class Check(NamedTuple):
    """A line of the report."""

    name: str
    run: Callable[[], Outcome]


def checks() -> list[Check]:
    """What there is to check on this machine; no more than the first ones without the library."""
    found = [Check("native library", _native_library), Check("GPU", _gpu)]
    if backend.is_forced() or _library.native is None:
        return found[:1]
    found += [Check(f"{op.noun} on cpu", partial(numbers, op, "cpu")) for op in registry.every()]
    found += _speeds(_library.native)
    if torch.cuda.is_available() and _why_no_cuda() is None:
        found += [
            Check(f"{op.noun} on cuda", partial(numbers, op, "cuda")) for op in registry.every()
        ]
        untold = "no GPU is among the results on record; `bigkernel tune-kernels` measures this one"
        found.append(Check("speed on cuda", lambda: Outcome(None, untold)))
    return found


def examine() -> str | None:
    """Print a line for each check; returns what is wrong in a sentence, None if nothing is."""
    found = checks()
    width = max(len(check.name) for check in found)
    failed = []
    for check in found:
        # The name first: should the process die in a kernel, it was this one's.
        print(f"{check.name:<{width}}  ", end="", flush=True)
        try:
            held, told = check.run()
        except Exception as error:
            held, told = False, f"{type(error).__name__}: {error}"
        mark = {True: "ok", False: "FAILED", None: "-"}[held]
        print(f"{mark:<6}  {' '.join(told.split())}", flush=True)
        if held is False:
            failed.append(f"{check.name}: {told}")
    return f"{len(failed)} of {len(found)} checks failed: {'; '.join(failed)}" if failed else None


# The library and the GPU


def _native_library() -> Outcome:
    if backend.is_forced():
        return Outcome(
            False, "nothing is checked: BIGKERNEL_BACKEND has chosen already. Leave it unset."
        )
    native = _library.native
    if native is None:
        return Outcome(False, f"{_library.native_error}; every op runs in plain PyTorch")
    info = native.build_info()
    cuda = f"CUDA {info.cuda} for {info.cuda_archs}" if info.cuda else "no CUDA kernels"
    return Outcome(
        True,
        f"bigkernel {bigkernel.__version__} under torch {torch.__version__}, {native.path}: CPU "
        f"kernels for {', '.join(native.cpu_isas())}; {cuda}",
    )


def _why_no_cuda() -> str | None:
    """Why the ops run in plain PyTorch on a GPU."""
    assert _library.native is not None
    if _library.cuda_error is not None:
        return _library.cuda_error
    if torch.version.cuda is None:
        return "this torch is not for CUDA"
    return None if _library.native.build_info().cuda else "this build has no CUDA kernels"


def _gpu() -> Outcome:
    why = _why_no_cuda()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return Outcome(why is None, f"{name}{'' if why is None else f': {why}'}")
    if _library.cuda_error is not None:
        return Outcome(False, _library.cuda_error)
    there = _native.capabilities()
    names = ", ".join(f"sm_{each}" for each in there)
    return Outcome(None, f"torch can use none{f', of {names}' if there else ''}")


# Numbers


def numbers(op: registry.Op, device: str) -> Outcome:
    """Whether an op's results are within twice the error of PyTorch's of the same dtype.

    Against float64, forward and, where the op has one, backward.
    """
    if "benchmark" in op.absent:
        return Outcome(None, f"has no cases to check: {op.absent['benchmark']}")
    if device == "cuda" and "cuda" in op.absent:
        return Outcome(None, f"runs in PyTorch there: {op.absent['cuda']}")
    sets = backend.cpu_isas() if device == "cpu" and "cpu" not in op.absent else []
    wrong: dict[str, list[str]] = {}
    with strict(), without_peers():
        cases = cases_of(op.noun, True, device)
        for case in cases:
            ready = case.build()
            native_backend(case, ready)
            runs = judged(case, ready)
            for name in sets or [device]:
                try:
                    with backend.use_cpu_isa(name) if sets else nullcontext():
                        ready.check(runs)
                except AssertionError as error:
                    wrong.setdefault(name, []).append(f"{case.name}: {error}")
    if wrong:
        told = [
            f"{name}: {len(said)} of {len(cases)} cases, such as {said[0]}"
            for name, said in wrong.items()
        ]
        return Outcome(False, f"wrong numbers under {'; '.join(told)}")
    under = f" under {', '.join(sets)}" if sets else ""
    return Outcome(True, f"{len(cases)} cases within twice PyTorch's error{under}")


# Speed


def _speeds(native: _native.Native) -> list[Check]:
    kind = native.cpu_isa(), torch.backends.cpu.get_cpu_capability()
    ratios = RATIOS.get(kind)
    if ratios is None:
        untold = (
            f"none is on record for {kind[0]} beside a torch with {kind[1]}; "
            "`bigkernel tune-kernels` measures this machine"
        )
        return [Check("speed on cpu", lambda: Outcome(None, untold))]
    return [
        Check(f"speed of {name}, {words}", partial(speed, name, words, ratio))
        for (name, words), ratio in ratios.items()
    ]


def speed(name: str, words: str, on_record: float) -> Outcome:
    """Whether calls of a class are as fast beside torch's code as on record, or nearly."""
    theirs = next(op.contests[name].theirs for op in registry.every() if name in op.contests)
    one, ratio = (name, "cpu", words), 0.0
    with with_threads(min(THREADS, torch.get_num_threads())):
        for _ in range(2):  # what else the machine does may fall on one of them
            ratio = max(ratio, tuning.measure([one], tuning.QUICK)[one].ratio)
            if ratio >= SHARE * on_record:
                break
    told = f"{ratio:.2g} times as fast as {theirs}, {on_record:.2g} on record"
    if ratio < SHARE * on_record:
        return Outcome(False, f"{told}, of which it has to be a third")
    return Outcome(True, told)


def main() -> int:
    """0 if all that can be judged is sound, else 1 and the reason on stderr."""
    wrong = examine()
    if wrong is not None:
        print(f"Error: {wrong}", file=sys.stderr)
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
