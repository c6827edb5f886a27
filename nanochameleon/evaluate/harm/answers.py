"""What a model says to prompts of text and images: a chat, greedy in text, images with the model's own parameters.

    prompt -> <s> images, text, end of turn -> engine -> text and images -> {"said": [{"text": ...}, {"image": FILE}]}

Every model is asked as in a chat, aligned or not. Images of an answer are saved, so people can judge them. An answer
depends on its prompt and its seed alone.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanochameleon.data import RawDocument
from nanochameleon.documents import Image, Text
from nanochameleon.evaluate.drawing.each import generate_each
from nanochameleon.evaluate.task import Answer, Item, Options, digest, item_seed
from nanochameleon.files import write_file
from nanochameleon.generation.events import Detokenizer
from nanochameleon.generation.prompts import MODALITY, Mode, prompt_tokens, stop_tokens
from nanochameleon.images.terminal import png
from nanochameleon.training.run import Run

IMAGES = "images"  # OUT/TASK/images


def ask(
    run: Run, items: Sequence[Item], prompts: Sequence[RawDocument | str], options: Options, name: str
) -> list[Answer]:
    """Return an answer to each prompt. A prompt that is a str says in one sentence why it cannot be asked."""
    mode: Mode = "chat"
    tokens = [[] if isinstance(prompt, str) else prompt_tokens(prompt, run, mode) for prompt in prompts]
    context = run.model.cfg.max_seq_len
    outputs: dict[int, dict[str, Any]] = {}
    for i, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        if isinstance(prompt, str):
            outputs[i] = {"problem": prompt}
        elif len(tokens[i]) >= context:
            sizes = f"{len(tokens[i]):,} tokens, and the model's context has {context:,}"
            outputs[i] = {"problem": f"{name}: the prompt of item {item.id} has {sizes}"}
    good = [i for i in range(len(items)) if i not in outputs]
    params = dataclasses.replace(run.cfg.sample, temperature=0.0)
    seeds = [item_seed(options.seed, items[i].id) for i in good]
    modality = MODALITY[mode] if run.image_tokenizer.can_draw else "text"
    asked = [tokens[i] for i in good]
    for n, new in generate_each(run, asked, seeds, params, modality, stop_tokens(mode, run.vocab)):
        i = good[n]
        outputs[i] = {"said": read_answer(run, tokens[i], new, options.out / name / IMAGES, digest(items[i].id))}
    return [Answer([] if "problem" in outputs[i] else tokens[i], outputs[i]) for i in range(len(items))]


def read_answer(run: Run, prompt: Sequence[int], new: Sequence[int], folder: Path, stem: str) -> list[dict[str, str]]:
    """Return the segments of an answer; images are written as folder/STEM-0.png, ..."""
    said: list[dict[str, str]] = []
    for event in Detokenizer(tuple(prompt), run.tokenizer).add(new, True):
        if isinstance(event, Image):
            folder.mkdir(parents=True, exist_ok=True)
            image = run.image_tokenizer.decode(torch.tensor([event.codes]))[0]  # uint8 (R, R, 3)
            file = f"{stem}-{len(said)}.png"
            write_file(folder / file, png(image))
            said.append({"image": f"{IMAGES}/{file}"})
        elif isinstance(event, Text) and said and "text" in said[-1]:
            said[-1] = {"text": said[-1]["text"] + event.text}
        elif isinstance(event, Text):
            said.append({"text": event.text})
    return said
