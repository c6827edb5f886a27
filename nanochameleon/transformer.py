"""The decoder-only transformer: ids in, logits or hidden states out. No tokenizer, loss or optimizer in it.

Llama's block (RMSNorm, SwiGLU, rotary positions, grouped queries, no biases, untied embeddings) with Chameleon's
stability recipe (paper section 2.3): QK-norm, the norm before (7B) or after (34B) each branch, dropout on each branch.

Shapes: B rows, T new positions, S positions in the cache, D = dim, H query heads, G key heads, E = head_dim.
"""

import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochameleon.config import ModelConfig
from nanochameleon.kernels.attention.qknorm_rope import apply_rotary_emb, layer_norm, qknorm_rope_attention
from nanochameleon.kernels.attention.reference import attention
from nanochameleon.kernels.block.dropout import dropout, fold_in
from nanochameleon.kernels.block.linear import linear
from nanochameleon.kernels.block.rms_norm import add_norm, norm_add, rms_norm
from nanochameleon.kernels.block.swiglu import swiglu
from nanochameleon.kernels.dispatch import same_kernels


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, (L, B, G, S, E) each, of fixed shape: rows of the batch grow on their own."""

    keys: Tensor
    values: Tensor

    @staticmethod
    def empty(cfg: ModelConfig, rows: int, max_len: int, device: torch.device, dtype: torch.dtype) -> "KVCache":
        shape = (cfg.n_layers, rows, cfg.kv_heads, max_len, cfg.head_dim)
        return KVCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    def window(self, rows: slice, positions: Tensor, span: int) -> "Window":
        """For one forward pass: new ids of `rows` at positions (B, T) see the first `span` places up to their own."""
        longest = self.keys.shape[3]
        if span > longest:
            raise ValueError(f"{span} ids do not fit a cache of {longest}")
        return Window(self.keys[:, rows], self.values[:, rows], positions, span)

    def copy(self, source: int, target: int, length: int) -> None:
        """Row `source`'s first ids are row `target`'s, too."""
        for x in (self.keys, self.values):
            x[:, target, :, :length] = x[:, source, :, :length]


@dataclass(frozen=True)
class Window:
    """What one forward pass sees of a cache."""

    keys: Tensor  # (L, B, G, S, E)
    values: Tensor
    positions: Tensor  # (B, T) of the new ids
    span: int

    def mask(self) -> Tensor:
        """(B, T, span)"""
        return torch.arange(self.span, device=self.positions.device) <= self.positions[:, :, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, G, T, E) at the new ids' places and returns all keys and values in sight, (B, G, span, E)."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        for cached, new in ((self.keys, k), (self.values, v)):
            cached[layer].transpose(1, 2)[rows, self.positions] = new.transpose(1, 2).to(cached.dtype)
        return self.keys[layer, :, :, : self.span], self.values[layer, :, :, : self.span]


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """positions (B, T) -> the turn of each pair as a complex number of length 1: (B, 1, T, E/2).

    Pair i turns by position * theta^(-2i/E) (RoFormer, arXiv 2104.09864).
    """
    rates = 1 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)  # Llama's rounding
    angles = positions[:, None, :, None].float() * rates
    return torch.complex(angles.cos(), angles.sin())  # where torch.polar rounds otherwise


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each of several linear layers makes of x; in training those that are just that are one product."""
    plain = all(type(layer) is nn.Linear for layer in layers)
    if plain and torch.is_grad_enabled():
        return linear(x, [layer.weight for layer in layers])
    return tuple(layer(x) for layer in layers)


class RMSNorm(nn.RMSNorm):
    def affine(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.affine(), self.eps)

    def of_sum(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + branch, and its norm; None is no branch yet."""
        return (x, self(x)) if branch is None else add_norm(x, branch, self.affine(), self.eps)

    def added_to(self, x: Tensor, branch: Tensor) -> Tensor:
        """x + the norm of the branch."""
        return norm_add(x, branch, self.affine(), self.eps)


class QKNorm(nn.Module):
    """LayerNorm WITH mean and bias over each head's E values; one weight and bias for each group of heads.

    The 34B was trained on 4 shards whose vectors drifted apart, hence groups: parameters are (n_groups, E).
    """

    def __init__(self, n_groups: int, head_dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_groups, head_dim))
        self.bias = nn.Parameter(torch.zeros(n_groups, head_dim))

    def affine(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, heads, E) -> the same, each head normalised."""
        return layer_norm(x, self.affine(), self.eps)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.qk_norm, self.norm_eps = cfg.qk_norm, cfg.norm_eps
        self.wq = nn.Linear(cfg.dim, cfg.n_heads * cfg.head_dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.kv_heads * cfg.head_dim, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.kv_heads * cfg.head_dim, bias=False)
        self.wo = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.dim, bias=False)
        self.q_norm = QKNorm(cfg.qk_norm_groups, cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = QKNorm(cfg.qk_norm_groups, cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, cache: Window | None, layer: int) -> Tensor:
        """Whole rows go through the fused op, which takes doc_ids for the mask; with a cache the steps stand here."""
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, -1, self.head_dim) for y in project(x, self.wq, self.wk, self.wv))
        if cache is None:
            norms = [norm.affine() if self.qk_norm else None for norm in (self.q_norm, self.k_norm)]
            out = qknorm_rope_attention(q, k, v, table, mask, *norms, self.norm_eps)
            return project(out.reshape(b, t, -1), self.wo)[0]
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        # After the norm: a rotation keeps the lengths that the norm fixed.
        q, k = apply_rotary_emb(q, table), apply_rotary_emb(k, table)
        k, v = cache.extend(layer, k, v)
        return self.wo(attention(q, k, v, mask).transpose(1, 2).reshape(b, t, -1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.w3 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.w2 = nn.Linear(cfg.ffn_dim, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return project(swiglu(*project(x, self.w1, self.w3)), self.w2)[0]


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm_order, self.dropout = cfg.norm_order, cfg.dropout
        self.attention = Attention(cfg)
        self.feed_forward = FeedForward(cfg)
        self.attention_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(
        self, x: Tensor, branch: Tensor | None, table: Tensor, mask: Tensor | None, cache: Window | None, layer: int,
        keys: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The residual stream comes and goes as x + branch: the norm that reads the sum makes it on the way."""
        if self.norm_order == "pre":  # 7B
            x, read = self.attention_norm.of_sum(x, branch)
            branch = self.drop(self.attention(read, table, mask, cache, layer), keys, 0)
            x, read = self.ffn_norm.of_sum(x, branch)
            return x, self.drop(self.feed_forward(read), keys, 1)
        x = self.add_normed(x, self.attention_norm, self.attention(x, table, mask, cache, layer), keys, 0)
        return self.add_normed(x, self.ffn_norm, self.feed_forward(x), keys, 1), None

    def add_normed(self, x: Tensor, norm: RMSNorm, branch: Tensor, keys: Tensor | None, number: int) -> Tensor:
        """34B: the norm behind a branch bounds it."""
        if self.training and self.dropout:
            return x + self.drop(norm(branch), keys, number)
        return norm.added_to(x, branch)

    def drop(self, branch: Tensor, keys: Tensor | None, number: int) -> Tensor:
        """Dropout of the branch of this number; keys (B,), see kernels/block/dropout.py."""
        if not self.training or not self.dropout:
            return branch
        return dropout(branch, fold_in(keys, number), self.dropout)


class Output(nn.Linear):
    """To logits; `columns` are the ids that they are wanted for."""

    def forward(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        if columns == slice(None) and torch.is_grad_enabled():
            return linear(x, [self.weight])[0]
        return F.linear(x, self.weight[columns])


class Chameleon(nn.Module):
    """ids (B, T) -> hidden states (B, T, D); `logits` gives (..., V)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, self.recompute = cfg, False  # recompute: blocks keep no activations for the backward pass
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = Output(cfg.dim, cfg.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random weights, by a seed that torch's generator draws; on the meta device there is nothing to set."""
        if not self.norm.weight.is_meta:
            seed = int(torch.randint(2**31, (), device="cpu"))
            for name, parameter in self.named_parameters():
                parameter.copy_(self.initial(name, parameter.shape, seed, parameter.device))

    def initial(self, name: str, shape: torch.Size, seed: int, device: torch.device) -> Tensor:
        """The whole tensor of this name at the start of training: a function of (seed, name), so that ranks which hold
        parts of it agree. seed: 0 to 2^32 - 1; each gives other weights. The paper does not state its own
        initialization; ours is GPT-2's scaled by width.

        | weight                 | std                             |
        |------------------------|---------------------------------|
        | embeddings             | 0.02                            |
        | matrices               | 1 / sqrt(fan in)                |
        | wo, w2 (close a branch)| 1 / sqrt(fan in * 2 * n_layers) |
        | output                 | 0, so the first loss is log V   |
        | norms                  | weight 1, bias 0                |
        """
        if len(shape) < 2 or "q_norm" in name or "k_norm" in name:
            return torch.full(shape, float(name.endswith("weight")), device=device)
        branches = 2 * self.cfg.n_layers if name.endswith(("wo.weight", "w2.weight")) else 1
        std = 1 / math.sqrt(shape[1] * branches)
        if name.startswith(("tok_embeddings", "output")):
            std = 0.02 if name.startswith("tok") else 0.0
        # torch's CPU generator uses the low 32 bits of its seed alone, so seed and name are mixed into 32 bits
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode(), seed))
        return torch.randn(shape, generator=generator, device=device) * std

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: Window | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> hidden states (B, T, D) after the final norm; see `residual` for the arguments."""
        return self.norm(self.residual(tokens, positions, doc_ids, cache, keys))

    def residual(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: Window | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> the last block's output (B, T, D), whose norm is the paper's sign of trouble (figure 5a).

        positions (B, T): place of each token in its document; None counts from 0.
        doc_ids (B, T): attention stays within a document; None means that a row is one document.
        cache: takes the new keys and values at `positions`, and attention sees what it holds; for rows of one document.
        keys (B,): what dropout is drawn from, one a row; needed in training with dropout, ValueError without.
        """
        if self.training and self.cfg.dropout and keys is None:
            raise ValueError("training with dropout needs a key for each row")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        mask = doc_ids if cache is None else cache.mask()  # the fused op takes documents (B, T) for a mask
        table = rotary_table(positions, self.cfg.head_dim, self.cfg.rope_theta)
        x, branch = self.tok_embeddings(tokens), None
        kernels = {} if torch.compiler.is_compiling() else {"context_fn": same_kernels}  # a graph has chosen already
        for i, layer in enumerate(self.layers):
            inputs = x, branch, table, mask, cache, i, None if keys is None else fold_in(keys, i)
            if self.recompute and self.training:  # what is random is a function of the keys, so no generator's state
                x, branch = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, **kernels)
            else:
                x, branch = layer(*inputs)
        return x if branch is None else x + branch

    def logits(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """Hidden states (..., D) -> logits (..., V), or those of some columns alone."""
        return self.output(hidden, columns)
