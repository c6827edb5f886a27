"""One tensor in three layouts, ours, Meta's and Hugging Face's: names, rotary order and shards, as pure functions.

Ours keeps Meta's order of rotary pairs, (x[2i], x[2i+1]), in one file. Hugging Face rotates the two halves of a head,
so the rows of wq and wk, AND the QK-norm vectors that are applied to those rows, are permuted. Meta's files cut each
matrix over S shards along its rows or columns. Each of Meta's shards has one QK-norm vector for its heads; ours are
(n_groups, E), and Hugging Face's are repeated for every head. layout_configs.py knows the configurations.

Shapes: H heads (of queries or keys), E = head_dim, g = n_groups, S shards.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nanochameleon.config import ModelConfig

COPY, GROUPS = "copy", "groups"  # every shard has a copy of the tensor; every shard has one group's vector


class Names(NamedTuple):
    """A tensor's other names, and how Meta's shards hold it: cut along dimension 0 or 1, COPY or GROUPS."""

    hf: str
    meta: str
    cut: int | str


TOP = {
    "tok_embeddings.weight": Names("model.embed_tokens.weight", "tok_embeddings.weight", 1),
    "norm.weight": Names("model.norm.weight", "norm.weight", COPY),
    "output.weight": Names("lm_head.weight", "output.weight", 0),
}
LAYER = {
    "attention.wq.weight": Names("self_attn.q_proj.weight", "attention.wq.weight", 0),
    "attention.wk.weight": Names("self_attn.k_proj.weight", "attention.wk.weight", 0),
    "attention.wv.weight": Names("self_attn.v_proj.weight", "attention.wv.weight", 0),
    "attention.wo.weight": Names("self_attn.o_proj.weight", "attention.wo.weight", 1),
    "attention.q_norm.weight": Names("self_attn.q_norm.weight", "attention.q_normalization.weight", GROUPS),
    "attention.q_norm.bias": Names("self_attn.q_norm.bias", "attention.q_normalization.bias", GROUPS),
    "attention.k_norm.weight": Names("self_attn.k_norm.weight", "attention.k_normalization.weight", GROUPS),
    "attention.k_norm.bias": Names("self_attn.k_norm.bias", "attention.k_normalization.bias", GROUPS),
    "feed_forward.w1.weight": Names("mlp.gate_proj.weight", "feed_forward.w1.weight", 0),
    "feed_forward.w3.weight": Names("mlp.up_proj.weight", "feed_forward.w3.weight", 0),
    "feed_forward.w2.weight": Names("mlp.down_proj.weight", "feed_forward.w2.weight", 1),
    "attention_norm.weight": Names("input_layernorm.weight", "attention_norm.weight", COPY),
    "ffn_norm.weight": Names("post_attention_layernorm.weight", "ffn_norm.weight", COPY),
}
VQ_PREFIX = "model.vqmodel."  # Hugging Face's, in front of the image tokenizer's names, which all three layouts share
DECODER = "decoder."  # prefix of the image decoder's names; Hugging Face's model has no image decoder


def names_of(name: str) -> Names:
    """'layers.3.attention.wq.weight' -> its Names, with the layer's number in them."""
    if name in TOP:
        return TOP[name]
    layers, number, rest = name.split(".", 2)
    found = LAYER[rest]
    return Names(f"model.{layers}.{number}.{found.hf}", f"{layers}.{number}.{found.meta}", found.cut)


def is_weight(name: str) -> bool:
    """Is this one of our names of a weight, and not of an optimizer's state?"""
    inside = re.fullmatch(r"layers\.\d+\.(.+)", name)
    return name in TOP or bool(inside and inside[1] in LAYER)


def weight_shapes(cfg: ModelConfig) -> dict[str, Tensor]:
    """Our names in the order of Chameleon's state_dict, with tensors on the meta device. No module is built."""
    d, e, groups, q, kv = cfg.dim, cfg.head_dim, cfg.qk_norm_groups, cfg.n_heads, cfg.kv_heads
    sizes = {"wq": (q * e, d), "wk": (kv * e, d), "wv": (kv * e, d), "wo": (d, q * e), "q_norm": (groups, e),
             "k_norm": (groups, e), "w1": (cfg.ffn_dim, d), "w3": (cfg.ffn_dim, d), "w2": (d, cfg.ffn_dim)}  # fmt: skip
    shapes = {"tok_embeddings.weight": (cfg.vocab_size, d)}
    for i in range(cfg.n_layers):
        for name in LAYER:
            if cfg.qk_norm or LAYER[name].cut != GROUPS:
                shapes[f"layers.{i}.{name}"] = sizes.get(name.split(".")[-2], (d,))
    shapes |= {"norm.weight": (d,), "output.weight": (cfg.vocab_size, d)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Rotary order


def half_split(x: Tensor, head_dim: int) -> Tensor:
    """Reorder rows (H * E, ...) of each head from pairs (0, 1), (2, 3), ... to all first members, then all second."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def interleave(x: Tensor, head_dim: int) -> Tensor:
    """Inverse of half_split."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's layout


def is_rotary(name: str) -> bool:
    return name.endswith((".wq.weight", ".wk.weight"))


def to_hf(name: str, x: Tensor, cfg: ModelConfig) -> Tensor:
    """Our tensor -> Hugging Face's."""
    if is_rotary(name):
        return half_split(x, cfg.head_dim)
    if names_of(name).cut == GROUPS:  # (g, E) -> (H, E)
        heads = cfg.n_heads if ".q_norm." in name else cfg.kv_heads
        return half_split(x.flatten(), cfg.head_dim).view(x.shape).repeat_interleave(heads // len(x), 0)
    return x


def from_hf(name: str, x: Tensor, cfg: ModelConfig) -> Tensor:
    """Inverse of to_hf. Raises ValueError where heads of one group have different QK-norm vectors."""
    if is_rotary(name):
        return interleave(x, cfg.head_dim)
    if names_of(name).cut == GROUPS:
        return one_per_group(name, interleave(x.flatten(), cfg.head_dim).view(x.shape), cfg.qk_norm_groups)
    return x


def one_per_group(name: str, x: Tensor, n_groups: int) -> Tensor:
    """(n, E), with n / n_groups equal vectors per group -> (n_groups, E). Raises ValueError where they differ."""
    grouped = x.unflatten(0, (n_groups, -1))
    if not torch.equal(grouped, grouped[:, :1].expand_as(grouped)):
        raise ValueError(f"{name} has more than {n_groups} different vectors")
    return grouped[:, 0]


def fewest_groups(vectors: list[Tensor], start: int, kv_heads: int) -> int | None:
    """Return the smallest number of groups, at least `start`, that can hold all these (H, E). None if there is none.

    Hugging Face's model trains a vector for every head, so there may be more groups than it started with.
    """
    for n in range(start, kv_heads + 1):
        if kv_heads % n == 0 and all(bool((x.unflatten(0, (n, -1)) == x[:: len(x) // n, None]).all()) for x in vectors):
            return n
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Meta's shards


def to_meta(name: str, x: Tensor, shard: int, n_shards: int) -> Tensor:
    """Our tensor -> what shard number `shard` holds of it, in memory of its own."""
    cut = names_of(name).cut
    if cut == COPY:
        return x.clone()
    if cut == GROUPS:
        return x[shard * len(x) // n_shards].clone()
    return x.chunk(n_shards, cut)[shard].clone(memory_format=torch.contiguous_format)


def from_meta(name: str, parts: list[Tensor], cfg: ModelConfig, warn: Callable[[str], None]) -> Tensor:
    """Inverse of to_meta over all shards. Copies that differ are averaged, with a warning.

    Raises ValueError where there are more QK-norm vectors than cfg.qk_norm_groups.
    """
    cut = names_of(name).cut
    if cut == GROUPS:
        return one_per_group(name, torch.stack(parts), cfg.qk_norm_groups)
    if cut != COPY:
        return parts[0] if len(parts) == 1 else torch.cat(parts, cut)
    if all(torch.equal(part, parts[0]) for part in parts):
        return parts[0]
    warn(f"{name} differs between the {len(parts)} shards: averaged")
    return torch.stack(parts).double().mean(0).to(parts[0].dtype)


def why_not_sharded(cfg: ModelConfig, n_shards: int) -> str | None:
    """Say why a model cannot be cut into `n_shards` shards. None where it can."""
    sizes = {"kv heads": cfg.kv_heads, "dim": cfg.dim, "ffn_dim": cfg.ffn_dim, "tokens": cfg.vocab_size}
    for what, size in sizes.items():
        if size % n_shards:
            return f"{n_shards} shards do not divide its {size} {what}"
    if cfg.qk_norm and n_shards % cfg.qk_norm_groups:
        return f"{n_shards} shards cannot hold {cfg.qk_norm_groups} groups of QK-norm"
    return None


def rope_freqs(cfg: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Return the rotary frequency of each pair, (E/2,): an entry that Meta's loader insists on and does not use."""
    steps = torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim
    return (1 / cfg.rope_theta**steps).to(dtype)
