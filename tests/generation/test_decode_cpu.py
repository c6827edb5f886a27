"""The compiled step against the model's forward pass and against sampling.py: any batch, heads, dtype and threads."""

import ctypes
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from tiny import N_CODES, TINY_MODEL, VOCAB, random_request, tiny_model

from nanochameleon.generation import sampling
from nanochameleon.generation.cpu import choose
from nanochameleon.generation.cpu import decode as decode_cpu
from nanochameleon.generation.cpu.decode import CPUDecoder
from nanochameleon.generation.cpu.matmul import ARGUMENTS, matmul_address
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.quantize import quantize_
from nanochameleon.generation.sampling import COND, required_filters
from nanochameleon.transformer import Chameleon, KVCache

CPU = torch.device("cpu")
SHAPES = [
    {},
    dict(n_heads=4, n_kv_heads=2, norm_order="post"),
    dict(n_heads=4, qk_norm_groups=2),
    dict(qk_norm=False),
    dict(dim=40, n_heads=5, n_kv_heads=1, multiple_of=5),  # nothing fills a register
    dict(dim=48, n_heads=2, multiple_of=32),
]


def random_norms(model: Chameleon) -> Chameleon:
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, float(name.endswith("weight")), 0.3)
    return model


def use_threads(monkeypatch, n: int) -> None:
    """For any size of the model and the machine."""
    monkeypatch.setattr(decode_cpu, "team_size", lambda cfg: n)


def decoder_of(model: Chameleon, n_slots: int, context: int = 30) -> CPUDecoder:
    return CPUDecoder(model, VOCAB, N_CODES, n_slots, context)


@torch.inference_mode()
def steps(model: Chameleon, tokens: torch.Tensor) -> tuple[CPUDecoder, torch.Tensor]:
    """-> the decoder, and the hidden states (N, T, D) after reading one token of each row at a time."""
    decoder, hidden = decoder_of(model, len(tokens) + 1), []
    for i, column in enumerate(tokens.T.tolist()):
        decoder.prefill([([token], slot, i) for slot, token in enumerate(column)])
        hidden.append(decoder.hidden[:-1].clone())
    return decoder, torch.stack(hidden, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Forward pass


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_steps_equal_one_forward_pass(changes, rows, int8):
    model = random_norms(tiny_model(2, **changes))
    model = quantize_(model) if int8 else model
    tokens = torch.randint(TINY_MODEL.vocab_size, (rows, 7), generator=torch.Generator().manual_seed(rows))
    decoder, hidden = steps(model, tokens)
    with torch.inference_mode():
        torch.testing.assert_close(hidden, model(tokens), atol=5e-5, rtol=1e-4)
        other, positions = KVCache.empty(model.cfg, rows + 1, 30, CPU, torch.float32), torch.arange(7).expand(rows, 7)
        model(tokens, positions, cache=other.view(slice(0, rows), positions, 7))
    # the slot that took no part is still 0
    torch.testing.assert_close(decoder.cache.keys, other.keys, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(decoder.cache.values, other.values, atol=5e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("changes", SHAPES[:2], ids=str)
def test_a_slot_has_the_same_bits_in_any_batch_on_any_number_of_threads(monkeypatch, threads, changes):
    tokens = torch.randint(TINY_MODEL.vocab_size, (20, 5), generator=torch.Generator().manual_seed(0))
    model = random_norms(tiny_model(**changes))
    _, together = steps(model, tokens)
    use_threads(monkeypatch, threads)
    for some in ([5], [3, 7], [19, 0, 3], list(range(19, 2, -1))):
        assert torch.equal(steps(model, tokens[some])[1], together[some])
    decoder = decoder_of(model, 20)
    decoder.prefill([(prompt, i, 0) for i, prompt in enumerate(tokens.tolist())])  # whole prompts at once
    assert torch.equal(decoder.hidden, together[:, -1])


@torch.inference_mode()
@pytest.mark.parametrize("parts", [(1, 20), (17, 4), (20, 1), (21,)])
def test_a_prompt_in_any_chunks_equals_one_forward_pass(monkeypatch, parts):
    monkeypatch.setattr(decode_cpu, "QUEUE", 6)
    model, tokens = random_norms(tiny_model(3)), torch.arange(30, 51)
    decoder, at = decoder_of(model, 3), 0
    for part in parts:
        decoder.prefill([(tokens[at : at + part].tolist(), 1, at)])
        at += part
        torch.testing.assert_close(decoder.hidden[1], model(tokens[None])[0, at - 1], atol=5e-5, rtol=1e-4)
    assert not decoder.cache.keys[:, [0, 2]].any() and not decoder.hidden[[0, 2]].any()


def compiled_matmul(size: int):
    """The compiled matmul for weights of `size` bytes a number, for Python."""
    kinds = [ctypes.c_int64] * ARGUMENTS
    return ctypes.CFUNCTYPE(None, *kinds)(matmul_address(size))


@settings(max_examples=50)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 4]), st.integers(0, 99))
def test_a_matmul_of_any_shape(rows, outputs, k, size, seed):
    """float32 and int8; only the requested outputs are written."""
    random = np.random.default_rng(seed)
    x, w = random.normal(size=(rows, k + 3)).astype(np.float32), random.normal(size=(outputs, k))
    w = (w * 40).astype(np.int8) if size == 1 else w.astype(np.float32)
    scale, out = random.random(outputs).astype(np.float32), np.full((rows, outputs + 2), 7, np.float32)
    first, last = sorted(random.integers(0, outputs + 1, 2))
    where = w.ctypes.data, k, scale.ctypes.data, first, last
    compiled_matmul(size)(x.ctypes.data, rows, k + 3, *where, out.ctypes.data, outputs + 2)
    wanted = x[:, :k].astype(float) @ w.astype(float).T * (scale if size == 1 else 1)
    np.testing.assert_allclose(
        out[:, first:last], wanted[:, first:last], rtol=1e-4, atol=1e-4 * (40 if size == 1 else 1)
    )
    out[:, first:last] = 7
    assert (out == 7).all()


def test_weights_are_not_copied():
    model = tiny_model()
    kept = {x.data_ptr() for x in decoder_of(model, 1).buffers if isinstance(x, torch.Tensor)}
    matrices = [x for name, x in model.named_parameters() if x.ndim == 2 and "norm" not in name]
    assert {x.data_ptr() for x in matrices} < kept


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@njit
def draw_all(logits, t, k, p, uniforms, weights, masses, heap):
    """-> the token that the compiled draw takes for each uniform number."""
    drawn = np.empty(len(uniforms), np.int64)
    for i, uniform in enumerate(uniforms):
        drawn[i] = choose.sample(logits.copy(), len(logits), t, k, p, 0.0, uniform, weights, masses, heap)
    return drawn


@settings(max_examples=60)
@given(
    st.integers(1, 200), st.sampled_from([0.05, 1.0, 5.0, 40.0]), st.sampled_from([0.3, 1.0]),
    st.sampled_from([1, 2, 5, 50, math.inf]),
    st.sampled_from([0.0137, 0.511, 0.883, 0.9991, math.nextafter(1, 0), 1.0]), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_compiled_filters_keep_the_tokens_of_the_reference(n, spread, t, k, p, ties, seed):
    """Logits that are close, far apart and equal; what is drawn at 200 numbers shows what was kept.

    No p and no uniform number is a fraction of up to 200 equal tokens, where rounding would decide.
    """
    random = np.random.default_rng(seed)
    logits = (spread * random.normal(size=n)).astype(np.float32)
    logits = np.round(logits) if ties else logits
    uniforms = (np.arange(200) + 1 / math.pi) / 200
    buffers = np.zeros(n), np.zeros(choose.INTERVALS), np.zeros(n, np.int64)
    drawn = draw_all(logits, t, float(k), p, uniforms, *buffers)
    rows, table = torch.from_numpy(logits).expand(200, n), torch.ones(200, dtype=torch.float64)
    kept = sampling.top_k_top_p(sampling.temperature(rows, t * table), k * table, p * table)
    assert drawn.tolist() == sampling.sample(kept, torch.from_numpy(uniforms)).tolist()


class Checked:
    """Replaces CPUDecoder.run_compiled: repeats every step with sampling.py on the same state and logits."""

    def __init__(self, engine: Engine):
        self.engine, self.decoder = engine, engine.decoder
        self.run, self.steps = self.decoder.run_compiled, 0

    def __call__(self, n: int, steps: int, n_queued: int = 0) -> int:
        if n_queued:
            return self.run(n, steps, n_queued)
        buffer = self.decoder.token_buffer.clone()
        for step in range(steps):
            tokens, after, context_mask, live = self.expected(n)
            assert self.run(n, 1) == int(live.any())
            assert self.decoder.token_buffer[0, :n].tolist() == tokens.tolist()
            for name in ("image_tokens_left", "tokens_left", "done"):
                assert torch.equal(getattr(self.decoder.grammar, name)[:n][live], getattr(after, name)[live])
            assert torch.equal(self.decoder.context_mask[:n][live], context_mask[live])
            buffer[step] = self.decoder.token_buffer[0]
            self.steps += int(live.sum())
        self.decoder.token_buffer.copy_(buffer)
        return steps

    def expected(self, n: int):
        decoder = self.decoder
        grammar = decoder.grammar.rows(slice(0, n))
        needs = required_filters([running.request.params for running in self.engine.running if running.prefilled])
        tokens = decoder.next_tokens(n, grammar, "all", self.engine.guided, needs)[decoder.branch_slots[COND, :n]]
        context_mask = decoder.context_mask[:n].scatter(1, tokens[:, None], True)
        return tokens, grammar.advance(tokens), context_mask, ~grammar.done


def test_every_sampled_token_is_that_of_the_reference(monkeypatch):
    """300 random requests, guided and not, join and leave a batch; equal logits, so tokens must be equal."""
    model = tiny_model(1)
    with torch.no_grad():
        model.output.weight[VOCAB.boi] *= 6
        for first, last in ((VOCAB.first_code, VOCAB.eoi), (VOCAB.first_text, VOCAB.size)):
            model.output.weight[first + 1 : last : 2] = model.output.weight[first : last - 1 : 2]  # ties
    drawn = random.Random(0)
    engine = Engine(model, VOCAB, N_CODES, 12, 30)
    check = Checked(engine)
    monkeypatch.setattr(engine.decoder, "run_compiled", check)
    monkeypatch.setattr(engine.decoder, "logits", lambda hidden, part: exact_logits(engine.decoder, hidden))
    for number in range(300):
        prompt, params, modality, stops = random_request(drawn)
        engine.add(prompt, params, modality, (number,), stops)
    made = sum(len(output.tokens) for output in engine.run())
    assert made > 2_000 and check.steps > made


def exact_logits(decoder: CPUDecoder, hidden: torch.Tensor) -> torch.Tensor:
    """The logits of the compiled step, bit for bit."""
    weight = decoder.model.output.weight.detach()
    out, x = torch.empty(len(hidden), len(weight)), hidden.contiguous()
    where = x.data_ptr(), len(x), x.shape[1], weight.data_ptr(), x.shape[1], 0, 0, len(weight), out.data_ptr()
    compiled_matmul(4)(*where, len(weight))
    return out
