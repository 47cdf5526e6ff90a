"""Model FLOPs utilization: what a training step multiplies, and what share of the rate that is."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from bigkernel.recipes.progress import MetricsFile, TrainingProgress
from bigkernel.recipes.utilization import matrix_rate, sequence_length, training_flops

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
    tokens = sequence_length(model, "tokens", 40)
    # Beside the products that count there are those of the rotary angles.
    assert training_flops(model, tokens) == pytest.approx(
        counted(model, input_ids=ids, labels=ids), rel=0.01
    )


def test_operations_of_a_vision_transformer_are_those_of_its_products():
    config = transformers.ViTConfig(
        image_size=32, patch_size=4, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=2, num_labels=1000,
    )  # fmt: skip
    model = transformers.ViTForImageClassification._from_config(config, attn_implementation="eager")
    tokens = sequence_length(model, "images", 1)
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
    assert sequence_length(model, "images", 1) is None
    assert training_flops(model, 8) is None


def test_rate_and_share(tmp_path):
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14
    assert matrix_rate(torch.device("cpu"), torch.bfloat16) > 1e8
    shown = TrainingProgress(
        MetricsFile(tmp_path / "metrics.jsonl"), "tokens", 100, torch.device("cpu"), whole=400.0
    )
    shown._throughput.update(0.0, 0)
    shown._throughput.update(2.0, 4)
    assert "200 tokens/s  MFU 50%" in shown.text(10)
    assert "MFU" not in shown.text(10, width=30)
