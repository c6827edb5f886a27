"""Dropout by a hash: as often as asked, independent over rows, places and seeds, and the same each time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.kernels.block.dropout import dropout, fold_in, keep_mask

SIGMAS = 5  # of a count of independent draws


def close_to(share: torch.Tensor, expected: float, n: int) -> bool:
    return bool((share - expected).abs().max() < SIGMAS * (expected * (1 - expected) / n) ** 0.5)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("seeds", [torch.arange(1_000), torch.arange(1_000) << 32, torch.arange(1_000) * 2**40 + 7])
def test_every_sample_and_position_is_dropped_as_often_as_requested(p, seeds):
    dropped = ~keep_mask(torch.Size((1_000, 30, 40)), fold_in(seeds, 3), p).flatten(1)
    share = dropped.float()
    assert close_to(share.mean(1), p, 1_200) and close_to(share.mean(0), p, 1_000)
    for other in (dropped.roll(1, 0), dropped.roll(1, 1), dropped.roll(40, 1), dropped.roll(37, 0)):
        assert close_to((dropped & other).float().mean()[None], p * p, dropped.numel())


@pytest.mark.parametrize("bit", [0, 1, 13, 31, 32, 45, 62])
def test_keys_that_differ_in_one_bit_draw_independently(bit):
    seeds = torch.randint(2**62, (500,), generator=torch.Generator().manual_seed(bit))
    one, other = (keep_mask(torch.Size((500, 2_000)), fold_in(k, 0), 0.5) for k in (seeds, seeds ^ (1 << bit)))
    assert close_to((one == other).float().mean()[None], 0.5, one.numel())
    assert close_to((one == other).float().mean(1), 0.5, 2_000)


@given(st.integers(0, 2**62), st.integers(0, 50), st.integers(0, 50))
def test_folded_seeds_differ(key, a, b):
    assert (fold_in(torch.tensor([key]), a) == fold_in(torch.tensor([key]), b)).item() == (a == b)


def test_fold_in_is_splitmix64():
    """The published generator's first numbers from the seed 1234567 (Vigna's reference)."""
    numbers = [int(fold_in(torch.tensor([1234567]), i)) % 2**64 for i in range(3)]
    assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_grows_so_that_the_mean_stays_and_gradients_go_the_same_way(dtype):
    x = torch.ones(4, 50, 60, dtype=dtype, requires_grad=True)
    y = dropout(x, fold_in(torch.arange(4), 0), 0.25)
    assert y.dtype == dtype and set(y.unique().tolist()) == {0.0, torch.tensor(4 / 3, dtype=dtype).item()}
    assert abs(y.float().mean().item() - 1) < 0.02
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
