"""How busy attention's blocks keep a GPU, modelled: a table of `make cuda-report`.

Blocks start in the order of their numbers, each in the first slot that is free; slots are as many
as fit on the multiprocessors at a time. Blocks, their order and tiles are the launchers' own. What
a block costs is what the emulator counted: instructions for a block, and for each tile that it
takes. The share of a launch is the mean over the slots of the time in which they have a block.

Slots are equally fast, memory always keeps up, and a launch starts when the one before has ended.
"""

import ctypes
import functools
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import attention_ptx
import torch

from bigkernel.ops.attention.reference import Params, Rule
from bigkernel.testing import ptx
from tools import sass

GPUS = {  # name -> (architecture, device); of the H200 multiprocessors and L2 are the H100's
    "A100": ("sm_80", ptx.DEVICES["A100"]),
    "H200": ("sm_90", ptx.DEVICES["H100"]),
    "L40S": ("sm_89", ptx.Device(89, 99 << 10, 142, 96 << 20)),
    "B200": ("sm_100", ptx.DEVICES["B200"]),
}
FEW = "few queries"
FORWARD, KEYS, QUERIES = ROLES = ("forward", "backward, dK dV", "backward, dQ")
KERNELS = {
    FORWARD: "attention_fwd_kernel<ForwardShape<{type}, {dim}, {general}, {room}> >",
    KEYS: "attention_bwd_kernel<{type}, {dim}, (Part){part}, {general}>",
    QUERIES: "attention_bwd_kernel<{type}, {dim}, (Part)3, {general}>",
    FEW: "attention_few_kernel<FewShape<{type}, {dim}> >",
}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float": torch.float32}


@dataclass(frozen=True)
class Shape:
    """A call in bf16; several lengths are packed sequences; few queries see the last keys too."""

    heads: int
    heads_kv: int
    dim: int
    lengths: tuple[int, ...]
    batch: int = 1
    causal: bool = True
    queries: int | None = None  # as many as keys

    def __str__(self) -> str:
        several, kv = len(self.lengths) > 1, self.heads_kv != self.heads
        heads = f"Hq{self.heads} Hkv{self.heads_kv}" if kv else f"H{self.heads}"
        length = "+".join(map(str, self.lengths))
        if self.queries:
            return f"B{self.batch} {heads} Sq{self.queries} Sk{length} D{self.dim}"
        batch = "packed" if several else f"B{self.batch}"
        return f"{batch} {heads} S{length} D{self.dim} {'causal' if self.causal else 'full'}"

    @property
    def sequences(self) -> tuple[int, ...]:
        return self.lengths * self.batch


SHAPES = [
    Shape(24, 24, 128, (4608,)),
    Shape(24, 24, 128, (4608,), causal=False),
    Shape(16, 16, 64, (1024,), batch=8),
    Shape(14, 2, 64, (1024,), batch=4),
    Shape(14, 2, 128, (1024,), batch=4),
    Shape(32, 8, 128, (2048,)),
    Shape(32, 8, 128, (8192,)),
    Shape(8, 1, 128, (4096,)),
    Shape(32, 8, 128, (2048, 256, 1024, 512, 256)),
]
DECODING = [
    Shape(32, 8, 128, (8192,), queries=1),
    Shape(32, 8, 128, (8192,), queries=16),
    Shape(32, 8, 128, (2048,), batch=8, queries=1),
    Shape(32, 8, 128, (4096,), batch=64, queries=1),
    Shape(14, 2, 64, (4096,), queries=1),
    Shape(32, 32, 128, (4096,), queries=1),
]
# Of an H200.
BARS = {
    (SHAPES[0], FORWARD): 0.93,
    (SHAPES[0], KEYS): 0.93,
    (SHAPES[0], QUERIES): 0.93,
    (SHAPES[4], KEYS): 0.90,
    (SHAPES[5], KEYS): 0.90,
    (DECODING[0], FEW): 0.85,
}


def arguments(shape: Shape) -> Any:
    """What a call would hand to the launchers, without tensors."""
    args = attention_ptx.Args()
    args.dtype, args.scale = attention_ptx.TYPE_CODES[torch.bfloat16], 1.0
    args.heads_q, args.heads_kv = shape.heads, shape.heads_kv
    args.group = shape.heads // shape.heads_kv
    args.dim = args.dim_v = shape.dim
    args.batch, args.max_k = len(shape.sequences), max(shape.lengths)
    args.max_q = shape.queries or args.max_k
    args.left, args.right, args.bottom_right = -1, 0 if shape.causal else -1, bool(shape.queries)
    if len(shape.lengths) > 1:
        args.total_q = args.total_k = sum(shape.lengths)
        args.cu_q = args.cu_k = 16  # an address that is not read
    return args


def plan_of(args: Any, role: str, device: ptx.Device) -> Any:
    """The launch of a role."""
    if role == FORWARD:
        return attention_ptx.plans("attention_fwd_plan", args, device)[0]
    name = b"(dk" if role == KEYS else b"(dq)"
    plans = attention_ptx.plans("attention_bwd_plan", args, device)
    return next(plan for plan in plans if name in plan.name)


def columns_of(role: str, length: int, tile: int, rows: int, columns: int, causal: bool) -> int:
    """Tiles of columns that the tile of rows takes: keys, or for dK and dV queries."""
    first, last = tile * rows, min(tile * rows + rows, length)
    if role == KEYS:
        return -(-length // columns) - (first // columns if causal else 0)
    return -(-(last if causal else length) // columns)


@dataclass(frozen=True)
class Cost:
    """Warp instructions of a block, and of it for each tile of columns."""

    block: float
    tile: float


def small(args: Any, role: str, plan: Any) -> bool:
    """Whether the launch has the tiles for little shared memory."""
    return role == FORWARD and plan.tile_keys < plan_of(args, role, ptx.DEVICES["A100"]).tile_keys


def cost_of(
    record: dict[str, Any], dim: int, role: str, rows: int, columns: int, which: str = ""
) -> Cost:
    """From the record's counts of one full and one causal head, as two equations. ``which``: what
    the names of the cases add of the tiles."""
    found = []
    for causal in (False, True):
        name = f"bf16 D{dim} {'causal' if causal else 'full'}{which}"
        (case,) = (x for x in record["cases"] if (x["case"], x["role"]) == (name, role))
        length = case["size"]
        blocks = -(-length // rows)
        tiles = sum(columns_of(role, length, i, rows, columns, causal) for i in range(blocks))
        found.append((case["emulator"]["ptx_instructions"], blocks, tiles))
    (full, blocks, more), (causal, _, fewer) = found
    tile = (full - causal) / (more - fewer)
    return Cost((full - tile * more) / blocks, tile)


def blocks_of(shape: Shape, role: str, args: Any, plan: Any) -> Iterator[tuple[int, int]]:
    """(sequence, tile) of each block in their order; tiles that are not there included."""
    tiles = -(-max(shape.lengths) // plan.tile_rows)
    heads = shape.heads_kv * args.splits if role == KEYS else shape.heads
    places = (ctypes.c_uint32 * 2 * plan.blocks)()
    attention_ptx.host().library.attention_places(
        plan.blocks, heads * len(shape.sequences), tiles, plan.together, places
    )
    for head, rank in places:
        sequence, tile = head // heads, tiles - 1 - rank
        if role == KEYS:  # counted from the end
            tile = -(-shape.sequences[sequence] // plan.tile_rows) - 1 - tile
        yield sequence, tile


def share_of(costs: Iterable[float], slots: int) -> float:
    """Blocks of these costs, each in the slot that is free first."""
    ends, total = [0.0] * slots, 0.0
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
        total += cost
    return total / (slots * max(ends))


def registers_of(
    record: dict[str, Any], arch: str, role: str, args: Any, plan: Any, type_: str = "bf16"
) -> int:
    dim, general = plan.tile_dim, str(bool(plan.general)).lower()
    room, part = 100 if small(args, role, plan) else 164, 1 if dim > 128 else 0
    kernel = KERNELS[role].format(type=type_, dim=dim, general=general, room=room, part=part)
    (found,) = (x for x in record["kernels"] if (x["arch"], x["kernel"]) == (arch, kernel))
    return int(found["registers"])


def slots_of(record: dict[str, Any], arch: str, role: str, args: Any, plan: Any) -> int:
    """Blocks of a launch on one multiprocessor."""
    registers = registers_of(record, arch, role, args, plan)
    return sass.occupancy(arch, registers, plan.threads, plan.shared)[0]


def measure(record: dict[str, Any], shape: Shape, gpu: str) -> list[dict[str, Any]]:
    """The rows of a shape on a GPU; ``record``: what `make cuda-report` has counted."""
    arch, device = GPUS[gpu]
    args, rows = arguments(shape), []
    parts = 4 * attention_ptx.split(args, device)
    for role in ROLES:
        plan = plan_of(args, role, device)
        names = ", 100 KB" if small(args, role, plan) else ""
        cost = cost_of(record, shape.dim, role, plan.tile_rows, plan.tile_keys, names)
        members = args.members if role == KEYS else 1
        costs = []
        for sequence, tile in blocks_of(shape, role, args, plan):
            length = shape.sequences[sequence]
            there = 0 <= tile * plan.tile_rows < length
            taken = members * columns_of(
                role, length, tile, plan.tile_rows, plan.tile_keys, shape.causal
            )
            costs.append(cost.block + cost.tile * taken if there else 0.0)
        slots = slots_of(record, arch, role, args, plan) * device.multiprocessors
        rows.append({"shape": str(shape), "gpu": gpu, "role": role, "blocks": plan.blocks,
                     "slots": slots, "together": plan.together,
                     "splits": args.splits if role == KEYS else 1, "parts": parts,
                     "share": share_of(costs, slots),
                     "bar": BARS.get((shape, role)) if gpu == "H200" else None})  # fmt: skip
    return rows


@functools.cache
def few_cost(dim: int) -> Cost:
    """Of a block for few queries, from one of 4 and one of 8 tiles in the emulator."""
    totals = []
    for tiles in (4, 8):
        shape = Shape(4, 1, dim, (64 * tiles,), queries=1)
        rule = Rule(1.0, causal=True, bottom_right=True)
        q, out = (torch.zeros(1, 4, 1, dim).bfloat16() for _ in range(2))
        k, v = (torch.zeros(1, 1, 64 * tiles, dim).bfloat16() for _ in range(2))
        call = attention_ptx.Call(q, k, v, Params(*[None] * 5, 1, *shape.lengths, rule))
        call.args.out, lse = call.view(out, "out"), torch.zeros(1, 4, 1, 2)
        call.args.lse = call.view_lse(lse, "lse")
        call.split_keys(splits=1)
        call.run("attention_few_run")
        totals.append(attention_ptx.launches[0].counters.total)
    tile = (totals[1] - totals[0]) / 4
    return Cost(totals[0] - 4 * tile, tile)


def measure_few(record: dict[str, Any], shape: Shape, gpu: str) -> dict[str, Any]:
    """The row of a call with few queries on a GPU: the heads that share keys are one tile."""
    arch, device = GPUS[gpu]
    args = arguments(shape)
    parts = 4 * attention_ptx.split_keys(args, device)
    plan, _ = attention_ptx.plans("attention_few_plan", args, device)
    slots = slots_of(record, arch, FEW, args, plan) * device.multiprocessors
    keys = -(-args.max_k // plan.tile_keys)
    of_split = -(-keys // args.splits)
    cost = few_cost(shape.dim)
    # Splits side by side; the last may have fewer tiles.
    taken = [min(of_split, keys - split * of_split) for split in range(args.splits)]
    costs = [cost.block + cost.tile * n for n in taken] * (plan.blocks // args.splits)
    return {"shape": str(shape), "gpu": gpu, "role": FEW, "blocks": plan.blocks, "slots": slots,
            "together": 1, "splits": args.splits, "parts": parts,
            "share": share_of(costs, slots),
            "bar": BARS.get((shape, FEW)) if gpu == "H200" else None}  # fmt: skip


def table(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every shape on the GPUs whose architecture the record has."""
    archs = {row["arch"] for row in record["kernels"]}
    gpus = [gpu for gpu, (arch, _) in GPUS.items() if arch in archs]
    rows = [row for shape in SHAPES for gpu in gpus for row in measure(record, shape, gpu)]
    return rows + [measure_few(record, shape, gpu) for shape in DECODING for gpu in gpus]


def tiles(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The tiles of every kind of call on a device of each architecture that the record has, and
    what of them fits on a multiprocessor."""
    archs = {row["arch"] for row in record["kernels"]}
    devices = {f"sm_{device.capability}": device for device in ptx.DEVICES.values()}
    rows = []
    for type_, dtype in TYPES.items():
        for role in ROLES:
            for dim in (64, 96, 128, 192, 256) if role == FORWARD else (64, 128, 256):
                for general in (False, True):
                    args = arguments(Shape(16, 16, dim, (4096,)))
                    args.dtype, args.softcap = attention_ptx.TYPE_CODES[dtype], float(general)
                    attention_ptx.split(args)
                    kind = "general" if general else "plain"
                    for arch in sorted({*devices} & archs, key=lambda name: int(name[3:])):
                        plan = plan_of(args, role, devices[arch])
                        if bool(plan.general) != general or plan.tile_dim != dim:
                            continue  # this type and dim share another's kernel
                        registers = registers_of(record, arch, role, args, plan, type_)
                        blocks, _ = sass.occupancy(arch, registers, plan.threads, plan.shared)
                        rows.append({"call": f"{type_} D{dim} {kind} {role}", "arch": arch,
                                     "tile": f"{plan.tile_rows} x {plan.tile_keys}",
                                     "shared": plan.shared, "registers": registers,
                                     "blocks": blocks, "warps": plan.threads // 32})  # fmt: skip
    return rows
