"""Training, measuring and sampling language models."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from bigkernel import presets
from bigkernel.cli import models, run_folder
from bigkernel.cli.errors import Failure, UsageError
from bigkernel.cli.settings import TextSettings
from bigkernel.cli.train_loop import Task, check_same_data
from bigkernel.data import (
    Corpus,
    DataError,
    PackedDataset,
    PackingCollator,
    build_tokenizer,
    load_corpus,
    split_corpus,
)
from bigkernel.data.tokenizer import code_not_run
from bigkernel.escape import code_span, markdown, printable
from bigkernel.metrics import TextMetrics

COMMAND = "train text"
PROMPT = "The "
SAMPLE = "sample.txt"


def read(source: str | None) -> Corpus:
    """The corpus, with a line on what is being read, which may take a while, and what was found."""
    what = "the topics of Python's own help" if source is None else printable(source)
    print(f"reading {what}", flush=True)
    corpus = load_corpus(source)
    for note in corpus.notes:
        print(printable(note))
    return corpus


def prepare(
    settings: TextSettings, run: Path, recorded: dict[str, Any], trust_remote_code: bool = False
) -> Task:
    """Read the data and build the model; every complaint about the input comes from here."""
    set_seed(settings.seed)
    corpus = read(settings.data)
    check_same_data(recorded.get("sha256"), corpus.sha256, run, "corpus")
    train_part, held_part = split_corpus(corpus.documents, settings.validation)
    spec = settings.tokenizer or settings.init_from or "bytes"
    start = settings.init_from and models.load(
        presets.TEXT, settings.init_from, trust_remote_code=trust_remote_code
    )
    # Trained on what the model is trained on: the held-back part stays unseen.
    tokenizer = build_tokenizer(
        spec, train_part, settings.vocab_size, trust_remote_code=trust_remote_code
    )
    if start:
        model = start
        if len(tokenizer) > int(model.config.vocab_size):
            model.resize_token_embeddings(len(tokenizer))
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and settings.max_length > longest:
            raise DataError(
                f"{settings.init_from} takes sequences of {longest} tokens at most, and "
                f"--max-length is {settings.max_length}."
            )
    else:
        shape = settings.model or presets.TEXT_RECIPES["demo"]["model"]
        model = models.new_text_model(shape, tokenizer, settings.max_length)
    train_set = PackedDataset(train_part, tokenizer, settings.max_length, drop_last=True)
    held_back = held_back_rows(held_part, tokenizer, settings.max_length)
    prompt = _fitting_prompt(settings, model, tokenizer)
    print(
        f"corpus {printable(corpus.name)}: {len(corpus.documents):,} documents, "
        f"{corpus.num_bytes:,} bytes, sha256 {corpus.sha256[:12]}; "
        f"{len(tokenizer):,} tokens in the vocabulary"
    )

    def finish(model: PreTrainedModel, folder: Path) -> tuple[dict[str, float], str]:
        figures = measure(model, held_back, settings.batch_size)
        text = sample(model, tokenizer, prompt, settings.seed)
        (folder / SAMPLE).write_text(text + "\n", encoding="utf-8")
        print(f"sample: {text}")
        return figures, "```text\n" + text.replace("```", "'''") + "\n```"

    def save_inputs(folder: Path) -> None:
        tokenizer.save_pretrained(folder)

    return Task(
        command=COMMAND,
        settings=settings,
        run=run,
        model=model,
        train=train_set,
        held_back=held_back,
        collate=PackingCollator(settings.max_length),
        unit="tokens",
        per_item=settings.max_length,
        look_at=32,
        data=facts(corpus),
        save_inputs=save_inputs,
        finish=finish,
        card=lambda run: _card(run, corpus, prompt),
        trainer_options={"processing_class": tokenizer},
    )


def _fitting_prompt(
    settings: TextSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> str:
    """What the sample begins with; UsageError, before training, if nothing could follow it."""
    prompt = PROMPT if settings.prompt is None else settings.prompt
    room = getattr(model.config, "max_position_embeddings", None)
    length = len(_prompt_ids(tokenizer, prompt))
    if room is None or length < room:
        return prompt
    if not settings.prompt:
        return ""
    raise UsageError(
        f"--prompt has {length} tokens, and the model's context holds {room}: nothing can follow. "
        "Shorten it, or train with a larger --max-length."
    )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that Python could not decode
        raise UsageError(f"--prompt is not UTF-8 text: {prompt!r}.") from None
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def facts(corpus: Corpus) -> dict[str, Any]:
    """What to record about a corpus."""
    return {
        "corpus": corpus.name,
        "sha256": corpus.sha256,
        "documents": len(corpus.documents),
        "bytes": corpus.num_bytes,
    }


def held_back_rows(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PackedDataset:
    """The held-back part in rows of ``max_length``, or in one shorter row if it is shorter."""
    count = sum(len(tokenizer(d, add_special_tokens=False)["input_ids"]) for d in documents)
    if count < 2:
        raise DataError(
            "the held-back part of the corpus is shorter than two tokens. Use more text, or a "
            "larger share in `validation` of a config file."
        )
    return PackedDataset(documents, tokenizer, min(max_length, count), drop_last=True)


@torch.inference_mode()
def measure(model: PreTrainedModel, rows: PackedDataset, batch_size: int) -> dict[str, float]:
    """``TextMetrics`` of a model over packed rows, all of which this process measures."""
    device = model.device
    metrics = TextMetrics(rows.num_bytes, sync_on_compute=False).to(device)
    collate = PackingCollator(rows.max_length)
    for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collate):
        inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
        labels = inputs.pop("labels")
        metrics.update(model(**inputs, use_cache=False).logits, labels)
    return metrics.compute()


def readable(text: str) -> str:
    """Text without the marks for bytes that are no character, cut or invented.

    And without control characters, with which a terminal could be told to do something.
    """
    return re.sub("[\ufffd\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    seed: int,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
) -> str:
    """``prompt`` and what the model goes on with; the same seed gives the same text.

    Uses the KV cache. ``temperature=0`` takes the likeliest token each time. Without
    ``max_new_tokens``: 200, or fewer where the model's context ends sooner.
    """
    if temperature < 0:
        raise ValueError(f"the temperature must be 0 or more, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p must be in (0, 1], got {top_p}.")
    if top_k < 0:
        raise ValueError(f"top-k must be 0 (all tokens) or more, got {top_k}.")
    ids = _prompt_ids(tokenizer, prompt)
    # A document begins after the end of another one; that is how to ask for a fresh one.
    ids = ids or [token for token in (tokenizer.eos_token_id,) if token is not None]
    if not ids:
        raise ValueError("the prompt is empty, and the tokenizer has no token to begin with.")
    room = getattr(model.config, "max_position_embeddings", None)
    left = (1 << 30) if room is None else room - len(ids)
    if left < 1:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, and the model's context holds {room}: "
            "nothing can follow. Shorten the prompt."
        )
    count = min(200, left) if max_new_tokens is None else max_new_tokens
    if count < 1:
        raise ValueError(f"max-new-tokens must be 1 or more, got {count}.")
    if count > left:
        raise ValueError(
            f"{count} new tokens do not fit: the model's context holds {room} and the prompt takes "
            f"{len(ids)}. Ask for {left} at most."
        )
    draws = temperature > 0
    inputs = torch.tensor([ids], dtype=torch.int64, device=model.device)
    set_seed(seed)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if draws else {}
    output: torch.Tensor = model.generate(  # type: ignore[operator]
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=count,
        do_sample=draws,
        use_cache=True,
        pad_token_id=_padding(tokenizer),
        **options,
    )
    new = output[0, len(ids) :].tolist()
    # Decoded with the prompt: a token may hold the end of one character or the space before a word.
    text = readable(str(tokenizer.decode(ids + new, skip_special_tokens=True)))
    # Some tokenizers do not give back what they were given; the prompt is shown as it was typed.
    shown = readable(str(tokenizer.decode(ids, skip_special_tokens=True)))
    return prompt + text[len(shown) :] if text.startswith(shown) else text


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def load_run(
    run: Path, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer that a text run left."""
    if not (run / "config.json").is_file():
        raise Failure(
            f"{run} holds no finished model. Go on with it: "
            f"bigkernel train text --resume auto --out {run}"
        )
    model = models.load(presets.TEXT, str(run), trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(run), trust_remote_code=trust_remote_code)
        return model.eval(), tokenizer
    except Exception as error:  # of many kinds; all mean that a file is missing or damaged
        refused = code_not_run(error, f"the tokenizer of {run}")
        if refused is not None:
            raise Failure(refused) from error
        reason = " ".join(str(error).split())[:160]
        raise Failure(f"{run} holds no tokenizer that can be loaded: {reason}") from error


def evaluate(
    run: Path,
    settings: TextSettings,
    recorded: dict[str, Any],
    data: str | None,
    device: torch.device,
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """Figures on the held-back part of the run's own corpus, or on all of another."""
    model, tokenizer = load_run(run, trust_remote_code)
    corpus = read(data if data is not None else settings.data)
    documents: Sequence[str] = corpus.documents
    if data is None:
        check_same_data(recorded.get("sha256"), corpus.sha256, run, "corpus")
        _, documents = split_corpus(corpus.documents, settings.validation)
    rows = held_back_rows(list(documents), tokenizer, settings.max_length)
    models.place(model, device)
    figures = measure(model, rows, settings.batch_size)
    run_folder.write_evaluation(run, figures)
    return figures


def _card(run: Path, corpus: Corpus, prompt: str) -> dict[str, str]:
    return {
        "title": markdown(run.resolve().name),
        "task": "text-generation",
        "intended": (
            f"A language model trained on {code_span(corpus.name)} ({corpus.num_bytes:,} bytes). "
            "It knows nothing but that text: what it says may be false, or repeat its source word "
            "for word."
        ),
        "usage": (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")\n'
            f'inputs = tokenizer({prompt!r}, add_special_tokens=False, return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"
        ),
    }
