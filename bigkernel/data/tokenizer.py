"""Tokenizers: bytes, a BPE or a WordPiece trained here, or any that transformers can load."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bigkernel.data.errors import DataError
from bigkernel.files import is_regular

DEFAULT_VOCAB_SIZE = {"bpe": 4096, "wordpiece": 8192}
# Without this, tokenizers of this class also return token_type_ids, which decoders reject.
_INPUT_NAMES = ["input_ids", "attention_mask"]
_CJK = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3000-\u303f\uff00-\uffef"


def build_tokenizer(
    spec: str | Path,
    documents: Iterable[str] | None = None,
    vocab_size: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Build or load a tokenizer.

    Args:
        spec: ``"bytes"``: token = byte of the UTF-8 text (ids 0..255), then ``<pad>`` 256,
            ``<bos>`` 257, ``<eos>`` 258. ``"bpe"``: byte-level BPE trained on ``documents``; never
            unknown.
            ``"wordpiece"``: BERT's normalisation (lower case, no accents, every Chinese character a
            word), with WordPiece trained on ``documents``. Anything else: a folder or hub name for
            transformers' ``AutoTokenizer``.
        documents: what ``"bpe"`` and ``"wordpiece"`` are trained on.
        vocab_size: upper bound for the two trained kinds (default 4096 and 8192).
        trust_remote_code: run the Python code that a loaded tokenizer may bring.

    Returns:
        a tokenizer with ``save_pretrained``, whose folder ``AutoTokenizer`` loads.

    Raises:
        DataError: nothing to train on, a vocabulary too small, a name that cannot be loaded, or
            one that needs code of its own, which was not allowed to run.
    """
    kind = str(spec)
    if kind == "bytes":
        return _bytes()
    if kind not in DEFAULT_VOCAB_SIZE:
        return _pretrained(kind, trust_remote_code)
    texts = [text for text in documents or () if text.strip()]
    if not texts:
        raise DataError(f"a {kind} tokenizer is trained on the corpus, and the corpus is empty.")
    size = DEFAULT_VOCAB_SIZE[kind] if vocab_size is None else vocab_size
    return _bpe(texts, size) if kind == "bpe" else _wordpiece(texts, size)


def _bytes() -> PreTrainedTokenizerFast:
    # ByteLevel writes each byte as one printable character; a BPE without merges maps it to its id.
    alphabet = {character: byte for byte, character in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    return _byte_level(tokenizer)


def _bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    if vocab_size < 259:
        raise DataError(
            f"a bpe vocabulary needs at least 259 tokens (256 bytes and 3 marks), got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - 3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return _byte_level(tokenizer, split_words=True)


def _byte_level(tokenizer: Tokenizer, split_words: bool = False) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=split_words
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Added here, not left to transformers, so that their ids are the documented ones.
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        # Text that happens to spell a mark, such as "<eos>", stays text.
        split_special_tokens=True,
        model_input_names=_INPUT_NAMES,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in the ByteLevel pre-tokenizer.

    Bytes that are printable in Latin-1 stand for themselves; the others, in order, for the code
    points from 256 on (the scheme of GPT-2's byte-level BPE).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    characters = {byte: chr(byte) for byte in printable}
    characters.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return characters


def _wordpiece(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if vocab_size <= len(marks):
        raise DataError(f"a wordpiece vocabulary needs more than 5 tokens, got {vocab_size}.")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(handle_chinese_chars=True, lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=marks, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    ids = {mark: tokenizer.token_to_id(mark) for mark in marks}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    # WordPiece puts a space before every word, and every Chinese character is a word.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(Regex(f"(?<=[{_CJK}]) | (?=[{_CJK}])"), ""),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_input_names=_INPUT_NAMES,
        clean_up_tokenization_spaces=False,
    )


def check_folder(folder: Path) -> None:
    """Refuse a folder to load from that holds a pipe, socket or device, which could be waited on.

    Raises:
        DataError: naming the first.
    """
    for file in sorted(folder.iterdir()):
        if file.exists() and not file.is_dir() and not is_regular(file):
            raise DataError(f"{file} is no regular file: the folder is not loaded.")


def means_a_folder(name: str) -> bool:
    """Whether a name can only be a path, and not the owner/name of a hub."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def code_not_run(error: BaseException, name: str | Path) -> str | None:
    """The sentence for a loader's refusal to run what ``name`` brings; None for other errors."""
    if "trust_remote_code" not in str(error):
        return None
    return (
        f"{name} cannot be loaded without running Python code that it brings, which is not done "
        "unasked: read that code, then allow it with --trust-remote-code "
        "(trust_remote_code=True)."
    )


def _pretrained(name: str, trust: bool) -> PreTrainedTokenizerBase:
    local = Path(name).expanduser()
    if local.exists():
        if local.is_dir():
            check_folder(local)
        return _load(str(local), "cannot be read", trust)
    if means_a_folder(name):
        raise DataError(
            f"there is no folder {local}; use bytes, bpe or wordpiece, or give the path of a "
            "tokenizer folder."
        )
    try:
        return _load(name, "is not in the cache", trust, local_files_only=True)
    except DataError as error:
        if error.__cause__ is not None and code_not_run(error.__cause__, name) is not None:
            raise
        if not hub_is_reachable():
            raise DataError(
                f"the tokenizer {name!r} is not on this machine, and the hub cannot be reached; "
                "use bytes, bpe or wordpiece, or give the path of a tokenizer folder."
            ) from error
    return _load(name, "cannot be fetched", trust)


def _load(name: str, trouble: str, trust: bool, **options: Any) -> PreTrainedTokenizerBase:
    try:
        # Not left to the default, which asks on stdout whether to run a tokenizer's own code.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust, **options)
    except Exception as error:  # hub clients raise many kinds; all mean that it cannot be had
        refused = code_not_run(error, f"the tokenizer {name!r}")
        if refused is not None:
            raise DataError(refused) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise DataError(
            f"the tokenizer {name!r} {trouble} ({reason}); use bytes, bpe or wordpiece, "
            "or give the path of a tokenizer folder."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise DataError(f"{name!r} holds no tokenizer; use bytes, bpe, wordpiece or another path.")
    return tokenizer


def hub_is_reachable(timeout: float = 5.0) -> bool:
    """Whether the model hub answers. Its own client finds out by half a minute of retries."""
    endpoint = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or endpoint.hostname is None:
        return False
    if getproxies():
        return True  # only the proxy knows
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        socket.create_connection((endpoint.hostname, port), timeout).close()
    except OSError:
        return False
    return True
