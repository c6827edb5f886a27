"""Every variant of a decode step of the 7B's width on the fake device; runs in the child process."""

from itertools import product
from unittest.mock import patch

import torch

from fake_cuda.device import fake_tensors
from fake_cuda.recorder import Recorder
from fake_cuda.training_step import VOCAB, on_device
from nanochameleon.config import ModelConfig
from nanochameleon.generation.decode_torch import FusedDecoder
from nanochameleon.generation.decoder import Decoder
from nanochameleon.generation.quantize import quantize_
from nanochameleon.kernels.dispatch import use_kernels

SLOTS, KV_LEN, CONTEXT = 4, 2_048, 4_096
MODELS = {
    "dense": ModelConfig(dim=4_096, n_layers=2, n_heads=32),
    "int8": ModelConfig(dim=4_096, n_layers=2, n_heads=32),
    "grouped": ModelConfig(dim=4_096, n_layers=2, n_heads=32, n_kv_heads=8),
}
NEEDS = [(False, False, False), (True, False, True), (True, True, True)]  # draws, sorts, penalised: greedy to top-p


def decode_steps(name: str, kernels: str, fused: bool) -> dict[str, dict]:
    """{variant: what the recorder found}, for a model of MODELS in bfloat16."""
    found = {}
    with fake_tensors(), torch.inference_mode(), use_kernels(kernels):
        model = on_device(MODELS[name], torch.bfloat16).eval()
        if name == "int8":
            quantize_(model)
        decoder = (FusedDecoder if fused else Decoder)(model, VOCAB, 1_024, SLOTS, CONTEXT)
        for part, guided, needs in product(("text", "image", "all"), (False, True), NEEDS):
            with Recorder() as recorder:
                decoder.step(SLOTS, KV_LEN, part, guided, needs)
            variant = f"{part}{', guided' if guided else ''}, draws/sorts/penalty {needs}"
            found[variant] = {"syncs": recorder.syncs, "mixed": recorder.mixed}
            found[variant]["ops"] = sum(recorder.calls.values())
    return found


def all_decode_steps() -> dict[str, dict[str, dict]]:
    cases = [(name, kernels, True) for name, kernels in product(MODELS, ("reference", "cuda"))]
    cases.append(("dense", "reference", False))  # the plain decoder: under autocast, and for sharded models
    with patch("nanochameleon.kernels.gpu.packages.missing_cuda_package", lambda: None):
        return {
            f"{name}, {kernels}, {'fused' if fused else 'plain'}": decode_steps(name, kernels, fused)
            for name, kernels, fused in cases
        }
