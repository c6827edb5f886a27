"""Runs of a tiny model on one rank or several, stopped after any step."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_on
from tiny import training_config
from torch import nn

from nanochameleon.config import ParallelConfig, RunConfig
from nanochameleon.errors import Interrupted
from nanochameleon.training.run import CONFIG, config_to_json
from nanochameleon.transformer import Block


def config(out: Path, **parallel) -> RunConfig:
    """Dropout, two QK-norm groups, two layers and four sequences a step. parallel: fields of ParallelConfig,
    "optim" and "precision"."""
    cfg = training_config(out)
    model = replace(cfg.model, dim=32, n_heads=4, n_layers=2, qk_norm_groups=2, norm_order="post")
    precision, fused = parallel.pop("precision", "fp32"), parallel.pop("fused_output", "auto")
    train = replace(cfg.train, batch_size=4, log_every=1, save_every=4, sample_every=100)
    train = replace(train, precision=precision, fused_output=fused)
    optim = replace(cfg.optim, name=parallel.pop("optim", "adamw"))
    return replace(cfg, model=model, train=train, optim=optim, parallel=ParallelConfig(**parallel))


def prepare(folder: Path, **parallel) -> Path:
    """Train the tokenizers and prepare the data of a run, then stop before the transformer's first step."""
    import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_transformer", interrupted)
        with pytest.raises(Interrupted):
            train.main(config(folder, **parallel))
    return folder


def interrupted(*_):
    raise Interrupted


def learn(folder: Path, cfg: RunConfig, until: int | None = None) -> None:
    """Train without a report, and stop after `until` steps as by Ctrl-C.

    Blocks are compiled by the aot_eager backend, since not every machine can compile the C++ of torch.compile.
    """
    import train

    real = train.train_loop

    def train_loop(*arguments):
        *others, progress, monitor, _ = arguments
        real(*others, progress, monitor, lambda: progress.step + 1 == until)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "report", lambda *_: None)
        patch.setattr(train, "train_loop", train_loop)
        patch.setattr(Block, "compile", lambda block: nn.Module.compile(block, backend="aot_eager"))
        with nullcontext() if until is None else pytest.raises(Interrupted):
            train.main(replace(cfg, out=folder))


def trained(prepared: Path, folder: Path, ranks: int, until: int | None = None, **parallel) -> Path:
    """Train a copy of the prepared run on so many ranks. A folder that exists is resumed."""
    cfg = config(folder, **parallel)
    if not folder.exists():
        shutil.copytree(prepared, folder)
        (folder / CONFIG).write_text(config_to_json(cfg))
    if ranks == 1:
        learn(folder, cfg, until)
    else:
        run_on(ranks, learn, folder, cfg, until)
    return folder
