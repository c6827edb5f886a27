"""The operations of the model and its losses, one file an op; each has a plain reference that every test runs."""

from nanochameleon.kernels.attention.qknorm_rope_attention import qknorm_rope_attention
from nanochameleon.kernels.attention.reference import attention
from nanochameleon.kernels.block.linear import linear
from nanochameleon.kernels.block.rms_norm import add_norm, norm_add, rms_norm
from nanochameleon.kernels.block.swiglu import swiglu
from nanochameleon.kernels.dispatch import explain, use_kernels
from nanochameleon.kernels.zloss.cross_entropy import zloss_cross_entropy
from nanochameleon.kernels.zloss.linear import linear_zloss_cross_entropy

__all__ = [
    "add_norm", "attention", "explain", "linear", "linear_zloss_cross_entropy", "norm_add", "qknorm_rope_attention",
    "rms_norm", "swiglu", "use_kernels", "zloss_cross_entropy",
]  # fmt: skip
