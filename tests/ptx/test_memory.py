"""Loads, stores, atomics, cp.async, barriers, control flow and calls, against numpy."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from bigkernel.testing import ptx

SOURCE = Path(__file__).parent / "memory.cu"


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def module(request):
    return ptx.compile(SOURCE, arch=request.param)


@pytest.fixture
def memory():
    return ptx.Memory()


def launch(module, memory, name, *args, grid=1, block=64, shared=0):
    given = [memory.register(a) if isinstance(a, np.ndarray) else a for a in args]
    grid, block = (x if isinstance(x, tuple) else (x,) for x in (grid, block))
    return module[name].launch(grid, block, given, memory, shared=shared)


def floats(n, seed=0):
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def ints(low, high, n, dtype=np.int32, seed=0):
    return np.random.default_rng(seed).integers(low, high, n).astype(dtype)


def test_ld_st_vectors(module, memory):
    a, b = floats((64, 4)), ints(0, 2**31, (64, 2), np.uint32)
    c, d = ints(0, 256, 64, np.uint8), ints(-999, 999, 64, np.int16)
    o, p = np.zeros((128, 4), np.float32), np.zeros((128, 2), np.uint32)
    q, r = np.zeros(64, np.uint8), np.zeros(64, np.int32)
    launch(module, memory, "vectors", a, b, c, d, o, p, q, r)
    np.testing.assert_array_equal(o, np.concatenate([a, a]))
    np.testing.assert_array_equal(p, np.concatenate([b, b]))
    np.testing.assert_array_equal(q, c + np.uint8(1))
    np.testing.assert_array_equal(r, d.astype(np.int32) * 2)


def test_special_registers(module, memory):
    out = np.zeros((24, 30), np.int32)
    launch(module, memory, "index_3d", out, grid=(2, 3, 4), block=(5, 3, 2))
    np.testing.assert_array_equal(out, np.arange(24)[:, None] * 1000 + np.arange(30))


class Pair(ctypes.Structure):
    _fields_ = (("out", ctypes.c_uint64), ("n", ctypes.c_int * 4), ("scale", ctypes.c_double))


def test_struct_parameters_calls_and_variables(module, memory):
    out = np.zeros(32, np.float32)
    p = Pair(memory.register(out), (1, 2, 3, 4), 0)
    q = Pair(0, (100, 200, 300, 400), 0.5)
    i = np.arange(32)
    for bumps in range(2):
        launch(module, memory, "structs", p, bytes(q), 3, block=32)
        twice = 2.0 * i + 2.0 * (i + 1) + i + 1
        want = twice * np.array([1, 0.5, 0.25])[i % 3] + np.array([1, 2, 3, 4])[(i + 3) % 4] + 0.5
        want += np.array([100, 200, 300, 400])[i % 4] + np.array([10, 20, 30, 40])[i % 4]
        np.testing.assert_array_equal(out, want + 8 * bumps)
        launch(module, memory, "bump_table", block=32)  # the module's variables stay


def test_local_memory(module, memory):
    x, out = ints(0, 9999, 64), np.zeros(64, np.int32)
    launch(module, memory, "local_array", x, out)
    np.testing.assert_array_equal(out, sum(x * ((x >> j) & 15) for j in range(4)))


@pytest.mark.parametrize("where", [0, 1, 2])
def test_generic_addresses(module, memory, where):
    out = np.zeros(192, np.int32)
    launch(module, memory, "generic", out, where)
    i = np.arange(64)
    np.testing.assert_array_equal(out[64:128], i)
    space = np.where(i % 3 == 0, 1, {0: 4, 1: 1, 2: 2}[where])
    np.testing.assert_array_equal(out[128:], space)


def test_divergent_loops_meet_again(module, memory):
    n, out = ints(0, 60, 128), np.zeros(128, np.int32)
    launch(module, memory, "loops", n, out, grid=2)
    want = [sum(j for j in range(min(k, 41)) if j % 3 != 1) + 32 for k in n]
    np.testing.assert_array_equal(out, want)


def test_switch(module, memory):
    x = ints(0, 9, 64)
    out = np.arange(64, dtype=np.int32)
    before = out.copy()
    launch(module, memory, "jumps", x, out)
    table = [lambda o: 6, lambda o: o * 3 + 2, lambda o: 33, lambda o: o - 8, lambda o: 77,
             lambda o: (o ^ 0x55) + 1, lambda o: 30, lambda o: 0, lambda o: 0]  # fmt: skip
    np.testing.assert_array_equal(out, [table[k](o) for k, o in zip(x, before, strict=True)])


def test_extended_precision_integers(module, memory):
    """add.cc, addc, sub.cc, subc, mad.lo.cc, madc.hi by way of 128-bit integers."""
    a = np.random.default_rng(0).integers(0, 2**64, 65, dtype=np.uint64)
    a[::7] = 2**64 - 1
    out = np.zeros((64, 4), np.uint64)
    launch(module, memory, "wide_integers", a, out)
    for i in range(64):
        x, y = int(a[i]), int(a[i + 1])
        total, rest = x * y + (x << 64 | y), (y << 64 | x) - x * y
        want = [v >> s & 2**64 - 1 for v in (total, rest) for s in (0, 64)]
        assert out[i].tolist() == want


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 100, 128])
def test_early_return(module, memory, n):
    x, out = floats(n), np.zeros(n, np.float32)
    launch(module, memory, "early_return", x, out, n, grid=2)
    np.testing.assert_array_equal(out, x + 1)


def test_block_reduction(module, memory):
    x, out = floats(40 * 256), np.zeros(40, np.float32)
    launch(module, memory, "reduce", x, out, grid=40, block=256)
    np.testing.assert_allclose(out, x.reshape(40, 256).sum(1), rtol=1e-4, atol=1e-5)


def test_bar_red(module, memory):
    x, out = ints(-8, 100, 96), np.zeros(96, np.int32)
    launch(module, memory, "counts", x, out, block=96)
    np.testing.assert_array_equal(out, (x > 0).sum() * 100 + 10 + (x > 90).any())


def test_bar_arrive_and_named_barriers(module, memory):
    x, out = floats(64), np.zeros(64, np.float32)
    launch(module, memory, "named", x, out, block=128)
    np.testing.assert_array_equal(out, 2 * x[::-1])


def test_bar_warp_sync(module, memory):
    x, out = floats(128), np.zeros(128, np.float32)
    launch(module, memory, "warp_exchange", x, out, block=128)
    np.testing.assert_array_equal(out, x[np.arange(128) ^ 31])


def test_block_of_no_whole_warps(module, memory):
    x, out = floats(50), np.zeros(50, np.float32)
    launch(module, memory, "odd_block", x, out, block=50)
    np.testing.assert_array_equal(out, x[::-1])


def test_static_and_dynamic_shared_memory(module, memory):
    out = np.zeros(32, np.int32)
    launch(module, memory, "static_and_dynamic", out, 5, block=32, shared=128)
    np.testing.assert_array_equal(out, (31 - np.arange(32)) * 5 - np.arange(32) % 5)


def test_cp_async_pipeline(module, memory):
    x, out = floats((6, 64, 4)), np.zeros((6, 64, 4), np.float32)
    counters = launch(module, memory, "pipeline", x, out, 6)
    np.testing.assert_array_equal(out, x[:, ::-1])
    assert counters.bank_conflict_ratio == 1.0


@pytest.mark.parametrize("n", [0, 4, 16, 100, 1000, 1024])
def test_cp_async_zero_fill(module, memory, n):
    x, out = floats(n // 4), np.ones(256, np.float32)  # no byte past n may be touched
    counters = launch(module, memory, "zero_fill", x, out, n)
    np.testing.assert_array_equal(out, np.pad(x, (0, 256 - n // 4)))
    assert counters.global_loads.sectors == -(-n // 32)


def test_cp_async_of_8_bytes_by_some_threads(module, memory):
    x, out = ints(0, 99, 64), np.zeros(64, np.int32)
    launch(module, memory, "small_copies", x, out)
    np.testing.assert_array_equal(out, x[::-1])


ATOMICS = {
    "add": lambda o, v: o + v, "min": min, "max": max, "and": lambda o, v: o & v,
    "or": lambda o, v: o | v, "xor": lambda o, v: o ^ v, "exch": lambda o, v: v,
    "inc": lambda o, v: 0 if o >= v else o + 1, "dec": lambda o, v: v if o == 0 or o > v else o - 1,
    "cas": lambda o, v: v if o == 3 else o, "fadd": lambda o, v: o + v, "dadd": lambda o, v: o + v,
}  # fmt: skip


@pytest.mark.parametrize("name", ATOMICS)
def test_atom(module, memory, name):
    dtype = {"fadd": np.float32, "dadd": np.float64}.get(name, np.int32)
    x = ints(0, 9, 64).astype(dtype)
    out, old = np.full(5, 3, dtype), np.zeros(64, dtype)
    want = out.copy()
    found = []
    for i, v in enumerate(x):
        found.append(want[i % 5])
        want[i % 5] = ATOMICS[name](want[i % 5], v)
    counters = launch(module, memory, f"atomic_{name}", x, out, old)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(old, found)
    assert counters.global_atomics == 64


def test_red(module, memory):
    x, y = ints(-99, 99, 128), floats(128)
    out, total = np.zeros(4, np.int32), np.zeros(1, np.float32)
    launch(module, memory, "red", x, out, y, total, grid=2)
    i = np.arange(128)
    np.testing.assert_array_equal(out, [*(x[i % 3 == k].sum() for k in range(3)), x.max()])
    np.testing.assert_allclose(total[0], y.sum(), rtol=1e-5, atol=1e-6)


def test_red_f16x2_and_bf16x2(module, memory):
    x, y = torch.randint(-4, 5, (32, 2)).half(), torch.randint(-4, 5, (32, 2)).bfloat16()
    o, p = torch.zeros(2).half(), torch.zeros(2).bfloat16()
    given = [memory.register(t) for t in (x, o, y, p)]
    module["red_half"].launch((1,), (32,), given, memory)
    assert torch.equal(o, x.sum(0))
    assert torch.equal(p, y.sum(0))


def test_atomics_in_shared_memory(module, memory):
    x, out = ints(0, 256, 512, np.uint8), np.zeros(16, np.int32)
    counters = launch(module, memory, "histogram", x, out, grid=4, block=128)
    np.testing.assert_array_equal(out, np.bincount(x % 16, minlength=16))
    assert counters.shared_atomics == 512
    assert counters.global_atomics == 64


def test_last_block_sums_up(module, memory):
    x, partial, out = floats(640), np.zeros(20, np.float32), np.zeros(1, np.float32)
    launch(module, memory, "last_block", x, partial, np.zeros(1, np.uint32), out, grid=20, block=32)
    np.testing.assert_allclose(out[0], x.reshape(20, 32)[:, :2].sum(), rtol=1e-4)


@pytest.mark.parametrize(("name", "length", "loads", "minimum"), [
    ("coalesced", 256, 32, 32), ("strided", 2048, 256, 32), ("broadcast", 4, 8, 8)
])  # fmt: skip
def test_counts_global_sectors(module, memory, name, length, loads, minimum):
    x, out = np.zeros(length, np.float32), np.zeros(256, np.float32)
    pointers = [memory.register(x, "x"), memory.register(out, "out")]
    counters = module[name].launch((4,), (64,), pointers, memory)
    assert (counters.loads["x"].sectors, counters.loads["x"].minimum) == (loads, minimum)
    assert (counters.stores["out"].sectors, counters.stores["out"].minimum) == (32, 32)
    assert counters.stores["out"].bytes == 1024
    assert counters.classes["ld"] - 2 * 8 == 8  # 8 warps; two of its loads are parameters
    assert counters.global_sectors == loads + 32


def test_counts_offset_of_views(module, memory):
    x, out = np.zeros(257, np.float32), np.zeros(256, np.float32)
    pointers = [memory.register(x[1:], "x"), memory.register(out, "out")]
    counters = module["coalesced"].launch((4,), (64,), pointers, memory)
    assert counters.loads["x"].sectors == 40  # each warp's 128 bytes straddle one more sector
    assert counters.loads["x"].minimum == 32


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (2, 2), (8, 8), (32, 32), (33, 1)])
def test_counts_bank_conflicts(module, memory, stride, wavefronts):
    out = np.zeros(32, np.float32)
    shared = 4 * (31 * stride + 1)
    counters = launch(module, memory, "banks", out, stride, block=32, shared=shared)
    assert counters.shared_wavefronts == 2 * wavefronts
    assert counters.shared_wavefronts_minimum == 2
    assert counters.bank_conflict_ratio == wavefronts


@pytest.mark.parametrize(("swizzle", "ratio"), [(0, 8), (1, 1)])
def test_counts_bank_conflicts_of_vectors(module, memory, swizzle, ratio):
    out = np.zeros((32, 4), np.float32)
    counters = launch(module, memory, "banks_wide", out, swizzle, block=32, shared=4096)
    stores = 8 * 4  # without conflicts
    assert counters.shared_wavefronts == stores + 4 * ratio
    row, column = np.arange(32) % 8, np.arange(32) // 8
    np.testing.assert_array_equal(out[:, 0], row * 8 + (column ^ row if swizzle else column))


def test_register_rejects():
    memory = ptx.Memory()
    with pytest.raises(TypeError, match="expected a numpy array or CPU tensor, got list"):
        memory.register([1, 2])
    fixed = np.zeros(3)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="must be writeable"):
        memory.register(fixed)
    with pytest.raises(ValueError, match="negative strides"):
        memory.register(np.zeros(3)[::-1])


def test_strided_tensors_and_arrays(module, memory):
    whole = torch.arange(512, dtype=torch.float32).reshape(8, 64)
    out = np.zeros((64, 2), np.float32)
    x = whole[:, 3:4]  # [8, 1], 64 apart: reachable from its first to its last element
    with pytest.raises(ptx.OutOfBounds, match=r"float32 \[8, 1\]"):
        module["strided"].launch((1,), (64,), [memory.register(x), memory.register(out)], memory)
    module["strided"].launch((1,), (32,), [memory.register(x), memory.register(out[:, 1])], memory)
    np.testing.assert_array_equal(out.reshape(-1)[1:33], whole.reshape(-1)[3::8][:32])
