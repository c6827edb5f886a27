"""Chameleon's weights from any layout into another: Meta's, Hugging Face's, ours, and from a run of train.py.

    python -m nanochameleon.convert chameleon-meta chameleon-hf --to hf
    python -m nanochameleon.convert chameleon-hf chameleon --to nano
    python -m nanochameleon.convert chameleon-hf chameleon-meta --to meta --vqgan vqgan.ckpt
    python -m nanochameleon.convert runs/mine mine-meta --to meta --shards 4

Tensors keep their type and come one at a time. Memory holds the largest tensor up to three times (its pieces, joined,
reordered), tensor_files.REMAP bytes of the files' maps, and for Meta's layout the shard that is being written, which
torch.save needs whole. All is written to .tmp-NAME-PID beside the target and renamed at the end. Bits are kept: any
chain of conversions that returns to its start gives the same tensors (only copies that differ between Meta's shards are
averaged, with a warning). model_folder.py reads the four layouts, layouts.py and layout_files.py know them.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from torch import Tensor
from tqdm import tqdm

from nanochameleon.cli import parse
from nanochameleon.config import ModelConfig
from nanochameleon.errors import UserError, exit_on_user_error, say, shown, warn
from nanochameleon.files import fsync, sweep_dead
from nanochameleon.images.tokenizer import NO_DECODER
from nanochameleon.training.run import CONFIG, TEXT_TOKENIZER
from nanochameleon.weights import layout_files, layouts
from nanochameleon.weights.layouts import DECODER, VQ_PREFIX
from nanochameleon.weights.model_folder import HF_DECODER, NANO, NANO_VQGAN, LoadedModel, open_parts, text_of
from nanochameleon.weights.ranges import MAX_NUMBER
from nanochameleon.weights.tensor_files import Get, Tensors, write_pth, write_safetensors, write_sharded

NAMES = {(4_096, 32): "7b", (8_192, 48): "30b"}  # (dim, n_layers) -> the release's folder


@dataclass(frozen=True)
class Args:
    """Converts a model's folder."""

    src: tyro.conf.Positional[Path]
    """A run, or a model in Meta's, Hugging Face's or our layout."""
    dst: tyro.conf.Positional[Path]
    """The folder to make."""
    to: Literal["meta", "hf", "nano"]
    """The layout to write."""
    shards: int | None = None
    """Of Meta's layout: files that each hold a slice of every matrix; None is one for each group of QK-norm."""
    file_gb: float = 5.0
    """Of the others: largest size of a file in GB, if more than one tensor is in it."""
    vqgan: Path | None = None
    """A file with the image decoder, for a model that came from transformers, which drops it: Meta's vqgan.ckpt or a
    vqgan_decoder.safetensors."""
    decoder: bool = True
    """Write the image decoder. --no-decoder leaves it out, and --to meta then takes a model that has none."""


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The three writers: LoadedModel -> files in a folder. `get` is parts.weights.get behind a progress bar.


def write_nano(parts: LoadedModel, folder: Path, get: Get, args: Args) -> None:
    write_sharded(folder, parts.weights.meta, get, args.file_gb * 1e9)
    write_safetensors(folder / f"{NANO_VQGAN}.safetensors", parts.vq.meta, parts.vq.get)
    sizes = {"model": dataclasses.asdict(parts.model), "vqgan": dataclasses.asdict(parts.vqgan)}
    write_json(folder / CONFIG, {"layout": NANO} | sizes)
    write_json(folder / TEXT_TOKENIZER, parts.tokenizer_json)


def write_hf(parts: LoadedModel, folder: Path, get: Get, args: Args) -> None:
    ours = {layouts.rule(name).hf: name for name in parts.weights.meta}
    meta = {hf: layouts.to_hf(name, parts.weights.meta[name], parts.model) for hf, name in ours.items()}
    meta |= {VQ_PREFIX + name: x for name, x in parts.vq.meta.items() if not name.startswith(DECODER)}

    def get_hf(name: str) -> Tensor:
        if name.startswith(VQ_PREFIX):
            return parts.vq.get(name.removeprefix(VQ_PREFIX))
        return layouts.to_hf(ours[name], get(ours[name]), parts.model)

    for name, content in hf_files(parts).items():  # before the weights, since these may be refused
        write_json(folder / name, content)
    write_sharded(folder, meta, get_hf, args.file_gb * 1e9)
    if parts.has_decoder:
        decoder = {name: x for name, x in parts.vq.meta.items() if name.startswith(DECODER)}
        write_safetensors(folder / f"{HF_DECODER}.safetensors", decoder, parts.vq.get)


def hf_files(parts: LoadedModel) -> dict[str, dict]:
    """File name -> its JSON. Raises ValueError for a tokenizer without a place for <image>."""
    vocab = parts.tokenizers.text().vocab
    tokenizer = layout_files.tokenizer_to_hf(parts.tokenizer_json, vocab)
    names, dtype = layout_files.vocabulary_map(tokenizer), str(parts.dtype).removeprefix("torch.")
    config = layout_files.hf_config(parts.model, parts.vqgan, vocab, names, dtype)
    return {CONFIG: config, "tokenizer.json": tokenizer} | layout_files.processor_files(vocab, parts.vqgan)


def write_meta(parts: LoadedModel, folder: Path, get: Get, args: Args) -> None:
    n = n_shards(parts.model, args)
    inside, beside = folder / "models" / meta_name(parts.model), folder / "tokenizer"
    inside.mkdir(parents=True)
    beside.mkdir()
    for i in range(n):
        shard = {layouts.rule(name).meta: layouts.to_meta(name, get(name), i, n) for name in parts.weights.meta}
        shard["rope.freqs"] = layouts.rope_freqs(parts.model, parts.dtype)
        write_pth(inside / ("consolidated.pth" if n == 1 else f"consolidated.{i:02d}.pth"), shard)
        del shard  # before the next one is gathered
    write_json(inside / "params.json", layout_files.meta_params(parts.model) | {"model_parallel_size": n})
    write_json(inside / "consolidate_params.json", {"model_parallel_size": n})
    write_pth(beside / "vqgan.ckpt", {"state_dict": {name: parts.vq.get(name).clone() for name in parts.vq.meta}})
    (beside / "vqgan.yaml").write_text(layout_files.vqgan_yaml(parts.vqgan))
    write_json(beside / TEXT_TOKENIZER, parts.tokenizer_json)


def n_shards(cfg: ModelConfig, args: Args) -> int:
    return args.shards or (cfg.qk_norm_groups if cfg.qk_norm else 1)


def meta_name(cfg: ModelConfig) -> str:
    return NAMES.get((cfg.dim, cfg.n_layers), "nano")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def check(parts: LoadedModel, args: Args) -> None:
    """Raises UserError for a model that the wished layout cannot hold."""
    if args.to == "nano":
        return
    try:
        layout_files.check_exportable(parts.model, args.to)
        layout_files.check_vqgan(parts.vqgan, args.to)
    except ValueError as error:
        raise UserError(f"{args.src} cannot be written in {args.to} layout: {error}") from None
    if args.to == "meta" and (why := layouts.bad_shards(parts.model, n_shards(parts.model, args))):
        raise UserError(f"{args.src} cannot be cut like that: {why}; choose another --shards")
    if args.to == "meta" and args.decoder and not parts.has_decoder:
        raise UserError(f"{args.src} cannot be written in meta layout: {NO_DECODER}; --no-decoder writes it without")


def convert(args: Args) -> Path:
    """Writes the folder and returns it. Raises UserError; then, and after a kill, there is no args.dst."""
    if args.dst.exists():
        raise UserError(f"{args.dst} exists: choose another name")
    if (args.shards or 1) < 1 or not 0 < args.file_gb * 1e9 <= MAX_NUMBER:
        raise UserError("--shards must be at least 1, --file-gb above 0 and below 9 billion")
    parts = open_parts(args.src, args.vqgan)
    if not args.decoder:
        parts = without_decoder(parts)
    text_of(parts.tokenizers, args.src)
    check(parts, args)
    if not parts.has_decoder:
        warn(NO_DECODER if args.decoder else "the image decoder is left out")
    aside = args.dst.parent / f".tmp-{args.dst.name}-{os.getpid()}"
    try:
        sweep_dead(args.dst.absolute().parent, f".tmp-{args.dst.name}")
        aside.mkdir(parents=True)
        needed = sum(x.nbytes for x in (*parts.weights.meta.values(), *parts.vq.meta.values()))
        if (free := shutil.disk_usage(aside).free) < needed:
            raise OSError(f"it needs {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB")
        write(parts, aside, args)
        os.rename(aside, args.dst)
        fsync(args.dst.parent)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot write {args.dst}: {shown(error, 120)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return args.dst


def without_decoder(parts: LoadedModel) -> LoadedModel:
    kept = {name: x for name, x in parts.vq.meta.items() if not name.startswith(DECODER)}
    return dataclasses.replace(parts, vq=Tensors(kept, parts.vq.get))


def write(parts: LoadedModel, folder: Path, args: Args) -> None:
    passes = n_shards(parts.model, args) if args.to == "meta" else 1  # each shard needs a slice of every tensor
    total = passes * sum(x.nbytes for x in parts.weights.meta.values())
    with tqdm(total=total, desc=f"to {args.to}", unit="B", unit_scale=True) as bar:

        def get(name: str) -> Tensor:
            tensor = parts.weights.get(name)
            bar.update(tensor.nbytes)
            return tensor

        {"nano": write_nano, "hf": write_hf, "meta": write_meta}[args.to](parts, folder, get, args)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line; by default the program's own arguments."""
    name = "python -m nanochameleon.convert"
    exit_on_user_error(lambda: say(convert(parse(Args, arguments, description=__doc__, prog=name))))


if __name__ == "__main__":
    cli()
