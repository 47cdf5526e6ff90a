"""Text corpora: the embedded ones, files and folders, and the split into two parts."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from bigkernel.data.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
SAMPLES = {"zh": Path(__file__).parent / "corpora" / "zh_ai.txt"}


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and where they came from.

    ``sha256`` is that of the files' bytes one after another (so that of ``sha256sum`` for a single
    file); for the embedded English text, of the documents joined by newlines.
    """

    documents: list[str]
    name: str
    sha256: str
    source: str

    @property
    def num_bytes(self) -> int:
        """Size of all documents as UTF-8, in bytes."""
        return sum(len(document.encode()) for document in self.documents)

    @property
    def num_characters(self) -> int:
        """Size of all documents in Unicode code points."""
        return sum(len(document) for document in self.documents)


def load_corpus(source: str | Path | None = None) -> Corpus:
    """Read a corpus.

    Args:
        source: ``None`` for the English text in the standard library (``pydoc_data.topics``: its
            wording differs between Python versions, hence the recorded hash); ``"sample:zh"`` for
            the Chinese text that ships with the package; else a path: a text file is one document,
            a ``.jsonl`` file has one document a line in the field ``text``, a folder stands for
            every ``.txt``, ``.md`` and ``.jsonl`` file below it, in the order of their names.

    Raises:
        DataError: there is no such file, or it is empty, binary, not UTF-8 or not the JSON
            expected; the message names the file and the byte or line.
    """
    if source is None:
        return _topics()
    if str(source).startswith("sample:"):
        sample = str(source).removeprefix("sample:")
        if sample not in SAMPLES:
            known = ", ".join(f"sample:{name}" for name in SAMPLES)
            raise DataError(f"there is no sample corpus {sample!r}; the package ships {known}.")
        return _from_files([SAMPLES[sample]], name=str(source), source=str(source))

    if not str(source):
        raise DataError("the path of the corpus is empty; give a file or folder.")
    path = Path(source).expanduser()
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name too long, or with a NUL
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{str(path)[:200]} cannot be read: {reason}.") from error
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in TEXT_SUFFIXES
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            kinds = ", ".join(TEXT_SUFFIXES)
            raise DataError(f"the folder {path} holds no text: expected files ending in {kinds}.")
        return _from_files(files, name=path.resolve().name, source=str(path))
    if path.is_file():
        return _from_files([path], name=path.name, source=str(path))
    if path.exists():
        raise DataError(
            f"{path} is neither a file nor a folder; write what comes out of it into a file."
        )
    raise DataError(
        f"there is no file or folder {path}; give the path of a text, .jsonl or folder."
    )


def split_corpus(
    documents: list[str], fraction: float = 0.1, mode: str = "contiguous", seed: int = 0
) -> tuple[list[str], list[str]]:
    """Hold back a part of the documents; the same arguments always give the same two parts.

    Args:
        documents: the documents, in order.
        fraction: size of the held-back part, in (0, 1): of the characters (``contiguous``) or of
            the documents (``document``).
        mode: ``"contiguous"`` holds back the end of the text, cutting one document in two (at the
            next line break where there is one nearby); ``"document"`` holds back whole documents
            drawn with ``seed``.

    Returns:
        (training documents, held-back documents), neither empty.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"the validation fraction must lie between 0 and 1, got {fraction}.")
    if mode == "contiguous":
        return _split_contiguous(documents, fraction)
    if mode != "document":
        raise DataError(f"the split must be 'contiguous' or 'document', got {mode!r}.")
    if len(documents) < 2:
        raise DataError(
            "one document cannot be split by documents; give more documents or split contiguously."
        )
    held = min(len(documents) - 1, max(1, round(len(documents) * fraction)))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator, device="cpu").tolist()
    chosen = set(order[:held])
    return (
        [document for i, document in enumerate(documents) if i not in chosen],
        [document for i, document in enumerate(documents) if i in chosen],
    )


def _split_contiguous(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    total = sum(len(document) for document in documents)
    if total < 2:
        raise DataError(f"{total} character(s) cannot be split into training and validation parts.")
    cut = min(total - 1, max(1, total - round(total * fraction)))
    train: list[str] = []
    held: list[str] = []
    start = 0
    for document in documents:
        end = start + len(document)
        if end <= cut:
            train.append(document)
        elif start >= cut:
            held.append(document)
        else:
            # A line break within a twentieth of the text keeps both parts readable.
            line = document.find("\n", cut - start, cut - start + total // 20)
            at = line + 1 if 0 <= line < len(document) - 1 else cut - start
            train.append(document[:at])
            held.append(document[at:])
        start = end
    return train, held


def _topics() -> Corpus:
    from pydoc_data.topics import topics

    documents = [text for _, text in sorted(topics.items()) if text.strip()]
    digest = hashlib.sha256("\n".join(documents).encode()).hexdigest()
    return Corpus(documents, "pydoc_data.topics", digest, "python standard library")


def _from_files(files: list[Path], name: str, source: str) -> Corpus:
    digest = hashlib.sha256()
    documents: list[str] = []
    for file in files:
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
        digest.update(raw)
        text = _decode(raw, file)
        documents += _json_lines(text, file) if file.suffix.lower() == ".jsonl" else [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"{source} is empty: there is no text in it to train on.")
    return Corpus(documents, name, digest.hexdigest(), source)


def _decode(raw: bytes, file: Path) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{file} is UTF-16 (byte-order mark at byte offset 0), expected UTF-8; "
            "convert it with `iconv -f UTF-16 -t UTF-8`."
        )
    nul = raw.find(b"\0")
    if nul >= 0:
        raise DataError(f"{file} is a binary file (NUL at byte offset {nul}), expected UTF-8 text.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: byte 0x{raw[error.start]:02x} at byte offset {error.start} "
            "cannot be decoded; convert it, for example with `iconv -f LATIN1 -t UTF-8`."
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _json_lines(text: str, file: Path) -> list[str]:
    documents = []
    # Not splitlines(): JSON strings may hold U+2028 and its kin, which are no line ends here.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {number}: not valid JSON ({error.msg}).") from error
        except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
            reason = str(error).split(";")[0]
            raise DataError(f"{file}, line {number}: unreadable JSON ({reason}).") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DataError(
                f'{file}, line {number}: expected an object with a string field "text".'
            )
        if re.search("[\ud800-\udfff]", record["text"]):
            raise DataError(
                f"{file}, line {number}: half of a surrogate pair, which is no character."
            )
        documents.append(record["text"])
    return documents
