"""Where torch's flash attention can run."""

import torch

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
