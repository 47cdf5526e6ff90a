"""One of two ranks of `test_attention_of_dtensors_over_two_ranks`: rank, file of the store."""

import re
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import bigkernel
from bigkernel.ops import attention, attention_varlen

HEADS, ROWS, KEYS, DIM = 4, 5, 7, 8


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def compare(mesh, call, tensors, placements):
    """Results and gradients of ``call`` on DTensors, and on the whole tensors."""
    whole = [x.clone().requires_grad_(x.is_floating_point()) for x in tensors]
    parts = [
        distribute_tensor(x.detach(), mesh, p).requires_grad_(x.requires_grad)
        for x, p in zip(whole, placements, strict=True)
    ]
    expected, actual = call(*whole), call(*parts)
    expected, actual = (x if isinstance(x, tuple) else (x,) for x in (expected, actual))
    loss = [sum((x * torch.arange(x.numel()).view(x.shape).cos()).sum() for x in expected)]
    for a, e in zip(actual, expected, strict=True):
        assert isinstance(a, DTensor)
        torch.testing.assert_close(a.full_tensor(), e)
    leaves = [x for x in whole if x.requires_grad]
    wanted = torch.autograd.grad(loss[0], leaves)
    total = sum(
        (a.full_tensor() * torch.arange(a.numel()).view(a.shape).cos()).sum() for a in actual
    )
    grads = torch.autograd.grad(total, [x for x in parts if x.requires_grad])
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g.full_tensor(), w, rtol=1e-4, atol=1e-5)


def refused(message, call):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


def dense(mesh):
    for kv_heads in (4, 2, 1):
        q, k, v = (
            draw(2, ROWS, HEADS, DIM).transpose(1, 2),
            draw(2, kv_heads, KEYS, DIM),
            draw(2, kv_heads, KEYS, DIM),
        )
        for split in (Replicate(), Shard(0), Shard(1)):
            kv = Replicate() if split == Shard(1) and kv_heads == 1 else split
            placements = [[split], [kv], [kv]]
            compare(
                mesh,
                lambda q, k, v: attention(q, k, v, causal=True, return_lse=True),
                (q, k, v),
                placements,
            )
            compare(
                mesh,
                lambda q, k, v: bigkernel.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                (q, k, v),
                placements,
            )
            for shape in ((2, HEADS, ROWS, KEYS), (1, 1, ROWS, KEYS), (HEADS, 1, KEYS), (KEYS,)):
                at = {Shard(0): len(shape) - 4, Shard(1): len(shape) - 3}.get(split, -1)
                own = [Shard(at) if at >= 0 and shape[at] > 1 else Replicate()]
                compare(
                    mesh,
                    lambda q, k, v, m: attention(q, k, v, mask=m),
                    (q, k, v, draw(*shape)),
                    [*placements, own],
                )


def packed(mesh):
    q, k, v = (draw(n, HEADS, DIM) for n in (ROWS, KEYS, KEYS))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ((0, 2, ROWS), (0, 4, KEYS)))
    for split in (Replicate(), Shard(1)):
        compare(
            mesh,
            lambda q, k, v: attention_varlen(q, k, v, cu_q, cu_k, return_lse=True),
            (q, k, v),
            [[split]] * 3,
        )
    slopes = distribute_tensor(torch.rand(HEADS, generator=GENERATOR), mesh, [Shard(0)])
    parts = [distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k, v)]
    lengths = [distribute_tensor(x, mesh, [Replicate()]) for x in (cu_q, cu_k)]
    torch.testing.assert_close(
        attention_varlen(*parts, *lengths, alibi_slopes=slopes).full_tensor(),
        attention_varlen(q, k, v, cu_q, cu_k, alibi_slopes=slopes.full_tensor()),
    )


def refusals(mesh):
    q, k, v = (draw(2, HEADS, n, DIM) for n in (ROWS + 1, KEYS + 1, KEYS + 1))

    def on(x, *placements):
        return distribute_tensor(x, mesh, placements)

    rows, heads = [on(x, Shard(2)) for x in (q, k, v)], [on(x, Shard(1)) for x in (q, k, v)]
    refused("split over batch or heads, got placed (Shard(dim=2),)", lambda: attention(*rows))
    refused("k must be placed (Shard(dim=1),)", lambda: attention(heads[0], *rows[1:]))
    refused("q must be a DTensor", lambda: attention(q, *heads[1:]))
    refused("k must be a DTensor on the same mesh", lambda: attention(heads[0], k, v))
    refused("mask must be a DTensor", lambda: attention(*heads, mask=torch.zeros(KEYS + 1)))
    refused("dropout_p must be 0 with DTensors", lambda: attention(*heads, dropout_p=0.1))
    partial = DTensor.from_local(q, mesh, [Partial()])
    refused("got placed (Partial(sum),)", lambda: attention(partial, *heads[1:]))
    odd = [on(x[:, :3], Shard(1)) for x in (q, k, v)]
    refused("number of heads must be a multiple of the 2 parts", lambda: attention(*odd))


if __name__ == "__main__":
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    GENERATOR = torch.Generator().manual_seed(0)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    world = init_device_mesh("cpu", (2,))
    for cases in (dense, packed, refusals):
        cases(world)
    dist.destroy_process_group()
    print("all cases")
