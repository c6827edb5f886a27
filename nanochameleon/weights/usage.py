"""What the configuration of our own layout says besides sizes: how a model is sampled, and where it comes from."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from nanochameleon.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SamplingParams,
    TrainConfig,
    VQGANConfig,
)
from nanochameleon.files import commit


@dataclass(frozen=True)
class Usage:
    """The defaults are those of a model that says nothing, such as one in another project's layout."""

    sample: SamplingParams = field(default_factory=SamplingParams)
    source: Literal["shapes", "shapes_rich", "emoji", "folder", "prepared"] = "folder"  # of its documents
    chats: bool = False  # is it asked as a chat where nothing else is said? Set for aligned runs
    made: tuple[str, ...] = ()  # how, in words

    @staticmethod
    def of_run(cfg: RunConfig) -> "Usage":
        start = f" from {cfg.init_from.name}" if cfg.init_from else ""
        steps = f"train.py {cfg.name}{start}, {cfg.train.steps} steps, seed {cfg.seed}"
        made = (steps, f"converted at commit {commit()} with torch {torch.__version__}")
        return Usage(cfg.sample, cfg.data.source, cfg.train.assistant_only_loss, made)

    def run_config(self, model: ModelConfig, vqgan: VQGANConfig) -> RunConfig:
        """The configuration of a run that would be sampled in the same way."""
        data, train = DataConfig(self.source), TrainConfig(assistant_only_loss=self.chats)
        return RunConfig("converted", vqgan, model, OptimConfig(), data=data, train=train, sample=self.sample)
