"""The compiled losses against the formula in float64: any vocabulary size, ignored rows, odd memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good_as

from nanochameleon.kernels import linear_zloss_cross_entropy, use_kernels, zloss_cross_entropy
from nanochameleon.kernels.zloss.cross_entropy import fits_in_place, zloss_cross_entropy_, zloss_cross_entropy_reference
from nanochameleon.kernels.zloss.linear import linear_zloss_cross_entropy_reference

SIZES = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 130, 940, 1_025]


@st.composite
def problems(draw):
    """(logits (N, V) float64 that bfloat16 holds, targets with some ignored, upstream gradients (2, N))."""
    n, v = draw(st.integers(0, 9)), draw(st.sampled_from(SIZES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    size, offset = draw(st.sampled_from([0.1, 1.0, 30.0])), draw(st.sampled_from([0.0, -200.0, 1_000.0]))
    logits = (offset + size * torch.randn(n, v, generator=generator)).bfloat16().double()
    targets = torch.randint(v, (n,), generator=generator)
    ignored = torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    upstream = torch.randn(2, n, generator=generator).bfloat16().double()
    return logits, torch.where(ignored, -100, targets), upstream


def outcome(function, inputs, targets, upstream, dtype) -> list[torch.Tensor]:
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    loss, log_z = function(*inputs, targets)
    wide = upstream.to(loss.dtype)
    gradients = torch.autograd.grad((loss * wide[0] + log_z * wide[1]).sum(), inputs)
    return [loss.detach(), log_z.detach(), *gradients]


def numba(function):
    def run(*inputs):
        with use_kernels("numba"):
            return function(*inputs)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(problem=problems())
def test_loss_and_gradient_are_as_good_as_the_reference_s(dtype, problem):
    logits, targets, upstream = problem
    truth, naive, result = (
        outcome(function, [logits], targets, upstream, kind)
        for function, kind in (
            (zloss_cross_entropy_reference, torch.float64),
            (zloss_cross_entropy_reference, dtype),
            (numba(zloss_cross_entropy), dtype),
        )
    )
    scale = 2 * logits.abs().max().item() + 1 if logits.numel() else 1
    for x, plain, exact in zip(result, naive, truth, strict=True):
        assert_as_good_as(x, plain, exact, scale * (1 + exact.abs().max().item() if exact.numel() else 1))
    assert all((x[targets < 0] == 0).all() for x in result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(problem=problems())
def test_overwriting_gives_the_same_gradient(dtype, problem):
    logits, targets, _ = problem
    n = len(logits)
    upstream = torch.full((n,), 0.25), 0.25 * 2 * 1e-2 * zloss_cross_entropy_reference(logits, targets)[1]
    loss, log_z, gradient = outcome(numba(zloss_cross_entropy), [logits], targets, torch.stack(upstream), dtype)
    buffer = logits.to(dtype)
    results = (*zloss_cross_entropy_(buffer, targets, 1e-2, 0.25), buffer)
    for x, y in zip(results, (loss, log_z, gradient), strict=True):
        eps = torch.finfo(x.dtype).eps * 8
        torch.testing.assert_close(x, y, rtol=eps, atol=eps * (1 + logits.abs().max().item() if n else 1))


ROWS = {
    "rising": torch.linspace(-100, 400, 5_000),
    "falling": torch.linspace(400, -100, 5_000),
    "a peak at the end": torch.cat([torch.zeros(4_999), torch.tensor([90.0])]),
    "a peak at the start": torch.cat([torch.tensor([90.0]), torch.zeros(4_999)]),
    "nothing at first": torch.cat([torch.full((2_100,), -torch.inf), torch.linspace(-3, 3, 2_900)]),
    "steps": torch.linspace(0, 8, 5_000).floor() * 20,
    "far from zero": torch.linspace(-1, 1, 5_000) * 1e30,
    "far below": torch.linspace(-1.0, -0.5, 5_000) * 2e38,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
def test_wherever_the_largest_of_a_long_row_is(name, dtype):
    """Sums of 2^(x - shift) whose shift follows the largest from block to block."""
    logits = ROWS[name].to(dtype).double().expand(3, -1)
    targets, z_loss = torch.tensor([4_999, -100, 2_500]), 0.0 if "far" in name else 1e-3
    log_z = zloss_cross_entropy_reference(logits, targets)[1]
    upstream = torch.stack([torch.full_like(log_z, 0.25), 0.5 * z_loss * log_z])

    def in_place(logits, targets):
        return zloss_cross_entropy_(logits + 0, targets, z_loss, 0.25)

    truth, naive, *results = (
        outcome(function, [logits], targets, upstream, kind)
        for function, kind in (
            (zloss_cross_entropy_reference, torch.float64),
            (zloss_cross_entropy_reference, dtype),
            (numba(zloss_cross_entropy), dtype),
            (in_place, dtype),
        )
    )
    size = logits.masked_fill(logits.isinf(), 0).abs().max().item()
    for result in results:
        for x, plain, exact, scale in zip(result, naive, truth, (size, size, min(size, 1e4)), strict=True):
            assert_as_good_as(x, plain, exact, 2 * scale + 1)


@pytest.mark.parametrize("known", [True, False])
def test_where_the_foretold_factor_is_none_the_gradient_is_there_all_the_same(known):
    """1 + 2 z log Z = 0 for log Z = -1 and z = 1/2: p has the factor 0, and may be asked for with another."""
    logits = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    logits = (logits - logits.logsumexp(1) - 1).requires_grad_()
    z_loss, targets = 0.5 if known else 0.3, torch.tensor([1])
    gradients = []
    for x, function in ((logits.float(), zloss_cross_entropy_), (logits, zloss_cross_entropy_reference)):
        loss, log_z = function(x * 1, targets, *((0.5, 1.0) if function is zloss_cross_entropy_ else ()))
        gradients.append(torch.autograd.grad((loss + z_loss * log_z.square()).sum(), logits)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_the_least_number_of_all_is_a_number():
    logits = torch.full((1, 50), torch.finfo(torch.float32).min)
    with use_kernels("numba"):
        loss, log_z = zloss_cross_entropy(logits, torch.tensor([3]))
    assert log_z.item() == logits[0, 0] and loss.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [True, False])
@given(problem=problems(), z_loss=st.sampled_from([0.0, 1e-3]))
def test_the_gradient_in_the_logits_place_is_right_for_any_upstream(known, dtype, problem, z_loss):
    """known: the one that was foretold, but for rounding; else it is corrected."""
    logits, targets, upstream = problem
    if known:
        log_z = zloss_cross_entropy_reference(logits, targets)[1]
        upstream = torch.stack([torch.full_like(log_z, 0.25), 0.5 * z_loss * log_z])

    def in_place(logits, targets):
        return zloss_cross_entropy_(logits + 0, targets, z_loss, 0.25)

    truth, naive, result = (
        outcome(function, [logits], targets, upstream, kind)
        for function, kind in (
            (zloss_cross_entropy_reference, torch.float64),
            (zloss_cross_entropy_reference, dtype),
            (in_place, dtype),
        )
    )
    scale = 2 * logits.abs().max().item() + 1 if logits.numel() else 1
    for x, plain, exact in zip(result, naive, truth, strict=True):
        assert_as_good_as(x, plain, exact, scale * (1 + exact.abs().max().item() if exact.numel() else 1))
    assert all((x[targets < 0] == 0).all() for x in result)


def test_what_was_foretold_right_is_not_touched_again():
    logits = torch.randn(6, 33, requires_grad=True)
    targets = torch.tensor([1, 2, -100, 4, 32, 0])
    used = logits * 1
    cross_entropy, log_z = zloss_cross_entropy_(used, targets, 1e-3, 2 / 5)
    made = used.detach().clone()
    loss = (cross_entropy.sum() + 1e-3 * log_z.square().sum()) / 5
    (given_,) = torch.autograd.grad(2 * loss, used)
    assert torch.equal(given_, made) and given_.data_ptr() == used.data_ptr()


def test_used_up_logits_serve_one_gradient_and_no_other_reader():
    targets = torch.tensor([1, 2])
    logits = torch.randn(2, 5, requires_grad=True) * 1
    square = logits.square()
    cross_entropy, _ = zloss_cross_entropy_(logits, targets, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward(retain_graph=True)
    cross_entropy.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="holds one gradient, which was taken"):
        cross_entropy.sum().backward()
    with pytest.raises(ValueError, match="must be contiguous"):
        zloss_cross_entropy_(torch.randn(5, 2).t(), targets, 0.0, 1.0)


def test_logits_are_used_up_only_where_their_gradient_is_wanted():
    logits = torch.randn(2, 5, requires_grad=True)
    with use_kernels("numba"):
        assert fits_in_place(logits)
        assert not fits_in_place(logits.detach()) and not fits_in_place(logits.t())
        with torch.no_grad():
            assert not fits_in_place(logits)
    with use_kernels("reference"):
        assert not fits_in_place(logits)
    assert not fits_in_place(logits.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(problem=problems(), d=st.sampled_from([1, 5, 16, 50]))
@settings(max_examples=30)
def test_the_output_layer_in_one_is_as_good_as_two_steps(dtype, problem, d):
    logits, targets, upstream = problem
    n, v = logits.shape
    generator = torch.Generator().manual_seed(n * v)
    inputs = [torch.randn(rows, d, generator=generator).bfloat16().double() for rows in (n, v)]
    truth, naive, result = (
        outcome(function, inputs, targets, upstream, kind)
        for function, kind in (
            (linear_zloss_cross_entropy_reference, torch.float64),
            (linear_zloss_cross_entropy_reference, dtype),
            (numba(linear_zloss_cross_entropy), dtype),
        )
    )
    scale = 1 + max((x.norm(dim=-1).max().item() for x in inputs if x.numel()), default=0.0) ** 2
    for x, plain, exact in zip(result, naive, truth, strict=True):
        assert_as_good_as(x, plain, exact, 4 * scale)


@given(problems(), st.sampled_from([-50.0, 3.0, 400.0]))
def test_a_shift_of_all_logits_moves_log_z_alone(problem, c):
    logits, targets, _ = problem
    with use_kernels("numba"):
        loss, log_z = zloss_cross_entropy(logits.float(), targets)
        loss_c, log_z_c = zloss_cross_entropy(logits.float() + c, targets)
    tolerance = dict(rtol=0, atol=1e-6 * (2_000 + abs(c)))
    torch.testing.assert_close(loss_c, loss, **tolerance)
    torch.testing.assert_close(log_z_c, torch.where(targets < 0, 0, log_z + c), **tolerance)


def test_other_strides_and_upstream_of_stride_0():
    logits, targets = torch.randn(40, 12).t(), torch.arange(12)
    results = []
    for x in (logits, logits.contiguous()):
        x = x.detach().requires_grad_()
        with use_kernels("numba"):
            loss, _ = zloss_cross_entropy(x, targets)
        loss.sum().backward()  # an expanded 1
        results.append(x.grad)
    assert torch.equal(*results)


def test_a_target_beyond_the_vocabulary_is_refused():
    with use_kernels("numba"):
        with pytest.raises(IndexError, match="target 7 is out of range for 7 logits"):
            zloss_cross_entropy(torch.zeros(2, 7), torch.tensor([0, 7]))
        with pytest.raises(IndexError, match="target 7 is out of range for 7 logits"):
            linear_zloss_cross_entropy(torch.zeros(2, 3), torch.zeros(7, 3), torch.tensor([0, 7]))


BROKEN = {
    "nan": [torch.nan], "inf": [torch.inf], "both": [torch.inf, -torch.inf], "one -inf": [-torch.inf],
    "all -inf": [-torch.inf] * 90, "all nan": [torch.nan] * 90,
}  # fmt: skip


def assert_broken_where(results, references) -> None:
    for x, y in zip(results, references, strict=True):
        assert not (x.isfinite() & ~y.isfinite()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 70, 89])
@pytest.mark.parametrize("values", BROKEN.values(), ids=BROKEN)
def test_what_has_diverged_is_seen_in_the_loss_and_its_gradient(values, at, dtype):
    logits, targets = torch.randn(3, 90), torch.tensor([5, 71, 8])
    at = min(at, 90 - len(values))
    logits[1, at : at + len(values)] = torch.tensor(values)
    upstream = torch.rand(2, 3)
    result, naive = (
        outcome(function, [logits], targets, upstream, dtype)
        for function in (numba(zloss_cross_entropy), zloss_cross_entropy_reference)
    )
    assert_broken_where(result, naive)
    assert all(x[[0, 2]].isfinite().all() for x in result)  # the rows beside it
    if values == [-torch.inf] and at != 71:
        assert all(x.isfinite().all() for x in result)
    buffer = logits.to(dtype)
    assert_broken_where([*zloss_cross_entropy_(buffer, targets, 1e-2, 0.25), buffer], naive)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_so_it_is_with_the_output_layer_in_one(where, value):
    tensors = {"hidden": torch.randn(3, 20), "weight": torch.randn(90, 20).abs()}
    tensors[where][1, 3] = value
    result, naive = (
        outcome(function, list(tensors.values()), torch.tensor([5, 71, 8]), torch.rand(2, 3), torch.float32)
        for function in (numba(linear_zloss_cross_entropy), linear_zloss_cross_entropy_reference)
    )
    assert not all(x.isfinite().all() for x in naive)
    assert_broken_where(result, naive)
