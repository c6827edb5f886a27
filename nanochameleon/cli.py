"""The command line: presets as subcommands, any field of one by its dotted name (tyro). Imports no torch at first."""

import dataclasses
import math
import os
import sys
import typing
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import tyro

from nanochameleon.config import RunConfig, SamplingParams, StageConfig
from nanochameleon.errors import UserError, exit_on_user_error, shown
from nanochameleon.presets import PRESETS
from nanochameleon.weights.old_names import RENAMED
from nanochameleon.weights.ranges import out_of_range

T = TypeVar("T")
MAX_SEED = 2**32 - 1


def parse(kind: type[T], args: Sequence[str] | None = None, **more) -> T:
    """Parse arguments (by default the program's) into a dataclass. A wrong one ends the program with exit code 2."""
    check_names(args)
    return expanded(tyro.cli(kind, args=args, **more))


def check_names(args: Sequence[str] | None) -> None:
    """Raises UserError with today's name for an option under its older one, such as --train.keep."""
    for word in sys.argv[1:] if args is None else args:
        option = word.partition("=")[0]
        *sections, name = option.removeprefix("--").split(".")
        off = "no-" if name.startswith("no-") else ""  # tyro's --no-FLAG
        older = name.removeprefix("no-").replace("-", "_")
        if option.startswith("--") and (new := RENAMED.get(class_of(sections), {}).get(older)):
            today = ".".join([*sections, off + new.replace("_", "-")])
            raise UserError(f"{option} is now --{today}")


def class_of(sections: list[str]) -> str:
    """The class that holds an option of these sections: train.keep is in TrainConfig. sample.py has no sections."""
    kind = RunConfig if sections else SamplingParams
    for section in (section.replace("-", "_") for section in sections):
        fields = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        kind = StageConfig if section.isdecimal() else fields.get(section, object)
    return getattr(kind, "__name__", "")


def expanded(value: T) -> T:
    """Expand ~ in every path: a shell expands it in `--out ~/x` and leaves it in `--out=~/x`."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    if isinstance(value, tuple):
        return tuple(map(expanded, value))
    if dataclasses.is_dataclass(value):
        fields = {f.name: expanded(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def check_kernels(device, *dtypes, ops: Sequence[str] = ()) -> None:
    """Raise UserError if NANOCHAMELEON_KERNELS names unknown kernels, or kernels that cannot run here.

    dtypes: what the ops will read; none means bfloat16, which all kernels take. ops: what will run; none means all.
    """
    import torch

    from nanochameleon.kernels.dispatch import OPS, VARIABLE, decide, requested

    try:
        if requested() == "auto":
            return  # something always can run
        for dtype in dtypes or (torch.bfloat16,):
            for op in ops or OPS:
                decide(op, device, dtype)
    except ValueError as error:
        raise UserError(f"{VARIABLE}: {error}") from None


def first_line(doc: str | None) -> str:
    return (doc or "").strip().splitlines()[0]


def check(cfg: RunConfig) -> None:
    """Raise UserError, naming the field, for a number out of range."""
    if cfg.seed > MAX_SEED:
        raise UserError(f"seed must be at most {MAX_SEED}, not {shown(cfg.seed)}")
    if wrong := out_of_range(**vars(cfg)):
        raise UserError(wrong)
    for name in ("optim", "tokenizers.optim"):
        optim = attrgetter(name)(cfg)
        if optim.schedule == "exponential" and optim.min_lr_ratio == 0:
            raise UserError(f"{name}.min_lr_ratio must be above 0, since an exponential schedule never reaches 0")


def check_together(cfg: RunConfig) -> None:
    """Raise UserError, naming the fields, for numbers that contradict each other."""
    if any(cfg.vqgan.ch * mult % cfg.vqgan.n_groups for mult in cfg.vqgan.ch_mult):
        raise UserError(f"vqgan.n_groups ({cfg.vqgan.n_groups}) must divide the channels of every level")
    if cfg.tokenizers.warmup_steps >= cfg.tokenizers.steps:  # else the codebook would never be used
        raise UserError(f"tokenizers.warmup_steps must be less than tokenizers.steps, {cfg.tokenizers.steps}")
    check_stages(cfg)
    if cfg.data.source == "prepared" and (cfg.data.tokenize_on_the_fly or cfg.data.n_documents):
        raise UserError(
            "data.tokenize_on_the_fly and data.n_documents are for documents made here: prepared data does without"
        )
    if cfg.train.fused_output == "on" and cfg.parallel.tensor_parallel > 1:
        raise UserError("train.fused_output on needs whole rows of logits: leave it auto with parallel.tensor_parallel")
    if cfg.init_vqgan and not cfg.init_from:
        raise UserError("init_vqgan gives an image decoder to the model of init_from: set --init-from, too")
    if not sizes_come_later(cfg):
        check_room(cfg)


def sizes_come_later(cfg: RunConfig) -> bool:
    """Does another model or prepared data set the sizes (training/init_from.py)?"""
    return cfg.init_from is not None or cfg.data.source == "prepared"


def check_stages(cfg: RunConfig) -> None:
    """Raise UserError for a stage without steps or with weights that make no mixture."""
    usable = all(0 < stage.fraction < math.inf for stage in cfg.stages)
    bounds = [*cfg.stage_starts, cfg.train.steps] if usable else [0, 0]
    for number, (stage, start, end) in enumerate(zip(cfg.stages, bounds, bounds[1:], strict=False)):
        if start >= end:
            steps = f"at least one of the {cfg.train.steps} steps"
            raise UserError(f"stages.{number}.fraction must give {stage.name!r} {steps}")
        names = [name for name, _ in stage.weights]
        if not names or len(set(names)) < len(names) or not all(0 < w < math.inf for _, w in stage.weights):
            expected = "sources, each once, and weights above 0, such as: pairs 0.7 text 0.3"
            raise UserError(f"stages.{number}.weights must be {expected}; got {dict(stage.weights)}")


def check_room(cfg: RunConfig) -> None:
    """Raise UserError for sequences too short for an image."""
    least = cfg.vqgan.codes_per_image + 5  # <s>, a word, <boi>, codes, <eoi>, </s>
    if cfg.train.seq_len < least:
        raise UserError(f"train.seq_len must be at least {least} for an image and a word, not {cfg.train.seq_len}")


def complete(cfg: RunConfig) -> RunConfig:
    """Set the model's vocabulary and context, which follow from other fields (unless sizes_come_later).

    Raises UserError for numbers out of range, and for a vocabulary above the 65,536 tokens that token shards can hold.
    """
    check(cfg)
    check_together(cfg)
    if sizes_come_later(cfg):
        return cfg
    from nanochameleon.vocab import Vocab

    vocab = Vocab.toy(cfg.vqgan.n_codes, cfg.tokenizers.n_merges)
    if vocab.size > 2**16:
        raise UserError(
            f"vqgan.n_codes and tokenizers.n_merges make {vocab.size:,} tokens; at most 65,536 are possible"
        )
    model = dataclasses.replace(cfg.model, vocab_size=vocab.size, max_seq_len=cfg.train.seq_len)
    return dataclasses.replace(cfg, model=model)


def parse_run(args: Sequence[str] | None = None) -> RunConfig:
    """Parse arguments into a preset with overrides. A wrong option or value ends the program with exit code 2."""
    return exit_on_user_error(lambda: complete(overridden(args)))


def overridden(args: Sequence[str] | None) -> RunConfig:
    check_names(args)
    presets = {name: (first_line(preset.__doc__), preset()) for name, preset in PRESETS.items()}
    try:
        return expanded(tyro.extras.overridable_config_cli(presets, args=args))
    except ValueError as error:  # a configuration's own check
        raise UserError(str(error)) from None
