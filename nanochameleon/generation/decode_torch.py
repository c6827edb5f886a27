"""Optional. Buys decode steps of few torch operations, for GPUs, where each is a launch, and for all dtypes
(`python -m nanochameleon.bench engine`). Skip on a first reading.

    tokens, positions (n,) -> every layer, keys and values written to the cache -> hidden states (n, D)

Equals `Chameleon.forward` with a cache, up to rounding. What makes it fewer operations:
- Linear layers with the same input are one matmul on concatenated weights.
- Queries and keys are normed and rotated together. freqs_cis, and what slots see, are computed once for all layers.
- Query heads that share a key head are rows of one attention, so no key is copied.
- The matmul that ends a branch adds its result to the residual stream.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochameleon.config import ModelConfig
from nanochameleon.generation.decoder import Decoder
from nanochameleon.generation.quantize import int8_linear
from nanochameleon.kernels.attention.decode import decode_attention_, see_cache
from nanochameleon.kernels.attention.reference import per_head
from nanochameleon.transformer import Block, Chameleon, KVCache, compute_freqs_cis


def concat_weights_(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Concatenate linear layers with one input, or their int8 versions -> weights (N, K), and int8's scales (N,).

    In place: the layers' own weights become views of the result, so none of them is in memory twice. Layers whose
    weights are such views already stay as they are.
    """
    weights = [layer.weight.data for layer in linears]
    sizes, first = [len(w) for w in weights], weights[0]
    starts = [first.data_ptr() + sum(sizes[:i]) * first.shape[1] * first.element_size() for i in range(len(sizes))]
    if [w.data_ptr() for w in weights] == starts and first.untyped_storage().nbytes() >= sum(w.nbytes for w in weights):
        joined = first.as_strided((sum(sizes), first.shape[1]), (first.shape[1], 1))
    else:
        with torch.inference_mode(linears[0].weight.is_inference()):  # weights that may be trained later stay trainable
            joined = torch.cat(weights)
            for layer, part in zip(linears, joined.split(sizes), strict=True):
                layer.weight.data = part
    scales = [layer.scale for layer in linears if hasattr(layer, "scale")]
    return joined, torch.cat(scales) if scales else None


def linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """(n, K) -> (n, N), as nn.Linear and QuantizedLinear do."""
    return F.linear(x, weight) if scale is None else int8_linear(x, weight, scale)


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class FusedBlock:
    """The weights of a block. post_norm: its norms come after the branches."""

    def __init__(self, block: Block, cfg: ModelConfig):
        a, f = block.attention, block.feed_forward
        self.block, self.post_norm, self.eps = block, cfg.norm_order == "post", cfg.norm_eps
        self.head_dim = cfg.head_dim
        self.wqkv, self.wo = concat_weights_([a.wq, a.wk, a.wv]), concat_weights_([a.wo])
        self.w13, self.w2 = concat_weights_([f.w1, f.w3]), concat_weights_([f.w2])
        norms = [per_head((norm.weight, norm.bias), heads) for norm, heads in
                 ((a.q_norm, cfg.n_heads), (a.k_norm, cfg.kv_heads))] if cfg.qk_norm else []  # fmt: skip
        self.qk_norm = tuple(at_least_float32(torch.cat(parts).detach()) for parts in zip(*norms, strict=True)) or None

    def __call__(self, x: Tensor, freqs_cis: Tensor, positions: Tensor, seen: Tensor, *cache: Tensor) -> Tensor:
        """x (n, D), changed in place where that is possible; cache: keys and values (n, G, S, E)."""
        attn_norm, ffn_norm = self.block.attention_norm, self.block.ffn_norm
        branch = self.attention(x if self.post_norm else attn_norm(x), freqs_cis, positions, seen, *cache)
        x = self.add_branch(x, branch, self.wo, attn_norm)
        gate, up = linear(x if self.post_norm else ffn_norm(x), *self.w13).chunk(2, -1)
        return self.add_branch(x, F.silu(gate).mul_(up), self.w2, ffn_norm)

    def add_branch(self, x: Tensor, branch: Tensor, weight: tuple[Tensor, Tensor | None], norm: nn.Module) -> Tensor:
        if self.post_norm:
            return x.add_(norm(linear(branch, *weight)))
        return x.add_(linear(branch, *weight)) if weight[1] is not None else x.addmm_(branch, weight[0].T)

    def attention(self, x: Tensor, freqs_cis: Tensor, positions: Tensor, seen: Tensor, *cache: Tensor) -> Tensor:
        heads = linear(x, *self.wqkv).view(len(x), 1, -1, self.head_dim)  # (n, 1, H + 2 G, E)
        return decode_attention_(heads, freqs_cis, self.qk_norm, self.eps, *cache, positions, seen).flatten(1)


class FusedStep:
    """A model's weights, concatenated for the step above. context: entries of the cache."""

    def __init__(self, model: Chameleon, context: int):
        self.model, cfg = model, model.cfg
        self.blocks = [FusedBlock(block, cfg) for block in model.layers]
        positions = torch.arange(context, device=model.output.weight.device)[None]
        self.freqs_cis = compute_freqs_cis(positions, cfg.head_dim, cfg.rope_theta)[0, 0]  # (context, E/2, 2)

    def __call__(self, tokens: Tensor, positions: Tensor, cache: KVCache, kv_len: int) -> Tensor:
        """One token (n,) for each of the first n slots at its position (n,) -> hidden states (n, D).

        Those of slots at kv_len or later, which do not take part, mean nothing.
        """
        x, positions = self.model.tok_embeddings(tokens), positions[:, None]
        keys, values = cache.keys[:, : len(x)], cache.values[:, : len(x)]  # (L, n, G, S, E)
        seen, freqs_cis = see_cache(positions, keys[0], kv_len), self.freqs_cis[positions]
        for block, *layer in zip(self.blocks, keys, values, strict=True):
            x = block(x, freqs_cis, positions, seen, *layer)
        return self.model.norm(x)


class FusedDecoder(Decoder):
    """The Decoder with the model's forward pass replaced by FusedStep."""

    def __init__(self, model: Chameleon, *sizes):
        super().__init__(model, *sizes)
        self.fused_step = FusedStep(model, self.context)

    def forward(self, tokens: Tensor, positions: Tensor, kv_len: int) -> Tensor:
        return self.fused_step(tokens, positions, self.cache, kv_len)
