"""Model FLOPs utilization: what a training step multiplies, and what share of the rate that is."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from bigkernel import precision, utilization
from bigkernel.precision import matrix_rate
from bigkernel.recipes.progress import MetricsFile, TrainingProgress
from bigkernel.utilization import Meter, tokens_of_an_image, training_flops

TEXT = {
    "llama": {"head_dim": 24, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gpt2": {},
    "bert": {},
}


def counted(model, **inputs) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", TEXT)
def test_operations_of_a_language_model_are_those_of_its_products(kind):
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, attn_implementation="eager", **TEXT[kind],
    )  # fmt: skip
    auto = getattr(transformers, f"AutoModelFor{'Masked' if kind == 'bert' else 'Causal'}LM")
    model = auto.from_config(config, attn_implementation="eager")
    ids = torch.arange(40)[None]
    # Beside the products that count there are those of the rotary angles.
    assert training_flops(model, 40) == pytest.approx(
        counted(model, input_ids=ids, labels=ids), rel=0.01
    )


def test_operations_of_a_vision_transformer_are_those_of_its_products():
    config = transformers.ViTConfig(
        image_size=32, patch_size=4, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=2, num_labels=1000,
    )  # fmt: skip
    model = transformers.ViTForImageClassification._from_config(config, attn_implementation="eager")
    tokens = tokens_of_an_image(model)
    assert tokens == 65
    images = torch.zeros(1, 3, 32, 32)
    # The gradient of the image, which is part of the count, is not computed.
    assert training_flops(model, tokens) == pytest.approx(
        counted(model, pixel_values=images, labels=torch.tensor([3])), rel=0.02
    )


def test_what_cannot_be_counted_is_not_told():
    mixtral = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    assert training_flops(transformers.MixtralForCausalLM(mixtral), 8) is None
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"
    )
    model = transformers.ResNetForImageClassification(resnet)
    assert tokens_of_an_image(model) is None
    assert training_flops(model, 8) is None
    t5 = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    assert training_flops(transformers.T5ForConditionalGeneration(t5), 8) is None
    assert training_flops(torch.nn.Linear(4, 4), 8) is None


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_a_model_that_trains_a_part_of_its_weights_is_not_counted():
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert training_flops(model, 8) is None


def test_rates_are_those_of_the_faster_type(monkeypatch):
    device = torch.device("cpu")
    assert 1e8 < matrix_rate(device, torch.float32) < 1e14
    for speedup, expected in ((0.3, torch.float32), (2.0, torch.bfloat16)):
        monkeypatch.setattr(precision, "speedup", lambda device, dtype, x=speedup: x)
        assert precision.fastest(device, torch.bfloat16) == expected
        assert precision.fastest(device, torch.float32) == torch.float32
        assert precision.fastest(device, torch.float64) == torch.float64


class Clock:
    """In the place of time.monotonic."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(utilization.time, "monotonic", clock)
    monkeypatch.setattr(precision, "matrix_rate", lambda device, dtype: 1e6)
    return clock


PACKED = {"input_ids": torch.ones(1, 24, dtype=torch.int64),
          "cu_seq_lens_q": torch.tensor([0, 4, 24], dtype=torch.int32)}  # fmt: skip
PADDED = {"input_ids": torch.ones(2, 20, dtype=torch.int64),
          "attention_mask": torch.arange(20) < torch.tensor([[4], [20]])}  # fmt: skip


@pytest.mark.parametrize("batch", [PACKED, PADDED], ids=["packed", "padded"])
def test_a_meter_counts_the_tokens_of_documents_and_their_pairs(batch, clock):
    model = llama()
    meter = Meter(model, torch.device("cpu"))
    for _ in range(2):
        meter.count(batch)
    clock.now += 4
    flops = 2 * (training_flops(model, 4) + training_flops(model, 20))
    figures = meter.figures(torch.float32)
    assert figures.pop("memory_bytes") > 2**20
    assert figures == {"tokens_per_second": 12.0, "mfu": pytest.approx(flops / 4 / 1e6, abs=1e-4)}


def test_a_meter_counts_whole_rows_and_images(clock):
    meter = Meter(llama(), torch.device("cpu"))
    meter.count({"input_ids": torch.ones(3, 50, dtype=torch.int64)})
    clock.now += 1
    assert meter.figures(torch.float32)["tokens_per_second"] == 150
    config = transformers.ViTConfig(
        image_size=8, patch_size=2, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    vit = transformers.ViTForImageClassification(config)
    meter = Meter(vit, torch.device("cpu"))
    meter.count({"pixel_values": [torch.zeros(3, 9, 9)] * 6})
    clock.now += 2
    figures = meter.figures(torch.float32)
    assert figures["images_per_second"] == 3.0
    assert figures["mfu"] == pytest.approx(6 * training_flops(vit, 17) / 2 / 1e6, abs=1e-4)


def test_a_meter_leaves_out_what_is_no_training_and_what_is_long_ago(clock):
    meter = Meter(llama(), torch.device("cpu"))
    batch = {"input_ids": torch.ones(1, 10, dtype=torch.int64)}

    def speed(seconds, steps):
        for _ in range(steps):
            clock.now += seconds / steps
            meter.count(batch)
        return meter.figures(torch.float32)["tokens_per_second"]

    assert speed(5, 5) == 10.0
    began = clock.now - 1  # a second before the log, which was still training
    clock.now += 1000
    meter.leave_out(began)
    assert speed(4, 8) == pytest.approx(130 / 9, abs=0.1)
    began = clock.now + 2  # an evaluation without a log, two seconds of training later
    clock.now += 500
    meter.leave_out(began)
    assert speed(18, 18) == pytest.approx(9.0)  # 180 tokens in the last 20 seconds


def test_what_no_unit_is_known_of_has_neither_speed_nor_share(clock):
    model = torch.nn.Linear(4, 4)
    meter = Meter(model, torch.device("cpu"))
    meter.count({"x": torch.ones(2, 4)})
    meter.count([1, 2])
    clock.now += 1
    assert set(meter.figures(torch.float32)) == {"memory_bytes"}


def test_what_is_shown_of_it(tmp_path):
    shown = TrainingProgress(MetricsFile(tmp_path / "metrics.jsonl"), "tokens")
    shown._latest.update(tokens_per_second=200, mfu=0.5, memory_bytes=3 * 2**30)
    shown._throughput.update(0.0, 0)
    shown._throughput.update(2.0, 4)
    assert shown.text(10) == "200 tokens/s  MFU 50%  3.0 GiB  0:03 left"
    assert "MFU" not in shown.text(10, width=30)
