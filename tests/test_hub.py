"""bigkernel as a kernel of Hugging Face's hub: its folder, and models that train through it.

Feature list: what `kernels` asks of a folder; the variant for each torch; the kernel beside
bigkernel in one process; layers and the attention function against transformers, in fp32 and bf16,
forward and backward, compiled; a static cache; refusals; a LLaMA that unmodified transformers
trains with the kernel's attention and layers, in a process that knows nothing of bigkernel.

`kernels` need not be installed. Where it is not, what it does to a folder is done here by hand, and
the tests with it are skipped; `make test-hub` brings it.
"""

import ast
import base64
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn import functional as F
from transformers.integrations import hub_kernels
from transformers.loss import loss_utils
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.utils import import_utils

import bigkernel
from bigkernel import _library
from bigkernel.testing import assert_as_accurate

MACHINE = platform.machine()
ROOT = Path(__file__).resolve().parent.parent
KERNELS = importlib.util.find_spec("kernels") is not None
with_kernels = pytest.mark.skipif(not KERNELS, reason="`kernels` is not there: make test-hub")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_library.native is None, reason="there is no native library to pack"),
]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("hub_tool", ROOT / "tools" / "hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    tool.build(folder)
    return folder


@pytest.fixture(scope="module")
def variant(folder):
    """The folder of the variant for this torch."""
    return folder / "build" / chosen(folder, torch.version.cuda)


@pytest.fixture(scope="module")
def kernel(variant):
    """The kernel, in this process, where bigkernel is as well."""
    return load(variant)


def load(variant):
    """As `kernels` imports it: under the id in its metadata."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def chosen(folder, cuda):
    """The variant that `kernels` takes for a torch of 2.11 or later, built for CUDA or not."""
    fitting = []
    for path in (folder / "build").iterdir():
        backend = re.fullmatch(rf"torch-stable-abi211-(cpu|cu\d+)-{MACHINE}-linux", path.name)[1]
        if cuda is None:
            fits = backend == "cpu"
        else:
            major, minor = map(int, cuda.split("."))
            built = (int(backend[2:-1]), int(backend[-1])) if backend != "cpu" else (0, 0)
            fits = built[0] == major and built[1] <= minor
        fitting += [path.name] * fits
    return max(fitting, default=None)


# The folder


def test_the_folder_is_what_kernels_asks_for(folder):
    names = {path.name for path in (folder / "build").iterdir()}
    assert names == {f"torch-stable-abi211-{b}-{MACHINE}-linux" for b in ("cpu", "cu126", "cu130")}
    ids = set()
    for name in names:
        path = folder / "build" / name
        said = json.loads((path / "metadata.json").read_text())
        assert set(said) == {
            *("name", "id", "version", "license", "python-depends", "backend", "digest")
        }
        assert re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", said["name"])
        assert said["id"].isidentifier()
        assert said["version"] == 1
        assert said["backend"]["type"] == ("cpu" if "-cpu-" in name else "cuda")
        assert ("archs" in said["backend"]) == ("-cpu-" not in name)
        there = [p for p in path.rglob("*") if p.is_file() and p.name != "metadata.json"]
        assert said["digest"]["algorithm"] == "sha256"
        assert said["digest"]["files"] == {
            str(p.relative_to(path)): base64.b64encode(
                hashlib.sha256(p.read_bytes()).digest()
            ).decode()
            for p in there
            if "__pycache__" not in p.parts
        }
        ids.add(said["id"])
    assert len(ids) == 2  # one for CPUs, one for GPUs
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert "{" not in card.replace("{layer: {", "")
    assert "- `attention`" in card
    assert "- `RMSNorm`: LLaMA's" in card


def test_each_torch_has_a_variant(folder):
    for cuda, backend in (
        (None, "cpu"),
        ("12.6", "cu126"),
        ("12.9", "cu126"),
        ("13.0", "cu130"),
        ("13.2", "cu130"),
    ):
        assert chosen(folder, cuda) == f"torch-stable-abi211-{backend}-{MACHINE}-linux"
    assert chosen(folder, "11.8") is None


def test_a_kernel_imports_nothing_but_itself_and_torch(variant):
    """transformers is imported where transformers itself asks for the attention function."""
    allowed = {"torch", "numpy", *sys.stdlib_module_names}
    late = {"forward.py"} | {
        f"integrations/{name}.py" for name in ("contract", "eager", "masks", "transformers")
    }
    for path in variant.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found = {str(node.module).partition(".")[0]}
            else:
                continue
            extra = {"transformers"} if str(path.relative_to(variant)) in late else set()
            assert found <= allowed | extra, path


def test_an_import_that_cannot_be_made_relative_stops_the_build(tool):
    with pytest.raises(SystemExit, match=r"must import bigkernel\.ops by `from bigkernel import"):
        tool.relative("bigkernel.ops.norm.op", "import torch\nimport bigkernel.ops\n")
    source = "from bigkernel import registry\nfrom bigkernel.hub.layers import (\n    RMSNorm,\n)\n"
    changed = "from ... import registry\nfrom ...layers import (\n    RMSNorm,\n)\n"
    assert tool.relative("bigkernel.ops.norm.op", source) == changed


def test_another_file_is_another_name(tool):
    before = tool.metadata("cpu", {"a.py": "1"}, "")["id"]
    assert before == tool.metadata("cpu", {"a.py": "1"}, "")["id"]
    assert before != tool.metadata("cpu", {"a.py": "2"}, "")["id"]
    assert before != tool.metadata("cpu", {"b.py": "1"}, "")["id"]


def test_architectures_are_written_as_kernels_reads_them(tool):
    said = tool.metadata("cu130", {}, "sm_80, sm_90a, sm_120, PTX for sm_120")["backend"]
    assert said == {"type": "cuda", "archs": ["8.0", "9.0a", "12.0", "12.0+PTX"]}


@with_kernels
def test_kernels_own_rules_hold(folder, kernel, monkeypatch):
    import kernels
    from kernels import _rust, variants

    names = variants.get_variants_local(folder / "build")
    assert len(names) == 3
    for cuda in (None, "12.6", "12.9", "13.0", "13.2"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        picked, _ = variants.resolve_variant(names)
        assert picked.variant_str == chosen(folder, cuda)
    monkeypatch.undo()
    for path in (folder / "build").iterdir():
        said = kernels.Metadata.read_from_file(path / "metadata.json")
        said.digest.validate(_rust.Digest.hash_variant(_rust.DigestAlgorithm.SHA256, path))
    assert kernels.get_local_kernel(folder).__name__ == kernel.__name__

    for name, theirs in REPLACED.items():

        class Model(theirs):
            pass

        kernels.replace_kernel_forward_from_hub(Model, name)
        ours = kernels.LocalLayerRepository(folder, layer_name=name)
        model = Model.__new__(Model)
        nn.Module.__init__(model)
        with kernels.use_kernel_mapping({name: {"cpu": ours}}, inherit_mapping=False):
            mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
            kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
        assert model.forward.__func__ is getattr(kernel.layers, name).forward


class Rotary(nn.Module):
    """As `kernels` wraps the function."""

    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


REPLACED = {
    "RMSNorm": modeling_llama.LlamaRMSNorm,
    "RMSNormRoundedOnce": modeling_gpt_oss.GptOssRMSNorm,
    "RotaryPosEmb": Rotary,
    "SwiGLUMLP": modeling_llama.LlamaMLP,
}


# Beside bigkernel


def test_a_kernel_stands_beside_bigkernel(kernel):
    q, k, v = torch.randn(3, 1, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        kernel.attention(q, k, v, causal=True), bigkernel.ops.attention(q, k, v, causal=True)
    )
    assert f"{kernel.__name__}::attention_fwd" in torch._C._dispatch_get_all_op_names()
    with kernel.use_backend("torch"):
        assert kernel.explain("attention", q).startswith("attention: torch")
        assert bigkernel.explain("attention", q).startswith("attention: cpu")
    assert kernel.cpu_isas() == bigkernel.cpu_isas()
    with pytest.raises(AttributeError, match="has no attribute 'flash'"):
        _ = kernel.flash


# Layers


@pytest.fixture(params=["op", "plain"])
def either(request, kernel, monkeypatch):
    """Whatever the size: the op, or what a layer does without it."""
    native = sys.modules[f"{kernel.__name__}.integrations.native"]
    monkeypatch.setattr(native, "takes", lambda *_, **__: request.param == "op")


def run(call, tensors):
    """Results, and the gradients of all tensors, of one weighted sum of the results."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = call(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    draw = torch.Generator().manual_seed(2)
    weights = [torch.randn(o.shape, generator=draw, dtype=torch.float64) for o in out]
    total = sum((o.double() * w).sum() for o, w in zip(out, weights, strict=True))
    return [*out, *torch.autograd.grad(total, tensors)]


def compare(ours, theirs, exact, dtype, *shapes):
    """Results and gradients of random tensors, by the rule that everything here keeps to."""
    draw = torch.Generator().manual_seed(1)
    given = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    wanted = run(exact, [t.double() for t in given])
    for actual, same, e in zip(run(ours, given), run(theirs, given), wanted, strict=True):
        assert actual.dtype == same.dtype
        assert_as_accurate(actual.detach(), e.detach(), same.detach())


def norm_of(forward):
    def call(x, weight):
        return forward(types.SimpleNamespace(weight=weight, variance_epsilon=1e-5), x)

    return call


def exact_norm(self, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@DTYPES
@pytest.mark.parametrize("name", ["RMSNorm", "RMSNormRoundedOnce"])
def test_norm_layers_are_transformers(kernel, either, name, dtype):
    theirs = {
        "RMSNorm": modeling_llama.LlamaRMSNorm,
        "RMSNormRoundedOnce": modeling_gpt_oss.GptOssRMSNorm,
    }[name]
    ours = getattr(kernel.layers, name)
    calls = [norm_of(f) for f in (ours.forward, theirs.forward, exact_norm)]
    compare(*calls, dtype, (2, 5, 48), (48,))


@DTYPES
@pytest.mark.parametrize("heads", [1, 2])
def test_the_rotation_is_transformers(kernel, either, heads, dtype):
    angles = torch.linspace(0, 9, 5)[None, :, None] * torch.ones(16)

    def rotated(function):
        def call(q, k):
            return function(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype), heads)

        return call

    calls = [rotated(f) for f in (kernel.layers.RotaryPosEmb(), *2 * [Rotary()])]
    shapes = [(2, 4, 5, 16), (2, 2, 5, 16)]
    if heads == 2:
        shapes = [(b, s, h, d) for b, h, s, d in shapes]
    compare(*calls, dtype, *shapes)


@DTYPES
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_the_mlp_is_transformers(kernel, either, act, dtype):
    """Of another activation than SiLU nothing is replaced."""
    activation = transformers.activations.ACT2FN[act]

    def mlp(forward):
        def call(x, gate, up, down):
            names = ("gate_proj", "up_proj", "down_proj")
            linear = [functools.partial(F.linear, weight=w) for w in (gate, up, down)]
            parts = dict(zip(names, linear, strict=True))
            return forward(types.SimpleNamespace(act_fn=activation, **parts), x)

        return call

    theirs = modeling_llama.LlamaMLP.forward
    calls = [mlp(f) for f in (kernel.layers.SwiGLUMLP.forward, theirs, theirs)]
    compare(*calls, dtype, (2, 5, 16), (24, 16), (24, 16), (16, 24))


@DTYPES
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
def test_the_loss_is_transformers(kernel, either, items, dtype):
    labels = torch.randint(0, 33, (2, 6), generator=torch.Generator().manual_seed(3))
    labels[0, 3:] = -100

    def exact(logits):
        rows = logits[:, :-1].flatten(0, 1)
        kind = "mean" if items is None else "sum"
        return F.cross_entropy(rows, labels[:, 1:].flatten(), reduction=kind) / (items or 1)

    def loss(function):
        return lambda logits: function(logits, labels, 33, items)

    ours, theirs = kernel.layers.ForCausalLMLoss(), loss_utils.ForCausalLMLoss
    compare(loss(ours), loss(theirs), exact, dtype, (2, 6, 33))


# Attention


class Layer(nn.Module):
    """What the attention function is told of a layer."""

    is_causal = True


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 9), (5, 9)])
@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask_attention_is_that_of_sdpa(kernel, queries, keys, causal):
    """More keys than queries: those of a static cache, which is filled for the first time."""
    theirs = transformers.AttentionInterface()["sdpa"]
    layer = Layer()
    layer.is_causal = causal

    def attend(function):
        return lambda q, k, v: function(layer, q, k, v, None, scaling=0.3)[0]

    calls = [attend(f) for f in (kernel.flash_attn_forward, theirs, theirs)]
    shapes = [(2, 4, queries, 16), (2, 4, keys, 16), (2, 4, keys, 16)]
    compare(*calls, torch.float32, *shapes)


def test_a_static_cache_gives_the_tokens_of_sdpa(kernel, monkeypatch):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    ids = torch.randint(0, 64, (1, 6), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    options["disable_compile"] = True
    expected = model.generate(ids, **options)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: kernel)
    model.set_attn_implementation("bigkernel/attention", allow_all_kernels=True)
    assert torch.equal(model.generate(ids, **options), expected)


CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "either", ["op", pytest.param("plain", marks=pytest.mark.slow)], indirect=True
)
def test_everything_is_one_graph(kernel, either):
    layer, attend = Layer(), kernel.flash_attn_forward
    norm = types.SimpleNamespace(weight=torch.ones(16), variance_epsilon=1e-5)
    parts = ("gate_proj", "up_proj", "down_proj")
    mlp = types.SimpleNamespace(act_fn=nn.SiLU(), **{n: nn.Linear(16, 16) for n in parts})
    rotate, loss = kernel.layers.RotaryPosEmb(), kernel.layers.ForCausalLMLoss()
    labels = torch.arange(5).expand(2, 5)
    angles = torch.rand(1, 5, 16)

    def step(q, k, v):
        q, k = rotate(q, k, angles.cos(), angles.sin())
        out, _ = attend(layer, q, k, v, None, dropout=0.0, scaling=0.25)
        out = kernel.layers.RMSNorm.forward(norm, out.flatten(2)[..., :16])
        out = kernel.layers.RMSNormRoundedOnce.forward(norm, out)
        return loss(kernel.layers.SwiGLUMLP.forward(mlp, out), labels, 16)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    draw = torch.Generator().manual_seed(5)
    given = [torch.randn(2, heads, 5, 16, generator=draw) for heads in (4, 2, 2)]
    for a, b in zip(run(compiled, given), run(step, given), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_not_understood_is_refused(kernel):
    q = torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match=r"Layer passes cache, and paged caches .* not supported"):
        kernel.flash_attn_forward(Layer(), q, q, q, None, cache=object())
    half = torch.ones(1, 5, 8)
    said = r"cos must be \[B or 1, S, D\] with D that of q, 16, .* got \(1, 5, 8\) and 1\. Leave "
    with pytest.raises(ValueError, match=said):
        kernel.layers.RotaryPosEmb()(q, q, half, half)
    with pytest.raises(ValueError, match=r"unsqueeze_dim 1 or 2, got \(1, 5, 16\) and 0"):
        kernel.layers.RotaryPosEmb()(q, q, torch.ones(1, 5, 16), torch.ones(1, 5, 16), 0)
    norm = types.SimpleNamespace(weight=torch.ones(8), variance_epsilon=1e-5)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be of shape \(16,\)"):
        kernel.layers.RMSNorm.forward(norm, q)


# A model, in a process of its own

SCRIPT = """
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import MethodType

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

variant, config, wanted, out = sys.argv[1:]
name = "bigkernel/attention"
if wanted == "none":  # what `kernels` does with a folder
    said = json.loads((Path(variant) / "metadata.json").read_text())
    spec = importlib.util.spec_from_file_location(said["id"], Path(variant) / "__init__.py")
    kernel = sys.modules[said["id"]] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
else:
    import kernels

    kernel = kernels.get_kernel(name, version=1, trust_remote_code=True)
    found = importlib.metadata.version
    importlib.metadata.version = lambda each: wanted if each == "kernels" else found(each)
assert "transformers" not in sys.modules
kernel.use_backend("cpu")  # however small

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import hub_kernels
from transformers.models.llama import modeling_llama as llama

if wanted == "none":
    hub_kernels.is_kernels_available = lambda: True
    hub_kernels.get_kernel = lambda *_, **__: kernel
assert hub_kernels.is_kernels_available()


def exact(model):
    def norm(self, x):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return x * scale * self.weight

    def loss(logits, labels, vocab_size, **_):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model.double().set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, llama.LlamaRMSNorm):
            module.forward = MethodType(norm, module)
    model.loss_function = loss


def ours(model):
    model.set_attn_implementation(name, allow_all_kernels=True)
    model.loss_function = kernel.layers.ForCausalLMLoss().forward
    layers = {llama.LlamaRMSNorm: "RMSNorm", llama.LlamaMLP: "SwiGLUMLP"}
    if wanted == "none":
        for module in model.modules():
            if type(module) in layers:
                layer = getattr(kernel.layers, layers[type(module)])
                module.forward = MethodType(layer.forward, module)
        llama.apply_rotary_pos_emb = kernel.layers.RotaryPosEmb()
        return
    kernels.replace_kernel_forward_from_hub(llama.LlamaMLP, "SwiGLUMLP")
    names = {"RMSNorm": "RMSNorm", "SwiGLUMLP": "SwiGLUMLP", "rotary_pos_emb": "RotaryPosEmb"}
    path = Path(os.environ["LOCAL_KERNELS"].partition("=")[2])
    kernels.register_kernel_mapping(
        {
            layer: {"cpu": kernels.LocalLayerRepository(path, layer_name=mine)}
            for layer, mine in names.items()
        }
    )
    model.train()
    model.set_use_kernels(True)


class Ops(TorchDispatchMode):
    seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == kernel.__name__:
            self.seen.add(func._opname)
        return func(*args, **(kwargs or {}))


def train(how):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**json.loads(config)))
    how(model)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    draw = torch.Generator().manual_seed(1)
    losses = []
    for step in range(4):
        ids = torch.randint(0, 64, (2, 12), generator=draw)
        mask = torch.ones_like(ids)
        if step == 2:
            mask[0, 8:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), model(ids, use_cache=False).logits.detach()


results = {"exact": train(exact), "eager": train(lambda m: m.set_attn_implementation("eager"))}
with Ops():
    results["ours"] = train(ours)
results["ops"] = sorted(Ops.seen)
results["others"] = [each for each in sys.modules if each.partition(".")[0] == "bigkernel"]
torch.save(results, out)
"""


def trained(folder, variant, tmp_path, wanted):
    """What the script leaves: its last logits and its losses, and what ran."""
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [str(variant), json.dumps(CONFIG), wanted, str(tmp_path / "results.pt")]
    ran = subprocess.run(
        [sys.executable, "script.py", *arguments],
        cwd=tmp_path,
        env={
            **os.environ,
            "LOCAL_KERNELS": f"bigkernel/attention={folder}",
            "HF_HUB_OFFLINE": "1",
            "BIGKERNEL_STRICT": "1",
        },
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return torch.load(tmp_path / "results.pt")


def check_trained(results):
    for which in (0, 1):
        exact, eager, ours = (results[name][which] for name in ("exact", "eager", "ours"))
        assert_as_accurate(ours, exact, eager)
    passes = [f"{op}_{way}" for op in ("attention", "glu", "norm") for way in ("bwd", "fwd")]
    assert set(results["ops"]) >= {*passes, "rope_fwd"}
    assert any(op.startswith("cross_entropy") for op in results["ops"])
    assert results["others"] == []


def test_transformers_trains_a_model_through_the_folder(folder, variant, tmp_path):
    check_trained(trained(folder, variant, tmp_path, "none"))


@with_kernels
def test_transformers_and_kernels_train_a_model_through_the_folder(folder, variant, tmp_path):
    there, oldest = importlib.metadata.version("kernels"), import_utils.KERNELS_MIN_VERSION
    newest = Version(import_utils.KERNELS_MAX_VERSION)
    if not Version(oldest) <= Version(there) < newest:
        warnings.warn(
            f"transformers {transformers.__version__} wants kernels {oldest} to {newest}, which is "
            f"not here: kernels {there} stood in for it",
            stacklevel=1,
        )
    check_trained(trained(folder, variant, tmp_path, oldest))
