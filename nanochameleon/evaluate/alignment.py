"""Measure how often an aligned model answers correctly, by category, on prompts it was not trained on.

An answer is correct if its segments are the expected ones, in order: text exactly, images by the oracle.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from nanochameleon.data.sources.alignment import AlignmentSource, Exchange, drawn
from nanochameleon.data.sources.scenes import Scene, World
from nanochameleon.documents import Document, EndOfTurn, Image, Text, parse
from nanochameleon.evaluate.oracle import judge
from nanochameleon.evaluate.shapes import SCENE_SEED
from nanochameleon.generation.engine import generate
from nanochameleon.generation.prompts import prompt_tokens
from nanochameleon.training.run import Run


@dataclass(frozen=True)
class Answered:
    exchange: Exchange
    said: Document  # without the end of turn
    correct: bool


def is_correct(exchange: Exchange, said: Document, run: Run, world: World) -> bool:
    if len(said) != len(exchange.answer):
        return False
    return all(matches(wanted, found, run, world) for wanted, found in zip(exchange.answer, said, strict=True))


def matches(wanted: Text | Scene, found: Text | Image, run: Run, world: World) -> bool:
    if isinstance(wanted, Text) or not isinstance(found, Image):
        return wanted == found
    return judge(wanted, run.image_tokenizer.decode(torch.tensor([found.codes]))[0], world)["all_facts"]


def answered(run: Run, world: World, category: str, n: int) -> list[Answered]:
    """Answer n prompts of the test split: text greedily, images with the run's sampling parameters."""
    source = AlignmentSource(world, category, SCENE_SEED, test=True)
    asked = [source.exchanges(i)[0] for i in range(n)]
    prompts = [prompt_tokens(drawn(each.prompt, world), run, "answer") for each in asked]
    options = replace(run.cfg.sample, temperature=0.0, max_new_tokens=run.cfg.model.max_seq_len)
    stops, n_codes = (run.vocab.eos, run.vocab.eot), run.image_tokenizer.n_codes_per_image
    rows = generate(run.model, prompts, run.vocab, n_codes, options, "both", run.cfg.seed, stops, progress=category)
    said = [[s for s in parse(row, run.tokenizer, run.vocab) if not isinstance(s, EndOfTurn)] for row in rows]
    return [Answered(each, doc, is_correct(each, doc, run, world)) for each, doc in zip(asked, said, strict=True)]


def accuracy(answers: list[Answered]) -> float:
    return float(np.mean([each.correct for each in answers]))
