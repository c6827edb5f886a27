"""From raw documents to batches: the forms of documents, mixtures, stored images, token shards, the loader."""

from nanochameleon.data.forms import (
    FORMS,
    RawDocument,
    RawImage,
    Source,
    captioned,
    digest,
    fuse,
    interleaved,
    pair,
    question_answer,
)
from nanochameleon.data.image_store import ImageStore, write_images
from nanochameleon.data.index import aside
from nanochameleon.data.live import Live
from nanochameleon.data.loader import Loader, Rows
from nanochameleon.data.mixture import Mixture, Shares, in_epochs, permutation
from nanochameleon.data.shards import Shards, write_shards

__all__ = [
    "FORMS",
    "ImageStore",
    "Live",
    "Loader",
    "Mixture",
    "RawDocument",
    "RawImage",
    "Rows",
    "Shards",
    "Shares",
    "Source",
    "aside",
    "captioned",
    "digest",
    "fuse",
    "in_epochs",
    "interleaved",
    "pair",
    "permutation",
    "question_answer",
    "write_images",
    "write_shards",
]  # fmt: skip
