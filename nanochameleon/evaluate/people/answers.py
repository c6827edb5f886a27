"""Answers of one of our models to the prompts of a study: text and images in any order, resumable.

    prompt -> <s> text, image, ..., end of turn -> engine -> one line of NAME.jsonl, images as PNG

A line is written after its images, so a killed run resumes after its last whole line, and makes the same bytes.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nanochameleon.data import RawImage
from nanochameleon.documents import Image, Text
from nanochameleon.errors import UserError, say
from nanochameleon.evaluate.drawing.each import run_each
from nanochameleon.evaluate.header import describe_model
from nanochameleon.evaluate.people.prompts import Prompt
from nanochameleon.evaluate.people.study import Segments, hashed
from nanochameleon.evaluate.records import read_bytes, read_json_lines
from nanochameleon.evaluate.task import item_seed
from nanochameleon.files import fsync, write_file
from nanochameleon.generation.events import Detokenizer
from nanochameleon.generation.prompts import MODALITY, prompt_tokens, stop_tokens
from nanochameleon.generation.request import Request, make_request
from nanochameleon.images.terminal import enlarge, png
from nanochameleon.images.tokenizer import NO_DECODER, load_square
from nanochameleon.training.run import Run

CHUNK = 32  # prompts between two writes
SIDE = 512  # pixels: the release's images; a toy's are enlarged to about as many, without smoothing


def answer_all(run: Run, name: str, prompts: Sequence[Prompt], folder: Path, seed: int) -> list[Segments]:
    """Return the model's answers, in order; those that folder/NAME.jsonl already holds are not made again."""
    if not run.image_tokenizer.can_draw:
        raise UserError(NO_DECODER)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    about = model_hash(run)
    made_from = [hashed(prompt.id, contents(prompt.segments), seed, about) for prompt in prompts]
    done = whole_lines(path, made_from)
    with open(path, "ab") as log:
        for start in range(len(done), len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            for prompt, answer in zip(chunk, generated(run, chunk, seed), strict=True):
                done.append(saved(answer, f"{name}-{hashed(prompt.id)[:16]}", folder))
                row = {"id": prompt.id, "made_from": made_from[len(done) - 1], "segments": done[-1]}
                log.write((json.dumps(row) + "\n").encode())
            log.flush()
            os.fsync(log.fileno())
            say(f"{name}: {len(done)} of {len(prompts)} answers")
    return [[{k: str(folder / v) if k == "image" else v for k, v in s.items()} for s in answer] for answer in done]


def model_hash(run: Run) -> str:
    """A hash of what answers: all weights, the tokenizers, the device, and how the model samples."""
    return hashed(describe_model(run, Path()))  # no path: the same model in another place gives the same answers


def contents(segments: Segments) -> Segments:
    """The segments with a hash of each image in place of its path: an image may change, and its folder may move."""
    return [
        {"image": hashlib.sha256(read_bytes(Path(s["image"]))).hexdigest()} if "image" in s else s for s in segments
    ]


def whole_lines(path: Path, expected: list[str]) -> list[Segments]:
    """Return the answers that are there, and cut off a line that was not finished."""
    if not path.is_file() or not (data := path.read_bytes()):
        return []
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
        fsync(path)
    rows = [row for _, row in read_json_lines(path)] if whole else []
    for row, wanted in zip(rows, expected, strict=False):
        if row.get("made_from") != wanted:
            which = "answers to other prompts, or of another model, device or seed"
            raise UserError(f"{path} holds {which}: give another --out")
    return [row["segments"] for row in rows[: len(expected)]]


def saved(answer: Sequence[str | bytes], stem: str, folder: Path) -> Segments:
    """Write the images of an answer, and return its segments."""
    segments: Segments = []
    for number, part in enumerate(answer, 1):
        if isinstance(part, bytes):
            write_file(folder / f"{stem}-{number}.png", part)
        segments.append({"image": f"{stem}-{number}.png"} if isinstance(part, bytes) else {"text": part})
    return segments


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def request_of(run: Run, prompt: Prompt, seed: int) -> Request:
    """The prompt as a user's turn. A study asks aligned models, and their files need not say that they are."""
    side = run.cfg.vqgan.resolution
    segments = [
        Text(s["text"]) if "text" in s else RawImage(load_square(s["image"], side, "pad")) for s in prompt.segments
    ]
    tokens = prompt_tokens(segments, run, "chat")
    try:
        return make_request(
            tokens, run.vocab, run.image_tokenizer.n_codes_per_image, run.cfg.model.max_seq_len, run.cfg.sample,
            MODALITY["chat"], (item_seed(seed, prompt.id),), stop_tokens("chat", run.vocab),
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"the prompt {prompt.id} cannot be asked: {error}") from None


def generated(run: Run, prompts: Sequence[Prompt], seed: int) -> Iterator[list[str | bytes]]:
    """Yield the answer to each prompt: texts, and images as PNG. No answer depends on the other prompts."""
    requests = [request_of(run, prompt, seed) for prompt in prompts]
    new = dict(run_each(run, requests))
    for number, request in enumerate(requests):
        yield read_answer(run, request, new[number])


def read_answer(run: Run, request: Request, tokens: Sequence[int]) -> list[str | bytes]:
    parts: list[str | bytes] = []
    for event in Detokenizer(request.prompt, run.tokenizer).add(tokens, True):
        if isinstance(event, Image):
            image = run.image_tokenizer.decode(torch.tensor([event.codes]))[0]  # uint8 (R, R, 3)
            parts.append(png(enlarge(image, math.ceil(SIDE / len(image)))))
        elif isinstance(event, Text) and parts and isinstance(parts[-1], str):
            parts[-1] += event.text
        elif isinstance(event, Text):
            parts.append(event.text)
    return parts
