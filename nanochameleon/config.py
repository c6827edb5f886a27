"""Every number of a run as frozen dataclasses: its meaning, its unit, the paper's value.

A preset (presets.py) is a function that returns a `RunConfig`. The command line (cli.py) overrides any field by its
dotted name. Derived values are properties and are never stored. This file does not import torch, so --help is quick.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class VQGANConfig:
    """The image tokenizer's network. The defaults are the released model's."""

    resolution: int = 512  # pixels a side; 512 in the release
    ch: int = 128  # channels at full resolution
    # channels of each level, in units of ch; every level but the last halves the side
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    n_res_blocks: int = 2  # residual blocks per level in the encoder; the decoder has one more
    z_channels: int = 256  # channels between encoder and quantizer
    embed_dim: int = 256  # length of a codebook vector
    n_codes: int = 8_192  # entries of the codebook
    n_groups: int = 32  # groups of every GroupNorm (eps 1e-6)
    mid_attention: bool = True  # self-attention in the middle block, single head; True in the release
    window: int | None = None  # side in pixels of what the encoder sees at once; None is the whole image, as released

    @property
    def factor(self) -> int:
        """Side in pixels of the square that one code represents."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def grid(self) -> int:
        """Codes along one side."""
        return self.resolution // self.factor

    @property
    def codes_per_image(self) -> int:
        return self.grid**2

    def __post_init__(self):
        if not 1 <= len(self.ch_mult) <= 16:
            raise ValueError("ch_mult must have 1 to 16 numbers, one for each level")
        window = self.window or self.resolution
        if window < 1 or self.resolution % self.factor or self.resolution % window or window % self.factor:
            sizes = f"resolution {self.resolution}, window {window} and factor {self.factor} (2 ** (levels - 1))"
            raise ValueError(f"{sizes} must divide one another")


@dataclass(frozen=True)
class ModelConfig:
    """The transformer (paper Table 1), with Llama's field names. The defaults are the 7B's."""

    vocab_size: int = 65_536  # all tokens: text, image codes and specials
    dim: int = 4_096  # width of the residual stream
    n_layers: int = 32  # blocks
    n_heads: int = 32  # query heads
    n_kv_heads: int | None = None  # key-value heads; None means n_heads (no GQA); 8 in the 34B
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    # scales the feed-forward width before rounding; None in both released sizes
    ffn_dim_multiplier: float | None = None
    max_seq_len: int = 4_096  # tokens of context
    norm_eps: float = 1e-5  # RMSNorm and QK-norm
    rope_theta: float = 10_000.0  # base of the rotary embedding
    qk_norm: bool = True  # LayerNorm with bias on queries and keys, before the rotary embedding (paper 2.3)
    qk_norm_groups: int = 1  # groups of heads that share QK-norm weights; 1 in the 7B, 4 in the 34B
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
        """Width of the SwiGLU: two thirds of 4 * dim, rounded up to a multiple of `multiple_of` (11,008 for the 7B)."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)

    def __post_init__(self):
        if min(self.dim, self.n_heads, self.kv_heads, self.qk_norm_groups) < 1:
            raise ValueError("dim, n_heads, n_kv_heads and qk_norm_groups must be at least 1")
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
    """Optimizer, learning rate schedule and clipping (paper section 2.3 and Table 1)."""

    # muon is not the paper's: orthogonal updates for matrices, AdamW for the rest
    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4  # peak learning rate; 1e-4 for both sizes
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    eps: float = 1e-5  # AdamW; larger than usual, as in the paper
    weight_decay: float = 0.1  # on matrices, not on norms and biases
    warmup_steps: int = 4_000  # steps of linear warm-up
    schedule: Literal["exponential", "cosine", "constant"] = "exponential"  # after the warm-up; cosine in alignment
    min_lr_ratio: float = 0.01  # last rate over the peak; the paper says 0, which an exponential never reaches
    grad_clip: float = 1.0  # largest global gradient norm


@dataclass(frozen=True)
class TokenizerTraining:
    """Training of both tokenizers. The paper gives no numbers."""

    n_merges: int = 512  # BPE merges beyond the 256 bytes
    n_texts: int = 4_000  # texts that the BPE is trained on
    steps: int = 600  # of the image tokenizer
    batch_size: int = 16  # images a step
    warmup_steps: int = 150  # first steps, without quantization; k-means on the latents then sets the codebook
    optim: OptimConfig = OptimConfig(
        "muon", lr=3e-3, eps=1e-8, weight_decay=0.0, warmup_steps=20, schedule="cosine", grad_clip=100.0
    )
    commitment_weight: float = 0.25  # weight of the commitment loss
    codebook: Literal["ema", "loss"] = "ema"  # how the codebook learns: by moving averages or by the codebook loss
    ema_decay: float = 0.95  # of the moving averages, a step
    dead_code_threshold: float = 0.03  # a code with a lower moving average of uses per step is reset
    perceptual_weight: float = 0.1  # weight of the perceptual loss (images/losses.py)
    disc_weight: float = 0.0  # weight of the discriminator's loss, times an adaptive weight; 0 turns it off
    disc_start: int = 300  # first step of the discriminator
    disc_channels: int = 32  # channels of the discriminator's first layer


@dataclass(frozen=True)
class DataConfig:
    """The source of documents."""

    source: Literal["shapes", "shapes_rich", "emoji", "folder", "prepared"] = "shapes"  # prepared: token shards
    path: Path | None = None  # folder: images and captions; prepared: what `nanochameleon.data.prepare` wrote
    n_documents: int | None = None  # documents to prepare; None: as many as the run reads, so none repeats
    tokenize_on_the_fly: bool = False  # tokenize when a batch asks, without shards; images are encoded each time


@dataclass(frozen=True)
class StageConfig:
    """A stage of the transformer's training with its own mixture (paper section 2.2: two stages, 80% and 20%).

    The stages that train.py runs are something else: the transformer is one of those.
    """

    name: str = "all"  # in the log
    fraction: float = 1.0  # part of train.steps, relative to the sum over all stages
    # each source of documents and its fraction of the sequences, relative to their sum, such as: pairs 0.7 text 0.3
    weights: tuple[tuple[str, float], ...] = (("pairs", 0.5), ("questions", 0.2), ("interleaved", 0.3))


@dataclass(frozen=True)
class TrainConfig:
    """The transformer's training."""

    steps: int = 1_000  # updates
    batch_size: int = 8  # sequences a step
    seq_len: int = 256  # tokens a sequence; documents are packed whole
    z_loss: float = 1e-5  # coefficient of (log Z)^2 (paper 2.3)
    # images whose tokens are learnt. drawn: those that words precede, since nothing predicts an image that opens a
    # document. none: no image at all (figure 6b)
    image_loss: Literal["all", "drawn", "none"] = "all"
    assistant_only_loss: bool = False  # learn from answers alone, not from prompts: alignment (paper 3.2)
    image_token_noise: float = 0.0  # largest part of a drawn image's tokens to corrupt: training/image_targets.py
    image_token_noise_end: float | None = None  # the same at the last step, linearly from the first; None: no change
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of matmuls; auto is the faster one, decided once a run
    # output layer and loss in one op that never holds all logits; auto: from a vocabulary of 32,768 up
    fused_output: Literal["auto", "on", "off"] = "auto"
    log_every: int = 10  # steps
    sample_every: int | None = 400  # steps between sheets of samples in samples/
    sample_minutes: float | None = None  # minutes between them, from the start of train.py on; either of the two draws
    save_every: int = 400  # steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints to keep; the one with the lowest loss is kept, too
    tensorboard: bool = False  # also write the log for TensorBoard, into tensorboard/


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of torchrun share the work. None of it changes what is learnt, up to rounding."""

    # each rank holds the whole model (ddp) or a shard of every tensor (fsdp)
    data_parallel: Literal["ddp", "fsdp"] = "ddp"
    tensor_parallel: int = 1  # ranks that share each layer; more than 1 implies fsdp
    micro_batch: int | None = None  # sequences that a rank runs at a time; None is all of its batch
    activation_checkpointing: bool = False  # recompute each block's activations in the backward pass
    # torch.compile each block; auto: on a GPU where Triton and a C compiler are installed
    compile: Literal["auto", "on", "off"] = "auto"
    # a GPU repeats a run bit for bit, more slowly; a CPU does with one thread (with two, sums may differ by rounding)
    deterministic: bool = False
    timeout: int = 600  # seconds that a rank waits for the others before it gives up
    save_in_background: bool = True  # write checkpoints during training, from a copy in host memory


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled. The defaults are the released code's; what it lacks (top_k, min_p) is off."""

    temperature: float = 0.7  # of text; 0 is greedy
    top_p: float = 0.9  # of text: keep the smallest set of tokens with this probability
    top_k: int | None = None  # of text: keep at most this many tokens
    min_p: float = 0.0  # of text: keep tokens with at least this fraction of the likeliest one's probability
    repetition_penalty: float = 1.2  # of text: on every token of the context; 1 turns it off
    image_temperature: float = 0.7  # of image codes
    image_top_p: float = 0.9  # of image codes
    image_top_k: int | None = None  # of image codes
    image_min_p: float = 0.0  # of image codes
    guidance_scale: float = 3.0  # of images, by the text of the prompt; guidance is off where both scales are 1
    image_guidance_scale: float = 1.2  # of images, by the images of the prompt
    max_new_tokens: int = 4_096  # tokens to write at most; the context also ends a sample


@dataclass(frozen=True)
class EvalConfig:
    """How much the report measures."""

    images: int = 300  # prompts to draw, for seen and for held-out compositions each
    answers: int = 400  # images to caption, and as many questions
    reconstructions: int = 400  # images that score the image tokenizer
    alignment: int = 100  # prompts of each alignment category that was trained


@dataclass(frozen=True)
class RunConfig:
    """One run, from raw data to the report."""

    name: str  # the preset's
    vqgan: VQGANConfig
    model: ModelConfig  # vocab_size and max_seq_len are set from the vocabulary and train.seq_len
    optim: OptimConfig
    tokenizers: TokenizerTraining = field(default_factory=TokenizerTraining)
    data: DataConfig = field(default_factory=DataConfig)
    stages: tuple[StageConfig, ...] = (StageConfig(),)  # one after another, under one learning rate schedule
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SamplingParams = field(default_factory=SamplingParams)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    init_from: Path | None = None  # a run or a model in any layout: its sizes, tokenizers and weights
    # image decoder for an init_from without one: vqgan.ckpt or vqgan_decoder.safetensors
    init_vqgan: Path | None = None
    out: Path | None = None  # folder of the run; None is runs/NAME
    seed: int = 0  # of every random draw
    device: str = "auto"  # cpu, cuda, ...; auto takes a GPU if there is one
    overwrite: bool = False  # replace the run in the folder

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / self.name

    @property
    def stage_starts(self) -> list[int]:
        """The first step of each stage."""
        total, starts = sum(stage.fraction for stage in self.stages), [0.0]
        for stage in self.stages[:-1]:
            starts.append(starts[-1] + stage.fraction)
        return [round(start / total * self.train.steps) for start in starts]

    @property
    def mixture(self) -> dict[str, float]:
        """Each source's fraction of all sequences, over all stages."""
        total, shares = sum(stage.fraction for stage in self.stages), {}
        for stage in self.stages:
            weights = dict(stage.weights)
            for name, weight in weights.items():
                part = weight / sum(weights.values()) * stage.fraction / total
                shares[name] = shares.get(name, 0.0) + part
        return {name: share for name, share in shares.items() if share}
