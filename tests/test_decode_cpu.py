"""The step in Numba against the model's own forward pass, whatever the batch, the heads and the type of the weights."""

import subprocess
import sys

import pytest
import torch
from tiny import TINY_MODEL, tiny_model

from nanochameleon.decode_cpu import CPUDecoder, from_lanes, to_lanes
from nanochameleon.quantize import quantize_
from nanochameleon.transformer import Chameleon, KVCache

CPU = torch.device("cpu")
SHAPES = [{}, dict(n_heads=4, n_kv_heads=2, norm_order="post"), dict(n_heads=4, qk_norm_groups=2), dict(qk_norm=False)]


def random_norms(model: Chameleon) -> Chameleon:
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, float(name.endswith("weight")), 0.3)
    return model


@torch.inference_mode()
def steps(model: Chameleon, tokens: torch.Tensor) -> tuple[CPUDecoder, torch.Tensor, KVCache]:
    """-> the decoder, the hidden states (N, T, D) of its steps, and the cache that they filled."""
    n, length = tokens.shape
    cache = KVCache.empty(model.cfg, n + 1, length, CPU, torch.float32)
    decoder = CPUDecoder(model, cache)
    hidden = [decoder.step(tokens[:, i], torch.arange(n), torch.full((n,), i)) for i in range(length)]
    return decoder, torch.stack(hidden, 1), cache


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_steps_equal_one_forward_pass(changes, rows, int8):
    model = random_norms(tiny_model(2, **changes))
    model = quantize_(model) if int8 else model
    tokens = torch.randint(TINY_MODEL.vocab_size, (rows, 7), generator=torch.Generator().manual_seed(rows))
    decoder, hidden, cache = steps(model, tokens)
    with torch.inference_mode():
        whole = model(tokens)
        torch.testing.assert_close(hidden, whole, atol=5e-5, rtol=1e-4)
        for columns in (slice(4, 12), slice(None)):
            torch.testing.assert_close(
                decoder.logits(hidden[:, -1], columns), model.logits(whole[:, -1], columns), atol=5e-4, rtol=1e-4
            )
        other = KVCache.empty(model.cfg, rows + 1, 7, CPU, torch.float32)
        positions = torch.arange(7).expand(rows, 7)
        model(tokens, positions, cache=other.window(slice(0, rows), positions, 7))
    torch.testing.assert_close(cache.keys, other.keys, atol=5e-5, rtol=1e-4)  # the row that took no part is 0 still
    torch.testing.assert_close(cache.values, other.values, atol=5e-5, rtol=1e-4)


def test_a_row_has_the_same_bits_whoever_is_beside_it():
    tokens = torch.randint(TINY_MODEL.vocab_size, (20, 5), generator=torch.Generator().manual_seed(0))
    model = random_norms(tiny_model())
    _, together, _ = steps(model, tokens)
    for some in ([3, 7], [19, 0, 3], list(range(19, 2, -1))):
        assert torch.equal(steps(model, tokens[some])[1], together[some])


@torch.inference_mode()
@pytest.mark.parametrize("parts", [(1, 20), (17, 4), (20, 1), (21,)])
def test_a_prompt_in_any_parts_is_one_forward_pass(parts):
    model, tokens = random_norms(tiny_model(3)), torch.arange(30, 51)
    cache = KVCache.empty(model.cfg, 3, 30, CPU, torch.float32)
    decoder, at, hidden = CPUDecoder(model, cache), 0, []
    for part in parts:
        places = torch.full((part,), 1), torch.arange(at, at + part)
        hidden.append(decoder.step(tokens[at : at + part], *places))
        at += part
    torch.testing.assert_close(torch.cat(hidden), model(tokens[None])[0], atol=5e-5, rtol=1e-4)
    assert not cache.keys[:, [0, 2]].any()


@pytest.mark.parametrize("rows", [1, 2, 16, 33])
def test_lanes_there_and_back(rows):
    x = torch.randn(rows, 6)
    lanes = to_lanes(x)
    assert lanes.shape == (-(-rows // lanes.shape[2]), 6, 1 if rows == 1 else 16)
    assert torch.equal(from_lanes(lanes, rows), x)


def test_weights_that_are_not_joined_are_not_copied():
    model = tiny_model()
    decoder = CPUDecoder(model, KVCache.empty(model.cfg, 1, 8, CPU, torch.float32))
    (_, (wo, _), _, (w2, _)), block = decoder.weights[0], model.layers[0]
    pairs = [(wo, block.attention.wo), (w2, block.feed_forward.w2), (decoder.output, model.output)]
    assert all(array.ctypes.data == layer.weight.data_ptr() for array, layer in pairs)


def test_torch_keeps_its_number_of_threads():
    """Numba's first call would raise it to all cores; training after a sample would then round differently."""
    lines = """
import torch
torch.set_num_threads(1)
from nanochameleon import decode_cpu
decode_cpu.share_threads()
print(torch.get_num_threads())
"""
    said = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["1"]
