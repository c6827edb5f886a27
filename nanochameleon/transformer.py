"""The decoder-only transformer: tokens in, hidden states or logits out. No tokenizer, loss, optimizer or parallelism.

Llama's block (RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases, untied embeddings) with what keeps
Chameleon stable while it learns two modalities (paper, section 2.3): QK-norm, and either dropout on each branch (7B) or
the norms moved to the end of each branch (34B). Text and image tokens go through the same weights.

    forward_features    x = tok_embeddings(tokens)
                        x = x + attention(norm(x)), x = x + feed_forward(norm(x))    in each block
    forward             hidden = norm(x)
    logits              hidden @ output.weight.T

Shapes:
    B  sequences of a batch             D  width of the model (dim)      L  layers
    T  tokens of each sequence          E  width of a head (head_dim)    H  query heads
    S  tokens that the cache can hold   V  tokens of the vocabulary      G  key and value heads
"""

import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochameleon.config import ModelConfig
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.qknorm_rope_attention import qknorm_rope_attention
from nanochameleon.kernels.attention.reference import apply_rotary_emb, attention, layer_norm
from nanochameleon.kernels.block.dropout import dropout, fold_in
from nanochameleon.kernels.block.linear import linear
from nanochameleon.kernels.block.rms_norm import add_norm, norm_add, rms_norm
from nanochameleon.kernels.block.swiglu import swiglu
from nanochameleon.kernels.dispatch import same_kernels

# ---------------------------------------------------------------------------------------------------------------------
# Linear layers, norms, rotary positions


def fused_linear(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Apply several linear layers to x. In training, plain `nn.Linear`s are fused into a single matmul."""
    # quantization and tensor parallelism replace nn.Linear with classes whose forward must be called
    if torch.is_grad_enabled() and all(type(layer) is nn.Linear for layer in layers):
        return linear(x, [layer.weight for layer in layers])
    return tuple(layer(x) for layer in layers)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, alone or fused with the residual sum before or after it."""

    def affine(self) -> Tensor:
        """The weight (D,) for the kernels. Tensor parallelism overrides this, here and in QKNorm."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.affine(), self.eps)

    def add_norm(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + branch and its norm. The branch is None before the first block."""
        return (x, self(x)) if branch is None else add_norm(x, branch, self.affine(), self.eps)

    def norm_add(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return x + norm(branch)."""
        return norm_add(x, branch, self.affine(), self.eps)


class QKNorm(nn.Module):
    """LayerNorm over each head's E values, not RMSNorm. Without it the 7B diverges (paper, figure 5b).

    The heads of one group share a weight and a bias. The 34B has 4 groups, because it was trained on 4 shards that each
    learned its own.
    """

    def __init__(self, n_groups: int, head_dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_groups, head_dim))
        self.bias = nn.Parameter(torch.zeros(n_groups, head_dim))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias (groups, E) for the kernels."""
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.affine(), self.eps)  # (B, T, heads, E)


def compute_freqs_cis(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """positions (B, T) -> rotations (B, 1, T, E/2, 2) float32: cos and sin of position * theta^(-2 pair / E).

    Rotary embedding (RoFormer, arXiv 2104.09864): `apply_rotary_emb` rotates each pair of neighbouring values by its
    angle, so the score of a query and a key depends only on their distance.
    """
    freqs = 1 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)  # Llama's rounding
    angles = positions[:, None, :, None].float() * freqs  # (B, 1, T, E/2)
    return torch.stack((angles.cos(), angles.sin()), -1)


# ---------------------------------------------------------------------------------------------------------------------
# Key-value cache


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer for a fixed number of slots. A slot holds one sequence and has its own length."""

    keys: Tensor  # (L, slots, G, S, E)
    values: Tensor  # (L, slots, G, S, E)

    @staticmethod
    def empty(cfg: ModelConfig, n_slots: int, max_len: int, device: torch.device, dtype: torch.dtype) -> "KVCache":
        shape = (cfg.n_layers, n_slots, cfg.kv_heads, max_len, cfg.head_dim)
        return KVCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    def view(self, slots: slice, positions: Tensor, kv_len: int) -> list["CacheView"]:
        """Views of each layer for a forward pass of new tokens at `positions` (B, T), all below kv_len, in B slots."""
        max_len = self.keys.shape[3]
        if kv_len > max_len:
            raise ValueError(f"a cache of {max_len} tokens cannot hold {kv_len}: create it with a larger max_len")
        # Causal. The mask also hides what earlier sequences left in a slot after its newest token.
        mask = torch.arange(kv_len, device=positions.device) <= positions[:, :, None]  # (B, T, kv_len)
        keys, values = self.keys[:, slots], self.values[:, slots]
        return [CacheView(keys[layer], values[layer], positions, mask) for layer in range(len(keys))]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of slot `source` into slot `target`."""
        for x in (self.keys, self.values):
            x[:, target, :, :length] = x[:, source, :, :length]


class CacheView(NamedTuple):
    """One layer of the cache in one forward pass: queries at `positions` attend to the entries where `mask` is True."""

    keys: Tensor  # (B, G, S, E)
    values: Tensor  # (B, G, S, E)
    positions: Tensor  # (B, T)
    mask: Tensor  # (B, T, kv_len)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, G, T, E) of the new tokens; return the first kv_len keys and values (B, G, kv_len, E)."""
        slots, kv_len = torch.arange(len(k), device=k.device)[:, None], self.mask.shape[-1]
        for cached, new in ((self.keys, k), (self.values, v)):
            # slots (B, 1) and positions (B, T) are broadcast, so each slot writes at its own positions
            cached.transpose(1, 2)[slots, self.positions] = new.transpose(1, 2).to(cached.dtype)
        return self.keys[:, :, :kv_len], self.values[:, :, :kv_len]


# ---------------------------------------------------------------------------------------------------------------------
# The block


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim, self.qk_norm, self.norm_eps = cfg.head_dim, cfg.qk_norm, cfg.norm_eps
        self.wq = nn.Linear(cfg.dim, cfg.n_heads * cfg.head_dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.kv_heads * cfg.head_dim, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.kv_heads * cfg.head_dim, bias=False)
        self.wo = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.dim, bias=False)
        self.q_norm = QKNorm(cfg.qk_norm_groups, cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = QKNorm(cfg.qk_norm_groups, cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x: Tensor, freqs_cis: Tensor, documents: Documents | None, cache: CacheView | None) -> Tensor:
        """Causal attention of x (B, T, D) within documents or, with a cache, to all that the cache holds."""
        b, t, _ = x.shape
        # 1. project; H query heads share G key and value heads
        q, k, v = (y.view(b, t, -1, self.head_dim) for y in fused_linear(x, self.wq, self.wk, self.wv))  # (B, T, ., E)
        if cache is None:
            # 2. QK-norm, rotation and causal attention in one op
            norms = [norm.affine() if self.qk_norm else None for norm in (self.q_norm, self.k_norm)]
            out = qknorm_rope_attention(q, k, v, freqs_cis, documents, *norms, self.norm_eps)  # (B, T, H, E)
            # 3. back to the width of the model
            return fused_linear(out.reshape(b, t, -1), self.wo)[0]  # (B, T, D)
        # 2. the same in separate steps, since keys and values enter the cache between rotation and attention
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, E)
        # RoPE comes after QK-norm: the norm's weights scale the two values of a pair differently, so they would distort
        # a rotation made before.
        q, k = apply_rotary_emb(q, freqs_cis), apply_rotary_emb(k, freqs_cis)
        k, v = cache.update(k, v)  # (B, G, kv_len, E)
        out = attention(q, k, v, cache.mask)  # (B, H, T, E)
        # 3. back to the width of the model
        return self.wo(out.transpose(1, 2).reshape(b, t, -1))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.w3 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.w2 = nn.Linear(cfg.ffn_dim, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = fused_linear(x, self.w1, self.w3)  # (B, T, ffn_dim)
        return fused_linear(swiglu(gate, up), self.w2)[0]  # (B, T, D)


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm_order, self.dropout = cfg.norm_order, cfg.dropout
        self.attention = Attention(cfg)
        self.feed_forward = FeedForward(cfg)
        self.attention_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(
        self, x: Tensor, branch: Tensor | None, freqs_cis: Tensor, documents: Documents | None, cache: CacheView | None,
        seeds: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Add an attention and a feed-forward branch to the residual stream.

        The residual stream is a pair (x, branch), each (B, T, D), and so is the result. The next norm adds the two and
        normalises in one op, which saves a pass over memory. In the 34B's order the branch is None.
        """
        if self.norm_order == "pre":  # 7B: x + f(norm(x))
            x, h = self.attention_norm.add_norm(x, branch)
            branch = self.drop(self.attention(h, freqs_cis, documents, cache), seeds, 0)
            x, h = self.ffn_norm.add_norm(x, branch)
            return x, self.drop(self.feed_forward(h), seeds, 1)
        # 34B: x + norm(f(x)), the order of Swin Transformer, where the norm bounds what a branch adds
        x = self.add_normed(x, self.attention_norm, self.attention(x, freqs_cis, documents, cache), seeds, 0)
        return self.add_normed(x, self.ffn_norm, self.feed_forward(x), seeds, 1), None

    def add_normed(self, x: Tensor, norm: RMSNorm, branch: Tensor, seeds: Tensor | None, index: int) -> Tensor:
        if self.training and self.dropout:
            return x + self.drop(norm(branch), seeds, index)
        return norm.norm_add(x, branch)

    def drop(self, branch: Tensor, seeds: Tensor | None, index: int) -> Tensor:
        """Dropout. Every branch of every layer draws from its own seeds (B,)."""
        if not self.training or not self.dropout:
            return branch
        return dropout(branch, fold_in(seeds, index), self.dropout)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class LMHead(nn.Linear):
    def forward(self, x: Tensor, vocab_slice: slice = slice(None)) -> Tensor:
        """Logits (..., V), or only those of a slice of the vocabulary: inside an image no text token can come."""
        if vocab_slice == slice(None) and torch.is_grad_enabled():
            return linear(x, [self.weight])[0]
        return F.linear(x, self.weight[vocab_slice])


class Chameleon(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.activation_checkpointing = False  # recompute each block's activations in the backward pass
        # nn.Embedding's own values, which on the meta device would first import torch's compiler
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.randn(cfg.vocab_size, cfg.dim), freeze=False)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = LMHead(cfg.dim, cfg.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set random weights, from a seed drawn by torch's generator. Models on the meta device have none to set."""
        if not self.norm.weight.is_meta:
            seed = int(torch.randint(2**31, (), device="cpu"))
            for name, parameter in self.named_parameters():
                parameter.copy_(self.init_tensor(name, parameter.shape, seed, parameter.device))

    def init_tensor(self, name: str, shape: torch.Size, seed: int, device: torch.device) -> Tensor:
        """The full initial tensor of this name. It is a function of (seed, name), so ranks that hold parts of it agree.

        seed: 0 to 2^32 - 1; each gives different weights. The paper does not state its initialization; this is GPT-2's,
        scaled by width.

        | weight                 | std                             |
        |------------------------|---------------------------------|
        | embeddings             | 0.02                            |
        | matrices               | 1 / sqrt(fan in)                |
        | wo, w2 (end a branch)  | 1 / sqrt(fan in * 2 * n_layers) |
        | output                 | 0, so the first loss is log V   |
        | norms                  | weight 1, bias 0                |
        """
        if len(shape) < 2 or "q_norm" in name or "k_norm" in name:
            return torch.full(shape, float(name.endswith("weight")), device=device)
        n_branches = 2 * self.cfg.n_layers if name.endswith(("wo.weight", "w2.weight")) else 1
        special = {"tok_embeddings.weight": 0.02, "output.weight": 0.0}
        std = special.get(name, 1 / math.sqrt(shape[1] * n_branches))
        # torch's CPU generator uses only the low 32 bits of its seed, so seed and name are hashed into 32 bits
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode(), seed))
        return torch.randn(shape, generator=generator, device=device) * std

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, documents: Documents | None = None,
        cache: list[CacheView] | None = None, dropout_seeds: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """tokens (B, T) -> hidden states (B, T, D) after the final norm; see forward_features for the arguments."""
        return self.norm(self.forward_features(tokens, positions, documents, cache, dropout_seeds))

    def forward_features(
        self, tokens: Tensor, positions: Tensor | None = None, documents: Documents | None = None,
        cache: list[CacheView] | None = None, dropout_seeds: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """tokens (B, T) -> the last block's output (B, T, D), whose norm warns of divergence (paper, figure 5a).

        positions (B, T): of each token in its document; None counts from 0.
        documents: attention stays within a document; None means one document for each sequence.
        cache: KVCache.view, which takes the new keys and values; each slot holds one document.
        dropout_seeds (B,): one for each sequence. Training with dropout raises ValueError without them.
        """
        if self.training and self.cfg.dropout and dropout_seeds is None:
            raise ValueError("training with dropout needs dropout_seeds, one for each sequence")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)  # (B, T)
        freqs_cis = compute_freqs_cis(positions, self.cfg.head_dim, self.cfg.rope_theta)  # (B, 1, T, E/2, 2)
        x, branch = self.tok_embeddings(tokens), None  # (B, T, D)
        # recomputing must run the kernels that the forward pass ran; a compiled graph has chosen them already
        options = {} if torch.compiler.is_compiling() else {"context_fn": same_kernels}
        for layer, block in enumerate(self.layers):
            seeds = None if dropout_seeds is None else fold_in(dropout_seeds, layer)  # (B,)
            inputs = x, branch, freqs_cis, documents, None if cache is None else cache[layer], seeds
            if self.activation_checkpointing and self.training:
                # dropout is a function of its seeds, so there is no generator state to restore
                x, branch = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
            else:
                x, branch = block(*inputs)
        return x if branch is None else x + branch

    def empty_cache(self, n_slots: int, max_len: int, dtype: torch.dtype) -> KVCache:
        return KVCache.empty(self.cfg, n_slots, max_len, self.output.weight.device, dtype)

    def logits(self, hidden: Tensor, vocab_slice: slice = slice(None)) -> Tensor:
        """Hidden states (..., D) -> logits (..., V), or only those of a slice of the vocabulary."""
        return self.output(hidden, vocab_slice)
