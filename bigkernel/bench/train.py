"""bigkernel's Trainer against transformers': tokens and images per second, and memory.

Both train the same model on the same data, with the same clipping and learning rate; transformers'
with torch's SDPA and its own choice of AdamW. The models:

- those of `bigkernel train text|images --preset demo`, on their data. Images are augmented by the
  demo's recipe: ours on the batch, for transformers by torchvision v2, image by image in the
  collator;
- a LLaMA of 16.9M parameters on random tokens, 4 x 512, in the precision that each Trainer takes by
  itself, in float32 and in bfloat16 (autocast); compiled by both, in the faster precision, beside
  ours not compiled; and with a vocabulary of 65,536;
- the same, in float32, on documents of 64 to 512 tokens: packed by our Trainer, padded by it and by
  transformers'; the tokens of the documents count, those of the padding do not;
- ViT-S/16 on uint8 images of 256 x 256, cropped, flipped, rotated, their colours changed: ours on
  the batch, for transformers by torchvision v2 in two workers.

A run is some steps of training, timed from the end of the first ones on. The limit is the rate of
torch's matrix product; the share of it is the model FLOPs utilization (MFU). Memory is the peak
above what a process holds before training, the model included; it, and the parts of a step, are
measured once, in a process of its own for each. With --quick that process tells the seconds and the
losses too, and there is no other run: a model is compiled once by each side.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bigkernel import _library, precision, utilization
from bigkernel.bench import augment, limits
from bigkernel.bench.case import OURS, REFERENCE, Alone, Bar, Case, MemoryBar, Ready, on_torch
from bigkernel.bench.training import WARM, Training, alone
from bigkernel.data import PaddingCollator, collate_images
from bigkernel.measure import Run
from bigkernel.recipes import images, models, presets, text
from bigkernel.recipes.errors import quietly
from bigkernel.recipes.settings import ImageSettings, TextSettings, gather
from bigkernel.recipes.training import Task

THEIRS = "transformers Trainer"
PADDED = "bigkernel, padded"
PLAIN = "bigkernel, not compiled"
STEPS = 15
LLAMA_STEPS, ROWS, LENGTH, VOCABULARY = 4, 4, 512, 8192
DOCUMENTS, SHORTEST = 8, 64  # in a batch; tokens
VIT_STEPS, VIT_BATCH = 3, 16


@dataclass(frozen=True)
class Spec:
    """A row of the table.

    build: makes the training of so many steps. items: tokens or images of the timed steps. more:
    further runs of ours, by name, with their options. alike: the losses of theirs are ours.
    """

    name: str
    build: Callable[[int], Training]
    steps: int
    items: int
    bars: tuple[Bar | MemoryBar, ...]
    unit: str = "tokens/s"
    more: dict[str, dict[str, Any]] = field(default_factory=dict)
    alike: bool = True
    sequences: float = 0.0  # of the timed steps; 0: the FLOPs of a step are not known
    length: int = 0  # tokens of a sequence
    dtype: torch.dtype = torch.float32  # of the products

    def case(self, small: bool) -> Case:
        names = (OURS, REFERENCE, *self.more, THEIRS)
        build = partial(_ready, self, small)
        return Case("train", self.name, names, build, self.bars, self.unit, self.items)


def cases(small: bool = False) -> list[Case]:
    """The table; ``small`` times one step, and the large models are small ones."""
    return [spec.case(small) for spec in (*_demos(small), *_llamas(small), _vit(small))]


def _demos(small: bool) -> list[Spec]:
    steps = 1 if small else STEPS
    recipe, batch = presets.TEXT_RECIPES["demo"], presets.IMAGE_RECIPES["demo"]["batch_size"]
    tokens = recipe["batch_size"] * recipe["max_length"]
    bar = (Bar(1.0, THEIRS),)
    return [
        Spec("demo text, LLaMA", build_text, steps, tokens * steps, bar),
        Spec(
            "demo images, ViT",
            build_images,
            steps,
            batch * steps,
            bar,
            "images/s",
            alike=False,
        ),
    ]


def _llamas(small: bool) -> list[Spec]:
    fast = precision.bf16_is_faster(torch.device("cpu"))
    chosen = torch.bfloat16 if fast else torch.float32
    wide = _library.native is not None and _library.native.cpu_isa().startswith(("avx512", "amx"))
    steps, rows, length = (1, 2, 32) if small else (LLAMA_STEPS, ROWS, LENGTH)

    def spec(
        name: str, dtype: torch.dtype, speed: float, memory: float, vocabulary: int = VOCABULARY,
        more: dict[str, dict[str, Any]] | None = None, **options: Any
    ) -> Spec:  # fmt: skip
        vocabulary = 256 if small else vocabulary
        return Spec(
            f"LLaMA 16.9M, {name}",
            partial(build_llama, options, vocabulary, rows, length),
            steps,
            rows * length * steps,
            (Bar(speed, THEIRS), MemoryBar(memory, THEIRS)),
            more=more or {},
            sequences=rows * steps,
            length=length,
            dtype=dtype,
        )

    # What this machine can gain by itself: bfloat16, or no more than the rest of a step.
    default, f32 = 2.0 if fast else 1.3, torch.float32
    count, shortest = (2, 4) if small else (DOCUMENTS, SHORTEST)
    lengths = _lengths(count * (WARM + steps), shortest, length)
    return [
        spec("as it comes", chosen, default, 0.7),
        spec("float32", f32, 1.3, 0.7, bf16=False),
        spec("bfloat16", torch.bfloat16, 1.5, 0.8, bf16=True),
        spec(
            "compiled",
            chosen,
            1.25,
            1.0,
            bf16=fast,
            torch_compile=True,
            more={PLAIN: {"torch_compile": False}},
        ),
        spec("as it comes, vocabulary 65,536", chosen, 1.0, 0.45, vocabulary=65536),
        Spec(
            f"LLaMA 16.9M, float32, documents of {shortest} to {length} tokens, packed",
            partial(build_packed, lengths, count, 256 if small else VOCABULARY),
            steps,
            sum(lengths[count * WARM :]),
            (Bar(2.2 if wide else 2.0, THEIRS),),
            more={PADDED: {"packing": False}},
        ),
    ]


def _vit(small: bool) -> Spec:
    steps, batch = (1, 2) if small else (VIT_STEPS, VIT_BATCH)
    model, size, side = ("vit-digits", 8, 12) if small else ("vit-small", 224, 256)
    shape = augment.Spec("", count=batch * 4, size=(side, side), output=size, full=True)
    fast = precision.bf16_is_faster(torch.device("cpu"))
    return Spec(
        "ViT-S/16, augmented",
        partial(build_vit, model, shape, batch),
        steps,
        batch * steps,
        (Bar(1.4, THEIRS), MemoryBar(1.0, THEIRS)),
        "images/s",
        alike=False,
        sequences=batch * steps,
        length=(size // 16) ** 2 + 1,
        dtype=torch.bfloat16 if fast else torch.float32,
    )


def _lengths(count: int, shortest: int, longest: int) -> list[int]:
    """Lengths of documents, as many from 64 to 128 as from 256 to 512: text has a long tail."""
    draw = torch.Generator().manual_seed(0)
    places = torch.rand(count, generator=draw, dtype=torch.float64)
    drawn: list[int] = (shortest * (longest / shortest) ** places).round().long().tolist()
    return drawn


def build_text(steps: int) -> Training:
    """The default text model."""
    settings = gather("train text", {})
    assert isinstance(settings, TextSettings)
    task = _prepared(lambda run: text.prepare(settings, run, {}))
    return _training(task, task.collate, steps)


def build_llama(
    options: dict[str, Any], vocabulary: int, rows: int, length: int, steps: int
) -> Training:
    """A LLaMA of 16.9M parameters over random tokens."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (rows * (WARM + steps), length), generator=draw)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    options = {**options, "per_device_train_batch_size": rows, "max_steps": WARM + steps}
    return Training(_llama(vocabulary), data, options)


def build_packed(lengths: list[int], count: int, vocabulary: int, steps: int) -> Training:
    """The same model over random documents of these lengths, so many in a batch."""
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, vocabulary, (n,), generator=draw)} for n in lengths]
    options = {
        "bf16": False,
        "per_device_train_batch_size": count,
        "train_sampling_strategy": "sequential",
        "max_steps": WARM + steps,
    }
    return Training(_llama(vocabulary), data, options, None, PaddingCollator(), packing=True)


def _llama(vocabulary: int) -> Any:
    small = vocabulary < VOCABULARY
    width, layers = (64, 1) if small else (384, 6)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=128 if small else 1024,
        num_hidden_layers=layers,
        num_attention_heads=6 if not small else 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def build_images(steps: int) -> Training:
    """The default image model; torchvision augments for transformers', by the same recipe."""
    settings = gather("train images", {})
    assert isinstance(settings, ImageSettings)
    task = _prepared(lambda run: images.prepare(settings, run, {}))
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        return _training(task, None, steps, skipped=str(error))
    (recipe,) = presets.AUGMENTATIONS["gentle"]
    options = {**recipe["RandomAffine"], "interpolation": v2.InterpolationMode.BILINEAR}
    affine = v2.RandomAffine(**options)
    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])])
    return _training(task, _ImageByImage(v2.Compose([affine, finish]), task.collate), steps)


def build_vit(model: str, shape: augment.Spec, batch: int, steps: int) -> Training:
    """A ViT on photograph-like images, augmented by the full recipe of the table of augment."""
    made = augment.photographs(shape)
    data = [{"pixel_values": image, "labels": i % 10} for i, image in enumerate(made)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = models.new_image_model(model, [str(i) for i in range(10)], 3, shape.output)
    training = Training(
        vit,
        data,
        {"per_device_train_batch_size": batch, "max_steps": WARM + steps},
        collate_images,
        ours={"augmentation": augment.our_chain(shape)},
        their_options={"dataloader_num_workers": 2},
    )
    try:
        chain = augment.Torchvision(shape).chain
    except ImportError as error:
        training.skipped = str(error)
        return training
    training.their_collate = _ImageByImage(chain, collate_images)
    return training


@dataclass
class _ImageByImage:
    """A collator that augments before the batch is made, as a data loader's workers do."""

    chain: Callable[[Tensor], Tensor]
    collate: Callable[..., Any]

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        pixels = torch.stack([self.chain(image) for image in batch["pixel_values"]])
        batch.pop("sample_ids", None)
        return {**batch, "pixel_values": pixels}


def _prepared(prepare: Callable[[Path], Task]) -> Task:
    with tempfile.TemporaryDirectory() as folder, quietly(), models.quiet_transformers():
        return prepare(Path(folder) / "run")


def _ready(spec: Spec, small: bool) -> Ready:
    training = spec.build(spec.steps)
    runs: dict[str, Run] = {
        OURS: partial(training.run_ours, OURS),
        REFERENCE: on_torch(partial(training.run_ours, REFERENCE)),
    }
    for name, options in spec.more.items():
        runs[name] = partial(training.run_ours, name, **options)
    skipped = {}
    if training.skipped:
        skipped[THEIRS] = training.skipped
    else:
        runs[THEIRS] = partial(training.run_theirs, THEIRS)

    def check(runs: dict[str, Run]) -> str:
        for run in runs.values():
            run()
        compared = [name for name in runs if name != OURS] if spec.alike else [REFERENCE]
        losses = training.losses
        for name in compared:
            for mine, other in zip(losses[OURS], losses[name], strict=True):
                assert abs(mine - other) < 2e-3 * abs(other), f"loss {mine} beside {name}'s {other}"
        return f"the loss of every step, to 0.2%, beside {' and '.join(compared)}"

    def told(name: str, alone: Alone) -> float:
        training.losses[name] = alone.losses
        return alone.seconds

    sample: Tensor = next(iter(training.model.parameters())).detach()
    config = training.model.config
    dim = config.hidden_size // config.num_attention_heads
    attention = "augmentation" not in training.ours
    tensors = (sample[None, None, :, :dim],) if attention else (sample,)
    op = "attention" if attention else "augment"
    measure = alone(spec.name, small)
    ready = Ready(runs, check, op, tensors, skipped=skipped, alone=measure, told=told)
    flops = utilization.training_flops(training.model, spec.length) if spec.length else None
    if flops is not None:
        ready.work = flops * spec.sequences
        ready.limit, ready.limit_work, ready.limit_name = limits.matrix_product(spec.dtype)
    return ready


def _training(task: Task, their_collate: Any, steps: int, skipped: str = "") -> Training:
    settings = task.settings
    options = {
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.lr,
        "weight_decay": settings.weight_decay,
        "adam_beta2": settings.beta2,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "max_steps": WARM + steps,
    }
    own = {k: v for k, v in task.trainer_options.items() if k != "eval_augmentation"}
    return Training(
        task.model, task.train, options, task.collate, their_collate, own, skipped=skipped
    )
