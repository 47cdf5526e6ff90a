"""Sections of `make gpu-check` in a process of their own, which gpu_check.py starts and watches.

gpu_worker.py DEVICE SECONDS facts NAME:BEGIN:SECONDS ..

Each line for it begins with MARK and is JSON: what begins, a row of a table, a result. All else is
what libraries print. DEVICE is "cuda", or "stub": the CPU at small sizes with the processor's
clock, to see that the rest of the tool works. A table begins at its row number BEGIN, and no row
begins after its SECONDS or those of all.
"""

import itertools
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MARK = "@gpu-check "
BROKEN = 3  # exit status: the device gives nothing but errors, a new process may do better
STUB = "stub"
PACKAGES = ("triton", "flash_attn", "apex", "torchvision", "kornia", "numpy", "pytest")


def tell(**event: Any) -> None:
    """A line for gpu_check.py."""
    print(MARK + json.dumps(event), flush=True)


def facts(kind: str) -> dict[str, Any]:
    """GPU, driver, versions, and whether our kernels run here."""
    import torch

    from bigkernel import _library, _native

    there = kind != STUB and torch.cuda.is_available()
    native = _library.native
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if there else "stub" if kind == STUB else "none",
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if there else None,
        "nvidia-smi": smi("name", "driver_version", "clocks.max.sm"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if there else None,
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if native is None:
        found["library"], found["lacks"] = None, _library.native_error
    else:
        info = native.build_info()
        found["library"] = f"CUDA {info.cuda} for {info.cuda_archs}" if info.cuda else "CPU only"
        lacks = _library.cuda_error or (None if info.cuda else "this build has no CUDA kernels")
        if there and lacks is None:
            major, minor = torch.cuda.get_device_capability()
            if not _native.runs_on(info.cuda_archs, 10 * major + minor):
                lacks = _native.no_code_for(info, [10 * major + minor])
        found["lacks"] = None if kind == STUB else lacks
    return found


def smi(*fields: str) -> str:
    """What nvidia-smi says of the first GPU."""
    words = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not run: {error}"
    return (done.stdout or done.stderr).strip()


def clocks() -> str:
    """Of the multiprocessors and the memory; temperature, power."""
    return smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def alive(device: str) -> bool:
    """Whether the device still does what it is told: after some errors it never does again."""
    import torch

    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).add_(1).item()
    except Exception:
        traceback.print_exc()
        return False
    return True


def table(noun: str, begin: int, seconds: float, device: str, clock: Any) -> bool:
    """Rows of an op's table as long as there is time; False where the device is broken."""
    from bigkernel.bench import gpu

    end = time.monotonic() + seconds
    tell(event="clocks", when="before", clocks=clocks())
    cases = list(gpu.of_op(noun).cases(device, clock, device == "cpu"))
    for number, (name, measure) in itertools.islice(enumerate(cases), begin, None):
        if time.monotonic() > end:
            tell(event="left", rows=len(cases) - number)
            break
        tell(event="case", number=number, name=name)
        try:
            row = measure().as_dict()
        except Exception as error:
            traceback.print_exc()
            tell(event="failed", case=name, reason=reason_of(error))
            if not alive(device):
                return False
        else:
            tell(event="row", row=row)
    tell(event="clocks", when="after", clocks=clocks())
    return True


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def once(work: Callable[[], object], device: str) -> bool:
    """A section with one result."""
    try:
        tell(event="result", data=work())
    except Exception as error:
        traceback.print_exc()
        tell(event="failed", reason=reason_of(error))
        return alive(device)
    return True


def section(name: str, begin: int, seconds: float, kind: str, clocks_of: dict[str, Any]) -> bool:
    """One section; False where the device does nothing more."""
    device, stub = ("cpu", True) if kind == STUB else (kind, False)
    if name == "facts":
        return once(lambda: facts(kind), device)
    from bigkernel.bench import gpu

    if name == "determinism":
        return once(lambda: gpu.deterministic(device, 3 if stub else 30), device)
    if name == "graph":
        through = (lambda run: run) if stub else gpu.captured
        return once(lambda: gpu.optimizer_in_graph(device, through), device)
    if stub:
        gpu.PLAN = gpu.FEW
    if kind not in clocks_of:  # which takes memory
        clocks_of[kind] = gpu.HostClock() if stub else gpu.CudaClock()
    return table(name, begin, seconds, device, clocks_of[kind])


def main() -> int:
    kind, left, *given = sys.argv[1:]
    end, clocks_of = time.monotonic() + float(left), dict[str, Any]()
    for words in given:
        name, begin, seconds = [*words.split(":"), "0", "0"][:3]
        tell(event="section", name=name)
        limit = min(float(seconds), end - time.monotonic())
        if not section(name, int(begin), limit, kind, clocks_of):
            return BROKEN
        tell(event="end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
