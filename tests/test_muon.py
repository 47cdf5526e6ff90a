"""bigkernel.optim.Muon in torch's place, and its AdamW groups. Which feature has which test:

constructor, scalings, batches of a shape   constructor_takes_*, steps_are_torchs, *_as_accurate_*
rows of matrices in three dimensions        experts_*
AdamW in the same step and state dict       other_groups_are_adamws, resumes_bit_for_bit
state_dict both ways                        loads_torchs_state, torch_loads_our_state, *_refused
max_grad_norm, GradScaler, master_weights   max_grad_norm_*, grad_scaler_*, master_*
which parameters are Muon's                 *_groups_*, head_*, layout_*
copies, compile, late groups, empty         copies_*, compiled_*, late_*, nothing_to_do
bad input                                   bad_*, what_is_no_matrix_*, a_group_of_the_other_kind_*
Several ranks: tests/test_optim_ranks.py.
"""

import copy
import inspect
import io
import pickle

import pytest
import torch
import transformers
from families import FAMILIES
from torch import nn

import bigkernel.optim.muon as module
from bigkernel.backend import use_backend
from bigkernel.ops.newton_schulz import reference
from bigkernel.optim import AdamW, Muon, muon_groups
from bigkernel.testing.tolerance import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread", "no_fallback")
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SCALINGS = [None, "original", "match_rms_adamw", "spectral_unclamped"]
# Wide, tall, square, and pairs of one shape, which are multiplied together.
SHAPES = [(24, 40), (40, 24), (24, 40), (16, 16), (16, 16), (1, 8), (8, 1), (24, 40)]


@pytest.fixture
def on_torch():
    """Products are torch's, and so are their bits; our kernel's are as accurate."""
    with use_backend("torch"):
        yield


def weights(shapes=SHAPES, dtype=F32):
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]


def gradients(params, step):
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=g).to(p.dtype) for p in params]


def steps(optimizer, params, count, first=0):
    for step in range(first, first + count):
        for p, grad in zip(params, gradients(params, step), strict=True):
            p.grad = grad
        optimizer.step()
        for p, grad in zip(params, gradients(params, step), strict=True):
            assert torch.equal(p.grad, grad), "a gradient was modified"


def by_definition(params, count, dtype, *, lr=1e-3, decay=0.1, momentum=0.95, nesterov=True,
                  scaling=None, transposed=False):  # fmt: skip
    """The parameters after some steps, one matrix after the other in `dtype`."""
    out = [p.detach().to(dtype) for p in params]
    buffers = [torch.zeros_like(p) for p in out]
    a, b, c = 3.4445, -4.775, 2.0315
    for step in range(count):
        grads = [g.to(dtype) for g in gradients(params, step)]
        for p, buffer, grad in zip(out, buffers, grads, strict=True):
            buffer.mul_(momentum).add_(grad, alpha=1 - momentum)
            x = (1 - momentum) * grad + momentum * buffer if nesterov else buffer
            x = x / x.square().sum((-2, -1), keepdim=True).sqrt()
            for _ in range(5):
                gram = x @ x.mT
                x = a * x + (b * gram + c * gram @ gram) @ x
            rows, columns = p.shape[-2:][:: -1 if transposed else 1]
            scale = {
                "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
                "spectral_unclamped": (rows / columns) ** 0.5,
            }.get(scaling, max(1, rows / columns) ** 0.5)
            p.mul_(1 - lr * decay).sub_(lr * scale * x)
    return out


def test_constructor_takes_torchs_arguments():
    mine = inspect.signature(Muon).parameters
    for name, parameter in inspect.signature(torch.optim.Muon).parameters.items():
        assert mine[name].default == pytest.approx(parameter.default), name
        assert mine[name].kind == parameter.kind, name


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_steps_are_torchs(scaling, nesterov):
    """In bfloat16, in batches: at most twice torch's own error from float64."""
    options = {"lr": 0.02, "nesterov": nesterov, "adjust_lr_fn": scaling}
    mine, theirs = weights(), weights()
    steps(Muon(mine, ns_dtype=BF16, **options), mine, 3)
    steps(torch.optim.Muon(theirs, **options), theirs, 3)
    exact = by_definition(weights(), 3, F64, lr=0.02, nesterov=nesterov, scaling=scaling)
    for p, want, other in zip(mine, exact, theirs, strict=True):
        assert_as_accurate(p.detach(), want, other.detach())
        assert not torch.equal(p, want.float())  # float64 does not come out by chance


@pytest.mark.usefixtures("on_torch")
def test_one_matrix_of_a_shape_is_torchs_bit_for_bit():
    shapes = [(24, 40), (40, 24), (16, 16), (3, 50), (50, 3)]
    mine, theirs = weights(shapes), weights(shapes)
    steps(Muon(mine, lr=0.02, ns_dtype=BF16), mine, 4)
    steps(torch.optim.Muon(theirs, lr=0.02), theirs, 4)
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("most", [1, 1000, 1 << 18])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_float32_is_as_accurate_as_one_by_one(scaling, most, backend, monkeypatch):
    monkeypatch.setattr(module, "_MOST_ELEMENTS", most)
    monkeypatch.setattr(reference, "_MOST_ON_CPU", most)
    mine = weights()
    with use_backend(backend):
        steps(Muon(mine, lr=0.02, ns_dtype=F32, adjust_lr_fn=scaling), mine, 3)
    exact = by_definition(weights(), 3, F64, lr=0.02, scaling=scaling)
    plain = by_definition(weights(), 3, F32, lr=0.02, scaling=scaling)
    for p, want, other in zip(mine, exact, plain, strict=True):
        assert_as_accurate(p.detach(), want, other)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_made_orthogonal_one_by_one(transposed):
    """A row of matrices beside single ones of the same shape, and stored the other way."""
    shapes = [(5, 12, 20), (12, 20), (3, 12, 20), (2, 20, 12)]
    options = {"lr": 0.02, "transposed": transposed}
    mine = weights(shapes)
    steps(Muon(mine, ns_dtype=F32, **options), mine, 3)
    exact = by_definition(weights(shapes), 3, F64, **options)
    plain = by_definition(weights(shapes), 3, F32, **options)
    for p, want, other in zip(mine, exact, plain, strict=True):
        assert_as_accurate(p.detach(), want, other)


@pytest.mark.usefixtures("on_torch")
def test_trains_as_torchs_with_groups_schedulers_and_closure():
    """OneCycleLR moves the momentum too."""
    losses, ends = [], []
    for make, extra in ((Muon, {"ns_dtype": BF16}), (torch.optim.Muon, {})):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 20, False), nn.Tanh(), nn.Linear(20, 7, False))
        groups = [
            {"params": [net[0].weight], "lr": 0.05, "ns_steps": 3},
            {"params": [net[2].weight], "nesterov": False, "weight_decay": 0.0},
        ]
        optimizer = make(groups, lr=0.01, momentum=0.9, **extra)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)
        x = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))

        def closure(optimizer=optimizer, net=net, x=x):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        for _ in range(6):
            losses.append(optimizer.step(closure).item())
            scheduler.step()
        ends.append([p.detach() for p in net.parameters()])
    assert losses[:6] == losses[6:]
    assert all(map(torch.equal, *ends))


def test_lr_may_be_a_tensor_that_is_followed():
    mine, others = weights(), weights()
    lr = torch.tensor(0.02, dtype=F64)
    tensor, number = Muon(mine, lr=lr), Muon(others, lr=0.02)
    for i, value in enumerate((0.02, 0.005)):
        lr.fill_(value)
        number.param_groups[0]["lr"] = value
        steps(tensor, mine, 1, first=i)
        steps(number, others, 1, first=i)
    assert all(map(torch.equal, mine, others))
    assert tensor.param_groups[0]["lr"] is lr


def test_momentum_of_bf16_parameters_without_nesterov():
    """It is what it is by definition: torch 2.14 divides it by its norm in place."""
    params = weights(dtype=BF16)
    optimizer = Muon(params, nesterov=False, ns_dtype=BF16)
    steps(optimizer, params, 2)
    for p, first, second in zip(params, *(gradients(params, i) for i in (0, 1)), strict=True):
        exact = 0.95 * 0.05 * first.double() + 0.05 * second.double()
        plain = torch.zeros_like(first).lerp_(first, 0.05).lerp_(second, 0.05)
        assert_as_accurate(optimizer.state[p]["momentum_buffer"], exact, plain)


def mixed(dtype=F32):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Embedding(11, 8), nn.Linear(8, 12), nn.LayerNorm(12), nn.GELU()),
        *(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 11)),
    ).to(dtype)


def train(net, optimizer, count, first=0, scale=1.0):
    for i in range(first, first + count):
        optimizer.zero_grad()
        tokens = torch.arange(i, i + 9) % 11
        loss = nn.functional.cross_entropy(net(tokens).float(), (tokens + 1) % 11)
        (scale * loss).backward()
        optimizer.step()
    return loss.item()


def test_other_groups_are_adamws():
    """A step of both kinds is the step of either, with options of its own."""
    net = mixed()
    groups = muon_groups(net, head="6", adamw={"lr": 3e-3, "betas": (0.8, 0.95), "amsgrad": True})
    optimizer = Muon(groups, lr=0.02, weight_decay=0.2)
    other = copy.deepcopy(net)
    theirs = muon_groups(other, head="6", adamw={"lr": 3e-3, "betas": (0.8, 0.95)})
    for group in theirs:
        group.setdefault("weight_decay", 0.2)
    wanted = AdamW([{**g, "amsgrad": True} for g in theirs if not g.pop("use_muon")])
    alone = Muon([g for g in theirs if "transposed" in g], lr=0.02)
    for i in range(4):
        train(net, optimizer, 1, first=i)
        for p, q in zip(other.parameters(), net.parameters(), strict=True):
            p.grad = q.grad.clone()
        wanted.step()
        alone.step()
        for (name, p), q in zip(other.named_parameters(), net.parameters(), strict=True):
            assert torch.equal(p, q), name
    kinds = {frozenset(state) for state in optimizer.state_dict()["state"].values()}
    moments = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
    assert kinds == {frozenset({"momentum_buffer"}), moments}
    assert train(net, optimizer, 60) < 0.5


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_resumes_bit_for_bit(dtype, tmp_path):
    def make(net):
        groups = muon_groups(net, head="6", muon={"lr": 0.02})
        return Muon(groups, lr=1e-3, max_grad_norm=0.5, master_weights=dtype == BF16)

    net = mixed(dtype)
    optimizer = make(net)
    train(net, optimizer, 3)
    torch.save((net.state_dict(), optimizer.state_dict()), tmp_path / "saved")
    train(net, optimizer, 3, first=3)
    weights, state = torch.load(tmp_path / "saved", weights_only=True)
    other = mixed(dtype)
    other.load_state_dict(weights)
    again = make(other)
    again.load_state_dict(state)
    train(other, again, 3, first=3)
    assert torch.equal(optimizer.grad_norm, again.grad_norm)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, again.state[q][key]), key
            assert value.dtype == again.state[q][key].dtype


@pytest.mark.usefixtures("on_torch")
def test_loads_torchs_state_and_torch_loads_ours():
    shapes = [(24, 40), (16, 16), (9, 4)]
    for ours_first in (True, False):
        params, others = weights(shapes), weights(shapes)
        makes = [lambda p: Muon(p, lr=0.02, ns_dtype=BF16), lambda p: torch.optim.Muon(p, lr=0.01)]
        first, second = makes if ours_first else makes[::-1]
        optimizer = first(params)
        steps(optimizer, params, 2)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again = second(others)
        again.load_state_dict(torch.load(file, weights_only=True))
        for p, q in zip(params, others, strict=True):
            q.data.copy_(p)
        assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        steps(optimizer, params, 2, first=2)
        steps(again, others, 2, first=2)
        assert all(map(torch.equal, params, others))


def test_state_of_another_kind_is_refused():
    params = weights([(4, 4), (4, 6)])
    adam = torch.optim.AdamW(params)
    steps(adam, params, 1)
    muon = Muon(params)
    with pytest.raises(ValueError, match=r"state of parameter 0 .* of Muon, with momentum_buffer"):
        muon.load_state_dict(adam.state_dict())
    other = Muon([{"params": params, "use_muon": False}])
    fix = "of AdamW, got of Muon. build the optimizer with the groups"
    with pytest.raises(ValueError, match=fix):
        other.load_state_dict(muon.state_dict())
    steps(muon, params, 1)
    with pytest.raises(ValueError, match=r"momentum_buffer.*parameter's shape"):
        Muon(params[::-1]).load_state_dict(muon.state_dict())
    saved = muon.state_dict()
    saved["param_groups"][0]["ns_steps"] = 0.5
    with pytest.raises(ValueError, match="ns_steps must be a whole number"):
        muon.load_state_dict(saved)


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_max_grad_norm_clips_all_groups_together(limit):
    nets = [mixed(), mixed()]
    groups = [muon_groups(net, head="6", adamw={"eps": 1e-4}) for net in nets]
    clipping = Muon(groups[0], lr=0.02, ns_dtype=F32, max_grad_norm=limit)
    plain = Muon(groups[1], lr=0.02, ns_dtype=F32)
    scales = [1.0, 50.0, 1.0]  # by which the momentum can tell whether it was clipped
    for i, scale in enumerate(scales):
        train(nets[0], clipping, 1, first=i, scale=scale)
        step, plain.step = plain.step, lambda: None
        train(nets[1], plain, 1, first=i, scale=scale)
        plain.step = step
        norm = nn.utils.clip_grad_norm_(nets[1].parameters(), limit)
        plain.step()
        torch.testing.assert_close(clipping.grad_norm, norm)
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        for key, value in clipping.state[p].items():
            torch.testing.assert_close(value, plain.state[q][key], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("where", ["0.weight", "4.weight"])
def test_a_norm_that_is_not_finite_skips_the_step(where):
    net = mixed()
    optimizer = Muon(muon_groups(net, head="6"), max_grad_norm=float("inf"))
    train(net, optimizer, 2)
    before, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict()["state"])
    net.get_parameter(where).grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.grad_norm.isnan()
    assert all(map(torch.equal, net.parameters(), before.parameters()))
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            assert torch.equal(value, state[number][key])
    train(net, optimizer, 1)
    assert all(p.isfinite().all() for p in net.parameters())


def test_grad_scaler_unscales_and_skips_inside_the_step():
    """By powers of two, which change nothing; and as torch's, which the scaler unscales for."""
    nets = [mixed(), mixed()]
    optimizers = [Muon(muon_groups(net, head="6"), lr=0.02) for net in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(5):
        if i != 2:
            train(nets[1], optimizers[1], 1, first=i)
        optimizers[0].zero_grad()
        tokens = torch.arange(i, i + 9) % 11
        loss = nn.functional.cross_entropy(nets[0](tokens), (tokens + 1) % 11)
        scaler.scale(loss).backward()
        if i == 2:
            nets[0][4].weight.grad[0] = float("inf")
        scaler.step(optimizers[0])
        scaler.update()
    assert scaler.get_scale() == 512.0
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_master_weights_follow_an_fp32_model(dtype):
    narrow = weights(dtype=dtype)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    optimizer = Muon(narrow, lr=1e-4, ns_dtype=F32, master_weights=True)
    other = Muon(wide, lr=1e-4, ns_dtype=F32)
    for step in range(5):
        for p, q, grad in zip(narrow, wide, gradients(narrow, step), strict=True):
            p.grad, q.grad = grad, grad.float()
        optimizer.step()
        other.step()
    for p, q in zip(narrow, wide, strict=True):
        assert torch.equal(optimizer.state[p]["master_param"], q)
        assert torch.equal(p, q.to(dtype))
        assert optimizer.state[p]["momentum_buffer"].dtype == F32
    without = Muon(narrow, ns_dtype=F32)
    without.load_state_dict(optimizer.state_dict())
    assert {frozenset(state) for state in without.state.values()} == {
        frozenset(["momentum_buffer"])
    }
    assert without.state[narrow[0]]["momentum_buffer"].dtype == dtype


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F64])
def test_other_dtypes_are_torchs(dtype):
    shapes = [(24, 40), (16, 16)]
    mine, theirs = weights(shapes, dtype), weights(shapes, dtype)
    with use_backend("torch"):
        steps(Muon(mine, lr=0.02, ns_dtype=BF16), mine, 3)
    steps(torch.optim.Muon(theirs, lr=0.02), theirs, 3)
    assert all(map(torch.equal, mine, theirs))
    if dtype != F64:  # which has no native kernel
        native = weights(shapes, dtype)
        steps(Muon(native, lr=0.02, ns_dtype=BF16), native, 3)
        exact = by_definition(weights(shapes, dtype), 3, F64, lr=0.02)
        for p, want, other in zip(native, exact, theirs, strict=True):
            assert_as_accurate(p.detach(), want, other.detach())


@pytest.mark.parametrize(("fast", "dtype"), [(True, BF16), (False, F32)])
def test_the_dtype_of_the_products_is_chosen_once_and_saved(fast, dtype, monkeypatch):
    monkeypatch.setattr("bigkernel.precision.multiplies", lambda device, dtype: fast)
    params = weights()
    optimizer = Muon(params)
    assert optimizer.param_groups[0]["ns_dtype"] is None
    steps(optimizer, params, 1)
    assert optimizer.param_groups[0]["ns_dtype"] == dtype
    monkeypatch.setattr("bigkernel.precision.multiplies", lambda device, dtype: not fast)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    again = Muon(others)
    again.load_state_dict(optimizer.state_dict())
    steps(optimizer, params, 1, first=1)
    steps(again, others, 1, first=1)
    assert all(map(torch.equal, params, others))


def test_copies_and_pickles_go_on_alike():
    net = mixed()
    optimizer = Muon(muon_groups(net, head="6"), max_grad_norm=0.1)
    train(net, optimizer, 2)
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        other, again = duplicate((net, optimizer))
        assert repr(again) == repr(optimizer)
        here = copy.deepcopy((net, optimizer))
        train(*here, 2, first=2)
        train(other, again, 2, first=2)
        assert all(map(torch.equal, here[0].parameters(), other.parameters()))


def test_compiled_step_is_the_eager_one():
    torch._dynamo.reset()
    nets = [mixed(), mixed()]
    made = [Muon(muon_groups(net, head="6"), max_grad_norm=0.1) for net in nets]
    train(nets[0], made[0], 3)
    step = torch.compile(made[1].step, backend="aot_eager")
    for i in range(3):
        made[1].zero_grad()
        tokens = torch.arange(i, i + 9) % 11
        nn.functional.cross_entropy(nets[1](tokens), (tokens + 1) % 11).backward()
        step()
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
    assert torch.equal(made[0].grad_norm, made[1].grad_norm)


def test_late_groups_and_hooks():
    params = weights([(4, 6), (6, 4), (5,)])
    optimizer, calls = Muon(params[:1]), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    steps(optimizer, params[:1], 1)
    optimizer.add_param_group({"params": params[1:2], "lr": 0.5, "momentum": 0.0})
    optimizer.add_param_group({"params": params[2:], "use_muon": False, "eps": 1e-3})
    before = [p.detach().clone() for p in params]
    steps(optimizer, params, 1, first=1)
    assert calls == ["before", "after"] * 2
    assert not any(map(torch.equal, params, before))
    assert [group["eps"] for group in optimizer.param_groups] == [1e-7, 1e-7, 1e-3]
    assert "momentum" not in optimizer.param_groups[2]


def test_nothing_to_do():
    params = [*weights([(0, 3), (3, 0), (2, 0, 3), (0, 2, 2), (4, 4)])]
    optimizer = Muon(params, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 0
    before = params[-1].detach().clone()
    for p in params[:-1]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(params[-1], before)
    params[-1].grad = torch.zeros(4, 4)
    optimizer.step()  # a gradient of zeros: decay alone
    torch.testing.assert_close(params[-1].detach(), before * (1 - 1e-4))
    with pytest.raises(ValueError, match="empty parameter list"):
        Muon([])


# Which parameters are whose


def family(name):
    model, config, options = FAMILIES[name]
    return getattr(transformers, model)(getattr(transformers, config)(**options))


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_of_a_family_hold_every_parameter_once(name):
    """Matrices between the layers are Muon's; embeddings, head and vectors never are."""
    model = family(name)
    groups = muon_groups(model)
    held = [p for group in groups for _, p in group["params"]]
    assert len(held) == len(set(map(id, held)))
    assert set(map(id, held)) == set(map(id, model.parameters()))
    kept = set(map(id, model.get_input_embeddings().parameters()))
    for embedding in [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.Conv2d))]:
        kept |= set(map(id, embedding.parameters()))
    head = model.get_output_embeddings() or getattr(model, "classifier", None)
    kept |= set(map(id, head.parameters())) if head is not None else set()
    muon = [(n, p) for group in groups if group["use_muon"] for n, p in group["params"]]
    assert len(muon) >= 8
    for n, p in muon:
        assert p.ndim == 2 or "experts" in n, n
        assert id(p) not in kept, n
    others = [n for group in groups if not group["use_muon"] for n, p in group["params"]
              if p.ndim >= 2 and id(p) not in kept]  # fmt: skip
    known = ("position", "token", "transform", "head.", "bias", "router", "gate.weight")
    assert all(any(word in n for word in known) for n in others), others
    for group in groups:
        assert {p.ndim < 2 for _, p in group["params"]} == {group.get("weight_decay") == 0.0}


def test_groups_of_stored_the_other_way_scale_as_if_they_were_not():
    """transformers' Conv1D holds [in, out], and so do gpt_oss's experts."""
    transposed = {
        n for g in muon_groups(family("gpt2")) if g.get("transposed") for n, _ in g["params"]
    }
    assert len(transposed) == 8
    groups = muon_groups(family("gpt_oss"))
    assert [g["transposed"] for g in groups if g["use_muon"]] == [False, True]
    p = weights([(8, 24)])[0]
    q = nn.Parameter(p.detach().mT.clone())
    p.grad, q.grad = torch.ones(8, 24), torch.ones(24, 8)
    Muon([{"params": [p], "transposed": True}], ns_dtype=F32).step()
    Muon([q], ns_dtype=F32).step()
    torch.testing.assert_close(p.mT, q)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_layout_that_is_not_known_is_refused_where_it_matters(scaling):
    groups = muon_groups(family("llama4"))
    assert {g["transposed"] for g in groups if g["use_muon"]} == {False, None}
    if scaling == "match_rms_adamw":
        Muon(groups, adjust_lr_fn=scaling)
        return
    with pytest.raises(ValueError, match="transposed of group 1 must be True or False, as"):
        Muon(groups, adjust_lr_fn=scaling)
    for group in groups[:2]:
        group["transposed"] = True
    Muon(groups, adjust_lr_fn=scaling)


def test_head_has_to_be_known():
    net = mixed()
    with pytest.raises(ValueError, match="head must be given, got None for a Sequential, which"):
        muon_groups(net)
    with pytest.raises(ValueError, match=r"head must be names of modules .* got '9'"):
        muon_groups(net, head=["6", "9"])

    def muons(**options):
        groups = muon_groups(net, **options)
        return [n for g in groups if g["use_muon"] for n, _ in g["params"]]

    assert muons(head="6") == ["1.weight", "4.weight", "5.weight"]
    assert muons(head=["5", "6"]) == ["1.weight", "4.weight"]
    assert muons(head=()) == ["1.weight", "4.weight", "5.weight", "6.weight"]
    net[4].weight = net[6].weight = nn.Parameter(torch.ones(12, 12))
    assert muons(head="6") == ["1.weight", "5.weight"]  # tied to the head
    net[1].requires_grad_(False)
    assert muons(head="6") == ["5.weight"]
    with pytest.raises(ValueError, match=r"must be a weight between layers.*, got 0.weight"):
        muon_groups(net, head=["5", "6"])
    with pytest.raises(TypeError, match="model must be a module, got list"):
        muon_groups([])


def test_groups_ask_the_model_inside_its_wrappers():
    model = family("vit")
    names = [[n.replace("_orig_mod.", "") for n, _ in g["params"]] for g in
             muon_groups(torch.compile(model))]  # fmt: skip
    assert names == [[n for n, _ in g["params"]] for g in muon_groups(model)]
    assert "classifier.weight" in names[1]

    class Timm(nn.Sequential):
        def get_classifier(self):
            return self[-1]

    groups = muon_groups(Timm(nn.Linear(3, 4), nn.Linear(4, 5)))
    assert [n for n, _ in groups[0]["params"]] == ["0.weight"]


def test_groups_of_torchs_own_layers_and_what_decays():
    net = nn.TransformerEncoderLayer(8, 2, 16)
    decay = [n for n, p in net.named_parameters() if p.ndim == 2 and "linear1" not in n]
    groups = muon_groups(net, head=(), decay=decay, muon={"lr": 0.5, "weight_decay": 0.3})
    found = {n: g for g in groups for n, _ in g["params"]}
    assert {n for n, g in found.items() if g["use_muon"]} == {
        *("self_attn.in_proj_weight", "self_attn.out_proj.weight"),
        *("linear1.weight", "linear2.weight"),
    }
    assert found["linear1.weight"]["weight_decay"] == 0.0
    assert found["linear2.weight"]["weight_decay"] == 0.3
    assert found["linear1.weight"]["lr"] == 0.5
    assert "lr" not in found["norm1.weight"]


def test_groups_refuse_a_flattened_weight():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].weight = nn.Parameter(torch.ones(12))
    with pytest.raises(ValueError, match=r"0.weight must be a whole matrix, got shape \(12,\)"):
        muon_groups(net, head="1")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": torch.ones(2)}, "lr must be a number or a tensor of one element"),
        ({"lr": "x"}, "lr must be a number .* got 'x'"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"momentum": None}, "momentum must be a number"),
        ({"nesterov": "no"}, "nesterov must be True or False, got 'no'"),
        ({"ns_coefficients": (1, 2)}, r"ns_coefficients must be three numbers, got \(1, 2\)"),
        ({"ns_coefficients": (1, 2, "3")}, r"ns_coefficients\[2\] must be a number"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"ns_steps": 100}, "ns_steps must be a whole number from 0 to 99, got 100"),
        ({"ns_steps": 2.0}, "ns_steps must be a whole number from 0 to 99, got 2.0"),
        ({"adjust_lr_fn": "keller"}, "adjust_lr_fn must be None, 'original', .* got 'keller'"),
        ({"ns_dtype": torch.float16}, "ns_dtype must be None, torch.bfloat16 or torch.float32"),
        ({"transposed": "yes"}, "transposed must be True, False or None"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, or None"),
        ({"master_weights": "no"}, "master_weights must be True or False"),
    ],
    ids=lambda x: "".join(map(str, x)) if isinstance(x, dict) else "",
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=f"bigkernel.optim.Muon: {message}"):
        Muon(weights(), **options)
    optimizer = Muon(weights())
    late = {"params": weights(), **options}
    own = options.keys() & {"max_grad_norm", "master_weights"}
    message = "of a group must be left out" if own else message
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.add_param_group(late)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "option",
    [{"adjust_lr_fn": "x"}, {"ns_steps": -1}, {"lr": "x"}, {"ns_dtype": F64}, {"nesterov": None}],
    ids=str,
)
def test_bad_options_set_later_change_nothing(option):
    net = mixed()
    optimizer = Muon(muon_groups(net, head="6"))
    train(net, optimizer, 1)
    optimizer.param_groups[0].update(option)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises((ValueError, TypeError), match=f"Muon: {next(iter(option))} must be"):
        train(net, optimizer, 1)
    assert all(map(torch.equal, net.parameters(), before))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5)])
def test_what_is_no_matrix_is_refused(shape):
    p = nn.Parameter(torch.ones(shape))
    with pytest.raises(
        ValueError, match=r"params\[0\] of group 0 must be a matrix.*use_muon=False"
    ):
        Muon([p])
    Muon([{"params": [p], "use_muon": False}])
    q = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([q])
    q.data = torch.ones(shape)
    q.grad = torch.ones(shape)
    with pytest.raises(ValueError, match="must be a matrix"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_bad_dtypes_are_refused(dtype):
    p = nn.Parameter(torch.ones(3, 4).to(dtype))
    with pytest.raises(
        TypeError, match=r"params\[0\] of group 0 must be float16, .*use_muon=False"
    ):
        Muon([p])


def test_bad_gradients_are_refused():
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([p])
    p.grad = torch.ones(3, 4).to_sparse()
    with pytest.raises(RuntimeError, match=r"must be dense, got torch.sparse_coo"):
        optimizer.step()


@pytest.mark.parametrize("muon", [True, False])
def test_a_group_of_the_other_kind_has_its_options_refused(muon):
    others = {"betas": (0.9, 0.9), "amsgrad": True, "maximize": True}
    if not muon:
        others = {"momentum": 0.9, "nesterov": False, "ns_steps": 2, "transposed": True}
    for key, value in others.items():
        group = {"params": weights(), "use_muon": muon, key: value}
        with pytest.raises(ValueError, match=f"{key} of a group .* must be left out, got"):
            Muon([group])
    with pytest.raises(TypeError, match="use_muon of a group must be True or False, got int"):
        Muon([{"params": weights(), "use_muon": int(muon)}])
