"""A weight's gradient by pairs: exact but for float32 sums, whatever the sizes, strides, threads and memory."""

import sys

import pytest
import torch
from bf16_pairs import emulated_pairs, needs_bf16_pairs  # noqa: F401
from garbage import assert_same_in_garbage
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good_as

from nanochameleon.kernels import linear, use_kernels
from nanochameleon.kernels.block.linear import MIN_SIZE, weight_gradient, worth_packing

module = sys.modules["nanochameleon.kernels.block.linear"]  # the package's `linear` is the function
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([128, 300]))


def numbers(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers in other places."""
    if how == "columns first":
        return x.T.contiguous().T
    wide = torch.full((len(x), x.shape[1] + 3), torch.nan, dtype=x.dtype)
    wide[:, 1:-2] = x
    return wide[:, 1:-2] if how == "part of wider rows" else x


LAYOUT = st.sampled_from(["as it is", "columns first", "part of wider rows"])
ROWS, LAYOUTS = st.one_of(SIZES, st.just(600)), st.tuples(LAYOUT, LAYOUT)


@needs_bf16_pairs
@settings(max_examples=60)
@given(t=ROWS, n_out=SIZES, n_in=SIZES, how=LAYOUTS, seed=st.integers(0, 99))
def test_it_is_the_matmul_with_nothing_rounded_but_sums(t, n_out, n_in, how, seed):
    g, x = numbers(seed, t, n_out), numbers(seed + 1, t, n_in)
    result = weight_gradient(laid_out(g, how[0]), laid_out(x, how[1]))
    size = (g.abs().double().T @ x.abs().double()).max().item()
    assert_as_good_as(result, g.float().T @ x.float(), g.double().T @ x.double(), t**0.5 * size)


@needs_bf16_pairs
@pytest.mark.parametrize("shape", [(0, 5, 6), (5, 0, 6), (5, 6, 0), (1, 1, 1)])
def test_no_rows_and_no_columns_and_one_of_each(shape):
    t, n_out, n_in = shape
    result = weight_gradient(torch.ones(t, n_out).bfloat16(), torch.ones(t, n_in).bfloat16())
    assert torch.equal(result, torch.full((n_out, n_in), float(t)))


@needs_bf16_pairs
def test_any_number_of_threads_computes_the_same_bits():
    g, x, before, found = numbers(0, 700, 330), numbers(1, 700, 90), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(weight_gradient(g, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found[1:])


@needs_bf16_pairs
def test_what_was_in_memory_does_not_matter(monkeypatch):
    g, x = numbers(0, 300, 70), numbers(1, 300, 33)
    assert_same_in_garbage(monkeypatch, lambda: [weight_gradient(g, x)])


def step(name: str, x: torch.Tensor, weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Results and weights' gradients of half the sum of their squares, under autocast, each side by side."""
    with use_kernels(name), torch.autocast("cpu", torch.bfloat16):
        results = linear(x, weights)
    gradients = torch.autograd.grad(results, weights, [y.detach() for y in results])
    return torch.cat(results, -1).flatten(0, -2).detach(), torch.cat(gradients)


@needs_bf16_pairs
@pytest.mark.parametrize("name", ["auto", "bf16"])
def test_linear_layers_take_it_where_it_pays_and_is_requested(monkeypatch, name):
    monkeypatch.setattr("nanochameleon.kernels.cpu.bf16.matmul.ON_TILES", True)
    x = torch.randn(2, MIN_SIZE, MIN_SIZE)
    weights = [torch.randn(n, MIN_SIZE, requires_grad=True) for n in (MIN_SIZE, 50)]
    g, gradient = step(name, x, weights)
    assert torch.equal(gradient, weight_gradient(g, x.flatten(0, 1).bfloat16()))

    def never(g, x):
        raise AssertionError("by pairs")

    monkeypatch.setattr(module, "weight_gradient", never)
    step("numba", x, weights)
    step(name, x[:, :1], weights)


def test_it_pays_where_every_side_fills_two_blocks():
    g, x = (torch.empty(MIN_SIZE, MIN_SIZE, dtype=torch.bfloat16) for _ in "gx")
    assert (
        worth_packing(g, x)
        and not worth_packing(g[1:], x[1:])
        and not worth_packing(g[:, 1:], x)
        and not worth_packing(g, x[:, 1:])
    )
