"""python -m nanochameleon.data.prepare SRC ... --form pairs --tokenizers RUN_OR_MODEL --out FOLDER --name NAME

Tokenizes data once, to train on it as often as you like: train.py PRESET --data.source prepared --data.path FOLDER.
With several processes: torchrun --nproc-per-node 8 -m nanochameleon.data.prepare ... (they divide the work, and each
takes GPU LOCAL_RANK). If it is stopped or killed, run the same command again: it resumes.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from nanochameleon.cli import parse
from nanochameleon.errors import UserError, exit_on_user_error, say


@dataclass(frozen=True)
class Args:
    """Reads tars, folders with caption files, .jsonl and .txt; writes token shards into FOLDER/NAME."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Files and folders (sources/units.py): .tar, .jsonl, .csv, .txt, folders of these. Links in folders are followed,
    wherever they lead; hidden files are left out; what cannot be read is listed in NAME/skipped.jsonl."""
    form: Literal["pairs", "drawings", "interleaved", "text", "chat"]
    """pairs: captioned images, either one first. drawings: the caption first. interleaved: several captions and images.
    text: text alone. chat: turns of prompt and answer."""
    out: Path
    """FOLDER: all data in it shares its tokenizers."""
    name: str
    """NAME of this source, as stages.N.weights names it; "test" is for the report, and never trained on."""
    tokenizers: Path | None = None
    """A run, or a model in any layout, whose tokenizers to use; None: the tokenizers that FOLDER already has."""
    seq_len: int | None = None
    """Tokens of a document at most: longer texts become several, others are cut, never in an image. None: the context
    of the tokenizers' model."""
    seed: int = 0
    """Decides the order of image and caption."""
    threads: int | None = None
    """Threads that decode images; None: by the number of cores."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""


def device_of(requested: str) -> str:
    """The device of this process: with several GPUs each process takes one."""
    import torch

    from nanochameleon.parallel.mesh import env_int

    if requested in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{env_int('LOCAL_RANK', 0) % torch.cuda.device_count()}"
    return requested


def check(args: Args) -> None:
    if not args.sources:
        raise UserError("name at least one file or folder to prepare")
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", args.name) or args.name == "image_tokenizer":
        raise UserError(f"--name must be of letters, digits, - and _, not {args.name!r}")
    for name in ("seq_len", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.seed < 0:
        raise UserError(f"--seed must be at least 0, not {args.seed}")


def main(args: Args) -> None:
    check(args)
    from nanochameleon.data.prepare import tokenizing
    from nanochameleon.data.prepared import open_prepared, store_prepared
    from nanochameleon.data.sources.units import plan
    from nanochameleon.parallel.mesh import env_int, rank_and_world_size
    from nanochameleon.training.run import pick_device
    from nanochameleon.weights.model_folder import open_tokenizers
    from nanochameleon.weights.tokenizers import open_text_tokenizer

    (rank, world), local = rank_and_world_size(), env_int("LOCAL_WORLD_SIZE", 1)
    tokenizers = open_tokenizers(args.tokenizers) if args.tokenizers else open_prepared(args.out)
    units, unread = plan(args.sources, args.form)
    text = open_text_tokenizer(tokenizers, args.tokenizers or args.out)
    max_tokens = args.seq_len or tokenizers.context
    # <s>, one token of text, </s>; an image has two more tokens, <boi> and <eoi>
    least = 3 if args.form == "text" else tokenizers.vqgan.codes_per_image + 5
    if max_tokens < least:
        raise UserError(f"--seq-len must be at least {least} for this form, not {max_tokens}")
    image_tokenizer = tokenizers.image_tokenizer(pick_device(device_of(args.device)))
    store_prepared(args.out, tokenizers)
    where = args.out / args.name, args.form, max_tokens, args.seed
    job = tokenizing.PrepareJob(*where, text, image_tokenizer, tokenizers.digest(), units, unread)
    say(tokenizing.run(job, rank, world, args.threads or max(1, min(16, (os.cpu_count() or 1) // local))))


def guarded(args: Args) -> None:
    try:
        main(args)
    except OSError as error:  # a full disk, a folder that may not be written
        why = f"cannot write to {args.out}: {error}"
        raise UserError(f"{why}; once that is fixed, the same command resumes") from error


if __name__ == "__main__":
    exit_on_user_error(lambda: guarded(parse(Args, description=__doc__)), each=True)
