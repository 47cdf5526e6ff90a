"""Text corpora: the embedded ones, files and folders, and the split into two parts."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigkernel.data.errors import DataError

# Read as they are, without a word.
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
# Read as they are, which is said: what is plainly text, but not plainly a book.
SOURCE_SUFFIXES = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".rs", ".go"),
    *(".java", ".kt", ".scala", ".swift", ".js", ".ts", ".rb", ".pl", ".php", ".lua", ".jl", ".r"),
    *(".hs", ".ml", ".lisp", ".el", ".sh", ".tex", ".org", ".adoc", ".log", ".srt"),
)
LINES_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (*LINES_SUFFIXES, ".json")
# Text around which there is so much else that it would be learnt instead; and no text at all.
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".avro", ".xls", ".xlsx", ".ods")
_DATABASES = (".db", ".sqlite", ".sqlite3", ".sql")
_MARKED_UP = (".html", ".htm", ".xhtml", ".xml", ".svg", ".rss", ".atom", ".ipynb")
_DOCUMENTS = (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".ps", ".djvu", ".mobi")
_PACKED = (".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar")
_NO_TEXT = (".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth", ".bin", ".safetensors", ".h5")
# Text shrinks to a fifth or so; what grows beyond this was made to fill the memory.
_MOST_GROWTH = 200
SAMPLES = {"zh": Path(__file__).parent / "corpora" / "zh_ai.txt"}


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and where they came from.

    ``sha256`` is that of the files' bytes one after another (so that of ``sha256sum`` for a single
    file); for the embedded English text, of the documents joined by newlines. ``notes`` are
    sentences about how it was read that a person should see.
    """

    documents: list[str]
    name: str
    sha256: str
    source: str
    notes: tuple[str, ...] = ()

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
            the Chinese text that ships with the package; else a path to a file, or to a folder,
            which stands for every file below it that is text by its suffix, in the order of their
            names (what is left out is in ``notes``).

    The suffix says how a file is read, alone or in a folder, and with ``.gz`` after it too:

    * ``.txt``, ``.md``, ``.rst``: one document, as it is. So are source files (``.py``, ...) and,
      where they are named themselves, files of unknown suffixes; ``notes`` says so.
    * ``.jsonl``, ``.ndjson``: one document a line: a string, or an object with a string ``text``.
    * ``.json``: an array of such strings or objects, one of them, or one a line.
    * Tables, pages and archives (``.csv``, ``.html``, ``.zip``, ...) are refused: their syntax
      would be learnt.

    Raises:
        DataError: there is no such file, or it is empty, binary, not UTF-8, not the JSON expected
            or of a kind that is refused; the message names the file and the byte or line.
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
        return _from_folder(path)
    if path.is_file():
        kind = _kind(path)
        if kind in _REFUSED:
            raise DataError(f"{path} {_REFUSED[kind]}")
        notes: tuple[str, ...] = ()
        if kind in ("source", "unknown"):
            notes = (f"{path.name} is read as plain text, every character of it.",)
        return _from_files([path], name=path.name, source=str(path), notes=notes)
    if path.exists():
        raise DataError(
            f"{path} is neither a file nor a folder; write what comes out of it into a file."
        )
    raise DataError(
        f"there is no file or folder {path}; give the path of a text, .json, .jsonl or folder."
    )


_REFUSED = {
    "table": "is a table or database, whose syntax would be learnt as if it were text; write its "
    'texts into a .jsonl file, a line {"text": ...} each.',
    "marked up": "is a document with markup, which would be learnt as if it were text; convert it "
    "to plain text (.txt or .md) first.",
    "packed": "is an archive or compressed in a way that is not read here; unpack it first (.gz "
    "is read as it is).",
    "no text": "holds data and no text; expected .txt, .md, .json, .jsonl or the like.",
}


def _suffix(file: Path) -> str:
    """Lower-case suffix, the one before .gz where there is one."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix == ".gz" else suffix


def _kind(file: Path) -> str:
    kinds = {
        "text": TEXT_SUFFIXES,
        "source": SOURCE_SUFFIXES,
        "json": JSON_SUFFIXES,
        "table": (*_TABLES, *_DATABASES),
        "marked up": (*_MARKED_UP, *_DOCUMENTS),
        "packed": _PACKED,
        "no text": _NO_TEXT,
    }
    suffix = _suffix(file)
    return next((kind for kind, suffixes in kinds.items() if suffix in suffixes), "unknown")


def _from_folder(path: Path) -> Corpus:
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    files = [file for file in found if _kind(file) in ("text", "source", "json")]
    others = Counter(_suffix(file) or "no suffix" for file in found if file not in set(files))
    left_out = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    if not files:
        kinds = ", ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES))
        instead = f" (it holds {left_out})" if left_out else ""
        raise DataError(
            f"the folder {path} holds no text{instead}: expected files ending in {kinds}, or the "
            "suffix of a programming language."
        )
    notes = []
    if left_out:
        notes.append(f"left out of {path.name or path}, not being plain text: {left_out}.")
    sources = Counter(_suffix(file) for file in files if _kind(file) == "source")
    if sources:
        named = ", ".join(f"{count} {suffix}" for suffix, count in sorted(sources.items()))
        notes.append(f"read as plain text, every character of them: {named}.")
    return _from_files(files, name=path.resolve().name, source=str(path), notes=tuple(notes))


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


def _from_files(files: list[Path], name: str, source: str, notes: tuple[str, ...] = ()) -> Corpus:
    digest = hashlib.sha256()
    documents: list[str] = []
    for file in files:
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
        digest.update(raw)
        if file.suffix.lower() == ".gz":
            raw = _unpacked(raw, file)
        text = _decode(raw, file)
        documents += _json(text, file) if _suffix(file) in JSON_SUFFIXES else [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"{source} is empty: there is no text in it to train on.")
    return Corpus(documents, name, digest.hexdigest(), source, notes)


def _unpacked(raw: bytes, file: Path) -> bytes:
    """The content of a .gz file, of one or several members."""
    limit = _MOST_GROWTH * len(raw) + (1 << 20)
    parts: list[bytes] = []
    size, rest = 0, raw
    while rest:
        reader = zlib.decompressobj(wbits=31)  # gzip, with its checksum
        try:
            part = reader.decompress(rest, limit - size + 1)
        except zlib.error as error:
            reason = str(error).rsplit(": ", 1)[-1]
            raise DataError(f"{file} is no whole .gz file: {reason}.") from error
        size += len(part)
        if size > limit:
            raise DataError(
                f"{file} grows to more than {_MOST_GROWTH} times its size of {len(raw):,} bytes; "
                "if that is meant, unpack it with `gunzip` and name what comes out."
            )
        if not reader.eof:
            raise DataError(f"{file} is no whole .gz file: its end is missing.")
        parts.append(part)
        rest = reader.unused_data.lstrip(b"\0")  # padding, as of tapes
    return b"".join(parts)


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


def _json(text: str, file: Path) -> list[str]:
    """The texts of a JSON file: of its lines, or of the one array that it is."""
    if _suffix(file) in LINES_SUFFIXES:
        return _json_lines(text, file)
    try:
        content = _parsed(text, str(file))
    except DataError as error:
        # Many files named .json hold one JSON value a line.
        more = isinstance(error.__cause__, json.JSONDecodeError) and "Extra data" in str(error)
        if not more:
            raise
        return _json_lines(text, file)
    if not isinstance(content, list):
        return [_text_of(content, str(file), "an array of strings or of objects")]
    return [
        _text_of(item, f"{file}, item {number}") for number, item in enumerate(content, start=1)
    ]


def _json_lines(text: str, file: Path) -> list[str]:
    # Not splitlines(): JSON strings may hold U+2028 and its kin, which are no line ends here.
    return [
        _text_of(_parsed(line, f"{file}, line {number}"), f"{file}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if ", line " in where else f" at line {error.lineno}"
        raise DataError(f"{where}: not valid JSON ({error.msg}{line}).") from error
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        reason = str(error).split(";")[0]
        raise DataError(f"{where}: unreadable JSON ({reason}).") from error


def _text_of(record: Any, where: str, expected: str = "a string or an object") -> str:
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        got = type(record).__name__
        if isinstance(record, dict):
            keys = ", ".join(map(repr, list(record)[:5]))
            got = f"an object with {keys}" if keys else "an empty object"
        raise DataError(f'{where}: expected {expected} with a string field "text", got {got}.')
    if re.search("[\ud800-\udfff]", text):
        raise DataError(f"{where}: half of a surrogate pair, which is no character.")
    return text
