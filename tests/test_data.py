"""Corpora, tokenizers, packing, images: what is read, and what is said when it cannot be.

Feature list: embedded corpus, files, folders, jsonl; both splits; the three tokenizers, saved and
loaded; TextDataset; PackedDataset and PackingCollator; digits; image folders, ragged batches; every
bad input named in the documentation.
"""

import gzip
import hashlib
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from bigkernel.data import (
    DataError,
    ImageData,
    PackedDataset,
    PackingCollator,
    TextDataset,
    build_tokenizer,
    collate_images,
    load_corpus,
    load_digits,
    load_image_folder,
    split_corpus,
    unpack,
)

ENGLISH = ["The quick brown fox jumps over the lazy dog. " * 4, "A second document, shorter."]
CHINESE = "这是我的第一篇AI博客，讲机器学习。"


def save_image(path, size=(9, 7), mode="RGB", value=100):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new(mode, size, value).save(path)


# Corpora


def test_corpus_default_is_the_standard_library():
    corpus = load_corpus()
    assert corpus.name == "pydoc_data.topics"
    assert corpus.num_bytes > 300_000
    assert len(corpus.documents) > 50
    assert corpus.sha256 == load_corpus(None).sha256
    assert len(corpus.sha256) == 64
    assert all(document.strip() for document in corpus.documents)


def test_corpus_sample_is_chinese():
    corpus = load_corpus("sample:zh")
    assert corpus.name == "sample:zh"
    assert "人工智能" in "".join(corpus.documents)
    assert corpus.num_bytes > 2 * corpus.num_characters


def test_corpus_text_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffzeile eins\r\nzwei äöü\n".encode())
    corpus = load_corpus(file)
    assert corpus.documents == ["zeile eins\nzwei äöü\n"]
    assert corpus.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert corpus.num_bytes == corpus.num_characters + 3


def test_corpus_jsonl(tmp_path):
    file = tmp_path / "a.jsonl"
    texts = ["one", "two\u2028lines", ""]
    file.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts) + "\n\n")
    assert load_corpus(str(file)).documents == texts[:2]


def test_corpus_folder_reads_text_in_name_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "third"}')
    (tmp_path / ".hidden" / "d.txt").write_text("never")
    (tmp_path / "picture.png").write_bytes(b"\0\1")
    assert load_corpus(tmp_path).documents == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n", "a.txt is empty"),
        ("a.txt", b"abc\0def", "binary file (NUL at byte offset 3)"),
        ("a.txt", b"caf\xe9 au lait", "byte 0xe9 at byte offset 3"),
        ("a.txt", "hi".encode("utf-16"), "UTF-16"),
        ("a.jsonl", b'{"text": "ok"}\n{"text"', "line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "x"}', "string field \"text\", got an object with 'body'"),
        ("a.jsonl", rb'{"text": "\ud83d"}', "line 1: half of a surrogate pair"),
        ("a.jsonl", b'{"text": 3}', "line 1: expected a string or an object with a string field"),
        ("a.jsonl", b'["x"]', 'field "text", got list.'),
        ("a.json", b'["x", 3]', "a.json, item 2: expected a string or an object with a string"),
        ("a.json", b'[{"text": null}]', "item 1: expected a string or an object"),
        ("a.json", b'{"data": ["x"]}', "expected an array of strings or of objects with a string"),
        ("a.json", b"3", "expected an array of strings or of objects"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.json", b'["x",', "a.json: not valid JSON (Expecting value at line 1)"),
        ("a.json", b'"x"\n{"txt": ""}', "a.json, line 2: expected a string or an object"),
        ("a.json", b"[" * 100_000, "a.json: unreadable JSON (maximum recursion depth"),
        ("a.ndjson", b'"x"\n{', "a.ndjson, line 2: not valid JSON"),
        ("a.txt.gz", b"plain", "a.txt.gz is no whole .gz file: incorrect header check"),
        (
            "a.txt.gz",
            gzip.compress(b"text" * 99, mtime=0)[:-9],
            "no whole .gz file: its end is missing",
        ),
        (
            "a.txt.gz",
            gzip.compress(bytes(1 << 26), mtime=0),
            "grows to more than 200 times its size",
        ),
        ("a.txt.gz", gzip.compress(b"\xff", mtime=0), "a.txt.gz is not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: unreadable JSON (maximum recursion depth"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1: unreadable JSON"),
    ],
)
def test_corpus_rejects_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_corpus(tmp_path / name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_corpus_rejects_missing_and_empty_places(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no text"):
        load_corpus(tmp_path)
    with pytest.raises(DataError, match="sample:zh"):
        load_corpus("sample:tlh")
    with pytest.raises(DataError, match="path of the corpus is empty"):
        load_corpus("")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is neither a file nor a folder; write what"):
        load_corpus(tmp_path / "pipe")
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        load_corpus("a" * 5000)


DOCUMENTS = ["one", "two \u2028 \u72d0"]
AS_JSON = {
    "strings": (".json", json.dumps(DOCUMENTS)),
    "objects": (".json", json.dumps([{"text": text, "id": 1} for text in DOCUMENTS], indent=2)),
    "mixed": (".json", json.dumps([DOCUMENTS[0], {"text": DOCUMENTS[1]}], ensure_ascii=False)),
    "lines in .json": (".json", "\n".join(json.dumps({"text": t}) for t in DOCUMENTS)),
    "lines": (".jsonl", "\n".join(json.dumps({"text": text}) for text in DOCUMENTS)),
    "ndjson": (".NDJSON", "\r\n".join(json.dumps(text) for text in DOCUMENTS)),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(("suffix", "content"), AS_JSON.values(), ids=AS_JSON)
def test_corpus_json_is_read_as_such(tmp_path, suffix, content, packed):
    raw = content.encode()
    file = tmp_path / "folder" / f"a{suffix}{'.gz' if packed else ''}"
    file.parent.mkdir()
    file.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)
    for source in (file, file.parent):
        corpus = load_corpus(source)
        assert corpus.documents == DOCUMENTS
        assert corpus.notes == ()
        assert corpus.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


REFUSED = {
    "syntax would be learnt": ".csv .tsv .parquet .xlsx .sqlite .sql",
    "convert it to plain text": ".html .HTM .xml .svg .ipynb .pdf .docx .epub .rtf",
    "unpack it first": ".zip .tar .tgz .bz2 .xz .zst .7z",
    "no text; expected": ".pkl .npy .pt .safetensors .bin",
}


@pytest.mark.parametrize(("message", "suffixes"), REFUSED.items(), ids=REFUSED)
def test_corpus_refuses_what_is_no_plain_text(tmp_path, message, suffixes):
    for suffix in [s + more for s in suffixes.split() for more in ("", ".gz")]:
        file = tmp_path / f"a{suffix}"
        file.write_text("a,b\n1,2\n")
        with pytest.raises(DataError, match=message):
            load_corpus(file)
        with pytest.raises(DataError, match=r"holds no text \(it holds 1 \.\w+\)"):
            load_corpus(tmp_path)
        file.unlink()


def test_corpus_says_what_is_read_as_plain_text(tmp_path):
    for name in ("a.txt", "b.md", "c.rst", "d.text", "e.TXT.gz"):
        raw = b"plain"
        (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith("gz") else raw)
        assert load_corpus(tmp_path / name).notes == ()
    for name in ("f.py", "g.c.gz", "h.yaml", "LICENSE", "book.v2"):
        raw = b"as it is"
        (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith("gz") else raw)
        corpus = load_corpus(tmp_path / name)
        assert corpus.documents == ["as it is"]
        assert corpus.notes == (f"{name} is read as plain text, every character of it.",)
    (tmp_path / "table.csv").write_text("a,b")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    corpus = load_corpus(tmp_path)
    assert corpus.documents == ["plain"] * 5 + ["as it is"] * 2
    assert "being plain text: 1 .csv, 1 .v2, 1 .yaml, 1 no suffix." in corpus.notes[0]
    assert corpus.notes[1] == "read as plain text, every character of them: 1 .c, 1 .py."


def test_corpus_gz_of_several_members(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(
        gzip.compress(b"one ", mtime=0) + gzip.compress(b"two") + bytes(9)
    )
    assert load_corpus(tmp_path / "a.txt.gz").documents == ["one two"]


@pytest.mark.parametrize("mode", ["contiguous", "document"])
def test_split_corpus_parts_are_disjoint_and_repeatable(mode):
    documents = [f"document {i} " * (i + 1) for i in range(20)]
    train, held = split_corpus(documents, 0.2, mode, seed=3)
    assert (train, held) == split_corpus(documents, 0.2, mode, seed=3)
    assert train
    assert held
    if mode == "contiguous":
        assert "".join(train + held) == "".join(documents)
        share = sum(map(len, held)) / sum(map(len, documents))
        assert 0.1 < share <= 0.2
    else:
        assert sorted(train + held) == sorted(documents)
        assert len(held) == 4
        assert held != split_corpus(documents, 0.2, mode, seed=4)[1]


def test_split_corpus_single_document_and_bad_arguments():
    assert split_corpus(["abcdefghij"], 0.3) == (["abcdefg"], ["hij"])
    assert split_corpus(["abcde", "fghij"], 0.5) == (["abcde"], ["fghij"])  # cut between the two
    for fraction in (0.01, 0.99):  # neither part is empty
        for mode in ("contiguous", "document"):
            assert all(split_corpus(["abcde", "fghij"], fraction, mode))
    with pytest.raises(DataError, match="between 0 and 1"):
        split_corpus(["abc"], 1.5)
    with pytest.raises(DataError, match="one document"):
        split_corpus(["abc"], 0.5, "document")
    with pytest.raises(DataError, match="cannot be split"):
        split_corpus(["a"], 0.5)
    with pytest.raises(DataError, match="'contiguous' or 'document'"):
        split_corpus(["abc"], 0.5, "random")


# Tokenizers


@pytest.mark.parametrize("kind", ["bytes", "bpe", "wordpiece"])
def test_tokenizer_round_trip_and_reload(kind, tmp_path):
    tokenizer = build_tokenizer(kind, [*ENGLISH, CHINESE], vocab_size=400)
    ids = tokenizer(CHINESE, add_special_tokens=False)["input_ids"]
    expected = CHINESE.lower() if kind == "wordpiece" else CHINESE
    assert tokenizer.decode(ids) == expected
    assert None not in (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert len(tokenizer) <= 400
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(CHINESE) == tokenizer(CHINESE)
    assert set(loaded(CHINESE)) == {"input_ids", "attention_mask"}
    assert loaded.decode(ids) == expected


def test_tokenizer_bytes_are_the_bytes_of_the_text():
    tokenizer = build_tokenizer("bytes")
    text = "".join(map(chr, [*range(0x180), 0x4E2D, 0x1F600])) + " <eos> <pad>"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0xFF]) == "\ufffd"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        256,
        257,
        258,
    )


def test_tokenizer_wordpiece_is_berts():
    tokenizer = build_tokenizer("wordpiece", [*ENGLISH, CHINESE])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Fox 博客")["input_ids"])
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"
    assert tokens[-3:-1] == ["博", "客"]
    assert tokenizer.unk_token_id in tokenizer("☃")["input_ids"]


def test_tokenizer_rejects_what_it_cannot_build(tmp_path):
    with pytest.raises(DataError, match="corpus is empty"):
        build_tokenizer("bpe", ["  "])
    with pytest.raises(DataError, match="at least 259"):
        build_tokenizer("bpe", ENGLISH, vocab_size=100)
    with pytest.raises(DataError, match="more than 5"):
        build_tokenizer("wordpiece", ENGLISH, vocab_size=5)
    with pytest.raises(DataError, match="cannot be read"):
        build_tokenizer(tmp_path)
    for path in (tmp_path / "missing", "./missing", "a/b/missing"):
        with pytest.raises(DataError, match="there is no folder"):
            build_tokenizer(path)


@pytest.mark.parametrize("offline", ["asked for", "no network"])
def test_tokenizer_from_a_hub_that_is_not_there(monkeypatch, offline):
    def no_network(*args, **kwargs):
        raise OSError("network is unreachable")

    if offline == "asked for":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.create_connection", no_network)
    monkeypatch.setattr("bigkernel.data.tokenizer.getproxies", dict)
    with pytest.raises(DataError, match="hub cannot be reached") as error:
        build_tokenizer("some-owner/no-such-tokenizer")
    assert "\n" not in str(error.value)


# Text datasets


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_dataset_pads_and_cuts(side):
    tokenizer = build_tokenizer("bytes")
    tokenizer.padding_side = side
    batch = next(iter(DataLoader(TextDataset(["abc", "x" * 99], tokenizer, 8), batch_size=2)))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 8)
    assert batch["input_ids"].dtype == torch.int64
    kept = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert bytes(kept.tolist()) == b"abc"
    assert (
        batch["attention_mask"][0].tolist() == ([0] * 5 + [1] * 3)[:: 1 if side == "left" else -1]
    )
    assert batch["attention_mask"][1].all()


def test_text_dataset_rejects_bad_arguments():
    tokenizer = build_tokenizer("bytes")
    assert TextDataset(["a"], tokenizer).max_length == 512
    with pytest.raises(TypeError, match="list of strings"):
        TextDataset("abc", tokenizer)
    with pytest.raises(ValueError, match="at least 1"):
        TextDataset(["abc"], tokenizer, 0)
    with pytest.raises(TypeError, match=r"texts\[0\]"):
        TextDataset([3], tokenizer)[0]
    with pytest.raises(TypeError, match="list of strings, got generator"):
        TextDataset((text for text in "ab"), tokenizer)
    with pytest.raises(TypeError, match=r"whole number, got 4\.0"):
        TextDataset(["abc"], tokenizer, 4.0)
    with pytest.raises(ValueError, match=r"texts\[0\] holds half of a surrogate pair"):
        TextDataset(["\ud800"], tokenizer)[0]
    marked = build_tokenizer("wordpiece", ["some words of a text"] * 9)
    assert TextDataset(["some words"], marked, 2)[0]["input_ids"].shape == (2,)
    with pytest.raises(ValueError, match="at least 2 for the tokenizer's special tokens, got 1"):
        TextDataset(["some words"], marked, 1)


def test_packed_dataset_keeps_documents_apart():
    tokenizer = build_tokenizer("bytes")
    data = PackedDataset(["abcde", "f", "ghi"], tokenizer, max_length=4)
    rows = [bytes(t if t < 256 else 0x2E for t in row["input_ids"].tolist()) for row in data]
    assert rows == [b"abcd", b"e.f.", b"ghi."]
    assert [row["position_ids"].tolist() for row in data] == [
        [0, 1, 2, 3],
        [0, 1, 0, 1],
        [0, 1, 2, 3],
    ]
    assert [row["labels"].tolist() for row in data] == [
        [-100, 98, 99, 100],
        [-100, 258, -100, 258],
        [-100, 104, 105, 258],
    ]
    assert data.num_tokens == 12
    assert data.num_bytes == 5
    assert len(PackedDataset(["abcdef"], tokenizer, 4)) == 2
    assert len(PackedDataset(["abcdef"], tokenizer, 4, drop_last=True)) == 1


def test_packed_dataset_rejects_a_short_corpus():
    with pytest.raises(DataError, match="4 tokens, shorter than one sequence of 8"):
        PackedDataset(["abc"], build_tokenizer("bytes"), 8)


def test_packing_collator_gives_the_documents_offsets():
    data = PackedDataset(["abcde", "f", "ghi"], build_tokenizer("bytes"), max_length=4)
    batch = PackingCollator(max_length=4)([data[0], data[1], data[2]])
    assert batch["input_ids"].shape == (1, 12)
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 6, 8, 12]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 4
    assert "attention_mask" not in batch
    assert [len(piece) for piece in unpack(batch["labels"][0], batch["cu_seq_lens_k"])] == [
        4,
        2,
        2,
        4,
    ]
    assert PackingCollator()([data[1]])["max_length_q"] == 2
    with pytest.raises(ValueError, match="longer than max_length=2"):
        PackingCollator(2)([data[0]])
    with pytest.raises(ValueError, match="no rows"):
        PackingCollator()([])


# Images


def test_digits_and_their_split():
    data = load_digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.uint8
    assert data.images.max() == 255
    assert data.label_names == list("0123456789")
    train, held = data.split(0.2, seed=1)
    assert len(train) + len(held) == 1797
    assert not set(train.indices) & set(held.indices)
    assert (torch.bincount(held.labels) >= 34).all()
    assert data.split(0.2, seed=1)[1].indices == held.indices
    assert data.split(0.2, seed=2)[1].indices != held.indices
    item = held[5]
    assert item["sample_ids"] == held.indices[5]
    assert torch.equal(item["pixel_values"], data.images[item["sample_ids"]])
    batch = next(iter(DataLoader(train, batch_size=7, collate_fn=collate_images)))
    assert batch["pixel_values"].shape == (7, 1, 8, 8)
    assert batch["sample_ids"].tolist() == train.indices[:7]


def test_image_folder_reads_ragged_images(tmp_path):
    save_image(tmp_path / "cat" / "a.png", (9, 7))
    save_image(tmp_path / "cat" / "deeper" / "b.PNG", (5, 6), "L")
    save_image(tmp_path / "dog" / "c.gif", (4, 4), "P")
    save_image(tmp_path / "dog" / "d.png", (4, 4), "RGBA", (1, 2, 3, 4))
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    data = load_image_folder(tmp_path)
    assert data.label_names == ["cat", "dog"]
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert [tuple(image.shape) for image in data.images] == [
        (3, 7, 9),
        (3, 6, 5),
        (3, 4, 4),
        (3, 4, 4),
    ]
    assert data.images[3][:, 0, 0].tolist() == [1, 2, 3]
    assert data.skipped == []
    again = load_image_folder(tmp_path, keep_bytes=0)
    assert again.sha256 == data.sha256
    assert all(torch.equal(a, b) for a, b in zip(again.images, data.images, strict=True))
    batch = collate_images([again.split(0.5)[0][i] for i in range(2)])
    assert isinstance(batch["pixel_values"], list)
    assert batch["labels"].shape == (2,)
    assert next(iter(batch)) == "labels"


def test_image_folder_names_and_skips_unreadable_images(tmp_path):
    for name in ("a.png", "b.png"):
        save_image(tmp_path / "cat" / name, (64, 64))
        save_image(tmp_path / "dog" / name, (64, 64))
    whole = (tmp_path / "cat" / "a.png").read_bytes()
    (tmp_path / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cat" / "empty.jpg").write_bytes(b"")
    (tmp_path / "dog" / "text.jpg").write_text("hello")
    with pytest.warns(UserWarning, match=r"3 of 7 images .*cut\.png.*empty\.jpg \(empty file\)"):
        data = load_image_folder(tmp_path)
    assert len(data) == 4
    assert len(data.skipped) == 3


def test_image_folder_takes_16_bits_and_refuses_32(tmp_path):
    """PIL's own conversion to RGB cuts off at 255."""
    from PIL import Image

    save_image(tmp_path / "dog" / "a.png", (8, 8))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "folder.png").mkdir()
    levels = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "cat" / "grey.png")
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "cat" / "floats.tiff")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(
        UserWarning,
        match=r"floats\.tiff \(F pixels of 32 bits.*gone\.png \(No such file or directory\)",
    ):
        data = load_image_folder(tmp_path)
    assert [Path(file).name for file, _ in data.skipped] == ["floats.tiff", "gone.png"]
    exact = torch.from_numpy(levels / 257)
    assert (data.images[0].double() - exact).abs().max() <= 1


def test_image_folder_rejects_what_cannot_be_trained_on(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        load_image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images in class folders"):
        load_image_folder(tmp_path)
    save_image(tmp_path / "cat" / "a.png")
    with pytest.raises(DataError, match=r"one class only \(cat\)"):
        load_image_folder(tmp_path)
    (tmp_path / "cat" / "a.png").write_bytes(b"broken")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "b.png").write_bytes(struct.pack("<Q", 1))
    with (
        pytest.warns(UserWarning, match="2 of 2"),
        pytest.raises(DataError, match="none of the 2 images"),
    ):
        load_image_folder(tmp_path)


def test_names_that_are_not_utf8(tmp_path):
    """Files may have such names; a class may not, for no label file could hold it."""
    broken = os.fsdecode(b"\xff")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / f"{broken}.txt").write_text("text")
    assert load_corpus(tmp_path / "texts").documents == ["text"]
    images = tmp_path / "images"
    for name in ("cat", "dog"):
        save_image(images / name / f"{broken}.png")
    data = load_image_folder(images)
    assert len(data) == 2
    (images / "cat" / f"{broken}.png").rename(images / "cat" / "a.png")
    assert load_image_folder(images).sha256 != data.sha256
    (images / "cat").rename(images / broken)
    with pytest.raises(DataError, match=r"class folder '.*\\udcff' has a name that is not UTF-8"):
        load_image_folder(images)


def test_image_split_needs_two_images_of_some_class():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    data = ImageData(images, torch.tensor([0, 1]), ["a", "b"], "tiny", "")
    with pytest.raises(DataError, match="none can be held back"):
        data.split()


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="scikit-learn"):
        load_digits()


def test_collate_takes_arrays_without_ids():
    batch = collate_images([{"pixel_values": np.zeros((1, 2, 2), np.uint8), "labels": 1}] * 3)
    assert set(batch) == {"labels", "pixel_values"}
    assert batch["pixel_values"].shape == (3, 1, 2, 2)


# Splits that a folder brings


def folders_of_images(root, *paths):
    for number, path in enumerate(paths):
        save_image(root / path, value=(10 * number, 0, 0))


TRAIN = ("train/cat/a.png", "train/cat/b.png", "train/dog/c.png", "train/dog/deeper/d.png")


@pytest.mark.parametrize(
    ("train", "held"), [("train", "val"), ("Training", "VALID"), ("train", "validation")]
)
def test_image_folder_takes_its_split(tmp_path, train, held):
    moved = [path.replace("train", train, 1) for path in TRAIN]
    folders_of_images(tmp_path, *moved, f"{held}/dog/e.png", "test/cat/f.png", "test/dog/g.png")
    data = load_image_folder(tmp_path)
    assert data.label_names == ["cat", "dog"]
    train_set, held_set = data.split(0.5, seed=9)
    assert train_set.labels.tolist() == [0, 0, 1, 1]
    assert held_set.labels.tolist() == [1]
    assert [data.images.files[i].name for i in held_set.indices] == ["e.png"]
    assert f"{train} to train, {held} held back. test is left" in data.notes[0]
    assert f"{held} has no images of 1 of the 2 classes (cat)" in data.notes[1]
    # The part that is used is what is hashed.
    before = data.sha256
    (tmp_path / "test" / "cat" / "f.png").unlink()
    assert load_image_folder(tmp_path).sha256 == before
    (tmp_path / held / "dog" / "e.png").unlink()
    assert load_image_folder(tmp_path).sha256 != before


@pytest.mark.parametrize(
    ("paths", "classes", "note"),
    [
        # test is held back where there is no val
        ((*TRAIN, "test/cat/e.png"), ["cat", "dog"], "test held back"),
        (TRAIN, ["cat", "dog"], "train is the part to train on"),
        # as in competitions: the test images have no labels
        ((*TRAIN, "test/1.png"), ["cat", "dog"], "test has images and no class folders: not used"),
        ((*TRAIN, "val/cat/e.png", "test/1.png"), ["cat", "dog"], "val held back. test has images"),
        # no images in there: no class and no part
        ((*TRAIN, "val/cat/e.png", "notes/a.txt"), ["cat", "dog"], "val held back"),
        # a class that is really called so
        (("train/a.png", "bus/b.png"), ["bus", "train"], "train: taken for a class"),
        (("train/steam/a.png", "bus/b.png"), ["bus", "train"], "for a class like bus"),
        (("train/a.png", "test/b.png", "bus/c.png"), ["bus", "test", "train"], "train: taken for"),
        (("a/train/x.png", "b/x.png"), ["a", "b"], None),
    ],
)
def test_image_folder_decides_what_is_a_class(tmp_path, paths, classes, note):
    folders_of_images(tmp_path, *(p for p in paths if p.endswith("png")))
    (tmp_path / "notes").mkdir()
    data = load_image_folder(tmp_path)
    assert data.label_names == classes
    said = " ".join(data.notes)
    assert note in said if note else not said
    assert (data.held_back is not None) == ("held back." in said)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("train/a.png", "val/b.png"), "images and no class folders in them"),
        (("val/cat/a.png", "val/dog/b.png"), "holds val and no train folder"),
        ((*TRAIN, "val/cat/a.png", "valid/cat/b.png"), "val and valid, which are for the same"),
        ((*TRAIN, "val/cat/a.png", "bird/b.png"), "other folders with images beside it (bird)"),
        ((*TRAIN, "val/bird/a.png"), "holds the class bird, of which"),
        (("set/train/cat/a.png", "set/val/cat/b.png"), "a split of its own (train beside val or"),
        (("cat/train/a.png", "cat/test/b.png", "dog/train/c.png"), "cat holds a split of its own"),
        (("train/cat/a.png", "val/cat/b.png"), "one class only (cat)"),
    ],
)
def test_image_folder_refuses_what_could_be_read_in_two_ways(tmp_path, paths, message):
    folders_of_images(tmp_path, *paths)
    with pytest.raises(DataError) as error:
        load_image_folder(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Files made to harm


def png_bomb(path, side):
    """A PNG of side x side pixels in some kilobytes."""
    import zlib

    def chunk(kind, body):
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * ((side // 8 + 1) * 64), 9)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_image_bombs_and_pipes_are_left_out_undecoded(tmp_path, monkeypatch):
    from PIL import Image, ImageFile

    for name in ("cat", "dog"):
        save_image(tmp_path / name / "a.png", (16, 12))
    png_bomb(tmp_path / "cat" / "bomb.png", 40_000)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "dog" / "zero.jpg").symlink_to("/dev/zero")
    with open(tmp_path / "dog" / "huge.png", "wb") as file:
        file.truncate(1 << 40)  # no block of it is on the disk
    (tmp_path / "dog" / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9")
    decoded = []
    usual = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: decoded.append(self.size) or usual(self)
    )
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.warns(UserWarning, match="5 of 7 images cannot be read") as caught:
        data = load_image_folder(tmp_path)
    assert limit == Image.MAX_IMAGE_PIXELS
    assert len(caught) == 1, "none of PIL's"
    assert len(data) == 2
    reasons = {Path(file).name: reason for file, reason in data.skipped}
    assert reasons["bomb.png"] == "40,000 x 40,000 pixels, more than 64,000,000 (--max-pixels)"
    assert reasons["pipe.png"] == reasons["zero.jpg"] == "not a regular file"
    assert "1,099,511,627,776 bytes, more than the 513,048,576" in reasons["huge.png"]
    assert reasons["program.png"] == "not an image"
    assert set(decoded) == {(16, 12)}
    (tmp_path / "cat" / "bomb.png").unlink()
    with (
        pytest.warns(UserWarning, match=r"5 of 5|16 x 12 pixels, more than 100"),
        pytest.raises(DataError, match="none of the"),
    ):
        load_image_folder(tmp_path, max_pixels=100)


def test_a_larger_limit_takes_images_that_pil_itself_would_refuse(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        save_image(tmp_path / name / "a.png", (16, 12))
    usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 50
    try:
        assert len(load_image_folder(tmp_path, max_pixels=192)) == 2
        assert Image.MAX_IMAGE_PIXELS == 50
    finally:
        Image.MAX_IMAGE_PIXELS = usual
