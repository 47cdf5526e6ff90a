"""Small models of the families that the integrations serve."""

import torch
import transformers

VOCAB = 61


DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def build(name):
    t, quiet = transformers, {"bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    if name == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**DECODER))
    elif name == "mistral":
        model = t.MistralForCausalLM(t.MistralConfig(**DECODER, sliding_window=4))
    elif name == "qwen2":
        config = t.Qwen2Config(
            **DECODER, use_sliding_window=True, sliding_window=4, max_window_layers=1
        )
        model = t.Qwen2ForCausalLM(config)
    elif name == "gemma3":
        config = t.Gemma3TextConfig(
            **DECODER, head_dim=8, sliding_window=4, query_pre_attn_scalar=8
        )
        model = t.Gemma3ForCausalLM(config)
    elif name == "phi":
        model = t.PhiForCausalLM(t.PhiConfig(**DECODER))
    elif name == "gpt_neox":
        config = {**DECODER, "num_key_value_heads": None}
        model = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**config))
    elif name == "opt":
        config = t.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            **quiet,
        )
        model = t.OPTForCausalLM(config)
    elif name == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER, head_dim=8))
    elif name == "gemma2":
        config = t.Gemma2Config(
            **DECODER,
            head_dim=8,
            sliding_window=4,
            attn_logit_softcapping=0.5,
            query_pre_attn_scalar=8,
        )
        model = t.Gemma2ForCausalLM(config)
    elif name == "gpt2":
        config = t.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **quiet
        )
        model = t.GPT2LMHeadModel(config)
    elif name == "gpt_oss":
        config = t.GptOssConfig(
            **{**DECODER, "num_hidden_layers": 2},
            head_dim=8,
            sliding_window=4,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
        model = t.GptOssForCausalLM(config)
    elif name == "bert":
        config = t.BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=64,
        )
        model = t.BertForMaskedLM(config)
    elif name == "roberta":
        config = t.RobertaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=64,
            pad_token_id=0,
        )
        model = t.RobertaForMaskedLM(config)
    elif name == "clip":
        model = t.CLIPModel(clip())
    elif name == "vit":
        config = t.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,
        )
        model = t.ViTForImageClassification(config)
    elif name in ("t5", "t5 gated"):
        config = t.T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            feed_forward_proj="relu" if name == "t5" else "gated-gelu",
        )
        model = t.T5ForConditionalGeneration(config)
    elif name == "modernbert":
        config = t.ModernBertConfig(
            **{**DECODER, "num_key_value_heads": None},
            local_attention=4,
            global_attn_every_n_layers=2,
            cls_token_id=None,
            sep_token_id=None,
        )
        model = t.ModernBertForMaskedLM(config)
    elif name == "llama4":
        config = t.Llama4TextConfig(
            **DECODER,
            head_dim=8,
            intermediate_size_mlp=40,
            num_local_experts=2,
            attention_chunk_size=4,
        )
        model = t.Llama4ForCausalLM(config)
    elif name == "deepseek":
        config = t.DeepseekV3Config(
            **{**DECODER, "num_key_value_heads": 4},
            moe_intermediate_size=16,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
        model = t.DeepseekV3ForCausalLM(config)
    elif name == "bloom":
        config = t.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
        model = t.BloomForCausalLM(config)
    else:
        raise KeyError(name)
    # Weights large enough that attention is not uniform, or a lost mask would hardly show. T5
    # starts with large ones.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and not name.startswith("t5"):
                weight.mul_(6.0)
    return model.eval()


def clip():
    small = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    return transformers.CLIPConfig(
        text_config={**small, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**small, "image_size": 8, "patch_size": 4},
    )


def tokens(batch=2, length=11, seed=0):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
