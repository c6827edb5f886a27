"""The command line: presets as subcommands, any field of one by its dotted name (tyro). Imports no torch."""

import dataclasses
import sys
from collections.abc import Sequence

import tyro

from nanochameleon.config import RunConfig
from nanochameleon.presets import PRESETS


def first_line(doc: str | None) -> str:
    return (doc or "").strip().splitlines()[0]


def complete(cfg: RunConfig) -> RunConfig:
    """Sets what follows from other fields: the model's vocabulary and context."""
    from nanochameleon.vocab import Vocab

    vocab = Vocab.toy(cfg.vqgan.n_codes, cfg.tokenizers.n_merges)
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
