"""bigkernel attention inside transformers' models: the same logits and gradients as eager.

Feature list: LLaMA, GPT-2, BERT, ViT, Gemma 2 (softcap), Mistral (sliding window), Qwen3, GPT-OSS
(sinks), T5 (position bias), ModernBERT (a window to both sides), Llama 4 (chunks), DeepSeek V3
(narrow values), BLOOM (left alone); no padding, right and left padding, packing in all its
spellings, generation with dynamic and static caches, chunked prefill, user masks, dropout, bf16
autocast, torch.compile; what is refused; patch, report and unpatch. The other ops: test_patch.py.
"""

import copy
import itertools

import pytest
import torch
import transformers
from families import DECODER, VOCAB, build, clip, tokens
from torch import nn
from transformers import DynamicCache, StaticCache

from bigkernel.data import cu_seqlens
from bigkernel.integrations import patch, unpatch
from bigkernel.integrations.masks import compact_mask, dense_mask, packed_offsets
from bigkernel.integrations.patching import report
from bigkernel.integrations.transformers import attention_forward

pytestmark = pytest.mark.usefixtures("one_thread")


DECODERS = ["llama", "mistral", "qwen3", "gemma2", "gpt2", "gpt_oss"]


def pair(name):
    """The same model with transformers' eager attention and with bigkernel's."""
    eager = build(name)
    ours = patch(copy.deepcopy(eager), quiet=True)
    eager.set_attn_implementation("eager")
    return eager, ours


def close(actual, expected, tolerance=2e-5):
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def assert_same_model(eager, ours, select=None, **inputs):
    """Logits, where ``select`` says they mean something, and every parameter's gradient."""
    weights = None
    for model in (eager, ours):
        logits = model(**inputs).logits
        kept = logits if select is None else logits[select]
        if weights is None:
            weights, expected = torch.randn_like(kept), kept
        (kept * weights).sum().backward()
    close(kept, expected)
    for (name, a), b in zip(eager.named_parameters(), ours.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            close(b.grad, a.grad, 5e-5)


# Batches, padded and not


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_logits_and_gradients_match_eager(name, side):
    eager, ours = pair(name)
    ids, mask = tokens(), torch.ones(2, 11, dtype=torch.long)
    if side == "right":
        mask[1, 7:] = 0
    elif side == "left":
        mask[1, :4] = 0
    assert_same_model(eager, ours, select=mask.bool(), input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["modernbert", "llama4", "deepseek"])
def test_less_usual_attention_matches_eager(name):
    """A window to both sides, attention in chunks, values narrower than keys."""
    eager, ours = pair(name)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    expected = eager(tokens(), attention_mask=mask).logits[mask.bool()]
    close(ours(tokens(), attention_mask=mask).logits[mask.bool()], expected)
    close(ours(tokens()).logits, eager(tokens()).logits)


def test_vit_matches_eager():
    eager, ours = pair("vit")
    assert_same_model(eager, ours, pixel_values=torch.rand(3, 1, 8, 8))


def test_t5_matches_eager_with_its_position_bias():
    eager, ours = pair("t5")
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 8:] = 0
    assert_same_model(
        eager, ours, input_ids=tokens(), attention_mask=mask, decoder_input_ids=tokens(2, 5, 1)
    )


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_users_own_mask_is_taken_as_it_is(name, kind):
    eager, ours = pair(name)
    seen = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(3)) < 0.6
    seen |= torch.eye(11, dtype=torch.bool)
    added = torch.zeros(2, 1, 11, 11).masked_fill(~seen, torch.finfo(torch.float32).min)
    ids = tokens()
    expected = eager(input_ids=ids, attention_mask=added).logits
    close(ours(input_ids=ids, attention_mask=seen if kind == "bool" else added).logits, expected)


def test_autocast_matches_sdpa_in_bf16():
    model = build("llama")
    ids = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = model(ids).logits.float()
        actual = patch(model, quiet=True)(ids).logits.float()
    exact = unpatch(model)(ids).logits
    assert (actual - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-3


# Packed documents


PACKED = [
    *[(name, spelling) for name in DECODERS for spelling in ("cu_seq_lens", "position_ids")],
    *[(name, spelling) for name in DECODERS for spelling in ("cache", "ones")],
]


@pytest.mark.parametrize(("name", "spelling"), PACKED)
def test_packed_documents_do_not_see_each_other(name, spelling):
    eager, ours = pair(name)
    lengths = [5, 1, 9, 3]
    documents = [tokens(1, n, seed=n) for n in lengths]
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    extra = {}
    if spelling == "cu_seq_lens":
        offsets = cu_seqlens(positions)
        extra = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
        extra |= {"max_length_q": 9, "max_length_k": 9, "use_cache": True}
    elif spelling == "cache":
        extra = {"use_cache": True}
    elif spelling == "ones":
        extra = {"attention_mask": torch.ones_like(packed), "use_cache": False}
    else:
        extra = {"use_cache": False}
    actual = ours(packed, position_ids=positions, **extra).logits
    expected = torch.cat([eager(document).logits for document in documents], dim=1)
    close(actual, expected)


def test_packed_rows_of_a_batch_and_their_gradients():
    eager, ours = pair("mistral")
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 4]])
    ids = tokens(2, 8)
    assert_same_model(eager, ours, input_ids=ids, position_ids=positions, use_cache=False)


def test_packed_bert_needs_offsets_and_then_does_not_leak():
    eager, ours = pair("bert")
    a, b = tokens(1, 4), tokens(1, 6, seed=1)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    offsets = torch.tensor([0, 4, 10], dtype=torch.int32)
    actual = ours(
        torch.cat([a, b], 1), position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets
    ).logits
    close(actual, torch.cat([eager(a).logits, eager(b).logits], 1))


def test_packed_loss_is_that_of_the_documents_apart():
    _, ours = pair("llama")
    from bigkernel.data import PackedDataset, PackingCollator, build_tokenizer

    tokenizer = build_tokenizer("bytes")
    ours.resize_token_embeddings(259)
    texts = ["a first document", "second", "and a third one"]
    batch = PackingCollator()([PackedDataset(texts, tokenizer, 40)[0]])
    count = int((batch["labels"] != -100).sum())
    packed = ours(**batch).loss
    apart = sum(
        ours(ids, labels=ids, num_items_in_batch=count).loss
        for ids in (torch.tensor([[*text.encode(), 258]]) for text in texts)
    )
    close(packed, apart)


# Positions that are not 0, 1, 2, ...

FAMILIES = [
    *DECODERS,
    *("qwen2", "gemma3", "phi", "gpt_neox", "opt", "llama4"),
]

# Positions of a row of twelve, and where its documents begin.
POSITIONS = {
    "gap": ([0, 1, 2, 3, 4, 5, 40, 41, 42, 43, 44, 45], [0]),
    "stride 2": ([*range(0, 24, 2)], [0]),
    "from 7": ([*range(7, 19)], [0]),
    "four each": ([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [0]),
    "constant": ([3] * 12, [0]),
    "zeros": ([0] * 12, [0]),
    "reversed": ([*range(11, -1, -1)], [0]),
    "shuffled": ([5, 0, 3, 1, 11, 2, 4, 10, 7, 9, 8, 6], [0]),
    "right padding": ([0, 1, 2, 3, 4, 5, 6, 1, 1, 1, 1, 1], [0]),
    "left padding": ([1, 1, 1, 1, 0, 1, 2, 3, 4, 5, 6, 7], [0, 4]),
    "packed": ([0, 1, 2, 3, 4, 0, 0, 1, 2, 0, 1, 2], [0, 5, 6, 9]),
    "packed, cut off before": ([3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7, 0], [0, 3, 11]),
    "packed with gaps": ([0, 1, 2, 30, 31, 0, 1, 20, 21, 22, 0, 9], [0, 5, 10]),
    "packed, two each": ([0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2], [0, 6]),
}


@pytest.mark.parametrize("name", [*FAMILIES, "mistral with a dense mask"])
@pytest.mark.parametrize("mask", ["none", "cache", "ones", "padded"])
def test_positions_make_documents_only_where_they_return_to_0(name, mask):
    """What is meant is eager's result of each document by itself, with a mask of ones.

    eager itself looks at positions only where there is neither mask nor cache ("none"), and then
    cuts at every step that is not 1; elsewhere it takes each row for one sequence, and packed
    documents leak; so do ours where a model keeps its positions from its attention (Llama 4). With
    padding the mask alone counts, for both.
    """
    name, *dense = name.split(" with ")
    eager, ours = pair(name)
    if dense:
        ours.set_attn_implementation("bigkernel")
    ids = tokens(1, 12)
    for kind, (positions, starts) in POSITIONS.items():
        at = torch.tensor([positions])
        real = torch.ones(1, 12, dtype=torch.bool)
        given = {"use_cache": mask == "cache"}
        if mask == "ones":
            given["attention_mask"] = torch.ones_like(ids)
        if mask == "padded":
            real[:, :4] = False
            given["attention_mask"] = real.long()
            with torch.no_grad():
                expected = eager(ids, position_ids=at, **given).logits
        else:
            if name == "llama4" and mask != "none":
                starts = [0]
            with torch.no_grad():
                expected = torch.cat(
                    [
                        eager(
                            ids[:, a:b],
                            position_ids=at[:, a:b],
                            attention_mask=torch.ones_like(ids[:, a:b]),
                        ).logits
                        for a, b in itertools.pairwise([*starts, 12])
                    ],
                    dim=1,
                )
        with torch.no_grad():
            actual = ours(ids, position_ids=at, **given).logits
        try:
            close(actual[real], expected[real])
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from None


@pytest.mark.parametrize(("positions", "starts"), POSITIONS.values(), ids=POSITIONS)
def test_offsets_of_documents_in_rows_of_any_positions(positions, starts):
    from bigkernel.data import PackingCollator

    assert cu_seqlens(torch.tensor([positions])).tolist() == [*starts, 12]
    other, own = POSITIONS["packed"]
    both = [*starts, *(12 + start for start in own), 24]
    assert cu_seqlens(torch.tensor([positions, other])).tolist() == both
    rows = [{"input_ids": row, "position_ids": row, "labels": row} for row in (positions, other)]
    assert PackingCollator()(rows)["cu_seq_lens_q"].tolist() == both


@pytest.mark.parametrize("kind", ["gap", "four each", "packed with gaps"])
@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_a_batch_with_irregular_positions_and_its_gradients(name, kind):
    """One irregular row beside one that is really packed."""
    eager, ours = pair(name)
    at = torch.tensor([POSITIONS[kind][0], POSITIONS["packed"][0]])
    document = torch.zeros(2, 12, dtype=torch.long)
    for row, start in zip(document, (POSITIONS[kind][1], POSITIONS["packed"][1]), strict=True):
        row[start] = 1
    document = document.cumsum(1)
    places = torch.arange(12)
    seen = (document[:, :, None] == document[:, None]) & (places[:, None] >= places)
    if name == "mistral":
        seen &= places[:, None] - places < 4
    added = torch.zeros(2, 1, 12, 12).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    ids = tokens(2, 12)
    expected = eager(ids, position_ids=at, attention_mask=added).logits
    actual = ours(ids, position_ids=at, use_cache=False).logits
    close(actual, expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for a, b in zip(eager.parameters(), ours.parameters(), strict=True):
        close(b.grad, a.grad, 5e-5)


# Caches


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_matches_eager(name, cache):
    eager, ours = pair(name)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    options = {
        "attention_mask": mask,
        "max_new_tokens": 7,
        "min_new_tokens": 7,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
        "disable_compile": True,
    }
    if cache == "static":
        options["cache_implementation"] = "static"
    expected = eager.generate(tokens(2, 6), **options)
    actual = ours.generate(tokens(2, 6), **options)
    assert torch.equal(actual.sequences, expected.sequences)
    close(torch.stack(actual.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_in_chunks_matches_one_forward(name, cache):
    eager, ours = pair(name)
    ids = tokens(2, 12)
    if cache == "dynamic":
        past = DynamicCache(config=ours.config)
    else:
        past = StaticCache(config=ours.config, max_cache_len=20)
    with torch.no_grad():
        parts = [
            ours(part, past_key_values=past, use_cache=True).logits for part in ids.split(5, 1)
        ]
        close(torch.cat(parts, 1), eager(ids).logits)


# Attention weights


def assert_same_weights(actual, expected, rows=None):
    kinds = [name for name in expected if name.endswith("attentions")]
    assert kinds
    for kind in kinds:
        assert len(actual[kind]) == len(expected[kind])
        for a, b in zip(actual[kind], expected[kind], strict=True):
            if rows is not None and a.shape[2] == rows.shape[1]:
                a, b = a.transpose(1, 2)[rows], b.transpose(1, 2)[rows]
            close(a, b)


@pytest.mark.parametrize("name", [*FAMILIES, "deepseek", "modernbert", "bert", "vit", "t5"])
def test_attention_weights_are_eagers_where_they_are_asked_for(name):
    eager, ours = pair(name)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, :4] = False
    inputs = {"input_ids": tokens(), "attention_mask": real.long()}
    if name == "vit":
        inputs, real = {"pixel_values": torch.rand(3, 1, 8, 8)}, None
    if name == "t5":
        inputs["decoder_input_ids"] = tokens(2, 5, 1)
    kept = ours(**inputs)
    assert not any(kept.get(kind) for kind in kept if kind.endswith("attentions"))
    assert_same_weights(
        ours(**inputs, output_attentions=True), eager(**inputs, output_attentions=True), real
    )
    without = {key: value for key, value in inputs.items() if key != "attention_mask"}
    assert_same_weights(
        ours(**without, output_attentions=True), eager(**without, output_attentions=True)
    )


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_weights_of_cross_attention(name):
    torch.manual_seed(0)
    config = build(name).config
    config.is_decoder = config.add_cross_attention = True
    kind = {"gpt2": transformers.GPT2LMHeadModel, "bert": transformers.BertLMHeadModel}[name]
    eager = kind(config).eval()
    ours = patch(copy.deepcopy(eager), quiet=True)
    eager.set_attn_implementation("eager")
    inputs = {
        "input_ids": tokens(),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
    }
    expected = eager(**inputs, output_attentions=True)
    assert expected.cross_attentions[0].shape == (2, 4, 11, 7)
    actual = ours(**inputs, output_attentions=True)
    assert_same_weights(actual, expected)
    close(actual.logits, expected.logits)
    close(ours(**inputs).logits, expected.logits)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_attention_weights_of_packed_documents(name):
    eager, ours = pair(name)
    lengths = [5, 1, 6]
    documents = [tokens(1, n, seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = torch.cat(documents, 1)
    actual = ours(packed, position_ids=positions, use_cache=False, output_attentions=True)
    for layer, weights in enumerate(actual.attentions):
        expected = torch.zeros_like(weights)
        start = 0
        for document in documents:
            own = eager(document, output_attentions=True).attentions[layer]
            here = slice(start, start + document.shape[1])
            expected[:, :, here, here] = own
            start = here.stop
        close(weights, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_attention_weights_while_generating(cache):
    eager, ours = pair("mistral")
    options = {
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]),
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "output_attentions": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
        "disable_compile": True,
        "cache_implementation": None if cache == "dynamic" else cache,
    }
    expected = eager.generate(tokens(2, 6), **options).attentions
    actual = ours.generate(tokens(2, 6), **options).attentions
    for ours_step, theirs_step in zip(actual[1:], expected[1:], strict=True):
        for a, b in zip(ours_step, theirs_step, strict=True):
            close(a, b)


def test_attention_weights_that_cannot_be_had_are_told(monkeypatch):
    """A layer without an eager function warns as transformers' sdpa does."""
    from bigkernel.integrations import transformers as registered

    told = []
    monkeypatch.setattr(registered.logger, "warning_once", told.append)
    _, weights = attention_forward(Layer(), *states(), None, output_attentions=True)
    assert weights is None
    assert ["does not support `output_attentions=True` in Layer" in text for text in told] == [True]
    attention_forward(Layer(), *states(), None)
    assert len(told) == 1


# Compiled


def test_a_compiled_model_is_one_graph():
    eager, ours = pair("gemma2")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    expected = eager(tokens(), attention_mask=mask).logits[mask.bool()]
    actual = compiled(tokens(), attention_mask=mask).logits[mask.bool()]
    close(actual, expected)
    actual.sum().backward()


@pytest.mark.parametrize("hidden_by", ["nothing", "mask", "cache"])
def test_compiled_packed_documents_do_not_see_each_other(hidden_by):
    """Where an attention mask of ones or a cache keeps them from compiled code, it fails."""
    ours = patch(build("llama"), quiet=True)
    given = {"attention_mask": torch.ones(1, 11)} if hidden_by == "mask" else {}
    given["use_cache"] = hidden_by == "cache"
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]])
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for positions in (torch.arange(11)[None], torch.arange(11)[None] * 3, packed):
        expected = ours(tokens(1), position_ids=positions, **given).logits
        if positions is packed and hidden_by != "nothing":
            with pytest.raises(RuntimeError, match=r"packed documents.* Leave attention_mask out"):
                compiled(tokens(1), position_ids=positions, **given)
        else:
            close(compiled(tokens(1), position_ids=positions, **given).logits, expected)


# Dropout


def test_dropout_is_applied_in_training_only_and_follows_the_seed():
    model = build("llama")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    patch(model, quiet=True)
    ids = tokens()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    torch.manual_seed(1)
    first, second = model(ids).logits, model(ids).logits
    torch.manual_seed(1)
    assert torch.equal(model(ids).logits, first)
    assert not torch.equal(first, second)


def test_gradient_checkpointing_repeats_the_dropout():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    patch(model, quiet=True).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(2)
        model(tokens(), use_cache=False).logits.square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    close(gradients[1], gradients[0])


# What is refused


class Layer(nn.Module):
    is_causal = True


def states(batch=1, length=4):
    return (torch.randn(batch, 2, length, 8) for _ in range(3))


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks", "cache", "alibi"])
def test_arguments_that_would_be_lost_are_refused(name):
    with pytest.raises(ValueError, match=rf"Layer passes {name}, and .* not supported"):
        attention_forward(Layer(), *states(), None, **{name: torch.zeros(1)})


def test_contradictory_packing_is_refused():
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    both = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    with pytest.raises(ValueError, match="given together"):
        attention_forward(Layer(), *states(), None, cu_seq_lens_q=offsets)
    with pytest.raises(ValueError, match="exclude each other"):
        attention_forward(Layer(), *states(), torch.tensor([[1, 1, 1, 0]]).bool(), **both)
    with pytest.raises(ValueError, match="position bias cannot be combined"):
        attention_forward(Layer(), *states(), None, position_bias=torch.zeros(1, 2, 4, 4), **both)


def test_a_module_without_is_causal_counts_as_causal():
    q, k, v = states()
    expected, _ = attention_forward(Layer(), q, k, v, None)
    assert torch.equal(attention_forward(nn.Module(), q, k, v, None)[0], expected)
    assert not torch.equal(attention_forward(Layer(), q, k, v, None, is_causal=False)[0], expected)


# Masks


def test_masks_are_as_small_as_they_can_be():
    from transformers import masking_utils as mu

    sizes = {"batch_size": 2, "q_length": 6, "kv_length": 6}
    causal = {**sizes, "mask_function": mu.causal_mask_function}
    ones, padded = torch.ones(2, 6).bool(), torch.ones(2, 6).bool()
    padded[0, 4:] = False
    for make in (compact_mask, dense_mask):
        assert make(**causal) is None
        assert make(**causal, attention_mask=ones) is None
    assert torch.equal(compact_mask(**causal, attention_mask=padded), padded)
    assert dense_mask(**causal, attention_mask=padded).shape == (2, 1, 6, 6)
    window = {**sizes, "mask_function": mu.sliding_window_causal_mask_function(3)}
    assert compact_mask(**window) is None
    assert dense_mask(**window, local_size=3).shape == (2, 1, 6, 6)
    document = torch.tensor([[0, 0, 1, 1, 1, 2], [0] * 6])
    packed = mu.and_masks(mu.causal_mask_function, mu.packed_sequence_mask_function(document))
    assert compact_mask(**sizes, mask_function=packed).tolist() == [[0, 2, 5, 6, 12]]
    own = mu.or_masks(mu.causal_mask_function, lambda b, h, q, k: k < 2)
    assert compact_mask(**sizes, mask_function=own, allow_is_causal_skip=False).shape[-2:] == (6, 6)
    # Queries at the start of a longer cache: no diagonal in the corner says that.
    early = {**causal, "kv_length": 9}
    assert compact_mask(**early).shape == dense_mask(**early).shape == (2, 1, 6, 9)
    late = {**causal, "kv_length": 9, "q_offset": 3}
    assert compact_mask(**late) is None
    # A static cache counts on the device; the keys behind the last query are empty.
    static = {**causal, "kv_length": 9, "q_offset": torch.tensor(2)}
    for make in (compact_mask, dense_mask):
        seen = make(**static)
        assert torch.equal(seen[0, 0], torch.ones(6, 9).tril(2).bool())
    # Two kinds of documents at once.
    other = mu.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 0, 1, 1], [0] * 6]))
    both = mu.and_masks(packed, other)
    both = compact_mask(**sizes, mask_function=both, allow_is_causal_skip=False)
    number = torch.tensor([0, 0, 1, 1, 2, 3])
    assert torch.equal(both[0, 0], (number[:, None] == number) & torch.ones(6, 6).tril().bool())


def test_packed_offsets_are_read_once():
    positions = torch.tensor([[0, 1, 0, 1]])
    offsets = packed_offsets(positions, 1)
    assert offsets.tolist() == [0, 2, 4]
    assert packed_offsets(positions, 1) is offsets
    assert packed_offsets(positions, 2).tolist() == [0, 2, 4, 6, 8]
    assert packed_offsets(positions, 1) is not None
    positions[0, 2:] = torch.tensor([2, 3])
    assert packed_offsets(positions, 1) is None


def test_a_forward_looks_at_positions_once(monkeypatch):
    """Not in every layer, though a row of positions for a whole batch is expanded there."""
    from bigkernel.integrations import masks

    _, ours = pair("llama")
    calls = []
    find = masks.document_starts
    monkeypatch.setattr(masks, "document_starts", lambda p: calls.append(p) or find(p))
    ours(tokens(), attention_mask=torch.ones(2, 11), position_ids=torch.arange(11)[None])
    assert len(calls) == 1


# patch, report, unpatch


def test_patch_says_what_it_did_and_unpatch_undoes_it(capsys):
    model = build("llama")
    before = model(tokens()).logits
    assert patch(model) is model
    assert "replaced attention in 2 x LlamaAttention (was sdpa)" in capsys.readouterr().out
    assert model.config._attn_implementation == "bigkernel_compact"
    patch(model, quiet=True)
    assert capsys.readouterr().out == ""
    assert unpatch(model) is model
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens()).logits, before)
    assert report(unpatch(model)).replaced == []
    assert not [name for name in vars(model) if "bigkernel" in name]


def test_patch_again_after_another_choice():
    model = patch(build("llama"), quiet=True)
    model.set_attn_implementation("eager")
    assert patch(model, quiet=True).config._attn_implementation == "bigkernel_compact"
    assert "attention in 2 x LlamaAttention (was eager)" in report(model).replaced
    assert unpatch(model).config._attn_implementation == "eager"
    patch(model, quiet=True).set_attn_implementation("sdpa")
    assert unpatch(model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_part_and_the_whole_are_unpatched_in_any_order(inner_first):
    model = build("llama")
    before = model.config
    parts = [model.model, model]
    for part in parts:
        patch(part, quiet=True)
    # The whole has taken its part over, so that the part alone cannot be unpatched.
    unpatch(model.model)
    assert model.model.config._attn_implementation == "bigkernel_compact"
    for part in parts if inner_first else parts[::-1]:
        unpatch(part)
    assert all(m.config is before for m in model.modules() if hasattr(m, "config"))
    assert before._attn_implementation == "sdpa"


def test_a_part_of_what_is_patched_is_patched(capsys):
    model = patch(build("llama"), quiet=True)
    patch(model.model)
    assert "replaced attention in 2 x LlamaAttention" in capsys.readouterr().out
    unpatch(model.model)
    assert model.model.config._attn_implementation == "bigkernel_compact"
    unpatch(model)
    assert model.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (transformers.LlamaForCausalLM, transformers.LlamaConfig(**DECODER)),
        (transformers.CLIPModel, clip()),
    ],
    ids=["llama", "clip"],
)
def test_models_of_one_config_are_patched_by_themselves(kind, config):
    def configs(model):
        held = [module.__dict__.get("config") for module in model.modules()]
        return [one for one in held if one is not None]

    model, other = kind(config), kind(config)
    before = configs(model)
    state = {id(one): dict(vars(one)) for one in before}
    patch(model, quiet=True)
    assert all(one._attn_implementation.startswith("bigkernel") for one in configs(model))
    assert all(one._attn_implementation == "sdpa" for one in configs(other))
    assert all(vars(one) == state[id(one)] for one in before)
    clone = copy.deepcopy(model)
    unpatch(model)
    assert all(a is b for a, b in zip(configs(model), before, strict=True))
    assert all(vars(one) == state[id(one)] for one in before)
    assert all(one._attn_implementation.startswith("bigkernel") for one in configs(clone))
    assert all(one._attn_implementation == "sdpa" for one in configs(unpatch(clone)))
    # Two in one: both are switched and put back.
    both = patch(nn.ModuleList([model, other]), quiet=True)
    assert all(one._attn_implementation.startswith("bigkernel") for one in configs(both))
    unpatch(both)
    assert all(a is b for a, b in zip(configs(both), before + before, strict=True))


def test_what_is_changed_in_a_patched_models_config_stays():
    model = build("llama")
    before = model.config
    patch(model, quiet=True)
    model.resize_token_embeddings(VOCAB + 3)
    model.config.use_cache = False
    model.config.note = "new"
    del model.config.bos_token_id
    unpatch(model)
    assert model.config is before
    assert (before.vocab_size, before.use_cache, before.note) == (VOCAB + 3, False, "new")
    assert "bos_token_id" not in vars(before)
    assert before._attn_implementation == "sdpa"


def test_patch_finds_models_inside_and_names_what_it_leaves(capsys):
    outer = nn.ModuleDict(
        {
            "eager": build("llama"),
            "vit": build("vit"),
            "torch": nn.TransformerEncoderLayer(8, 2),
        }
    )
    outer["eager"].set_attn_implementation("eager")
    patch(outer)
    out = capsys.readouterr().out
    assert "2 x LlamaAttention (was eager)" in out
    assert "2 x ViT" in out
    assert "left attention in 1 x MultiheadAttention: torch.nn.MultiheadAttention" in out
    unpatch(outer)
    assert outer["eager"].config._attn_implementation == "eager"
    assert outer["vit"].config._attn_implementation == "sdpa"


def test_patch_leaves_a_model_that_wants_attention_weights(capsys):
    model = build("llama")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    patch(model)
    assert "left attention in 2 x LlamaAttention: config.output_atten" in capsys.readouterr().out
    assert len(model(tokens()).attentions) == 2


def test_a_model_that_keeps_its_window_to_itself_gets_whole_masks(monkeypatch):
    """Compact masks leave the window to the layers, which must then pass it on."""
    from bigkernel.integrations import attention
    from bigkernel.integrations import transformers as registered

    model = build("mistral")
    assert attention._name_for(model) == registered.COMPACT_NAME
    read = attention._source
    monkeypatch.setattr(attention, "_source", lambda cls: read(cls).replace("sliding_window=", ""))
    assert attention._name_for(model) == registered.NAME
    model.config.sliding_window = None
    assert attention._name_for(model) == registered.COMPACT_NAME


def test_patch_leaves_a_model_with_attention_of_its_own(capsys):
    model = patch(build("bloom"))
    assert "left attention in 2 x BloomAttention: its attention does no" in capsys.readouterr().out
    assert model.config._attn_implementation == unpatch(model).config._attn_implementation


@pytest.mark.parametrize("function", [patch, unpatch])
def test_patch_wants_a_module(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        function(None)


def test_patch_a_model_without_attention(capsys, with_products):
    unpatch(patch(nn.Linear(2, 2)))
    assert "found nothing to replace" in capsys.readouterr().out


def test_the_choice_is_not_saved(tmp_path):
    model = patch(build("llama"), quiet=True)
    model.save_pretrained(tmp_path)
    assert "bigkernel" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    close(loaded.eval()(tokens()).logits, model(tokens()).logits)


def test_by_name_in_from_config():
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**DECODER), attn_implementation="bigkernel"
    ).eval()
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0
    actual = model(tokens(), attention_mask=mask).logits
    model.set_attn_implementation("eager")
    close(actual[mask.bool()], model(tokens(), attention_mask=mask).logits[mask.bool()])
