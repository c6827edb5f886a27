"""AdamW as the paper uses it (section 2.3), and Muon for small budgets: weight decay, learning rate, clipping.

The loop is not here. train.py sets the learning rate before each step, as a pure function of the step. So there is no
scheduler state to save.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nanochameleon.config import OptimConfig
from nanochameleon.errors import UserError
from nanochameleon.parallel.sharding import full_tensor, shard_like

MAX_NONFINITE_STEPS = 10  # after so many in a row a run returns to its last checkpoint (training/recovery.py)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and convolutions, but not to norms and biases.

    The shape alone cannot tell: QK-norm vectors are (groups, head_dim), two dimensions, and must stay free.
    """
    return parameter.ndim >= 2 and "norm" not in name and not name.endswith("bias")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups, with and without decay. Every trainable parameter is in exactly one, shared ones once."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if decays(name, parameter) else keep).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether torch has a fused AdamW for these.

    On one CPU core a step over 2M parameters took 1.8 ms, the plain loop 5.4 ms and the foreach version 7.7 ms.
    """
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Muon


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix (N, rows, columns) close to 1, by Newton-Schulz iteration.

    Each step applies the odd polynomial a x + b x^3 + c x^5 to every singular value. The coefficients are those of
    Muon's author: they bring anything in [0.002, 1] to between 0.68 and 1.21 in five steps, exact enough for an update.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    kind, tall = matrices.device.type, matrices.shape[1] > matrices.shape[2]
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values are at most 1
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):  # all have their dtype already; autocast would check each matmul
        for _ in range(steps):
            # Three matmuls: X X^T, then b A + c A A, then a X + (b A + c A A) X. The smaller side is squared, so that
            # tall matrices need no transposed copy.
            gram = x.mT @ x if tall else x @ x.mT
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose update for each matrix is orthogonalized (Keller Jordan's Muon, 2024), AdamW for the rest.

    All directions of a matrix move equally far, where Adam follows the few strong ones. After 300 steps the toy's image
    autoencoder has a squared error of 0.005, and of 0.038 with AdamW at its best rate (docs/log.md). Convolutions
    (out, in, h, w) are matrices (out, in*h*w). The update is scaled by 0.2 sqrt(longer side) (Moonlight, arXiv
    2502.16982). So it is as large as AdamW's, and both share one learning rate. Embeddings and the output layer, whose
    rows are independent, take AdamW without decay: `weight_decay` applies to the other matrices only.
    """

    def __init__(self, model: nn.Module, cfg: OptimConfig, momentum: float = 0.95):
        matrices, rest = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                independent_rows = name.startswith(("tok_embeddings", "output")) or "embedding" in name
                (matrices if decays(name, parameter) and not independent_rows else rest).append(parameter)
        # torch's load_state_dict moves AdamW's step counts to the device only where a group says that it is fused
        adam = {"params": rest, "orthogonal": False, "fused": can_fuse(rest)}
        groups = [{"params": matrices, "orthogonal": True}, adam]
        defaults = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps, "momentum": momentum}
        super().__init__(groups, defaults | {"weight_decay": cfg.weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                self.step_matrices(with_gradient, group)
            elif with_gradient:
                self.step_adam(with_gradient, group)

    def step_matrices(self, parameters: list[nn.Parameter], group: dict) -> None:
        """Matrices of one shape go through the iteration together; sharded ones are first gathered on every rank."""
        # Small matrices one by one would leave the processor idle, so those of one shape are stacked.
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault((len(parameter), parameter.shape[1:].numel()), []).append(parameter)
        for shape, same in by_shape.items():
            updates = torch.stack([full_tensor(self.momentum(p, group["momentum"])).reshape(shape) for p in same])
            rate = group["lr"] * 0.2 * max(shape) ** 0.5  # an update as large as AdamW's
            for parameter, update in zip(same, orthogonalize(updates), strict=True):
                if group["weight_decay"]:  # decoupled, as in AdamW
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(shard_like(update.view(parameter.shape), parameter), alpha=-rate)

    def momentum(self, parameter: nn.Parameter, beta: float) -> Tensor:
        """Nesterov momentum: the gradient, moved towards its updated running mean."""
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        state["mean"].lerp_(parameter.grad, 1 - beta)
        return parameter.grad.lerp(state["mean"], beta)

    def step_adam(self, parameters: list[nn.Parameter], group: dict) -> None:
        """AdamW without decay (arXiv 1711.05101), all parameters in one call."""
        for parameter in parameters:
            if not self.state[parameter]:
                mean, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
                step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")  # as torch's AdamW does
                self.state[parameter] |= {"step": step, "mean": mean, "square": square}
        states = [self.state[parameter] for parameter in parameters]
        means, squares, steps = ([state[key] for state in states] for key in ("mean", "square", "step"))
        adamw(
            parameters, [p.grad for p in parameters], means, squares, [], steps, fused=group["fused"],
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=0.0, eps=group["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The paper's optimizer


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    return Muon(model, cfg) if cfg.name == "muon" else make_adamw(model, cfg)


def make_adamw(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over decay_groups at the peak learning rate."""
    groups = decay_groups(model, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=can_fuse(model.parameters()))


def learning_rate(step: int, total_steps: int, cfg: OptimConfig) -> float:
    """The learning rate of step 0 .. total_steps - 1: the peak at step `warmup_steps`, min_lr_ratio * peak at the last.

    A run shorter than its warm-up never reaches the peak. Raises UserError where an exponential would have to reach 0.
    """
    if cfg.schedule == "exponential" and cfg.min_lr_ratio <= 0:
        raise UserError(
            f"optim.min_lr_ratio is {cfg.min_lr_ratio}; an exponential never reaches zero: give a ratio such as 0.01"
        )
    # 1. linear warm-up; + 1 so that the first step already moves
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / (cfg.warmup_steps + 1)
    # 2. decay from the peak, progress 0, to the last step, progress 1
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, total_steps - 1 - cfg.warmup_steps))
    if cfg.schedule == "exponential":
        return cfg.lr * cfg.min_lr_ratio**progress
    if cfg.schedule == "cosine":
        return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2)
    # 3. constant: the peak until the end
    return cfg.lr


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients so that their global norm is at most max_norm. Returns the norm before that.

    Check the norm before stepping: if it is not finite, neither are the gradients.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    total = float(full_tensor(norm))  # over all shards
    if not total <= max_norm:  # also for NaN; torch itself would multiply by 1 where nothing needs clipping
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return total
