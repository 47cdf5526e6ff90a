"""Named models, training recipes and augmentations.

A model preset is the keyword arguments of a transformers config, so a preset and a ``config.json``
on disk are built in the same way. A recipe preset names a model and the numbers it trains with.
"""

import copy
import difflib
from collections.abc import Mapping
from typing import Any

TEXT = "text"
IMAGES = "images"

# LLaMA-style decoders: RMSNorm, rotary positions, SwiGLU, input and output embeddings tied.
TEXT_MODELS: dict[str, dict[str, Any]] = {
    # 0.82 M parameters over bytes: one minute on two cores teaches it to spell and punctuate.
    "llama-1m": {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        # 0.02 is for wider models: here 0.06 reaches in 400 steps what 0.02 takes 650 for.
        "initializer_range": 0.06,
    },
    # 16.9 M parameters with a vocabulary of 8192.
    "llama-17m": {
        "model_type": "llama",
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "tie_word_embeddings": True,
    },
    # The shape of GPT-2 small, with four query heads to a key-value head.
    "llama-110m": {
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}

# Vision transformers; image size, channels and labels are filled in from the data.
IMAGE_MODELS: dict[str, dict[str, Any]] = {
    # 0.14 M parameters: the 8x8 digits as sixteen patches.
    "vit-digits": {
        "model_type": "vit",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "patch_size": 2,
        "initializer_range": 0.05,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    # ViT-Ti/16 of DeiT: 5.5 M parameters at 224x224.
    "vit-tiny": {
        "model_type": "vit",
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
        "patch_size": 16,
        "image_size": 224,
    },
    # ViT-S/16 of DeiT: 21.7 M parameters at 224x224.
    "vit-small": {
        "model_type": "vit",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "patch_size": 16,
        "image_size": 224,
    },
}

# Recipes: every key is a setting (see settings.py).
TEXT_RECIPES: dict[str, dict[str, Any]] = {
    # About a minute on two AVX2 cores; tests/test_end_to_end.py holds it to 1.9 nats per byte.
    "demo": {
        "model": "llama-1m",
        "tokenizer": "bytes",
        "max_length": 256,
        "batch_size": 4,
        "max_steps": 420,
        "lr": 3e-3,
        "warmup": 0.05,
        "min_lr": 0.05,
        "weight_decay": 0.1,
        "beta2": 0.95,
    },
    "small": {
        "model": "llama-17m",
        "tokenizer": "bpe",
        "vocab_size": 8192,
        "max_length": 512,
        "batch_size": 8,
        "epochs": 5.0,
        "lr": 1e-3,
        "warmup": 0.03,
        "min_lr": 0.1,
        "weight_decay": 0.1,
        "beta2": 0.95,
    },
    "base": {
        "model": "llama-110m",
        "tokenizer": "bpe",
        "vocab_size": 32000,
        "max_length": 1024,
        "batch_size": 16,
        "epochs": 1.0,
        "lr": 6e-4,
        "warmup": 0.02,
        "min_lr": 0.1,
        "weight_decay": 0.1,
        "beta2": 0.95,
    },
    # For --init-from: a few passes with small steps, so that what was learnt stays.
    "finetune": {
        "max_length": 512,
        "batch_size": 8,
        "epochs": 3.0,
        "lr": 5e-5,
        "warmup": 0.06,
        "min_lr": 0.0,
        "weight_decay": 0.01,
        "beta2": 0.999,
    },
}

IMAGE_RECIPES: dict[str, dict[str, Any]] = {
    # About half a minute on two AVX2 cores; tests/test_end_to_end.py holds it to 96 %.
    "demo": {
        "model": "vit-digits",
        "augment": "gentle",
        "batch_size": 64,
        "epochs": 18.0,
        "lr": 1e-3,
        "warmup": 0.05,
        "min_lr": 0.0,
        "weight_decay": 0.05,
        "beta2": 0.999,
    },
    # From scratch on a folder of photographs.
    "tiny": {
        "model": "vit-tiny",
        "augment": "photos",
        "batch_size": 64,
        "epochs": 100.0,
        "lr": 5e-4,
        "warmup": 0.05,
        "min_lr": 0.01,
        "weight_decay": 0.05,
        "beta2": 0.999,
    },
    "small": {
        "model": "vit-small",
        "augment": "photos-strong",
        "batch_size": 128,
        "epochs": 100.0,
        "lr": 5e-4,
        "warmup": 0.05,
        "min_lr": 0.01,
        "weight_decay": 0.05,
        "beta2": 0.999,
    },
    "finetune": {
        "augment": "photos",
        "batch_size": 32,
        "epochs": 5.0,
        "lr": 5e-5,
        "warmup": 0.06,
        "min_lr": 0.0,
        "weight_decay": 0.01,
        "beta2": 0.999,
    },
}

# What `--sample` changes in a text recipe: the corpus, and how a text this short is best read.
TEXT_SAMPLES: dict[str, dict[str, Any]] = {
    "zh": {
        "data": "sample:zh",
        "tokenizer": "bpe",
        "vocab_size": 1536,
        "max_length": 128,
        "batch_size": 4,
        "max_steps": 300,
        "lr": 3e-3,
        "prompt": "这是我的第一篇AI博客",
    },
}

# Each entry is a list of {class of bigkernel.transforms: its arguments}, as in a YAML file. "size"
# stands for the model's image size. What turns bytes into floats is appended by `augmentation`.
AUGMENTATIONS: dict[str, list[dict[str, dict[str, Any]]]] = {
    "none": [],
    # Small turns and shifts: all that a hand-written digit bears. No flips, a 2 is not an S.
    "gentle": [
        {
            "RandomAffine": {
                "degrees": 8,
                "translate": [0.06, 0.06],
                "scale": [0.95, 1.05],
                "interpolation": "bilinear",
            }
        }
    ],
    "photos": [
        {"RandomResizedCrop": {"size": "size", "scale": [0.35, 1.0]}},
        {"RandomHorizontalFlip": {"p": 0.5}},
    ],
    "photos-strong": [
        {"RandomResizedCrop": {"size": "size", "scale": [0.2, 1.0]}},
        {"RandomHorizontalFlip": {"p": 0.5}},
        {
            "ColorJitter": {
                "brightness": 0.4,
                "contrast": 0.4,
                "saturation": 0.4,
                "hue": 0.1,
            }
        },
        {"RandomGrayscale": {"p": 0.1}},
    ],
}


def pick(kind: str, table: Mapping[str, Any], name: str) -> Any:
    """The entry ``name`` of a table of presets, as a copy; ValueError naming the choices."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no {kind} {name!r}.{hint} There are: {', '.join(table)}.")
    return copy.deepcopy(table[name])
