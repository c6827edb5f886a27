"""torch's flash attention for sequences of any lengths, and where it can run. Not here: which sequences.

torch.nn.attention.varlen wraps the same operation, but takes shared key heads only since torch 2.12. The operation
itself takes them since torch 2.5.
"""

import torch
from torch import Tensor

from nanochameleon.kernels.constant import assume_constant_result


@assume_constant_result
def flash_available(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash attention takes such queries and keys."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    """q (T_q, H, E), k and v (T_k, G, E) -> (T_q, H, E), for N sequences, one after the other. It has a gradient.

    cu_seq_q, cu_seq_k: (N + 1,) int32, where each sequence begins, then T_q or T_k.
    """
    lengths, dropout, debug = (cu_seq_q, cu_seq_k, max_q, max_k), 0.0, False
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, dropout, causal, debug)[0]
