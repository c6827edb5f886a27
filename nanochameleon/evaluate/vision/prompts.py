"""Prompts of images and texts, and what a model writes after them.

    shots, image, text -> parts: (image, text), ... -> codes of the images -> one document -> tokens -> write

A prompt is one document, as in pre-training: the image of an example, its text, a newline, the next example, and at
last the image in question with the start of its text. Examples are drawn by a hash of (seed, item) from training items,
never of the same image. The paper gives their number, 2 (Table 7), and neither its prompts nor its examples.

An image fills 1,026 tokens of the released models' context of 4,096, so three examples do not fit. They are refused: no
image is ever cut. Images become squares as the model learnt to see them: an aligned model gets the whole image with a
white border, as in the paper's prompts; a pre-trained one gets the middle square, as in its training.
"""

from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import TypeVar

import numpy as np

from nanochameleon.documents import Image, Text, render
from nanochameleon.errors import UserError
from nanochameleon.evaluate.task import Answer, item_seed
from nanochameleon.evaluate.vision.files import Asked, Captioned, find_image, is_there
from nanochameleon.evaluate.writing import write
from nanochameleon.images.tokenizer import load_square
from nanochameleon.training.run import Run

SHOTS = 2  # examples before the question, as in the paper

Part = Sequence[str]  # the name of an image, and the text after it
Example = TypeVar("Example", Captioned, Asked)


# ---------------------------------------------------------------------------------------------------------------------
# Examples


def draw_shots(pool: Sequence[Example], item: Example, n: int, seed: int) -> list[Example]:
    """Return n training items with n different images, none of them the item's own.

    The draw depends on the pool, the seed and the item's id alone. check_pool must have accepted the pool.
    """
    drawn: dict[str, Example] = {}
    numbers = count()
    while len(drawn) < n:
        other = pool[item_seed(seed, item.id, next(numbers)) % len(pool)]
        if other.image != item.image:
            drawn.setdefault(other.image, other)
    return list(drawn.values())


def check_pool(pool: Sequence[Captioned | Asked], n: int, data: Path | None) -> None:
    """Raise UserError unless the pool has more than n images, and any of its first hundred is there."""
    if not n:
        return
    if (found := len({other.image for other in pool})) <= n:
        raise UserError(f"{n} examples need {n + 1} training images, and {data} lists {found}: use fewer --shots")
    if not any(is_there(data, other.image) for other in pool[:100]):
        where = f"such as {pool[0].image}, which is not in {data}"
        raise UserError(f"examples show training images, {where}: put them there, or use --shots 0")


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def make_content(shots: Sequence[Part], image: str, text: str, references: Sequence[str]) -> dict:
    """Return the content of an item. text: how the line starts that the model completes."""
    return {"shots": shots, "image": image, "text": text, "references": list(references)}


def parts_of(content: dict) -> list[Part]:
    return [*content["shots"], [content["image"], content["text"]]]


def check_room(run: Run, n_images: int, max_new_tokens: int) -> None:
    """Raise UserError if so many images do not fit in the model's context."""
    context, image_len = run.model.cfg.max_seq_len, run.image_tokenizer.n_codes_per_image + 2  # <boi> and <eoi>
    room = context - 1 - max_new_tokens  # <s>
    if n_images * image_len > room:
        fit = f"use --shots {room // image_len - 1}" if room >= image_len else "this model has no room for an image"
        sizes = f"{n_images} images of {image_len:,} tokens and {max_new_tokens} new tokens"
        raise UserError(f"{n_images - 1} examples make {sizes}, and the model's context has {context:,}: {fit}")


def encode_images(run: Run, names: Iterable[str], data: Path) -> dict[str, Image | str]:
    """Return the codes of each image, or one sentence on what is wrong with its file. Each image is read once."""
    fit = "pad" if run.cfg.train.assistant_only_loss else "crop"
    squares: dict[str, np.ndarray] = {}
    seen: dict[str, Image | str] = {}
    for name in dict.fromkeys(names):
        try:
            squares[name] = load_square(find_image(data, name), run.cfg.vqgan.resolution, fit)
        except UserError as error:
            seen[name] = str(error)
    if squares:
        codes = run.image_tokenizer.encode(np.stack(list(squares.values()))).tolist()
        seen |= {name: Image(tuple(row)) for name, row in zip(squares, codes, strict=True)}
    return seen


def one_line(text: str) -> str:
    return " ".join(text.split())


def make_prompt(run: Run, parts: Sequence[Part], seen: dict[str, Image | str], max_new_tokens: int) -> list[int] | str:
    """Return the tokens of a prompt, or one sentence on why there is none."""
    for name, _ in parts:
        if isinstance(seen[name], str):
            return seen[name]
    document = [segment for name, text in parts for segment in (seen[name], Text(text))]
    prompt, context = render(document, run.tokenizer, run.vocab, end=False), run.model.cfg.max_seq_len
    if len(prompt) + max_new_tokens > context:
        return f"the texts are too long: the prompt has {len(prompt):,} tokens, and the model's context {context:,}"
    return prompt


def make_blind_prompt(run: Run, parts: Sequence[Part]) -> list[int]:
    """Return the same prompt without its images."""
    return render([Text("".join(text for _, text in parts))], run.tokenizer, run.vocab, end=False)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def ask(run: Run, asked: Sequence[Sequence[Part]], data: Path, max_new_tokens: int, blind: bool) -> list[Answer]:
    """Return the model's line after each item's parts: {"text": ...}; with `blind` also {"blind": ...}, without images.

    An item whose image cannot be read, or whose texts are too long, has {"problem": ...}. Decoding is greedy.
    """
    check_room(run, max(map(len, asked)), max_new_tokens)
    seen = encode_images(run, (name for parts in asked for name, _ in parts), data)
    prompts = [make_prompt(run, parts, seen, max_new_tokens) for parts in asked]
    good = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    outputs = {i: {"problem": prompt} for i, prompt in enumerate(prompts) if isinstance(prompt, str)}
    outputs |= write_lines(run, {i: prompts[i] for i in good}, max_new_tokens, "text")
    if blind:
        without = {i: make_blind_prompt(run, asked[i]) for i in good}
        for i, output in write_lines(run, without, max_new_tokens, "blind").items():
            outputs[i] |= output
    return [Answer([] if "problem" in outputs[i] else prompt, outputs[i]) for i, prompt in enumerate(prompts)]


def write_lines(run: Run, prompts: dict[int, list[int]], max_new_tokens: int, name: str) -> dict[int, dict[str, str]]:
    """Write up to a newline, the end of the turn or of the document, or the start of an image: {item: {name: text}}."""
    stops = run.vocab.eos, run.vocab.eot, run.vocab.boi
    written = write(run, list(prompts.values()), max_new_tokens, ["\n"], stops)
    return {i: {name: each.text} for i, each in zip(prompts, written, strict=True)}
