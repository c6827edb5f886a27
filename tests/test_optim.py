"""Who decays, what the learning rate is at each step, that AdamW is the one of the paper and Muon the one it says."""

import importlib
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanochameleon import optim
from nanochameleon.config import ModelConfig, OptimConfig, VQGANConfig
from nanochameleon.errors import UserError
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.optim import (
    Muon,
    clip_gradients,
    decay_groups,
    learning_rate,
    make_adamw,
    make_optimizer,
    orthogonalize,
)
from nanochameleon.training.checkpoint import load, save
from nanochameleon.training.restore import load_optimizer, optimizer_tensors
from nanochameleon.transformer import Chameleon

schedules = st.sampled_from(["exponential", "cosine", "constant"])
configs = st.builds(
    OptimConfig,
    lr=st.floats(1e-5, 1e-2),
    warmup_steps=st.integers(0, 40),
    schedule=schedules,
    min_lr_ratio=st.floats(1e-3, 1.0),
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
    total = cfg.warmup_steps + extra
    rates = [learning_rate(step, total, cfg) for step in range(total)]
    assert all(a < b for a, b in pairwise(rates[: cfg.warmup_steps + 1]))
    after = rates[cfg.warmup_steps :]
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(after))


@given(configs, st.integers(2, 200))
def test_the_rate_stays_between_floor_and_peak_and_ends_where_it_should(cfg, extra):
    total = cfg.warmup_steps + extra
    rates = [learning_rate(step, total, cfg) for step in range(total)]
    assert rates[cfg.warmup_steps] == cfg.lr == max(rates)
    assert rates[0] > 0 and min(rates[cfg.warmup_steps :]) >= cfg.lr * cfg.min_lr_ratio * (1 - 1e-9)
    end = cfg.lr if cfg.schedule == "constant" else cfg.lr * cfg.min_lr_ratio
    assert math.isclose(rates[-1], end, rel_tol=1e-9)


@given(schedules)
def test_the_rate_is_continuous_where_warm_up_meets_decay(schedule):
    cfg = OptimConfig(lr=1.0, warmup_steps=1_000, schedule=schedule, min_lr_ratio=0.01)
    before, at, after = (learning_rate(step, 5_000, cfg) for step in (999, 1_000, 1_001))
    assert abs(at - before) < 2e-3 and abs(after - at) < 2e-3


def test_an_exponential_falls_by_the_same_factor_each_step():
    cfg = OptimConfig(warmup_steps=3, schedule="exponential", min_lr_ratio=0.01)
    rates = [learning_rate(step, 104, cfg) for step in range(3, 104)]
    assert rates[50] / rates[49] == pytest.approx(rates[1] / rates[0]) == pytest.approx(0.01 ** (1 / 100))


def test_cosine_is_half_way_at_half_time():
    cfg = OptimConfig(lr=1.0, warmup_steps=0, schedule="cosine", min_lr_ratio=0.2)
    assert learning_rate(50, 101, cfg) == pytest.approx(0.6)


def test_an_exponential_to_zero_is_refused_by_name_and_a_cosine_to_zero_is_not():
    with pytest.raises(UserError, match=r"optim\.min_lr_ratio"):
        learning_rate(0, 10, OptimConfig(schedule="exponential", min_lr_ratio=0.0))
    assert learning_rate(9, 10, OptimConfig(schedule="cosine", min_lr_ratio=0.0, warmup_steps=0)) == pytest.approx(0)


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
    cfg = OptimConfig(lr=1e-2, warmup_steps=2)
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
    assert clip_gradients(parameters, max_norm) == pytest.approx(
        norm, rel=1e-5, abs=1e-18
    )  # squares below 1e-38 vanish
    scale = min(1.0, max_norm / norm) if norm else 1.0
    assert [p.grad.item() for p in parameters] == pytest.approx([v * scale for v in values], rel=1e-4, abs=1e-6)


# --- Muon ------------------------------------------------------------------------------------------------------------

MUON = OptimConfig("muon", lr=1e-2, eps=1e-8, weight_decay=0.1)


@given(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24), st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_orthogonalizing_brings_singular_values_near_1_and_keeps_the_directions(n, rows, columns, seed, size):
    """Any shape and scale: from singular values a hundred times apart to 0.6 .. 1.3, in the same singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(n, rows, small, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(n, columns, small, generator=generator))
    values = torch.logspace(0, -2, small)[torch.randperm(small, generator=generator)]
    result = orthogonalize(size * (u * values) @ v.mT)
    inner = u.mT @ result @ v
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert result.shape == (n, rows, columns) and diagonal.min() > 0.6 and diagonal.max() < 1.3
    torch.testing.assert_close(inner, torch.diag_embed(diagonal), rtol=0, atol=1e-3)
    torch.testing.assert_close(u @ inner @ v.mT, result, rtol=0, atol=1e-3)  # nothing outside of them


def test_no_gradient_is_no_update():
    assert not orthogonalize(torch.zeros(2, 3, 5)).any()


class Mixed(nn.Module):
    """Two matrices of one shape, one wide, a convolution, embeddings, an output layer, a norm, QK-norm vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(7, 4)
        self.one, self.two, self.wide = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4, bias=False)
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.LayerNorm(4)
        self.q_norm_weight = nn.Parameter(torch.ones(2, 8))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        self.output = nn.Linear(4, 7, bias=False)


MATRICES = {"one.weight", "two.weight", "wide.weight", "conv.weight"}


def gradients(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in trainable.items()}


def take_step(optimizer: torch.optim.Optimizer, model: nn.Module, step: int, lr: float) -> None:
    for name, gradient in gradients(model, step).items():
        model.get_parameter(name).grad = gradient
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def muon_by_hand(p, grads, lrs, decay):
    """One matrix alone, in float64: momentum 0.95 with Nesterov's look ahead, orthogonalized, 0.2 sqrt(longer side)."""
    mean = torch.zeros_like(p)
    for g, lr in zip(grads, lrs, strict=True):
        mean = 0.95 * mean + 0.05 * g
        ahead = (0.05 * g + 0.95 * mean).reshape(len(p), -1)
        update = orthogonalize(ahead[None])[0] * 0.2 * math.sqrt(max(ahead.shape))
        p = p * (1 - lr * decay) - lr * update.reshape(p.shape)
    return p


def test_muon_is_the_update_written_by_hand_and_adamw_without_decay_for_the_rest():
    model = Mixed().double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, lrs = make_optimizer(model, MUON), [1e-2, 2e-2, 5e-3, 1e-2]
    for step, lr in enumerate(lrs):
        take_step(optimizer, model, step, lr)
    for name, parameter in model.named_parameters():
        grads = [gradients(model, step)[name] for step in range(4)] if parameter.requires_grad else []
        if name in MATRICES:
            expected = muon_by_hand(start[name], grads, lrs, 0.1)
        else:
            expected = adamw_by_hand(start[name], grads, lrs, (0.9, 0.95), 1e-8, 0.0) if grads else start[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-10, msg=name)


def test_a_muon_step_is_about_as_long_as_one_of_adamw():
    """The reason for its scale: one learning rate for both kinds of parameters."""
    for shape in ((64, 64), (16, 256), (256, 16)):
        model = nn.Linear(shape[1], shape[0], bias=False)
        before = model.weight.detach().clone()
        take_step(Muon(model, OptimConfig("muon", weight_decay=0.0)), model, 0, 1.0)
        assert 0.1 < (model.weight.detach() - before).square().mean().sqrt() < 0.3


SMALL_VQGAN = VQGANConfig(
    resolution=8, ch=4, ch_mult=(1, 1), n_res_blocks=1, z_channels=4, embed_dim=4, n_codes=5, n_groups=2
)


def small_models() -> dict[str, nn.Module]:
    chameleon = Chameleon(ModelConfig(vocab_size=300, dim=8, n_layers=2, n_heads=2, multiple_of=4))
    return {"mixed": Mixed(), "transformer": chameleon, "image tokenizer": VQGAN(SMALL_VQGAN)}


@pytest.mark.parametrize("kind", ["mixed", "transformer", "image tokenizer"])
def test_muon_has_every_parameter_once_and_rows_that_are_separate_take_adamw(kind):
    model = small_models()[kind]
    matrices, rest = Muon(model, MUON).param_groups
    assert matrices["orthogonal"] and not rest["orthogonal"]
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    got = [[names[id(p)] for p in group["params"]] for group in (matrices, rest)]
    assert sorted(got[0] + got[1]) == sorted(names.values())
    separate = ("tok_embeddings", "output.", "quantize.embedding")
    expected = {
        name
        for name in names.values()
        if name.endswith("weight") and "norm" not in name and not name.startswith(separate)
    }
    assert set(got[0]) == expected and expected


def test_muon_continues_bitwise_from_its_saved_state(tmp_path):
    """Invariant 21 for the optimizer alone: 3 steps, save, load into a new one, 3 steps; against 6 steps."""
    whole, stopped, resumed = Mixed(), Mixed(), Mixed()
    for model, steps in ((whole, range(6)), (stopped, range(3))):
        optimizer = Muon(model, MUON)
        for step in steps:
            take_step(optimizer, model, step, 1e-2)
    save(tmp_path, 3, {"model": stopped.state_dict(), "optim": optimizer_tensors(optimizer, stopped)}, {})
    tensors, _ = load(tmp_path)
    resumed.load_state_dict(tensors["model"])
    optimizer = Muon(resumed, MUON)
    load_optimizer(optimizer, resumed, tensors["optim"])
    for step in range(3, 6):
        take_step(optimizer, resumed, step, 1e-2)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_the_name_of_the_optimizer_decides():
    assert isinstance(make_optimizer(Mixed(), MUON), Muon)
    assert isinstance(make_optimizer(Mixed(), OptimConfig()), torch.optim.AdamW)


@pytest.mark.parametrize("cfg", [MUON, OptimConfig()], ids=lambda cfg: cfg.name)
def test_all_state_is_on_its_parameter_s_device_after_a_step_and_after_loading(cfg, monkeypatch):
    """The meta device stands in for a GPU, where the fused AdamW refuses a step count on the CPU."""
    monkeypatch.setattr(optim, "can_fuse", lambda _: True)
    monkeypatch.setattr(optim, "orthogonalize", lambda matrices: matrices)  # autocast does not know this device
    monkeypatch.setattr(
        importlib.import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None
    )
    on_cpu, on_meta = Mixed(), Mixed().to("meta")
    optimizers = [make_optimizer(model, cfg) for model in (on_cpu, on_meta, on_meta)]
    take_step(optimizers[0], on_cpu, 0, 1e-2)
    for parameter in on_meta.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers[1].step()
    load_optimizer(optimizers[2], on_meta, optimizer_tensors(optimizers[0], on_cpu))
    for optimizer in optimizers:
        fields = [(p, x) for p, state in optimizer.state.items() for x in state.values()]
        assert len(fields) > 10 and all(x.device == p.device for p, x in fields)
        optimizer.step()  # none is left on the CPU that the fused update would refuse
