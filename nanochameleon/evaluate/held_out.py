"""Documents of the test split, whatever the data source. The report measures and shows them."""

from pathlib import Path

import numpy as np
import torch

from nanochameleon.config import RunConfig
from nanochameleon.data import RawImage, Shards, fuse
from nanochameleon.data.build import mixture, open_sources
from nanochameleon.data.prepared import TEST
from nanochameleon.documents import Image, Text, parse, render
from nanochameleon.training.run import Run


def prepared_documents(run: Run, n: int) -> list[list[int]]:
    """Return n documents as tokens, evenly spread over the prepared source `test`. [] if there is none."""
    place = run.cfg.data.path / TEST
    if not (place / Shards.INDEX).exists():
        return []
    shards = Shards(place, run.vocab.size)
    n = min(n, len(shards))
    return [shards[i * len(shards) // n].tolist() for i in range(n)]


def unseen(run: Run, folder: Path, n: int) -> list[list[int]]:
    """Return n documents as tokens, in the mixture of training."""
    if run.cfg.data.source == "prepared":
        return prepared_documents(run, n)
    docs = mixture(run.cfg, folder, "test")
    fused = fuse([docs.document(i) for i in range(n)], run.image_tokenizer)
    return [render(doc, run.tokenizer, run.vocab) for doc in fused]


def captioned(run: Run, folder: Path, n: int) -> tuple[list[str], list[np.ndarray]]:
    """Return at most n captions and their images. Images of prepared data are decoded from their codes."""
    if run.cfg.data.source == "prepared":
        return captioned_codes(run, n)
    return captioned_images(run.cfg, folder, n)


def captioned_images(cfg: RunConfig, folder: Path, n: int) -> tuple[list[str], list[np.ndarray]]:
    """Do the same for data that is not prepared, which needs no model."""
    source = open_sources(cfg, folder, "test")("pairs")
    docs = [source.document(i) for i in range(n if source.size is None else min(n, source.size))]
    texts = [next(s.text for s in doc if not isinstance(s, RawImage)) for doc in docs]
    return texts, [next(s.pixels for s in doc if isinstance(s, RawImage)) for doc in docs]


def captioned_codes(run: Run, n: int) -> tuple[list[str], list[np.ndarray]]:
    """Do the same for prepared data, from documents of one text and one image."""
    docs = [parse(tokens, run.tokenizer, run.vocab) for tokens in prepared_documents(run, n)]
    pairs = [sorted(doc, key=lambda segment: isinstance(segment, Image)) for doc in docs if len(doc) == 2]
    pairs = [(a.text, b.codes) for a, b in pairs if isinstance(a, Text) and isinstance(b, Image)]
    if not pairs:
        return [], []
    return [text for text, _ in pairs], list(run.image_tokenizer.decode(torch.tensor([codes for _, codes in pairs])))
