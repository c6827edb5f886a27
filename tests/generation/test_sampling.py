"""Filters, the draw and guidance on any logits; the grammar against rules written out again, token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.config import SamplingParams
from nanochameleon.generation.sampling import (
    Grammar,
    SamplingTensors,
    apply_filters,
    classifier_free_guidance,
    min_p,
    repetition_penalty,
    sample,
    temperature,
    top_k_top_p,
)
from nanochameleon.vocab import Vocab

# few different values, so that ties are common; -inf is a forbidden token
some_logits = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0, -torch.inf]), min_size=1, max_size=9).map(
    lambda row: torch.tensor([[*row, 0.25]])
)
fractions = st.floats(0.01, 1.0)
WITHOUT = (torch.tensor([torch.inf]), torch.tensor([1.0], dtype=torch.float64))  # top_k, top_p


def top_k(logits: torch.Tensor, k: float) -> torch.Tensor:
    return top_k_top_p(logits, torch.tensor([float(k)]), WITHOUT[1])


def top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    return top_k_top_p(logits, WITHOUT[0], torch.tensor([p], dtype=torch.float64))


def heated(logits: torch.Tensor, t: float) -> torch.Tensor:
    return temperature(logits, torch.tensor([t], dtype=torch.float64))


def tensors(*some: SamplingParams) -> SamplingTensors:
    return SamplingTensors.of(some, torch.device("cpu"))


def kept(logits: torch.Tensor) -> torch.Tensor:
    return (logits > -torch.inf)[0]


def is_upper_set(logits: torch.Tensor, keep: torch.Tensor) -> bool:
    return bool(keep.all()) or logits[0][keep].min() >= logits[0][~keep].max()


# ---------------------------------------------------------------------------------------------------------------------
# Filters (invariant 19)


@given(some_logits, st.integers(1, 12))
def test_top_k_keeps_exactly_k_under_any_ties(logits, k):
    keep = kept(top_k(logits.nan_to_num(neginf=-9.0), k))
    assert keep.sum() == min(k, logits.shape[1])
    assert is_upper_set(logits, keep) and keep[logits.argmax()]


@given(some_logits, fractions)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    probs = logits.double().softmax(-1)[0]
    keep = kept(top_p(logits, p)) & kept(logits)
    assert is_upper_set(logits, keep) and keep[logits.argmax()]
    assert probs[keep].sum() >= p - 1e-12
    assert keep.sum() == 1 or probs[keep].sum() - probs[keep].min() < p + 1e-12


@given(some_logits, st.integers(1, 12), fractions)
def test_top_p_counts_among_the_tokens_that_top_k_keeps(logits, k, p):
    both = top_k_top_p(logits, torch.tensor([float(k)]), torch.tensor([p], dtype=torch.float64))
    assert torch.equal(both, top_p(top_k(logits, k), p))


@given(some_logits, st.floats(1e-6, 100.0))
def test_temperature_divides_differences_and_0_is_greedy(logits, t):
    cooled = heated(logits, t)
    assert torch.equal(kept(cooled), kept(logits)) and cooled.max() == 0
    torch.testing.assert_close(cooled, (logits - logits.max()) / t)
    greedy = heated(logits, 0.0).softmax(-1)[0]
    assert torch.equal(greedy > 0, logits[0] == logits.max())


def test_a_temperature_near_0_is_greedy_and_finite():
    probs = heated(torch.tensor([[3e4, -1.0, 2.9e4]]), 1e-38).softmax(-1)
    assert probs.tolist() == [[1.0, 0.0, 0.0]]


@given(some_logits, st.floats(0.0, 1.0))
def test_min_p_keeps_tokens_above_that_fraction_of_the_largest_probability(logits, threshold):
    probs = logits.double().softmax(-1)[0]
    keep = kept(min_p(logits.double(), torch.tensor([threshold], dtype=torch.float64)))
    assert keep[logits.argmax()] and not (keep & ~kept(logits)).any()
    clear = (probs / probs.max() - threshold).abs() > 1e-9
    assert torch.equal((keep & kept(logits))[clear], ((probs >= threshold * probs.max()) & kept(logits))[clear])


@given(some_logits, st.floats(1.0, 3.0), st.integers(0, 2**9))
def test_the_repetition_penalty_lowers_seen_tokens_and_nothing_else(logits, penalty, bits):
    seen = torch.tensor([[bool(bits >> i & 1) for i in range(logits.shape[1])]])
    lowered = repetition_penalty(logits, seen, torch.tensor([penalty]))
    assert torch.equal(lowered[~seen], logits[~seen]) and (lowered <= logits).all()
    for before, after in zip(logits[seen].tolist(), lowered[seen].tolist(), strict=True):
        assert after == pytest.approx(before / penalty if before > 0 else before * penalty)
    assert torch.equal(repetition_penalty(logits, seen, torch.tensor([1.0])), logits)


@given(some_logits, st.floats(0.0, 3.0), st.none() | st.integers(1, 12), fractions, st.booleans())
def test_no_filter_brings_back_a_forbidden_token(logits, t, k, p, in_image):
    cfg = SamplingParams(t, p, k, 0.1, 1.0, t, p, k, 0.1)
    left = kept(apply_filters(logits, tensors(cfg), torch.tensor([in_image])))
    assert left.any() and not (left & ~kept(logits)).any()


def test_filters_apply_in_the_order_of_the_released_code():
    """Temperature first: at 0.5 the first token alone reaches 0.75, at 1 it does not."""
    logits = torch.tensor([[1.0, 0.0, -torch.inf]])
    for t, left in ((0.5, [True, False, False]), (1.0, [True, True, False])):
        assert kept(apply_filters(logits, tensors(SamplingParams(t, 0.75)), torch.tensor([False]))).tolist() == left


def test_each_row_has_its_own_parameters_and_images_have_others_than_text():
    rows = [
        SamplingParams(1.0, 1.0, k, image_temperature=1.0, image_top_p=1.0, image_top_k=i) for k, i in ((1, 3), (2, 4))
    ]
    logits, twice = torch.arange(6.0).expand(4, 6), tensors(*rows, *rows)
    left = apply_filters(logits, twice, torch.tensor([False, False, True, True])).isfinite().sum(1)
    assert left.tolist() == [1, 2, 3, 4]
    without = apply_filters(logits, tensors(*[SamplingParams(1.0, 1.0)] * 4), torch.tensor([False] * 4), sorts=False)
    assert without.isfinite().all()


def test_defaults_are_those_of_the_released_code():
    cfg = SamplingParams()
    assert (cfg.temperature, cfg.top_p, cfg.repetition_penalty) == (0.7, 0.9, 1.2)
    assert (cfg.image_temperature, cfg.image_top_p, cfg.guidance_scale, cfg.image_guidance_scale) == (
        0.7,
        0.9,
        3.0,
        1.2,
    )
    assert cfg.max_new_tokens == 4_096 and cfg.top_k is cfg.image_top_k is None and cfg.min_p == cfg.image_min_p == 0


# ---------------------------------------------------------------------------------------------------------------------
# The draw


@given(some_logits)
def test_sample_gives_each_token_its_fraction_of_the_uniform_numbers(logits):
    n = 1_000
    tokens = sample(logits.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    counts = torch.bincount(tokens, minlength=logits.shape[1])
    assert ((counts - n * logits.double().softmax(-1)[0]).abs() <= 1).all()
    assert (counts[~kept(logits)] == 0).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_sample_at_the_edges_gives_allowed_tokens(u):
    logits = torch.full((1, 70_000), -torch.inf)
    logits[0, 1_000:69_000] = torch.linspace(-5, 5, 68_000)
    token = int(sample(logits, torch.tensor([u], dtype=torch.float64)))
    assert 1_000 <= token < 69_000
    assert (token < 1_010) if u == 0 else (token >= 68_990)


def test_a_row_does_not_depend_on_the_other_rows():
    generator = torch.Generator().manual_seed(0)
    logits, u = torch.randn(20, 30, generator=generator), torch.rand(20, dtype=torch.float64, generator=generator)
    alone = [int(sample(logits[i : i + 1], u[i : i + 1])) for i in range(20)]
    assert sample(logits, u).tolist() == alone and len(set(alone)) > 5


@given(st.integers(0, 99), st.floats(0, 10), st.floats(0, 10))
def test_guidance_is_the_published_formula_with_scales_of_each_row(seed, by_text, by_image):
    generator = torch.Generator().manual_seed(seed)
    cond, image_cond, uncond = (torch.randn(3, 7, generator=generator) for _ in range(3))
    text_scale, image_scale = torch.tensor([by_text, 1.0, 0.0]), torch.tensor([by_image, 1.0, 1.0])
    guided = classifier_free_guidance(cond, image_cond, uncond, text_scale, image_scale)
    expected = uncond[0] + by_image * (image_cond[0] - uncond[0]) + by_text * (cond[0] - image_cond[0])
    torch.testing.assert_close(guided[0], expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(guided[1], cond[1])  # with both scales 1, guidance is off
    torch.testing.assert_close(guided[2], image_cond[2])
    same = classifier_free_guidance(cond, cond, cond, text_scale, image_scale)
    assert torch.equal(same, cond)  # branches that are conditioned on the same change nothing


# ---------------------------------------------------------------------------------------------------------------------
# Grammar (invariant 20)

VOCAB = Vocab.toy(5, 2)
TEXT = set(range(VOCAB.first_text, VOCAB.size))
CODES = set(range(VOCAB.first_code, VOCAB.eoi))


def allowed_tokens(new: list[int], n: int, modality: str, stops: set[int], begun: int | None, room: int) -> set[int]:
    """The rules, written out from a row's new tokens. begun: codes of the image that the prompt leaves open."""
    image = begun  # codes of the open image so far, None outside
    for token in new:
        if (token in stops and image is None) or (token == VOCAB.eoi and modality == "image"):
            return {VOCAB.pad}
        image = 0 if token == VOCAB.boi else None if image is None or token == VOCAB.eoi else image + 1
    free = room - len(new)
    if free == 0:
        return {VOCAB.pad}
    if image is not None:
        return CODES if image < n else {VOCAB.eoi}
    fits = free >= 1 + n + 1
    if modality == "image":
        return {VOCAB.boi} if fits else stops
    return TEXT | stops | ({VOCAB.boi} if fits and modality == "both" else set())


@st.composite
def batches(draw):
    """Tokens per image, and for each row: codes of the open image or None, tokens left, choices, modality, stops."""
    n, rows = draw(st.integers(1, 4)), []
    for begun in draw(st.lists(st.none() | st.integers(0, n), min_size=1, max_size=4)):
        room = draw(st.integers(1 if begun is None else n - begun + 1, 20))
        choices, modality = (
            draw(st.lists(st.integers(0, 10**6), max_size=22)),
            draw(st.sampled_from(["text", "image", "both"])),
        )
        some = [(VOCAB.eos,), (VOCAB.eos, VOCAB.eot)] + [(VOCAB.eos, VOCAB.boi)] * (modality == "text")
        rows.append((begun, room, choices, modality, draw(st.sampled_from(some))))
    return n, rows


@given(batches())
def test_the_grammar_allows_what_the_rules_say_step_by_step(batch):
    """Random walks through the allowed tokens, images favoured, in batches of rows in different states."""
    n, rows = batch
    left = [-1 if begun is None else n - begun for begun, _, _, _, _ in rows]
    modalities, rooms = [modality for *_, modality, _ in rows], [room for _, room, *_ in rows]
    grammar = Grammar.start(VOCAB, n, modalities, left, rooms, [stops for *_, stops in rows])
    news = [[] for _ in rows]
    for step in range(22):
        tokens = []
        for row, (allowed, new) in enumerate(zip(grammar.mask(), news, strict=True)):
            begun, room, choices, modality, stops = rows[row]
            expected = allowed_tokens([t for t in new if t != VOCAB.pad], n, modality, set(stops), begun, room)
            assert set(allowed.nonzero()[:, 0].tolist()) == expected
            choice = choices[step] if step < len(choices) else 0
            ordered = sorted(expected)
            tokens.append(VOCAB.boi if VOCAB.boi in expected and choice % 2 else ordered[choice % len(ordered)])
            new.append(tokens[-1])
        grammar = grammar.advance(torch.tensor(tokens))
    assert grammar.done.all()


@pytest.mark.parametrize("modality", ["text", "image", "both"])
def test_tokens_that_no_document_has_are_never_allowed(modality):
    known = {VOCAB.eos, VOCAB.eot, VOCAB.boi, VOCAB.eoi} | CODES | TEXT
    forbidden = sorted(set(range(VOCAB.size)) - known)
    assert VOCAB.bos in forbidden and VOCAB.unk in forbidden and VOCAB.pad in forbidden
    for left, room in ((-1, 9), (-1, 2), (2, 9), (0, 9)):
        grammar = Grammar.start(VOCAB, 3, [modality], [left], [room], [(VOCAB.eos, VOCAB.eot)])
        assert grammar.mask().any() and not grammar.mask()[:, forbidden].any()


@pytest.mark.parametrize("left, room", [(3, 3), (-1, 0), (4, 9)])
def test_a_start_without_room_is_refused(left, room):
    with pytest.raises(ValueError, match="no room"):
        Grammar.start(VOCAB, 3, ["both"], [left], [room], [None])


def test_unknown_modalities_and_stops_are_refused():
    for modality, stops in (("images", None), ("both", ()), ("both", (VOCAB.pad,)), ("both", (VOCAB.boi,))):
        with pytest.raises(ValueError, match="modality"):
            Grammar.start(VOCAB, 3, [modality], [-1], [9], [stops])
