"""What a run starts from: another model (init_from), the tokenizers of prepared data, both, or nothing.

The run's configuration takes their sizes. Tokenizers are copied into the run's folder, weights into its model.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from nanochameleon.config import RunConfig
from nanochameleon.data.prepared import open_prepared, write_tokenizers
from nanochameleon.errors import UserError
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training import checkpoint
from nanochameleon.training.run import CONFIG, IMAGE_TOKENIZER, TEXT_TOKENIZER, read_config
from nanochameleon.weights.model_folder import open_model_files
from nanochameleon.weights.read_layouts import ModelFiles
from nanochameleon.weights.tokenizers import Tokenizers, open_text_tokenizer


@dataclass(frozen=True)
class InitFrom:
    """What a run takes from elsewhere."""

    model: ModelFiles | None = None  # whose weights to start with; None is random weights
    tokenizers: Tokenizers | None = None  # None where the run trains its own

    def text(self, cfg: RunConfig) -> TextTokenizer:
        return open_text_tokenizer(self.tokenizers, cfg.init_from if self.model else cfg.data.path)

    def store_tokenizers(self, cfg: RunConfig, folder: Path) -> TextTokenizer:
        """Write both tokenizers into the run's folder, unless they are there."""
        tokenizer = self.text(cfg)
        write_tokenizers(self.tokenizers, folder)
        return tokenizer


def resolve_init(cfg: RunConfig) -> tuple[RunConfig, InitFrom]:
    """Open what the run starts from and take its sizes.

    Raises UserError for what cannot be opened, and for a model and prepared data of different tokenizers.
    """
    tokenizers, model = prepared_tokenizers(cfg), None
    if cfg.init_from is not None:
        cfg, model = adopt_model(cfg)
        # raises for a damaged text tokenizer before anything else reads it
        open_text_tokenizer(model.tokenizers, cfg.init_from)
        if tokenizers and model.tokenizers.digest() != tokenizers.digest():
            what = f"{cfg.data.path} was prepared with other tokenizers than those of {cfg.init_from}"
            raise UserError(f"{what}: prepare it with --tokenizers {cfg.init_from}")
        tokenizers = model.tokenizers
    elif tokenizers:
        sizes = dataclasses.replace(cfg.model, vocab_size=tokenizers.vocab_size, max_seq_len=cfg.train.seq_len)
        cfg = dataclasses.replace(cfg, vqgan=tokenizers.vqgan, model=sizes)
    return cfg, InitFrom(model, tokenizers)


def prepared_tokenizers(cfg: RunConfig) -> Tokenizers | None:
    if cfg.data.source != "prepared":
        return None
    if cfg.data.path is None:
        raise UserError("source prepared needs --data.path, the folder that nanochameleon.data.prepare wrote")
    return open_prepared(cfg.data.path)


def adopt_model(cfg: RunConfig) -> tuple[RunConfig, ModelFiles]:
    """Open the model in cfg.init_from; returns the configuration with its sizes, and the model. Dropout is the run's.

    A run that has a checkpoint resumes from itself, since the model it started from may be gone. Raises UserError for a
    model that cannot be opened, that is inside the run's folder, or whose context is shorter than train.seq_len.
    """
    if cfg.init_from.resolve().is_relative_to(cfg.folder.resolve()):
        raise UserError(
            f"{cfg.init_from}, which the run would start from, is inside {cfg.folder}: choose another --out"
        )
    if origin := origin_of_run(cfg):
        cfg = dataclasses.replace(cfg, init_from=origin)
    loaded = open_model_files(cfg.folder) if origin else open_model_files(cfg.init_from, cfg.init_vqgan)
    if cfg.train.seq_len > loaded.model.max_seq_len:
        context = f"{cfg.init_from} has a context of {loaded.model.max_seq_len}"
        raise UserError(f"train.seq_len is {cfg.train.seq_len}, but {context}: choose at most that")
    sizes = dataclasses.replace(loaded.model, dropout=cfg.model.dropout)
    return dataclasses.replace(cfg, vqgan=loaded.vqgan, model=sizes), loaded


def origin_of_run(cfg: RunConfig) -> Path | None:
    """The init_from of the run in this folder, if it is to be resumed and has both tokenizers and a checkpoint."""
    folder = cfg.folder
    needed = ((folder / CONFIG).is_file(), (folder / TEXT_TOKENIZER).is_file())
    steps = (checkpoint.checkpoints(folder), checkpoint.checkpoints(folder / IMAGE_TOKENIZER))
    return None if cfg.overwrite or not all(needed + steps) else read_config(folder).init_from
