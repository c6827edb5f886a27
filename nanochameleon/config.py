"""Every number of a run, as frozen dataclasses: what it is, its unit, the paper's value.

Derived values are properties and are never stored. Presets (presets.py) are functions that return a `RunConfig`;
the command line (train.py) overrides any field of one by its dotted name. No torch here, so that --help is quick.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class VQGANConfig:
    """The image tokenizer's network, in the layout of the release (its values are these defaults)."""

    resolution: int = 512  # pixels a side; 512 in the release
    ch: int = 128  # channels at full resolution
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level over ch; each level but the last halves the side
    n_res_blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    z_channels: int = 256  # channels between encoder and quantizer
    embed_dim: int = 256  # length of a codebook vector
    n_codes: int = 8_192  # entries of the codebook
    n_groups: int = 32  # groups of every GroupNorm (eps 1e-6)
    mid_attention: bool = True  # self-attention in the middle block, single head; True in the release

    @property
    def factor(self) -> int:
        """Pixels a code spans along a side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def grid(self) -> int:
        """Codes a side."""
        return self.resolution // self.factor

    @property
    def codes_per_image(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class ModelConfig:
    """The transformer (paper Table 1; fact names as in Llama). Defaults are the 7B's."""

    vocab_size: int = 65_536  # ids, words and picture codes together
    dim: int = 4_096  # width of the residual stream
    n_layers: int = 32  # blocks
    n_heads: int = 32  # query heads
    n_kv_heads: int | None = None  # key and value heads; None means n_heads (no GQA), 8 in the 34B
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    max_seq_len: int = 4_096  # ids of context
    norm_eps: float = 1e-5  # RMSNorm and QK-norm
    rope_theta: float = 10_000.0  # base of the rotary embedding
    qk_norm: bool = True  # LayerNorm with bias on queries and keys, before the rotary embedding (paper 2.3)
    qk_norm_groups: int = 1  # groups of heads with their own QK-norm vectors; 1 in the 7B, 4 shards in the 34B
    norm_order: Literal["pre", "post"] = "pre"  # pre: x + f(norm(x)), 7B; post: x + norm(f(x)), 34B
    dropout: float = 0.0  # on each branch's output; paper: 0.1 for the 7B, 0 for the 34B, 0.05 in alignment

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the SwiGLU: two thirds of 4 dim, rounded up to a multiple of `multiple_of` (11,008 for the 7B)."""
        hidden = int(2 * 4 * self.dim / 3)
        return self.multiple_of * -(-hidden // self.multiple_of)

    def __post_init__(self):
        for whole, part, why in (
            (self.dim, self.n_heads, "n_heads must divide dim"),
            (self.n_heads, self.kv_heads, "n_kv_heads must divide n_heads"),
            (self.kv_heads, self.qk_norm_groups, "qk_norm_groups must divide n_kv_heads"),
            (self.head_dim, 2, "the head dimension must be even for the rotary embedding"),
        ):
            if whole % part:
                raise ValueError(f"{why}: {whole} is not a multiple of {part}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and clipping (paper section 2.3 and Table 1)."""

    lr: float = 1e-4  # peak learning rate; 1e-4 for both sizes
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    eps: float = 1e-5  # AdamW; the paper's is large
    weight_decay: float = 0.1  # on matrices; not on norms and biases
    warmup: int = 4_000  # steps of linear warm-up
    schedule: Literal["exponential", "cosine", "constant"] = "exponential"  # after warm-up; cosine in alignment
    final: float = 0.01  # learning rate at the last step, as a share of the peak (the paper's rate is not given)
    clip: float = 1.0  # global gradient norm
