"""Lesson 4's exercises, solved: the transformer's forward pass for one packed sequence, from a plain state_dict.

T tokens, D the model's width, H query heads, G key and value heads, E the width of a head, V the vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.config import ModelConfig

Weights = dict[str, Tensor]


def part(weights: Weights, prefix: str) -> Weights:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., D): divided by the root of the mean square, times the weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x (T, heads, E): pair i of a head at position p is rotated by the angle p * theta^(-2 i / E)."""
    e = x.shape[-1]
    freqs = 1 / theta ** (torch.arange(0, e, 2).float() / e)  # (E/2,); float32, as in Llama
    angles = positions[:, None, None].float() * freqs  # (T, 1, E/2), the same for all heads
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def qk_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (T, heads, E): each head gets mean 0 and variance 1, then the weight and bias (groups, E) of its group."""
    heads_of_a_group = x.shape[1] // len(weight)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * weight.repeat_interleave(heads_of_a_group, 0) + bias.repeat_interleave(heads_of_a_group, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (T, H, E), k and v (T, G, E), mask (T, T) -> (T, H, E): query head h reads key head h // (H / G)."""
    sharing = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(sharing, 1), v.repeat_interleave(sharing, 1)  # (T, H, E)
    scores = torch.einsum("ihe,jhe->hij", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhe->ihe", weights, v)


def attention(x: Tensor, w: Weights, positions: Tensor, mask: Tensor, cfg: ModelConfig) -> Tensor:
    """x (T, D) -> (T, D): project, normalise, rotate, attend, project back."""
    q, k, v = (F.linear(x, w[f"{name}.weight"]).unflatten(-1, (-1, cfg.head_dim)) for name in ("wq", "wk", "wv"))
    if cfg.qk_norm:
        q = qk_norm(q, w["q_norm.weight"], w["q_norm.bias"], cfg.norm_eps)
        k = qk_norm(k, w["k_norm.weight"], w["k_norm.bias"], cfg.norm_eps)
    q, k = rotate(q, positions, cfg.rope_theta), rotate(k, positions, cfg.rope_theta)
    return F.linear(attend(q, k, v, mask).flatten(1), w["wo.weight"])


def feed_forward(x: Tensor, w: Weights) -> Tensor:
    """x (T, D) -> (T, D): SwiGLU."""
    gate, up = F.linear(x, w["w1.weight"]), F.linear(x, w["w3.weight"])
    return F.linear(F.silu(gate) * up, w["w2.weight"])


def block(x: Tensor, w: Weights, positions: Tensor, mask: Tensor, cfg: ModelConfig) -> Tensor:
    """x (T, D) -> (T, D): both branches, each added to the stream, in the 7B's or the 34B's order."""
    for_attention, for_ffn = part(w, "attention."), part(w, "feed_forward.")
    norms = w["attention_norm.weight"], w["ffn_norm.weight"]
    if cfg.norm_order == "pre":
        x = x + attention(rms_norm(x, norms[0], cfg.norm_eps), for_attention, positions, mask, cfg)
        return x + feed_forward(rms_norm(x, norms[1], cfg.norm_eps), for_ffn)
    x = x + rms_norm(attention(x, for_attention, positions, mask, cfg), norms[0], cfg.norm_eps)
    return x + rms_norm(feed_forward(x, for_ffn), norms[1], cfg.norm_eps)


def forward(tokens: Tensor, weights: Weights, positions: Tensor, mask: Tensor, cfg: ModelConfig) -> Tensor:
    """tokens (T,) -> logits (T, V)."""
    x = weights["tok_embeddings.weight"][tokens]
    for layer in range(cfg.n_layers):
        x = block(x, part(weights, f"layers.{layer}."), positions, mask, cfg)
    return F.linear(rms_norm(x, weights["norm.weight"], cfg.norm_eps), weights["output.weight"])


# 48 layers, a norm for queries and one for keys, weight and bias, 4 groups of heads that are 128 wide
new_parameters = 48 * 2 * 2 * 4 * 128

# A score depends on the distance alone, and the mask keeps documents apart, so where they begin does not matter.
change_by_positions = 0.0

# Both are 3 apart; the figure shows where the score with the norm last is low, and where it is high.
equal_distances = ((19, 16), (81, 78))
