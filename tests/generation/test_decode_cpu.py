"""The compiled step against the model's own forward pass and against the choices of sampling.py, whatever the batch,
the heads, the type of the weights and the number of threads."""

import ctypes
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import N_CODES, TINY_MODEL, VOCAB, random_task, tiny_model

from nanochameleon.generation.cpu import decode as decode_cpu
from nanochameleon.generation.cpu.matmul import ARGUMENTS, product_address
from nanochameleon.generation.decoder import Decoder
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.quantize import quantize_
from nanochameleon.generation.sampling import FULL, needed
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


def team(monkeypatch, members: int) -> None:
    """However small the model and the machine."""
    monkeypatch.setattr(decode_cpu, "team_size", lambda cfg: members)


def decoder_of(model: Chameleon, rows: int, context: int = 30) -> Decoder:
    return Decoder(model, VOCAB, N_CODES, rows, context)


@torch.inference_mode()
def steps(model: Chameleon, tokens: torch.Tensor) -> tuple[Decoder, torch.Tensor]:
    """-> the decoder, and the hidden states (N, T, D) of reading one id of each row at a time."""
    decoder, hidden = decoder_of(model, len(tokens) + 1), []
    for i, column in enumerate(tokens.T.tolist()):
        decoder.prefill([([token], row, i) for row, token in enumerate(column)])
        hidden.append(decoder.hidden[:-1].clone())
    return decoder, torch.stack(hidden, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


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
    # the row that took no part is 0 still
    torch.testing.assert_close(decoder.cache.keys, other.keys, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(decoder.cache.values, other.values, atol=5e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("changes", SHAPES[:2], ids=str)
def test_a_row_has_the_same_bits_whoever_is_beside_it_and_whoever_computes_it(monkeypatch, members, changes):
    tokens = torch.randint(TINY_MODEL.vocab_size, (20, 5), generator=torch.Generator().manual_seed(0))
    model = random_norms(tiny_model(**changes))
    _, together = steps(model, tokens)
    team(monkeypatch, members)
    for some in ([5], [3, 7], [19, 0, 3], list(range(19, 2, -1))):
        assert torch.equal(steps(model, tokens[some])[1], together[some])
    decoder = decoder_of(model, 20)
    decoder.prefill([(row, i, 0) for i, row in enumerate(tokens.tolist())])  # whole prompts at once
    assert torch.equal(decoder.hidden, together[:, -1])


@torch.inference_mode()
@pytest.mark.parametrize("parts", [(1, 20), (17, 4), (20, 1), (21,)])
def test_a_prompt_in_any_parts_is_one_forward_pass(monkeypatch, parts):
    monkeypatch.setattr(decode_cpu, "READ", 6)
    model, tokens = random_norms(tiny_model(3)), torch.arange(30, 51)
    decoder, at = decoder_of(model, 3), 0
    for part in parts:
        decoder.prefill([(tokens[at : at + part].tolist(), 1, at)])
        at += part
        torch.testing.assert_close(decoder.hidden[1], model(tokens[None])[0, at - 1], atol=5e-5, rtol=1e-4)
    assert not decoder.cache.keys[:, [0, 2]].any() and not decoder.hidden[[0, 2]].any()


def product(size: int):
    """The compiled product for weights of `size` bytes a number, for Python."""
    kinds = [ctypes.c_int64] * ARGUMENTS
    return ctypes.CFUNCTYPE(None, *kinds)(product_address(size))


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 4]), st.integers(0, 99))
def test_the_product_of_any_shape(rows, outputs, k, size, seed):
    """float32 and int8; nothing beside the outputs that are asked for is written, and a row's bits are its own."""
    random = np.random.default_rng(seed)
    x, w = random.normal(size=(rows, k + 3)).astype(np.float32), random.normal(size=(outputs, k))
    w = (w * 40).astype(np.int8) if size == 1 else w.astype(np.float32)
    scale, out = random.random(outputs).astype(np.float32), np.full((rows, outputs + 2), 7, np.float32)
    first, last = sorted(random.integers(0, outputs + 1, 2))
    where = w.ctypes.data, k, scale.ctypes.data, first, last
    product(size)(x.ctypes.data, rows, k + 3, *where, out.ctypes.data, outputs + 2)
    wanted = x[:, :k].astype(float) @ w.astype(float).T * (scale if size == 1 else 1)
    np.testing.assert_allclose(
        out[:, first:last], wanted[:, first:last], rtol=1e-4, atol=1e-4 * (40 if size == 1 else 1)
    )
    out[:, first:last] = 7
    assert (out == 7).all()


def test_weights_are_not_copied():
    model = tiny_model()
    kept = {x.data_ptr() for x in decoder_of(model, 1).cpu.kept if isinstance(x, torch.Tensor)}
    matrices = [x for name, x in model.named_parameters() if x.ndim == 2 and "norm" not in name]
    assert {x.data_ptr() for x in matrices} < kept


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


class Checked:
    """In the place of CPUDecoder.run: after every step the same from the states before it, by sampling.py's functions
    on the same logits."""

    def __init__(self, engine: Engine):
        self.engine, self.decoder, self.cpu = engine, engine.decoder, engine.decoder.cpu
        self.run, self.steps = self.cpu.run, 0

    def __call__(self, n: int, steps: int, reading: int = 0) -> int:
        if reading:
            return self.run(n, steps, reading)
        log = self.decoder.log.clone()
        for step in range(steps):
            ids, after, seen, live = self.expected(n)
            assert self.run(n, 1) == int(live.any())
            assert self.decoder.log[0, :n].tolist() == ids.tolist()
            for name in ("left", "room", "done"):
                assert torch.equal(getattr(self.decoder.grammar, name)[:n][live], getattr(after, name)[live])
            assert torch.equal(self.decoder.seen[:n][live], seen[live])
            log[step] = self.decoder.log[0]
            self.steps += int(live.sum())
        self.decoder.log.copy_(log)
        return steps

    def expected(self, n: int):
        decoder = self.decoder
        grammar, columns = decoder.grammar.rows(slice(0, n)), "all"
        needs = needed([sample.task.options for sample in self.engine.running if sample.begun])
        ids = decoder.choose(n, grammar, columns, self.engine.guided, needs)[decoder.sample[FULL, :n]]
        seen = decoder.seen[:n].scatter(1, ids[:, None], True)
        return ids, grammar.after(ids), seen, ~grammar.done


def test_every_choice_is_that_of_the_reference(monkeypatch):
    """300 random tasks, guided and not, in a batch that they join and leave; equal logits, so ids are equal."""
    model = tiny_model(1)
    with torch.no_grad():
        model.output.weight[VOCAB.boi] *= 6
        for first, last in ((VOCAB.first_code, VOCAB.eoi), (VOCAB.first_text, VOCAB.size)):
            model.output.weight[first + 1 : last : 2] = model.output.weight[first : last - 1 : 2]  # ties
    drawn = random.Random(0)
    engine = Engine(model, VOCAB, N_CODES, 12, 30)
    check = Checked(engine)
    monkeypatch.setattr(engine.decoder.cpu, "run", check)
    monkeypatch.setattr(engine.decoder, "logits", lambda hidden, columns: exact_logits(engine.decoder, hidden))
    for number in range(300):
        prompt, options, mode, stops = random_task(drawn)
        engine.add(prompt, options, mode, (number,), stops)
    made = sum(len(news.ids) for news in engine.run())
    assert made > 2_000 and check.steps > made


def exact_logits(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    """As the compiled step has them."""
    weight = decoder.model.output.weight.detach()
    out, x = torch.empty(len(hidden), len(weight)), hidden.contiguous()
    where = x.data_ptr(), len(x), x.shape[1], weight.data_ptr(), x.shape[1], 0, 0, len(weight), out.data_ptr()
    product(4)(*where, len(weight))
    return out
