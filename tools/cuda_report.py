"""What the CUDA kernels take and do, counted without a GPU: `make cuda-report`.

Every kernel: registers, spills, shared memory, occupancy and its main loop's machine code. The
cases below also run, by their own launchers, in the emulator: what they move against what the
algorithm has to, bank conflicts, and the same for a Triton kernel of the same op
(tests/ops/triton_kernels.py). The bars of a case are in `bars`; tests/ops/test_cuda_report.py holds
them on shorter inputs. tools/cuda_schedule.py tells from them how busy attention keeps whole GPUs.

A kernel is added by an entry of CASES; an op that has none fails a test. The record, of every
architecture that we build for, is benchmarks/results/cuda_report.{json,md}; a report of fewer goes
to build/cuda-report.
"""

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests" / "ops")]
import adam_ptx
import attention_ptx
import augment_ptx
import bias_act_ptx

from bigkernel import transforms
from bigkernel.testing import ptx
from tools import cuda_schedule, sass

RESULTS = ROOT / "benchmarks" / "results"
BF16, F32 = torch.bfloat16, torch.float32
SECTOR = 32
# SASS instructions per HMMA in the main loops of FlashAttention-2, compiled by nvcc 13.0 for sm_80:
# (head dim, causal) -> figure. The aim; the bar is Triton's kernel.
AIM = {
    "forward": {(64, False): 4.6, (128, False): 3.7, (64, True): 4.6, (128, True): 3.6},
    "backward": {(64, True): 4.0, (128, True): 3.1},
}


@dataclass
class Part:
    """One kernel of a case: its launch in the emulator, what it had to move, its Triton peer.

    minimum: by array, the 32-byte sectors that loads and stores together cannot do without.
    peer: (cubin, threads, dynamic shared memory, counters).
    """

    role: str
    launch: ptx.Launch
    text: str  # its PTX
    minimum: dict[str, int]
    peer: tuple[bytes, int, int, ptx.Counters] | None = None
    aim: float | None = None


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    run: Callable[[int], list[Part]]  # takes the size: elements of Adam, length of attention
    arch: str = "sm_80"


def text_of(host: ptx.HostLibrary, launch: ptx.Launch) -> str:
    return next(m.text for m in host.modules if launch.kernel in m.kernels)


def peer_of(compiled: Any, grid: tuple[int, ...]) -> tuple[bytes, int, int, ptx.Counters]:
    return compiled.cubin, compiled.threads, compiled.shared, compiled.launch(grid)


def triton_kernels() -> Any | None:
    """The yardsticks, None where there is no Triton."""
    try:
        return importlib.import_module("triton_kernels")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None


def adam(dtypes: tuple[Any, ...], reads: int, writes: int, **options: Any) -> Any:
    """AdamW over one tensor; reads, writes: bytes an element."""

    def run(size: int) -> list[Part]:
        n = 40 * size
        host = adam_ptx.host()
        lists = adam_ptx.make(dtypes, sizes=[(n,)], amsgrad=options.get("amsgrad", False))
        _, launches = adam_ptx.step(host, lists, **options)
        part = Part("update", launches[-1], text_of(host, launches[-1]), {})
        part.minimum = {"all arrays": n * (reads + writes) // SECTOR}
        yardstick = triton_kernels()
        if yardstick and not options and not dtypes[3]:
            lists = adam_ptx.make(dtypes, sizes=[(n,)])
            names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
            arrays = [lists[name][0] for name in names]
            part.peer = peer_of(*yardstick.adam(*arrays, 1e-3, 0.9, 0.999, 1e-8, 1e-5))
        return [part]

    return run


def adam_norm(size: int) -> list[Part]:
    n, host = 40 * size, adam_ptx.host()
    lists = adam_ptx.make((BF16, BF16, F32, False), sizes=[(n,)])
    _, launches = adam_ptx.step(host, lists, only_norm=True)
    return [Part("norm", launches[0], text_of(host, launches[0]), {"grads[0]": n * 2 // SECTOR})]


def keys_seen(length: int, rows: int, keys: int, causal: bool) -> int:
    """Keys that blocks of ``rows`` queries need, in whole tiles of ``keys``."""
    ends = [min(first + rows, length) if causal else length for first in range(0, length, rows)]
    return sum(min(-(-end // keys) * keys, length) for end in ends)


def queries_seen(length: int, rows: int, queries: int, causal: bool) -> int:
    """Queries that blocks of ``rows`` keys need, in whole tiles of ``queries``."""
    begins = [first // queries * queries if causal else 0 for first in range(0, length, rows)]
    return sum(length - begin for begin in begins)


def attention(
    dim: int, causal: bool, dtype: torch.dtype = BF16, device: str = "A100", **options: Any
) -> Any:
    """Forward; backward: dK and dV by blocks of keys, dQ by blocks of queries. Of another device
    than the A100 forward alone, whose tiles may be smaller there."""

    def run(length: int) -> list[Part]:
        torch.manual_seed(0)
        shape = (1, 1, length, dim)
        q, k, v, dout = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(4))
        host, yardstick = attention_ptx.host(), triton_kernels()
        once, stats = length * dim * q.element_size() // SECTOR, length * 4 // SECTOR
        row = dim * q.element_size() // SECTOR  # sectors
        with attention_ptx.emulated(ptx.DEVICES[device]):
            out = attention_ptx.op.attention(q, k, v, causal=causal, **options)
            ((rows, keys),), (forward,) = attention_ptx.tiles(), attention_ptx.launches
            seen = keys_seen(length, rows, keys, causal) * row
            least = [{"q": once, "k": seen, "v": seen, "out": once, "lse": 2 * stats}]
            if device != "A100":
                return [Part("forward", forward, text_of(host, forward), least[0])]
            torch.autograd.grad(out, (q, k, v), dout)
            _, by_keys, by_queries = attention_ptx.tiles()
            before, dkdv, dq = attention_ptx.launches
        planes = 3 if dtype == F32 else 2  # of delta: fp32 has the general kernel alone
        least.append({"out": once, "dout": once, "lse": 2 * stats, "delta": planes * stats})
        seen = queries_seen(length, *by_keys, causal)
        least.append({"k": once, "v": once, "dk": once, "dv": once, "q": seen * row,
                      "dout": seen * row, "delta": planes * seen * 4 // SECTOR})  # fmt: skip
        seen = keys_seen(length, *by_queries, causal) * row
        least.append({"q": once, "dout": once, "dq": once, "k": seen, "v": seen,
                      "delta": planes * stats})  # fmt: skip
        roles = ("forward", "backward, rows", "backward, dK dV", "backward, dQ")
        launches = (forward, before, dkdv, dq)
        parts = [Part(role, launch, text_of(host, launch), minimum)
                 for role, launch, minimum in zip(roles, launches, least, strict=True)]  # fmt: skip
        if yardstick and dtype != F32 and not options:
            q, k, v, do = (x.detach()[0] for x in (q, k, v, dout))
            out, dq, dk, dv = (torch.zeros_like(q) for _ in range(4))
            lse = torch.zeros(1, length)
            parts[0].peer = peer_of(*yardstick.forward(q, k, v, out, lse, causal))
            delta = (do.float() * out.float()).sum(-1)
            theirs = yardstick.backward(q, k, v, do, lse, delta, dq, dk, dv, causal)
            parts[2].peer, parts[3].peer = (peer_of(*launch) for launch in theirs)
            for part in parts:
                part.aim = AIM[part.role.split(",")[0]].get((dim, causal))
            parts[1].aim = None
        return parts

    return run


def augment(size: int) -> list[Part]:
    """Crop, flip and normalisation of uint8 images, each with parameters of its own."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, size // 8, size // 8), dtype=torch.uint8)
    crop = (size // 12, size // 12)
    chain = transforms.Compose([
        transforms.RandomResizedCrop(crop), transforms.RandomHorizontalFlip(),
        transforms.ToDtype(F32, scale=True), transforms.Normalize([0.5] * 3, [0.25] * 3),
    ])  # fmt: skip
    with augment_ptx.emulated():
        out = chain(images)
    (launch,) = augment_ptx.launches
    minimum = {"out": out.numel() * 4 // SECTOR}
    return [Part("sample", launch, text_of(augment_ptx.host(), launch), minimum)]


def bias_act(size: int) -> list[Part]:
    """GELU over as many rows as ``size`` of a width of 256, backward."""
    torch.manual_seed(0)
    x, dy = (torch.randn(size, 256).to(BF16) for _ in range(2))
    bias_act_ptx.run(x, torch.randn(256), 1, dy, needs_dbias=True)
    launch, _ = bias_act_ptx.launches
    minimum = dict.fromkeys(("x", "dy", "y"), x.numel() * 2 // SECTOR)
    return [Part("backward", launch, text_of(bias_act_ptx.host(), launch), minimum)]


CASES = [
    Case("adam", "fp32", adam((F32, F32, F32, False), 16, 12)),
    Case("adam", "fp32 amsgrad", adam((F32, F32, F32, False), 20, 16, amsgrad=True)),
    Case("adam", "bf16", adam((BF16, BF16, F32, False), 12, 10)),
    Case("adam", "bf16, bf16 moments", adam((BF16, BF16, BF16, False), 8, 6)),
    Case("adam", "bf16, fp32 masters", adam((BF16, BF16, F32, True), 14, 14)),
    Case("adam", "bf16 stochastic", adam((BF16, BF16, F32, False), 12, 10, seed=torch.tensor(5))),
    Case("adam", "norm of bf16", adam_norm),
    *(
        Case("attention", f"bf16 D{dim} {'causal' if causal else 'full'}",
             attention(dim, causal))
        for dim in (64, 128) for causal in (False, True)
    ),
    *(
        Case("attention", f"bf16 D128 {'causal' if causal else 'full'}, 100 KB",
             attention(128, causal, device="RTX 4090"), "sm_89")
        for causal in (False, True)
    ),
    Case("attention", "fp32 D64 causal", attention(64, True, F32)),
    Case("augment", "uint8, crop, flip, normalise", augment),
    Case("bias_act", "bf16 gelu", bias_act),
]  # fmt: skip


def code_of(kernel: sass.Kernel) -> dict[str, Any]:
    """Machine code: of everything and of the main loop (of everything where there is no loop)."""
    loop = kernel.main_loop or kernel.code
    return {
        "instructions": len(kernel.code),
        "local": kernel.code.local,
        "loops": len(kernel.loops),
        "main_loop": {
            "instructions": len(loop),
            "matrix": loop.matrix,
            "HMMA": loop.names["HMMA"],
            "FFMA": loop.names["FFMA"],
            "LDSM": loop.names["LDSM"],
            "LDGSTS": loop.names["LDGSTS"],
            "LDG": loop.names["LDG"],
            "matrix_share": loop.matrix / len(loop),
            "per_matrix": len(loop) / loop.matrix if loop.matrix else None,
            "local": loop.local,
        },
    }


def resources_of(
    arch: str, found: sass.Resources, threads: int, dynamic: int | None
) -> dict[str, Any]:
    """dynamic: bytes of shared memory given at the launch, None where that is not known."""
    blocks, share = None, None
    if dynamic is not None:
        blocks, share = sass.occupancy(arch, found.registers, threads, found.shared + dynamic)
    return {
        "registers": found.registers,
        "stack": found.stack,
        "spill_stores": found.spill_stores,
        "spill_loads": found.spill_loads,
        "shared": found.shared,
        "dynamic_shared": dynamic,
        "threads": threads,
        "blocks_per_sm": blocks,
        "occupancy": share,
    }


def traffic_of(counters: ptx.Counters, minimum: dict[str, int]) -> dict[str, Any]:
    names = sorted({*counters.loads, *counters.stores})
    none = ptx.Traffic()
    moved = {
        n: counters.loads.get(n, none).sectors + counters.stores.get(n, none).sectors for n in names
    }
    least = sum(minimum.values())
    return {
        "sectors": counters.global_sectors,
        "minimum": least,
        "ratio": counters.global_sectors / least,
        "by_array": {n: [moved.get(n, 0), m] for n, m in minimum.items() if n in moved},
        "bank_conflicts": counters.bank_conflict_ratio if counters.shared_wavefronts else None,
        "wavefronts_per_mma": counters.shared_wavefronts / counters.mma if counters.mma else None,
        "mma": counters.mma,
        "ptx_instructions": counters.total,
        "ptx_per_mma": counters.total / counters.mma if counters.mma else None,
        "global_atomics": counters.global_atomics,
    }


@functools.cache
def machine_code(text: str, arch: str, kernel: str) -> tuple[sass.Resources, dict[str, Any]]:
    """A kernel's resources and what `code_of` counts: the same for full and causal."""
    cubin, found = sass.assemble(text, arch, entry=kernel)
    return found[kernel], code_of(sass.disassemble(cubin)[kernel])


def measure(case: Case, size: int) -> list[dict[str, Any]]:
    """The rows of one case."""
    rows, arch = [], case.arch
    for part in case.run(size):
        launch = part.launch
        found, code = machine_code(part.text, arch, launch.kernel)
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        row = {"op": case.op, "case": case.name, "role": part.role, "arch": arch, "size": size}
        row |= {"kernel": pretty([launch.kernel])[0], "aim_per_matrix": part.aim}
        row |= resources_of(arch, found, threads, launch.shared) | code
        row["emulator"] = traffic_of(launch.counters, part.minimum)
        row["triton"] = None
        if part.peer:
            cubin, threads, shared, counters = part.peer
            ((name, found_there),) = sass.resources(cubin).items()
            theirs = resources_of(arch, found_there, threads, shared)
            theirs |= code_of(sass.disassemble(cubin)[name])
            row["triton"] = theirs | {"emulator": traffic_of(counters, part.minimum)}
        row["bars"] = [[text, held] for text, held in bars(row)]
        rows.append(row)
    return rows


def bars(row: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """What a case has to reach, and whether it does."""
    loop, moved = row["main_loop"], row["emulator"]
    yield "no spill inside the main loop", loop["local"] == 0
    yield "no global atomics", moved["global_atomics"] == 0
    if row["op"] == "adam":
        yield "global sectors at most 1.05x the minimum", moved["ratio"] <= 1.05
    if row["op"] == "attention":
        if moved["bank_conflicts"] is not None:
            yield "wavefronts at most 1.05x the minimum", moved["bank_conflicts"] <= 1.05
        once = all(sectors <= least for sectors, least in moved["by_array"].values())
        yield "every array once per needed tile", once and moved["ratio"] <= 1.0
    if row["op"] == "bias_act":
        once = all(sectors <= least for sectors, least in moved["by_array"].values())
        yield "every array once", once
    if row["op"] == "augment":
        sectors, least = moved["by_array"]["out"]
        yield "coalesced writes: sectors at most 1.05x the minimum", sectors <= 1.05 * least
    if row["triton"] and loop["matrix"]:
        theirs = row["triton"]["main_loop"]["per_matrix"]
        yield "instructions per HMMA no more than Triton's", loop["per_matrix"] <= theirs


def pretty(names: list[str]) -> list[str]:
    """Kernels' names as in the source, without namespaces and parameters."""
    done = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True, check=True)
    plain = done.stdout.replace("bigkernel::", "").replace("(anonymous namespace)::", "")
    return [line.removeprefix("void ") for line in plain.splitlines()]


def every_kernel(arch: str) -> list[dict[str, Any]]:
    """Every kernel of csrc, compiled for ``arch``."""
    rows = []
    for source in sorted((ROOT / "csrc").glob("*/*.cu")):
        flags = ["-std=c++20", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc")]
        module = ptx.compile(source, arch, flags)
        if not module.kernels:
            continue
        cubin, found = sass.assemble(module.text, arch)
        code, names = sass.disassemble(cubin), sorted(found)
        for name, shown in zip(names, pretty(names), strict=True):
            threads = module[name].function.max_threads or 1024
            fixed = ".extern .shared" not in module.text
            row = {"op": source.parent.name, "file": source.name, "kernel": shown, "arch": arch}
            row |= resources_of(arch, found[name], threads, 0 if fixed else None)
            rows.append(row | code_of(code[name]))
    return rows


def shown(value: Any, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def table(heads: list[str], rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return [*lines, *("| " + " | ".join(shown(cell) for cell in row) + " |" for row in rows), ""]


def spills(row: dict[str, Any]) -> str:
    if row["spill_stores"] < 0:  # from a cubin: what the code has
        return f"{row['local']} instr."
    return f"{row['spill_stores']} + {row['spill_loads']} B"


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [
        "# The CUDA kernels, counted",
        "",
        f"`make cuda-report`, {report['compiler']}, Triton {report['triton']}; no GPU was used.",
        "Sectors are of 32 bytes, asked for by loads and stores, against what the algorithm needs.",
        "Attention: one head, forward and backward as in training, S = "
        f"{report['size']}; FA2 is FlashAttention-2 for sm_80, compiled by nvcc 13.0.",
        "100 KB: the tiles for multiprocessors with as much shared memory, compiled for sm_89.",
        "",
        "## Cases",
        "",
    ]
    cells, missed = [], []
    for row in report["cases"]:
        for who in ("bigkernel", "triton"):
            it = row if who == "bigkernel" else row["triton"]
            if it is None:
                continue
            loop, moved = it["main_loop"], it["emulator"]
            cells.append([
                f"{row['op']} {row['case']} {row['role']}", who, it["registers"], spills(it),
                it["shared"] + it["dynamic_shared"], f"{it['occupancy']:.0%}",
                loop["instructions"], loop["HMMA"], loop["FFMA"], loop["LDSM"], loop["LDGSTS"],
                loop["local"], f"{loop['matrix_share']:.0%}", loop["per_matrix"],
                row["aim_per_matrix"] if who == "bigkernel" else None,
                moved["ptx_per_mma"], moved["ratio"], moved["bank_conflicts"],
                moved["wavefronts_per_mma"],
            ])  # fmt: skip
        missed += [f"- {row['op']} {row['case']} {row['role']}: {text}"
                   for text, held in row["bars"] if not held]  # fmt: skip
    heads = ["case", "kernel", "registers", "spills", "shared", "occupancy", "main loop", "HMMA",
             "FFMA", "LDSM", "LDGSTS", "local", "matrix", "per HMMA", "FA2", "PTX per mma",
             "sectors / min", "wavefronts / min", "wavefronts per mma"]  # fmt: skip
    lines += table(heads, cells)
    bars_held = sum(held for row in report["cases"] for _, held in row["bars"])
    count = sum(len(row["bars"]) for row in report["cases"])
    lines += [f"Bars held: {bars_held} of {count}.", "", *missed, *([""] if missed else [])]
    if report.get("schedule"):
        lines += schedule(report["schedule"])
    if report.get("tiles"):
        lines += tiles(report["tiles"])
    lines += [
        "## Every kernel",
        "",
        "Occupancy is theoretical, for the shared memory that is fixed in the source; `-` where a",
        "launch adds to it. Limits: CUDA C++ Programming Guide 13.0, technical specifications per",
        "compute capability.",
        "",
    ]
    spilling = [f"{row['arch']} {row['kernel']} ({row['main_loop']['local']})"
                for row in report["kernels"] if row["main_loop"]["local"]]  # fmt: skip
    lines += ["Accesses of local memory in a main loop, masks and rare cases included: "]
    lines += [(", ".join(f"`{one}`" for one in spilling) or "none, which is a bar") + ".", ""]
    cells = [
        [row["arch"], row["kernel"], row["registers"], row["stack"], spills(row), row["shared"],
         row["threads"], None if row["occupancy"] is None else f"{row['occupancy']:.0%}",
         row["instructions"], row["main_loop"]["instructions"], row["main_loop"]["HMMA"],
         row["main_loop"]["per_matrix"], row["main_loop"]["local"]]
        for row in report["kernels"]
    ]  # fmt: skip
    heads = ["arch", "kernel", "registers", "stack", "spills", "shared", "threads", "occupancy",
             "instructions", "main loop", "HMMA", "per HMMA", "local in it"]  # fmt: skip
    return "\n".join(lines + table(heads, cells))


def schedule(rows: list[dict[str, Any]]) -> list[str]:
    """The table of tools/cuda_schedule.py: a line for a shape on a GPU."""
    lines = [
        "## The share of a GPU in use",
        "",
        "A model (`tools/cuda_schedule.py`): blocks in the launchers' order, each in the first",
        "slot that is free. Of each launch: its blocks / slots, that is blocks that run at a time,",
        "and the mean share of the slots in use. Heads together: whose tiles are taken longest",
        "first. Splits: blocks of dK and dV that share a tile of keys; parts: the memory for it.",
        "",
    ]
    cells = []
    few = [row for row in rows if row["role"] == cuda_schedule.FEW]
    three_each = iter(row for row in rows if row not in few)
    for forward, keys, queries in zip(*[three_each] * len(cuda_schedule.ROLES), strict=True):
        three = (forward, keys, queries)
        cells.append([
            keys["shape"], keys["gpu"],
            *(f"{row['blocks']} / {row['slots']}: {row['share']:.0%}" for row in three),
            ", ".join(str(row["together"]) for row in three), keys["splits"],
            f"{keys['parts'] / 2**20:.0f} MiB",
        ])  # fmt: skip
    heads = ["shape", "GPU", "forward", "dK, dV", "dQ", "heads together", "splits", "parts"]
    lines += table(heads, cells)
    lines += ["Few queries: blocks of all the heads that share keys, and splits of the keys.", ""]
    cells = [[row["shape"], row["gpu"], f"{row['blocks']} / {row['slots']}: {row['share']:.0%}",
              row["splits"], f"{row['parts'] / 2**20:.1f} MiB"] for row in few]  # fmt: skip
    lines += table(["shape", "GPU", "forward", "splits", "parts"], cells)
    barred = [row for row in rows if row["bar"]]
    missed = [f"- {row['shape']} {row['gpu']} {row['role']}: below {row['bar']:.0%}"
              for row in barred if row["share"] < row["bar"]]  # fmt: skip
    lines += [f"Bars held: {len(barred) - len(missed)} of {len(barred)}.", ""]
    return [*lines, *missed, *([""] if missed else [])]


def tiles(rows: list[dict[str, Any]]) -> list[str]:
    """What of attention's kernels fits on a multiprocessor: a line for a kernel."""
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    lines = [
        "## Attention's tiles",
        "",
        "By architecture: rows x columns of a tile, KB of shared memory of a block, registers of a",
        "thread, and blocks x warps that a multiprocessor has room for at a time. Forward's tiles",
        "are smaller where two blocks of the larger ones do not fit into its shared memory.",
        "",
    ]
    cells: dict[str, list[str]] = {}
    for row in rows:
        found = cells.setdefault(row["call"], [])
        found.append(f"{row['tile']}, {row['shared'] / 1024:.0f} KB, {row['registers']}: "
                     f"{row['blocks']} x {row['warps']}")  # fmt: skip
    return lines + table(["call", *archs], [[call, *found] for call, found in cells.items()])


def as_json(report: dict[str, Any]) -> str:
    """One line for each row of a list."""
    parts = []
    for name, value in report.items():
        rows = isinstance(value, list) and ",\n".join(map(json.dumps, value))
        parts.append(f'"{name}": ' + (f"[\n{rows}\n]" if rows else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def destination(archs: list[str]) -> Path:
    """Where a report of these architectures goes, without suffix: all of them are the record."""
    if {*archs} == {*sass.LIMITS}:
        return RESULTS / "cuda_report"
    return ROOT / "build" / "cuda-report" / "_".join(sorted(archs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_80", help="comma-separated, or all")
    parser.add_argument("--size", type=int, default=1024, help="length of attention's sequences")
    parser.add_argument("--only", default="", help="just the cases whose name has this")
    options = parser.parse_args()
    archs = [*sass.LIMITS] if options.arch == "all" else options.arch.split(",")
    os.environ.setdefault("BIGKERNEL_PTX_CACHE", str(ROOT / "build" / "ptx"))
    if ptx.nvcc() is None:
        print("cuda-report: nvcc is not on the path; install the CUDA toolkit.", file=sys.stderr)
        return 2
    version = subprocess.run([ptx.nvcc(), "--version"], capture_output=True, text=True).stdout
    report: dict[str, Any] = {"compiler": "nvcc " + version.split("release ")[1].split(",")[0]}
    yardstick = triton_kernels()
    report |= {"triton": yardstick.triton.__version__ if yardstick else "not installed"}
    report |= {"size": options.size, "cases": [], "kernels": []}
    for case in CASES:
        if options.only in f"{case.op} {case.name}":
            print(f"cuda-report: {case.op} {case.name}", flush=True)
            report["cases"] += measure(case, options.size)
    for arch in archs if not options.only else []:
        print(f"cuda-report: every kernel for {arch}", flush=True)
        report["kernels"] += every_kernel(arch)
    if not options.only:
        report["schedule"] = cuda_schedule.table(report)
        report["tiles"] = cuda_schedule.tiles(report)
    text = markdown(report)
    if not options.only:
        written = destination(archs)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.with_suffix(".json").write_text(as_json(report))
        written.with_suffix(".md").write_text(text)
    print(text)
    if not options.only:
        print(f"cuda-report: written to {written}.json and .md")
    held = all(held for row in report["cases"] for _, held in row["bars"])
    return 0 if held and not any(row["main_loop"]["local"] for row in report["kernels"]) else 1


if __name__ == "__main__":
    sys.exit(main())
