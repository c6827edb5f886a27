"""Scores equal sums made token by token, whatever else is asked at the same time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import any_text
from tiny import N_CODES, TOKENIZER, VOCAB, tiny_config, tiny_model, tiny_run

from nanochameleon.errors import UserError
from nanochameleon.evaluate import scoring, token_trees
from nanochameleon.evaluate.scoring import context_and_continuation, score
from nanochameleon.evaluate.token_trees import Tree, shared_prefixes
from nanochameleon.training.run import Run
from nanochameleon.weights.model_folder import open_model

text_tokens = st.lists(st.integers(VOCAB.first_text, VOCAB.size - 1), max_size=8)
code = st.integers(VOCAB.first_code, VOCAB.eoi - 1)
image = st.lists(code, min_size=N_CODES, max_size=N_CODES).map(lambda codes: [VOCAB.boi, *codes, VOCAB.eoi])
contexts = st.lists(text_tokens | image, max_size=4).map(
    lambda parts: [VOCAB.bos, *(t for part in parts for t in part)]
)
continuations = st.lists(st.integers(0, VOCAB.size - 1), max_size=6)
# few distinct contexts, so that several candidates share one, and some requests are equal
requests = st.lists(contexts, min_size=1, max_size=3).flatmap(
    lambda shared: st.lists(st.tuples(st.sampled_from(shared), continuations), max_size=10)
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return open_model(tiny_run(tmp_path_factory.mktemp("runs") / "tiny"), "cpu")


def with_model(run: Run, model) -> Run:
    return replace(run, model=model, cfg=tiny_config(model=model.cfg))


@torch.inference_mode()
def one_by_one(run: Run, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """A run of the model for each token."""
    tokens, total, greedy = list(context), 0.0, True
    for token in continuation:
        logits = run.model.logits(run.model(torch.tensor([tokens])))[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
        greedy = greedy and int(logits.argmax()) == token
        tokens.append(token)
    return total, greedy


def check(run: Run, asked: list[tuple[list[int], list[int]]]) -> None:
    for (context, continuation), found in zip(asked, score(run, asked), strict=True):
        total, greedy = one_by_one(run, context, continuation)
        assert found.log_prob == pytest.approx(total, abs=1e-4)
        assert (found.greedy, found.truncated) == (greedy, False)


@settings(max_examples=40)
@given(requests)
def test_a_score_is_the_sum_made_token_by_token(run, asked):
    check(run, asked)


@pytest.mark.parametrize("changes", [{"norm_order": "post", "n_kv_heads": 1}, {"qk_norm": False}])
def test_scores_of_every_kind_of_model_are_sums(run, changes):
    shared = [VOCAB.bos, 30, 31, 32]
    asked = [(shared, [40, 41]), (shared, [40, 42, 43]), ([VOCAB.bos], [50]), ([*shared, 40], [41, 44])]
    check(with_model(run, tiny_model(1, **changes)), asked)


@settings(max_examples=20)
@given(contexts, requests)
def test_shots_that_all_contexts_share_change_nothing(run, shots, asked):
    """With a prefix that is computed once, however little that saves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_trees, "WORTH_SHARING", 1)
        check(run, [(shots[:12] + context[1:20], continuation) for context, continuation in asked])


@settings(max_examples=20)
@given(requests, st.randoms())
def test_order_and_batch_change_nothing(run, asked, rng):
    order = rng.sample(range(len(asked)), len(asked))
    found = score(run, [asked[i] for i in order])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "BATCH_TOKENS", 1)
        patch.setattr(scoring, "LOGITS", 1)
        alone = score(run, asked)
    assert [each.log_prob for each in found] == pytest.approx([alone[i].log_prob for i in order], abs=1e-4)
    assert [each[1:] for each in found] == [alone[i][1:] for i in order]


def test_what_greedy_decoding_writes_is_greedy(run):
    context = [VOCAB.bos, 30]
    written = []
    for _ in range(5):
        hidden = run.model(torch.tensor([context + written]))
        written.append(int(run.model.logits(hidden)[0, -1].argmax()))
    other = [*written[:4], written[4] - 1 if written[4] else 1]
    assert [each.greedy for each in score(run, [(context, written), (context, other)])] == [True, False]


def test_of_equal_logits_the_first_token_is_greedy(run):
    model = tiny_model()
    torch.nn.init.zeros_(model.output.weight)
    asked = [([VOCAB.bos, 30], new) for new in ([0], [0, 0], [1], [0, 5])]
    found = score(with_model(run, model), asked)
    assert [each.greedy for each in found] == [True, True, False, False]
    uniform = -torch.tensor(float(VOCAB.size)).double().log().item()
    assert [each.log_prob for each in found] == pytest.approx([uniform, 2 * uniform, uniform, 2 * uniform])


def test_an_empty_continuation_costs_nothing_and_an_empty_context_is_the_start(run):
    assert score(run, [([VOCAB.bos, 30], []), ([], [])]) == [(0.0, True, False)] * 2
    empty, start = score(run, [([], [40, 41]), ([VOCAB.bos], [40, 41])])
    assert empty == start and empty.log_prob < 0
    assert score(run, []) == []


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_of_a_long_context_start_and_right_end_stay(run):
    """The model reads 64 tokens, and the last one of a continuation is not read."""
    body = [VOCAB.first_text + i % 200 for i in range(80)]
    cases = [(63, 2, False), (64, 1, False), (64, 2, True), (80, 3, True)]
    for n, more, cut in cases:
        context, continuation = [VOCAB.bos, *body[: n - 1]], body[:more]
        kept = context if not cut else [VOCAB.bos, *context[n - (64 - more) :]]
        assert len(kept) + more - 1 <= 64
        [found] = score(run, [(context, continuation)])
        assert found.truncated == cut
        assert found.log_prob == pytest.approx(one_by_one(run, kept, continuation)[0], abs=1e-4)


def test_an_image_that_does_not_fit_is_an_error(run):
    context = [VOCAB.bos, 30, 31, VOCAB.boi, *[VOCAB.first_code] * N_CODES, VOCAB.eoi, *[33] * 66]
    with pytest.raises(UserError, match=r"75 tokens.*63"):
        score(run, [(context, [34, 35])])


def test_a_continuation_longer_than_the_context_is_an_error(run):
    assert score(run, [([VOCAB.bos, 30], [40] * 64)])[0].truncated
    with pytest.raises(UserError, match=r"65 tokens.*64"):
        score(run, [([VOCAB.bos], [40] * 65)])


# --- words -----------------------------------------------------------------------------------------------------------


@given(any_text, st.sampled_from(["red", "tar", "Ünder"]), any_text)
@example("a", "red", " ta")
def test_tokens_add_up_at_the_borders_of_words(before, word, after):
    """A continuation that starts a word has the tokens it has alone."""
    context = before.rstrip() + "."
    assert TOKENIZER.encode(f"{context} {word}{after}") == TOKENIZER.encode(context) + TOKENIZER.encode(
        f" {word}{after}"
    )


@given(any_text, any_text)
def test_the_pair_rule_moves_trailing_spaces_and_loses_nothing(context, continuation):
    first, second = context_and_continuation(TOKENIZER, context, continuation)
    assert first + second == TOKENIZER.encode(context + continuation)
    assert len(first) <= len(TOKENIZER.encode(context.rstrip()))


def test_the_pair_rule_by_example():
    encode = TOKENIZER.encode
    assert context_and_continuation(TOKENIZER, "a tar ", "red") == (encode("a tar"), encode(" red"))
    assert context_and_continuation(TOKENIZER, "a tar", " red") == (encode("a tar"), encode(" red"))
    assert context_and_continuation(TOKENIZER, "a tar \n", "red") == (encode("a tar"), encode(" \nred"))
    assert context_and_continuation(TOKENIZER, "", "red") == ([], encode("red"))
    assert context_and_continuation(TOKENIZER, "  ", "red") == ([], encode("  red"))


# --- trees -----------------------------------------------------------------------------------------------------------


def test_a_tree_holds_every_distinct_prefix_once():
    tree = Tree.grow((0, 7), [(1, 2, 3), (1, 2, 4), (1, 5), (6,)])
    assert (tree.tokens, tree.parents) == ([0, 7, 1, 2], [-1, 0, 1, 2])
    assert tree.paths == {(1, 2, 3): [1, 2, 3], (1, 2, 4): [1, 2, 3], (1, 5): [1, 2], (6,): [1]}


def test_a_node_sees_its_ancestors_alone():
    tree = Tree.grow((0, 7), [(1, 2, 3), (4, 5, 6)])
    seen = [[j for j in range(7) if row[j]] for row in tree.ancestors(7)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [6]]  # the last one pads


def test_only_prefixes_that_save_enough_are_shared(monkeypatch):
    shots, others = tuple(range(9)), tuple(range(20, 24))
    contexts = [*((*shots, i) for i in range(4)), *((*others, i) for i in range(2)), (50, 51)]
    monkeypatch.setattr(token_trees, "WORTH_SHARING", 3 * 9)
    groups = list(shared_prefixes(contexts))
    assert groups == [(9, contexts[:4]), (0, contexts[4:])]
    monkeypatch.setattr(token_trees, "WORTH_SHARING", 4)
    assert list(shared_prefixes(contexts)) == [(9, contexts[:4]), (4, contexts[4:6]), (0, contexts[6:])]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple), unique=True, max_size=20))
def test_groups_hold_each_context_once_and_what_they_share(contexts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_trees, "WORTH_SHARING", 1)
        groups = list(shared_prefixes(contexts))
    assert sorted(context for _, group in groups for context in group) == sorted(contexts)
    for length, group in groups:
        assert len({context[:length] for context in group}) <= 1
        assert all(len(context) > length for context in group)  # each has a token that predicts the next one
