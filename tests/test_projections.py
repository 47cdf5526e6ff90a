"""Linear layers of one input as one product: where they are put together, and where not."""

import copy
import pickle

import pytest
import torch
from families import build, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bigkernel
from bigkernel.integrations.patching import report
from bigkernel.testing.tolerance import assert_as_accurate

pytestmark = pytest.mark.filterwarnings("ignore::bigkernel.backend.FallbackWarning")


class Count(TorchDispatchMode):
    """The products of matrices."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "linear")
        return func(*args, **(kwargs or {}))


def products_of(module, *given, autocast=True, backward=True):
    """How many products forward takes, and backward."""
    with Count() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = module(*given)
    with Count() as back:
        if backward:
            out.float().sum().backward()
    return forward.products, back.products


def patched(module):
    return bigkernel.patch(module, quiet=True)


def groups(module):
    """What is put together: the notes of the report's lines."""
    lines = [line for line in report(module).replaced if line.startswith("projections")]
    return [line.split("(")[1].rstrip(")") for line in lines]


class Attention(nn.Module):
    """Three layers of one input, of different widths."""

    def __init__(self, bias=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, n, bias=bias) for n in (16, 8, 24))

    def forward(self, x):
        q = self.q(x).view(*x.shape[:-1], 2, 8)
        k = self.k(x)
        v = self.v(x)
        return torch.cat([q.flatten(-2), 2 * k, v.tanh()], -1)


def gradients_of(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], weights)]


@pytest.mark.parametrize("bias", [False, True])
def test_results_and_gradients_are_as_accurate_as_those_of_layers_by_themselves(bias):
    torch.manual_seed(0)
    apart, x = Attention(bias), torch.randn(5, 7, 16, requires_grad=True)
    joined, exact = patched(copy.deepcopy(apart)), copy.deepcopy(apart).double()
    assert groups(joined) == ["q, k and v"]
    wide = x.detach().double().requires_grad_()
    y = exact(wide)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    wanted = [y, *torch.autograd.grad(y, [wide, *exact.parameters()], weights.double())]
    for got, right, theirs in zip(
        gradients_of(joined, x), wanted, gradients_of(apart, x), strict=True
    ):
        assert got.dtype == theirs.dtype
        assert_as_accurate(got.detach(), right.detach(), theirs.detach())
    assert products_of(apart, x) == (3, 6)
    assert products_of(joined, x) == (1, 2)


def test_the_halves_of_a_gated_unit_go_into_it_as_they_lie(every_call):
    model = build("llama")
    layers = len(model.model.layers)
    with Count() as apart, torch.autocast("cpu", torch.bfloat16):
        copy.deepcopy(model)(input_ids=tokens())
    joined = patched(model)
    assert groups(joined) == ["q_proj, k_proj and v_proj", "gate_proj and up_proj"]
    with Count() as together, torch.autocast("cpu", torch.bfloat16):
        out = joined(input_ids=tokens()).logits
    assert apart.products - together.products == 3 * layers
    names = set()
    nodes = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in names:
            names.add(node)
            nodes += [n for n, _ in node.next_functions]
    split = [n for n in names if "UnsafeSplit" in n.name()]
    assert len(split) == layers  # of q, k and v: gate and up are not taken apart


def test_second_derivatives_are_there():
    apart, x = Attention().double().float(), torch.randn(3, 16, requires_grad=True)
    joined = patched(copy.deepcopy(apart))
    found = []
    for module in (apart, joined):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [*module.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.05 * float(a.abs().max()))


def hooked(module):
    module.k.register_forward_hook(lambda *_: None)


def frozen(module):
    module.k.requires_grad_(False)


def wider(module):
    module.to(torch.bfloat16)


def adapted(module):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x):
            return self.base(x) + 1

    module.v = Adapter(module.v)


def replaced(module):
    module.q.forward = lambda x: nn.functional.linear(x, module.q.weight) + 1


def without_bias(module):
    module.q.bias = None


@pytest.mark.parametrize("change", [hooked, frozen, wider, adapted, replaced, without_bias])
def test_layers_that_differ_run_by_themselves(change):
    torch.manual_seed(0)
    module, x = patched(Attention(bias=True)), torch.randn(4, 16)
    plain = copy.deepcopy(module)
    change(module)
    bigkernel.unpatch(plain)
    change(plain)
    assert products_of(module, x, backward=False)[0] == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), plain(x))


def test_without_autocast_or_gradients_layers_run_by_themselves():
    module, x = patched(Attention()), torch.randn(4, 16)
    assert products_of(module, x, autocast=False) == (3, 3)
    with torch.no_grad():
        assert products_of(module, x, backward=False)[0] == 3
    assert products_of(module, x) == (1, 1)


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))


class Overwritten(Other):
    def forward(self, x):
        y = self.a(x)
        x = x + 1
        return y + self.b(x)


class InPlace(Other):
    def forward(self, x):
        y = self.a(x)
        x.add_(1)
        return y + self.b(x)


class WithinOne(Other):
    def forward(self, x):
        return self.a(x) + x.add_(1) + self.b(x)


class Walrus(Other):
    def forward(self, x):
        return self.a(x) + (x := x + 1) + self.b(x)


class Stored(Other):
    def forward(self, x):
        y = self.a(x)
        x[0] = 1
        return y + self.b(x)


class Perhaps(Other):
    def forward(self, x):
        y = self.a(x)
        z = self.b(x) if y.sum() > 0 else x
        return y + z + (self.c(x) if z.sum() > 0 else 0)


class InBranches(Other):
    def forward(self, x, other=None):
        y = self.a(x)
        if other is not None:
            y = y + self.b(x)
        return y


class Deleted(Other):
    def forward(self, x):
        y = self.a(x)
        del self.b
        self.b = self.c
        return y + self.b(x)


class Twice(Other):
    def forward(self, x):
        return self.a(self.a(x)) + self.a(x)


class Rebound(Other):
    def forward(self, x):
        y = self.a(x)
        self.b = self.c
        return y + self.b(x)


class ChangesResults(Other):
    def forward(self, x):
        y = self.a(x)
        z = self.b(x)
        y.mul_(2)
        return y + z


class AcrossOthers(Other):
    def forward(self, x):
        y = self.a(x)
        z = y.relu()
        if z.sum() > 0:
            z = self.b(x) + self.c(x)
        x = self.b(x) + z
        return self.c(x)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (Overwritten, []),
        (InPlace, []),
        (Stored, []),
        (WithinOne, []),
        (Walrus, []),
        (Perhaps, []),
        (InBranches, []),
        (Deleted, []),
        (Rebound, []),
        (Twice, []),
        (AcrossOthers, ["b and c"]),
    ],
)
def test_what_a_forward_may_change_between_is_left(kind, found):
    torch.manual_seed(0)
    module, x = kind(), torch.randn(4, 16)
    expected = copy.deepcopy(module)(x.clone())
    patched(module)
    assert groups(module) == found
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x.clone())
    torch.testing.assert_close(got.float(), expected.float(), rtol=0.05, atol=0.05)


def test_results_may_be_changed_in_place():
    torch.manual_seed(0)
    module, x = ChangesResults(), torch.randn(4, 16)
    expected = copy.deepcopy(module)(x)
    patched(module)
    assert groups(module) == ["a and b"]
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
    got.float().sum().backward()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_run_by_themselves(way):
    module, x = patched(Attention()), torch.randn(4, 16)
    other = copy.deepcopy(module) if way == "deepcopy" else pickle.loads(pickle.dumps(module))
    assert products_of(other, x) == (1, 1)
    assert module.q.weight.grad is None
    assert other.q.weight.grad is not None


def test_it_compiles_whole():
    torch.manual_seed(0)
    module, x = patched(Attention()), torch.randn(4, 16)
    plain = copy.deepcopy(module)
    bigkernel.unpatch(plain)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, plain(x))
