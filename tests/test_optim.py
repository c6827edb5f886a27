"""Who decays, what the learning rate is at each step, and that AdamW is the one of the paper."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanochameleon.config import OptimConfig
from nanochameleon.errors import UserError
from nanochameleon.optim import clip, decay_groups, learning_rate, make_adamw

schedules = st.sampled_from(["exponential", "cosine", "constant"])
configs = st.builds(
    OptimConfig,
    lr=st.floats(1e-5, 1e-2),
    warmup=st.integers(0, 40),
    schedule=schedules,
    final=st.floats(1e-3, 1.0),
)


class Odd(nn.Module):
    """A matrix, a tied matrix, a convolution, a norm, and QK-norm vectors of shape (groups, head_dim)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.output = nn.Linear(4, 7)
        self.output.weight = self.embedding.weight
        self.conv = nn.Conv2d(3, 4, 3)
        self.block = nn.ModuleDict({"norm": nn.LayerNorm(4)})
        self.q_norm_weight = nn.Parameter(torch.ones(2, 8))
        self.k_norm = nn.ParameterDict({"bias": torch.zeros(2, 8)})


def test_every_parameter_is_in_one_group_once_and_only_matrices_decay():
    model = Odd()
    decay, keep = decay_groups(model, 0.1)
    ids = [id(p) for group in (decay, keep) for p in group["params"]]
    assert sorted(ids) == sorted({id(p) for p in model.parameters()})
    assert decay["weight_decay"] == 0.1 and keep["weight_decay"] == 0.0
    assert {id(p) for p in decay["params"]} == {id(model.embedding.weight), id(model.conv.weight)}


@given(configs, st.integers(1, 200))
def test_warm_up_rises_and_what_follows_never_does(cfg, extra):
    total = cfg.warmup + extra
    rates = [learning_rate(step, total, cfg) for step in range(total)]
    assert all(a < b for a, b in pairwise(rates[: cfg.warmup + 1]))
    after = rates[cfg.warmup :]
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(after))


@given(configs, st.integers(2, 200))
def test_the_rate_stays_between_floor_and_peak_and_ends_where_it_should(cfg, extra):
    total = cfg.warmup + extra
    rates = [learning_rate(step, total, cfg) for step in range(total)]
    assert rates[cfg.warmup] == cfg.lr == max(rates)
    assert rates[0] > 0 and min(rates[cfg.warmup :]) >= cfg.lr * cfg.final * (1 - 1e-9)
    end = cfg.lr if cfg.schedule == "constant" else cfg.lr * cfg.final
    assert math.isclose(rates[-1], end, rel_tol=1e-9)


@given(schedules)
def test_the_rate_is_continuous_where_warm_up_meets_decay(schedule):
    cfg = OptimConfig(lr=1.0, warmup=1_000, schedule=schedule, final=0.01)
    before, at, after = (learning_rate(step, 5_000, cfg) for step in (999, 1_000, 1_001))
    assert abs(at - before) < 2e-3 and abs(after - at) < 2e-3


def test_an_exponential_falls_by_the_same_factor_each_step():
    cfg = OptimConfig(warmup=3, schedule="exponential", final=0.01)
    rates = [learning_rate(step, 104, cfg) for step in range(3, 104)]
    assert rates[50] / rates[49] == pytest.approx(rates[1] / rates[0]) == pytest.approx(0.01 ** (1 / 100))


def test_cosine_is_half_way_at_half_time():
    cfg = OptimConfig(lr=1.0, warmup=0, schedule="cosine", final=0.2)
    assert learning_rate(50, 101, cfg) == pytest.approx(0.6)


def test_an_exponential_to_zero_is_refused_by_name_and_a_cosine_to_zero_is_not():
    with pytest.raises(UserError, match=r"optim\.final"):
        learning_rate(0, 10, OptimConfig(schedule="exponential", final=0.0))
    assert learning_rate(9, 10, OptimConfig(schedule="cosine", final=0.0, warmup=0)) == pytest.approx(0)


def adamw_by_hand(p, grads, lrs, betas, eps, decay):
    """Loshchilov and Hutter 2019, algorithm 2, in float64: decoupled decay, bias-corrected moments, eps outside."""
    m = v = torch.zeros_like(p)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        p = p - lr * decay * p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p


@given(st.integers(0, 10_000), st.floats(1e-7, 1.0))
def test_adamw_is_the_update_written_by_hand_with_the_papers_eps(seed, size):
    """Gradients down to 1e-7 are below eps 1e-5, where torch's default eps of 1e-8 would give another step."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 2).double()
    cfg = OptimConfig(lr=1e-2, warmup=2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: [size * torch.randn(p.shape, generator=generator).double() for _ in range(5)]
             for name, p in model.named_parameters()}  # fmt: skip
    lrs = [learning_rate(step, 5, cfg) for step in range(5)]
    optimizer = make_adamw(model, cfg)
    for step, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in model.named_parameters():
            p.grad = grads[name][step].clone()
        optimizer.step()
    for name, decay in (("weight", 0.1), ("bias", 0.0)):
        expected = adamw_by_hand(start[name], grads[name], lrs, (0.9, 0.95), 1e-5, decay)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-10, atol=1e-12)


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=6), st.floats(0.1, 10))
def test_clipping_is_global_keeps_the_direction_and_returns_the_norm_before(values, max_norm):
    parameters = [nn.Parameter(torch.zeros(1)) for _ in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor([value])
    norm = math.sqrt(sum(v * v for v in values))
    assert clip(parameters, max_norm) == pytest.approx(norm, rel=1e-5, abs=1e-30)
    scale = min(1.0, max_norm / norm) if norm else 1.0
    assert [p.grad.item() for p in parameters] == pytest.approx([v * scale for v in values], rel=1e-4, abs=1e-6)
