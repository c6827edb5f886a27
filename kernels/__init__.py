"""The operations of the model and its losses, one file an op; each has a plain reference that every test runs."""

from nanochameleon.kernels.attention import attention
from nanochameleon.kernels.zloss import zloss_cross_entropy

__all__ = ["attention", "zloss_cross_entropy"]
