"""The perceptual and the adversarial loss: what they see, and their values by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanochameleon.images.losses import (
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
)

SEEDS = st.integers(0, 2**32 - 1)


def images(seed: int, b: int = 2, side: int = 16) -> torch.Tensor:
    return torch.rand(b, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Perceptual


@given(SEEDS, st.integers(0, 767), st.floats(0.01, 2))
def test_perceptual_is_zero_for_equal_images_and_positive_after_one_number_changes(seed, place, change):
    x = images(seed)
    y = x.clone()
    y.view(2, -1)[1, place] += change
    loss = PerceptualLoss()
    assert loss(x, x) == 0
    assert loss(x, y) > 0
    assert loss(x, y) == loss(x, y) == PerceptualLoss()(x, y)


ALTERNATE = torch.tensor([1.0, -1.0]).repeat(8)


@pytest.mark.parametrize(
    "difference",
    [torch.ones(16, 16), ALTERNATE.expand(16, 16), ALTERNATE[:, None].expand(16, 16), ALTERNATE[:, None] * ALTERNATE],
    ids=["plain", "across", "down", "checkerboard"],
)
def test_perceptual_has_no_blind_pattern(difference):
    x = images(0)
    assert PerceptualLoss()(x, x + 0.1 * difference) > 0.01


@given(SEEDS, st.floats(0.1, 3))
def test_perceptual_is_a_norm_of_the_difference(seed, scale):
    loss = PerceptualLoss()
    x, y, z = images(seed), images(seed + 1), images(seed + 2)
    torch.testing.assert_close(loss(scale * x, scale * y), scale * loss(x, y))
    torch.testing.assert_close(loss(x, y), loss(y, x))
    assert loss(x, z) <= loss(x, y) + loss(y, z) + 1e-5


def test_perceptual_of_a_ramp_by_hand():
    ramp = torch.arange(4.0).expand(1, 3, 4, 4)
    across, down = 0.75, 0  # slope 1 between, half of it in the first and the last column
    laplacian = 1 / 8  # a quarter in the first and the last column, 0 between
    coarsest = 1.5  # the mean of 0.5 and 2.5
    expected = (across + down + laplacian) / 3 + coarsest
    assert PerceptualLoss(n_scales=1)(ramp, torch.zeros(1, 3, 4, 4)).item() == pytest.approx(expected, rel=1e-6)


def test_perceptual_minds_a_moved_edge_more_than_a_tint_with_the_same_mean_error():
    x = torch.full((1, 3, 32, 32), -1.0)
    x[..., 16:] = 1
    moved = torch.full((1, 3, 32, 32), -1.0)
    moved[..., 17:] = 1
    tint = (moved - x).abs().mean()
    assert PerceptualLoss()(x, moved) > 2 * PerceptualLoss()(x, x + tint)


def test_perceptual_minds_blur_more_than_the_mean_error_does():
    """Between a blurred image and one with the same mean error spread evenly, only edges tell."""
    x = torch.full((1, 3, 32, 32), -1.0)
    x[..., 8:24, 8:24] = 1
    blurred = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    spread = x + (blurred - x).abs().mean()
    assert PerceptualLoss()(x, blurred) > 1.2 * PerceptualLoss()(x, spread)


def test_perceptual_can_be_descended():
    """Its gradient leads from noise to the target: no pattern is out of its reach."""
    target, x = images(1), images(2).requires_grad_()
    loss, optimizer = PerceptualLoss(), torch.optim.Adam([x], lr=0.02)
    first = loss(x, target).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss(x, target).backward()
        optimizer.step()
    assert loss(x, target).item() < 0.1 * first
    assert (x - target).abs().mean() < 0.1


def test_perceptual_has_nothing_to_store():
    assert not PerceptualLoss().state_dict()
    assert not list(PerceptualLoss().parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Adversarial


@pytest.mark.parametrize(("ch", "n_layers", "side"), [(8, 1, 16), (8, 2, 32), (12, 3, 64), (1, 5, 128)])
def test_discriminator_gives_a_logit_a_patch(ch, n_layers, side):
    logits = PatchDiscriminator(ch, n_layers)(images(0, 2, side))
    assert logits.shape == (2, 1, side // 2**n_layers - 2, side // 2**n_layers - 2)
    widest = max(m.out_channels for m in PatchDiscriminator(ch, n_layers).modules() if isinstance(m, nn.Conv2d))
    assert widest == ch * min(2**n_layers, 8)


def test_discriminator_judges_an_image_without_its_batch():
    torch.manual_seed(0)
    net = PatchDiscriminator(8, 2)
    x, other = images(3, 1, 32), images(4, 3, 32)
    torch.testing.assert_close(net(torch.cat([x, other]))[:1], net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_logit_sees_as_many_pixels_as_it_says(n_layers):
    torch.manual_seed(0)
    net = PatchDiscriminator(8, n_layers)
    net.layers = nn.Sequential(*(nn.Identity() if isinstance(m, nn.GroupNorm) else m for m in net.layers))
    x = images(5, 1, 64).requires_grad_()
    logits = net(x)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    seen = x.grad.abs().sum((0, 1)).sum(0).nonzero()
    assert seen.max() - seen.min() + 1 == 9 * 2**n_layers - 2


def test_hinge_values_by_hand():
    real, fake = torch.tensor([2.0, 1.0, 0.0, -3.0]), torch.tensor([-2.0, -1.0, 0.5])
    # real: 0, 0, 1, 4 -> 1.25; fake: 0, 0, 1.5 -> 0.5
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx((1.25 + 0.5) / 2)
    assert generator_loss(fake).item() == pytest.approx(2.5 / 3)


def test_a_discriminator_learns_to_tell_stripes_from_planes():
    torch.manual_seed(0)
    net = PatchDiscriminator(8, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(4, 3, 32, 32)
    planes = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    for _ in range(30):
        optimizer.zero_grad()
        hinge_discriminator_loss(net(stripes), net(planes)).backward()
        optimizer.step()
    assert net(stripes).mean() > 0.5
    assert net(planes).mean() < -0.5


# ---------------------------------------------------------------------------------------------------------------------
# Adaptive weight


@given(SEEDS, st.floats(-2, 2).map(lambda power: 10**power))
def test_adaptive_weight_makes_both_losses_pull_equally_on_the_last_layer(seed, scale):
    torch.manual_seed(seed)
    last, critic = nn.Conv2d(4, 3, 3, padding=1), PatchDiscriminator(4, 1)
    hidden, target = torch.randn(2, 4, 16, 16), images(seed)
    drawn = last(hidden)
    rec, gen = scale * (drawn - target).abs().mean(), generator_loss(critic(drawn))
    weight = adaptive_weight(rec, gen, last.weight)
    assert not weight.requires_grad
    (of_rec,) = torch.autograd.grad(rec, last.weight, retain_graph=True)
    (of_gen,) = torch.autograd.grad(weight * gen, last.weight, retain_graph=True)
    # the small number under the fraction is what is left between them
    small = weight.item() * 1e-4
    np.testing.assert_allclose(of_gen.norm().item() + small, of_rec.norm().item(), rtol=1e-4)
    (rec + weight * gen).backward()  # both graphs are still there


def test_adaptive_weight_has_its_limits():
    w = torch.ones(4, requires_grad=True)
    assert adaptive_weight(5 * w.sum(), 0 * w.sum(), w) == 1e4
    assert adaptive_weight(0 * w.sum(), w.sum(), w) == 0
    # gradients of norm 2 and 0: 2 / 1e-4 would be 20,000; of norm 2e-2 and 0: 200
    assert adaptive_weight(0.01 * w.sum(), 0 * w.sum(), w).item() == pytest.approx(200, rel=1e-4)
