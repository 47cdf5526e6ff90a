"""Data for training: text (corpora, tokenizers, packing) and labelled images."""

from bigkernel.extras import needs

with needs("train", "bigkernel.data"):
    from bigkernel.data.collators import PackingCollator, PaddingCollator
    from bigkernel.data.corpus import Corpus, load_corpus, split_corpus
    from bigkernel.data.errors import DataError
    from bigkernel.data.images import (
        ImageData,
        ImageDataset,
        collate_images,
        load_digits,
        load_image_folder,
    )
    from bigkernel.data.text import PackedDataset, TextDataset, cu_seqlens, unpack
    from bigkernel.data.tokenizer import build_tokenizer

__all__ = [
    "Corpus",
    "DataError",
    "ImageData",
    "ImageDataset",
    "PackedDataset",
    "PackingCollator",
    "PaddingCollator",
    "TextDataset",
    "build_tokenizer",
    "collate_images",
    "cu_seqlens",
    "load_corpus",
    "load_digits",
    "load_image_folder",
    "split_corpus",
    "unpack",
]
