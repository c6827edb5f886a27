"""Part `generation`: the same tokens with CUDA graphs and without, alone and in company; milliseconds per step.

A request's text includes the prefill of its prompt. The step alone has a cache that is full.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from nanochameleon.bench.engine import (
    GREEDY,
    TOY,
    TOY_VOCAB,
    Bench,
    first_token,
    image_case,
    only_text,
    our_tokens,
    random_model,
    text_case,
)
from nanochameleon.bench.gpu.context import Context
from nanochameleon.bench.limits import Limits, measure_limits
from nanochameleon.bench.measure import median_seconds
from nanochameleon.bench.rows import Row
from nanochameleon.config import SamplingParams
from nanochameleon.errors import say
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.fastest import fastest_decoder
from nanochameleon.transformer import Chameleon

GUIDED = SamplingParams(temperature=0.0, image_temperature=0.0, repetition_penalty=1.0)  # an image takes three slots
IMAGE_LEN, CONTEXT = 16, 96
STEPS, KV_LEN = 8, 2_048  # of a decode step that is timed by itself


def same_with_graphs(context: Context, name: str, model: Chameleon) -> Iterator[Row]:
    """Compare four texts with graphs and without: with 4 slots both run the same shapes. Raises AssertionError."""
    vocab, found = context.plan.vocab, []
    prompts = torch.randint(vocab.first_text, vocab.size, (4, 16), generator=torch.Generator().manual_seed(0))
    prompts[:, 0] = vocab.bos
    for graphs in (False, True):
        engine = Engine(model, vocab, 64, 4, 16 + context.plan.text_tokens)
        engine.decoder.graphs.enabled = graphs and model.output.weight.is_cuda
        found.append(our_tokens(engine, prompts, context.plan.text_tokens))
        captured = sum(graph is not None for graph in engine.decoder.graphs.graphs.values())
        say(f"CUDA graphs {'on' if engine.decoder.graphs.enabled else 'off'}: {captured} captured")
        assert captured or not graphs or context.plan.dry, "no CUDA graph was captured"
    same = sum(a == b for a, b in zip(*found, strict=True))
    yield context.row(f"{name}, texts with the same tokens with CUDA graphs", "nano", same, "of 4")
    assert same == 4, "CUDA graphs change what is generated"


def requests() -> list[tuple[list[int], SamplingParams, str]]:
    """Guided images and texts in turn, with prompts of all lengths and ends at different steps."""
    found = []
    for i in range(16):
        prompt = [TOY_VOCAB.bos, *range(TOY_VOCAB.first_text + i, TOY_VOCAB.first_text + 3 + 4 * i)]
        modality = "text" if i % 3 == 0 else "image"
        found.append(
            (prompt, replace(GREEDY if i % 3 == 0 else GUIDED, max_new_tokens=IMAGE_LEN + 2 + i % 5), modality)
        )
    return found


def tokens_of(model: Chameleon, batch: list[tuple], n_slots: int) -> list[list[int]]:
    """Return the new tokens of each request. Prompts are read in chunks, so some wait while others decode."""
    engine, new = Engine(model, TOY_VOCAB, IMAGE_LEN, n_slots, CONTEXT, prefill_chunk=7), [[] for _ in batch]
    for prompt, params, modality in batch:
        engine.add(prompt, params, modality)
    for output in engine.run():
        new[output.request_id] += output.tokens
    return new


def same_in_company(context: Context) -> Iterator[Row]:
    """Compare requests in one batch with each of them alone, in float64, where rounding decides no token.

    Raises AssertionError.
    """
    model, batch = random_model(TOY, context.device, torch.float64), requests()
    together, alone = tokens_of(model, batch, 8), [tokens_of(model, [each], 3)[0] for each in batch]
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    yield context.row("requests with the same tokens in company", "nano", same, f"of {len(batch)}")
    assert same == len(batch), "what is generated depends on the other requests"


@torch.inference_mode()
def step_alone(context: Context, name: str, model: Chameleon, batch: int) -> Row:
    """Time the greedy decode step of slots whose cache is full, which the engine would run. No prompt is read."""
    kv_len = min(KV_LEN, model.cfg.max_seq_len)
    decoder = fastest_decoder(model, context.plan.vocab, STEPS, batch, kv_len)
    decoder.length.fill_(kv_len - 1)
    arguments = batch, kv_len, "text", False, (False, False, False)

    def steps() -> None:
        decoder.step_idx.zero_()
        for _ in range(STEPS):
            decoder.graphs.run(arguments, lambda: decoder.step(*arguments))

    seconds = median_seconds({"": steps}, 3 if context.plan.dry else 9, context.device)[""]
    return context.row(f"{name} step of batch {batch}", "nano", 1e3 * seconds / STEPS, "ms")


def speeds(context: Context, name: str, model: Chameleon, limits: Limits) -> Iterator[Row]:
    plan = context.plan
    b = Bench(name, model, plan.vocab, "ms a step", 3, 2.0, plan.text_tokens, False, plan.image_codes, limits)
    yield first_token(b)
    only_text(b)
    with context.guard(f"{name}, graphs"):
        yield from same_with_graphs(context, name, model)
    for batch in (1, 16):
        with context.guard(f"{name}, step of batch {batch}"):
            yield step_alone(context, name, model, batch)
    for batch in (1, 16):
        yield from text_case(b, batch)
    if name == plan.models[-1][0]:
        yield from image_case(replace(b, rounds=1))


def run(context: Context) -> Iterator[Row]:
    with context.guard("requests in company"):
        yield from same_in_company(context)
    limits = measure_limits(context.device)
    yield from limits.rows("gpu", context.device)
    for name, cfg in context.plan.models:
        with context.guard(name):
            yield from speeds(context, name, random_model(cfg, context.device, torch.bfloat16), limits)
