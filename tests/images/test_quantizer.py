"""The nearest code, what gradients see of it, and a codebook that is used."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.images.quantizer import Quantizer, codebook_loss, commitment_loss, nearest_code, straight_through


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def problems(draw):
    """(vectors (N, E), codebook (K, E)) in float32, near zero or all of them far from it, codes possibly equal."""
    n, k, e = draw(st.integers(1, 20)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    generator = rng(draw(st.integers(0, 10_000)))
    size, offset = draw(st.sampled_from([1e-3, 1.0, 100.0])), draw(st.sampled_from([0.0, 10.0, -1_000.0, 30_000.0]))
    vectors, codebook = (offset + size * torch.randn(rows, e, generator=generator) for rows in (n, k))
    if draw(st.booleans()):
        codebook[-1] = codebook[0]
    return vectors, codebook


@given(problems())
def test_the_chosen_code_is_the_nearest_within_rounding(case):
    """Brute force in float64. The allowance is a few units of rounding of what the numbers are once centred."""
    vectors, codebook = case
    distances = torch.cdist(vectors.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = distances.gather(1, nearest_code(vectors, codebook)[:, None])[:, 0]
    centre = codebook.double().mean(0)
    largest = max((x.double() - centre).square().sum(1).max().item() for x in (vectors, codebook))
    apart = vectors.shape[1] * (codebook.abs().max().item() * 1e-7) ** 2  # the mean itself is rounded
    assert (chosen <= distances.amin(1) + 1e-5 * (largest + apart)).all()


@given(problems())
def test_a_row_of_the_codebook_is_its_own_code(case):
    codebook = case[1]
    codes = nearest_code(codebook, codebook)
    assert torch.equal(codebook[codes], codebook)


@given(st.integers(0, 1_000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_codes_stand_in_raster_order_and_carry_their_vectors(seed, b, side, e):
    torch.manual_seed(seed)
    quantizer = Quantizer(7, e)
    z = quantizer.embedding.weight.detach()[torch.randint(7, (b, side, side))]  # (B, h, w, E), every place a code
    codes = quantizer.codes(z.permute(0, 3, 1, 2))
    vectors = quantizer.lookup(codes, side)
    for i in range(b):
        for row in range(side):
            for column in range(side):
                assert torch.equal(quantizer.embedding.weight[codes[i, row * side + column]], z[i, row, column])
                assert torch.equal(vectors[i, :, row, column], z[i, row, column])


@given(st.integers(0, 1_000))
def test_straight_through_has_the_code_s_value_and_the_vector_s_gradient(seed):
    torch.manual_seed(seed)
    quantizer = Quantizer(5, 3).double()
    z = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    passed, codes, quantized = quantizer(z)
    torch.testing.assert_close(passed, quantizer.lookup(codes, 2), rtol=0, atol=1e-14)
    assert torch.equal(quantized, quantizer.lookup(codes, 2))
    upstream = torch.randn_like(passed)
    to_z, to_codebook = torch.autograd.grad(
        (passed * upstream).sum(), (z, quantizer.embedding.weight), allow_unused=True
    )
    assert torch.equal(to_z, upstream) and to_codebook is None


def test_straight_through_of_a_code_far_away():
    vectors, code = torch.tensor([1.0], requires_grad=True), torch.tensor([5.0], requires_grad=True)
    (3 * straight_through(vectors, code)).backward()
    assert vectors.grad.item() == 3 and code.grad is None


def test_each_loss_pulls_one_side_only():
    """beta multiplies the commitment term, the one that moves the encoder, by 2 (v - q) / n."""
    v, q = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([4.0, 0.0], requires_grad=True)
    for loss, moves, stays in ((commitment_loss, v, q), (codebook_loss, q, v)):
        v.grad = q.grad = None
        value = loss(v, q)
        value.backward()
        assert value.item() == pytest.approx(6.5) and stays.grad is None
        assert torch.equal(moves.grad, (moves - stays).detach())


# ---------------------------------------------------------------------------------------------------------------------
# Moving averages


def as_latents(vectors: torch.Tensor) -> torch.Tensor:
    """(N, E) -> (N, E, 1, 1)"""
    return vectors[:, :, None, None]


@given(st.integers(0, 1_000), st.floats(0.0, 0.99))
def test_moving_averages_take_each_code_towards_the_mean_of_its_vectors(seed, decay):
    torch.manual_seed(seed)
    quantizer, flat = Quantizer(4, 3), torch.randn(12, 3)
    before = quantizer.embedding.weight.detach().clone()
    codes = quantizer.codes(as_latents(flat))
    quantizer.update_averages(as_latents(flat), codes, decay, 0.0, rng(0))
    for code in range(4):
        mine = flat[codes[:, 0] == code]
        if len(mine):  # starts as one use of its old value
            expected = (decay * before[code] + (1 - decay) * mine.sum(0)) / (decay + (1 - decay) * len(mine))
            torch.testing.assert_close(quantizer.embedding.weight[code].detach(), expected, rtol=1e-4, atol=1e-5)


def test_moving_averages_settle_on_the_means():
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0]])
    flat = (centres[:, None] + 0.1 * torch.randn(3, 50, 2, generator=rng(0))).flatten(0, 1)
    quantizer = Quantizer(3, 2)
    quantizer.embedding.weight.data.copy_(centres * 0.5)
    quantizer.sums.copy_(quantizer.embedding.weight)
    for _ in range(200):
        quantizer.update_averages(as_latents(flat), quantizer.codes(as_latents(flat)), 0.9, 0.0, rng(0))
    torch.testing.assert_close(quantizer.embedding.weight.detach(), flat.view(3, 50, 2).mean(1), rtol=0, atol=1e-4)


@given(st.integers(0, 1_000), st.floats(0.05, 0.85))
def test_revival_puts_every_dead_code_onto_a_vector_of_the_batch(seed, min_count):
    torch.manual_seed(seed)
    quantizer, flat = Quantizer(16, 3), 5 + torch.randn(6, 3)
    moved = 0
    for _ in range(30):
        codes = quantizer.codes(as_latents(flat))
        dead = quantizer.counts.lerp(F.one_hot(codes[:, 0], 16).sum(0).float(), 1 - 0.9) < min_count
        quantizer.update_averages(as_latents(flat), codes, 0.9, min_count, rng(seed))
        assert (quantizer.counts[dead] == 1).all() and (quantizer.counts >= min_count).all()
        for vector in quantizer.embedding.weight.detach()[dead]:
            assert (vector == flat).all(1).any()
        moved += int(dead.sum())
    assert moved  # 16 codes on 6 vectors: some must have died


@pytest.mark.parametrize("seed", range(5))
def test_revival_ends_with_a_code_for_every_vector(seed):
    """From the usual start, where all codes lie near zero and one of them takes every vector."""
    torch.manual_seed(seed)
    quantizer, flat = Quantizer(16, 3), 5 + torch.randn(8, 3)
    assert len(quantizer.codes(as_latents(flat)).unique()) < 4
    generator = rng(seed)
    for _ in range(150):
        quantizer.update_averages(as_latents(flat), quantizer.codes(as_latents(flat)), 0.8, 0.5, generator)
    torch.testing.assert_close(
        quantizer.lookup(quantizer.codes(as_latents(flat)), 1)[..., 0, 0], flat, atol=1e-3, rtol=0
    )


def test_revival_is_repeatable():
    flat = torch.randn(8, 3, generator=rng(1))
    books = []
    for _ in range(2):
        torch.manual_seed(0)
        quantizer = Quantizer(16, 3)
        quantizer.update_averages(as_latents(flat), quantizer.codes(as_latents(flat)), 0.5, 0.6, rng(5))
        books.append(quantizer.embedding.weight.detach().clone())
    assert torch.equal(*books)


# ---------------------------------------------------------------------------------------------------------------------
# The start by k-means


@given(
    st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.sampled_from([1e-6, 1.0, 1e4]), st.integers(0, 1_000)
)
def test_with_as_many_different_vectors_as_codes_each_becomes_one(k, e, repeats, size, seed):
    """However often each vector occurs, and however small they are."""
    different = size * torch.randn(k, e, generator=rng(seed))
    quantizer = Quantizer(k, e)
    quantizer.init_kmeans(different.repeat(repeats, 1), 3, rng(seed))
    codes = nearest_code(different, quantizer.embedding.weight.detach())
    assert len(codes.unique()) == len(different.unique(dim=0))
    torch.testing.assert_close(quantizer.embedding.weight[codes].detach(), different, rtol=1e-5, atol=1e-6 * size)
    assert torch.equal(quantizer.sums, quantizer.embedding.weight) and (quantizer.counts == 1).all()


@given(st.integers(0, 1_000))
def test_a_start_on_clusters_finds_their_means(seed):
    generator = rng(seed)
    centres = 100 * torch.eye(6)
    flat = (centres[:, None] + torch.randn(6, 20, 6, generator=generator)).flatten(0, 1)
    quantizer = Quantizer(6, 6)
    quantizer.init_kmeans(flat[torch.randperm(120, generator=generator)], 4, generator)
    found = quantizer.embedding.weight.detach()[nearest_code(centres, quantizer.embedding.weight.detach())]
    torch.testing.assert_close(found, flat.view(6, 20, 6).mean(1), rtol=0, atol=1e-3)


def test_a_start_on_fewer_vectors_than_codes():
    quantizer = Quantizer(8, 2)
    quantizer.init_kmeans(torch.ones(3, 2), 3, rng(0))
    assert torch.equal(quantizer.embedding.weight.detach(), torch.ones(8, 2))
