"""The compiled steps of cpu/ for one model and its cache: where everything lies, and the threads that do the work.

Weights stay where the model has them. Rows that are already in the cache of one engine are no others' business, so each
engine has a team of its own; its threads are lent by all engines' pools, and are back there a millisecond after the
last step.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from nanochameleon.config import ModelConfig
from nanochameleon.generation.cpu.choose import choose_address
from nanochameleon.generation.cpu.layers import SLOTS, do_block_address
from nanochameleon.generation.cpu.matmul import product_address
from nanochameleon.generation.cpu.memory import MAP
from nanochameleon.generation.cpu.steps import runner
from nanochameleon.generation.cpu.threads import BOARD, MADE
from nanochameleon.generation.quantize import QuantizedLinear
from nanochameleon.kernels.cpu.simd import W
from nanochameleon.transformer import Chameleon, KVCache, compute_freqs_cis
from nanochameleon.vocab import Vocab

READ = 128  # ids of prompts that are read at once


@cache
def helper(member: int, process: int) -> ThreadPoolExecutor:
    """The thread of one member, in this process: a forked child starts its own."""
    return ThreadPoolExecutor(1, thread_name_prefix=f"decode-{member}")


def wide(n: int) -> int:
    """n rounded up to whole registers."""
    return -(-n // W) * W


class CPUDecoder:
    """Reads prompts and makes steps for a Decoder whose model is in float32, its linear layers float32 or int8."""

    def __init__(self, decoder: "Decoder"):  # noqa: F821
        self.kept: list[Tensor | np.ndarray] = []  # all whose addresses are in use
        self.members, self.rows = team_size(decoder.model.cfg), len(decoder.hidden)
        self.queue, self.board = np.zeros((3, max(self.rows, READ)), np.int64), np.zeros(BOARD, np.int64)
        fields = self.sizes(decoder.model.cfg, decoder.cache) | self.ids(decoder.vocab, decoder.grammar.n_codes)
        fields |= self.weights(decoder.model, decoder.cache) | self.activations(decoder.model.cfg, decoder.context)
        fields |= self.choice(decoder.model.cfg)
        for name in ("hidden", "numbers", "seen", "uniforms", "sample", "log"):
            fields[name] = self.at(getattr(decoder, name))
        for name in ("may", "turns", "done"):
            fields[name] = self.at(getattr(decoder.grammar, name))
        fields["options"] = self.at(decoder.options.table)
        self.log, self.pad = decoder.log.numpy(), decoder.vocab.pad
        self.map = np.zeros(1, MAP)
        for name in MAP.names:
            self.map[name] = fields[name]
        self.followers: list[Future | None] = [None] * (self.members - 1)

    def read(self, parts: Sequence[tuple[Sequence[int], int, int]]) -> None:
        """As Decoder.prefill, all parts at once."""
        tokens = np.array([(token, row, start + i) for ids, row, start in parts for i, token in enumerate(ids)])
        for first in range(0, len(tokens), READ):
            some = tokens[first : first + READ]
            self.queue[:, : len(some)] = some.T
            self.run(0, 0, len(some))

    def run(self, n: int, steps: int, reading: int = 0) -> int:
        """Reads that much of the queue; up to `steps` steps of the first n rows -> how many until all had ended. Their
        ids stand in the log, pad where a row or all have ended."""
        for i, follower in enumerate(self.followers):
            # one that is there may be about to leave: the next one waits behind it
            if follower is None or follower.running() or follower.done():
                self.followers[i] = helper(i + 1, os.getpid()).submit(self.work, i + 1)
        self.work(0, n, steps, reading)
        made = int(self.board[MADE // 8])
        self.log[made:steps] = self.pad
        return made

    def work(self, member: int, n: int = 0, steps: int = 0, reading: int = 0) -> None:
        runner()(self.map.ctypes.data, member, n, steps, reading)

    # -----------------------------------------------------------------------------------------------------------------
    # What the map says

    def at(self, x: Tensor | np.ndarray) -> int:
        """x's address; x is kept."""
        self.kept.append(x)
        return x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data

    def sizes(self, cfg: ModelConfig, cache: KVCache) -> dict[str, int | float]:
        names = "dim", "ffn_dim", "n_heads", "kv_heads", "head_dim", "n_layers", "vocab_size"
        return {name: getattr(cfg, name) for name in names} | dict(
            context=cache.keys.shape[3], groups=cfg.qk_norm_groups if cfg.qk_norm else 0, eps=cfg.norm_eps,
            pre=cfg.norm_order == "pre", n_rows=self.rows, members=self.members,
            board=self.at(self.board),
        )  # fmt: skip

    def ids(self, vocab: Vocab, n_codes: int) -> dict[str, int]:
        names = "eos", "pad", "eot", "boi", "eoi", "first_code", "first_text"
        return {name: getattr(vocab, name) for name in names} | dict(codes_each=n_codes)

    def weights(self, model: Chameleon, cache: KVCache) -> dict[str, int]:
        def linear(layer: nn.Module) -> tuple[int, int]:
            scale = self.at(layer.scale) if isinstance(layer, QuantizedLinear) else 0
            return self.at(layer.weight.detach().contiguous()), scale

        def padded(x: Tensor) -> int:
            return self.at(nn.functional.pad(x.detach().float(), (0, wide(x.shape[-1]) - x.shape[-1])).contiguous())

        layers, qk_norm = np.zeros((len(model.layers), SLOTS), np.int64), model.cfg.qk_norm
        for slots, block, keys, values in zip(layers, model.layers, cache.keys, cache.values, strict=True):
            a, f = block.attention, block.feed_forward
            linears = [x for layer in (a.wq, a.wk, a.wv, a.wo, f.w1, f.w3, f.w2) for x in linear(layer)]
            norms = [padded(norm.weight) for norm in (block.attention_norm, block.ffn_norm)]
            norms += [padded(torch.stack([x.weight, x.bias], 1)) if qk_norm else 0 for x in (a.q_norm, a.k_norm)]
            slots[:] = *linears, *norms, self.at(keys), self.at(values)
        turns = compute_freqs_cis(torch.arange(cache.keys.shape[3])[None], model.cfg.head_dim, model.cfg.rope_theta)
        output, output_scale = linear(model.output)
        return dict(
            product=product_address(1 if isinstance(model.output, QuantizedLinear) else 4),
            product_fp32=product_address(4), do_block=do_block_address(), choose=choose_address(),
            embeddings=self.at(model.tok_embeddings.weight.detach().contiguous()),
            norm=padded(model.norm.weight), output=output, output_scale=output_scale,
            rotations=padded(torch.view_as_real(turns[0, 0]).flatten(1)), layers=self.at(layers),
        )  # fmt: skip

    def activations(self, cfg: ModelConfig, context: int) -> dict[str, int]:
        n, heads = self.queue.shape[1], cfg.n_heads * cfg.head_dim
        widths = dict(x=cfg.dim, normed=cfg.dim, branch=cfg.dim, up=cfg.ffn_dim, gate=cfg.ffn_dim)
        lines = {name: self.at(np.zeros((n, wide(size)), np.float32)) for name, size in widths.items()}
        floats = cfg.n_heads // cfg.kv_heads * (2 * wide(cfg.head_dim) + wide(context)) + wide(cfg.dim)
        return lines | dict(
            queue=self.at(self.queue), ids=n, floats=floats,
            qkv=self.at(np.zeros((n, heads + 2 * cfg.kv_heads * cfg.head_dim), np.float32)),
            heads=self.at(np.zeros((n, heads), np.float32)),
            scratch=self.at(np.zeros((self.members, floats), np.float32)),
        )  # fmt: skip

    def choice(self, cfg: ModelConfig) -> dict[str, int]:
        n, members, v = self.rows, self.members, cfg.vocab_size
        shapes = dict(
            asking=((n, wide(cfg.dim)), np.float32), logits=((n, v), np.float32), places=(n, np.int64),
            leads=(n, np.int64), chosen=(n, np.int64), lines=((members, v), np.float32),
            weights=((members, v), np.float64), heaps=((members, v + 3), np.int64),
        )  # fmt: skip
        return {name: self.at(np.zeros(*shape)) for name, shape in shapes.items()}


def team_size(cfg: ModelConfig) -> int:
    """As many threads as torch has, as long as each has 100,000 weights of a layer to read."""
    weights = cfg.dim * (2 * (cfg.n_heads + cfg.kv_heads) * cfg.head_dim + 3 * cfg.ffn_dim)
    return max(1, min(torch.get_num_threads(), weights // 100_000))
