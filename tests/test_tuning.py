"""Our kernel or torch's own code, by what was measured: `bigkernel.tuning`.

Feature list: the choice in attention and in models, and the calls for which torch's attention is
not right; `explain`; a file that is damaged, of another machine, or written by two at a time; what
overrides it; the table of results on record; torch.compile; `bigkernel tune-kernels`; the Trainer,
alone and on two ranks. Figures are given by the tests, so that they say the same on each machine.
"""

import json
import threading
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from test_trainer import on_two_ranks
from torch.nn import functional

import bigkernel
from bigkernel import _library, backend, registry, tuning
from bigkernel.cli import main
from bigkernel.integrations import native
from bigkernel.measure import Timing
from bigkernel.ops import attention, attention_varlen
from bigkernel.ops.attention import contest
from bigkernel.ops.attention.reference import Rule, attention_reference
from bigkernel.testing.tolerance import assert_as_accurate

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(_library.native is None, reason="the native library is not built")
SLOWER, FASTER = tuning.Figures(2e-3, 1e-3, True), tuning.Figures(1e-3, 2e-3, False)
ON_RECORD = tuning.ON_RECORD
CLASS = ("attention", "fp32 D16 S<=32 causal forward")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    """As a user's first process: choices are made, and nothing was measured or is on record."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_ignored", False)
    monkeypatch.setattr(tuning, "ON_RECORD", ())
    monkeypatch.setattr(backend, "_forced", None)
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def calls_of_torch(monkeypatch):
    """How often torch's attention was called."""
    calls = []
    theirs = functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return theirs(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    return calls


@pytest.fixture
def always_torch(monkeypatch):
    monkeypatch.setattr(tuning, "contested", lambda *_: True)
    monkeypatch.setattr(tuning, "takes_torch", lambda *_: True)


def keep(*entries):
    """Write (public function, class, figures) as a measurement of this machine."""
    return tuning.save("cpu", {(name, words): figures for name, words, figures in entries})


def qkv(length=24, heads=4, kv_heads=4, dim=16, dtype=torch.float32, batch=2, apart=True):
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        shape = (batch, length, count, dim) if apart else (batch, count, length, dim)
        x = torch.randn(shape, generator=generator).to(dtype)
        return (x.transpose(1, 2) if apart else x).requires_grad_()

    return draw(heads), draw(kv_heads), draw(kv_heads)


# The choice


def test_without_a_measurement_our_kernel_runs(calls_of_torch):
    attention(*qkv(), causal=True)
    assert not calls_of_torch
    assert ". " not in bigkernel.explain("attention", *qkv())


def test_torch_runs_the_classes_in_which_it_was_faster(calls_of_torch):
    keep((*CLASS, SLOWER), ("attention", CLASS[1].replace("forward", "training"), FASTER))
    q, k, v = qkv()
    with torch.no_grad():
        attention(q, k, v, causal=True)
        assert len(calls_of_torch) == 1
        attention(q, k, v)  # no mask
        attention(*qkv(length=33), causal=True)
        attention(*qkv(dim=32), causal=True)
        attention(*qkv(dtype=torch.bfloat16), causal=True)
    attention(q, k, v, causal=True)  # training
    assert len(calls_of_torch) == 1


def test_what_was_read_first_holds_for_the_process(calls_of_torch):
    with torch.no_grad():
        attention(*qkv(), causal=True)
        keep((*CLASS, SLOWER))
        attention(*qkv(), causal=True)
        assert not calls_of_torch
        tuning.forget()
        attention(*qkv(), causal=True)
        assert len(calls_of_torch) == 1


def test_another_instruction_set_has_figures_of_its_own(calls_of_torch):
    sets = bigkernel.cpu_isas()
    if len(sets) < 2:
        pytest.skip("there is one instruction set")
    with torch.no_grad(), bigkernel.use_cpu_isa(sets[0]):
        keep((*CLASS, SLOWER))
        tuning.forget()
        attention(*qkv(), causal=True)
        assert len(calls_of_torch) == 1
        with bigkernel.use_cpu_isa(sets[1]):
            attention(*qkv(), causal=True)
        assert len(calls_of_torch) == 1
        attention(*qkv(), causal=True)
        assert len(calls_of_torch) == 2


def test_a_backend_chosen_by_hand_overrides(calls_of_torch, monkeypatch):
    keep((*CLASS, SLOWER), ("rms_norm", "fp32 n<=2^16 forward", SLOWER))
    x = torch.ones(2, 8)
    assert not native.takes("rms_norm", x)
    with torch.no_grad(), bigkernel.use_backend("cpu"):
        attention(*qkv(), causal=True)
        assert native.takes("rms_norm", x)
        assert ". " not in bigkernel.explain("attention", *qkv())
    assert not calls_of_torch


def test_explain_names_the_figures():
    keep((*CLASS, SLOWER), ("glu", "fp32 n<=2^20 training", tuning.Figures(3e-3, 2e-3, True)))
    q, k, v = qkv()
    assert bigkernel.explain("attention", q, k, v) == (
        f"attention: cpu ({bigkernel._library.native.cpu_isa()}, {torch.get_num_threads()} "
        f"threads). {' '.join(CLASS)}: 2 ms, torch's scaled_dot_product_attention 1 ms, which is "
        "taken"
    )
    said = bigkernel.explain("glu", torch.ones(1024, 512))
    assert said.endswith("3 ms, act_fn(gate) * up 2 ms, which is what models keep")
    assert ". " not in bigkernel.explain("attention", *qkv(length=40))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "align": "bottom_right"},
        {"scale": 0.3},
        {"mask": True},
        {"causal": True, "kv_heads": 2},
        {"kv_heads": 1, "apart": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_torchs_attention_is_the_same_function(always_torch, calls_of_torch, options, dtype):
    """To twice the error of the same in its dtype; also where every key of a row is masked."""
    given = {name: options[name] for name in ("kv_heads", "apart") if name in options}
    options = {name: x for name, x in options.items() if name not in given}
    inputs = qkv(dtype=dtype, **given)
    if options.pop("mask", False):
        mask = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
        mask[1, :, :5] = False
        options["mask"] = mask
    out = attention(*inputs, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = [out, *torch.autograd.grad(out, inputs, dout)]
    assert len(calls_of_torch) == 1

    rule = Rule(
        options.get("scale", 0.25),
        options.get("causal", False),
        options.get("align", "top_left") == "bottom_right",
    )

    def plain(to):
        leaves = [x.detach().to(to).requires_grad_() for x in inputs]
        result, _ = attention_reference(*leaves, rule, mask=options.get("mask"))
        return [result, *torch.autograd.grad(result, leaves, dout.to(to))]

    for mine, exact, same in zip(got, plain(torch.float64), plain(dtype), strict=True):
        assert_as_accurate(mine.detach(), exact.detach(), same.detach())
    assert out.stride() == attention(*inputs, **options, return_lse=True)[0].stride()


def test_calls_that_torchs_attention_does_not_compute_are_ours(always_torch, calls_of_torch):
    q, k, v = qkv()
    slopes, lengths = torch.ones(4), torch.tensor([0, 10, 24], dtype=torch.int32)
    mask = torch.ones(24, 24, dtype=torch.bool)
    attention(q, k, v, return_lse=True)
    attention(q, k, v, window=(3, 0))
    attention(q, k, v, softcap=5.0)
    attention(q, k, v, alibi_slopes=slopes)
    attention(q, k, v, dropout_p=0.5, seed=1)
    attention(q, k, v, mask=mask.float())
    attention(q, k, v, mask=mask, causal=True)
    attention(q[:, :, :5], k, v, causal=True, align="bottom_right")
    attention(q, k, torch.cat((v, v), -1))
    attention(*qkv(length=0))
    packed = (x[0].transpose(0, 1) for x in (q, k, v))
    attention_varlen(*packed, lengths, lengths)
    assert not calls_of_torch
    attention(q, k, v)
    assert calls_of_torch


def test_models_keep_torchs_code_where_it_was_faster(monkeypatch, one_thread):
    from bigkernel.integrations import norms

    calls = []
    ours = norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", lambda *a, **k: calls.append(1) or ours(*a, **k))
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = bigkernel.patch(transformers.LlamaForCausalLM(config), quiet=True).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        before = model(tokens).logits
        assert calls
        keep(("rms_norm", "fp32 n<=2^16 forward", SLOWER))
        tuning.forget()
        calls.clear()
        torch.testing.assert_close(model(tokens).logits, before)
        assert not calls
    model(tokens)  # training: not measured
    assert calls


def test_logits_that_would_take_much_memory_are_ours_whatever_was_measured():
    keep(("linear_cross_entropy", "bf16 n>2^20 forward", SLOWER))
    op, x = "linear_cross_entropy", torch.ones(1, 8)
    assert not native.takes(op, x, size=1 << 27, dtype=torch.bfloat16)
    assert native.takes(op, x, size=(1 << 28) + 1, dtype=torch.bfloat16)
    assert native.takes(op, x, size=1 << 27)
    assert native.takes(op, x, size=1 << 27, dtype=torch.float16)


def test_classes_by_size_and_mode():
    x, w = torch.ones(4), torch.ones(4, requires_grad=True)
    words = tuning.size_class
    assert words(x.dtype, 1 << 16, [x]) == "fp32 n<=2^16 forward"
    assert words(x.dtype, (1 << 16) + 1, [x, None, w]) == "fp32 n<=2^20 training"
    assert words(torch.float16, (1 << 20) + 1, [x]) == "fp16 n>2^20 forward"
    with torch.no_grad():
        assert words(x.dtype, 1, [x, w]) == "fp32 n<=2^16 forward"


# The file


def test_the_file_lies_in_the_users_cache(monkeypatch, tmp_path):
    file = keep((*CLASS, SLOWER))
    assert file.parent == tmp_path / "cache" / "bigkernel"
    assert tuning.load("cpu")[1] == {CLASS: SLOWER}
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which counts for nothing
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.path("cpu").parent == tmp_path / ".cache" / "bigkernel"


def test_figures_are_added_to_those_that_are_there():
    keep((*CLASS, SLOWER), ("glu", "x", SLOWER))
    keep(("glu", "x", FASTER))
    assert tuning.load("cpu")[1] == {CLASS: SLOWER, ("glu", "x"): FASTER}


def _damages():
    whole = {"format": 1, "time": "now", "figures": {"attention": {CLASS[1]: [2e-3, 1e-3, True]}}}

    def of(**changes):
        return lambda facts: json.dumps({**whole, "facts": facts, **changes})

    yield "cut off", lambda facts: of()(facts)[:-20], "JSONDecodeError"
    yield "a list", lambda facts: "[1]", "TypeError"
    yield "no figures", of(figures=None), "AttributeError"
    yield "one number", of(figures={"attention": {CLASS[1]: [1.0]}}), "ValueError"
    yield "words", of(figures={"attention": {CLASS[1]: ["a", "b", "c"]}}), "ValueError"
    yield "nought seconds", of(figures={"attention": {CLASS[1]: [0, 1, True]}}), "not positive"
    yield "NaN", of(figures={"attention": {CLASS[1]: [1, float("nan"), True]}}), "not positive"
    yield "format", of(format=2), "another machine, version or build"
    yield "machine", lambda facts: of(facts={**facts, "cpu": "i386"})(facts), "another machine"
    yield "build", lambda facts: of(facts={**facts, "build": "older"})(facts), "another machine"
    yield "no text", lambda facts: b"\xff\xfe\x00", "decode"


@pytest.mark.parametrize("case", list(_damages()), ids=lambda case: case[0])
def test_a_damaged_or_foreign_file_is_passed_over_with_a_sentence(case, calls_of_torch):
    _, content, why = case
    file = keep((*CLASS, SLOWER))
    content = content(tuning.facts("cpu"))
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with torch.no_grad(), pytest.warns(UserWarning, match=f"is ignored.*{why}.*tune-kernels"):
        attention(*qkv(), causal=True)
    assert not calls_of_torch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*qkv(), causal=True)  # said once
        keep((*CLASS, SLOWER))  # and written anew
        assert tuning.load("cpu")[1] == {CLASS: SLOWER}


def test_other_threads_or_settings_are_another_measurement(monkeypatch, one_thread):
    file = keep((*CLASS, SLOWER))
    torch.set_num_threads(2)
    assert tuning.path("cpu") != file
    torch.set_num_threads(1)
    assert tuning.path("cpu") == file
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert tuning.path("cpu") != file


def test_a_home_that_is_not_there_is_no_error(monkeypatch, calls_of_torch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*qkv(), causal=True)
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        keep((*CLASS, SLOWER))


def test_a_reader_beside_two_writers_sees_whole_files():
    stop = threading.Event()
    failures = []

    def write(name):
        for i in range(40):
            keep((name, f"class {i % 5}", SLOWER), *[("glu", f"{j}", FASTER) for j in range(50)])

    def read():
        while not stop.is_set():
            try:
                assert len(tuning.load("cpu")[1]) >= 50
            except (Exception, Warning) as error:
                failures.append(error)

    keep(*[("glu", f"{j}", FASTER) for j in range(50)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = threading.Thread(target=read)
        writers = [threading.Thread(target=write, args=(name,)) for name in ("a", "b")]
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        reader.join()
    assert not failures
    assert [p.suffix for p in tuning.path("cpu").parent.iterdir()] == [".json"]


# Measuring


def test_torch_has_to_be_faster_beyond_the_spread():
    def judged(ours, torchs):
        return tuning._judge(Timing(ours), Timing(torchs)).takes_torch

    assert judged((1.0, 1.01, 1.02), (0.9, 0.91, 0.92))
    assert not judged((1.0, 1.01, 1.02), (0.97, 0.98, 0.99))  # by less than 5%
    assert not judged((0.8, 1.01, 1.02), (0.9, 0.91, 1.2))  # they overlap
    assert not judged((0.9, 0.91, 0.92), (1.0, 1.01, 1.02))


def test_both_sides_of_every_contest_compute_the_same(monkeypatch, one_thread):
    monkeypatch.setattr(tuning, "_ELEMENTS", dict.fromkeys(tuning._ELEMENTS, 1 << 14))
    monkeypatch.setattr(contest, "_LENGTHS", dict.fromkeys(contest._LENGTHS, 24))
    wanted = tuning.classes([op.noun for op in registry.every()], "cpu")
    contests = {name: c for op in registry.every() for name, c in op.contests.items()}
    seen = set()
    for name, _, words in wanted:
        kind = (name, *(w for w in words.split() if w[0] not in "SDn"))
        if kind in seen:
            continue
        seen.add(kind)
        with tuning.noting() as called:
            ours, theirs = (run() for run in contests[name].make(words, torch.device("cpu")))
        for mine, other in zip(ours, theirs, strict=True):
            tolerance = 0.2 if "bf16" in words else 1e-4  # of sums over many rows
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
        if name == "attention":  # the call is of the class that it stands for
            got = {w.split()[3:] == words.split()[3:] for _, _, w in called}
            assert got == {True}
    assert len(seen) == 12 + 7 * 4


def test_what_there_is_no_time_for_is_left_out():
    wanted = tuning.classes(["glu"], "cpu")
    assert len(wanted) == 8
    assert tuning.measure(wanted, seconds=0.0) == {}
    one = ("rms_norm", "cpu", "fp32 n<=2^16 forward")
    found = tuning.measure([one], tuning.QUICK, seconds=5.0)
    assert found[one].ours > 0
    assert found[one].torch > 0


def test_every_op_has_a_contest_or_says_why_not():
    for op in registry.every():
        if not op.noun.startswith("test_only"):
            assert bool(op.contests) != bool(op.no_contest), op.noun
            assert set(op.contests) <= {*op.in_models, op.noun}


RESULTS = sorted((ROOT / "benchmarks" / "results").glob("tune_*.json"))


def test_the_table_is_that_of_the_results_on_record():
    entries, shown = list(ON_RECORD), []
    for file in RESULTS:
        content = json.loads(file.read_text())
        facts = content["facts"]
        for entry in entries:
            if any(facts[name] not in values for name, values in entry.facts.items()):
                continue
            one = tuning._Choices.__new__(tuning._Choices)
            one.on_record = [entry]
            found = {
                words: theirs / ours
                for words, (ours, theirs, _) in content["figures"][entry.name].items()
                if one.recorded(entry.name, words)
            }
            assert found
            assert max(found.values()) < 1, (file.name, entry, found)
            shown.append(entry)
    assert [e for e in entries if e not in shown] == []


def test_portable_kernels_beside_a_wider_torch_are_left(monkeypatch, calls_of_torch):
    facts = tuning.facts("cpu")
    monkeypatch.setattr(tuning, "ON_RECORD", ON_RECORD)
    for isa, theirs, expected in (
        ("portable", "AVX512", 1),
        ("portable", "AVX2", 1),
        ("portable", "DEFAULT", 0),
        ("avx512", "AVX512", 0),
    ):
        monkeypatch.setattr(
            tuning, "facts", lambda _, i=isa, t=theirs: {**facts, "isa": i, "torch_isa": t}
        )
        monkeypatch.setattr(tuning, "load", lambda _: None)
        tuning.forget()
        said = bigkernel.explain("attention", *qkv())
        assert said.count("so torch's scaled_dot_product_attention is taken") == expected, said
        assert native.takes("cross_entropy", torch.ones(1 << 9, 1 << 9)) != bool(expected)
        # What was measured here counts for more.
        tuning.adopt("cpu", {CLASS: FASTER})
        assert not tuning.takes_torch("attention", "cpu", CLASS[1])
    tuning.forget()


# torch.compile


def test_compiled_code_takes_the_choice_and_is_not_compiled_again():
    torch._dynamo.reset()
    graphs = []

    def keeps(graph, _):
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, causal=True), fullgraph=True, backend=keeps
    )
    keep((*CLASS, SLOWER))
    inputs = [x.detach() for x in qkv()]
    out = compiled(*inputs)
    assert "scaled_dot_product_attention" in graphs[0]
    torch.testing.assert_close(out, attention(*inputs, causal=True, return_lse=True)[0])
    tuning.contested("rms_norm", "cpu")  # more is known now
    compiled(*inputs)
    tuning.forget()
    compiled(*inputs)
    assert len(graphs) == 1


def test_compiled_code_for_all_lengths_is_ours_and_compiled_once(always_torch):
    torch._dynamo.reset()
    graphs = []

    def keeps(graph, _):
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, causal=True),
        fullgraph=True,
        dynamic=True,
        backend=keeps,
    )
    for length in (24, 100, 600):
        inputs = [x.detach() for x in qkv(length=length)]
        out = compiled(*inputs)
        torch.testing.assert_close(out, attention(*inputs, causal=True, return_lse=True)[0])
    assert len(graphs) == 1
    assert "bigkernel.attention_fwd" in graphs[0]


# The command


@pytest.fixture
def given(monkeypatch):
    """`measure` finds torch faster in attention and ours elsewhere."""
    asked = []

    def measure(wanted, plan=None, seconds=None, tell=None):
        asked.append(list(wanted))
        found = {c: SLOWER if c[0] == "attention" else FASTER for c in wanted}
        for one, figures in found.items():
            if tell is not None:
                tell(one, figures)
        return found

    monkeypatch.setattr(tuning, "measure", measure)
    return asked


def test_command_measures_keeps_and_forgets(given, capsys):
    assert main(["tune-kernels", "attention", "glu", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "attention fp32 D64 S<=32 full forward" in out
    assert "torch's own code is taken for 96 of 104 classes of calls" in out
    assert str(tuning.path("cpu")) in out
    assert tuning.takes_torch("attention", "cpu", "bf16 D128 S>512 causal training")
    assert main(["env"]) == 0
    assert "torch's code for 96 of 104 classes" in capsys.readouterr().out
    assert main(["tune-kernels", "--clear"]) == 0
    assert not tuning.path("cpu").exists()
    assert not tuning.contested("attention", "cpu")
    assert main(["tune-kernels", "--clear"]) == 0
    assert capsys.readouterr().out == "forgotten\nnothing was measured on this machine\n"
    assert main(["env"]) == 0
    assert "not measured (`bigkernel tune-kernels`)" in capsys.readouterr().out


def test_command_measures_every_contest(given):
    assert main(["tune-kernels"]) == 0
    assert {name for name, _, _ in given[0]} == {
        "attention", "bias_act", "cross_entropy", "glu", "layer_norm", "linear_cross_entropy",
        "rms_norm", "rope",
    }  # fmt: skip


def test_command_refuses_what_it_cannot_measure(given, capsys, monkeypatch, tmp_path):
    assert main(["tune-kernels", "augment"]) == 2
    assert "nothing to choose for 'augment': torch's side is a pass" in capsys.readouterr().err
    assert main(["tune-kernels", "sorting"]) == 2
    assert "nothing to choose for 'sorting'. There is for: attention," in capsys.readouterr().err
    with bigkernel.use_backend("torch"):
        assert main(["tune-kernels"]) == 2
    assert "BIGKERNEL_BACKEND has chosen" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["tune-kernels", "glu"]) == 1
    assert "could not be kept" in capsys.readouterr().err
    assert given


# The Trainer


def trainer(folder, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    rows = torch.arange(16 * 12).reshape(16, 12) % 32
    args = bigkernel.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, **options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    return bigkernel.Trainer(transformers.LlamaForCausalLM(config), args, train_dataset=data)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_trainer_measures_what_the_first_batch_calls(
    given, calls_of_torch, tmp_path, capsys, one_thread
):
    plain = trainer(tmp_path / "run", announce=False)
    plain.train()
    assert given == []
    tuned = trainer(tmp_path / "run", tune_kernels=True)
    tuned.train()
    assert given == [
        [
            ("attention", "cpu", "fp32 D16 S<=32 causal training"),
            ("rms_norm", "cpu", "fp32 n<=2^16 training"),
            ("rope", "cpu", "fp32 n<=2^16 training"),
        ]
    ]
    assert len(calls_of_torch) == 2  # from the second batch on
    said = capsys.readouterr().out
    assert "timed 3 of 3 classes of calls" in said
    assert "taken for: attention fp32 D16 S<=32 causal training" in said
    assert losses(tuned) == pytest.approx(losses(plain), rel=1e-4)
    # Another process has them from its first batch on.
    tuning.forget()
    again = trainer(tmp_path / "run", tune_kernels=True)
    again.train()
    assert given[1] == []
    assert len(calls_of_torch) == 5


def test_trainer_measures_without_touching_its_numbers(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(tuning, "MARGIN", 1e9)  # ours is kept
    # A second has no room for all classes where other processes have the processor.
    monkeypatch.setattr("bigkernel.trainer._TUNING_SECONDS", 3.0)
    plain = trainer(tmp_path / "run", announce=False)
    plain.train()
    tuned = trainer(tmp_path / "run", tune_kernels=True, announce=False)
    tuned.train()
    assert losses(tuned) == losses(plain)
    name = "fp32 n<=2^16 training"
    assert tuning.load("cpu")[1]["rope", name].ours > 0


def test_trainer_under_a_backend_chosen_by_hand_measures_nothing(given, tmp_path, one_thread):
    with bigkernel.use_backend("cpu"):
        trainer(tmp_path / "run", tune_kernels=True, announce=False).train()
    assert given == []


RANKS = """
import sys, os
from pathlib import Path
os.environ["XDG_CACHE_HOME"] = str(Path(sys.argv[1], "cache"))
import test_tuning
from bigkernel import tuning

rank = int(os.environ["RANK"])

def measure(wanted, *_, **__):
    assert rank == 0, "one process measures"
    return {c: tuning.Figures(2.0, 1.0, c[0] == "rope") for c in wanted}

tuning.measure = measure
if rank == 1:  # what only it knows
    tuning.adopt("cpu", {("rms_norm", "fp32 n<=2^16 training"): tuning.Figures(2.0, 1.0, True)})
test_tuning.trainer(Path(sys.argv[1], "run"), tune_kernels=True, announce=False).train()
chosen = sorted(name for (name, _), figures in tuning.known("cpu").items() if figures.takes_torch)
Path(sys.argv[1], f"chosen{rank}").write_text(" ".join(chosen))
"""


@pytest.mark.slow
def test_two_ranks_choose_as_the_first(tmp_path):
    on_two_ranks(tmp_path, RANKS, tmp_path)
    assert [(tmp_path / f"chosen{rank}").read_text() for rank in (0, 1)] == ["rope", "rope"]
