"""bigkernel.optim's AdamW and Muon over two processes (gloo, CPU) against one.

DDP: every rank holds all parameters. FSDP2 (fully_shard): every rank holds a piece of each, the
clipping norm is that of all pieces, and a gradient that is not finite on one rank skips the step on
all. Muon makes whole matrices orthogonal, however they are cut. The processes are started once;
each test reads what one check found.
"""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from bigkernel.optim import AdamW, Muon, muon_groups

WORLD = 2
STEPS = 3
pytestmark = pytest.mark.xdist_group("optimizers of two ranks")
LIMIT = 0.05  # below the gradients' norm, so that clipping has an effect in every step


def model() -> nn.Module:
    """Pieces of unequal size: 7 and 5 rows are cut 4 + 3 and 3 + 2, one row 1 + 0."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))


def batch(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(50 + step))


def my_part(step: int) -> Tensor:
    return batch(step).chunk(WORLD)[dist.get_rank()]


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def one_process(limit: float | None) -> tuple[nn.Module, list[Tensor]]:
    """The model after STEPS steps of torch's AdamW on whole batches, and the norm of each."""
    net, norms = model(), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        net(batch(step)).square().mean().backward()
        largest = torch.inf if limit is None else limit
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), largest))
        optimizer.step()
    return net, norms


def compare(wrapped: nn.Module, limit: float | None) -> None:
    expected, norms = one_process(limit)
    optimizer = AdamW(wrapped.parameters(), lr=1e-2, max_grad_norm=limit)
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(my_part(step)).square().mean().backward()
        optimizer.step()
        if limit is not None:
            torch.testing.assert_close(whole(optimizer.grad_norm), norms[step])
    for p, q in zip(wrapped.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach())


def sharded(dtype: torch.dtype = torch.float32) -> nn.Module:
    net = model().to(dtype)
    fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    if dist.get_rank() == 1:
        assert list(net.parameters())[-1].to_local().numel() == 0
    return net


def check_ddp() -> None:
    compare(nn.parallel.DistributedDataParallel(model()), None)


def check_ddp_clips() -> None:
    compare(nn.parallel.DistributedDataParallel(model()), LIMIT)


def check_fsdp() -> None:
    compare(sharded(), None)


def check_fsdp_clips() -> None:
    compare(sharded(), LIMIT)


def check_replicas_of_shards() -> None:
    """A mesh of two dimensions: replicas along one, pieces along the other."""
    for shape in ((2, 1), (1, 2)):
        net = model()
        fully_shard(net, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("copy", "cut")))
        compare(net, LIMIT)


def assert_skips_what_one_rank_has(net, optimizer) -> None:
    """A gradient that is infinite on the first rank alone: none of them makes the step."""
    before = [p.to_local().clone() for p in net.parameters()]
    if dist.get_rank() == 0:
        next(net.parameters()).grad.to_local()[0, 0] = torch.inf
    optimizer.step()
    assert not whole(optimizer.grad_norm).isfinite()
    for p, q in zip(net.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), q)


def check_one_rank_is_not_finite() -> None:
    net = sharded()
    optimizer = AdamW(net.parameters(), max_grad_norm=1.0)
    net(my_part(0)).square().mean().backward()
    assert_skips_what_one_rank_has(net, optimizer)


def check_bf16_masters() -> None:
    """bf16 parameters with fp32 masters: pieces are those of one process."""
    plain, net = model().to(torch.bfloat16), sharded(torch.bfloat16)
    options = {"lr": 1e-2, "master_weights": True, "max_grad_norm": LIMIT}
    ours, theirs = AdamW(net.parameters(), **options), AdamW(plain.parameters(), **options)
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
                 for p in plain.parameters()]  # fmt: skip
    for p, q, gradient in zip(net.parameters(), plain.parameters(), gradients, strict=True):
        q.grad = gradient
        rows = gradient.chunk(WORLD)
        mine = rows[dist.get_rank()] if len(rows) > dist.get_rank() else gradient[:0]
        p.grad = DTensor.from_local(
            mine.contiguous(), p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
        )
    ours.step()
    theirs.step()
    torch.testing.assert_close(whole(ours.grad_norm), theirs.grad_norm)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(whole(p), q.detach())


def check_complex_pieces() -> None:
    mesh, rank = init_device_mesh("cpu", (WORLD,)), dist.get_rank()
    generator = torch.Generator().manual_seed(4)
    value, gradient = (torch.randn(5, 3, dtype=torch.complex64, generator=generator) for _ in "pg")
    pieces = [DTensor.from_local(t.chunk(WORLD)[rank].clone(), mesh, [Shard(0)], shape=t.shape,
                                 stride=t.stride()) for t in (value, gradient)]  # fmt: skip
    p, q = nn.Parameter(pieces[0]), nn.Parameter(value.clone())
    p.grad, q.grad = pieces[1], gradient
    ours, theirs = (AdamW([x], max_grad_norm=LIMIT) for x in (p, q))
    ours.step()
    theirs.step()
    torch.testing.assert_close(whole(ours.grad_norm), theirs.grad_norm)
    torch.testing.assert_close(p.to_local().detach(), q.detach().chunk(WORLD)[rank])


def cut_gradients(net: nn.Module, plain: nn.Module, step: int) -> None:
    """The same gradients for both, cut as the parameters are."""
    generator = torch.Generator().manual_seed(step)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        q.grad = torch.randn(q.shape, generator=generator).to(q.dtype)
        p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements, src_data_rank=None)


def compare_muon(dtype: torch.dtype, options: dict[str, Any]) -> None:
    plain, net = model().to(dtype), sharded(dtype)
    groups = {"head": "4", "muon": {"lr": 0.02}}
    ours = Muon(muon_groups(net, **groups), **options)
    wanted = Muon(muon_groups(plain, **groups), **options)
    for step in range(STEPS):
        cut_gradients(net, plain, step)
        ours.step()
        wanted.step()
    if "max_grad_norm" in options:
        torch.testing.assert_close(whole(ours.grad_norm), wanted.grad_norm)
        assert wanted.grad_norm > options["max_grad_norm"]
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        for t, other in [
            (p, q),
            *((ours.state[p][k], wanted.state[q][k]) for k in wanted.state[q]),
        ]:
            if "max_grad_norm" in options:  # a norm is summed in another order
                torch.testing.assert_close(whole(t), other.detach())
            else:
                assert torch.equal(whole(t), other.detach())
    again = Muon(muon_groups(net, **groups), **options)
    again.load_state_dict(ours.state_dict())
    cut_gradients(net, plain, STEPS)
    again.step()
    wanted.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach())


def check_muon_fsdp() -> None:
    compare_muon(torch.float32, {})


def check_muon_fsdp_clips() -> None:
    compare_muon(torch.float32, {"max_grad_norm": LIMIT, "ns_dtype": torch.float32})


def check_muon_bf16_masters() -> None:
    compare_muon(torch.bfloat16, {"master_weights": True})


def check_muon_however_cut() -> None:
    """By rows, by columns, not at all, and experts, of which a rank may hold whole ones."""
    mesh = init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(0)
    for shape, where in (
        *(((5, 4), Shard(0)), ((5, 4), Shard(1)), ((5, 4), Replicate()), ((1, 6), Shard(0))),
        *(((3, 5, 4), Shard(0)), ((3, 5, 4), Shard(1)), ((1, 5, 4), Shard(0))),
    ):
        values, grads = (torch.randn(shape, generator=generator) for _ in "pg")
        p = nn.Parameter(distribute_tensor(values, mesh, [where], src_data_rank=None))
        q = nn.Parameter(values.clone())
        q.grad = grads
        p.grad = distribute_tensor(grads, mesh, [where], src_data_rank=None)
        for x in (p, q):
            Muon([x], lr=0.1, ns_dtype=torch.float32).step()
        torch.testing.assert_close(whole(p), q.detach())
        assert p.placements == (where,)


def check_muon_one_rank_is_not_finite() -> None:
    net, plain = sharded(), model()
    optimizer = Muon(muon_groups(net, head="4"), max_grad_norm=1.0)
    cut_gradients(net, plain, 0)
    assert_skips_what_one_rank_has(net, optimizer)


def check_one_number_is_sent() -> None:
    """The norm of all pieces of all groups: one reduction of one number in a step."""
    net, sent, reduce = sharded(), [], dist.all_reduce
    groups = [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(net.parameters())]
    optimizer = AdamW(groups, max_grad_norm=LIMIT)
    net(my_part(0)).square().mean().backward()

    def note(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = note
    try:
        optimizer.step()
    finally:
        dist.all_reduce = reduce
    assert sent == [1]


def check_a_step_of_nothing() -> None:
    """Zero gradients and a learning rate of 0, as torch makes state with: nothing changes."""
    for dtype in (torch.float32, torch.bfloat16):
        net = sharded(dtype)
        groups = muon_groups(net, head="4")
        for optimizer in (
            AdamW(net.parameters(), weight_decay=0.1, max_grad_norm=LIMIT),
            Muon(groups, weight_decay=0.1, max_grad_norm=LIMIT),
        ):
            before = [p.to_local().clone() for p in net.parameters()]
            state = get_optimizer_state_dict(net, optimizer)["state"]
            assert len(state) == len(before)
            for p, q in zip(net.parameters(), before, strict=True):
                assert torch.equal(p.to_local(), q)


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def run_checks(rank: int, folder: str) -> None:
    os.environ["BIGKERNEL_STRICT"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    for name, check in CHECKS.items():
        found = "passed"
        try:
            check()
        except Exception:
            found = traceback.format_exc()
        Path(folder, f"{name}-{rank}").write_text(found)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_checks, (str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks_are_one(findings: Path, name: str) -> None:
    for rank in range(WORLD):
        assert (findings / f"{name}-{rank}").read_text() == "passed", f"on rank {rank}"
