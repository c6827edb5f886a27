"""Text generation for evaluations: stop strings, prompts that are too long, independence of the batch."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import N_CODES, TOKENIZER, VOCAB, tiny_model

from nanochameleon.config import SamplingParams
from nanochameleon.errors import UserError
from nanochameleon.evaluate import writing
from nanochameleon.evaluate.writing import TextUntil, Written, slots_that_fit, write
from nanochameleon.generation.engine import Engine, generate

MODEL = tiny_model()
CONTEXT = MODEL.cfg.max_seq_len
RUN = SimpleNamespace(
    vocab=VOCAB, tokenizer=TOKENIZER, model=MODEL, image_tokenizer=SimpleNamespace(n_codes_per_image=N_CODES),
    device=MODEL.output.weight.device,
)  # fmt: skip
IMAGE = [VOCAB.boi, *[VOCAB.first_code] * N_CODES, VOCAB.eoi]


def words(n: int, first: int = 0) -> list[int]:
    return [VOCAB.first_text + (first + i) % 100 for i in range(n)]


def prompt(number: int, length: int = 4) -> list[int]:
    return [VOCAB.bos, *words(length - 1, number)]


# ---------------------------------------------------------------------------------------------------------------------
# Stop strings


def cut_byte_by_byte(data: bytes, stops: list[bytes]) -> tuple[bytes, bool]:
    for end in range(1, len(data) + 1):
        met = [stop for stop in stops if data[:end].endswith(stop)]
        if met:
            return data[: end - max(map(len, met))], True
    return data, False


letters = st.sampled_from(["a", "b", "\n", "é", "中"])
short = st.lists(letters, min_size=1, max_size=4).map("".join)


@given(st.lists(letters, max_size=30).map("".join), st.lists(short, max_size=4), st.lists(st.integers(0, 60)))
@example("Answer: 5\n\nQuestion: x", ["\n\n", "Question:"], [3, 10, 11])
@example("xabcd", ["abcde", "bc"], [])
def test_a_text_is_cut_before_the_stop_string_that_ends_first_however_its_bytes_come(text, stops, cuts):
    data, stops = text.encode(), [stop.encode() for stop in stops]
    until, cuts = TextUntil(), sorted({0, *(c for c in cuts if c < len(data)), len(data)})
    for start, end in pairwise(cuts):
        if until.add(data[start:end], stops):
            break
    assert (until.data, until.stopped) == cut_byte_by_byte(data, stops)
    assert not any(stop in until.data for stop in stops)


def test_half_a_character_becomes_a_replacement_character_only_at_the_end():
    until, data = TextUntil(), "中中".encode()
    for byte in data[:-1]:
        until.add(bytes([byte]), [])
    assert until.decode() == "中\ufffd"


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 30), st.integers(0, 25), st.integers(1, 4))
def test_written_text_is_the_beginning_of_what_is_written_without_stop_strings(number, n, at, length):
    seeds = [number]
    [whole] = write(RUN, [prompt(number)], n, temperature=1.0, seeds=seeds)
    stop = whole.text[at : at + length]
    [cut] = write(RUN, [prompt(number)], n, [stop, ""], temperature=1.0, seeds=seeds)
    if stop:
        met = "\ufffd" not in stop  # stop strings are looked for in the bytes
        assert cut.text == (whole.text.partition(stop)[0] if met else whole.text)
        assert cut.stopped is (met or whole.stopped)
    else:  # an empty stop string is none
        assert cut == whole


def test_a_request_that_met_a_stop_string_takes_no_further_steps(monkeypatch):
    steps, run = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: steps.append(len(self.running)) or run(self))
    prompts = [prompt(i) for i in range(3)]
    whole = write(RUN, prompts, 40, batch_size=1)
    before = len(steps)
    stops = [next(letter for letter in text.text[3:] if letter != "\ufffd") for text in whole]
    stopped = write(RUN, prompts, 40, stops, batch_size=1)
    assert all(text.stopped for text in stopped) and len(steps) - before < before / 1.5


def test_a_stop_token_stops_too_and_a_limit_does_not():
    texts = write(RUN, [prompt(i) for i in range(60)], 30, temperature=1.5, seeds=range(60), stop_tokens=(VOCAB.eos,))
    params = SamplingParams(1.5, 1.0, repetition_penalty=1.0, max_new_tokens=30)
    for i, text in enumerate(texts):
        engine = Engine(MODEL, VOCAB, N_CODES, 1)
        engine.add(prompt(i), params, "text", (i,))
        tokens = [token for output in engine.run() for token in output.tokens]
        ended = tokens[-1] == VOCAB.eos
        assert text == Written(TOKENIZER.decode(tokens[:-1] if ended else tokens), False, ended)
    assert {text.stopped for text in texts} == {True, False}


# ---------------------------------------------------------------------------------------------------------------------
# The batch


@settings(max_examples=10)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(1, 9), st.integers(1, 25), st.randoms())
def test_a_text_does_not_depend_on_the_other_prompts_or_on_the_batch(numbers, batch_size, n, random):
    """Also where stop strings end some of them early."""
    stops, params = ["a", "re", "\n"], dict(temperature=0.9, top_p=0.95)
    alone = [write(RUN, [prompt(i, 3 + i)], n, stops, seeds=[i], **params)[0] for i in numbers]
    order = list(range(len(numbers)))
    random.shuffle(order)
    prompts, seeds = [prompt(numbers[k], 3 + numbers[k]) for k in order], [numbers[k] for k in order]
    together = write(RUN, prompts, n, stops, seeds=seeds, batch_size=batch_size, **params)
    assert together == [alone[k] for k in order]


def test_greedy_text_equals_generate():
    prompts = [prompt(i) for i in range(10)]
    params = SamplingParams(0.0, repetition_penalty=1.0, max_new_tokens=20)
    rows = generate(MODEL, prompts, VOCAB, N_CODES, params, "text")
    assert [TOKENIZER.decode(t for t in row if VOCAB.is_text(t)) for row in rows] == [
        text.text for text in write(RUN, prompts, 20)
    ]


def test_samples_need_seeds_and_differ_by_them():
    with pytest.raises(ValueError, match="needs a seed for each prompt"):
        write(RUN, [prompt(0)], 5, temperature=0.6)
    texts = write(RUN, [prompt(0)] * 4, 20, temperature=1.0, seeds=[1, 2, 3, 1])
    assert len({text.text for text in texts}) == 3 and texts[0] == texts[3]


def test_no_prompts_give_no_texts():
    assert write(RUN, [], 5) == []


# ---------------------------------------------------------------------------------------------------------------------
# Prompts that are too long


def test_a_truncated_prompt_is_written_after_as_its_right_end_and_says_so():
    long, n = prompt(0, CONTEXT + 10), 10
    short = [VOCAB.bos, *long[-(CONTEXT - n - 1) :]]
    [cut], [same] = write(RUN, [long], n), write(RUN, [short], n)
    assert cut.truncated and not same.truncated and cut.text == same.text


@pytest.mark.parametrize("over, cut", [(0, False), (1, True)])
def test_a_prompt_that_just_fits_is_whole(over, cut):
    assert write(RUN, [prompt(0, CONTEXT - 10 + over)], 10)[0].truncated is cut


def test_an_image_that_does_not_fit_and_too_many_new_tokens_are_named():
    long = [VOCAB.bos, *IMAGE * 20]
    with pytest.raises(UserError, match=r"has 121 tokens, and the context has room for 34: an image"):
        write(RUN, [prompt(0), long], 30)
    with pytest.raises(UserError, match=r"has 4 tokens, and the context has room for 0: nothing of it"):
        write(RUN, [prompt(0)], CONTEXT)
    assert len(write(RUN, [[VOCAB.bos]], CONTEXT - 1)) == 1


def test_slots_are_those_that_half_of_the_free_memory_holds(monkeypatch):
    assert writing.free_memory(torch.device("cpu")) > 2**20
    cache = MODEL.empty_cache(1, 40, torch.float32)
    for n in (0, 1, 3, 5.9):
        monkeypatch.setattr(
            writing, "free_memory", lambda device, n=n: int(2 * n * (cache.keys.nbytes + cache.values.nbytes))
        )
        assert slots_that_fit(RUN, 40) == max(1, int(n))
