"""Prompts that begin alike, such as questions after the same shots: the beginning is read once."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import N_CODES, VOCAB, random_request, tiny_model

from nanochameleon.config import SamplingParams
from nanochameleon.generation.decode_torch import FusedDecoder
from nanochameleon.generation.decoder import Decoder
from nanochameleon.generation.engine import Engine

MODEL, SINGLE = tiny_model().double(), tiny_model()
PARAMS = SamplingParams(temperature=1.0, top_p=0.95, repetition_penalty=1.1, max_new_tokens=12)
SHOTS = [VOCAB.bos, *[VOCAB.first_text + i for i in range(29)]]


def reads(engine: Engine, monkeypatch) -> list[tuple[int, int]]:
    """The (start, length) of every chunk that the model reads."""
    chunks_read, prefill = [], engine.decoder.prefill
    monkeypatch.setattr(engine.decoder, "prefill", lambda chunks: chunks_read.extend(chunks) or prefill(chunks))
    return chunks_read


def run(engine: Engine) -> dict[int, list[int]]:
    new: dict[int, list[int]] = {}
    for output in engine.run():
        new.setdefault(output.request_id, []).extend(output.tokens)
    return new


@pytest.mark.parametrize("decoder", [None, Decoder, FusedDecoder], ids=["fastest", "reference", "fused"])
@settings(max_examples=6)
@given(st.integers(2, 7), st.integers(3, 9), st.integers(1, 12), st.integers(0, 999))
def test_tokens_are_those_of_each_request_alone(decoder, n_requests, n_slots, chunk, seed):
    """Prompts are the beginnings of one prompt, with other ends: so some are read while others are copied from them."""
    rng, model = random.Random(seed), SINGLE if decoder is None else MODEL
    (whole, *_), requests = random_request(rng), [random_request(rng) for _ in range(n_requests)]
    whole = (whole * 3)[:30]
    prompts = [whole[: rng.randrange(1, 30)] + prompt[1 : rng.randrange(1, 12)] for prompt, *_ in requests]
    prompts = [prompt if VOCAB.boi not in prompt else whole for prompt in prompts]
    added = [(prompt, replace(r[1], max_new_tokens=24), *r[2:]) for prompt, r in zip(prompts, requests, strict=True)]

    def tokens(numbers, n_slots):
        engine = Engine(model, VOCAB, N_CODES, n_slots, prefill_chunk=chunk)
        if decoder is not None:
            with torch.inference_mode():
                engine.decoder = decoder(model, VOCAB, N_CODES, n_slots, engine.context)
        ids = [engine.add(*added[i][:3], (seed, i), added[i][3]) for i in numbers]
        new = run(engine)
        return [new[request_id] for request_id in ids]

    assert tokens(range(n_requests), n_slots) == [tokens([i], 3)[0] for i in range(n_requests)]


@pytest.mark.parametrize("n_slots", [8, 2])
def test_the_same_shots_are_read_once_for_all_questions(n_slots, monkeypatch):
    """The shots have three chunks of 8 and 6 tokens of the fourth, which each question reads for itself."""
    engine = Engine(SINGLE, VOCAB, N_CODES, n_slots, prefill_chunk=8)
    chunks = reads(engine, monkeypatch)
    for i in range(6):
        params = replace(PARAMS, max_new_tokens=20 if i else 8)  # one of them is always there to copy from
        engine.add([*SHOTS, VOCAB.first_text + 100 + i], params, "text", (i,))
    assert len(run(engine)) == 6
    assert [start for _, _, start in chunks] == [0, 8, 16, 24, *[24] * 5]


def test_a_prompt_that_was_read_before_is_copied_but_for_its_last_chunk(monkeypatch):
    """The hidden state at its last token is needed, and the request that had it has newer tokens by now."""
    engine = Engine(SINGLE, VOCAB, N_CODES, 2, prefill_chunk=10)
    chunks = reads(engine, monkeypatch)
    engine.add(SHOTS, PARAMS, "text", (1,))
    for _ in range(3):
        engine.step()
    engine.add(SHOTS, PARAMS, "text", (1,))
    first, second = run(engine).values()
    assert [start for _, _, start in chunks] == [0, 10, 20, 20]
    assert second[-len(first) :] == first or first[-len(second) :] == second


def test_what_an_unconditional_branch_has_written_over_is_not_copied():
    """Its prompt is <s> and the open image. When the request has begun its next image, that one is there."""
    model = tiny_model()
    with torch.no_grad():
        model.output.weight[VOCAB.boi] *= 6  # so that images are begun often
    image = [VOCAB.boi, VOCAB.first_code + 7, VOCAB.first_code + 1]
    before = [VOCAB.boi, *[VOCAB.first_code + 5] * N_CODES, VOCAB.eoi]
    wild = dict(image_temperature=100.0, image_top_p=1.0)  # so that its images differ
    guided = replace(PARAMS, guidance_scale=3.0, image_guidance_scale=1.2, max_new_tokens=40, **wild)
    plain = replace(PARAMS, guidance_scale=1.0, image_guidance_scale=1.0)
    engine = Engine(model, VOCAB, N_CODES, 4, prefill_chunk=3)
    first, new = engine.add([VOCAB.bos, *SHOTS[1:4], *before, *image], guided, "both"), []
    while VOCAB.boi not in new[:-3]:
        new += [token for output in engine.step() for token in output.tokens]
    late, alone = engine.add([VOCAB.bos, *image], plain, "both"), Engine(model, VOCAB, N_CODES, 1, prefill_chunk=3)
    alone.add([VOCAB.bos, *image], plain, "both")
    assert new[new.index(VOCAB.boi) + 1] != image[1] and any(running.request_id == first for running in engine.running)
    assert run(engine)[late] == run(alone)[0]
