"""Train a language model in the workers of a Ray cluster, in pieces (FSDP2).

python examples/ray_train.py --workers 2

Ray Train starts the workers and introduces them to each other, as torchrun would; what they run is
a script on the Trainer, no line of which knows Ray.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(settings: dict[str, Any]) -> None:
    """Runs in every worker."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from bigkernel import Trainer, TrainingArguments
    from bigkernel.data import PackedDataset, build_tokenizer

    tokenizer = build_tokenizer("bytes")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=settings["out"],
            fsdp=True,
            fsdp_config={"version": 2},
            use_cpu=not torch.cuda.is_available(),
            max_steps=settings["steps"],
            per_device_train_batch_size=8 // settings["workers"],
            learning_rate=1e-2,
            report_to="none",
        ),
        train_dataset=PackedDataset(
            ["the cat sat on the mat. " * 200], tokenizer, 64, drop_last=True
        ),
    )
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", type=Path, default=Path("runs/ray"), help="seen by all workers")
asked = parser.parse_args()
out = asked.out.absolute()
TorchTrainer(
    train,
    train_loop_config={"out": str(out), "steps": asked.steps, "workers": asked.workers},
    scaling_config=ScalingConfig(num_workers=asked.workers, use_gpu=torch.cuda.is_available()),
    run_config=RunConfig(storage_path=str(out)),
).fit()
print(f"the model is in {asked.out}")
