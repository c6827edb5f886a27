"""Cancelled requests: their slots are free again, and the other requests' tokens stay the same, bit for bit."""

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
GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=20)
PROMPT = [VOCAB.bos, *[VOCAB.first_text + i for i in range(20)]]


def tokens_of(engine: Engine, cancel=lambda engine: None) -> dict[int, list[int]]:
    new: dict[int, list[int]] = {}
    while engine.waiting or engine.running:
        for output in engine.step():
            new.setdefault(output.request_id, []).extend(output.tokens)
        cancel(engine)
    return new


def assert_empty(engine: Engine) -> None:
    assert not (engine.n_live or engine.running or engine.waiting or engine.prefilling or engine.n_prefilled)


@pytest.mark.parametrize("decoder", [None, Decoder, FusedDecoder], ids=["fastest", "reference", "fused"])
@settings(max_examples=8)
@given(st.integers(2, 8), st.integers(3, 9), st.integers(1, 40), st.integers(0, 999))
def test_the_others_tokens_do_not_change(decoder, n_requests, n_slots, chunk, seed):
    """Requests of every kind, of which some share a prompt; cancelled ones wait, are being read, or run."""
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(n_requests)]
    requests = [(rng.choice(requests)[0], *request[1:]) for request in requests]  # equal prompts
    requests = [(p, replace(params, max_new_tokens=30), *rest) for p, params, *rest in requests]
    model = SINGLE if decoder is None else MODEL

    def run(cancelled):
        engine = Engine(model, VOCAB, N_CODES, n_slots, prefill_chunk=chunk, max_steps_between_syncs=seed % 5 or None)
        if decoder is not None:
            with torch.inference_mode():
                engine.decoder = decoder(model, VOCAB, N_CODES, n_slots, engine.context)
        for number, (prompt, params, modality, stops) in enumerate(requests):
            engine.add(prompt, params, modality, (seed, number), stops)

        def cancel(engine):
            for request_id in [i for i, step in cancelled.items() if step <= 0]:
                engine.cancel(request_id)
                del cancelled[request_id]
            for request_id in cancelled:
                cancelled[request_id] -= 1

        cancel(engine)
        new = tokens_of(engine, cancel)
        assert_empty(engine)
        return new

    alone = run({})
    chosen = rng.sample(range(n_requests), rng.randrange(1, n_requests))
    steps = {number: rng.randrange(12) for number in chosen}
    new = run(dict(steps))
    for number in range(n_requests):
        if number in steps:  # what came out before is a beginning of the same tokens
            assert alone[number][: len(new.get(number, []))] == new.get(number, [])
        else:
            assert new[number] == alone[number]


def test_a_waiting_a_prefilling_and_a_running_request_say_nothing_more():
    engine = Engine(MODEL, VOCAB, N_CODES, 2, prefill_chunk=8)
    running = engine.add([VOCAB.bos], GREEDY, "text")
    engine.step()
    prefilling, waiting = engine.add(PROMPT, GREEDY, "text"), engine.add(PROMPT, GREEDY, "text")
    engine.step()
    assert list(engine.n_prefilled.values()) == [8] and len(engine.waiting) == 1
    for request_id in (running, prefilling, waiting):
        engine.cancel(request_id)
    assert_empty(engine)
    assert engine.step() == []


@pytest.mark.parametrize("cancelled", [0, 1])
def test_a_half_read_prompt_stays_with_the_request_that_needs_it_still(cancelled, monkeypatch):
    engine = Engine(MODEL, VOCAB, N_CODES, 2, prefill_chunk=8)
    read, prefill = [], engine.decoder.prefill
    monkeypatch.setattr(engine.decoder, "prefill", lambda chunks: read.extend(chunks) or prefill(chunks))
    ids = [engine.add(PROMPT, GREEDY, "text"), engine.add(PROMPT, GREEDY, "text")]
    engine.step()
    engine.cancel(ids[cancelled])
    tokens = tokens_of(engine)[ids[1 - cancelled]]
    assert [start for _, _, start in read] == [0, 8, 16]  # nothing is read twice
    plain = Engine(MODEL, VOCAB, N_CODES, 1, prefill_chunk=8)
    plain.add(PROMPT, GREEDY, "text")
    assert tokens_of(plain) == {0: tokens}


def test_a_freed_slot_is_taken_by_a_waiting_request():
    engine = Engine(MODEL, VOCAB, N_CODES, 1)
    ids = [engine.add([VOCAB.bos], GREEDY, "text") for _ in range(2)]
    engine.step()
    engine.cancel(ids[0])
    assert len(tokens_of(engine)[ids[1]]) == 20


def test_cancelling_a_finished_or_unknown_request_does_nothing():
    engine = Engine(MODEL, VOCAB, N_CODES, 2)
    done = engine.add([VOCAB.bos], replace(GREEDY, max_new_tokens=1), "text")
    other = engine.add(PROMPT, GREEDY, "text")
    engine.step()
    engine.cancel(done)
    engine.cancel(99)
    engine.cancel(done)
    assert len(tokens_of(engine)[other]) + 1 == 20
    assert_empty(engine)
