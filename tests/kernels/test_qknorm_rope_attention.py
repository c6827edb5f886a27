"""Attention as one op: every implementation against the reference in float64, in value and in gradient."""

import pytest
import torch
from attention_problems import EPS, outcome, problems, sizes
from bf16_pairs import emulated_pairs, needs_bf16_pairs  # noqa: F401
from garbage import assert_same_in_garbage
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good_as

from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.qknorm_rope_attention import qknorm_rope_attention
from nanochameleon.kernels.attention.reference import qknorm_rope_attention_reference, visible
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.transformer import compute_freqs_cis

EVERY = [
    ("numba", torch.float32),
    ("numba", torch.bfloat16),
    pytest.param("bf16", torch.bfloat16, marks=needs_bf16_pairs),
]


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@settings(max_examples=30)
@given(problem=problems())
def test_it_is_as_good_as_the_reference(name, dtype, problem):
    truth = outcome(qknorm_rope_attention_reference, problem, torch.float64)
    naive = outcome(qknorm_rope_attention_reference, problem, dtype)
    with use_kernels(name):
        result = outcome(qknorm_rope_attention, problem, dtype)
    size = sizes(problem)
    for x, plain, exact in zip(result, naive, truth, strict=True):
        # There weights and their gradients are bfloat16 numbers, which float32 gradients of the norms are sums of.
        coarse = torch.finfo(dtype if name == "bf16" else x.dtype).eps / torch.finfo(x.dtype).eps
        assert_as_good_as(x, plain, exact, scale=coarse * size * (1 + exact.abs().max().item()))


def ordinary_problem(documents: torch.Tensor, e: int):
    """Two heads a key head, norms with a weight near 1: nothing that cancels or overflows."""
    generator = torch.Generator().manual_seed(7)

    def numbers(*shape):
        return torch.randn(shape, generator=generator).bfloat16().double()

    b, t = documents.shape
    tensors = {"q": numbers(b, t, 4, e), "k": numbers(b, t, 2, e), "v": numbers(b, t, 2, e)}
    for name in ("q", "k"):
        tensors |= {f"{name}_weight": 1 + 0.3 * numbers(2, e), f"{name}_bias": 0.3 * numbers(2, e)}
    return (
        tensors,
        compute_freqs_cis(torch.arange(t).expand(b, t), e, 100.0),
        Documents.of(documents),
        numbers(b, t, 4, e),
    )


@pytest.mark.parametrize("e", [32, 40])
@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_an_ordinary_problem_is_right_to_a_percent_or_two_in_each_tensor(name, dtype, e):
    """The rule above has to let pass what the worst problem may lose; bugs of one part hide below it."""
    runs = [7] * 40 + [3] * 21 + [7] * 9 + [5] * 33, [1] * 103  # a document that comes back, and one that is a row
    problem = ordinary_problem(torch.tensor(runs), e)
    truth = outcome(qknorm_rope_attention_reference, problem, torch.float64)
    with use_kernels(name):
        result = outcome(qknorm_rope_attention, problem, dtype)
    for x, exact in zip(result, truth, strict=True):
        error = ((x.double() - exact).norm() / exact.norm()).item()
        assert error < (1e-5 if dtype == torch.float32 else 0.02), error


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_two_runs_in_memory_full_of_other_garbage_agree(monkeypatch, name, dtype):
    """Every output and every piece of scratch is written before it is read."""
    q, k, v = (torch.randn(2, 70, heads, 20).to(dtype) for heads in (4, 2, 2))
    freqs_cis = compute_freqs_cis(torch.arange(70).expand(2, 70), 20, 1e4)
    docs = Documents.of(torch.arange(70).expand(2, 70) // 33)
    norms = [(torch.randn(1, 20), torch.randn(1, 20)) for _ in "qk"]

    def run() -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        with use_kernels(name):
            out = qknorm_rope_attention(*inputs, freqs_cis, docs, *norms, EPS)
        return [out.detach(), *torch.autograd.grad(out.sum(), inputs)]

    assert_same_in_garbage(monkeypatch, run)


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_any_number_of_threads_computes_the_same_bits(name, dtype):
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(3, 90, heads, 24, generator=generator).to(dtype) for heads in (4, 2, 2)]
    freqs_cis = compute_freqs_cis(torch.arange(90).expand(3, 90), 24, 1e4)
    docs = Documents.of(torch.arange(90).expand(3, 90) // 41)
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = [y.clone().requires_grad_() for y in inputs]
            with use_kernels(name):
                out = qknorm_rope_attention(*x, freqs_cis, docs, None, None, EPS)
                outcomes.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), x)])
    finally:
        torch.set_num_threads(before)
    for outcome_ in outcomes[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outcome_, outcomes[0], strict=True))


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_inputs_of_other_strides_are_read_right_and_never_written(name, dtype):
    fused = torch.randn(2, 9, 3, 4, 6).to(dtype)  # one buffer of q, k and v, as a fused projection gives it
    freqs_cis = compute_freqs_cis(torch.arange(9).expand(2, 9), 6, 1e4)
    q, k, v = fused.unbind(2)
    before = fused.clone()
    with use_kernels(name):
        out = qknorm_rope_attention(q, k, v, freqs_cis, None, None, None, EPS)
        copied = qknorm_rope_attention(*(x.contiguous() for x in (q, k, v)), freqs_cis, None, None, None, EPS)
    assert torch.equal(out, copied) and torch.equal(fused, before)


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_rows_may_lie_an_odd_number_of_numbers_apart(name, dtype):
    wide = torch.randn(1, 40, 65).to(dtype)
    freqs_cis = compute_freqs_cis(torch.arange(40).expand(1, 40), 32, 1e4)
    x = wide[..., 1:].view(1, 40, 2, 32)
    with use_kernels(name):
        out, copied = (qknorm_rope_attention(y, y, y, freqs_cis, None, None, None, EPS) for y in (x, x.contiguous()))
    assert torch.equal(out, copied)


def test_the_sums_that_the_gradient_needs_have_none_themselves():
    x, cos_sin = torch.randn(1, 3, 2, 6, requires_grad=True), torch.ones(1, 3, 6)
    out, lse2 = torch.ops.nanochameleon.qknorm_rope_attention(
        x, x, x, cos_sin, None, None, None, None, None, EPS, False
    )
    assert out.requires_grad and not lse2.requires_grad


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows_and_no_positions(shape):
    x = torch.zeros(*shape, 2, 6, requires_grad=True)
    freqs_cis = torch.ones(shape[0], 1, shape[1], 3, 2)
    with use_kernels("numba"):
        out = qknorm_rope_attention(x, x, x, freqs_cis, None, None, None, EPS)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@settings(max_examples=15)
@given(problem=problems())
def test_an_output_lies_between_the_least_and_the_largest_value_that_is_seen(name, dtype, problem):
    tensors, freqs_cis, documents, _ = problem
    q, k, v = (tensors[n].to(dtype) for n in "qkv")
    with use_kernels(name):
        out = qknorm_rope_attention(q, k, v, freqs_cis, documents, None, None, EPS)
    docs = torch.zeros(q.shape[:2]) if documents is None else documents.ids
    v, unseen = v.repeat_interleave(q.shape[2] // v.shape[2], 2)[:, None], ~visible(docs, docs)[..., None, None]
    low, high = v.masked_fill(unseen, torch.inf).amin(2), v.masked_fill(unseen, -torch.inf).amax(2)
    room = 2 * torch.finfo(dtype).eps * v.abs().max()  # values are bfloat16's, the average is rounded
    assert (out >= low - room).all() and (out <= high + room).all()


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@settings(max_examples=15)
@given(seed=st.integers(0, 100), e=st.sampled_from([16, 32, 48]), by=st.integers(1, 500))
def test_only_distances_count_and_one_vector_on_all_unrotated_keys_does_not(name, dtype, seed, e, by):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 70, heads, e, generator=generator).to(dtype) for heads in (2, 1, 1))
    shift = torch.randn(e, generator=generator).to(dtype)
    places, still = torch.arange(70)[None], torch.tensor([1.0, 0.0]).expand(1, 1, 70, e // 2, 2)
    with use_kernels(name):
        rotations = [compute_freqs_cis(p, e, 1e4) for p in (places, places + by)]
        here, there = (qknorm_rope_attention(q, k, v, freqs_cis, None, None, None, EPS) for freqs_cis in rotations)
        plain, moved = (qknorm_rope_attention(q, keys, v, still, None, None, None, EPS) for keys in (k, k + shift))
    room = 1e-3 if dtype == torch.float32 else 0.15  # scores of 4 to 8, rounded to bfloat16, move weights so
    torch.testing.assert_close(there, here, rtol=0, atol=room)
    torch.testing.assert_close(moved, plain, rtol=0, atol=room)


def test_gradcheck():
    """What every implementation is compared with: its gradient by differences, in float64."""
    q, k, v = (torch.randn(1, 5, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    norms = [torch.rand(1, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    freqs_cis = compute_freqs_cis(torch.arange(5).expand(1, 5), 4, 1e4).double()
    docs = Documents.of(torch.tensor([[0, 0, 0, 1, 1]]))

    def run(q, k, v, *n):
        return qknorm_rope_attention(q, k, v, freqs_cis, docs, n[:2], n[2:], EPS)

    assert torch.autograd.gradcheck(run, (q, k, v, *norms))


@given(st.integers(0, 100), st.sampled_from([0.1, 7.0]))
@settings(max_examples=10)
def test_with_the_norm_a_factor_on_queries_and_keys_changes_nothing(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 40, 2, 16, generator=generator) for _ in range(3))
    freqs_cis = compute_freqs_cis(torch.arange(40).expand(1, 40), 16, 1e4)
    norms = [(torch.randn(1, 16, generator=generator), torch.randn(1, 16, generator=generator)) for _ in "qk"]
    with use_kernels("numba"):
        out, scaled = (qknorm_rope_attention(c * q, c * k, v, freqs_cis, None, *norms, 1e-12) for c in (1.0, factor))
    torch.testing.assert_close(scaled, out, rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_has_diverged_is_seen_by_all_that_see_it(which, normed, value):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 70, 1, 16, generator=generator) for _ in "qkv"]
    inputs[which][0, 20, 0, 3] = value
    freqs_cis = compute_freqs_cis(torch.arange(70).expand(1, 70), 16, 1e4)
    norms = [(torch.ones(1, 16), torch.zeros(1, 16)) if normed else None for _ in "qk"]
    outcomes = []
    for function in (numba := with_numba(qknorm_rope_attention), qknorm_rope_attention_reference):
        x = [y.clone().requires_grad_() for y in inputs]
        out = function(*x, freqs_cis, None, *norms, EPS)
        outcomes.append([out.detach(), *torch.autograd.grad(out.sum(), x)])
    result, naive = outcomes
    assert not naive[0].isfinite().all()
    met = [slice(20, None)] * 2 + [slice(0, 21) if which == 0 else slice(None)] * 2  # who sees it, and what it sees
    for x, y, rows in zip(result, naive, met, strict=True):
        assert not (x.isfinite() & ~y.isfinite())[:, rows].any()
    assert numba(*inputs, freqs_cis, None, *norms, EPS)[:, :20].isfinite().all()


def with_numba(function):
    def run(*args):
        with use_kernels("numba"):
            return function(*args)

    return run
