"""Training, measuring and sampling language models."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

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
from bigkernel.recipes import models, presets, run_folder
from bigkernel.recipes.errors import Failure, UsageError, option, say
from bigkernel.recipes.metrics import TextMetrics
from bigkernel.recipes.settings import TextSettings
from bigkernel.recipes.training import Task, check_same_data
from bigkernel.trainer import same_random_numbers_after

COMMAND = "train text"
PROMPT = "The "
SAMPLE = "sample.txt"


@dataclass
class TextRun:
    """A trained language model and what its run folder holds.

    Attributes:
        folder: the run folder; ``from_pretrained`` of transformers loads it too.
        model: in evaluation mode.
        tokenizer: what the model reads and writes in.
        settings: what it was trained with.
        recorded: facts about the data and the versions, as in ``config.yaml``.
        figures: loss, perplexity, nats and bits per byte on the part held back, from the training;
            None if the run was loaded (:meth:`evaluate` measures).
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: TextSettings
    recorded: dict[str, Any]
    figures: dict[str, float] | None = None

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> str:
        """``prompt`` and what the model continues it with; the same seed gives the same text.

        Args:
            prompt: empty begins as a document does.
            max_new_tokens: None is 200, or fewer where the model's context ends sooner.
            temperature: 0 takes the likeliest token each time.
            top_k: draw from so many likeliest tokens; 0 from all.
            top_p: draw from the likeliest tokens of this mass.
            seed: of the draws; torch's and Python's generators are as before afterwards.

        Raises:
            UsageError: an argument out of range, or a prompt that leaves no room in the context.
        """
        with models.quiet_transformers(), same_random_numbers_after():
            return sample(
                self.model,
                self.tokenizer,
                prompt,
                seed,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            )

    def evaluate(self, data: str | os.PathLike[str] | None = None) -> dict[str, float]:
        """Figures on the part held back of the run's own corpus, or on all of ``data``.

        They are also written to ``evaluation.json`` in the folder.

        Raises:
            Failure: the run's corpus is no longer the one that it was trained on.
            DataError: the data cannot be used.
        """
        with models.quiet_transformers():
            return evaluate(self, None if data is None else os.fspath(data))


def read(source: str | None) -> Corpus:
    """The corpus, with a line on what is being read, which may take a while, and what was found."""
    what = "the topics of Python's own help" if source is None else printable(source)
    say(f"reading {what}")
    corpus = load_corpus(source)
    for note in corpus.notes:
        say(printable(note))
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
                f"{option('max_length')} is {settings.max_length}."
            )
    else:
        shape = settings.model or presets.TEXT_RECIPES["demo"]["model"]
        model = models.new_text_model(shape, tokenizer, settings.max_length)
    train_set = PackedDataset(train_part, tokenizer, settings.max_length, drop_last=True)
    held_back = held_back_rows(held_part, tokenizer, settings.max_length)
    prompt = _fitting_prompt(settings, model, tokenizer)
    say(
        f"corpus {printable(corpus.name)}: {len(corpus.documents):,} documents, "
        f"{corpus.num_bytes:,} bytes, sha256 {corpus.sha256[:12]}; "
        f"{len(tokenizer):,} tokens in the vocabulary"
    )

    def finish(model: PreTrainedModel, folder: Path) -> tuple[dict[str, float], str]:
        figures = measure(model, held_back, settings.batch_size)
        text = sample(model, tokenizer, prompt, settings.seed)
        (folder / SAMPLE).write_text(text + "\n", encoding="utf-8")
        say(f"sample: {text}")
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
        look_at=32,
        data=facts(corpus),
        save_inputs=save_inputs,
        finish=finish,
        card=lambda run: _card(run, corpus, prompt),
        opened=lambda model, record, figures: TextRun(
            run, model, tokenizer, settings, record, figures
        ),
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
        f"{option('prompt')} has {length} tokens, and the model's context holds {room}: nothing "
        f"can follow. Shorten it, or train with a larger {option('max_length')}."
    )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that Python could not decode
        raise UsageError(f"{option('prompt')} is not UTF-8 text: {prompt!r}.") from None
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


def check_sampling(
    *, max_new_tokens: int | None, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """UsageError for the first of these that is out of range."""
    if temperature != 0 and not 1e-6 <= temperature < math.inf:  # scores are divided by it
        raise UsageError(f"{option('temperature')} must be 0, or 1e-6 or more, got {temperature}.")
    if not 0 < top_p <= 1:
        raise UsageError(f"{option('top_p')} must be in (0, 1], got {top_p}.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"{option('seed')} must be in [0, 2**32), got {seed}.")
    if top_k < 0:
        raise UsageError(f"{option('top_k')} must be 0 or more, got {top_k}.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"{option('max_new_tokens')} must be 1 or more, got {max_new_tokens}.")


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
    """As :meth:`TextRun.generate`, with the KV cache."""
    check_sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
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
    run: Path, settings: TextSettings, recorded: dict[str, Any], trust_remote_code: bool = False
) -> TextRun:
    """What a text run left."""
    if not (run / "config.json").is_file():
        raise Failure(
            f"{run} holds no finished model. Go on with it: "
            f"bigkernel train text --resume auto --out {run}"
        )
    model = models.load(presets.TEXT, str(run), trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(run), trust_remote_code=trust_remote_code)
        return TextRun(run, model.eval(), tokenizer, settings, recorded)
    except Exception as error:  # of many kinds; all mean that a file is missing or damaged
        refused = code_not_run(error, f"the tokenizer of {run}")
        if refused is not None:
            raise Failure(refused) from error
        reason = " ".join(str(error).split())[:160]
        raise Failure(f"{run} holds no tokenizer that can be loaded: {reason}") from error


def evaluate(run: TextRun, data: str | None) -> dict[str, float]:
    """As :meth:`TextRun.evaluate`."""
    settings = run.settings
    corpus = read(data if data is not None else settings.data)
    documents: Sequence[str] = corpus.documents
    if data is None:
        check_same_data(run.recorded.get("sha256"), corpus.sha256, run.folder, "corpus")
        _, documents = split_corpus(corpus.documents, settings.validation)
    rows = held_back_rows(list(documents), run.tokenizer, settings.max_length)
    figures = measure(run.model, rows, settings.batch_size)
    run_folder.write_evaluation(run.folder, figures)
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
