"""The operations of the model and its losses, one file an op; each has a plain reference that every test runs."""

from nanochameleon.kernels.attention import attention
from nanochameleon.kernels.dispatch import explain, use_kernels
from nanochameleon.kernels.linear import linear
from nanochameleon.kernels.linear_zloss import linear_zloss_cross_entropy
from nanochameleon.kernels.normed_attention import normed_attention
from nanochameleon.kernels.rms_norm import add_norm, norm_add, rms_norm
from nanochameleon.kernels.swiglu import swiglu
from nanochameleon.kernels.zloss import zloss_cross_entropy

__all__ = [
    "add_norm", "attention", "explain", "linear", "linear_zloss_cross_entropy", "norm_add", "normed_attention",
    "rms_norm", "swiglu", "use_kernels", "zloss_cross_entropy",
]  # fmt: skip
