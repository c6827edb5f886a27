"""A folder of prepared data: token shards by name, and the two tokenizers that made them.

    prepared.json             sizes, and a digest of what decides the tokens
    text_tokenizer.json, image_tokenizer/
    NAME/                     token shards (data/shards.py) of one source, once its index.json is there
    test/                     the same for the report, never trained on

`python -m nanochameleon.data.prepare` writes it, `train.py --data.source prepared --data.path FOLDER` trains on it.
"""

import dataclasses
import json
import os
import platform
from pathlib import Path

from nanochameleon.config import VQGANConfig
from nanochameleon.data import Shards
from nanochameleon.data.index import read_index, write_index
from nanochameleon.errors import UserError
from nanochameleon.files import remove_stale, write_file
from nanochameleon.training import checkpoint
from nanochameleon.training.run import IMAGE_TOKENIZER, TEXT_TOKENIZER, build
from nanochameleon.weights.tokenizers import Tokenizers, stored_tokenizers

INDEX, FORMAT, TEST = "prepared.json", "a folder of prepared data", "test"


def open_prepared(folder: Path) -> Tokenizers:
    """The tokenizers of prepared data. Raises UserError for a damaged folder, or any other one."""
    index = read_index(folder, INDEX, FORMAT)
    try:
        vqgan = build(VQGANConfig, index["vqgan"], "vqgan")
        found = stored_tokenizers(folder, index["vocab_size"], index["context"], vqgan)
        same = found.digest() == index["digest"]
    except (KeyError, ValueError, TypeError, AttributeError):
        same = False
    if not same:
        raise UserError(
            f"the tokenizers in {folder} are not the ones that prepared its data: prepare it again in another folder"
        )
    return found


def store_prepared(folder: Path, tokenizers: Tokenizers) -> None:
    """Write the tokenizers into the folder, unless they are there. Several processes may do so at once.

    Raises UserError if the folder holds other tokenizers or anything else. Removes what killed processes left.
    """
    aside = f".new-{platform.node()}"  # with the machine's name, since process ids are the machine's
    if not (folder / INDEX).exists():
        write_prepared(folder, tokenizers, folder / f"{aside}-{os.getpid()}")
    elif read_index(folder, INDEX, FORMAT).get("digest") != tokenizers.digest():
        raise UserError(
            f"{folder} holds data of other tokenizers, whose tokens mean other things: choose another --out"
        )
    remove_stale(folder, aside)


def write_prepared(folder: Path, tokenizers: Tokenizers, aside: Path) -> None:
    ours = (IMAGE_TOKENIZER, TEXT_TOKENIZER)
    # files of other processes that do the same, or were killed while they did
    known, temporary = (INDEX, *ours), (".new-", ".tmp-")
    if folder.exists() and any(p.name not in known and not p.name.startswith(temporary) for p in folder.iterdir()):
        raise UserError(f"{folder} is in the way: it does not hold prepared data; choose another --out")
    write_tokenizers(tokenizers, aside)
    for name in ours:
        try:
            os.rename(aside / name, folder / name)
        except OSError:  # another process was first
            if not (folder / name).exists():
                raise
    index = {"digest": tokenizers.digest(), "vocab_size": tokenizers.vocab_size}
    index |= {"context": tokenizers.context, "vqgan": dataclasses.asdict(tokenizers.vqgan)}
    write_index(folder, INDEX, FORMAT, index)


def write_tokenizers(tokenizers: Tokenizers, folder: Path) -> None:
    """Write tokenizers as a run has them, unless they are there. The text tokenizer's file is copied as it is, with the
    names that nanochameleon does not use."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / TEXT_TOKENIZER).exists():
        content = json.dumps(tokenizers.tokenizer_json, ensure_ascii=False, indent=1)
        write_file(folder / TEXT_TOKENIZER, content.encode())
    if not checkpoint.checkpoints(folder / IMAGE_TOKENIZER):
        checkpoint.save(folder / IMAGE_TOKENIZER, 0, {"model": tokenizers.vq_state()}, {"step": 0})


def sources(folder: Path) -> list[str]:
    """Names of the finished sources that can be trained on."""
    return sorted(path.parent.name for path in Path(folder).glob(f"*/{Shards.INDEX}") if path.parent.name != TEST)
