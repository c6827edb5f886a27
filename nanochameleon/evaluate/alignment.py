"""How often an aligned model answers rightly, by category, on prompts that it has not seen: words exactly, images by
the oracle, both in the right order and nothing else."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from nanochameleon.data.sources.alignment import AlignmentSource, Exchange, drawn
from nanochameleon.data.sources.shapes import Scene, World
from nanochameleon.documents import Document, EndOfTurn, Image, Text, parse
from nanochameleon.evaluate.oracle import judge
from nanochameleon.evaluate.shapes import SCENE_SEED
from nanochameleon.generation.engine import generate
from nanochameleon.generation.prompts import prompt_tokens
from nanochameleon.training.run import Run


@dataclass(frozen=True)
class Answered:
    exchange: Exchange
    said: Document  # without the end of the turn
    right: bool


def is_right(exchange: Exchange, said: Document, run: Run, world: World) -> bool:
    if len(said) != len(exchange.answer):
        return False
    return all(matches(wanted, found, run, world) for wanted, found in zip(exchange.answer, said, strict=True))


def matches(wanted: Text | Scene, found: Text | Image, run: Run, world: World) -> bool:
    if isinstance(wanted, Text) or not isinstance(found, Image):
        return wanted == found
    return judge(wanted, run.image_tokenizer.decode(torch.tensor([found.codes]))[0], world)["all_facts"]


def answered(run: Run, world: World, category: str, n: int) -> list[Answered]:
    """n prompts of the test split and what the model says to them: words greedily, images as it is set to draw."""
    source = AlignmentSource(world, category, SCENE_SEED, test=True)
    asked = [source.exchanges(i)[0] for i in range(n)]
    prompts = [prompt_tokens(drawn(each.prompt, world), run, "answer") for each in asked]
    options = replace(run.cfg.sample, temperature=0.0, max_new_tokens=run.cfg.model.max_seq_len)
    stops, n_codes = (run.vocab.eos, run.vocab.eot), run.image_tokenizer.n_codes_per_image
    rows = generate(run.model, prompts, run.vocab, n_codes, options, "both", run.cfg.seed, stops, progress=category)
    said = [[s for s in parse(row, run.tokenizer, run.vocab) if not isinstance(s, EndOfTurn)] for row in rows]
    return [Answered(each, doc, is_right(each, doc, run, world)) for each, doc in zip(asked, said, strict=True)]


def share_right(answers: list[Answered]) -> float:
    return float(np.mean([each.right for each in answers]))
