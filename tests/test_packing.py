"""Documents of different lengths in a batch: packed, padded, one by one; the same training.

Feature list: PackingCollator and PaddingCollator (columns, masks, labels, positions, padding to a
multiple, other collators, bad examples); every family's loss and gradients packed, padded and one
by one, to the rule of accuracy, with one sequence a document and with two; models that would leak,
refused by name; the Trainer with
packing=True: losses, gradient accumulation, masked language models, evaluation, prediction,
streams, saved and resumed; padding grouped by length; torch.compile without recompiling.
"""

import copy
import itertools

import pytest
import torch
import transformers
from families import FAMILIES, VOCAB, build, tokens
from test_patch import with_exact_norms
from test_trainer import on_two_ranks
from torch import nn
from torch._dynamo.utils import counters

import bigkernel
from bigkernel import recipes
from bigkernel.data import PackedDataset, PackingCollator, PaddingCollator, build_tokenizer
from bigkernel.integrations import t5
from bigkernel.integrations.packing import Packing, PackingError, packing_of
from bigkernel.testing.tolerance import assert_as_accurate
from bigkernel.trainer import Trainer, TrainingArguments

pytestmark = pytest.mark.usefixtures("every_call")
LENGTHS = [5, 1, 13, 2, 8]
CAUSAL = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "gpt_neox", "gpt2"]
MASKED = ["bert", "roberta", "modernbert"]
TWO = ["t5", "t5 untied", "umt5", "t5 gated", "mt5"]
SOME_TWO = [*TWO[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in TWO[3:])]
# Tokens of a document, and its labels.
PAIRS = [(5, 3), (1, 1), (13, 1), (2, 9), (8, 0), (1, 6)]


def documents(lengths=LENGTHS, masked=False, seed=0):
    """Examples as lists; of a masked language model each third token from the first has a label."""
    made = []
    for number, length in enumerate(lengths):
        ids = tokens(1, length, seed=seed + number)[0].tolist()
        example = {"input_ids": ids}
        if masked:
            example["labels"] = [n if i % 3 == 0 else -100 for i, n in enumerate(ids)]
        made.append(example)
    return made


def pairs(lengths=PAIRS, seed=0):
    """Examples of two sequences; each fifth label from the third on is -100, never the last."""
    made = []
    for number, (read, told) in enumerate(lengths):
        ids, labels = (tokens(1, n, seed=seed + 2 * number + n % 2)[0] for n in (read, told))
        labels[2:-1:5] = -100
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


def family(name):
    model = build(name.removesuffix(" untied"))
    if name.endswith(" untied"):  # as T5 1.1 is
        model.config.scale_decoder_outputs = False
        model.lm_head.weight = nn.Parameter(0.5 * model.lm_head.weight.detach().flip(0))
    return model


def loss_of(model):
    return lambda batch: model(**batch).loss


# Collators


def test_examples_are_packed_with_what_they_have():
    rows = [
        {"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1], "attention_mask": [1, 1, 1]},
        {"input_ids": torch.tensor([8]), "token_type_ids": [1], "attention_mask": None},
        {"input_ids": [], "token_type_ids": [], "attention_mask": []},
        {"input_ids": [0, 0, 9, 4], "token_type_ids": [0] * 4, "attention_mask": [0, 0, 1, 1]},
    ]
    batch = PackingCollator()(rows)
    expected = {
        "input_ids": [5, 6, 7, 8, 9, 4],
        "token_type_ids": [0, 0, 1, 1, 0, 0],
        "labels": [-100, 6, 7, -100, -100, 4],
        "position_ids": [0, 1, 2, 0, 0, 1],
    }
    for name, values in expected.items():
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == [values], name
    for side in ("q", "k"):
        assert batch.pop(f"cu_seq_lens_{side}").tolist() == [0, 3, 4, 6]
        assert batch.pop(f"max_length_{side}") == 3
    assert batch.keys() == expected.keys()


def test_labels_of_a_loss_that_is_not_shifted_stay():
    rows = documents([4, 2], masked=True)
    given = [n for row in rows for n in row["labels"]]
    assert given[0] != -100
    assert given[4] != -100
    assert PackingCollator(shifted=False)(rows)["labels"].tolist() == [given]
    assert "labels" not in PackingCollator(shifted=False)(documents())
    assert "labels" not in PaddingCollator(shifted=False)(documents())
    assert PackingCollator()(rows)["labels"][0, [0, 4]].tolist() == [-100, -100]


def test_positions_may_start_elsewhere():
    collate = PackingCollator(first_position=2)
    assert collate(documents([2, 3]))["position_ids"].tolist() == [[2, 3, 2, 3, 4]]
    row = {"input_ids": [1, 2, 3, 4], "position_ids": [2, 3, 2, 3]}
    assert collate([row])["cu_seq_lens_q"].tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="position 0, and positions of this model start at 2"):
        collate([{"input_ids": [1, 2], "position_ids": [0, 1]}])


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_padding_to_a_multiple_is_documents_of_their_own(multiple):
    batch = PackingCollator(pad_to_multiple_of=multiple)(documents())
    plain = PackingCollator()(documents())
    total, longest = sum(LENGTHS), max(LENGTHS)
    assert batch["input_ids"].shape[1] == -(-total // multiple) * multiple
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(batch[name][:, :total], plain[name])
    assert (batch["labels"][:, total:] == -100).all()
    lengths = batch["cu_seq_lens_q"].diff()
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert lengths[: len(LENGTHS)].tolist() == LENGTHS
    assert int(lengths.sum()) == batch["input_ids"].shape[1]
    assert bool((lengths > 0).all())
    assert int(lengths.max()) == batch["max_length_q"] == longest
    assert batch["position_ids"].tolist() == [[p for n in lengths.tolist() for p in range(n)]]


def test_padding_pads_on_the_right():
    rows = [{"input_ids": [5, 6, 7], "token_type_ids": [1, 1, 1]}]
    rows.append({"input_ids": [0, 8], "token_type_ids": [0, 1], "attention_mask": [0, 1]})
    batch = PaddingCollator(9, pad_to_multiple_of=4)(rows)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7, 9], [8, 9, 9, 9]],
        "token_type_ids": [[1, 1, 1, 0], [1, 0, 0, 0]],
        "labels": [[5, 6, 7, -100], [8, -100, -100, -100]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0]],
    }


def test_examples_of_two_sequences_are_packed():
    rows = [
        {"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1], "labels": [8, -100, 9, -100]},
        {"input_ids": [1], "token_type_ids": [0], "labels": [-100]},  # nothing to learn
        {"input_ids": [], "token_type_ids": [], "labels": [4]},
        {
            "input_ids": [0, 3],
            "token_type_ids": [0, 1],
            "attention_mask": [0, 1],
            "labels": torch.tensor([2, 6, -100]),
            "decoder_attention_mask": [1, 1, 0],
        },
    ]
    batch = PackingCollator(decoder_start_token_id=11, pad_token_id=12)(rows)
    expected = {
        "input_ids": [5, 6, 7, 3],
        "token_type_ids": [0, 0, 1, 1],
        "labels": [8, -100, 9, 4, 2, 6],
        "decoder_input_ids": [11, 8, 12, 11, 11, 2],
    }
    for name, values in expected.items():
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == [values], name
    for side, offsets in (("k", [0, 3, 3, 4]), ("q", [0, 3, 4, 6])):
        assert batch[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert batch.pop(f"cu_seq_lens_{side}").tolist() == offsets
        assert batch.pop(f"max_length_{side}") == 3
    assert batch.keys() == expected.keys()


def test_examples_of_two_sequences_are_padded():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [8]},
        {"input_ids": [3], "labels": [2, -100, 6, 4, -100]},
    ]
    batch = PaddingCollator(9, pad_to_multiple_of=2, decoder_start_token_id=11)(rows)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7, 9], [3, 9, 9, 9]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0]],
        "labels": [[8, -100, -100, -100], [2, -100, 6, 4]],
        "decoder_input_ids": [[11, 9, 9, 9], [11, 2, 9, 6]],
    }


def test_what_a_decoder_reads_may_be_given():
    row = {"input_ids": [1], "labels": [2, 3, -100], "decoder_input_ids": [7, 8, 9]}
    for collator in (PackingCollator, PaddingCollator):
        batch = collator(decoder_start_token_id=0)([row])
        assert batch["decoder_input_ids"].tolist() == [[7, 8]]


@pytest.mark.parametrize("multiple", [8, 64])
def test_two_sequences_are_padded_to_a_multiple_each(multiple):
    collate = {"decoder_start_token_id": 0}
    batch = PackingCollator(pad_to_multiple_of=multiple, **collate)(pairs())
    plain = PackingCollator(**collate)(pairs())
    kept = len(plain["cu_seq_lens_q"])
    for side, name in (("k", "input_ids"), ("q", "labels"), ("q", "decoder_input_ids")):
        total = plain[name].shape[1]
        assert batch[name].shape[1] == -(-total // multiple) * multiple
        assert torch.equal(batch[name][:, :total], plain[name])
        offsets = batch[f"cu_seq_lens_{side}"]
        assert torch.equal(offsets[:kept], plain[f"cu_seq_lens_{side}"])
        assert int(offsets[-1]) == batch[name].shape[1]
        assert int(offsets.diff().min()) >= 0
        assert int(offsets.diff().max()) == batch[f"max_length_{side}"]
    assert (batch["labels"][:, plain["labels"].shape[1] :] == -100).all()
    assert batch["cu_seq_lens_q"].shape == batch["cu_seq_lens_k"].shape


BAD_PAIRS = {
    "labels": ({"input_ids": [1]}, "example 1 has no labels, which the decoder is to predict"),
    "positions": (
        {"input_ids": [1], "labels": [2], "position_ids": [0]},
        "position_ids, which may hold several documents",
    ),
    "gap": (
        {"input_ids": [1, 2, 3], "labels": [2], "attention_mask": [1, 0, 1]},
        "attention_mask of example 1 hides tokens between others",
    ),
    "gap behind": (
        {"input_ids": [1], "labels": [2, -100, 3], "decoder_attention_mask": [1, 0, 1]},
        "decoder_attention_mask of example 1 hides tokens between others",
    ),
    "hidden label": (
        {"input_ids": [1], "labels": [2, 3], "decoder_attention_mask": [1, 0]},
        "example 1 has labels where its decoder_attention_mask is 0",
    ),
    "read": (
        {"input_ids": [1, 2], "labels": [2], "decoder_input_ids": [0, 1]},
        r"decoder_input_ids of example 1 must be one value a token, 1, got \(2,\)",
    ),
    "types": (
        {"input_ids": [1, 2], "labels": [2], "token_type_ids": [0]},
        r"token_type_ids of example 1 must be one value a token, 2, got \(1,\)",
    ),
    "columns": (
        {"input_ids": [1], "labels": [2], "token_type_ids": [0]},
        "a batch needs the same columns",
    ),
}


@pytest.mark.parametrize("collator", [PackingCollator, PaddingCollator])
@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_bad_examples_of_two_sequences_are_named(kind, collator):
    example, message = BAD_PAIRS[kind]
    with pytest.raises(ValueError, match=message):
        collator(decoder_start_token_id=0)([{"input_ids": [1, 2], "labels": [3]}, example])


def test_documents_without_labels_are_no_batch():
    with pytest.raises(ValueError, match="none of the 2 examples of the batch has a label"):
        PackingCollator(decoder_start_token_id=0)(pairs([(3, 0), (2, 0)]))


def test_two_sequences_are_bounded_each():
    with pytest.raises(ValueError, match="a document of 9 tokens is longer than max_length=8"):
        PackingCollator(8, decoder_start_token_id=0)(pairs([(3, 9)]))
    batch = PackingCollator(8, decoder_start_token_id=0)(pairs([(3, 7)]))
    assert (batch["max_length_q"], batch["max_length_k"]) == (8, 8)


BAD_EXAMPLES = {
    "gap": ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "mask of example 1 hides"),
    "label": (
        {"input_ids": [1, 2], "attention_mask": [1, 0], "labels": [1, 2]},
        "example 1 has labels where its attention_mask is 0",
    ),
    "class": ({"input_ids": [1, 2], "label": 1}, "label of example 1 must be numbers, one a token"),
    "length": (
        {"input_ids": [1, 2], "labels": [1]},
        r"labels of example 1 must be one value a token, 2, got \(1,\)",
    ),
    "text": ({"input_ids": [1], "text": "a"}, "text of example 1 .* leave out what the model"),
    "floats": ({"input_ids": [0.5]}, "input_ids of example 1 must be whole numbers"),
    "matrix": ({"input_ids": [[1], [2]]}, r"input_ids of example 1 .* a shape of \(2, 1\)"),
    "nothing": ({"ids": [1]}, "example 1 has no input_ids, got ids"),
    "list": ([1, 2], "example 1 has no input_ids, got list"),
    "columns": ({"input_ids": [1], "token_type_ids": [0]}, "a batch needs the same columns"),
}


@pytest.mark.parametrize("collate", [PackingCollator(), PaddingCollator()])
@pytest.mark.parametrize("kind", BAD_EXAMPLES)
def test_bad_examples_are_named(kind, collate):
    example, message = BAD_EXAMPLES[kind]
    with pytest.raises(ValueError, match=message):
        collate([{"input_ids": [1, 2]}, example])


def test_batches_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match="none of the 2 examples of the batch has a token"):
        PackingCollator()([{"input_ids": []}, {"input_ids": [3], "attention_mask": [0]}])
    with pytest.raises(ValueError, match="position_ids, which may hold several documents"):
        PaddingCollator()([{"input_ids": [1, 2], "position_ids": [0, 0]}])
    for cls in (PackingCollator, PaddingCollator):
        with pytest.raises(ValueError, match="pad_to_multiple_of must be 1 or more, got 0"):
            cls(pad_to_multiple_of=0)
    made = {"input_ids": torch.ones(2, 3), "labels": torch.ones(2)}
    with pytest.raises(ValueError, match=r"labels of the collator's batch .* got \(2,\)"):
        PackingCollator(collator=lambda rows: made)([1])
    with pytest.raises(ValueError, match="must give input_ids"):
        PackingCollator(collator=lambda rows: {"input_ids": [1]})([1])
    flat = {"input_ids": torch.ones(1, 3), "cu_seq_lens_q": torch.tensor([0, 1, 3])}
    with pytest.raises(ValueError, match=r"packed .* without position_ids"):
        PackingCollator(collator=lambda rows: flat)([1])


def test_batches_of_other_collators_are_packed():
    padded, flat = PaddingCollator(), transformers.DataCollatorWithFlattening
    for inner in (padded, flat(), flat(return_flash_attn_kwargs=True)):
        batch = PackingCollator(collator=inner)(documents())
        for name, expected in PackingCollator()(documents()).items():
            if isinstance(expected, torch.Tensor):
                assert torch.equal(batch[name], expected), name
            else:
                assert batch[name] == expected, name


# Families


def total_loss(model, batches):
    """The mean over all labels of the batches."""
    items, total = 0, 0.0
    for batch in batches:
        labels = batch["labels"]
        shifted = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
        count = int(((labels[:, 1:] if shifted else labels) != -100).sum())
        if count:
            total = total + model(**batch).loss * count
            items += count
    return total / items


def batches_of(kind, name, draw=0):
    if name in TWO:
        examples = pairs(seed=100 * draw)
        if kind == "packed":
            return [PackingCollator(decoder_start_token_id=0)(examples)]
        if kind == "padded":
            return [PaddingCollator(decoder_start_token_id=0)(examples)]
        examples = [example for example in examples if example["labels"]]
        return [{key: torch.tensor([x]) for key, x in row.items()} for row in examples]
    masked = name in MASKED
    examples = documents(masked=masked)
    if kind == "packed":
        first = 1 if name == "roberta" else 0  # after its padding token, 0
        return [PackingCollator(shifted=not masked, first_position=first)(examples)]
    if kind == "padded":
        return [PaddingCollator()(examples)]
    if not masked:
        examples = [{**example, "labels": example["input_ids"]} for example in examples]
    return [{key: torch.tensor([x]) for key, x in example.items()} for example in examples]


def scaled(wanted, found):
    """The loss and all gradients as one tensor, each in the scale of its largest."""
    # Some are zero but for rounding, those of the biases of keys: in a scale of their own they
    # would hide the errors of all others.
    least = 1e-2 * max(float(g.abs().max()) for g in wanted)
    return torch.cat(
        [
            (g.double() / w.abs().max().clamp(min=least)).flatten()
            for g, w in zip(found, wanted, strict=True)
        ]
    )


def run(model, batches):
    model.zero_grad()
    loss = total_loss(model, batches)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED, *SOME_TWO])
def test_packed_padded_and_one_by_one_train_alike(name):
    model = family(name)
    exact = bigkernel.patch(
        with_exact_norms(copy.deepcopy(model).double()), quiet=True, only=["attention"]
    )
    theirs = copy.deepcopy(model)
    theirs.set_attn_implementation("eager")
    ours = bigkernel.patch(model, quiet=True)
    draws = range(3 if name in TWO else 1)  # one of few tokens may be lucky
    wanted = [run(exact, batches_of("one by one", name, draw)) for draw in draws]

    def gradients(model, kind):
        found = [run(model, batches_of(kind, name, draw)) for draw in draws]
        return torch.cat([scaled(*each) for each in zip(wanted, found, strict=True)])

    right, expected = torch.cat([scaled(x, x) for x in wanted]), gradients(theirs, "padded")
    for kind in ("packed", "padded", "one by one"):
        assert_as_accurate(gradients(ours, kind).float(), right, expected.float())


@pytest.mark.parametrize("name", ["llama", "gpt2", "modernbert"])
def test_documents_that_fill_a_batch_up_change_nothing(name):
    model = bigkernel.patch(build(name), quiet=True)
    (plain,), (filled,) = batches_of("packed", name), batches_of("packed", name)
    masked = name in MASKED
    collate = PackingCollator(shifted=not masked, pad_to_multiple_of=64)
    filled = collate(documents(masked=masked))
    assert filled["input_ids"].shape == (1, 64)
    for a, b in zip(run(model, [filled]), run(model, [plain]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


# Models that keep documents apart, and those that do not


@pytest.mark.parametrize("name", SOME_TWO)
def test_documents_whose_encoder_reads_nothing(name):
    """Whose decoder attends to nothing, and is no neighbour's."""
    model, data = family(name), pairs([(4, 3), (0, 5), (7, 2)])
    one_by_one = [{key: torch.tensor([x]) for key, x in row.items()} for row in data]
    # transformers' layers fail without any token, so that of the second is hidden.
    one_by_one[1]["input_ids"] = torch.tensor([[7]])
    one_by_one[1]["attention_mask"] = torch.tensor([[0]])
    exact = bigkernel.patch(
        with_exact_norms(copy.deepcopy(model).double()), quiet=True, only=["attention"]
    )
    wanted = run(exact, one_by_one)
    ours = bigkernel.patch(model, quiet=True)
    with bigkernel.use_backend("torch"):  # transformers' own attention sees what is hidden here
        expected = scaled(wanted, run(ours, one_by_one))
    for collate in (PackingCollator, PaddingCollator):
        found = scaled(wanted, run(ours, [collate(decoder_start_token_id=0)(data)]))
        assert_as_accurate(found.float(), scaled(wanted, wanted), expected.float())


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_packed_documents_of_two_sequences_are_bounded_and_filled_up(name):
    model = bigkernel.patch(family(name), quiet=True)
    (plain,) = batches_of("packed", name)
    for collate in (
        PackingCollator(20, decoder_start_token_id=0),
        PackingCollator(pad_to_multiple_of=64, decoder_start_token_id=0),
    ):
        for a, b in zip(run(model, [collate(pairs())]), run(model, [plain]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    del plain["max_length_q"], plain["max_length_k"]
    for a, b in zip(run(model, [plain]), run(model, batches_of("packed", name)), strict=True):
        assert torch.equal(a, b)


def test_a_position_bias_is_made_for_the_longest_document_alone(monkeypatch):
    """Of all tokens of a row it would be larger than all the padding."""
    model = bigkernel.patch(family("t5"), quiet=True)
    made = []
    compute = transformers.models.t5.modeling_t5.T5Attention.compute_bias

    def noted(self, *lengths, **options):
        made.append(lengths)
        return compute(self, *lengths, **options)

    monkeypatch.setattr(transformers.models.t5.modeling_t5.T5Attention, "compute_bias", noted)
    model(**batches_of("packed", "t5")[0])
    assert made == [(13, 13), (9, 9)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_and_checkpointing_of_two_packed_sequences(checkpointing):
    """Training mode: the same draws again are the same gradients, others are others."""
    model = bigkernel.patch(family("t5"), quiet=True).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(run(model, batches_of("packed", "t5")))
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert not torch.equal(found[0][0], found[2][0])


def test_padding_beside_packed_documents_of_two_sequences_is_refused():
    model = bigkernel.patch(family("t5"), quiet=True)
    (batch,) = batches_of("packed", "t5")
    for name, like in (("attention_mask", "input_ids"), ("decoder_attention_mask", "labels")):
        mask = torch.ones_like(batch[like])
        assert torch.equal(model(**batch, **{name: mask}).loss, model(**batch).loss)
        mask[0, -1] = 0
        with pytest.raises(ValueError, match=r"packed documents .* and padding .* exclude each"):
            model(**batch, **{name: mask})
    with pytest.raises(ValueError, match="T5Attention gives no attention weights of packed"):
        model(**batch, output_attentions=True)
    del batch["cu_seq_lens_k"]
    with pytest.raises(ValueError, match="must be given together"):
        model(**batch)


def test_other_models_of_two_sequences_take_no_packed_documents():
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=40,
        decoder_ffn_dim=40, encoder_attention_heads=4, decoder_attention_heads=4,
    )  # fmt: skip
    model = bigkernel.patch(transformers.BartForConditionalGeneration(config), quiet=True)
    batch = PackingCollator(decoder_start_token_id=2)(pairs())
    with pytest.raises(ValueError, match="BartAttention is of a model with an encoder and a dec"):
        model(**batch)
    with pytest.raises(PackingError, match=r"^BartFor.* are for T5, mT5 and umT5"):
        packing_of(model, loss_of(model))


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED, "opt", "gpt_oss", "deepseek", "llama4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_how_a_model_is_packed_is_found_out(name, dtype):
    model = build(name).to(dtype)
    model.config.use_cache = False
    bigkernel.patch(model, quiet=True).train()
    before = copy.deepcopy(model.state_dict())
    shifted, first = name not in MASKED, 1 if name == "roberta" else 0
    assert packing_of(model, loss_of(model)) == Packing(shifted, first)
    assert all(module.training for module in model.modules())
    assert not model.get_input_embeddings()._forward_hooks
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_how_a_model_of_two_sequences_is_packed_is_found_out(name, dtype):
    model = bigkernel.patch(family(name).to(dtype), quiet=True).train()
    before = copy.deepcopy(model.state_dict())
    model.config.decoder_start_token_id = 3
    assert packing_of(model, loss_of(model)) == Packing(False, 0, 3, 0)
    for module in model.modules():
        assert module.training
        assert not module._forward_hooks
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_an_encoder_of_t5_alone_is_packed_as_one_sequence():
    cls, config, options = "T5ForTokenClassification", "T5Config", FAMILIES["t5"][2]
    model = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    bigkernel.patch(model, quiet=True)
    assert packing_of(model, loss_of(model)) == Packing(False, 0)


@pytest.mark.parametrize("part", ["encoder", "decoder", "cross"])
def test_a_leak_between_two_sequences_is_found(part, monkeypatch):
    """As if the documents of one of the three attentions were one."""
    model = bigkernel.patch(family("t5"), quiet=True)
    whole = t5.attention_varlen

    def leaky(q, k, v, cu_q, cu_k, causal, **options):
        which = "decoder" if causal else "cross" if len(q) != len(k) else "encoder"
        if which == part and len(cu_q) > 2:
            cu_q, cu_k = cu_q[[0, -1]], cu_k[[0, -1]]
            lengths = {"max_seqlen_q": len(q), "max_seqlen_k": len(k), "mask": None}
            options |= lengths
        return whole(q, k, v, cu_q, cu_k, causal=causal, **options)

    monkeypatch.setattr(t5, "attention_varlen", leaky)
    with pytest.raises(PackingError, match=r"^T5For.* packed documents would see each other\."):
        packing_of(model, loss_of(model))


@pytest.mark.parametrize("wrong", ["start", "padding", "shift"])
def test_what_a_decoder_reads_is_tried_out(wrong, monkeypatch):
    """A model that shifts its labels otherwise than the collator does."""
    model = bigkernel.patch(family("t5"), quiet=True)

    def own(labels):
        filled = labels.masked_fill(labels == -100, 7 if wrong == "padding" else 0)
        read = torch.cat([torch.full_like(filled[:, :1], 7 if wrong == "start" else 0), filled], 1)
        return filled if wrong == "shift" else read[:, :-1]

    monkeypatch.setattr(model, "_shift_right", own)
    with pytest.raises(PackingError, match="would not be computed as each alone"):
        packing_of(model, loss_of(model))


def test_a_config_without_a_first_token_is_refused():
    model = bigkernel.patch(family("t5"), quiet=True)
    model.config.decoder_start_token_id = None
    with pytest.raises(PackingError, match="config has no decoder_start_token_id and pad_token_id"):
        packing_of(model, loss_of(model))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bloom", "packed documents would see each other. Its attention is 'eager'"),
        ("clip", "its loss compares whole texts with whole images, one of each a row"),
        ("vit", "it has no embedding of tokens"),
    ],
)
def test_a_model_that_cannot_is_refused_by_name(name, why):
    model = bigkernel.patch(build(name), quiet=True)
    with pytest.raises(PackingError, match=f"^{type(model).__name__} cannot .*: .*{why}.* padded"):
        packing_of(model, loss_of(model))


@pytest.mark.parametrize("name", [*MASKED, "t5"])
def test_transformers_own_attention_leaks_and_is_refused(name):
    model = build(name)
    with pytest.raises(PackingError, match=r"see each other\. Its attention is 'sdpa', not bigk"):
        packing_of(model, loss_of(model))


def test_a_leak_behind_weights_of_zero_is_found():
    """A branch that starts at 0 shows nothing yet."""
    model = build("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight.zero_()
    with pytest.raises(PackingError, match="see each other"):
        packing_of(model, loss_of(model))
    for layer in model.bert.encoder.layer:
        assert not layer.attention.output.dense.weight.any()


class Positions(nn.Module):
    """One layer of no attention, with absolute positions that it counts itself."""

    def __init__(self, count):
        super().__init__()
        self.words, self.places = nn.Embedding(VOCAB, 8), nn.Embedding(99, 8)
        self.count = count

    def forward(self, input_ids, labels, position_ids=None, **_):
        places = torch.arange(input_ids.shape[1])[None] if self.count else position_ids
        if places is None:
            places = torch.arange(input_ids.shape[1])[None]
        hidden = (self.words(input_ids) + self.places(places)).tanh()
        logits = hidden @ self.words.weight.T
        return nn.functional.cross_entropy(logits[0], labels[0])


def test_positions_that_do_not_restart_are_refused():
    model = Positions(count=False)
    assert packing_of(model, lambda batch: model(**batch)) == Packing(False, 0)
    model = Positions(count=True)
    with pytest.raises(PackingError, match=r"^Positions .* the positions of packed documents"):
        packing_of(model, lambda batch: model(**batch))


@pytest.mark.parametrize("kind", ["ignores labels", "two ahead", "sequence class"])
def test_losses_that_see_other_documents_are_refused(kind):
    if kind == "sequence class":
        config = build("bert").config
        model = transformers.BertForSequenceClassification(config).eval()
    else:
        model = build("llama")
    bigkernel.patch(model, quiet=True)

    def loss(batch):
        if kind == "sequence class":
            return model(**batch).loss
        labels = batch.pop("labels")
        logits, ids = model(**batch).logits[0], batch["input_ids"][0]
        if kind == "two ahead":
            return nn.functional.cross_entropy(logits[:-2], labels[0, 2:])
        return nn.functional.cross_entropy(logits[:-1], ids[1:])

    why = "loss of packed token ids" if kind == "sequence class" else "see each other"
    with pytest.raises(PackingError, match=why):
        packing_of(model, loss)


# The Trainer


def arguments(out, **changes):
    options = {
        "output_dir": str(out),
        "max_steps": 4,
        # Adam would make steps of a rounding where a gradient is 0, as of the biases of keys.
        "optim": "sgd",
        "learning_rate": 0.1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": True,
        "announce": False,
    }
    return TrainingArguments(**{**options, **changes})


def many(count=24, masked=False):
    return documents([3 + 5 * n % 13 for n in range(count)], masked)


def many_pairs(count=24):
    return pairs([(3 + 5 * n % 13, 1 + 3 * n % 8) for n in range(count)])


def without_dropout(name):
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = 0.0
    return model


def trained(out, name, data, collator=None, trainer=None, **changes):
    made = Trainer(
        without_dropout(name),
        arguments(out, **changes),
        collator,
        data,
        eval_dataset=data[:7],
        **(trainer or {}),
    )
    # transformers takes GPT-2's loss for one that is not shifted: it counts a label more a row.
    made._loss_shifts_labels = name not in (*MASKED, *TWO)
    made.train()
    return made


def assert_same_run(a, b):
    logs = [
        [(log["step"], n, log[n]) for log in run.state.log_history for n in log if "loss" in n]
        for run in (a, b)
    ]
    assert len(logs[0]) > 4
    for (step, name, x), other in zip(*logs, strict=True):
        assert other == (step, name, pytest.approx(x, rel=1e-5)), (step, name)
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_packed_training_is_padded_training(tmp_path, name):
    data = many(masked=name == "roberta")
    more = {"eval_strategy": "steps", "eval_steps": 2}
    packed = trained(tmp_path, name, data, packing=True, **more)
    padded = trained(tmp_path, name, data, PaddingCollator(shifted=name != "roberta"), **more)
    assert_same_run(packed, padded)
    batch = next(iter(packed.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1
    assert len(batch["cu_seq_lens_q"]) == 5
    assert isinstance(packed.data_collator, PaddingCollator)  # for predictions


def test_packed_training_of_two_sequences_is_padded_training(tmp_path):
    data = many_pairs()
    more = {"eval_strategy": "steps", "eval_steps": 2}
    packed = trained(tmp_path, "t5", data, packing=True, **more)
    padded = trained(tmp_path, "t5", data, PaddingCollator(decoder_start_token_id=0), **more)
    assert_same_run(packed, padded)
    batch = next(iter(packed.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == batch["labels"].shape[0] == 1
    assert len(batch["cu_seq_lens_q"]) == len(batch["cu_seq_lens_k"]) == 5
    predicted = packed.predict(data[:3])
    assert predicted.label_ids.shape == (3, 7)
    assert predicted.metrics["test_loss"] == pytest.approx(
        padded.predict(data[:3]).metrics["test_loss"], rel=1e-5
    )


@pytest.mark.parametrize("shifts", [True, False])
def test_transformers_collator_of_two_sequences_is_packed(tmp_path, shifts):
    tokenizer = build_tokenizer("wordpiece", ["some words of a text, and a few more"] * 9)
    model = without_dropout("t5") if shifts else None  # which makes what the decoder reads
    collate = transformers.DataCollatorForSeq2Seq(tokenizer, model, pad_to_multiple_of=8)
    texts = ["some words", "of a text", "and a few more of the words", "a"] * 4
    ids = [tokenizer(text)["input_ids"] for text in texts]
    data = [{"input_ids": x, "labels": y} for x, y in zip(ids, ids[1:] + ids[:1], strict=True)]
    runs = [trained(tmp_path, "t5", data, collate, packing=packing) for packing in (True, False)]
    assert_same_run(*runs)
    assert next(iter(runs[0].get_train_dataloader()))["labels"].shape[0] == 1


def test_gpt2s_loss_of_padded_rows_is_divided_as_transformers_does(tmp_path):
    """By one label a row more than it predicts: packed, the first labels are not there to count."""
    lengths, losses = [3, 17, 2, 9], []
    for kind, packing in ((transformers.Trainer, False), (Trainer, False), (Trainer, True)):
        given = arguments(tmp_path, packing=packing, max_steps=1, per_device_train_batch_size=4)
        if kind is transformers.Trainer:
            given = transformers.TrainingArguments(
                **{name: getattr(given, name) for name in ("output_dir", "max_steps", "use_cpu")},
                per_device_train_batch_size=4,
                report_to="none",
            )
        collator = None if packing else PaddingCollator()
        made = kind(without_dropout("gpt2"), given, collator, documents(lengths))
        losses.append(made.train().training_loss)
    theirs, padded, packed = losses
    assert padded == pytest.approx(theirs, rel=1e-6)
    total = sum(lengths)
    assert packed * (total - len(lengths)) == pytest.approx(padded * total, rel=1e-6)


@pytest.mark.parametrize(("name", "packing"), [("llama", True), ("llama", False), ("gpt2", False)])
def test_accumulated_batches_of_unequal_lengths_give_the_same_gradients(tmp_path, name, packing):
    """1, 2 and 4 batches for a step of the same four documents."""
    gradients = []
    for steps in (1, 2, 4):
        made = Trainer(
            without_dropout(name),
            arguments(
                tmp_path,
                packing=packing,
                max_steps=1,
                max_grad_norm=0.0,
                per_device_train_batch_size=4 // steps,
                gradient_accumulation_steps=steps,
                train_sampling_strategy="sequential",
            ),
            None if packing else PaddingCollator(),
            documents([3, 17, 1, 9]),
        )
        before = [p.detach().clone() for p in made.model.parameters()]
        loss = made.train().training_loss
        after = made.model.parameters()
        gradients.append(
            [torch.tensor(loss), *(b - a.detach() for b, a in zip(before, after, strict=True))]
        )
    assert float(gradients[0][1].abs().max()) > 1e-5
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mlm", [True, False])
def test_transformers_collators_draw_the_same_when_packed(tmp_path, mlm):
    tokenizer = build_tokenizer("wordpiece", ["some words of a text, and a few more"] * 9)
    assert len(tokenizer) <= VOCAB
    collate = transformers.DataCollatorForLanguageModeling(
        tokenizer, mlm=mlm, mlm_probability=0.3 if mlm else None, pad_to_multiple_of=8
    )
    texts = ["some words", "of a text", "and a few more of the words", "a"] * 4
    data = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    name = "bert" if mlm else "llama"
    runs = []
    for packing in (True, False):
        runs.append(trained(tmp_path, name, data, collate, packing=packing))
        assert runs[-1].data_collator is collate
    assert_same_run(*runs)


def test_outputs_of_evaluation_and_prediction_belong_to_examples(tmp_path):
    def metrics(found):
        right = (found.predictions.argmax(-1)[:, :-1] == found.label_ids[:, 1:]).sum()
        return {"right": right, "rows": len(found.predictions)}

    found = []
    for packing, collate in ((True, None), (False, PaddingCollator())):
        options = {"compute_metrics": metrics}
        made = trained(tmp_path, "llama", many(), collate, options, packing=packing)
        predicted = made.predict(many(5))
        assert predicted.predictions.shape[0] == 5
        found.append({**made.evaluate(), **predicted.metrics})
    assert found[0]["eval_rows"] == 7
    for key in ("eval_loss", "eval_right", "test_loss", "test_right"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-5)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(many())


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_and_workers(tmp_path, workers):
    data = Stream() if workers == 0 else many()
    runs = [
        Trainer(
            build("llama"),
            arguments(tmp_path, packing=packing, dataloader_num_workers=workers),
            None if packing else PaddingCollator(),
            data,
            eval_dataset=many(6),
        )
        for packing in (True, False)
    ]
    for made in runs:
        made.train()
        made.evaluate()
    assert_same_run(*runs)


RANKS = """
import sys
import test_packing
from test_packing import PaddingCollator, arguments, build, many

for data in (many(), test_packing.Stream()):
    runs = [
        test_packing.Trainer(
            build("llama"),
            arguments(
                sys.argv[1],
                packing=packing,
                eval_strategy="steps",
                eval_steps=2,
                # Dealt out by one rank, padded batches would have to be of one length.
                accelerator_config=None if packing else {"dispatch_batches": False},
            ),
            None if packing else PaddingCollator(),
            data,
            eval_dataset=many(6),
        )
        for packing in (True, False)
    ]
    for made in runs:
        made.train()
    test_packing.assert_same_run(*runs)
"""


@pytest.mark.slow
def test_two_ranks_train_packed_as_padded(tmp_path):
    on_two_ranks(tmp_path, RANKS, tmp_path)


def test_a_users_packing_collator_is_told_how_the_model_is_packed(tmp_path):
    collate = PackingCollator(pad_to_multiple_of=16)
    packed = trained(tmp_path, "roberta", many(masked=True), collate, eval_strategy="epoch")
    own = PaddingCollator(shifted=False)
    padded = trained(tmp_path, "roberta", many(masked=True), own, eval_strategy="epoch")
    assert_same_run(packed, padded)
    assert packed.data_collator is collate
    assert (collate.shifted, collate.first_position) == (True, 0)
    assert next(iter(packed.get_train_dataloader()))["input_ids"].shape[1] % 16 == 0


def test_resumed_packed_training_is_the_uninterrupted_one(tmp_path):
    options = {"packing": True, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "a", "llama", many(), **options)
    again = Trainer(build("llama"), arguments(tmp_path / "a", **options), None, many())
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_trainers_that_cannot_pack_say_so_before_the_first_step(tmp_path):
    options = {"packing": True, "save_strategy": "steps"}
    with pytest.raises(PackingError, match=r"^BloomFor.* padded ones: packing=False"):
        trained(tmp_path / "run", "bloom", many(), **options)
    with pytest.raises(ValueError, match="example 0 has no labels, which the decoder is to pred"):
        trained(tmp_path / "run", "t5", many(), packing=True, train_sampling_strategy="sequential")
    with pytest.raises(PackingError, match=r"^BloomFor"):
        trained(tmp_path / "run", "bloom", many(), PackingCollator())
    config = {"dispatch_batches": True}
    with pytest.raises(PackingError, match="dispatch_batches=True cuts batches"):
        trained(tmp_path / "run", "llama", many(), packing=True, accelerator_config=config)

    class Own(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(many(), 4, collate_fn=PaddingCollator())

    made = Own(build("llama"), arguments(tmp_path, packing=True), train_dataset=many())
    with pytest.raises(PackingError, match="Own makes its own"):
        made.train()
    bad = [{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}] * 8
    with pytest.raises(ValueError, match="hides tokens between others"):
        trained(tmp_path / "run", "llama", bad, packing=True)


def test_train_text_refuses_a_model_that_would_leak_and_leaves_the_folder(tmp_path):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("some words of a text. " * 40)
    options = {"data": text, "out": run, "quiet": True, "max_steps": 1, "max_length": 16}
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    recipes.train_text(**options, model=shape)
    kept = sorted(run.iterdir())
    build("bloom").save_pretrained(tmp_path / "bloom")
    with pytest.raises(PackingError, match=r"^BloomForCausalLM cannot be trained on packed"):
        recipes.train_text(**options, init_from=tmp_path / "bloom", tokenizer="bytes", force=True)
    assert sorted(run.iterdir()) == kept


def test_padding_grouped_by_length(tmp_path):
    data = documents([3 + 11 * n % 40 for n in range(64)])
    padding = {}
    for how in ("random", "group_by_length"):
        made = trained(tmp_path, "llama", data, PaddingCollator(), train_sampling_strategy=how)
        masks = [batch["attention_mask"] for batch in made.get_train_dataloader()]
        assert sum(int(mask.sum()) for mask in masks) == sum(len(x["input_ids"]) for x in data)
        padding[how] = sum(int((mask == 0).sum()) for mask in masks)
        assert len([log for log in made.state.log_history if "loss" in log]) == 4
    assert padding["group_by_length"] < 0.5 * padding["random"]


# Compiled


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "eager"),
        *(pytest.param(n, "aot_eager", marks=pytest.mark.slow) for n in ("llama", "bert", "gpt2")),
    ],
)
def test_compiled_once_for_batches_of_changing_lengths(name, backend):
    model = bigkernel.patch(build(name), quiet=True)
    masked = name in MASKED
    collate = PackingCollator(shifted=not masked)
    draw = torch.Generator().manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for step in range(50):
        count = int(torch.randint(2, 6, (), generator=draw))
        lengths = torch.randint(2, 14, (count,), generator=draw).tolist()
        batch = collate(documents(lengths, masked, seed=step))
        loss = compiled(**batch).loss
        loss.backward()
        if step % 10 == 0:
            torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_rows_of_a_packed_dataset_are_documents_still():
    rows = PackedDataset(["abcde", "f", "ghi"], build_tokenizer("bytes"), max_length=4)
    offsets = PackingCollator()([rows[0], rows[1], rows[2]])["cu_seq_lens_q"].tolist()
    assert [b - a for a, b in itertools.pairwise(offsets)] == [4, 2, 2, 4]
