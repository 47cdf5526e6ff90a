"""Small models of transformers: of the families that the integrations serve, and to train."""

import torch
import transformers

VOCAB = 61

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QUIET = {"bos_token_id": None, "eos_token_id": None}
ENCODER = {**SMALL, "vocab_size": VOCAB, "max_position_embeddings": 64}
DECODER = {**ENCODER, **QUIET, "num_key_value_heads": 2, "pad_token_id": 0}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
T5["decoder_start_token_id"] = 0

# The classes of the model and of its config, and what the config says.
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 4}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**DECODER, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **DECODER,
            "head_dim": 8,
            "sliding_window": 4,
            "attn_logit_softcapping": 0.5,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**DECODER, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", DECODER),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**DECODER, "num_key_value_heads": None}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**ENCODER, **QUIET, "ffn_dim": 40, "word_embed_proj_dim": 32},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**QUIET, "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **DECODER,
            "head_dim": 8,
            "sliding_window": 4,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "bert": ("BertForMaskedLM", "BertConfig", ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**ENCODER, "pad_token_id": 0}),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**SMALL, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "relu"}),
    "t5 gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu"},
    ),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", T5),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {
            **DECODER,
            "num_key_value_heads": None,
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
            "cls_token_id": None,
            "sep_token_id": None,
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **DECODER,
            "head_dim": 8,
            "intermediate_size_mlp": 40,
            "num_local_experts": 2,
            "attention_chunk_size": 4,
        },
    ),
    "deepseek": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **DECODER,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
}


def build(name):
    torch.manual_seed(0)
    if name == "clip":
        model = transformers.CLIPModel(clip())
    else:
        cls, config, options = FAMILIES[name]
        model = getattr(transformers, cls)(getattr(transformers, config)(**options))
    # Weights large enough that attention is not uniform, or a lost mask would hardly show. T5
    # starts with large ones.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and "t5" not in name:
                weight.mul_(6.0)
    return model.eval()


def clip():
    small = {**SMALL, "num_hidden_layers": 1}
    return transformers.CLIPConfig(
        text_config={**small, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**small, "image_size": 8, "patch_size": 4},
    )


def tokens(batch=2, length=11, seed=0):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


class Rows(torch.utils.data.Dataset):
    """Rows of different lengths, for a Trainer."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        row = tokens(1, 6 + index % 5, seed=index)[0]
        return {"input_ids": row, "labels": row}


def collate(rows):
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([row["input_ids"] for row in rows], True, 0),
        "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], True, 0),
        "labels": pad([row["labels"] for row in rows], True, -100),
    }


# To train in a test: one layer, over bytes and over 8 x 8 images of three classes.

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def text_model(dropout=0.2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **TINY, **QUIET, vocab_size=259, max_position_embeddings=64, attention_dropout=dropout
    )
    return transformers.LlamaForCausalLM(config)


def image_model(dropout=0.0):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        **TINY,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
        hidden_dropout_prob=dropout,
    )
    return transformers.ViTForImageClassification(config)
