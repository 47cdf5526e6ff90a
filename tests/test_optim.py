"""bigkernel.optim.AdamW and Adam in torch's place. Which feature has which test:

constructor, groups, schedulers, closures  constructor_takes_torchs_arguments, trains_like_torch_*
state_dict both ways, dtypes kept          loads_torchs_state, torch_loads_our_state, state_keeps_*
max_grad_norm, master_weights, state_dtype max_grad_norm_*, master_weights_*, bf16_*
GradScaler, accelerate, DTensor and FSDP2  grad_scaler_*, accelerate, fully_shard_*
copies, pickles, hooks, late groups        copies_and_pickles, hooks, add_param_group_later
replaced tensors, swaps, memory            steps_after_*, swap_*, nothing_is_kept_alive_*
tensors as hyper-parameters                tensor_*, learning_rate_tensor_*
torch.compile                              step_compiles_whole_*, inside_a_compiled_training_loop
float8                                     float8_*
bad input                                  sparse_*, rejects_*, hyper_parameters_of_a_wrong_type_*
"""

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import bigkernel
from bigkernel.optim import Adam, AdamW

BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("one_thread", "no_fallback")
PAIRS = [(AdamW, torch.optim.AdamW), (Adam, torch.optim.Adam)]
IDS = ["adamw", "adam"]


def model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LayerNorm(288), nn.Linear(288, 5)).to(
        dtype
    )


def batch(i, dtype=torch.float32):
    g = torch.Generator().manual_seed(100 + i)
    return torch.randn(4, 3, 8, 8, generator=g).to(dtype)


def train(net, optimizer, steps, first=0, clip=None):
    dtype = next(net.parameters()).dtype
    for i in range(first, first + steps):
        optimizer.zero_grad()
        net(batch(i, dtype)).float().square().mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()


def assert_same_parameters(a, b, exact=False):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        if exact:
            assert torch.equal(x, y), name
        else:
            torch.testing.assert_close(
                x, y, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=IDS)
def test_constructor_takes_torchs_arguments(ours, theirs):
    mine = inspect.signature(ours).parameters
    for name, parameter in inspect.signature(theirs).parameters.items():
        assert mine[name].default == parameter.default, name
        assert mine[name].kind == parameter.kind, name
    net = model()
    for options in ({"foreach": True}, {"fused": True}, {"capturable": True}, {"fused": False}):
        ours(net.parameters(), 1e-3, (0.8, 0.99), 1e-7, 0.1, False, **options)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=IDS)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_trains_like_torch_with_groups_and_scheduler(ours, theirs, amsgrad, lr):
    nets, ends = [model(), model()], []
    for net, make, extra in zip(nets, (ours, theirs), ({}, {"foreach": False}), strict=True):
        rate = 1e-2 if lr == "number" else torch.tensor(1e-2)
        groups = [
            {"params": net[0].parameters(), "weight_decay": 0.0},
            {"params": net[2:].parameters(), "betas": (0.8, 0.95), "maximize": True, "lr": 1e-3},
        ]
        optimizer = make(groups, lr=rate, weight_decay=0.1, amsgrad=amsgrad, **extra)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for i in range(6):
            train(net, optimizer, 1, first=i)
            scheduler.step()
        ends.append(float(optimizer.param_groups[0]["lr"]))
    assert_same_parameters(*nets)
    assert ends[0] == pytest.approx(ends[1])


def test_trains_like_torch_with_one_cycle_and_closure():
    """OneCycleLR moves beta1 too; a closure's loss is passed on."""
    nets, losses = [model(), model()], []
    for net, make in zip(nets, (AdamW, torch.optim.AdamW), strict=True):
        optimizer = make(net.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=5)
        for i in range(5):

            def closure(optimizer=optimizer, net=net, i=i):
                optimizer.zero_grad()
                loss = net(batch(i)).square().mean()
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
            scheduler.step()
    assert_same_parameters(*nets)
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=IDS)
def test_loads_torchs_state(ours, theirs, fused):
    net = model()
    torchs = theirs(net.parameters(), lr=3e-3, weight_decay=0.2, amsgrad=True, fused=fused)
    train(net, torchs, 3)
    other = model()
    other.load_state_dict(net.state_dict())
    optimizer = ours(other.parameters())
    optimizer.load_state_dict(torchs.state_dict())
    assert optimizer.param_groups[0]["lr"] == 3e-3
    train(net, torchs, 3, first=3)
    train(other, optimizer, 3, first=3)
    assert_same_parameters(net, other)
    assert all(state["step"] == 6 for state in optimizer.state.values())


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=IDS)
def test_torch_loads_our_state(ours, theirs, masters):
    dtype = BF16 if masters else torch.float32
    net = model(dtype)
    optimizer = ours(net.parameters(), lr=3e-3, master_weights=masters, max_grad_norm=10.0)
    train(net, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = model(dtype)
    other.load_state_dict(net.state_dict())
    torchs = theirs(other.parameters(), foreach=False)
    torchs.load_state_dict(torch.load(file, weights_only=True))
    train(other, torchs, 2, first=3)
    assert all(state["step"] == 5 for state in torchs.state.values())
    if not masters:
        train(net, optimizer, 2, first=3)
        assert_same_parameters(net, other)


@pytest.mark.parametrize("state_dtype", [None, BF16])
def test_state_keeps_its_dtype_through_load_state_dict(state_dtype):
    """torch.optim would cast moments and masters to the parameter's dtype."""
    net, options = model(BF16), {"master_weights": True, "state_dtype": state_dtype}
    optimizer = AdamW(net.parameters(), amsgrad=True, **options)
    train(net, optimizer, 2)
    other = copy.deepcopy(net)
    again = AdamW(other.parameters(), amsgrad=True, **options)
    again.load_state_dict(optimizer.state_dict())
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert again.state[q][key].dtype == value.dtype
            assert torch.equal(again.state[q][key], value)
            assert again.state[q][key].data_ptr() != value.data_ptr()
        assert optimizer.state[p]["exp_avg"].dtype == (state_dtype or torch.float32)
    train(net, optimizer, 2, first=2)
    train(other, again, 2, first=2)
    assert_same_parameters(net, other, exact=True)


def test_loaded_moments_take_this_optimizers_dtype():
    """A torch checkpoint of a bf16 model has bf16 moments; here they are fp32 unless asked."""
    net = model(BF16)
    torchs = torch.optim.AdamW(net.parameters())
    train(net, torchs, 2)
    for dtype in (None, BF16):
        optimizer = AdamW(net.parameters(), state_dtype=dtype, master_weights=True)
        optimizer.load_state_dict(torchs.state_dict())
        train(net, optimizer, 1)
        for state in optimizer.state.values():
            assert state["exp_avg"].dtype == (dtype or torch.float32)
            assert state["master_param"].dtype == torch.float32


def test_masters_are_dropped_where_they_would_go_stale():
    net = model(BF16)
    with_masters = AdamW(net.parameters(), master_weights=True)
    train(net, with_masters, 2)
    without = AdamW(net.parameters())
    without.load_state_dict(with_masters.state_dict())
    assert not any("master_param" in state for state in without.state.values())
    train(net, without, 2)
    again = AdamW(net.parameters(), master_weights=True, lr=0.0, weight_decay=0.0)
    before = [p.detach().clone() for p in net.parameters()]
    state = without.state_dict()
    for group in state["param_groups"]:
        group.update(lr=0.0, weight_decay=0.0)
    again.load_state_dict(state)
    train(net, again, 1)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("ours", [True, False])
def test_adamw_stays_adamw_with_the_state_of_adam(ours):
    net = model()
    adam = (Adam if ours else torch.optim.Adam)(net.parameters())
    train(net, adam, 1)
    assert not adam.state_dict()["param_groups"][0]["decoupled_weight_decay"]
    optimizer = AdamW(net.parameters())
    optimizer.load_state_dict(adam.state_dict())
    assert all(group["decoupled_weight_decay"] for group in optimizer.param_groups)


def test_load_state_dict_runs_hooks_and_rejects_what_does_not_fit():
    net = model()
    optimizer = AdamW(net.parameters())
    train(net, optimizer, 1)
    saved, calls = optimizer.state_dict(), []
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("after"))
    optimizer.load_state_dict(saved)
    assert calls == ["before", "after"]
    with pytest.raises(ValueError, match="must be for groups of"):
        AdamW([next(net.parameters())]).load_state_dict(saved)
    reordered = list(net.parameters())[::-1]
    with pytest.raises(ValueError, match="of the parameter's shape"):
        AdamW(reordered).load_state_dict(saved)


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_max_grad_norm_clips_as_torch_does(limit):
    nets = [model(), model()]
    groups = [
        {"params": nets[0][0].parameters(), "lr": 1e-2},
        {"params": nets[0][2:].parameters(), "weight_decay": 0.1},
    ]
    other = [
        {"params": nets[1][0].parameters(), "lr": 1e-2},
        {"params": nets[1][2:].parameters(), "weight_decay": 0.1},
    ]
    optimizer = AdamW(groups, eps=1e-4, max_grad_norm=limit)
    assert optimizer.grad_norm is None
    train(nets[0], optimizer, 4)
    train(nets[1], torch.optim.AdamW(other, eps=1e-4), 4, clip=limit)
    assert_same_parameters(*nets)
    nets[0].zero_grad()
    nets[0](batch(9)).square().mean().backward()
    want = nn.utils.get_total_norm([p.grad for p in nets[0].parameters()])
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, want)


def test_max_grad_norm_skips_what_is_not_finite():
    net = model()
    optimizer = AdamW(net.parameters(), max_grad_norm=float("inf"))
    train(net, optimizer, 1)
    before, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict()["state"])
    net[0].weight.grad[0, 0, 0, 0] = float("nan")
    optimizer.step()
    assert optimizer.grad_norm.isnan()
    assert_same_parameters(net, before, exact=True)
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            assert torch.equal(value, state[number][key])


def test_master_weights_follow_an_fp32_model():
    """bf16 gradients into fp32 masters: the masters go where an fp32 model would."""
    net, wide = model(BF16), model(BF16).float()
    optimizer = AdamW(net.parameters(), lr=1e-4, master_weights=True)
    torchs = torch.optim.AdamW(wide.parameters(), lr=1e-4)
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        for p, q in zip(net.parameters(), wide.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=g).to(BF16)
            q.grad = p.grad.float()
        optimizer.step()
        torchs.step()
    for p, q in zip(net.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["master_param"], q.detach())
        assert torch.equal(p, optimizer.state[p]["master_param"].to(BF16))


def test_bf16_parameters_move_under_stochastic_rounding():
    """Updates of 1/40 ulp vanish when rounding to nearest and add up when rounding at random."""
    ends = {}
    for stochastic in (True, False):
        p = nn.Parameter(torch.ones(4096, dtype=BF16))
        optimizer = AdamW([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=stochastic)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[stochastic] = p.float().mean().item()
    assert ends[False] == 1.0
    assert ends[True] == pytest.approx(1 - 50 * 1e-4, abs=3e-4)


def test_bf16_rounding_is_reproducible_and_seeded():
    def run(seed):
        net = model(BF16)
        train(net, AdamW(net.parameters(), rounding_seed=seed), 3)
        return net

    assert_same_parameters(run(0), run(0), exact=True)
    assert not torch.equal(run(0)[0].weight, run(1)[0].weight)


def test_bf16_without_stochastic_rounding_is_torchs():
    """From the same fp32 moments, rounding to nearest."""
    net, other = model(BF16), model(BF16)
    train(net, AdamW(net.parameters(), stochastic_rounding=False), 1)
    train(other, torch.optim.AdamW(other.parameters()), 1)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2**-7, atol=1e-5)


def test_grad_scaler_unscales_and_skips_inside_the_step():
    nets = [model(), model()]
    optimizers = [AdamW(nets[0].parameters(), eps=1e-6), torch.optim.AdamW(nets[1].parameters())]
    optimizers[1].param_groups[0]["eps"] = 1e-6
    scales = []
    for net, optimizer in zip(nets, optimizers, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for i in range(6):
            optimizer.zero_grad()
            scaler.scale(net(batch(i)).square().mean()).backward()
            if i == 3:
                net[0].weight.grad[0] = float("inf")
            if i == 4:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
        assert not hasattr(optimizer, "found_inf")
    assert_same_parameters(*nets)
    assert scales[0] == scales[1]
    assert all(state["step"] == 5 for state in optimizers[0].state.values())


def test_grad_scaler_with_clipping():
    nets = [model(), model()]
    ours = AdamW(nets[0].parameters(), eps=1e-4, max_grad_norm=0.1)
    train(nets[1], torch.optim.AdamW(nets[1].parameters(), eps=1e-4), 3, clip=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for i in range(3):
        ours.zero_grad()
        scaler.scale(nets[0](batch(i)).square().mean()).backward()
        scaler.step(ours)
        scaler.update()
    assert_same_parameters(*nets)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net, other = model(), model()
    wrapped, optimizer = accelerator.prepare(net, AdamW(net.parameters()))
    for i in range(2):
        optimizer.zero_grad()
        accelerator.backward(wrapped(batch(i)).square().mean())
        optimizer.step()
    train(other, torch.optim.AdamW(other.parameters()), 2)
    assert_same_parameters(net, other)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("masters", [False, True])
def test_fully_shard_trains_and_clips(masters):
    """FSDP2: parameters are DTensors; the norm is combined over the mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dtype = BF16 if masters else torch.float32
    options = {"lr": 1e-2, "max_grad_norm": 0.5, "master_weights": masters, "eps": 1e-4}
    net, plain = model(dtype), model(dtype)
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    optimizer, want = AdamW(net.parameters(), **options), AdamW(plain.parameters(), **options)
    train(net, optimizer, 3)
    train(plain, want, 3)
    torch.testing.assert_close(optimizer.grad_norm, want.grad_norm)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert isinstance(p, DTensor)
        torch.testing.assert_close(p.full_tensor(), q)
        state = optimizer.state[p]
        assert isinstance(state["exp_avg"], DTensor)
        assert state["exp_avg"].dtype == torch.float32
    again = AdamW(net.parameters(), **options)
    again.load_state_dict(optimizer.state_dict())
    train(net, again, 1, first=3)
    train(plain, want, 1, first=3)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q)


@pytest.mark.usefixtures("one_rank")
def test_fully_shard_state_goes_through_distributed_checkpoint():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = model(BF16)
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    options = {"master_weights": True, "lr": 1e-2}
    optimizer = AdamW(net.parameters(), **options)
    train(net, optimizer, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    before = [p.full_tensor().clone() for p in net.parameters()]
    again = AdamW(net.parameters(), **options)
    set_optimizer_state_dict(net, again, saved)  # makes state by a step of lr 0
    for p, q in zip(net.parameters(), before, strict=True):
        assert torch.equal(p.full_tensor(), q)
        for key, value in optimizer.state[p].items():
            other = again.state[p][key]
            assert other.dtype == value.dtype
            assert torch.equal(getattr(other, "_local_tensor", other), _local(value)), key


def _local(t):
    return getattr(t, "_local_tensor", t)


@pytest.mark.usefixtures("one_rank")
def test_fully_shard_empty_shards_and_replicas():
    """DTensors by hand: an empty one, and one that is replicated rather than cut."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    torch.manual_seed(0)
    values = [torch.zeros(0, 3), torch.randn(4, 3), torch.randn(5), torch.randn(2)]
    grads = [torch.randn_like(v) for v in values]
    places = [[Shard(0)], [Shard(0)], [Replicate()], None]
    params = []
    for value, grad, place in zip(values, grads, places, strict=True):
        split = (lambda t: t.clone()) if place is None else None
        split = split or (lambda t, place=place: distribute_tensor(t.clone(), mesh, place))
        p = nn.Parameter(split(value))
        p.grad = split(grad)
        params.append(p)
    plain = [nn.Parameter(v.clone()) for v in values]
    for p, grad in zip(plain, grads, strict=True):
        p.grad = grad
    optimizer, want = (AdamW(x, max_grad_norm=0.5) for x in (params, plain))
    optimizer.step()
    want.step()
    torch.testing.assert_close(optimizer.grad_norm, want.grad_norm)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(_local(p.detach()), q.detach())


def test_copies_and_pickles():
    net = model()
    optimizer = AdamW(net.parameters(), max_grad_norm=1.0, state_dtype=BF16, rounding_seed=4)
    train(net, optimizer, 2)
    for twin in (
        copy.deepcopy((net, optimizer)),
        pickle.loads(pickle.dumps((net, optimizer))),
    ):
        other, again = twin
        assert again.max_grad_norm == 1.0
        assert again.state_dtype == BF16
        assert again.rounding_seed == 4
        train(other, again, 2, first=2)
        reference = copy.deepcopy((net, optimizer))
        train(*reference, 2, first=2)
        assert_same_parameters(other, reference[0], exact=True)
    assert "AdamW" in repr(optimizer)


def test_hooks():
    net, calls = model(), []
    optimizer = AdamW(net.parameters())
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda o, d: d | {"extra": 1})
    train(net, optimizer, 1)
    assert calls == ["before", "after"]
    assert optimizer.state_dict()["extra"] == 1


def test_add_param_group_later_and_parameters_without_gradient():
    nets = [model(), model()]
    for net, make in zip(nets, (AdamW, torch.optim.AdamW), strict=True):
        optimizer = make(net[3].parameters())
        train(net, optimizer, 2)
        optimizer.add_param_group({"params": net[0].parameters(), "lr": 1e-2})
        train(net, optimizer, 2, first=2)
        unused = nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [unused]})
        optimizer.step()
        assert unused not in optimizer.state
    assert_same_parameters(*nets)


def test_parameters_and_layouts_may_change_between_steps():
    """Nothing is remembered about memory: data may be replaced, or take another layout."""
    nets = [model(), model()]
    for net, make in zip(nets, (AdamW, torch.optim.AdamW), strict=True):
        optimizer = make(net.parameters(), amsgrad=True)
        train(net, optimizer, 2)
        net.to(memory_format=torch.channels_last)
        train(net, optimizer, 2, first=2)
        for p in net.parameters():
            p.data = p.data.clone()
        train(net, optimizer, 1, first=4)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(net, optimizer, 1, first=5)
    assert_same_parameters(*nets)


REPLACEMENTS = {
    "nothing": lambda net, optimizer: None,
    "a parameter's memory": lambda net, optimizer: setattr(
        net[3].weight, "data", net[3].weight.data.clone()
    ),
    "a parameter": lambda net, optimizer: _replace_parameter(net, optimizer),
    "an entry of the state": lambda net, optimizer: optimizer.state[net[0].bias].update(
        exp_avg=optimizer.state[net[0].bias]["exp_avg"].clone()
    ),
    "a state": lambda net, optimizer: optimizer.state.update(
        {net[0].bias: {k: v.clone() for k, v in optimizer.state[net[0].bias].items()}}
    ),
    "the memory of a moment": lambda net, optimizer: setattr(
        optimizer.state[net[3].bias]["exp_avg_sq"],
        "data",
        optimizer.state[net[3].bias]["exp_avg_sq"].clone(),
    ),
    "the step count": lambda net, optimizer: optimizer.state[net[3].bias].update(
        step=torch.tensor(40.0)
    ),
    "a gradient by none": lambda net, optimizer: setattr(net[0].bias, "requires_grad", False),
    "the layout": lambda net, optimizer: net.to(memory_format=torch.channels_last),
    "the learning rate": lambda net, optimizer: optimizer.param_groups[0].update(lr=3e-2),
    "amsgrad": lambda net, optimizer: optimizer.param_groups[0].update(amsgrad=True),
    "all by load_state_dict": lambda net, optimizer: optimizer.load_state_dict(
        copy.deepcopy(optimizer.state_dict())
    ),
}


def _replace_parameter(net, optimizer):
    new = nn.Parameter(net[3].bias.detach().clone())
    places = optimizer.param_groups[0]["params"]
    places[[p is net[3].bias for p in places].index(True)] = new
    optimizer.state[new] = optimizer.state.pop(net[3].bias)
    net[3].bias = new


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("what", REPLACEMENTS)
def test_steps_after_a_replacement_use_what_is_there(what, clip):
    """As torch's, which is handed clipped gradients."""
    nets = [model(), model()]
    optimizer = AdamW(nets[0].parameters(), lr=1e-2, eps=1e-4, max_grad_norm=clip)
    theirs = torch.optim.AdamW(nets[1].parameters(), lr=1e-2, eps=1e-4)
    for i in range(8):
        for net, used in zip(nets, (optimizer, theirs), strict=True):
            if i == 5:
                REPLACEMENTS[what](net, used)
                if what == "amsgrad" and used is theirs:  # which does not add what is missing
                    for state in used.state.values():
                        state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
            used.zero_grad()
            net(batch(i)).square().mean().backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(nets[1].parameters(), clip)
        optimizer.step()
        theirs.step()
        assert_same_parameters(*nets)
        if clip is not None:
            torch.testing.assert_close(optimizer.grad_norm, norm)


DROPS = {
    "load_state_dict": lambda optimizer, saved: optimizer.load_state_dict(saved),
    "state.clear()": lambda optimizer, saved: optimizer.state.clear(),
    "a removed parameter": lambda optimizer, saved: (
        optimizer.state.pop(optimizer.param_groups[0]["params"].pop(0)),
    ),
    "zero_grad": lambda optimizer, saved: optimizer.zero_grad(),
    "another entry": lambda optimizer, saved: next(iter(optimizer.state.values())).update(
        exp_avg=None
    ),
    "the optimizer": None,
}


@pytest.mark.parametrize("what", DROPS)
def test_nothing_is_kept_alive_between_steps(what):
    """What is dropped is freed there and then, without a garbage collection."""
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([p, q], max_grad_norm=1.0, amsgrad=True)
    for _ in range(4):
        for x in (p, q):
            x.grad = torch.ones_like(x)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    state = optimizer.state[p]
    dropped = {
        "zero_grad": [p.grad, q.grad],
        "another entry": [state["exp_avg"]],
    }.get(what, list(state.values()))
    if what == "a removed parameter":
        dropped += [p, p.grad]
    gone = [weakref.ref(t) for t in dropped]
    gc.disable()
    try:
        del state, dropped
        if what == "a removed parameter":
            del p, x
        if what == "the optimizer":
            del optimizer
        else:
            DROPS[what](optimizer, saved)
        assert [ref() for ref in gone] == [None] * len(gone)
    finally:
        gc.enable()


def _swap(net):
    for name, p in list(net[3].named_parameters()):
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 0.5))
        assert getattr(net[3], name) is p


@pytest.mark.parametrize(
    "swap",
    [
        _swap,
        lambda net: net.to(BF16),
        lambda net: net.double(),
        lambda net: net.load_state_dict(model(seed=1).state_dict()),
    ],
    ids=["swap_tensors", "bf16", "float64", "load_state_dict"],
)
def test_swap_of_parameters_between_steps(swap, monkeypatch):
    """Parameters that keep their identity and change what they hold, as with torch's AdamW."""
    monkeypatch.setenv("BIGKERNEL_STRICT", "0")  # float64 is served by PyTorch
    nets, dtypes = [model(), model()], []
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for net, make in zip(nets, (AdamW, torch.optim.AdamW), strict=True):
            # Gradients of another dtype than the parameter cannot stay: they go first.
            optimizer = make(net.parameters(), lr=1e-3)
            train(net, optimizer, 4)
            optimizer.zero_grad()
            swap(net)
            dtypes.append([p.dtype for p in net.parameters()])
            # The state keeps its dtype until it is loaded again, with torch's as with ours.
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            train(net, optimizer, 2, first=4)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert dtypes[0] == dtypes[1]
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        narrow = p.dtype == BF16
        torch.testing.assert_close(
            p, q, rtol=2**-6 if narrow else 1e-5, atol=4e-3 if narrow else 1e-6
        )


def test_complex_parameters():
    ends = []
    for make in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        optimizer = make([p, nn.Parameter(torch.zeros(2))])
        for _ in range(3):
            p.grad = torch.randn(6, dtype=torch.complex64)
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


def test_float64_runs_in_pytorch_aloud(monkeypatch):
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="float64 has no native kernel"):
        AdamW([p]).step()
    with bigkernel.use_backend("torch"):
        optimizer = AdamW([p], max_grad_norm=1.0)
        optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float64


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"must be dense, got torch.sparse_coo.*SparseAdam"):
        AdamW(embedding.parameters()).step()
    dense = nn.Embedding(5, 3)
    optimizer = AdamW(dense.parameters())
    for _ in range(2):
        dense.weight.grad = torch.ones(5, 3)
        optimizer.step()
    dense.weight.grad = torch.ones(5, 3).to_sparse()
    with pytest.raises(RuntimeError, match=r"must be dense, got torch.sparse_coo.*SparseAdam"):
        optimizer.step()


def test_empty_and_zero_size():
    net = nn.Linear(0, 3)
    optimizer = AdamW([*net.parameters(), nn.Parameter(torch.empty(0))], max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 0
    net(torch.zeros(2, 0)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": torch.ones(2)}, "lr must be a number or a tensor of one element"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be at least 0 and below 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be at least 0 and below 1"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"differentiable": True}, "differentiable must be False, got True. torch.optim's own"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, or None"),
        ({"state_dtype": torch.float16}, "state_dtype must be None, torch.float32 or"),
        ({"rounding_seed": 2**63}, "rounding_seed must be a signed 64-bit integer, got 9223"),
        ({"rounding_seed": 1.5}, "rounding_seed must be a signed 64-bit integer, got 1.5"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_rejects_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW(model().parameters(), **options)
    optimizer = AdamW([nn.Parameter(torch.ones(2))])
    own = {"differentiable", "max_grad_norm", "state_dtype", "rounding_seed"}
    if not own & set(options):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("setting", ["max_grad_norm", "master_weights", "rounding_seed"])
def test_settings_of_the_optimizer_are_refused_in_a_group(setting):
    """torch passes over unknown options of a group; these would seem to hold for it alone."""
    group = {"params": [nn.Parameter(torch.ones(2))], setting: 1}
    with pytest.raises(ValueError, match=f"{setting} of a group must be left out, got 1. Give it"):
        AdamW([group])
    optimizer = AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=f"{setting} of a group must be left out"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_any_rounding_seed_is_taken(seed):
    p = nn.Parameter(torch.ones(64, dtype=BF16))
    optimizer = AdamW([p], lr=1e-3, rounding_seed=seed)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert len(p.unique()) > 1


def test_another_optimizers_state_is_refused():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    other = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    other.step()
    with pytest.raises(ValueError, match=r"state of parameter 0 .* of an Adam, .*momentum_buffer"):
        AdamW([p]).load_state_dict(other.state_dict())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
def test_learning_rate_tensor_of_any_dtype(dtype):
    nets = [model(), model()]
    train(nets[0], AdamW(nets[0].parameters(), lr=torch.tensor(1, dtype=dtype)), 2)
    train(nets[1], AdamW(nets[1].parameters(), lr=torch.tensor(1.0, dtype=torch.float64)), 2)
    assert_same_parameters(*nets)


TENSORS = {
    "lr": lambda t: {"lr": t},
    "beta1": lambda t: {"betas": (t, torch.tensor(0.99, dtype=torch.float64))},
    "beta2": lambda t: {"betas": (torch.tensor([0.8], dtype=torch.float64), t)},
    "eps": lambda t: {"eps": t},
    "weight_decay": lambda t: {"weight_decay": t},
}


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_tensor_hyper_parameters_stay_tensors_and_are_followed(name, shape):
    """In the groups and the state dict they are what was given, and a change in place counts."""
    given = torch.full(shape, 0.5, dtype=torch.float64)
    nets = [model(), model()]
    optimizers = [
        AdamW(nets[0].parameters(), **TENSORS[name](given)),
        AdamW(nets[1].parameters(), **TENSORS[name](0.5)),
    ]

    def place(group):
        return group["betas"][int(name[-1]) - 1] if "beta" in name else group[name]

    assert place(optimizers[0].param_groups[0]) is given
    assert place(optimizers[0].state_dict()["param_groups"][0]) is given
    for i, value in enumerate((0.5, 0.5, 0.25)):
        given.fill_(value)
        optimizers[1].param_groups[0].update(TENSORS[name](value))
        for net, optimizer in zip(nets, optimizers, strict=True):
            train(net, optimizer, 1, first=i)
    assert_same_parameters(*nets, exact=True)
    again = AdamW(nets[0].parameters())
    again.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    loaded = place(again.param_groups[0])
    assert torch.equal(loaded, given)
    assert loaded is not given
    loaded.fill_(0.1)
    assert place(pickle.loads(pickle.dumps(again)).param_groups[0]) == 0.1


def test_tensor_betas_train_as_torchs():
    nets = [model(), model()]
    for net, make in zip(nets, (AdamW, torch.optim.AdamW), strict=True):
        betas = torch.tensor(0.8), torch.tensor(0.95)
        optimizer = make(net.parameters(), betas=betas, weight_decay=0.1)
        train(net, optimizer, 3)
    assert_same_parameters(*nets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "x"}, r"lr must be a number or a tensor of one element, got 'x' \(str\)"),
        ({"lr": None}, r"lr must be a number or a tensor of one element, got None"),
        ({"lr": [0.1]}, r"lr must be a number or a tensor of one element, got \[0.1\] \(list\)"),
        ({"lr": 1j}, r"lr must be a number .* got 1j \(complex\)"),
        ({"betas": "0.9,0.99"}, r"betas must be two numbers, got '0.9,0.99' \(str\)"),
        ({"betas": 0.9}, r"betas must be two numbers, got 0.9 \(float\)"),
        ({"betas": ("0.9", 0.99)}, r"betas\[0\] must be a number .* got '0.9' \(str\)"),
        ({"betas": (0.9, None)}, r"betas\[1\] must be a number .* got None"),
        ({"eps": "1e-8"}, r"eps must be a number .* got '1e-8'"),
        ({"weight_decay": None}, r"weight_decay must be a number .* got None"),
        ({"amsgrad": "no"}, r"amsgrad must be True or False, got 'no' \(str\)"),
        ({"maximize": None}, r"maximize must be True or False, got None"),
        ({"fused": "yes"}, r"fused must be True, False or None, got 'yes'"),
        ({"max_grad_norm": "1"}, r"max_grad_norm must be a number .* got '1' \(str\)"),
        ({"master_weights": "no"}, r"master_weights must be True or False, got 'no'"),
        ({"stochastic_rounding": 0.5}, r"stochastic_rounding must be True or False, got 0.5"),
    ],
    ids=str,
)
def test_hyper_parameters_of_a_wrong_type_are_named(options, message):
    """At construction, of a group, in a loaded state, and set in a group before a step."""
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(TypeError, match=f"bigkernel.optim.AdamW: {message}"):
        AdamW([p], **options)
    if options.keys() & {"max_grad_norm", "master_weights", "stochastic_rounding"}:
        return
    optimizer = AdamW([p])
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(optimizer.param_groups) == 1
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(options)
    with pytest.raises(TypeError, match=message):
        optimizer.load_state_dict(saved)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0].update(options)
    if not options.keys() & {"amsgrad", "maximize", "fused"}:
        with pytest.raises(TypeError, match=message):
            optimizer.step()
        assert torch.equal(p, before)


def test_a_meta_tensor_is_no_hyper_parameter():
    with pytest.raises(ValueError, match=r"lr must be .* got a meta tensor, without value"):
        AdamW([nn.Parameter(torch.ones(2))], lr=torch.tensor(0.1, device="meta"))


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_parameters_are_served_by_pytorch(dtype, masters, monkeypatch):
    """torch.optim cannot step them. Here as fp32 ones, rounded after each step; aloud."""
    p, wide = (nn.Parameter(torch.linspace(-2, 2, 64).to(t)) for t in (dtype, torch.float32))
    wide.data = p.detach().float()
    optimizer = AdamW([p], lr=0.1, master_weights=masters, max_grad_norm=4.0)
    p.grad = torch.ones(64).to(dtype)
    with pytest.raises(RuntimeError, match=r"float8_e.* has no native kernel"):
        optimizer.step()
    assert "float8" in bigkernel.explain("adam", p)
    monkeypatch.setenv("BIGKERNEL_STRICT", "0")
    theirs = torch.optim.AdamW([wide], lr=0.1)
    for i in range(4):
        grad = torch.cos(torch.arange(64) * (i + 1.0)).to(dtype)
        p.grad, wide.grad = grad, grad.float()
        optimizer.step()
        norm = nn.utils.clip_grad_norm_([wide], 4.0)
        theirs.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
        if not masters:
            wide.data = wide.detach().to(dtype).float()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    # A value beside a tie may be rounded to the other side.
    assert (p.float() != wide.detach().to(dtype).float()).sum() <= 1
    if masters:
        torch.testing.assert_close(optimizer.state[p]["master_param"], wide.detach())


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.int32])
def test_dtypes_that_cannot_be_stepped_are_refused_at_construction(dtype):
    p = nn.Parameter(torch.zeros(4, dtype=torch.uint8).view(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=r"params\[0\] of group 0 must be float32, .* got torch"):
        AdamW([p])


COMPILED = {
    "plain": (torch.float32, {}, None),
    "clipping": (torch.float32, {"max_grad_norm": 0.1, "amsgrad": True}, None),
    "masters": (BF16, {"master_weights": True, "max_grad_norm": 0.1}, None),
    "bf16": (BF16, {"state_dtype": BF16}, None),
    "lr tensor": (
        torch.float32,
        {"lr": torch.tensor(1e-2)},
        lambda o: o.param_groups[0]["lr"].fill_(1e-3),
    ),
    "another lr": (torch.float32, {}, lambda o: o.param_groups[0].update(lr=1e-2)),
    "loaded": (
        torch.float32,
        {"max_grad_norm": 1.0},
        lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    ),
    "cleared": (torch.float32, {}, lambda o: o.state.clear()),
    "another setting": (
        torch.float32,
        {"max_grad_norm": 1.0},
        lambda o: setattr(o, "max_grad_norm", 0.01),
    ),
    "scaled": (torch.float32, {}, lambda o: setattr(o, "grad_scale", torch.tensor(2.0))),
    "skipped": (torch.float32, {}, lambda o: setattr(o, "found_inf", torch.tensor(1.0))),
}


@pytest.mark.parametrize(
    ("case", "backend"), [(c, "aot_eager") for c in COMPILED] + [("masters", "inductor")]
)
def test_step_compiles_whole_and_equals_the_eager_one(case, backend):
    """Bit for bit, state and norm too, also after something changed between steps."""
    dtype, options, change = COMPILED[case]
    torch._dynamo.reset()
    nets = [model(dtype), model(dtype)]
    optimizers = [AdamW(net.parameters(), **copy.deepcopy(options)) for net in nets]
    steps = [torch.compile(optimizers[0].step, fullgraph=True, backend=backend), optimizers[1].step]
    for i in range(4):
        for net, optimizer, step in zip(nets, optimizers, steps, strict=True):
            if i == 2 and change is not None:
                change(optimizer)
            optimizer.zero_grad()
            net(batch(i, dtype)).float().square().mean().backward()
            step()
        assert_same_parameters(*nets, exact=True)
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            mine, wanted = optimizers[0].state[p], optimizers[1].state[q]
            assert mine.keys() == wanted.keys()
            for key in wanted:
                assert torch.equal(mine[key], wanted[key]), key
        assert optimizers[0].grad_norm == optimizers[1].grad_norm


def test_complex_parameters_and_a_compiled_step():
    """Left to the interpreter; with fullgraph=True refused in a sentence."""
    params = [[nn.Parameter(torch.ones(3, dtype=torch.complex64))] for _ in range(2)]
    optimizers = [AdamW(p, max_grad_norm=0.1) for p in params]
    steps = [torch.compile(optimizers[0].step, backend="aot_eager"), optimizers[1].step]
    for _ in range(3):
        for (p,), step in zip(params, steps, strict=True):
            p.grad = torch.full_like(p, 1 + 2j)
            step()
        assert torch.equal(params[0][0], params[1][0])
        assert optimizers[0].grad_norm == optimizers[1].grad_norm
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Compile without fullgraph"):
        torch.compile(optimizers[1].step, backend="aot_eager", fullgraph=True)()


def test_inside_a_compiled_training_loop():
    """The loop need not be one graph; everything that the step sets is there afterwards."""
    nets = [model(), model()]
    optimizers = [AdamW(net.parameters(), max_grad_norm=1.0) for net in nets]

    @torch.compile(backend="aot_eager")
    def compiled(x):
        optimizers[0].zero_grad()
        nets[0](x).square().mean().backward()
        optimizers[0].step()

    for i in range(2):
        compiled(batch(i))
    train(nets[1], optimizers[1], 2)
    assert_same_parameters(*nets)
    torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm)
