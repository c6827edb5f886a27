"""AdamW as the paper uses it (section 2.3), and Muon for small budgets: who decays, the learning rate, clipping.

It leaves out the loop: train.py sets the learning rate before each step, as a pure function of the step, so there is no
scheduler whose state would have to be saved.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nanochameleon.config import OptimConfig
from nanochameleon.errors import UserError

TOO_MANY = 10  # steps in a row without a finite loss after which a run gives up


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and convolutions decay; norms and biases do not.

    The shape alone cannot tell: QK-norm vectors are (groups, head_dim), two dimensions, and must stay free.
    """
    return parameter.ndim >= 2 and "norm" not in name and not name.endswith("bias")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups, decaying and not; every trainable parameter is in exactly one of them, once if shared."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if decays(name, parameter) else keep).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


# ---------------------------------------------------------------------------------------------------------------------
# Muon


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """(N, rows, columns) -> nearly the nearest matrices whose singular values are all 1, by Newton-Schulz iteration.

    Each step is the odd polynomial a x + b x^3 + c x^5 of every singular value, with the coefficients of Muon's author,
    which bring anything in [0.002, 1] to between 0.68 and 1.21 in five steps: fast, and exact enough for an update.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update for each matrix is orthogonalized (Keller Jordan's Muon, 2024), AdamW for the rest.

    All directions of a matrix move equally far, where Adam follows the few strong ones. In the toy world the image
    tokenizer needs a tenth of AdamW's steps (docs/log.md). Convolutions (out, in, h, w) are matrices (out, in*h*w).
    The update is scaled by 0.2 sqrt(the longer side) (Moonlight, arXiv 2502.16982), so that its size is that of
    AdamW's and both share one learning rate. Embeddings and the output layer, whose rows are separate, take AdamW
    without decay: `weight_decay` is on the other matrices alone.
    """

    def __init__(self, model: nn.Module, cfg: OptimConfig, momentum: float = 0.95):
        matrices, rest = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                by_row = name.startswith(("tok_embeddings", "output")) or "embedding" in name
                (matrices if decays(name, parameter) and not by_row else rest).append(parameter)
        groups = [{"params": matrices, "orthogonal": True}, {"params": rest, "orthogonal": False}]
        defaults = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps, "momentum": momentum}
        super().__init__(groups, defaults | {"weight_decay": cfg.weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                self.step_matrices(with_gradient, group)
            else:
                for parameter in with_gradient:
                    self.step_adam(parameter, group)

    def step_matrices(self, parameters: list[nn.Parameter], group: dict) -> None:
        """Matrices of one shape go through the iteration together."""
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
        for shape, same in by_shape.items():
            updates = torch.stack([self.momentum(p, group["momentum"]).reshape(shape) for p in same])
            updates = orthogonalize(updates) * (0.2 * max(shape) ** 0.5)
            for parameter, update in zip(same, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"])

    def momentum(self, parameter: nn.Parameter, beta: float) -> Tensor:
        """The gradient looking one step ahead along its running mean (Nesterov)."""
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        state["mean"].lerp_(parameter.grad, 1 - beta)
        return parameter.grad.lerp(state["mean"], beta)

    def step_adam(self, parameter: nn.Parameter, group: dict) -> None:
        """AdamW without decay (arXiv 1711.05101)."""
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["mean"].lerp_(parameter.grad, 1 - beta1)
        state["square"].lerp_(parameter.grad.square(), 1 - beta2)
        t = float(state["step"])
        spread = (state["square"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], spread, value=-group["lr"] / (1 - beta1**t))


# ---------------------------------------------------------------------------------------------------------------------
# The paper's optimizer


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    return Muon(model, cfg) if cfg.name == "muon" else make_adamw(model, cfg)


def make_adamw(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over decay_groups at the peak learning rate.

    Fused wherever torch has it: on one CPU core a step over 2M parameters took 1.8 ms, the plain loop 5.4 ms and the
    foreach version 7.7 ms.
    """
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters())
    groups = decay_groups(model, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=fused)


def learning_rate(step: int, total_steps: int, cfg: OptimConfig) -> float:
    """The learning rate of step 0 .. total_steps - 1; step `warmup` has the peak, the last one has final * peak.

    A run shorter than its warm-up never leaves it. Raises UserError where an exponential would have to reach zero.
    """
    if cfg.schedule == "exponential" and cfg.final <= 0:
        raise UserError(f"optim.final is {cfg.final}; an exponential never reaches zero, give a share such as 0.01")
    # 1. linear warm-up; + 1 so that the first step already moves
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / (cfg.warmup + 1)
    # 2. decay from the peak, progress 0, to the last step, progress 1
    progress = min(1.0, (step - cfg.warmup) / max(1, total_steps - 1 - cfg.warmup))
    if cfg.schedule == "exponential":
        return cfg.lr * cfg.final**progress
    if cfg.schedule == "cosine":
        return cfg.lr * (cfg.final + (1 - cfg.final) * (1 + math.cos(math.pi * progress)) / 2)
    # 3. constant: the peak until the end
    return cfg.lr


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients together so that their global norm is at most max_norm; returns the norm before that.

    A norm that is not finite leaves gradients that are not: look at it before stepping.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of sharded gradients: of all shards
