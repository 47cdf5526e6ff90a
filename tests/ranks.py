"""What `test_ranks.py` runs on several ranks: `torchrun ... ranks.py FOLDER PART...`.

Each part writes what it found to FOLDER, for a test to compare with one process. The ranks are
started once for all parts, as starting takes longer than most of them.
"""

import contextlib
import io
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from pydoc_data.topics import topics

import test_trainer
import torch
import torch.distributed as dist
import transformers
from accelerate.parallelism_config import ParallelismConfig
from families import DECODER, build, image_model, text_model
from streams import Stream
from test_trainer import arguments, image_data, losses, scale_only
from torch import nn
from torch.distributed.fsdp import FSDPModule

from benchmarks import scaling
from bigkernel import Trainer
from bigkernel import transforms as T
from bigkernel.data import ImageData, ImageDataset, PackedDataset, PaddingCollator, build_tokenizer
from bigkernel.data.images import collate_images
from bigkernel.integrations import sharding
from bigkernel.recipes import augmentation, report
from bigkernel.recipes import images as image_recipe
from bigkernel.recipes import text as text_recipe
from bigkernel.recipes.metrics import ImageMetrics, TextMetrics

GLOBAL_BATCH = 8  # documents in a step, however many ranks
STEPS = 6
KINDS = {"ddp": {}, "fsdp2": {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}}}


def documents(count=64):
    """Python's own documentation in pieces of 3 to 23 characters, each a token of 1 to 60."""
    draw = torch.Generator().manual_seed(0)
    ends = torch.randint(3, 24, (count,), generator=draw).cumsum(0).tolist()
    tokens = [1 + ord(character) % 60 for character in topics["for"] + topics["while"]]
    return [{"input_ids": tokens[a:b]} for a, b in zip([0, *ends], ends, strict=False)]


def text_trainer(out, ranks, cls=Trainer, data=None, model=None, trainer=None, **changes):
    options = {
        "packing": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": GLOBAL_BATCH // (2 * ranks),
        "max_grad_norm": 0.5,
        "weight_decay": 0.1,
        "learning_rate": 2e-3,
        "save_steps": 2,
    }
    return cls(
        build("llama") if model is None else model,
        arguments(out, **{**options, **changes}),
        train_dataset=documents() if data is None else data,
        eval_dataset=documents(12),
        **(trainer or {}),
    )


def drawn():
    """Transforms that draw for each image, by its place in the dataset and not in the batch."""
    return T.Compose(
        [
            T.RandomResizedCrop(8, antialias=True),
            T.RandomHorizontalFlip(),
            T.ColorJitter(0.4, 0.4),
            T.ToDtype(torch.float32, scale=True),
        ]
    )


def image_trainer(out, ranks, **changes):
    return Trainer(
        image_model(),
        arguments(out, max_steps=4, gradient_accumulation_steps=4 // ranks, **changes),
        train_dataset=image_data(32),
        eval_dataset=image_data(6),
        data_collator=collate_images,
        augmentation=drawn(),
        eval_augmentation=scale_only,
    )


def figures(trainer):
    return losses(trainer, ("loss", "grad_norm", "eval_loss"))


def held(trainer):
    """Bytes on this rank of the parameters and of the moments, and those of a whole model."""
    parameters = list(trainer.model.parameters())

    def here(t):
        return (t.to_local() if sharding.is_cut(t) else t).nbytes

    moments = [
        value
        for state in trainer.optimizer.state.values()
        for key, value in state.items()
        if key != "step"
    ]
    return {
        "cut": [sharding.is_cut(p) for p in parameters],
        "moments cut": [sharding.is_cut(m) for m in moments],
        "parameters": sum(map(here, parameters)),
        "moments": sum(map(here, moments)),
        "whole": sum(p.numel() * p.element_size() for p in parameters),
        "empty": sum(here(p) == 0 for p in parameters),
        "model": type(trainer.model_wrapped).__name__,
        "units": [n for n, m in trainer.model.named_modules() if isinstance(m, FSDPModule)],
    }


CLASSES = 3
TEXTS = [f"document {i}, of its own length " + "\u72d0 " * i for i in range(9)]
LOGITS = torch.randn(40, CLASSES, generator=torch.Generator().manual_seed(0))


def text_figures(rank, world):
    """Of a part of the text in each process."""
    tokenizer = build_tokenizer("bytes")
    rows = PackedDataset(TEXTS[rank::world], tokenizer, 16)
    metrics = TextMetrics(rows.num_bytes)
    for row in rows:
        generator = torch.Generator().manual_seed(int(row["input_ids"].sum()))
        logits = torch.randn(1, len(row["labels"]), len(tokenizer), generator=generator)
        labels = row["labels"][None]
        # The target's own logit says how well it was foreseen, in whatever row it came to stand.
        logits[:, :-1].scatter_(-1, labels[:, 1:, None].clamp(min=0), 5.0)
        metrics.update(logits, labels)
    found = metrics.compute()
    assert metrics.compute() == found
    return {"tokens": found["tokens"], "bytes": found["bytes"], "all": found}


def image_figures(part):
    """Of a part of the images in each process, or of all."""
    labels = torch.arange(40) % CLASSES
    metrics = ImageMetrics(CLASSES)
    for rows in torch.arange(40)[part].split(7):
        metrics.update(LOGITS[rows], labels[rows])
    curves = [(c.false_positive_rate.tolist(), c.area) for c in metrics.roc_curves() if c]
    return {
        **metrics.compute(),
        "matrix": metrics.confusion_matrix().tolist(),
        "curves": curves,
    }


def command_figures():
    """What the commands measure, each process the whole, as printed and written to the card."""
    tokenizer = build_tokenizer("bytes")
    rows = text_recipe.held_back_rows(TEXTS, tokenizer, 32)
    words = text_recipe.measure(text_model(), rows, 2)
    pixels = torch.randint(0, 256, (13, 1, 8, 8), dtype=torch.uint8)
    data = ImageData(pixels, torch.arange(13) % CLASSES, ["a", "b", "c"], "noise", "")
    _, plain = augmentation.pipelines([], 8, [0.5], [0.5])
    fit = image_recipe.Channels(1, 1)
    metrics = image_recipe.measure(image_model(), ImageDataset(data), plain, fit, 4)
    return {
        "text": report.figures(words),
        "images": report.figures(metrics.compute()),
        "matrix": metrics.confusion_matrix().tolist(),
    }


def trainer_figures(folder):
    """The Trainer's, over data that divides evenly (transformers fills up with repeated items)."""
    trainer = test_trainer.image_trainer(
        folder, max_steps=1, save_strategy="no", trainer={"compute_metrics": image_recipe.accuracy}
    )
    even = trainer.evaluate(test_trainer.image_data(32))
    odd = trainer.evaluate(test_trainer.image_data(21))
    return {
        "eval_loss": even["eval_loss"],
        "eval_accuracy": even["eval_accuracy"],
        # Counted without the repeats, however the items divide.
        "odd_accuracy": odd["eval_accuracy"],
    }


# Parts: each is called on every rank with the folder, and returns what rank 0 is to write


def curve(folder, kind, **changes):
    """Train from the start, with checkpoints of fsdp2; the first rank's weights count."""
    model = build("llama")
    if dist.get_rank() > 0:
        for p in model.parameters():
            nn.init.normal_(p)
    run = folder / f"{kind}-{dist.get_world_size()}"
    saves = {"save_strategy": "steps" if kind == "fsdp2" else "no"}
    ranks = dist.get_world_size()
    options = {**KINDS[kind], **saves, "announce": True, **changes}
    trainer = text_trainer(run, ranks, model=model, **options)
    trainer.train()
    trainer.evaluate()
    return {"figures": figures(trainer), "held": held(trainer)}


def ddp(folder):
    return curve(folder, "ddp")


def fsdp2(folder):
    return curve(folder, "fsdp2")


def again(folder):
    """Go on from this many ranks' own checkpoint."""
    return resumed(folder, folder / f"fsdp2-{dist.get_world_size()}" / "checkpoint-4")


def from_one(folder):
    """Go on from a checkpoint of one process."""
    return resumed(folder, folder / "one" / "checkpoint-4")


def from_two(folder):
    return resumed(folder, folder / "fsdp2-2" / "checkpoint-4")


def from_one_from_two(folder):
    """Go on where one process stopped that had gone on from two ranks."""
    return resumed(folder, folder / "from-two" / "checkpoint-4")


def ddp_from_pieces(folder):
    """DDP goes on from a checkpoint of FSDP2."""
    source = folder / f"fsdp2-{dist.get_world_size()}" / "checkpoint-4"
    return resumed(folder, source, "ddp")


def resumed(folder, source, kind="fsdp2"):
    trainer = text_trainer(folder / "resumed", dist.get_world_size(), **KINDS[kind])
    trainer.train(resume_from_checkpoint=str(source))
    return {"figures": figures(trainer)}


def muon(folder):
    trainer = text_trainer(
        folder / "muon", dist.get_world_size(), optim="muon", max_steps=3, **KINDS["fsdp2"]
    )
    trainer.train()
    return {"figures": figures(trainer), "optimizer": repr(trainer.optimizer.optimizer)[:5]}


def images(folder):
    """A model whose weights are saved under other names than its own; the best one in the end."""
    run = folder / "images"
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    options |= {"eval_steps": 2, "load_best_model_at_end": True, **KINDS["fsdp2"]}
    trainer = image_trainer(run, dist.get_world_size(), **options)
    trainer.train()
    found = {"figures": figures(trainer), "best": trainer.evaluate()["eval_loss"]}
    second = image_trainer(run, dist.get_world_size(), **options)
    second.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    return {**found, "again": figures(second)}


class Looks(transformers.TrainerCallback):
    """Sees gradients beside the step, which are then clipped beside it."""

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        squares = [p.grad.norm().full_tensor().square() for p in model.parameters()]
        self.norms.append(float(sum(squares).sqrt()))


def shown(folder):
    looks = Looks()
    trainer = text_trainer(
        folder / "shown",
        dist.get_world_size(),
        max_steps=2,
        trainer={"callbacks": [looks]},
        **KINDS["fsdp2"],
    )
    trainer.train()
    return {"figures": figures(trainer), "norms": looks.norms}


def bf16(folder):
    trainer = text_trainer(
        folder / "bf16", dist.get_world_size(), bf16=True, max_steps=3, **KINDS["fsdp2"]
    )
    trainer.train()
    dtypes = {str(p.dtype) for p in trainer.model.parameters()}
    return {"figures": figures(trainer), "dtypes": sorted(dtypes)}


def uneven(folder):
    """The last batches of an epoch are not enough for all ranks."""
    found = {}
    for kind, options in KINDS.items():
        trainer = text_trainer(
            folder / "uneven",
            dist.get_world_size(),
            data=documents(2 * GLOBAL_BATCH + 3),
            num_train_epochs=2,
            max_steps=-1,
            **options,
        )
        trainer.train()
        trainer.evaluate()
        found[kind] = figures(trainer)
    return found


class Counted(torch.utils.data.Dataset):
    """Documents that write down which of them were asked for, in any process."""

    def __init__(self, file, count):
        self.file, self.documents = file, documents(count)

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        with self.file.open("a") as file:
            file.write(f"{index}\n")
        return self.documents[index]


def reads(folder):
    """Two epochs, and from the middle of the second one again: what is read of the documents."""
    rank, world = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
    found, run = {"figures": {}}, folder / f"reads-{world}"

    def train(name, resume=None, workers=0):
        file = folder / f"read {name} {world} {rank}"
        trainer = text_trainer(
            run if resume is None else folder / "read again",
            world,
            data=Counted(file, 3 * GLOBAL_BATCH),
            dataloader_num_workers=workers,
            save_strategy="no" if resume else "steps",
            save_steps=4,
        )
        trainer.train(resume_from_checkpoint=resume)
        found["figures"][name] = figures(trainer)
        found[name] = [int(line) for line in file.read_text().split()]

    train("whole")
    for workers in (0, 2):
        train(f"again, {workers} workers", str(run / "checkpoint-4"), workers)
    return found


def in_streams(folder, world, resume=False):
    """Two passes of a stream that the first rank deals out, and of one that all ranks read.

    If ``resume`` says so, on from a checkpoint of ``world`` ranks in the second pass.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    found = {"figures": {}}
    for kind in ("dealt", "cut"):
        # Batches that are dealt out have to be of one length.
        rows = [{"input_ids": d["input_ids"][:3]} for d in documents(3 * GLOBAL_BATCH)]
        name = f"stream-{kind}-{world}{'-again' if resume else ''}"
        stream = Stream(folder / f"{name}-{rank}.txt", rows)
        stream.file.touch()
        trainer = text_trainer(
            folder / name,
            ranks,
            data=stream,
            packing=kind == "cut",
            trainer={"data_collator": None if kind == "cut" else PaddingCollator()},
            save_strategy="no" if resume else "steps",
        )
        source = folder / f"stream-{kind}-{world}" / "checkpoint-4"
        trainer.train(resume_from_checkpoint=str(source) if resume else None)
        found["figures"][kind] = figures(trainer)
        found[kind] = stream.reads()
    return found


def streams(folder):
    world = dist.get_world_size()
    return {"whole": in_streams(folder, world), "again": in_streams(folder, world, True)}


def evaluated(folder):
    """Figures whose parts are summed over ranks, and of wholes that are not."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {
        "text": text_figures(rank, world),
        "images": image_figures(slice(rank, None, world)),
        # The others have seen nothing.
        "lopsided": image_figures(slice(0, 40 if rank == 0 else 0)),
        "command": command_figures(),
        "trainer": trainer_figures(folder / "evaluated"),
    }
    return {"figures": found}


def beside_theirs(folder):
    """The logs of transformers' Trainer and of ours; each rank has other counts of labels."""
    logs = []
    for cls in (transformers.Trainer, Trainer):
        trainer = test_trainer.text_trainer(
            folder / "beside",
            cls,
            dropout=0.0,
            max_steps=4,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=1,
            max_grad_norm=0.05,
            logging_steps=2,
            eval_strategy="steps",
            eval_steps=4,
            include_num_input_tokens_seen="all",
        )
        result = trainer.train()
        logs.append([*trainer.state.log_history, result.metrics])
    return {"logs": logs}


class SignalOne(transformers.TrainerCallback):
    """SIGUSR1 to the last rank, in its second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == args.world_size - 1:
            signal.raise_signal(signal.SIGUSR1)


def signalled(folder):
    run = folder / "signalled"
    trainer = test_trainer.text_trainer(run, max_steps=4, trainer={"callbacks": [SignalOne()]})
    try:
        trainer.train()
    except test_trainer.TrainingInterrupted as stop:
        return {"figures": [stop.signal.name, stop.step, str(stop.checkpoint)]}


class Sizes(transformers.TrainerCallback):
    """Bytes of the collectives of each step, and the Trainer's own between the steps."""

    def __init__(self):
        self.counter, self.steps, self.between = scaling.counter(), [], []

    def take(self):
        sizes, self.counter.sizes = self.counter.sizes, {}
        return sizes

    def on_step_begin(self, *arguments, **keywords):
        self.between.append(self.take())

    def on_step_end(self, *arguments, **keywords):
        self.steps.append(self.take())


def sent(folder):
    """What is sent in a step, with gradients that are accumulated or not, and in bfloat16."""
    world, found = dist.get_world_size(), []
    whole = GLOBAL_BATCH // world
    for kind, batch, bf16 in [(k, b, False) for k in KINDS for b in (2, whole)] + [
        ("fsdp2", whole, True)
    ]:
        sizes, batches = Sizes(), GLOBAL_BATCH // (batch * world)
        trainer = text_trainer(
            folder / "sent",
            world,
            max_steps=3,
            save_strategy="no",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=batches,
            bf16=bf16,
            trainer={"callbacks": [sizes]},
            **KINDS[kind],
        )
        with sizes.counter:
            trainer.train()
        case = {"kind": kind, "batches": batches, "parameter": 2 if bf16 else 4}
        buffers = sum(b.nbytes for b in trainer.model.buffers())
        found.append((case, buffers, sizes.steps, sizes.between[1:]))
    return {"found": found}


def twice(folder):
    """`train` again, with the model in pieces already."""
    trainer = text_trainer(
        folder / "twice", dist.get_world_size(), max_steps=2, max_grad_norm=1.0, **KINDS["fsdp2"]
    )
    trainer.train()
    trainer.train()
    return {"figures": figures(trainer), "held": held(trainer)}


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, labels, **batch):
        return {"loss": self.norm(labels.float()).sum()}


def refused(folder):
    """What is not supported, in its own words, and that nothing is written before."""
    run, ranks = folder / "refused", dist.get_world_size()
    found = {}

    def note(name, what):
        try:
            what()
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "nothing"

    def configured(**config):
        changes = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2, **config}}
        return lambda: text_trainer(run, ranks, **changes)

    note("version 1", configured(fsdp_version=1))
    note("offload", configured(cpu_offload=True))
    note("sharded", configured(state_dict_type="SHARDED_STATE_DICT"))
    hybrid = {"parallelism_config": ParallelismConfig(dp_replicate_size=2), **KINDS["fsdp2"]}
    note("hybrid", lambda: text_trainer(run, ranks, **hybrid))
    options = {"save_strategy": "steps", **KINDS["fsdp2"]}
    note("batch norm", lambda: text_trainer(run, ranks, model=Normed(), packing=False,
                                            **options).train())  # fmt: skip

    def launched():
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        try:
            text_trainer(run, ranks)
        finally:
            del os.environ["ACCELERATE_USE_FSDP"]

    note("launcher", launched)

    def launched_as_mesh():
        names = ("ACCELERATE_USE_PARALLELISM_CONFIG", "PARALLELISM_CONFIG_TP_SIZE")
        os.environ.update(zip(names, ("true", "2"), strict=True))
        try:
            text_trainer(run, ranks, **KINDS["fsdp2"])
        finally:
            for name in names:
                del os.environ[name]

    note("mesh", launched_as_mesh)

    def mixed_up():
        first = text_trainer(run, ranks, **options)
        text_trainer(run, ranks)
        first.train()

    note("another Trainer", mixed_up)
    found["written"] = sorted(os.listdir(run)) if run.exists() else []
    return found


def larger(folder):
    """A model with tied weights and of several layers; the vocabulary is no multiple of ranks."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DECODER, tie_word_embeddings=True)
    run = folder / "tied"
    trainer = text_trainer(
        run,
        dist.get_world_size(),
        model=transformers.LlamaForCausalLM(config),
        max_steps=2,
        save_strategy="steps",
        **KINDS["fsdp2"],
    )
    trainer.train()
    return {"figures": figures(trainer), "held": held(trainer)}


def main(folder, *parts):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    for part in parts:
        said = io.StringIO()
        try:
            with contextlib.nullcontext() if rank == "0" else contextlib.redirect_stdout(said):
                found = globals()[part](Path(folder))
        except BaseException:
            found = {"failed": traceback.format_exc()}
        found["said"] = said.getvalue()
        Path(folder, f"{part}-{world}-{rank}.json").write_text(json.dumps(found))
        if "failed" in found:
            raise SystemExit(found["failed"])
        dist.barrier()
    dist.destroy_process_group()
    # Not by the end of the interpreter, which aborts where one of gloo's threads still wants it.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
