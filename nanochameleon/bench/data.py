"""Time the data pipeline: batches from token shards, documents tokenized on the fly, and preparing at scale.

Figures are tokens per second of one process with one thread, next to what training consumes. The goal is ten times as
much. Images and texts are made up and tokenizers have random weights, which cost as much time as real ones.
"""

import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nanochameleon.bench.measure import median_seconds
from nanochameleon.bench.rows import Row, make_row
from nanochameleon.cli import complete
from nanochameleon.config import RunConfig, VQGANConfig
from nanochameleon.data import Loader, PackedDocuments, Shards, write_shards
from nanochameleon.data.build import mixture, open_loader
from nanochameleon.data.prepare import tokenizing
from nanochameleon.data.sources.units import plan
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.presets import toy
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.vocab import Vocab

# tokens/s that training needs, padding included, though the rows here leave padding out: the toy on two cores with AMX
# (docs/results/data.md), and the aims for one H100
CONSUMES = {"toy step": 30_000, "H100 1.4B": 65_000, "H100 288M": 330_000}
ROUNDS = 5


def rows(
    case: str, job: Callable[[], object], amounts: dict[str, float], consumers: tuple[str, ...], device: torch.device
) -> list[Row]:
    """Return a row for each unit of what one run of the job makes, of tokens one for each consumer."""
    seconds = median_seconds({"nano": job}, ROUNDS, device)["nano"]
    made = []
    for unit, amount in amounts.items():
        value = amount / seconds
        ratios = [(value / CONSUMES[name], name) for name in consumers] if unit == "tokens/s" else [(None, None)]
        made += [make_row("data", case, "nano", value, unit, device, *ratio) for ratio in ratios]
    return made


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def loader_rows(
    folder: Path, lengths: tuple[int, int], seq_len: int, batch_size: int, consumers: tuple[str, ...], quick: bool
) -> list[Row]:
    """Measure documents of lengths[0] to lengths[1] - 1 tokens from shards, packed into sequences of seq_len."""
    rng, n = np.random.default_rng(0), (2_000_000 if quick else 20_000_000) // lengths[0]
    path = folder / f"documents-{lengths[0]}"
    write_shards(path, (rng.integers(4, 65_536, size) for size in rng.integers(*lengths, n)))
    packed = PackedDocuments("all", Shards(path), seq_len, 0)
    loader = Loader({"all": packed}, [(0, {"all": 1.0})], batch_size, seq_len, 0, Vocab.pad)
    steps = iter(range(10**9))

    def batches() -> None:
        for _ in range(32):
            loader.batch(next(steps))

    n_tokens = 32 * batch_size * len(packed.numbers) / len(packed) * sum(lengths) / 2
    case = f"loader {lengths[0]} to {lengths[1] - 1} tokens, {batch_size} x {seq_len}"
    return rows(case, batches, {"tokens/s": n_tokens}, consumers, torch.device("cpu"))


def on_the_fly_rows(cfg: RunConfig, image_tokenizer: ImageTokenizer, text: TextTokenizer) -> list[Row]:
    """Measure documents of the toy that are made, tokenized and packed when a batch needs them."""
    cfg = replace(cfg, data=replace(cfg.data, tokenize_on_the_fly=True, n_documents=2_000))
    loader = open_loader(cfg, image_tokenizer, text, Path())
    n_tokens, steps = (
        float(np.mean([int((loader.batch(i).doc_ids >= 0).sum()) for i in range(8)])),
        iter(range(8, 10**9)),
    )
    job = lambda: loader.batch(next(steps))  # noqa: E731
    return rows(
        "documents of the toy, tokenized on the fly", job, {"tokens/s": n_tokens}, ("toy step",), image_tokenizer.device
    )


# ---------------------------------------------------------------------------------------------------------------------
# Preparing


def tar_of_images(path: Path, n: int, size: tuple[int, int]) -> Path:
    """Write JPEGs of smooth noise with captions of a dozen words."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(n):
            file = io.BytesIO()
            small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
            small.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            caption = f"a big red circle above a small blue star on white, number {number}"
            for ending, data in (("jpg", file.getvalue()), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number:09d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def prepare_rows(
    case: str, source: Path, form: str, image_tokenizer: ImageTokenizer, text: TextTokenizer, consumers: tuple[str, ...]
) -> list[Row]:
    """Measure all of `nanochameleon.data.prepare` except for its start."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(10**9))

        def prepare() -> tokenizing.PrepareJob:
            to = Path(folder) / str(next(numbers))
            fresh = ImageTokenizer(image_tokenizer.vqgan)  # which has not seen these images
            job = tokenizing.PrepareJob(to, form, 4_096, 0, text, fresh, "", *plan([source], form))
            tokenizing.run(
                job, 0, 1, 1 if image_tokenizer.device.type == "cpu" else min(16, os.cpu_count() or 1), quiet=True
            )
            return job

        shards = Shards(prepare().directory)
        amounts = {"tokens/s": float(shards.offsets[-1])} | ({"images/s": len(shards)} if form == "pairs" else {})
        return rows(case, prepare, amounts, consumers, image_tokenizer.device)


def bench(device: torch.device, quick: bool) -> Iterator[Row]:
    torch.set_num_threads(1)
    cfg = complete(toy())
    text = TextTokenizer.train(mixture(cfg, Path()).captions(1_000), Vocab.toy(cfg.vqgan.n_codes, 160), progress=False)
    torch.manual_seed(0)
    small = ImageTokenizer(VQGAN(cfg.vqgan).to(device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from loader_rows(folder, (72, 95), 256, 8, ("toy step", "H100 288M"), quick)
        yield from loader_rows(folder, (1_071, 1_072), 4_096, 8, ("H100 1.4B", "H100 288M"), quick)
        yield from on_the_fly_rows(cfg, small, text)
        tar = tar_of_images(folder / "small.tar", 500, (48, 40))
        yield from prepare_rows("prepare pairs, the toy's tokenizers", tar, "pairs", small, text, ("toy step",))
        words = folder / "words.txt"
        words.write_text("".join(f"{caption}\n" for caption in mixture(cfg, Path()).captions(20_000)))
        yield from prepare_rows("prepare text", words, "text", small, text, ("toy step", "H100 1.4B"))
        if not quick:
            tar = tar_of_images(folder / "large.tar", 256 if device.type == "cuda" else 4, (640, 480))
            released = ImageTokenizer(VQGAN(VQGANConfig()).to(device))
            vocab = TextTokenizer(text.merges, Vocab())
            yield from prepare_rows("prepare pairs, the released size", tar, "pairs", released, vocab, ("H100 1.4B",))
