"""int8 weights: how far they may be off, that a model decodes with them, and what they leave alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import N_CODES, VOCAB, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from nanochameleon.config import SamplingParams
from nanochameleon.generation.engine import generate
from nanochameleon.generation.quantize import QuantizedLinear, quantize, quantize_


@given(st.integers(0, 99), st.floats(1e-6, 1e6))
def test_no_weight_is_off_by_more_than_half_a_step(seed, size):
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed)) * size
    weight[2] = 0
    q, scale = quantize(weight)
    error = (q.double() * scale.double()[:, None] - weight.double()).abs()
    assert q.dtype == torch.int8 and (error <= 0.5001 * scale[:, None]).all()
    assert (q.abs().amax(1) == torch.tensor([127, 127, 0, 127, 127])).all() and (error[2] == 0).all()


def test_the_layer_is_a_matmul_with_the_rounded_weight():
    weight, x = torch.randn(6, 4).double(), torch.randn(3, 4).double()
    layer = QuantizedLinear(weight)
    rounded = layer.weight.double() * layer.scale[:, None]
    torch.testing.assert_close(layer(x), x @ rounded.T)
    torch.testing.assert_close(layer(x, slice(1, 5)), (x @ rounded.T)[:, 1:5])


def test_wide_layers_in_fp16_are_finite_and_right():
    """4,096 codes of up to 127 add up to more than 65,504, which is where float16 ends."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.rand(6, 4_096, generator=generator) * 1e-3, torch.rand(3, 4_096, generator=generator)
    layer = QuantizedLinear(weight.half())
    assert layer.scale.dtype == torch.float32
    torch.testing.assert_close(layer(x.half()).float(), x @ weight.T, rtol=5e-3, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_passes_over_its_weight_only_to_cast_it(dtype):
    layer, x, passes = QuantizedLinear(torch.randn(60, 40).to(dtype)), torch.randn(3, 40).to(dtype), []

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if out.numel() == layer.weight.numel() and not func.is_view:
                passes.append(func)
            return out

    with Passes():
        y = layer(x)
    assert passes == [torch.ops.aten._to_copy.default] and y.dtype == dtype
    exact = x.double() @ (layer.weight.double() * layer.scale[:, None]).T
    # the result and its scaled value are rounded to dtype; the 40 products are added in float32, in whatever order
    added = 40 * torch.finfo(torch.float32).eps / 2 * (x.abs().double() @ (layer.weight.abs().double()).T * layer.scale)
    room = torch.finfo(dtype).eps * exact.abs().max() + added.max()
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=room.item())


def test_under_autocast_in_fp16_a_layer_is_finite():
    layer, x = QuantizedLinear(torch.full((6, 4_096), 1e-3)), torch.ones(3, 4_096)
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(layer(x).float(), torch.full((3, 6), 4.096), rtol=5e-3, atol=0)


def test_every_linear_layer_is_int8_and_nothing_else():
    model, whole = quantize_(tiny_model()), tiny_model()
    types = {name: x.dtype for name, x in model.state_dict().items()}
    matrices = {
        name for name, x in whole.named_parameters() if x.ndim == 2 and "norm" not in name and "tok" not in name
    }
    assert {name for name, kind in types.items() if kind == torch.int8} == matrices
    tokens = torch.arange(20)[None]
    close, far = model.logits(model(tokens)), whole.logits(whole(tokens))
    assert 0 < (close - far).norm() < 0.05 * far.norm()


def test_a_quantised_model_generates_in_both_ways():
    """float64 takes torch's path and float32 Numba's; bf16 as well."""
    params = SamplingParams(temperature=0.0, image_temperature=0.0, max_new_tokens=20)
    prompts = [[VOCAB.bos], [VOCAB.bos, VOCAB.boi]]
    tokens = generate(quantize_(tiny_model()), prompts, VOCAB, N_CODES, params)
    assert tokens == generate(quantize_(tiny_model().double()), prompts, VOCAB, N_CODES, params)
    for kind in (torch.bfloat16, torch.float16):
        assert all(generate(quantize_(tiny_model().to(kind)), prompts, VOCAB, N_CODES, params))
        assert all(generate(tiny_model().to(kind), prompts, VOCAB, N_CODES, params))
