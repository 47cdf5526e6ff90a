"""Under another default dtype or device of torch everything gives what it gives otherwise.

Tensors that the package makes inside say their dtype and device themselves.
"""

import pytest
import torch
from families import text_model
from torch import nn

import bigkernel.transforms as T
from bigkernel import ops
from bigkernel.backend import use_backend
from bigkernel.data import (
    ImageData,
    PackedDataset,
    PackingCollator,
    TextDataset,
    build_tokenizer,
)
from bigkernel.data.augmentation import BatchAugmentation
from bigkernel.data.images import collate_images
from bigkernel.optim import AdamW
from bigkernel.recipes.metrics import TextMetrics
from bigkernel.trainer import Trainer, TrainingArguments

DEFAULTS = {
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "meta": {"device": "meta"},
}
SLOPES = torch.tensor([0.5, 0.25])
ATTENTION = {
    "dropout": {"dropout_p": 0.3, "causal": True},
    "alibi": {"alibi_slopes": SLOPES, "causal": True},
    "window": {"window": (2, 1), "softcap": 20.0},
    "everything": {"dropout_p": 0.2, "alibi_slopes": SLOPES, "window": (4, 0), "causal": True},
}
ADAM = {
    "plain": (torch.float32, {}),
    "clipping": (torch.float32, {"max_grad_norm": 0.1, "amsgrad": True}),
    "lr tensor": (torch.float32, {"lr": torch.tensor(1e-2)}),
    "bf16": (torch.bfloat16, {"max_grad_norm": float("inf"), "state_dtype": torch.bfloat16}),
    "masters": (torch.bfloat16, {"master_weights": True, "max_grad_norm": 0.1}),
    "float64": (torch.float64, {"max_grad_norm": 0.1}),
    "float8": (torch.float8_e4m3fn, {"master_weights": True, "max_grad_norm": 0.1}),
}
CHAINS = {
    "crop": lambda: T.Compose(
        [T.RandomResizedCrop(9), T.RandomHorizontalFlip(), T.ToDtype(torch.float32, scale=True)]
    ),
    "color": lambda: T.Compose(
        [
            T.ColorJitter(0.4, 0.4, 0.4, 0.2),
            T.RandomRotation(30, fill=7),
            T.ToDtype(torch.float32, scale=True),
        ]
    ),
    "normalize": lambda: T.Compose(
        [
            T.Resize((7, 8)),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.3)),
        ]
    ),
}


@pytest.fixture(params=DEFAULTS)
def changed(request):
    """A function that calls another under the changed default."""
    default = DEFAULTS[request.param]

    def call(function):
        before = torch.get_default_dtype()
        torch.set_default_dtype(default.get("dtype", before))
        torch.set_default_device(default.get("device"))
        try:
            return function()
        finally:
            torch.set_default_dtype(before)
            torch.set_default_device(None)

    return call


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)
        assert torch.equal(*(t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (a, b)))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_under_other_defaults(changed, case, backend):
    inputs = [normal(2, 2, 9, 16, seed=i).requires_grad_() for i in range(3)]
    direction = normal(2, 2, 9, 16, seed=3)

    def run():
        torch.manual_seed(0)
        with use_backend(backend):
            out = ops.attention(*inputs, **ATTENTION[case])
        return [out.detach(), *torch.autograd.grad(out, inputs, direction)]

    assert_same(changed(run), run())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_attention_varlen_under_other_defaults(changed, backend):
    inputs = [normal(12, 2, 16, seed=i).requires_grad_() for i in range(3)]
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    direction = normal(12, 2, 16, seed=3)

    def run():
        torch.manual_seed(0)
        with use_backend(backend):
            out = ops.attention_varlen(
                *inputs, offsets, offsets, causal=True, dropout_p=0.2, alibi_slopes=SLOPES
            )
        return [out.detach(), *torch.autograd.grad(out, inputs, direction)]

    assert_same(changed(run), run())


NATIVE = [case for case in ADAM if not case.startswith("float")]


@pytest.mark.parametrize(
    ("case", "backend"), [(c, "torch") for c in ADAM] + [(c, "cpu") for c in NATIVE]
)
def test_adam_under_other_defaults(changed, case, backend):
    dtype, options = ADAM[case]

    def run():
        params = [nn.Parameter(normal(*s).to(dtype)) for s in [(3, 4), (700,), (0,), ()]]
        optimizer = AdamW(params, **options)
        norms = []
        with use_backend(backend):
            optimizer.step()  # nothing to do yet
            norms.append(optimizer.grad_norm)
            for i in range(4):
                for j, p in enumerate(params):
                    p.grad = normal(*p.shape, seed=10 * i + j).to(dtype)
                optimizer.step()
                norms.append(optimizer.grad_norm)
                if i == 2:
                    optimizer.load_state_dict(optimizer.state_dict())
        return [[p.detach() for p in params], norms, optimizer.state_dict()["state"]]

    assert_same(changed(run), run())


def test_adam_op_under_other_defaults(changed):
    def run():
        lists = [[normal(5, seed=i)] for i in range(3)] + [[normal(5, seed=4).square()]]
        norm = ops.adam_step_(*lists, 3, lr=0.1, max_norm=1.0)
        return [norm, lists, ops.adam_norm([]), ops.adam_norm(lists[1])]

    assert_same(changed(run), run())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("chain", CHAINS)
def test_transforms_under_other_defaults(changed, chain, backend):
    images = (normal(4, 3, 12, 10).sigmoid() * 255).to(torch.uint8)

    def run():
        transform = CHAINS[chain]()
        generator = torch.Generator().manual_seed(3)
        with use_backend(backend):
            batch = transform(images, generator=generator, ids=torch.arange(4, device="cpu"))
            one = transform(images[0], generator=generator, ids=[7])
            pair = transform([images[0], images[1][:, :9]], generator=generator, ids=[1, 2])
        return [batch, one, pair]

    assert_same(changed(run), run())


def test_augment_under_other_defaults(changed):
    images = (normal(2, 3, 5, 5).sigmoid() * 255).to(torch.uint8)
    still = torch.zeros(2, 16, dtype=torch.float64)
    still[:, 0] = still[:, 4] = 1.0

    def run():
        results = []
        for backend in ("cpu", "torch"):
            with use_backend(backend):
                results.append(
                    ops.augment(
                        *(images, still),
                        size=(5, 5),
                        fill=(1, 2, 3),
                        mean=0.5,
                        std=[0.1, 0.2, 0.3],
                        dtype=torch.float32,
                    )
                )
        return results

    assert_same(changed(run), run())


def test_data_and_metrics_under_other_defaults(changed):
    pixels = (normal(6, 3, 8, 8).sigmoid() * 255).to(torch.uint8)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    logits = normal(1, 16, 259)

    def run():
        texts = ["abcdefgh" * 9, "the cat sat on the mat. " * 6]
        rows = PackedDataset(texts, build_tokenizer("bytes"), 16)
        batch = PackingCollator()([rows[0], rows[1]])
        padded = TextDataset(texts, build_tokenizer("bytes"), 200)[0]
        metrics = TextMetrics(9)
        metrics.update(logits, rows[0]["labels"][None])
        images = ImageData(pixels, labels, ["a", "b"], "noise", "")
        train, held = images.split(0.4, seed=3)
        collated = collate_images([train[0], held[0]])
        crop = T.Compose([T.RandomCrop(6), T.ToDtype(torch.float32, scale=True)])
        augmented = BatchAugmentation(0)(crop, collated["pixel_values"], None, 0)
        return [batch, padded, metrics.compute(), collated, augmented, crop.state_dict()]

    assert_same(changed(run), run())


@pytest.mark.parametrize("packed", [True, False])
def test_trainer_under_another_default_dtype(tmp_path, packed):
    """The same weights, and the same losses as far as transformers' own sum of them, which it keeps
    in the default dtype, goes. With "meta" as default device transformers itself cannot begin.
    """
    ends = []
    for dtype in (torch.float32, torch.float64):
        model = text_model()
        torch.set_default_dtype(dtype)
        try:
            options = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1}
            trainer = Trainer(
                model,
                TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True, **options),
                train_dataset=PackedDataset(
                    ["abcdefgh" * 30], build_tokenizer("bytes"), 16, drop_last=True
                ),
                data_collator=PackingCollator() if packed else None,
            )
            trainer.train()
        finally:
            torch.set_default_dtype(torch.float32)
        losses = [x for x in trainer.state.log_history if "loss" in x]
        ends.append((losses, model.state_dict()))
    (losses, weights), (other_losses, other_weights) = ends
    assert len(losses) == 3
    for a, b in zip(losses, other_losses, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == b["grad_norm"]
    assert_same(weights, other_weights)
