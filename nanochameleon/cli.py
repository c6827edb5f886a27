"""The command line: presets as subcommands, any field of one by its dotted name (tyro). Imports no torch."""

import dataclasses
import sys
from collections.abc import Sequence
from operator import attrgetter

import tyro

from nanochameleon.config import RunConfig
from nanochameleon.presets import PRESETS

AT_LEAST = {  # the smallest value of a field -> the fields
    0: ("seed", "optim.warmup", "tokenizers.n_merges", "tokenizers.warmup_steps", "tokenizers.optim.warmup"),
    1: (
        "model.n_layers", "model.multiple_of", "tokenizers.n_texts", "tokenizers.steps", "tokenizers.batch_size",
        "data.n_documents", "train.steps", "train.batch_size", "train.seq_len", "train.log_every", "train.sample_every",
        "train.save_every", "train.keep", "evaluation.pictures", "evaluation.answers", "evaluation.reconstructions",
    ),
}  # fmt: skip


def first_line(doc: str | None) -> str:
    return (doc or "").strip().splitlines()[0]


def check(cfg: RunConfig) -> None:
    """Raises ValueError, naming the field, for a number that is too small."""
    for least, names in AT_LEAST.items():
        for name in names:
            value = attrgetter(name)(cfg)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
    if cfg.vqgan.n_groups < 1 or any(cfg.vqgan.ch * mult % cfg.vqgan.n_groups for mult in cfg.vqgan.ch_mult):
        raise ValueError(f"vqgan.n_groups ({cfg.vqgan.n_groups}) must divide the channels of every level")
    if cfg.tokenizers.warmup_steps >= cfg.tokenizers.steps:  # then the codebook would never be put to use
        raise ValueError(f"tokenizers.warmup_steps must be less than tokenizers.steps, {cfg.tokenizers.steps}")


def complete(cfg: RunConfig) -> RunConfig:
    """Sets what follows from other fields: the model's vocabulary and context.

    Raises ValueError for numbers out of range, and for a vocabulary beyond the 65,536 ids that token shards hold.
    """
    check(cfg)
    from nanochameleon.vocab import Vocab

    vocab = Vocab.toy(cfg.vqgan.n_codes, cfg.tokenizers.n_merges)
    if vocab.size > 2**16:
        raise ValueError(f"vqgan.n_codes and tokenizers.n_merges make {vocab.size:,} ids; at most 65,536 are possible")
    model = dataclasses.replace(cfg.model, vocab_size=vocab.size, max_seq_len=cfg.train.seq_len)
    return dataclasses.replace(cfg, model=model)


def parse_run(args: Sequence[str] | None = None) -> RunConfig:
    """Arguments -> a preset with its overrides. A wrong option or value ends the program with its name and code 2."""
    presets = {name: (first_line(preset.__doc__), preset()) for name, preset in PRESETS.items()}
    try:
        return complete(tyro.extras.overridable_config_cli(presets, args=args))
    except ValueError as error:  # a configuration's own check
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
