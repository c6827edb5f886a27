"""Which decoder runs, and why: compiled for a CPU, with concatenated weights, or the reference (decoder.py)."""

import torch
from torch import nn

from nanochameleon.generation.decode_torch import FusedDecoder
from nanochameleon.generation.decoder import Decoder
from nanochameleon.kernels.dispatch import requested, why_numba_unavailable
from nanochameleon.parallel.sharding import is_sharded
from nanochameleon.vocab import Vocab

# What compiled steps save, in seconds. docs/results/generation.md has the 28 GB/s and the 8 s; the others are rounded
# estimates that no bench prints. They decide by their order of magnitude.
SAVED_A_STEP = 3e-3  # torch's overhead for a step of a small model
SAVED_A_BYTE = 0.09e-9  # torch reads the weights of one row at 8 GB/s, compiled code at 28
WORTH = 2.0  # what they must save: loading them takes 0.7 s, compiling them, once for each version, 8 s


def decide(model: nn.Module) -> tuple[str, str]:
    """(decoder, reason) for this model's device, dtype and sharding: "compiled", "fused" or "reference"."""
    device = model.output.weight.device
    if torch.is_autocast_enabled(device.type):
        return "reference", "autocast forbids the in-place sums of the faster decoders"
    if any(is_sharded(x) for x in model.parameters()):
        return "reference", "sharded tensors forbid the in-place sums of the faster decoders"
    if device.type == "cpu" and requested() == "reference":
        return "fused", "the reference kernels were requested, so nothing is compiled"
    if any(x.dtype != torch.float32 for x in model.parameters()):
        return "fused", "compiled steps take float32"
    if problem := why_numba_unavailable(device, torch.float32):
        return "fused", f"compiled steps cannot run: {problem}"
    return "compiled", "a step is one call, and reads the weights at the memory's speed"


def fastest_decoder(model: nn.Module, vocab: Vocab, image_len: int, n_slots: int, context: int) -> Decoder:
    """Make the decoder of `decide`."""
    name, _ = decide(model)
    if name == "compiled":
        from nanochameleon.generation.cpu.decode import CPUDecoder as Chosen  # needs Numba
    else:
        Chosen = FusedDecoder if name == "fused" else Decoder
    return Chosen(model, vocab, image_len, n_slots, context)


def kernels_for_one_call(model: nn.Module, steps: int) -> tuple[str | None, str]:
    """(kernels for use_kernels, reason) for a process that decodes at most so many steps and ends, such as sample.py.

    "reference" where compiled steps would save less than they cost to get; None leaves the choice as it is. It depends
    on sizes alone, and not on what is in a cache, so the same command always gives the same sample.
    """
    name, reason = decide(model)
    if requested() != "auto" or name != "compiled":
        return None, f"nothing to choose: {reason}"
    n_bytes = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    saved = steps * (SAVED_A_STEP + SAVED_A_BYTE * n_bytes)
    if saved > WORTH:
        return None, f"compiled steps save up to {saved:.1f} s"
    return "reference", f"compiled steps save {saved:.1f} s at most, less than getting them costs"
