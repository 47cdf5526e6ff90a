"""Attention's CUDA kernels for few queries and many keys, in the emulator."""

import sys
from pathlib import Path

import pytest
import torch

from bigkernel.ops.attention.reference import Params, Rule, attention_reference
from bigkernel.testing import ptx
from bigkernel.testing.tolerance import assert_as_accurate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
import attention_ptx
from attention_cases import DTYPES, Case, build

from tools import cuda_schedule

SECTOR = 32
FEW = {
    "one": {"lengths": (1, 300), "causal": "bottom_right"},
    "one-of-heads-that-share-nothing": {"lengths": (1, 260), "heads": (2, 2), "dim": 104},
    "many-members": {"lengths": (16, 270), "heads": (16, 2), "batch": 1, "causal": "bottom_right"},
    "window": {"lengths": (5, 500), "window": (100, 0), "align": "bottom_right", "dtype": "f16"},
    "top-left": {"lengths": (3, 300), "causal": "top_left"},
    "softcap-d136": {"lengths": (2, 256), "softcap": 2.0, "dim": 136, "dim_v": 24},
    "projected": {"lengths": (4, 290), "layout": "bshd", "heads": (8, 2), "dim": 128},
}


def run(call, dim_v, shape, splits):
    """(out, lse) of a call, and its launches."""
    out, lse = torch.full((*shape, dim_v), torch.nan, dtype=call.kept[0].dtype), None
    lse = torch.full((*(shape[:2][::-1] if call.packed else shape), 2), torch.nan)
    call.args.out, call.args.lse = call.view(out, "out"), call.view_lse(lse, "lse")
    call.split_keys(splits=splits)
    assert call.args.splits > 0
    call.run("attention_few_run")
    return out, lse


@pytest.mark.parametrize("name", FEW)
def test_attention_few_matches_reference(name):
    case = Case(**{"dtype": "bf16", "dim": 64, **FEW[name]})
    inputs = build(case).map(lambda x: x.detach())
    given = (inputs.q, inputs.k, inputs.v)
    results = [
        attention_reference(*(x.to(dtype) for x in given), case.rule)
        for dtype in (torch.float64, DTYPES[case.dtype])
    ]
    found = []
    for splits in (None, 1, 3, 3):
        call = attention_ptx.Call(*given, case.params(inputs))
        out, lse = run(call, inputs.v.shape[-1], inputs.q.shape[:3], splits)
        assert_as_accurate(out, results[0][0], results[1][0])
        torch.testing.assert_close(lse.sum(-1).double(), results[0][1], rtol=1e-5, atol=2e-5)
        found.append((out, lse))
    assert all(torch.equal(a, b) for a, b in zip(*found[2:], strict=True))


def test_attention_few_of_packed_sequences():
    """Sequences of other lengths, without rows, and without keys."""
    torch.manual_seed(0)
    cu_q = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)
    cu_k = torch.tensor([0, 290, 300, 300, 340], dtype=torch.int32)
    q = torch.randn(6, 4, 64).bfloat16()
    k, v = (torch.randn(340, 2, 64).bfloat16() for _ in range(2))
    rule = Rule(0.125, True, True, -1, -1, 0.0, 0.0)
    params = Params(None, None, None, cu_q, cu_k, 3, 290, rule)
    exact, same = (
        attention_reference(
            *(x.to(dtype) for x in (q, k, v)), rule, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
        )
        for dtype in (torch.float64, torch.bfloat16)
    )
    for splits in (None, 1, 4):
        out, lse = run(attention_ptx.Call(q, k, v, params), 64, q.shape[:2], splits)
        assert_as_accurate(out, exact[0], same[0])
        torch.testing.assert_close(lse.sum(-1).double(), exact[1], rtol=1e-5, atol=2e-5)
        assert (out[2:5] == 0).all()


def test_attention_few_reads_keys_once():
    """Heads that share keys read them together; no bank conflicts, no atomics."""
    case = Case(dtype="bf16", dim=128, heads=(8, 2), batch=1, lengths=(1, 512))
    inputs = build(case).map(lambda x: x.detach())
    call = attention_ptx.Call(inputs.q, inputs.k, inputs.v, case.params(inputs))
    run(call, 128, inputs.q.shape[:3], 4)
    few, added = (launch.counters for launch in attention_ptx.launches)
    for name in ("k", "v"):
        assert few.loads[name].sectors == 2 * 512 * 128 * 2 // SECTOR
    assert few.loads["q"].sectors == 4 * 8 * 128 * 2 // SECTOR  # each split
    assert few.stores["parts"].sectors == 8 * 4 * (128 * 4 // SECTOR + 1)
    assert added.stores["out"].sectors == 8 * 128 * 2 // SECTOR
    assert few.bank_conflict_ratio == 1.0
    assert few.global_atomics == added.global_atomics == 0


def splits_of(lengths, heads=(32, 8), batch=1, device="H100", **options):
    args = cuda_schedule.arguments(cuda_schedule.Shape(*heads, 128, lengths[1:], batch))
    args.max_q = lengths[0]
    for name, value in options.items():
        setattr(args, name, value)
    size = attention_ptx.split_keys(args, ptx.DEVICES[device])
    assert 4 * size <= 256 << 20
    return args.splits


def test_attention_few_choice():
    """Enough splits for every multiprocessor; few queries, many keys and plain calls alone."""
    assert splits_of((1, 8192)) == 32
    assert splits_of((16, 8192)) == 32
    assert splits_of((1, 8192), batch=64) == 1
    assert splits_of((17, 8192)) == splits_of((1, 255)) == 0
    assert splits_of((1, 8192), heads=(32, 32), batch=64) == 0
    assert splits_of((1, 8192), dtype=attention_ptx.TYPE_CODES[torch.float32]) == 0
    assert splits_of((1, 8192), seed=16) == splits_of((1, 8192), slopes=16) == 0
    assert splits_of((1, 8192), device="T4") == 0  # and the other kernels say why they cannot


def test_attention_few_is_what_decoding_takes():
    """A token of a sequence, as transformers' generate() asks for it: no mask, heads to share."""
    pytest.importorskip("transformers")
    from bigkernel.integrations.transformers import attention_forward

    torch.manual_seed(0)
    q = torch.randn(1, 8, 1, 64).bfloat16()
    k, v = (torch.randn(1, 2, 300, 64).bfloat16() for _ in range(2))
    with attention_ptx.emulated():
        out, _ = attention_forward(torch.nn.Module(), q, k, v, None)
    assert ["few" in launch.kernel for launch in attention_ptx.launches] == [True, True]
    exact, same = (
        attention_reference(*(x.to(dtype) for x in (q, k, v)), Rule(0.125))[0].transpose(1, 2)
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert_as_accurate(out, exact, same)
