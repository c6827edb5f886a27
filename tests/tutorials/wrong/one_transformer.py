"""Plausible wrong answers to lesson 4's exercises: the solution with one thing changed."""

import torch
from solutions import one_transformer as right

F = torch.nn.functional


def rms_without_root(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps) * weight


def rms_over_tokens(x, weight, eps):
    return x / (x.square().mean(0, keepdim=True) + eps).sqrt() * weight


def layer_norm_for_rms_norm(x, weight, eps):
    return F.layer_norm(x, x.shape[-1:], weight, eps=eps)


def halves_for_neighbours(x, positions, theta):  # Hugging Face's pairs
    e = x.shape[-1]
    angles = positions[:, None, None] / theta ** (torch.arange(0, e, 2) / e)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def rotates_backwards(x, positions, theta):
    return right.rotate(x, -positions, theta)


def positions_from_one(x, positions, theta):
    return right.rotate(x, positions + 1, theta)


def heads_take_groups_in_turn(x, weight, bias, eps):
    times = x.shape[1] // len(weight)
    return F.layer_norm(x, x.shape[-1:], eps=eps) * weight.repeat(times, 1) + bias.repeat(times, 1)


def norm_without_mean(x, weight, bias, eps):
    times = x.shape[1] // len(weight)
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * weight.repeat_interleave(times, 0) + bias.repeat_interleave(times, 0)


def unbiased_variance(x, weight, bias, eps):
    times = x.shape[1] // len(weight)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt()
    return normed * weight.repeat_interleave(times, 0) + bias.repeat_interleave(times, 0)


def not_scaled(q, k, v, mask):
    return right.attend(q * q.shape[-1] ** 0.5, k, v, mask)


def heads_take_keys_in_turn(q, k, v, mask):
    times = q.shape[1] // k.shape[1]
    return right.attend(q, k.repeat(1, times, 1), v.repeat(1, times, 1), mask)


def softmax_over_queries(q, k, v, mask):
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = torch.einsum("ihe,jhe->hij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhe->ihe", scores.masked_fill(~mask, -1e9).softmax(1), v)


def rotation_before_norm(x, w, positions, mask, cfg):
    q, k, v = ((x @ w[f"{name}.weight"].T).unflatten(-1, (-1, cfg.head_dim)) for name in ("wq", "wk", "wv"))
    q, k = (right.rotate(y, positions, cfg.rope_theta) for y in (q, k))
    if cfg.qk_norm:
        q = right.qk_norm(q, w["q_norm.weight"], w["q_norm.bias"], cfg.norm_eps)
        k = right.qk_norm(k, w["k_norm.weight"], w["k_norm.bias"], cfg.norm_eps)
    return right.attend(q, k, v, mask).flatten(1) @ w["wo.weight"].T


def attention_without_norms(x, w, positions, mask, cfg):
    q, k, v = ((x @ w[f"{name}.weight"].T).unflatten(-1, (-1, cfg.head_dim)) for name in ("wq", "wk", "wv"))
    q, k = (right.rotate(y, positions, cfg.rope_theta) for y in (q, k))
    return right.attend(q, k, v, mask).flatten(1) @ w["wo.weight"].T


def gate_and_up_exchanged(x, w):
    return (F.silu(x @ w["w3.weight"].T) * (x @ w["w1.weight"].T)) @ w["w2.weight"].T


def relu_for_silu(x, w):
    return (F.relu(x @ w["w1.weight"].T) * (x @ w["w3.weight"].T)) @ w["w2.weight"].T


def both_branches_read_the_same(x, w, positions, mask, cfg):  # in parallel, as in other models
    for_attention, for_ffn = right.part(w, "attention."), right.part(w, "feed_forward.")
    read = [right.rms_norm(x, w[f"{name}.weight"], cfg.norm_eps) for name in ("attention_norm", "ffn_norm")]
    return x + right.attention(read[0], for_attention, positions, mask, cfg) + right.feed_forward(read[1], for_ffn)


def always_pre(x, w, positions, mask, cfg):
    cfg = type(cfg)(**vars(cfg) | {"norm_order": "pre"})
    return right.block(x, w, positions, mask, cfg)


def without_the_final_norm(tokens, weights, positions, mask, cfg):
    x = weights["tok_embeddings.weight"][tokens]
    for layer in range(cfg.n_layers):
        x = right.block(x, right.part(weights, f"layers.{layer}."), positions, mask, cfg)
    return x @ weights["output.weight"].T


def first_layer_every_time(tokens, weights, positions, mask, cfg):
    x = weights["tok_embeddings.weight"][tokens]
    for _ in range(cfg.n_layers):
        x = right.block(x, right.part(weights, "layers.0."), positions, mask, cfg)
    return right.rms_norm(x, weights["norm.weight"], cfg.norm_eps) @ weights["output.weight"].T


WRONG = {
    "rms_norm": [rms_without_root, rms_over_tokens, layer_norm_for_rms_norm],
    "rotate": [halves_for_neighbours, rotates_backwards, positions_from_one],
    "qk_norm": [heads_take_groups_in_turn, norm_without_mean, unbiased_variance],
    "attend": [not_scaled, heads_take_keys_in_turn, softmax_over_queries],
    "attention": [rotation_before_norm, attention_without_norms],
    "feed_forward": [gate_and_up_exchanged, relu_for_silu],
    "block": [both_branches_read_the_same, always_pre],
    "forward": [without_the_final_norm, first_layer_every_time],
    "new_parameters": [48 * 2 * 4 * 128, 48 * 2 * 2 * 64 * 128],
    "change_by_positions": [1.0, 0.01],
    "equal_distances": [((5, 2), (5, 3)), ((5, 2), (5, 2))],
}
