"""Choosing a backend: automatic, forced, strict, explained, compiled."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import bigkernel
from bigkernel import _library, backend, registry


def _double(x):
    return x * 2


# An op without native kernels, defined once for this file.
OP = registry.register(
    registry.Op(
        noun="test_only",
        title="an op of this file",
        functions=(
            registry.Function(
                "test_only_double", "(Tensor x) -> Tensor", _double, lambda x: torch.empty_like(x)
            ),
        ),
        absent={
            "cpu": "it is for tests",
            "cuda": "it is for tests",
            "benchmark": "it is for tests",
        },
    )
)


def double(x, reason=None):
    return backend.select("test_only_double", x.device, reason).test_only_double(x)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(backend, "_forced", None)
    monkeypatch.delenv("BIGKERNEL_STRICT", raising=False)


def test_fallback_warns_once_and_names_the_reason():
    with pytest.warns(backend.FallbackWarning, match=r"test_only_double.*PyTorch: .+\."):
        double(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(torch.ones(2)).tolist() == [2, 2]


def test_fallback_warning_points_at_the_caller():
    q = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    with pytest.warns(backend.FallbackWarning) as caught:
        bigkernel.ops.attention(q, q, q)
    assert caught[0].filename == __file__


def test_fallback_warning_points_past_torchs_own_frames():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    with pytest.warns(backend.FallbackWarning) as caught:
        bigkernel.transforms.Resize(2)(image)  # through nn.Module's call
    assert caught[0].filename == __file__


def test_fallback_is_an_error_under_strict(monkeypatch):
    monkeypatch.setenv("BIGKERNEL_STRICT", "1")
    with pytest.raises(RuntimeError, match="BIGKERNEL_STRICT=1"):
        double(torch.ones(2))


def test_forced_torch_is_silent():
    with warnings.catch_warnings(), bigkernel.use_backend("torch"):
        warnings.simplefilter("error")
        double(torch.ones(2))


def test_forced_backend_that_cannot_run_raises():
    with bigkernel.use_backend("cpu"), pytest.raises(RuntimeError, match="cannot run this call"):
        double(torch.ones(2))
    with bigkernel.use_backend("cuda"), pytest.raises(RuntimeError, match="tensors are on 'cpu'"):
        double(torch.ones(2))


def test_use_backend_sets_at_once_and_restores():
    bigkernel.use_backend("torch")
    assert backend.decide("test_only_double", "cpu")[0] == "torch"
    with bigkernel.use_backend(None):
        assert backend._forced is None
    assert backend._forced == "torch"


@pytest.mark.parametrize("name", ["gpu", "", "Torch"])
def test_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match="must be one of cuda, cpu, torch"):
        bigkernel.use_backend(name)


def test_explain_names_backend_and_reason():
    text = bigkernel.explain("test_only_double", torch.ones(1))
    assert text.startswith("test_only_double: torch, because ")
    with pytest.raises(ValueError, match="there is no op 'no_such'"):
        bigkernel.explain("no_such")


@pytest.mark.skipif(not bigkernel.cpu_isas(), reason="the native library is not built")
def test_explain_knows_the_widest_head_dim():
    q, v, mask = torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 300), torch.ones(2, 300)
    assert bigkernel.explain("attention", q, q, q, mask).startswith("attention: cpu")
    text = bigkernel.explain("attention", q, q, v)
    assert text.startswith("attention: torch, because head dim 300 is above")


@pytest.mark.skipif(not bigkernel.cpu_isas(), reason="the native library is not built")
def test_explain_says_that_the_native_module_is_older_than_an_op(monkeypatch):
    monkeypatch.setitem(_library.kernels, ("glu_fwd", "cpu"), False)
    text = bigkernel.explain("glu", torch.ones(2, 4))
    assert "built without the cpu kernel of glu_fwd; `make build`" in text
    with pytest.warns(backend.FallbackWarning, match="make build"):
        bigkernel.ops.glu(torch.ones(2, 4))


@pytest.mark.skipif("amx" not in bigkernel.cpu_isas(), reason="no AMX")
def test_amx_is_avx512_where_it_has_no_products():
    """Hence tests/conftest.py runs under AMX only what multiplies bf16 in attention."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 64)
    image = torch.randint(0, 256, (2, 3, 9, 11), dtype=torch.uint8)

    def results() -> list[torch.Tensor]:
        weight = torch.nn.Parameter(x[0, 0].clone())
        weight.grad = x[0, 1].clone()
        bigkernel.optim.AdamW([weight]).step()
        half = x.half()
        return [
            weight.detach(),
            bigkernel.scaled_dot_product_attention(x, x, x, is_causal=True),
            bigkernel.scaled_dot_product_attention(half, half, half),
            bigkernel.ops.rms_norm(x.bfloat16(), x[0, 0, 0].bfloat16()),
            bigkernel.ops.glu(x, x),
            bigkernel.ops.cross_entropy(x[0, 0], torch.arange(40)),
            bigkernel.transforms.Normalize([0.5], [0.5])(image.float()),
        ]

    of_each = []
    for isa in ("amx", "avx512"):
        with bigkernel.use_cpu_isa(isa):
            of_each.append(results())
    assert all(torch.equal(*pair) for pair in zip(*of_each, strict=True))


def test_select_traces_without_a_graph_break():
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


def _python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


@pytest.mark.parametrize("variable", ["BIGKERNEL_BACKEND", "BIGKERNEL_CPU_ISA"])
def test_environment_variable_with_unknown_value_raises(variable):
    if variable == "BIGKERNEL_CPU_ISA" and _library.native is None:
        pytest.skip("the native library is not built")
    done = _python("import bigkernel", **{variable: "mmx"})
    assert done.returncode != 0
    assert f"ValueError: {variable}" in done.stderr.splitlines()[-1]
    assert "mmx" in done.stderr.splitlines()[-1]


def test_environment_chooses_the_instruction_set():
    if _library.native is None:
        pytest.skip("the native library is not built")
    code = "import bigkernel; print(bigkernel._library.native.cpu_isa())"
    assert _python(code, BIGKERNEL_CPU_ISA="portable").stdout.strip() == "portable"


def test_slow_dot_products_are_left_alone():
    """The default is the last set that the CPU has, but where AMX is kept from us."""
    cpu = Path("/proc/cpuinfo")
    if _library.native is None or not cpu.exists():
        pytest.skip("needs the native library and /proc/cpuinfo")
    slow = all(word in cpu.read_text() for word in ("GenuineIntel", "avx512_fp16"))
    slow &= "amx" not in bigkernel.cpu_isas()
    env = {name: value for name, value in os.environ.items() if name != "BIGKERNEL_CPU_ISA"}
    code = "import bigkernel; print(bigkernel._library.native.cpu_isa())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    expected = [x for x in bigkernel.cpu_isas() if not (slow and x == "avx512_bf16")][-1]
    assert done.stdout.strip() == expected


def test_package_works_without_the_native_module():
    code = (
        "import torch, bigkernel, warnings; warnings.simplefilter('ignore')\n"
        "assert bigkernel._library.native is None and bigkernel.cpu_isas() == []\n"
        "q = torch.randn(1, 2, 8, 16, requires_grad=True)\n"
        "bigkernel.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()\n"
        "bigkernel.optim.AdamW([q]).step()\n"
        "image = torch.zeros(2, 3, 40, 40, dtype=torch.uint8)\n"
        "print(bigkernel.transforms.RandomResizedCrop(32)(image).shape)\n"
        "print(bigkernel.explain('attention'))"
    )
    done = _python(code, BIGKERNEL_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 3, 32, 32])" in done.stdout
    assert "because BIGKERNEL_NATIVE=0" in done.stdout


def test_forced_instruction_set_is_restored(cpu_isa):
    assert _library.native.cpu_isa() == cpu_isa
    with pytest.raises(ValueError, match="BIGKERNEL_CPU_ISA must be one of"):
        bigkernel.use_cpu_isa("sse9")
    assert _library.native.cpu_isa() == cpu_isa


def test_a_noun_names_one_op():
    absent = {"cpu": "none", "cuda": "none", "benchmark": "none"}
    with pytest.raises(ValueError, match="there is an op 'adam' already"):
        registry.register(registry.Op(noun="adam", title="another", functions=(), absent=absent))
    assert registry.find("adam").title != "another"
