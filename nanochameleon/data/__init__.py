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
from nanochameleon.data.image_store import ImageStore, stored_images, write_images
from nanochameleon.data.index import replacing_folder
from nanochameleon.data.loader import Loader, PackedDocuments
from nanochameleon.data.mixture import Fractions, Mixture, in_epochs, permutation
from nanochameleon.data.on_the_fly import OnTheFly
from nanochameleon.data.shards import Shards, write_shards

__all__ = [
    "FORMS", "Fractions", "ImageStore", "Loader", "Mixture", "OnTheFly", "PackedDocuments", "RawDocument", "RawImage",
    "Shards", "Source", "captioned", "digest", "fuse", "in_epochs", "interleaved", "pair", "permutation",
    "question_answer", "replacing_folder", "stored_images", "write_images", "write_shards",
]  # fmt: skip
