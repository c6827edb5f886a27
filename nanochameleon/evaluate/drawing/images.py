"""Draw the images that a folder lacks, each from its own seed.

ImageFile -> tokens of its prompt, a seed per sample -> generate_each -> codes -> pixels -> a grid -> PNG -> OUT/path
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanochameleon.config import SamplingParams
from nanochameleon.documents import Text
from nanochameleon.evaluate.drawing.each import generate_each
from nanochameleon.evaluate.drawing.folder import write_whole
from nanochameleon.evaluate.drawing.layouts import ImageFile
from nanochameleon.evaluate.shapes import has_room
from nanochameleon.evaluate.task import item_seed
from nanochameleon.generation.prompts import prompt_tokens
from nanochameleon.images.terminal import png
from nanochameleon.training.run import Run


def tokens_of(run: Run, text: str) -> list[int]:
    return prompt_tokens([Text(text)], run, "draw")


def fits(run: Run, text: str) -> bool:
    """Does the context have room for the prompt and its image?"""
    return has_room(run, tokens_of(run, text))


def draw_missing(run: Run, files: Sequence[ImageFile], out: Path, seed: int, params: SamplingParams) -> None:
    """Draw what is not there yet. Each file is written as soon as its samples are complete."""
    missing = [file for file in files if not (out / file.path).exists()]
    with tqdm(total=len(files), initial=len(files) - len(missing), desc="drawing", unit="image") as bar:
        for file, image in drawn(run, missing, seed, params):
            if file.prompt.line:
                write_whole(out, Path(file.prompt.name, "metadata.jsonl"), file.prompt.line.encode())
            write_whole(out, file.path, png(image))
            bar.update()


def drawn(
    run: Run, files: Sequence[ImageFile], seed: int, params: SamplingParams, batch_size: int = 64
) -> Iterator[tuple[ImageFile, np.ndarray]]:
    """Yield each file with its image, uint8 (H, W, 3), in the order in which they are complete."""
    asked = [(file, sample) for file in files for sample in file.samples]
    prompts = [tokens_of(run, file.prompt.text) for file, _ in asked]
    seeds = [item_seed(seed, file.prompt.text, sample) for file, sample in asked]
    done: dict[ImageFile, dict[int, np.ndarray]] = {}
    for i, tokens in generate_each(run, prompts, seeds, params, "image", batch_size=batch_size):
        file, sample = asked[i]
        images = done.setdefault(file, {})
        images[sample] = pixels(run, tokens)
        if len(images) == len(file.samples):
            yield file, grid([images[sample] for sample in file.samples])
            del done[file]


def pixels(run: Run, tokens: Sequence[int]) -> np.ndarray:
    """Decode an image: uint8 (R, R, 3). One at a time, since a batch may round in another way: then the bytes of a
    file would depend on the other files."""
    codes = torch.tensor([tokens[: run.image_tokenizer.n_codes_per_image]]) - run.vocab.first_code
    return run.image_tokenizer.decode(codes)[0]


def grid(images: Sequence[np.ndarray]) -> np.ndarray:
    """A square of images, row by row: n^2 of (R, R, 3) -> (n R, n R, 3)."""
    side = math.isqrt(len(images))
    rows = [np.concatenate(images[i : i + side], axis=1) for i in range(0, len(images), side)]
    return np.concatenate(rows, axis=0)
