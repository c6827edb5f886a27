"""The Decoder whose steps are the compiled ones of this folder, for one model and its cache.

Weights stay where the model has them. Each engine has its own team of threads, since engines share no KV cache. The
threads come from pools that all engines share; they return there a millisecond after the last step.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from nanochameleon.config import ModelConfig
from nanochameleon.generation.cpu.choose import INTERVALS, choose_address
from nanochameleon.generation.cpu.layers import FIELDS, do_block_address
from nanochameleon.generation.cpu.matmul import matmul_address
from nanochameleon.generation.cpu.memory import MAP
from nanochameleon.generation.cpu.steps import runner
from nanochameleon.generation.cpu.threads import BOARD, MADE
from nanochameleon.generation.decoder import Chunk, Decoder
from nanochameleon.generation.quantize import QuantizedLinear
from nanochameleon.kernels.cpu.simd import W
from nanochameleon.transformer import Chameleon, KVCache, compute_freqs_cis
from nanochameleon.vocab import Vocab

QUEUE = 128  # tokens of prompts that are read at once


@cache
def worker(thread: int, process: int) -> ThreadPoolExecutor:
    """The pool of one thread in this process; a forked child starts its own."""
    return ThreadPoolExecutor(1, thread_name_prefix=f"decode-{thread}")


def padded(n: int) -> int:
    """n rounded up to whole registers."""
    return -(-n // W) * W


class CPUDecoder(Decoder):
    """For a model in float32 whose linear layers are float32 or int8."""

    sees_ends = True

    def __init__(self, model: Chameleon, vocab: Vocab, image_len: int, n_slots: int, context: int):
        super().__init__(model, vocab, image_len, n_slots, context)
        self.buffers: list[Tensor | np.ndarray] = []  # keeps alive what compiled code knows by address
        self.n_threads = team_size(model.cfg)
        self.queue, self.board = np.zeros((3, max(n_slots, QUEUE)), np.int64), np.zeros(BOARD, np.int64)
        fields = self.sizes(model.cfg, self.cache) | self.tokens(vocab, image_len)
        fields |= self.weights(model, self.cache) | self.activations(model.cfg) | self.sampling(model.cfg)
        for name in ("hidden", "slot_state", "context_mask", "uniforms", "branch_slots", "token_buffer"):
            fields[name] = self.address(getattr(self, name))
        for name in ("allowed", "transitions", "done"):
            fields[name] = self.address(getattr(self.grammar, name))
        fields["params"] = self.address(self.params.table)
        self.map = np.zeros(1, MAP)
        for name in MAP.names:
            self.map[name] = fields[name]
        self.followers: list[Future | None] = [None] * (self.n_threads - 1)

    def read_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Read the tokens of all chunks together, QUEUE at a time."""
        tokens = np.array([(t, slot, start + i) for tokens, slot, start in chunks for i, t in enumerate(tokens)])
        for first in range(0, len(tokens), QUEUE):
            some = tokens[first : first + QUEUE]
            self.queue[:, : len(some)] = some.T
            self.run_compiled(0, 0, len(some))

    def run(self, n: int, steps: int, *_) -> None:
        """As Decoder.run; compiled steps see for themselves which logits and how much of the cache they need."""
        self.run_compiled(n, steps)

    def run_compiled(self, n: int, steps: int, n_queued: int = 0) -> int:
        """Run the model on n_queued tokens of the queue, then up to `steps` steps of the first n slots.

        Returns the number of steps until all were done. token_buffer holds their tokens, and <pad> after each end.
        """
        for i, follower in enumerate(self.followers):
            # A follower that still runs may be about to leave, so the next one is submitted to wait for it.
            if follower is None or follower.running() or follower.done():
                self.followers[i] = worker(i + 1, os.getpid()).submit(self.work, i + 1)
        self.work(0, n, steps, n_queued)
        made = int(self.board[MADE // 8])
        self.token_buffer[made:steps] = self.vocab.pad
        return made

    def work(self, thread: int, n: int = 0, steps: int = 0, n_queued: int = 0) -> None:
        runner()(self.map.ctypes.data, thread, n, steps, n_queued)

    # -----------------------------------------------------------------------------------------------------------------
    # The fields of MAP

    def address(self, x: Tensor | np.ndarray) -> int:
        self.buffers.append(x)
        return x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data

    def sizes(self, cfg: ModelConfig, cache: KVCache) -> dict[str, int | float]:
        names = "dim", "ffn_dim", "n_heads", "kv_heads", "head_dim", "n_layers", "vocab_size"
        return {name: getattr(cfg, name) for name in names} | dict(
            context=cache.keys.shape[3], groups=cfg.qk_norm_groups if cfg.qk_norm else 0, eps=cfg.norm_eps,
            pre_norm=cfg.norm_order == "pre", n_slots=self.n_slots, n_threads=self.n_threads,
            board=self.address(self.board),
        )  # fmt: skip

    def tokens(self, vocab: Vocab, image_len: int) -> dict[str, int]:
        names = "eos", "pad", "eot", "boi", "eoi", "first_code", "first_text"
        return {name: getattr(vocab, name) for name in names} | dict(image_len=image_len)

    def weights(self, model: Chameleon, cache: KVCache) -> dict[str, int]:
        def linear(layer: nn.Module) -> tuple[int, int]:
            scale = self.address(layer.scale) if isinstance(layer, QuantizedLinear) else 0
            return self.address(layer.weight.detach().contiguous()), scale

        def vector(x: Tensor) -> int:
            return self.address(
                nn.functional.pad(x.detach().float(), (0, padded(x.shape[-1]) - x.shape[-1])).contiguous()
            )

        layers, qk_norm = np.zeros((len(model.layers), FIELDS), np.int64), model.cfg.qk_norm
        for fields, block, keys, values in zip(layers, model.layers, cache.keys, cache.values, strict=True):
            a, f = block.attention, block.feed_forward
            linears = [x for layer in (a.wq, a.wk, a.wv, a.wo, f.w1, f.w3, f.w2) for x in linear(layer)]
            norms = [vector(norm.weight) for norm in (block.attention_norm, block.ffn_norm)]
            norms += [vector(torch.stack([x.weight, x.bias], 1)) if qk_norm else 0 for x in (a.q_norm, a.k_norm)]
            fields[:] = *linears, *norms, self.address(keys), self.address(values)
        freqs_cis = compute_freqs_cis(torch.arange(cache.keys.shape[3])[None], model.cfg.head_dim, model.cfg.rope_theta)
        output, output_scale = linear(model.output)
        return dict(
            matmul=matmul_address(1 if isinstance(model.output, QuantizedLinear) else 4),
            matmul_fp32=matmul_address(4), do_block=do_block_address(), choose=choose_address(),
            embeddings=self.address(model.tok_embeddings.weight.detach().contiguous()),
            norm=vector(model.norm.weight), output=output, output_scale=output_scale,
            freqs_cis=vector(freqs_cis[0, 0].flatten(1)), layers=self.address(layers),
        )  # fmt: skip

    def activations(self, cfg: ModelConfig) -> dict[str, int]:
        n, heads = self.queue.shape[1], cfg.n_heads * cfg.head_dim
        widths = dict(x=cfg.dim, normed=cfg.dim, branch=cfg.dim, up=cfg.ffn_dim, gate=cfg.ffn_dim)
        lines = {name: self.address(np.zeros((n, padded(size)), np.float32)) for name, size in widths.items()}
        size = cfg.n_heads // cfg.kv_heads * (2 * padded(cfg.head_dim) + padded(self.context)) + padded(cfg.dim)
        return lines | dict(
            queue=self.address(self.queue), queue_size=n, scratch_size=size,
            qkv=self.address(np.zeros((n, heads + 2 * cfg.kv_heads * cfg.head_dim), np.float32)),
            heads=self.address(np.zeros((n, heads), np.float32)),
            scratch=self.address(np.zeros((self.n_threads, size), np.float32)),
        )  # fmt: skip

    def sampling(self, cfg: ModelConfig) -> dict[str, int]:
        n, threads, v = self.n_slots, self.n_threads, cfg.vocab_size
        shapes = dict(
            logit_inputs=((n, padded(cfg.dim)), np.float32), logits=((n, v), np.float32), logit_rows=(n, np.int64),
            cond_slots=(n, np.int64), chosen=(n, np.int64), lines=((threads, v), np.float32),
            weights=((threads, v), np.float64), masses=((threads, INTERVALS), np.float64),
            heaps=((threads, v + 3), np.int64),
        )  # fmt: skip
        return {name: self.address(np.zeros(*shape)) for name, shape in shapes.items()}


def team_size(cfg: ModelConfig) -> int:
    """As many threads as torch has, as long as each reads at least 100,000 weights of a layer."""
    weights = cfg.dim * (2 * (cfg.n_heads + cfg.kv_heads) * cfg.head_dim + 3 * cfg.ffn_dim)
    return max(1, min(torch.get_num_threads(), weights // 100_000))
