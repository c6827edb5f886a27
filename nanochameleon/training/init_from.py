"""What a run begins with: another model (init_from), the tokenizers of prepared data, both, or nothing.

Its configuration takes their sizes; tokenizers are copied into the run's folder, weights into its model.
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
    """parts: the model whose weights to begin with. tokenizers: None where the run trains its own."""

    parts: ModelFiles | None = None
    tokenizers: Tokenizers | None = None

    def text(self, cfg: RunConfig) -> TextTokenizer:
        return open_text_tokenizer(self.tokenizers, cfg.init_from if self.parts else cfg.data.path)

    def store_tokenizers(self, cfg: RunConfig, folder: Path) -> TextTokenizer:
        """Puts both tokenizers where a run has its own, unless they are there."""
        tokenizer = self.text(cfg)
        write_tokenizers(self.tokenizers, folder)
        return tokenizer


def begin(cfg: RunConfig) -> tuple[RunConfig, InitFrom]:
    """Raises UserError for what cannot be opened, and for a model and prepared data of different tokenizers."""
    tokenizers, parts = prepared_tokenizers(cfg), None
    if cfg.init_from is not None:
        cfg, parts = adopt(cfg)
        open_text_tokenizer(parts.tokenizers, cfg.init_from)  # a sentence, before anything else reads it
        if tokenizers and parts.tokenizers.digest() != tokenizers.digest():
            what = f"{cfg.data.path} was prepared with other tokenizers than those of {cfg.init_from}"
            raise UserError(f"{what}: prepare it with --tokenizers {cfg.init_from}")
        tokenizers = parts.tokenizers
    elif tokenizers:
        model = dataclasses.replace(cfg.model, vocab_size=tokenizers.vocab_size, max_seq_len=cfg.train.seq_len)
        cfg = dataclasses.replace(cfg, vqgan=tokenizers.vqgan, model=model)
    return cfg, InitFrom(parts, tokenizers)


def prepared_tokenizers(cfg: RunConfig) -> Tokenizers | None:
    if cfg.data.source != "prepared":
        return None
    if cfg.data.path is None:
        raise UserError("source prepared needs --data.path, the folder that nanochameleon.data.prepare wrote")
    return open_prepared(cfg.data.path)


def adopt(cfg: RunConfig) -> tuple[RunConfig, ModelFiles]:
    """The run's configuration with the sizes of the model in cfg.init_from, and that model. Dropout stays the run's.

    A run with a checkpoint goes on from itself: what it began with may be gone. Raises UserError for a model that
    cannot be opened, that lies in the run's folder, or that cannot take the rows.
    """
    if cfg.init_from.resolve().is_relative_to(cfg.folder.resolve()):
        raise UserError(f"{cfg.init_from}, which the run is to begin with, lies in {cfg.folder}: choose another --out")
    if begun := begun_from(cfg):
        cfg = dataclasses.replace(cfg, init_from=begun)
    parts = open_model_files(cfg.folder) if begun else open_model_files(cfg.init_from, cfg.init_vqgan)
    if cfg.train.seq_len > parts.model.max_seq_len:
        raise UserError(
            f"train.seq_len is {cfg.train.seq_len}; {cfg.init_from} has a context of {parts.model.max_seq_len}"
        )
    model = dataclasses.replace(parts.model, dropout=cfg.model.dropout)
    return dataclasses.replace(cfg, vqgan=parts.vqgan, model=model), parts


def begun_from(cfg: RunConfig) -> Path | None:
    """What the run in this folder began with, if it has both tokenizers and a checkpoint and is to go on."""
    folder = cfg.folder
    needed = ((folder / CONFIG).is_file(), (folder / TEXT_TOKENIZER).is_file())
    steps = (checkpoint.checkpoints(folder), checkpoint.checkpoints(folder / IMAGE_TOKENIZER))
    return None if cfg.overwrite or not all(needed + steps) else read_config(folder).init_from
