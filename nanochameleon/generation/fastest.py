"""Which decoder runs: compiled for a CPU, with concatenated weights, or the reference (decoder.py)."""

import torch
from torch import nn

from nanochameleon.generation.decode_torch import FusedDecoder
from nanochameleon.generation.decoder import Decoder
from nanochameleon.kernels.dispatch import why_numba_unavailable
from nanochameleon.parallel.sharding import is_sharded
from nanochameleon.vocab import Vocab


def fastest_decoder(model: nn.Module, vocab: Vocab, image_len: int, n_slots: int, context: int) -> Decoder:
    """Make the fastest decoder for this model's device, dtype and sharding."""
    device, sizes = model.output.weight.device, (vocab, image_len, n_slots, context)
    # Autocast and sharded tensors forbid the in-place sums of the faster decoders.
    if torch.is_autocast_enabled(device.type) or any(is_sharded(x) for x in model.parameters()):
        return Decoder(model, *sizes)
    in_float32 = all(x.dtype == torch.float32 for x in model.parameters())
    if in_float32 and why_numba_unavailable(device, torch.float32) is None:
        from nanochameleon.generation.cpu.decode import CPUDecoder  # needs Numba

        return CPUDecoder(model, *sizes)
    return FusedDecoder(model, *sizes)
