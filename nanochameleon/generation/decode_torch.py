"""One decode step of a whole model in few of torch's operations: for a GPU, where each is a launch, and for all types.

    tokens, positions (n,) -> every layer, keys and values written into the cache -> hidden states (n, D)

It equals `Chameleon.forward` with a cache, up to rounding. Products with one input are one product; queries and keys
are normed and turned together; turns and mask are made once for all layers; query heads that share a key head are rows
of one attention, so that no key is copied; and a branch joins the residual sum in the product that ends it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochameleon.config import ModelConfig
from nanochameleon.kernels.attention.decode import decode_attention_
from nanochameleon.kernels.attention.reference import per_head
from nanochameleon.transformer import Block, CacheView, Chameleon, compute_freqs_cis


def join_(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Linear layers with one input, or their int8 versions -> all weights (N, K) and int8's scales (N,).

    In place: the layers' weights become parts of the joined one, so that none of them is in memory twice, and stay so.
    """
    weights = [layer.weight.data for layer in linears]
    sizes, first = [len(w) for w in weights], weights[0]
    starts = [first.data_ptr() + sum(sizes[:i]) * first.shape[1] * first.element_size() for i in range(len(sizes))]
    if [w.data_ptr() for w in weights] == starts and first.untyped_storage().nbytes() >= sum(w.nbytes for w in weights):
        joined = first.as_strided((sum(sizes), first.shape[1]), (first.shape[1], 1))
    else:
        with torch.inference_mode(linears[0].weight.is_inference()):  # as they were: they may be trained later
            joined = torch.cat(weights)
            for layer, part in zip(linears, joined.split(sizes), strict=True):
                layer.weight.data = part
    scales = [layer.scale for layer in linears if hasattr(layer, "scale")]
    return joined, torch.cat(scales) if scales else None


def multiply(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """x (n, K) -> (n, N); as Linear and QuantizedLinear."""
    return F.linear(x, weight if scale is None else weight.to(x.dtype).mul_(scale[:, None]))


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class JoinedBlock:
    """A block's weights; post: its norms stand behind the branches."""

    def __init__(self, block: Block, cfg: ModelConfig):
        a, f = block.attention, block.feed_forward
        self.block, self.post, self.eps = block, cfg.norm_order == "post", cfg.norm_eps
        self.head_dim = cfg.head_dim
        self.wqkv, self.wo = join_([a.wq, a.wk, a.wv]), join_([a.wo])
        self.w13, self.w2 = join_([f.w1, f.w3]), join_([f.w2])
        norms = [per_head((norm.weight, norm.bias), heads) for norm, heads in
                 ((a.q_norm, cfg.n_heads), (a.k_norm, cfg.kv_heads))] if cfg.qk_norm else []  # fmt: skip
        self.qk_norm = tuple(wide(torch.cat(parts).detach()) for parts in zip(*norms, strict=True)) or None

    def __call__(self, x: Tensor, turns: Tensor, positions: Tensor, bias: Tensor, *cache: Tensor) -> Tensor:
        """x (n, D), in place where it can be; cache: keys and values (n, G, S, E)."""
        before = x if self.post else self.block.attention_norm(x)
        x = self.joins(x, self.attention(before, turns, positions, bias, *cache), self.wo, self.block.attention_norm)
        gate, up = multiply(x if self.post else self.block.ffn_norm(x), *self.w13).chunk(2, -1)
        return self.joins(x, F.silu(gate).mul_(up), self.w2, self.block.ffn_norm)

    def joins(self, x: Tensor, branch: Tensor, weight: tuple[Tensor, Tensor | None], norm: nn.Module) -> Tensor:
        if self.post:
            return x.add_(norm(multiply(branch, *weight)))
        return x.add_(multiply(branch, *weight)) if weight[1] is not None else x.addmm_(branch, weight[0].T)

    def attention(self, x: Tensor, turns: Tensor, positions: Tensor, bias: Tensor, *cache: Tensor) -> Tensor:
        heads = multiply(x, *self.wqkv).view(len(x), 1, -1, self.head_dim)
        return decode_attention_(heads, turns, self.qk_norm, self.eps, *cache, positions, bias).flatten(1)


class TorchStep:
    """A model's weights joined for the step above. context: places of the cache."""

    def __init__(self, model: Chameleon, context: int):
        self.model, cfg = model, model.cfg
        self.blocks = [JoinedBlock(block, cfg) for block in model.layers]
        positions = torch.arange(context, device=model.output.weight.device)[None]
        self.turns = compute_freqs_cis(positions, cfg.head_dim, cfg.rope_theta)[0, 0]

    def __call__(self, tokens: Tensor, positions: Tensor, cache: list[CacheView]) -> Tensor:
        """Each slot of the cache reads one token (n,) at its position (n,)."""
        x, positions = self.model.tok_embeddings(tokens), positions[:, None]
        mask = cache[0].mask
        bias = torch.full_like(mask, -torch.inf, dtype=x.dtype).masked_fill_(mask, 0.0)  # (n, 1, kv_len)
        turns = self.turns[positions]
        for block, layer in zip(self.blocks, cache, strict=True):
            x = block(x, turns, positions, bias, layer.keys, layer.values)
        return self.model.norm(x)
