"""Filters, the draw and guidance on any logits; the grammar against rules written out a second time, id by id."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.config import SamplingParams
from nanochameleon.generation.sampling import (
    Grammar,
    Options,
    filtered,
    guide,
    min_p,
    pick,
    repetition,
    temperature,
    top,
)
from nanochameleon.vocab import Vocab

# few different values, so that ties are common; -inf is an id that is forbidden
some_logits = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0, -torch.inf]), min_size=1, max_size=9).map(
    lambda row: torch.tensor([[*row, 0.25]])
)
shares = st.floats(0.01, 1.0)
WITHOUT = (torch.tensor([torch.inf]), torch.tensor([1.0], dtype=torch.float64))  # top_k, top_p


def top_k(logits: torch.Tensor, k: float) -> torch.Tensor:
    return top(logits, torch.tensor([float(k)]), WITHOUT[1])


def top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    return top(logits, WITHOUT[0], torch.tensor([p], dtype=torch.float64))


def heated(logits: torch.Tensor, t: float) -> torch.Tensor:
    return temperature(logits, torch.tensor([t], dtype=torch.float64))


def options(*some: SamplingParams) -> Options:
    return Options.of(some, torch.device("cpu"))


def kept(logits: torch.Tensor) -> torch.Tensor:
    return (logits > -torch.inf)[0]


def is_upper_set(logits: torch.Tensor, keep: torch.Tensor) -> bool:
    return bool(keep.all()) or logits[0][keep].min() >= logits[0][~keep].max()


# ---------------------------------------------------------------------------------------------------------------------
# Filters (invariant 19)


@given(some_logits, st.integers(1, 12))
def test_top_k_keeps_exactly_k_whatever_the_ties(logits, k):
    keep = kept(top_k(logits.nan_to_num(neginf=-9.0), k))
    assert keep.sum() == min(k, logits.shape[1])
    assert is_upper_set(logits, keep) and keep[logits.argmax()]


@given(some_logits, shares)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    probs = logits.double().softmax(-1)[0]
    keep = kept(top_p(logits, p)) & kept(logits)
    assert is_upper_set(logits, keep) and keep[logits.argmax()]
    assert probs[keep].sum() >= p - 1e-12
    assert keep.sum() == 1 or probs[keep].sum() - probs[keep].min() < p + 1e-12


@given(some_logits, st.integers(1, 12), shares)
def test_top_p_counts_among_what_top_k_leaves(logits, k, p):
    both = top(logits, torch.tensor([float(k)]), torch.tensor([p], dtype=torch.float64))
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
def test_min_p_keeps_what_has_that_share_of_the_largest_probability(logits, share):
    probs = logits.double().softmax(-1)[0]
    keep = kept(min_p(logits.double(), torch.tensor([share], dtype=torch.float64)))
    assert keep[logits.argmax()] and not (keep & ~kept(logits)).any()
    clear = (probs / probs.max() - share).abs() > 1e-9
    assert torch.equal((keep & kept(logits))[clear], ((probs >= share * probs.max()) & kept(logits))[clear])


@given(some_logits, st.floats(1.0, 3.0), st.integers(0, 2**9))
def test_repetition_lowers_what_was_seen_and_nothing_else(logits, penalty, bits):
    seen = torch.tensor([[bool(bits >> i & 1) for i in range(logits.shape[1])]])
    lowered = repetition(logits, seen, torch.tensor([penalty]))
    assert torch.equal(lowered[~seen], logits[~seen]) and (lowered <= logits).all()
    for before, after in zip(logits[seen].tolist(), lowered[seen].tolist(), strict=True):
        assert after == pytest.approx(before / penalty if before > 0 else before * penalty)
    assert torch.equal(repetition(logits, seen, torch.tensor([1.0])), logits)


@given(some_logits, st.floats(0.0, 3.0), st.none() | st.integers(1, 12), shares, st.booleans())
def test_no_filter_brings_back_what_was_forbidden(logits, t, k, p, in_image):
    cfg = SamplingParams(t, p, k, 0.1, 1.0, t, p, k, 0.1)
    left = kept(filtered(logits, options(cfg), torch.tensor([in_image])))
    assert left.any() and not (left & ~kept(logits)).any()


def test_filters_apply_in_the_order_of_the_released_code():
    """Temperature first: at 0.5 the first id alone reaches 0.75, at 1 it does not."""
    logits = torch.tensor([[1.0, 0.0, -torch.inf]])
    for t, left in ((0.5, [True, False, False]), (1.0, [True, True, False])):
        assert kept(filtered(logits, options(SamplingParams(t, 0.75)), torch.tensor([False]))).tolist() == left


def test_each_row_has_numbers_of_its_own_and_images_have_others_than_text():
    rows = [
        SamplingParams(1.0, 1.0, k, image_temperature=1.0, image_top_p=1.0, image_top_k=i) for k, i in ((1, 3), (2, 4))
    ]
    logits, twice = torch.arange(6.0).expand(4, 6), options(*rows, *rows)
    left = filtered(logits, twice, torch.tensor([False, False, True, True])).isfinite().sum(1)
    assert left.tolist() == [1, 2, 3, 4]
    without = filtered(logits, options(*[SamplingParams(1.0, 1.0)] * 4), torch.tensor([False] * 4), sorts=False)
    assert without.isfinite().all()


def test_defaults_are_the_released_ones():
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
def test_pick_gives_each_id_its_share_of_the_uniform_numbers(logits):
    n = 1_000
    ids = pick(logits.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    counts = torch.bincount(ids, minlength=logits.shape[1])
    assert ((counts - n * logits.double().softmax(-1)[0]).abs() <= 1).all()
    assert (counts[~kept(logits)] == 0).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_pick_at_the_edges_stays_with_what_may_come(u):
    logits = torch.full((1, 70_000), -torch.inf)
    logits[0, 1_000:69_000] = torch.linspace(-5, 5, 68_000)
    token = int(pick(logits, torch.tensor([u], dtype=torch.float64)))
    assert 1_000 <= token < 69_000
    assert (token < 1_010) if u == 0 else (token >= 68_990)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    generator = torch.Generator().manual_seed(0)
    logits, u = torch.randn(20, 30, generator=generator), torch.rand(20, dtype=torch.float64, generator=generator)
    alone = [int(pick(logits[i : i + 1], u[i : i + 1])) for i in range(20)]
    assert pick(logits, u).tolist() == alone and len(set(alone)) > 5


@given(st.integers(0, 99), st.floats(0, 10), st.floats(0, 10))
def test_guidance_is_the_published_formula_with_scales_for_each_row(seed, by_text, by_image):
    generator = torch.Generator().manual_seed(seed)
    full, image, nothing = (torch.randn(3, 7, generator=generator) for _ in range(3))
    text_scale, image_scale = torch.tensor([by_text, 1.0, 0.0]), torch.tensor([by_image, 1.0, 1.0])
    guided = guide(full, image, nothing, text_scale, image_scale)
    expected = nothing[0] + by_image * (image[0] - nothing[0]) + by_text * (full[0] - image[0])
    torch.testing.assert_close(guided[0], expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(guided[1], full[1])  # scales 1 are no guidance
    torch.testing.assert_close(guided[2], image[2])
    assert torch.equal(guide(full, full, full, text_scale, image_scale), full)  # as are branches that see the same


# ---------------------------------------------------------------------------------------------------------------------
# Grammar (invariant 20)

VOCAB = Vocab.toy(5, 2)
TEXT = set(range(VOCAB.first_text, VOCAB.size))
CODES = set(range(VOCAB.first_code, VOCAB.eoi))


def may_come(new: list[int], n: int, mode: str, stops: set[int], begun: int | None, room: int) -> set[int]:
    """The rules, written out from a row's new ids alone. begun: codes of the image that the prompt leaves open."""
    image = begun  # codes of the open image so far, None outside
    for token in new:
        if (token in stops and image is None) or (token == VOCAB.eoi and mode == "image"):
            return {VOCAB.pad}
        image = 0 if token == VOCAB.boi else None if image is None or token == VOCAB.eoi else image + 1
    free = room - len(new)
    if free == 0:
        return {VOCAB.pad}
    if image is not None:
        return CODES if image < n else {VOCAB.eoi}
    fits = free >= 1 + n + 1
    if mode == "image":
        return {VOCAB.boi} if fits else stops
    return TEXT | stops | ({VOCAB.boi} if fits and mode == "both" else set())


@st.composite
def batches(draw):
    """Codes an image, and of each row: codes of the image begun or None, room, where to turn, mode, stops."""
    n, rows = draw(st.integers(1, 4)), []
    for begun in draw(st.lists(st.none() | st.integers(0, n), min_size=1, max_size=4)):
        room = draw(st.integers(1 if begun is None else n - begun + 1, 20))
        turns, mode = (
            draw(st.lists(st.integers(0, 10**6), max_size=22)),
            draw(st.sampled_from(["text", "image", "both"])),
        )
        some = [(VOCAB.eos,), (VOCAB.eos, VOCAB.eot)] + [(VOCAB.eos, VOCAB.boi)] * (mode == "text")
        rows.append((begun, room, turns, mode, draw(st.sampled_from(some))))
    return n, rows


@given(batches())
def test_the_grammar_allows_what_the_rules_say_step_by_step(batch):
    """Random walks through what is allowed, images favoured, each row beside others in other states."""
    n, rows = batch
    left = [-1 if begun is None else n - begun for begun, _, _, _, _ in rows]
    modes, rooms = [mode for *_, mode, _ in rows], [room for _, room, *_ in rows]
    grammar = Grammar.start(VOCAB, n, modes, left, rooms, [stops for *_, stops in rows])
    news = [[] for _ in rows]
    for step in range(22):
        ids = []
        for row, (allowed, new) in enumerate(zip(grammar.allowed(), news, strict=True)):
            begun, room, turns, mode, stops = rows[row]
            expected = may_come([t for t in new if t != VOCAB.pad], n, mode, set(stops), begun, room)
            assert set(allowed.nonzero()[:, 0].tolist()) == expected
            turn = turns[step] if step < len(turns) else 0
            choices = sorted(expected)
            ids.append(VOCAB.boi if VOCAB.boi in expected and turn % 2 else choices[turn % len(choices)])
            new.append(ids[-1])
        grammar = grammar.after(torch.tensor(ids))
    assert grammar.done.all()


@pytest.mark.parametrize("mode", ["text", "image", "both"])
def test_what_renders_no_document_is_never_allowed(mode):
    known = {VOCAB.eos, VOCAB.eot, VOCAB.boi, VOCAB.eoi} | CODES | TEXT
    forbidden = sorted(set(range(VOCAB.size)) - known)
    assert VOCAB.bos in forbidden and VOCAB.unk in forbidden and VOCAB.pad in forbidden
    for left, room in ((-1, 9), (-1, 2), (2, 9), (0, 9)):
        grammar = Grammar.start(VOCAB, 3, [mode], [left], [room], [(VOCAB.eos, VOCAB.eot)])
        assert grammar.allowed().any() and not grammar.allowed()[:, forbidden].any()


@pytest.mark.parametrize("left, room", [(3, 3), (-1, 0), (4, 9)])
def test_a_start_without_room_is_refused(left, room):
    with pytest.raises(ValueError, match="no room"):
        Grammar.start(VOCAB, 3, ["both"], [left], [room], [None])


def test_unknown_modes_and_stops_are_refused():
    for mode, stops in (("images", None), ("both", ()), ("both", (VOCAB.pad,)), ("both", (VOCAB.boi,))):
        with pytest.raises(ValueError, match="mode"):
            Grammar.start(VOCAB, 3, [mode], [-1], [9], [stops])
