"""The Trainer on several ranks (gloo, CPU) against one process: DDP and FSDP2.

The same documents in a step give the same losses on 1, 2 and 4 ranks, packed, with gradients that
are accumulated and clipped; under FSDP2 each rank holds its share of parameters and moments;
checkpoints go on at any number of ranks; what is not supported is refused before the first step;
what is sent is what the cost model of a step says.
The ranks are started once (`ranks.py`); each test reads what one part of their work found.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
import transformers
from families import DECODER

from benchmarks import scaling
from bigkernel import checkpoint, utilization
from bigkernel.cli import main
from bigkernel.integrations import sharding

HERE = Path(__file__).resolve().parent
# Losses are printed by ranks in float32, and sums over them have another order.
CLOSE = {"rel": 2e-6, "abs": 2e-6}
# Ranks are started once, by one worker.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("ranks")]


def start(world, script, *arguments, launcher=(), variables=None):
    """Run a Python script on so many ranks."""
    options = ("--standalone", "--nproc-per-node", str(world), *launcher)
    return launch(["torchrun", *options, str(script), *map(str, arguments)], variables)


LAUNCHERS = {
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.accelerate_cli",
}


def launch(words, variables=None):
    """Run a command that begins with a launcher, without looking for it on the path."""
    return subprocess.run(
        [sys.executable, "-m", LAUNCHERS[words[0]], *words[1:]],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent))),
            "OMP_NUM_THREADS": "1",
            **(variables or {}),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


class Ranks:
    """A folder where one process has trained, and what ranks have found there."""

    def __init__(self, folder):
        self.folder = folder
        trainer = ranks.text_trainer(folder / "one", 1, save_strategy="steps")
        trainer.train()
        self.one = ranks.figures(trainer)

    def run(self, world, *parts):
        done = start(world, HERE / "ranks.py", self.folder, *parts)
        assert done.returncode == 0, done.stderr[-4000:]

    def found(self, part, world=2):
        """What the first rank found; the others found the same figures, and said nothing."""
        all_ = [
            json.loads((self.folder / f"{part}-{world}-{rank}.json").read_text())
            for rank in range(world)
        ]
        assert all(one.get("figures") == all_[0].get("figures") for one in all_)
        assert not any(one["said"] for one in all_), part
        return all_[0]

    def held(self, part, world):
        return [
            json.loads((self.folder / f"{part}-{world}-{rank}.json").read_text())["held"]
            for rank in range(world)
        ]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    trained = "ddp fsdp2 again from_one muon images uneven reads streams sent"
    made.run(2, *trained.split(), "evaluated", "beside_theirs", "signalled", "refused")
    return made


@pytest.fixture(scope="module")
def more(two):
    two.run(2, *["ddp_from_pieces", "shown", "bf16", "twice", "larger"])
    return two


@pytest.fixture(scope="module")
def four(two):
    one = ranks.text_trainer(two.folder / "from-two", 1, save_strategy="steps")
    one.train(resume_from_checkpoint=str(two.folder / "fsdp2-2" / "checkpoint-2"))
    parts = "ddp fsdp2 from_two from_one from_one_from_two larger uneven sent"
    two.run(4, *parts.split())
    return two


def curve(figures):
    return [(step, name, value) for step, name, value in figures if name != "eval_loss"]


def assert_close(a, b, **tolerance):
    a, b = curve(a), curve(b)
    assert [tuple(point[:2]) for point in a] == [tuple(point[:2]) for point in b]
    for (step, name, x), (_, _, y) in zip(a, b, strict=True):
        assert x == pytest.approx(y, **(tolerance or CLOSE)), f"{name} of step {step}"


# The same curve


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_process(two, kind):
    """Documents of many lengths: the ranks' losses count by their tokens."""
    assert len(curve(two.one)) == 2 * ranks.STEPS
    assert all(norm > 0.5 for _, name, norm in two.one if name == "grad_norm")  # it clips
    found = two.found(kind)
    assert_close(found["figures"], two.one)
    wrapped = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}
    assert found["held"]["model"] == wrapped[kind]


@pytest.mark.slow
def test_accelerate_launch_trains_as_torchrun(two, tmp_path):
    """By the documented options; on CPUs too, whatever their name says."""
    page = (HERE.parent / "docs" / "cluster.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("accelerate launch"))
    *options, script = line.split()
    assert script == "script.py"
    done = launch([*options, str(HERE / "ranks.py"), str(tmp_path), "ddp", "fsdp2"])
    assert done.returncode == 0, done.stderr[-4000:]
    for kind in ("ddp", "fsdp2"):
        for rank in (0, 1):
            found = json.loads((tmp_path / f"{kind}-2-{rank}.json").read_text())
            assert found["figures"] == two.found(kind)["figures"]
            assert all(cut == (kind == "fsdp2") for cut in found["held"]["cut"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_four_ranks_train_as_one_process(four, kind):
    assert_close(four.found(kind, 4)["figures"], four.one)


def test_muon_trains_in_pieces_as_in_one_process(two, tmp_path):
    found = two.found("muon")
    assert found["optimizer"] == "Muon "
    trainer = ranks.text_trainer(tmp_path, 1, optim="muon", max_steps=3)
    trainer.train()
    assert_close(found["figures"], ranks.figures(trainer), rel=1e-5)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_last_batches_of_an_epoch_may_not_be_enough_for_all_ranks(request, world):
    """The ranks do not wait for each other, and both ways make the same steps."""
    made = request.getfixturevalue("two" if world == 2 else "four")
    found = made.found("uneven", world)
    assert [step for step, name, _ in found["ddp"] if name == "loss"] == [1, 2, 3, 4, 5, 6]
    assert_close(found["fsdp2"], found["ddp"])


# Figures


def test_every_figure_is_that_of_one_process(two, tmp_path):
    """Parts that are summed, and wholes that are not."""
    found = two.found("evaluated")["figures"]
    parts = [ranks.text_figures(rank, 2) for rank in (0, 1)]
    for name in ("tokens", "bytes"):
        assert found["text"][name] == sum(part[name] for part in parts)
    nats = sum(part["all"]["loss"] * part["tokens"] for part in parts)
    assert found["text"]["all"]["nats_per_byte"] == pytest.approx(nats / found["text"]["bytes"])
    assert found["text"]["all"]["loss"] == pytest.approx(nats / found["text"]["tokens"])
    one = json.loads(json.dumps(ranks.image_figures(slice(None))))
    for each in (found["images"], found["lopsided"]):
        assert each.keys() == one.keys()
        for name, value in one.items():
            close = value if name in ("matrix", "curves") else pytest.approx(value)
            assert each[name] == close, name
    assert found["command"] == json.loads(json.dumps(ranks.command_figures()))
    alone = ranks.trainer_figures(tmp_path)
    assert found["trainer"] == pytest.approx(alone, rel=1e-5)


def test_figures_of_two_ranks_are_transformers(two):
    theirs, ours = two.found("beside_theirs")["logs"]
    assert 4 * 2 * 16 < ours[1]["num_input_tokens_seen"] <= 2 * 4 * 2 * 16
    for a, b in zip(ours, theirs, strict=True):
        assert set(a) - {"tokens_per_second", "memory_bytes", "mfu"} == set(b)
        for name, value in b.items():
            if not any(word in name for word in ("runtime", "per_second")):
                assert a[name] == pytest.approx(value, rel=1e-4), name


# In pieces


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_holds_its_share(request, world):
    """Parameters and moments are DTensors, and 1/N of the bytes but for what does not divide."""
    made = request.getfixturevalue("two" if world == 2 else "four")
    held = made.held("fsdp2", world)
    for mine in held:
        assert mine["cut"]
        assert all(mine["cut"])
        assert all(mine["moments cut"])
        assert mine["parameters"] == pytest.approx(mine["whole"] / world, rel=0.05)
        assert mine["moments"] == 2 * mine["parameters"]
    assert sum(mine["parameters"] for mine in held) == held[0]["whole"]
    for mine in made.held("ddp", world):
        assert mine["parameters"] == mine["whole"]
        assert not any(mine["cut"])


# What is sent


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_of_a_step_are_those_of_the_cost_model(request, world):
    """To the byte, of every collective; docs/scaling.md builds on it."""
    made = request.getfixturevalue("two" if world == 2 else "four")
    units = scaling.Decoder(
        "small",
        DECODER["vocab_size"],
        DECODER["hidden_size"],
        DECODER["intermediate_size"],
        DECODER["num_hidden_layers"],
        DECODER["num_attention_heads"],
        DECODER["num_key_value_heads"],
    ).units()
    for rank in range(world):
        all_ = json.loads((made.folder / f"sent-{world}-{rank}.json").read_text())
        assert len(all_["found"]) == 5
        for case, buffers, steps, between in all_["found"]:
            expected = scaling.messages(units, ranks=world, **case)
            if case["kind"] == "ddp":  # as small as they are: the angles of the rotary embedding
                expected["broadcast"] = buffers
            assert steps == [expected] * 3, case
            # The step's tokens and signals as int64, and with the log two numbers of float32.
            assert between == [{"all_gather of numbers": world * 24}] * 2, case


@pytest.mark.parametrize("model", scaling.MODELS, ids=lambda model: model.name)
def test_models_on_paper_are_transformers_own(model):
    with torch.device("meta"):
        there = transformers.LlamaForCausalLM(model.config())
    assert model.parameters() == sum(p.numel() for p in there.parameters())
    shapes = [shape for unit in model.units() for shape in unit.shapes]
    own = [(len(p), p[0].numel()) for p in there.parameters()]
    assert sorted(shapes) == sorted(own)
    work = utilization.work_of(there)
    once = model.flops(8192, 4096) / (4 / 3 if model.checkpoints else 1)
    assert once == pytest.approx(work.flops(2, 8192, 2 * 4096**2), rel=1e-12)


def test_a_step_costs_what_its_parts_do():
    """Bytes in rings by hand; nothing is sent by one; more to send takes longer."""
    units = [scaling.Unit(((5, 3),), again=True), scaling.Unit(((4, 2),), again=False)]
    assert scaling.wire(scaling.messages(units, "ddp", 2), 2) == 4 * (15 + 8) + 4 * 2
    # Of 5 rows in 2 ranks each has 3, one of them empty.
    sizes = scaling.messages(units, "fsdp2", 2, batches=3, parameter=2)
    assert sizes == {"all_gather": 3 * 2 * (18 * 2 + 8), "reduce_scatter": 26 * 4, "all_reduce": 8}
    assert scaling.wire(sizes, 2) == sizes["all_gather"] / 2 + sizes["reduce_scatter"] / 2 + 8
    assert scaling.wire(sizes, 1) == 0
    for gpu in scaling.GPUS:
        for kind in scaling.KINDS:
            steps = [scaling.step(scaling.MODELS[0], gpu, kind, n, 8192, 8192) for n in (8, 64)]
            assert steps[0].communicating < steps[1].communicating
            assert all(step.computing <= step.at_best <= step.at_worst for step in steps)


# Checkpoints


def test_two_ranks_go_on_bit_for_bit(two):
    whole, again = two.found("fsdp2"), two.found("again")
    assert curve(again["figures"]) == curve(whole["figures"])


@pytest.mark.parametrize("world", [1, 2])
def test_what_was_trained_on_is_not_read_again(two, tmp_path, world):
    """In the middle of the second epoch, packed, with workers and without: bit for bit."""
    if world == 1:
        all_ = [ranks.reads(tmp_path)]
    else:
        all_ = [json.loads((two.folder / f"reads-2-{rank}.json").read_text()) for rank in (0, 1)]
    for mine in all_:
        share = ranks.GLOBAL_BATCH // world
        assert len(mine["whole"]) == ranks.STEPS * share
        # The step of the checkpoint, 4, is the first one of the second epoch of three.
        rest = mine["whole"][4 * share :]
        assert mine["again, 0 workers"] == rest
        assert sorted(mine["again, 2 workers"]) == sorted(rest)
        for again in ("again, 0 workers", "again, 2 workers"):
            assert curve(mine["figures"][again]) == curve(mine["figures"]["whole"])
    read = [document for mine in all_ for document in mine["whole"][-3 * share :]]
    assert sorted(read) == list(range(3 * ranks.GLOBAL_BATCH))


def test_streams_are_entered_in_the_middle(two, tmp_path):
    """Dealt out by one rank, or read by each; on two ranks bit for bit, and in one process."""
    for kind in ("dealt", "cut"):
        shutil.copytree(two.folder / f"stream-{kind}-2", tmp_path / f"stream-{kind}-2")
    one = ranks.in_streams(tmp_path, 2, resume=True)
    for rank in (0, 1):
        found = json.loads((two.folder / f"streams-2-{rank}.json").read_text())
        whole, again = found["whole"], found["again"]
        assert again["figures"] == whole["figures"]
        for kind in ("dealt", "cut"):
            reads = rank == 0 or kind == "cut"
            rest = whole[kind][4 * ranks.GLOBAL_BATCH :]
            assert again[kind] == rest
            assert bool(rest) == reads
            assert_close(one["figures"][kind], whole["figures"][kind])


def test_two_ranks_go_on_from_one_process(two):
    assert_close(two.found("from_one")["figures"], two.one)


def test_one_process_goes_on_from_two_ranks(two, tmp_path):
    """And the checkpoint is whole, says which files it has, and holds a model that loads."""
    source = two.folder / "fsdp2-2" / "checkpoint-4"
    checkpoint.verify_checkpoint(source)
    files = {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()}
    assert {"model.safetensors", "config.json", "optimizer_groups.pt", "scheduler.pt"} <= files
    pieces = sorted(name for name in files if name.startswith("optimizer/"))
    assert len(pieces) == 2
    trainer = ranks.text_trainer(tmp_path, 1)
    trainer.train(resume_from_checkpoint=str(source))
    assert_close(ranks.figures(trainer), two.one)
    model = transformers.LlamaForCausalLM.from_pretrained(two.folder / "fsdp2-2" / "checkpoint-6")
    assert json.loads((source / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    for p, q in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert all(name.endswith(".safetensors") for name in pieces)


@pytest.mark.slow
def test_other_ways_through_the_trainer(more, tmp_path):
    """DDP from pieces; gradients shown to a callback, clipped; bf16; twice; tied weights."""
    assert_close(more.found("ddp_from_pieces")["figures"], more.one)
    shown = more.found("shown")
    assert_close(shown["figures"], more.one[:4])
    assert shown["norms"] == pytest.approx([0.5, 0.5], abs=1e-5)
    half = more.found("bf16")
    assert half["dtypes"] == ["torch.float32"]
    one = {}
    for bf16 in (True, False):
        trainer = ranks.text_trainer(tmp_path / str(bf16), 1, bf16=bf16, max_steps=3)
        trainer.train()
        one[bf16] = ranks.figures(trainer)
    assert_close(half["figures"], one[True], rel=5e-3)  # about a unit in the last place
    for (*_, a), (*_, b) in zip(half["figures"], one[False], strict=True):
        assert a != b
    # The second time it begins where the first ended.
    first, second = more.one[0], more.found("twice")["figures"][0]
    assert second[2] < first[2] - 0.2
    assert all(more.found("twice")["held"]["cut"])
    assert all(more.found("larger")["held"]["cut"])


@pytest.mark.slow
def test_four_ranks_go_on_from_two_or_one_and_one_process_from_four(four, tmp_path):
    assert_close(four.found("from_two", 4)["figures"], four.one)
    assert_close(four.found("from_one", 4)["figures"], four.one)
    assert_close(four.found("from_one_from_two", 4)["figures"], four.one)
    trainer = ranks.text_trainer(tmp_path, 1)
    trainer.train(resume_from_checkpoint=str(four.folder / "fsdp2-4" / "checkpoint-4"))
    assert_close(ranks.figures(trainer), four.one)
    found = four.found("larger", 4)
    assert all(found["held"]["cut"])


def test_weights_saved_under_other_names_and_the_best_model(two, tmp_path):
    """Of images that are augmented, each with the random numbers of its place in the dataset."""
    found = two.found("images")
    assert found["again"] == found["figures"]
    evaluated = [value for _, name, value in found["figures"] if name == "eval_loss"]
    assert found["best"] == min(evaluated)
    one = ranks.image_trainer(tmp_path, 1)
    one.train()
    assert_close(found["figures"], ranks.figures(one))


def test_a_signal_to_one_rank_stops_all_after_the_same_step(two):
    last = two.folder / "signalled" / "checkpoint-2"
    assert two.found("signalled")["figures"] == ["SIGUSR1", 2, str(last)]
    checkpoint.verify_checkpoint(last)


# What is not supported


def test_what_is_not_supported_in_pieces_is_refused(two):
    found = two.found("refused")
    messages = {
        "version 1": "on CPUs that would end as DistributedDataParallel",
        "launcher": "version 1 of FSDP is not supported on CPUs",
        "offload": "nowhere to offload to",
        "hybrid": "a mesh of its own (dp_replicate_size=2; HSDP is such a one)",
        "mesh": "a mesh of its own (tp_size=2;",
        "sharded": "the optimizer in pieces anyway",
        "batch norm": "running statistics (norm, a BatchNorm1d)",
        "another Trainer": "another Trainer of this process has made accelerate work without",
    }
    for name, message in messages.items():
        assert found[name].startswith("ShardingError: "), found[name]
        assert message in found[name]
    assert found["written"] == []
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    with pytest.raises(sharding.ShardingError, match=r"21 parameters, such as model\.embed"):
        sharding.check_sharded(model)
    sharding.check_model(model, None)


# A rank that dies


DIES = """
import json, os, signal, sys, time
from pathlib import Path
import ranks, torch
from bigkernel import Trainer

folder, kind, moment, dying, late = Path(sys.argv[1]), *sys.argv[2:]
rank = os.environ["RANK"]
step, save = Trainer.training_step, Trainer._save_rng_state

def die_once():
    if rank == dying and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)

def training_step(self, *arguments):
    if moment == "step" and self.state.global_step == 5 and self.accelerator.sync_gradients:
        die_once()
    return step(self, *arguments)

def save_rng_state(self, into):
    if moment == "save" and "checkpoint-4" in str(into):
        die_once()
    save(self, into)

Trainer.training_step, Trainer._save_rng_state = training_step, save_rng_state
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" and rank == late:
    time.sleep(5)  # the others look for it where it was before
torch.distributed.init_process_group("gloo")
trainer = ranks.text_trainer(folder / "run", 2, **ranks.KINDS[kind], save_strategy="steps")
trainer.train(resume_from_checkpoint="auto")
if rank == "0":
    (folder / "figures.json").write_text(json.dumps(ranks.figures(trainer)))
torch.distributed.destroy_process_group()
os._exit(0)
"""


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "moment", "dying", "late"),
    [
        slow("ddp", "step", 1, None),
        slow("ddp", "step", 0, None),
        slow("ddp", "save", 0, 1),
        slow("ddp", "save", 1, None),
        slow("fsdp2", "step", 1, None),
        slow("fsdp2", "save", 0, None),
        slow("fsdp2", "save", 1, 0),
        slow("fsdp2", "save", 1, 1),
    ],
)
def test_a_rank_that_is_killed_leaves_the_checkpoint_before(
    two, tmp_path, kind, moment, dying, late
):
    """torchrun starts all again, which go on from it as if nothing had been."""
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the Trainer asks for
    restarts = ("--max-restarts", "1")
    case = (tmp_path, kind, moment, dying, late)
    done = start(2, script, *case, launcher=restarts, variables=fresh)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "keeps the addresses" not in done.stderr
    assert (tmp_path / "died").exists()
    before = tmp_path / "run" / f"checkpoint-{4 if moment == 'step' else 2}"
    assert f"resuming from {before}" in done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert curve(figures) == curve(two.found(kind)["figures"])
    left = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert left == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_restarts_that_keep_addresses_of_dead_processes_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert sharding.restarts_meet_the_dead() is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    ranks.text_trainer(tmp_path, 1, max_steps=1).train()
    said = capsys.readouterr().err
    assert said.count("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --standalone") == 1
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")  # as the switch makes it
    assert sharding.restarts_meet_the_dead() is None


# The command line


SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """What a run of the command line is told, and its folder."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 120)
    (folder / "model.json").write_text(json.dumps(SHAPE))
    return [
        *("train", "text", "--data", str(folder / "text.txt"), "--max-length", "32"),
        *("--model", str(folder / "model.json"), "--threads", "1", "--batch-size", "4"),
    ]


def metrics(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        [record["step"], name, record[name]]
        for record in map(json.loads, lines)
        for name in ("loss", "grad_norm", "eval_loss")
        if name in record
    ]


def test_the_command_line_trains_on_two_ranks_as_in_one_process(settings, tmp_path, capsys):
    """By the README's command. Rank 0 alone writes and speaks; the run goes on in one process."""
    one, both = tmp_path / "one", tmp_path / "both"
    command = [*settings, "--max-steps", "4", "--save-steps", "2"]
    assert main([*command, "--out", str(one)]) == 0
    said = capsys.readouterr().out
    section = (HERE.parent / "README.md").read_text().partition("## On a cluster")[2]
    line = next(line for line in section.splitlines() if line.startswith("torchrun"))
    words = line.split()
    assert words[-2:] == ["--out", "runs/cluster"]
    done = launch([*words[:-1], str(both), *command[2:]])
    assert done.returncode == 0, done.stderr[-4000:]
    for (*point, a), (*other, b) in zip(metrics(one), metrics(both), strict=True):
        assert point == other
        # What is shown of the part held back is a mean over batches, which are others.
        assert a == pytest.approx(b, **({"rel": 1e-3} if "eval_loss" in point else CLOSE)), point
    files = {file.relative_to(one).as_posix() for file in one.rglob("*") if file.is_file()}
    got = {file.relative_to(both).as_posix() for file in both.rglob("*") if file.is_file()}
    of_pieces = {name for name in got if "/optimizer" in name or "/rng_state" in name}
    assert got - of_pieces == {
        name for name in files if "/optimizer" not in name and "/rng_state" not in name
    }
    first_words = [line.split()[0] for line in said.splitlines() if line.strip()]
    for word in ("corpus", "model,", "trained", "perplexity"):
        assert first_words.count(word) == 1
        assert [line.split()[0] for line in done.stdout.splitlines() if line.strip()].count(
            word
        ) == 1
    assert done.stderr.count("loading PyTorch") == 1
    card = (both / "README.md").read_text()
    assert "2 (fsdp2)" in card
    perplexity = "| perplexity |"
    lines = [
        next(line for line in (run / "README.md").read_text().splitlines() if perplexity in line)
        for run in (one, both)
    ]
    assert lines[0] == lines[1]
    more = [*command, "--max-steps", "6", "--out", str(both), "--resume", "auto"]
    assert main(more) == 2
    assert "--parallel ddp goes on in one" in capsys.readouterr().err
    assert main([*more, "--parallel", "ddp"]) == 0
    assert metrics(both)[-1][0] == 6


SRUN = """#!/bin/bash
for node in $(seq "$SLURM_NNODES"); do "$@" & nodes+=($!); done
for node in "${nodes[@]}"; do wait "$node" || failed=1; done
exit ${failed:-0}
"""


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_nodes_as_in_one_process(settings, tmp_path):
    """Two launchers on this machine find each other as those of two machines would."""
    command = [*settings, "--max-steps", "3"]
    one = tmp_path / "one"
    assert main([*command, "--out", str(one)]) == 0
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    torchrun = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    scontrol = "#!/bin/bash\necho localhost\n"
    for name, text in (("srun", SRUN), ("torchrun", torchrun), ("scontrol", scontrol)):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    slurm["SLURM_JOB_ID"] = str(os.getpid())
    with (tmp_path / "said").open("w+") as said:
        done = subprocess.run(
            ["bash", str(HERE.parent / "examples" / "slurm.sh"), *command[2:]],
            env={
                **os.environ,
                **slurm,
                "PATH": f"{bin_}:{os.environ['PATH']}",
                "PYTHONPATH": str(HERE.parent),
                "OMP_NUM_THREADS": "1",
            },
            cwd=tmp_path,
            stdout=said,
            stderr=said,
            timeout=600,
        )
        said.seek(0)
        assert done.returncode == 0, said.read()[-4000:]
        said.seek(0)
        assert said.read().count("perplexity") == 1
    both = tmp_path / "runs" / "cluster"
    for (*point, a), (*other, b) in zip(metrics(one), metrics(both), strict=True):
        assert point == other
        assert a == pytest.approx(b, **({"rel": 1e-3} if "eval_loss" in point else CLOSE)), point
    assert "2 (fsdp2)" in (both / "README.md").read_text()


FAILS = """
import os, signal, sys
import bigkernel.trainer
from bigkernel.cli import command

step = bigkernel.trainer.Trainer.training_step

def fail(self, *arguments, **keywords):
    if os.environ["RANK"] == os.environ["FAILS"] and self.state.global_step == 2:
        if "KILLED" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the third batch of this rank cannot be read")
    return step(self, *arguments, **keywords)

bigkernel.trainer.Trainer.training_step = fail
sys.exit(command())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), [("ddp", 1), ("fsdp2", 1), ("fsdp2", 0)])
def test_an_error_on_one_rank_ends_all_with_its_message(settings, tmp_path, kind, rank):
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    run = tmp_path / "run"
    options = ("--max-steps", "4", "--parallel", kind, "--out", run)
    done = start(2, script, *settings, *options, variables={"FAILS": str(rank)})
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    who = "process 1: " if rank else ""
    assert errors == [f"Error: {who}the third batch of this rank cannot be read"]
    assert "Gloo" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), [("ddp", 1), ("fsdp2", 1), ("fsdp2", 0)])
def test_a_killed_rank_ends_all_and_the_run_goes_on(settings, tmp_path, kind, rank):
    """The launcher names it; the other one says no more than that it is gone."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    command = [*settings, "--save-steps", "1", "--out", str(tmp_path / "run")]
    options = ("--max-steps", "4", "--parallel", kind)
    variables = {"FAILS": str(rank), "KILLED": "1"}
    done = start(2, script, *command, *options, variables=variables)
    assert done.returncode == 1
    root = done.stderr.partition("Root Cause")[2]
    assert re.search(rf"rank +: {rank} ", root), done.stderr
    assert "Signal 9 (SIGKILL)" in root
    assert "gloo" not in done.stderr.partition("torch/distributed/elastic")[0].lower()
    assert done.stderr.count("Traceback (most recent call last)") == 1  # the launcher's own
    checkpoint.verify_checkpoint(tmp_path / "run" / "checkpoint-2")
    assert main([*command, "--max-steps", "4", "--parallel", "ddp", "--resume", "auto"]) == 0
    assert metrics(tmp_path / "run")[-1][0] == 4


def ranks_of(launcher):
    """The processes that a launcher has started, by rank."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (process / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        if parent == launcher.pid:
            for variable in variables:
                if variable.startswith(b"RANK="):
                    found[int(variable[5:])] = int(process.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_any_rank_has_all_save_once(settings, tmp_path, rank):
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*settings, "--max-steps", "100000", "--save-steps", "90000", "--parallel", "fsdp2"]
    with subprocess.Popen(
        [*launcher, "--nproc-per-node", "2", "-m", "bigkernel", *command, "--out", str(run)],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        file = run / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not file.is_file() or file.read_text().count("\n") < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        os.kill(ranks_of(process)[rank], signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert said.count("interrupted by SIGTERM after step") == 1, said
    assert "exitcode  : 143" in said
    assert said.count("Traceback (most recent call last)") == 1  # the launcher's own
    (saved,) = run.glob("checkpoint-*")
    checkpoint.verify_checkpoint(saved)
    step = int(saved.name.split("-")[1])
    more = [*settings, "--max-steps", str(step + 1), "--out", str(run), "--resume", "auto"]
    assert main([*more, "--parallel", "ddp"]) == 0
    assert metrics(run)[-1][0] == step + 1
