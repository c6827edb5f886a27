"""Attention: who sees whom, by loops; and what comes out, against the reference in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_good_as

from nanochameleon.kernels.attention.reference import attention, attention_reference, visible

doc_rows = st.lists(st.integers(-1, 3), min_size=1, max_size=9)


@given(st.lists(doc_rows, min_size=1, max_size=3), st.data())
def test_a_query_sees_the_keys_at_or_before_it_of_its_document(rows, data):
    s = min(map(len, rows))
    docs = torch.tensor([row[:s] for row in rows])
    t = data.draw(st.integers(1, s))
    mask = visible(docs[:, s - t :], docs)
    for b in range(len(docs)):
        for i in range(t):
            for j in range(s):
                at = s - t + i
                assert mask[b, i, j] == (j <= at and docs[b, j] == docs[b, at])
    assert mask.any(-1).all()  # not one empty row of the softmax


@st.composite
def problems(draw):
    """(q, k, v, mask) in float64, values rounded to bfloat16 so that every type starts from the same numbers."""
    b, groups, g, d = (draw(st.integers(1, n)) for n in (2, 3, 2, 9))
    s = draw(st.integers(1, 12))
    t = draw(st.integers(1, s))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    size = draw(st.sampled_from([0.1, 1.0, 5.0]))
    q, k, v = (
        (size * torch.randn(b, heads, n, d, generator=generator)).bfloat16().double()
        for heads, n in ((groups * g, t), (g, s), (g, s))
    )
    docs = torch.randint(0, 3, (b, s), generator=generator).sort(1).values
    return q, k, v, visible(docs[:, s - t :], docs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(problem=problems())
def test_attention_is_the_formula(dtype, problem):
    q, k, v, mask = problem
    low = [x.to(dtype) for x in (q, k, v)]
    scores = (torch.einsum("bhid,bgjd->bhgij", q, k) / q.shape[-1] ** 0.5).abs().max().item()
    scale = v.abs().max().item() * (1 + scores)  # an error of eps in a score moves a weight by eps * score
    truth = attention_reference(q, k, v, mask)
    assert_as_good_as(attention(*low, mask), attention_reference(*low, mask), truth, scale)


@given(problems())
def test_an_output_lies_between_the_least_and_the_largest_value_that_is_seen(problem):
    q, k, v, mask = problem
    out = attention(q, k, v, mask)
    groups = q.shape[1] // k.shape[1]
    v = v.repeat_interleave(groups, 1)[:, :, None]  # (B, H, 1, S, D)
    seen = mask[:, None, :, :, None]
    low = v.masked_fill(~seen, torch.inf).amin(3)
    high = v.masked_fill(~seen, -torch.inf).amax(3)
    assert (out >= low - 1e-9).all() and (out <= high + 1e-9).all()


@given(problems(), st.integers(0, 100))
def test_one_vector_added_to_all_keys_changes_nothing(problem, seed):
    q, k, v, mask = problem
    shift = torch.randn(k.shape[-1], generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(attention(q, k + shift, v, mask), attention(q, k, v, mask), rtol=0, atol=1e-9)


@given(problems())
def test_inputs_are_not_written(problem):
    before = [x.clone() for x in problem]
    attention(*problem)
    assert all(torch.equal(x, y) for x, y in zip(before, problem, strict=True))


@given(st.integers(1, 8), st.integers(0, 100))
def test_no_mask_is_plain_causal_and_for_one_query_everything(n, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, n, 4, generator=generator).double() for heads in (4, 2, 2))
    everything = torch.ones(1, n, n, dtype=torch.bool)
    torch.testing.assert_close(attention(q, k, v), attention_reference(q, k, v, everything.tril()))
    last = q[:, :, -1:]
    torch.testing.assert_close(attention(last, k, v), attention_reference(last, k, v, everything[:, -1:]))


def test_several_queries_on_more_keys_need_a_mask():
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="2 queries on 3 keys"):
        attention(q, k, k)
