"""Which decoder runs and why, and when one call of sample.py is too short for compiled code."""

from dataclasses import replace

import pytest
import torch
from tiny import VOCAB, released_model

from nanochameleon.generation.cpu.decode import CPUDecoder
from nanochameleon.generation.decode_torch import FusedDecoder
from nanochameleon.generation.decoder import Decoder
from nanochameleon.generation.fastest import decide, fastest_decoder, kernels_for_one_call
from nanochameleon.generation.quantize import quantize_
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.transformer import Chameleon

SIZES = VOCAB, 16, 2, 24


@torch.inference_mode()
@pytest.mark.parametrize("int8", [False, True])
def test_each_decoder_is_the_one_that_was_decided_and_says_why(int8):
    model = released_model(1)
    model = quantize_(model) if int8 else model
    with torch.autocast("cpu", torch.bfloat16):
        assert decide(model)[0] == "reference" and type(fastest_decoder(model, *SIZES)) is Decoder
    with use_kernels("reference"):
        assert decide(model)[0] == "fused" and type(fastest_decoder(model, *SIZES)) is FusedDecoder
        assert "requested" in decide(model)[1]
    assert decide(model)[0] == "compiled" and type(fastest_decoder(model, *SIZES)) is CPUDecoder


@torch.inference_mode()
def test_what_cannot_be_compiled_is_not(monkeypatch):
    assert decide(released_model(1, torch.bfloat16)) == ("fused", "compiled steps take float32")
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert decide(released_model(1)) == ("fused", "compiled steps cannot run: NUMBA_DISABLE_JIT is set")


def test_a_short_call_compiles_nothing_and_a_long_one_does():
    model = released_model(1)
    assert kernels_for_one_call(model, 65)[0] == "reference"
    assert kernels_for_one_call(model, 5_000)[0] is None
    with torch.device("meta"):
        wide = Chameleon(replace(model.cfg, dim=2_048, n_layers=8))  # a step reads 2 GB of weights
    wide.output.weight = torch.nn.Parameter(torch.empty(1, 1))  # on a CPU
    assert kernels_for_one_call(wide, 65)[0] is None


@pytest.mark.parametrize("kernels", ["reference", "numba"])
def test_a_request_for_kernels_is_left_alone(kernels):
    with use_kernels(kernels):
        assert kernels_for_one_call(released_model(1), 65)[0] is None
    assert kernels_for_one_call(released_model(1, torch.bfloat16), 65)[0] is None
