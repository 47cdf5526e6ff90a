"""Shuffles, votes, reductions over the warp, tensor-core products and matrix loads."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bigkernel.testing import ptx

MMA = [
    # name, shape, accumulator's registers and letter, instruction types
    ("f16", 16, "f", "f32.f16.f16.f32"),
    ("bf16", 16, "f", "f32.bf16.bf16.f32"),
    ("f16_f16", 16, "r", "f16.f16.f16.f16"),
    ("f16_k8", 8, "f", "f32.f16.f16.f32"),
    ("bf16_k8", 8, "f", "f32.bf16.bf16.f32"),
    ("tf32", 8, "f", "f32.tf32.tf32.f32"),
    ("tf32_k4", 4, "f", "f32.tf32.tf32.f32"),
]
SOURCE = (Path(__file__).parent / "warp.cu").read_text()
STMATRIX = r"""
#define T threadIdx.x
extern "C" __global__ void stmatrix(const unsigned* x, uint4* o) {
  __shared__ uint4 s[32];
  unsigned at = (unsigned)__cvta_generic_to_shared(&s[T]);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
    :: "r"(at), "r"(x[T]), "r"(x[T + 32]), "r"(x[T + 64]), "r"(x[T + 96]) : "memory");
  __syncwarp();
  o[T] = s[T];
}
extern "C" __global__ void elect(int* o) {
  asm volatile("{ .reg .pred p; .reg .b32 r; mov.b32 r, 0; elect.sync r|p, 0xffffffff;\n"
    "selp.u32 %0, 1, 0, p; shl.b32 r, r, 8; or.b32 %0, %0, r; }" : "=r"(o[T]));
}
"""


def mma_kernel(name, k, letter, types):
    """Loads fragments by the manual's layout and multiplies them."""
    pairs = "tf32" not in types
    words = {16: (4, 2), 8: (2, 1), 4: (2, 1)}[k] if pairs else {8: (4, 2), 4: (2, 1)}[k]
    a_words, b_words = words
    acc, count = ("float", 4) if letter == "f" else ("unsigned", 2)
    places = iter(range(64))
    group = lambda n: "{" + ", ".join(f"%{next(places)}" for _ in range(n)) + "}"  # noqa: E731
    d, a, b = group(count), group(a_words), group(b_words)
    c = "{" + ", ".join(f"%{j}" for j in range(count)) + "}"
    outs = ", ".join(f'"+{letter}"(d[{j}])' for j in range(count))
    ins = ", ".join([f'"r"(a[32 * {j} + T])' for j in range(a_words)]
                    + [f'"r"(b[32 * {j} + T])' for j in range(b_words)])  # fmt: skip
    return (
        f'extern "C" __global__ void mma_{name}(const unsigned* a, const unsigned* b, {acc}* c) '
        "{\n"
        f"  {acc} d[{count}]; for (int j = 0; j < {count}; j++) d[j] = c[32 * j + T];\n"
        f'  asm volatile("mma.sync.aligned.m16n8k{k}.row.col.{types} {d}, {a}, {b}, {c};" '
        f": {outs} : {ins}); for (int j = 0; j < {count}; j++) c[32 * j + T] = d[j];\n}}\n"
    )


@pytest.fixture(scope="module")
def module():
    return ptx.compile(SOURCE + "".join(mma_kernel(*row) for row in MMA), arch="sm_80")


def launch(module, name, *args, block=64):
    memory = ptx.Memory()
    given = [memory.register(a) if hasattr(a, "dtype") else a for a in args]
    return module[name].launch((1,), (block,), given, memory)


def ints(n=64):
    return np.random.default_rng(3).integers(0, 100, n).astype(np.int32)


@pytest.mark.parametrize("distance", [1, 3, 16, 31])
@pytest.mark.parametrize("mode", ["bfly", "up", "down", "idx", "down8", "up8", "idx8"])
def test_shfl_sync(module, mode, distance):
    x, out = ints(), np.zeros(64, np.int32)
    launch(module, f"shfl_{mode}", x, out, distance)
    lane = np.arange(64)
    width = 8 if mode.endswith("8") else 32
    base, inner = lane // width * width, lane % width
    source = {"bfly": inner ^ distance, "up": inner - distance, "down": inner + distance,
              "idx": (distance + lane * (width == 8)) % width}[mode.removesuffix("8")]  # fmt: skip
    source = base + np.where((source < 0) | (source >= width), inner, source)
    np.testing.assert_array_equal(out, x[source])


def test_shfl_sync_by_half_a_warp(module):
    x, out = ints(), np.zeros(64, np.int32)
    launch(module, "shfl_half_warp", x, out)
    lane = np.arange(64)
    np.testing.assert_array_equal(out, np.where(lane % 32 < 16, x[lane ^ 5], -1))


def test_shfl_sync_of_64_bits(module):
    x, out = np.random.default_rng(0).normal(size=64), np.zeros(64)
    launch(module, "shfl_long", x, out)
    np.testing.assert_array_equal(out, x[np.arange(64) ^ 9])


def bits(rows):
    """[warps, 32] of bool -> each lane's mask of its warp."""
    return np.repeat(
        (rows.reshape(-1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1), 32
    )


def test_vote_sync_and_activemask(module):
    x, out = ints(), np.zeros(192, np.uint32)
    launch(module, "vote", x, out)
    odd = x & 1 == 1
    np.testing.assert_array_equal(out[:64], bits(odd))
    high = np.repeat((x.reshape(2, 32) > 90).any(1), 32)
    np.testing.assert_array_equal(out[64:128], high * 4 + 2)
    np.testing.assert_array_equal(out[128:], np.where(odd, bits(odd), bits(~odd & (x & 2 == 2))))


def test_match_sync(module):
    x, out = ints(), np.zeros(192, np.uint32)
    x[40] = 256
    launch(module, "match", x, out)
    want = [bits((x & 3) == v)[i] for i, v in enumerate(x & 3)]
    np.testing.assert_array_equal(out[:64], want)
    first = np.arange(64) < 32
    np.testing.assert_array_equal(out[64:128], np.where(first, 0xFFFFFFFF, 0))
    np.testing.assert_array_equal(out[128:], first)


def test_redux_sync(module):
    x, out = ints() - 50, np.zeros(448, np.int32)
    launch(module, "redux", x, out)
    rows = x.reshape(2, 32)
    ufuncs = [np.add, np.minimum, np.maximum, np.bitwise_or, np.bitwise_and, np.bitwise_xor]
    for j, ufunc in enumerate(ufuncs):
        want = np.repeat(ufunc.reduce(rows, axis=1), 32)
        np.testing.assert_array_equal(out[64 * j : 64 * j + 64], want)
    eight = np.repeat(rows[:, :8].sum(1), 32) * (np.arange(64) % 32 < 8)
    np.testing.assert_array_equal(out[384:], eight)


@pytest.mark.parametrize("trans", ["", "_trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(module, count, trans):
    tiles = np.random.default_rng(1).integers(0, 65536, (count, 8, 8)).astype(np.uint16)
    out = np.zeros((count, 32, 2), np.uint16)
    counters = launch(module, f"ldmatrix_x{count}{trans}", tiles, out, block=32)
    want = tiles.transpose(0, 2, 1) if trans else tiles  # lane 4r + c holds row r, columns 2c, 2c+1
    np.testing.assert_array_equal(out, want.reshape(count, 32, 2))
    assert counters.classes["ldmatrix"] == 1
    assert counters.bank_conflict_ratio == 1.0


def fragments(matrix, k_step):
    """[rows, k] -> registers [.., 32, values a register], by the manual's layout.

    Lane 4g + t holds row g, columns t * k_step .. ; then 8 rows down; then 4 * k_step columns on.
    """
    rows, k = matrix.shape
    x = matrix.reshape(rows // 8, 8, k // (4 * k_step), 4, k_step)
    return np.ascontiguousarray(x.transpose(2, 0, 1, 3, 4)).reshape(-1, 32, k_step)


@pytest.mark.parametrize(("name", "k", "letter", "types"), MMA, ids=[m[0] for m in MMA])
def test_mma_sync(module, name, k, letter, types):
    rng = torch.Generator().manual_seed(5)
    kind = types.split(".")[1]
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[kind]
    a, b = torch.randn(16, k, generator=rng).to(dtype), torch.randn(k, 8, generator=rng).to(dtype)
    c = torch.randn(16, 8, generator=rng)
    raw = np.uint32 if kind == "tf32" else np.uint16
    step = 1 if kind == "tf32" else 2
    a_bits, b_bits = (
        x.contiguous().view(torch.int32 if kind == "tf32" else torch.int16).numpy().view(raw)
        for x in (a, b.T)
    )
    if kind == "tf32":  # what the unit sees of a float32
        a, b = ((x.view(torch.int32) & -8192).view(torch.float32) for x in (a, b))
    half = letter == "r"
    c_used = c.half().float() if half else c
    acc = fragments(c_used.numpy(), 2)
    acc = acc.astype(np.float16) if half else np.ascontiguousarray(acc.transpose(0, 2, 1))
    exact = a.double() @ b.double() + c_used.double()
    out = acc.copy()
    counters = launch(module, f"mma_{name}", fragments(a_bits, step), fragments(b_bits, step), out,
                      block=32)  # fmt: skip
    got = out if half else out.transpose(0, 2, 1)
    got = got.astype(np.float64).reshape(2, 8, 4, 2).reshape(16, 8)
    np.testing.assert_allclose(
        got, exact.numpy(), rtol=1e-3 if half else 1e-5, atol=2e-2 if half else 1e-5
    )
    assert counters.mma == 1


def test_stmatrix_and_elect():
    module = ptx.compile(STMATRIX, arch="sm_90")
    tiles = np.random.default_rng(1).integers(0, 65536, (4, 32, 2)).astype(np.uint16)
    out = np.zeros((4, 8, 8), np.uint16)
    launch(module, "stmatrix", tiles, out, block=32)
    np.testing.assert_array_equal(out.reshape(4, 32, 2), tiles)
    chosen = np.ones(64, np.int32)
    launch(module, "elect", chosen)
    np.testing.assert_array_equal(chosen, np.arange(64) % 32 == 0)


def test_wgmma_is_named_as_unknown():
    text = """.version 9.0
.target sm_90a
.address_size 64
.visible .entry k() { wgmma.fence.sync.aligned; ret; }
"""
    with pytest.raises(ptx.UnknownInstruction, match=r"'wgmma\.fence\.sync\.aligned'"):
        ptx.load(text)["k"].launch((1,), (128,), [], ptx.Memory())
