"""The operations of the model and its losses, one file an op; each has a plain reference that every test runs."""

from nanochameleon.kernels.attention import attention
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.kernels.normed_attention import normed_attention
from nanochameleon.kernels.zloss import zloss_cross_entropy

__all__ = ["attention", "normed_attention", "use_kernels", "zloss_cross_entropy"]
