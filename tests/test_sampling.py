"""Filters, the draw and guidance on any logits; the grammar against rules written out a second time, id by id."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.sampling import Grammar, filtered, guide, pick, temperature, top_k, top_p
from nanochameleon.vocab import Vocab

# few different values, so that ties are common; -inf is an id that is forbidden
some_logits = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0, -torch.inf]), min_size=1, max_size=9).map(
    lambda row: torch.tensor([[*row, 0.25]])
)
shares = st.floats(0.01, 1.0)


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


@given(some_logits, st.floats(1e-6, 100.0))
def test_temperature_divides_differences_and_0_is_greedy(logits, t):
    cooled = temperature(logits, t)
    assert torch.equal(kept(cooled), kept(logits)) and cooled.max() == 0
    torch.testing.assert_close(cooled, (logits - logits.max()) / t)
    assert kept(temperature(logits, 0.0)).nonzero().tolist() == [[int(logits.argmax())]]


def test_a_temperature_near_0_is_greedy_and_finite():
    probs = temperature(torch.tensor([[3e4, -1.0, 2.9e4]]), 1e-38).softmax(-1)
    assert probs.tolist() == [[1.0, 0.0, 0.0]]


@given(some_logits, st.floats(0.0, 3.0), st.none() | st.integers(1, 12), shares)
def test_no_filter_brings_back_what_was_forbidden(logits, t, k, p):
    left = kept(filtered(logits, t, k, p))
    assert left.any() and not (left & ~kept(logits)).any()


def test_filters_apply_in_the_order_of_the_released_code():
    """Temperature first: at 0.5 the first id alone reaches 0.75, at 1 it does not."""
    logits = torch.tensor([[1.0, 0.0, -torch.inf]])
    assert kept(filtered(logits, 0.5, None, 0.75)).tolist() == [True, False, False]
    assert kept(filtered(logits, 1.0, None, 0.75)).tolist() == [True, True, False]


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


@given(st.integers(0, 99), st.floats(0, 10))
def test_guidance_is_a_line_through_both_logits(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    with_prompt, without = (torch.randn(3, 7, generator=generator) for _ in range(2))
    assert torch.equal(guide(with_prompt, without, 1.0), with_prompt)
    assert torch.equal(guide(with_prompt, without, 0.0), without)
    expected = without + scale * (with_prompt - without)
    torch.testing.assert_close(guide(with_prompt, without, scale), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Grammar (invariant 20)

VOCAB = Vocab.toy(5, 2)
TEXT = set(range(VOCAB.first_text, VOCAB.size))
CODES = set(range(VOCAB.first_code, VOCAB.eoi))


def may_come(new: list[int], n: int, mode: str, stops: set[int], begun: int | None, room: int) -> set[int]:
    """The rules, written out from a row's new ids alone. begun: codes of the picture that the prompt leaves open."""
    picture = begun  # codes of the open picture so far, None outside
    for token in new:
        if token in stops or (token == VOCAB.eoi and mode == "image"):
            return {VOCAB.pad}
        picture = 0 if token == VOCAB.boi else None if picture is None or token == VOCAB.eoi else picture + 1
    free = room - len(new)
    if free == 0:
        return {VOCAB.pad}
    if picture is not None:
        return CODES if picture < n else {VOCAB.eoi}
    fits = free >= 1 + n + 1
    if mode == "image":
        return {VOCAB.boi} if fits else stops
    return TEXT | stops | ({VOCAB.boi} if fits and mode == "both" else set())


@st.composite
def batches(draw):
    """(codes a picture, mode, stops), and of each row: codes of the picture begun or None, room, where to turn."""
    n, mode = draw(st.integers(1, 4)), draw(st.sampled_from(["text", "image", "both"]))
    rows = []
    for begun in draw(st.lists(st.none() | st.integers(0, n), min_size=1, max_size=4)):
        room = draw(st.integers(1 if begun is None else n - begun + 1, 20))
        rows.append((begun, room, draw(st.lists(st.integers(0, 10**6), max_size=22))))
    return (n, mode, draw(st.sampled_from([(VOCAB.eos,), (VOCAB.eos, VOCAB.eot)]))), rows


@given(batches())
def test_the_grammar_allows_what_the_rules_say_step_by_step(batch):
    """Random walks through what is allowed, pictures favoured, each row beside others in other states."""
    (n, mode, stops), rows = batch
    left = torch.tensor([-1 if begun is None else n - begun for begun, _, _ in rows])
    grammar = Grammar.start(VOCAB, n, mode, left, torch.tensor([room for _, room, _ in rows]), stops)
    news = [[] for _ in rows]
    for step in range(22):
        ids = []
        for row, (allowed, new) in enumerate(zip(grammar.allowed(), news, strict=True)):
            begun, room, turns = rows[row]
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
    grammar = Grammar.start(VOCAB, 3, mode, torch.tensor([-1]), torch.tensor([9]), (VOCAB.eos, VOCAB.eot))
    known = {VOCAB.eos, VOCAB.eot, VOCAB.boi, VOCAB.eoi} | CODES | TEXT
    forbidden = sorted(set(range(VOCAB.size)) - known)
    assert VOCAB.bos in forbidden and VOCAB.unk in forbidden and VOCAB.pad in forbidden
    assert not grammar.table[:4, forbidden].any()


@pytest.mark.parametrize("left, room", [(3, 3), (-1, 0), (4, 9)])
def test_a_start_without_room_is_refused(left, room):
    with pytest.raises(ValueError, match="no room"):
        Grammar.start(VOCAB, 3, "both", torch.tensor([left]), torch.tensor([room]))


def test_unknown_modes_and_stops_are_refused():
    for mode, stops in (("pictures", None), ("both", ()), ("both", (VOCAB.pad,))):
        with pytest.raises(ValueError, match="mode is"):
            Grammar.start(VOCAB, 3, mode, torch.tensor([-1]), torch.tensor([9]), stops)
