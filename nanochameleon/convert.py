"""Convert a model between Meta's, Hugging Face's and our layout. The source may also be a run of train.py.

    python -m nanochameleon.convert chameleon-meta chameleon-hf --to hf
    python -m nanochameleon.convert chameleon-hf chameleon --to nano
    python -m nanochameleon.convert chameleon-hf chameleon-meta --to meta --vqgan vqgan.ckpt
    python -m nanochameleon.convert runs/mine mine-meta --to meta --shards 4
    python -m nanochameleon.convert runs/mine mine --to nano --dtype int8

LazyTensors keep their dtype and are read one at a time. Memory holds the largest tensor up to three times (its pieces,
joined, reordered), REMAP bytes of mapped files (weights/tensor_files.py), and for Meta's layout the shard that is
written, which torch.save needs whole. The target is written to .tmp-NAME-PID next to it and renamed at the end.

No bit is lost: a chain of conversions that returns to its start gives the same tensors. The one exception is a tensor
whose copies differ between Meta's shards: those are averaged, with a warning. --dtype int8 rounds, and is no exception
to a chain after it. Only our own layout says how a model is used (weights/usage.py).
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
from nanochameleon.files import fsync, remove_stale
from nanochameleon.images.tokenizer import NO_DECODER
from nanochameleon.training.run import CONFIG, TEXT_TOKENIZER
from nanochameleon.weights import layout_configs, layout_tokenizer, layouts
from nanochameleon.weights.int8 import quantized
from nanochameleon.weights.layouts import DECODER, VQ_PREFIX
from nanochameleon.weights.model_folder import NANO, open_model_files
from nanochameleon.weights.pth_files import write_pth
from nanochameleon.weights.ranges import MAX_NUMBER
from nanochameleon.weights.read_layouts import HF_DECODER, NANO_VQGAN, ModelFiles
from nanochameleon.weights.tensor_files import Get, LazyTensors, write_safetensors, write_sharded
from nanochameleon.weights.tokenizers import open_text_tokenizer

NAMES = {(4_096, 32): "7b", (8_192, 48): "30b"}  # (dim, n_layers) -> the release's folder


@dataclass(frozen=True)
class Args:
    """Convert a model's folder."""

    src: tyro.conf.Positional[Path]
    """A run, or a model in Meta's, Hugging Face's or our layout."""
    dst: tyro.conf.Positional[Path]
    """The folder to make."""
    to: Literal["meta", "hf", "nano"]
    """The layout to write."""
    shards: int | None = None
    """For Meta's layout: the number of files that each hold a slice of every matrix. None is one per QK-norm group."""
    file_gb: float = 5.0
    """For the other layouts: largest size of a file in GB, unless a single tensor is larger."""
    vqgan: Path | None = None
    """A file with the image decoder: Meta's vqgan.ckpt or a vqgan_decoder.safetensors. Needed for a model that was
    saved by transformers, which drops the decoder."""
    decoder: bool = True
    """Write the image decoder. --no-decoder leaves it out; --to meta needs it for a model that has no decoder."""
    dtype: Literal["keep", "int8"] = "keep"
    """For our layout: int8 stores matrices as int8, with a scale for each row, and the rest as bfloat16."""


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The three writers: ModelFiles -> files in a folder. `get` is files.weights.get with a progress bar.


def write_nano(files: ModelFiles, folder: Path, get: Get, args: Args) -> None:
    weights, vq = LazyTensors(files.weights.meta, get), files.vq
    if args.dtype == "int8":
        weights, vq = quantized(weights), quantized(vq)
    write_sharded(folder, *weights, args.file_gb * 1e9)
    write_safetensors(folder / f"{NANO_VQGAN}.safetensors", *vq)
    said = {name: dataclasses.asdict(getattr(files, name)) for name in ("model", "vqgan", "usage")}
    write_json(folder / CONFIG, {"layout": NANO} | said)
    write_json(folder / TEXT_TOKENIZER, files.tokenizer_json)


def write_hf(files: ModelFiles, folder: Path, get: Get, args: Args) -> None:
    ours = {layouts.names_of(name).hf: name for name in files.weights.meta}
    meta = {hf: layouts.to_hf(name, files.weights.meta[name], files.model) for hf, name in ours.items()}
    meta |= {VQ_PREFIX + name: x for name, x in files.vq.meta.items() if not name.startswith(DECODER)}

    def get_hf(name: str) -> Tensor:
        if name.startswith(VQ_PREFIX):
            return files.vq.get(name.removeprefix(VQ_PREFIX))
        return layouts.to_hf(ours[name], get(ours[name]), files.model)

    for name, content in hf_files(files).items():  # before the weights, since these may be refused
        write_json(folder / name, content)
    write_sharded(folder, meta, get_hf, args.file_gb * 1e9)
    if files.has_decoder:
        decoder = {name: x for name, x in files.vq.meta.items() if name.startswith(DECODER)}
        write_safetensors(folder / f"{HF_DECODER}.safetensors", decoder, files.vq.get)


def hf_files(files: ModelFiles) -> dict[str, dict]:
    """Return file name -> JSON. Raises ValueError for a tokenizer that has no token left for <image>."""
    vocab = files.tokenizers.text().vocab
    tokenizer = layout_tokenizer.tokenizer_to_hf(files.tokenizer_json, vocab)
    names, dtype = layout_tokenizer.vocabulary_map(tokenizer), str(files.dtype).removeprefix("torch.")
    config = layout_configs.hf_config(files.model, files.vqgan, vocab, names, dtype)
    return {CONFIG: config, "tokenizer.json": tokenizer} | layout_tokenizer.processor_files(vocab, files.vqgan)


def write_meta(files: ModelFiles, folder: Path, get: Get, args: Args) -> None:
    n = n_shards(files.model, args)
    model, tokenizer = folder / "models" / meta_name(files.model), folder / "tokenizer"
    model.mkdir(parents=True)
    tokenizer.mkdir()
    for i in range(n):
        shard = {layouts.names_of(name).meta: layouts.to_meta(name, get(name), i, n) for name in files.weights.meta}
        shard["rope.freqs"] = layouts.rope_freqs(files.model, files.dtype)
        write_pth(model / ("consolidated.pth" if n == 1 else f"consolidated.{i:02d}.pth"), shard)
        del shard  # before the next one is gathered
    write_json(model / "params.json", layout_configs.meta_params(files.model) | {"model_parallel_size": n})
    write_json(model / "consolidate_params.json", {"model_parallel_size": n})
    write_pth(tokenizer / "vqgan.ckpt", {"state_dict": {name: files.vq.get(name).clone() for name in files.vq.meta}})
    (tokenizer / "vqgan.yaml").write_text(layout_configs.vqgan_yaml(files.vqgan))
    write_json(tokenizer / TEXT_TOKENIZER, files.tokenizer_json)


def n_shards(cfg: ModelConfig, args: Args) -> int:
    return args.shards or (cfg.qk_norm_groups if cfg.qk_norm else 1)


def meta_name(cfg: ModelConfig) -> str:
    return NAMES.get((cfg.dim, cfg.n_layers), "nano")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def check(files: ModelFiles, args: Args) -> None:
    """Raise UserError for a model that the requested layout cannot hold."""
    if args.to == "nano":
        return
    if args.dtype == "int8":
        raise UserError(f"{args.src} cannot be written in {args.to} layout with int8 weights: use --to nano")
    try:
        layout_configs.check_exportable(files.model, args.to)
        layout_configs.check_vqgan(files.vqgan, args.to)
    except ValueError as error:
        raise UserError(f"{args.src} cannot be written in {args.to} layout: {error}") from None
    if args.to == "meta" and (why := layouts.why_not_sharded(files.model, n_shards(files.model, args))):
        raise UserError(f"{args.src} cannot be cut into shards: {why}; choose another --shards")
    if args.to == "meta" and args.decoder and not files.has_decoder:
        raise UserError(f"{args.src} cannot be written in meta layout: {NO_DECODER}; --no-decoder writes it without")


def convert(args: Args) -> Path:
    """Write the folder and return it. Raises UserError. After an error or a kill, args.dst does not exist."""
    if args.dst.exists():
        raise UserError(f"{args.dst} exists: choose another name")
    if (args.shards or 1) < 1 or not 0 < args.file_gb * 1e9 <= MAX_NUMBER:
        raise UserError("--shards must be at least 1, --file-gb above 0 and below 9 billion")
    files = open_model_files(args.src, args.vqgan)
    if not args.decoder:
        files = without_decoder(files)
    open_text_tokenizer(files.tokenizers, args.src)
    check(files, args)
    if not files.has_decoder:
        warn(NO_DECODER if args.decoder else "the image decoder is left out")
    temporary = args.dst.parent / f".tmp-{args.dst.name}-{os.getpid()}"
    try:
        remove_stale(args.dst.absolute().parent, f".tmp-{args.dst.name}")
        temporary.mkdir(parents=True)
        needed = sum(x.nbytes for x in (*files.weights.meta.values(), *files.vq.meta.values()))
        if (free := shutil.disk_usage(temporary).free) < needed:
            raise OSError(f"it needs {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB")
        write(files, temporary, args)
        os.rename(temporary, args.dst)
        fsync(args.dst.parent)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot write {args.dst}: {shown(error, 120)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return args.dst


def without_decoder(files: ModelFiles) -> ModelFiles:
    kept = {name: x for name, x in files.vq.meta.items() if not name.startswith(DECODER)}
    return dataclasses.replace(files, vq=LazyTensors(kept, files.vq.get))


def write(files: ModelFiles, folder: Path, args: Args) -> None:
    passes = n_shards(files.model, args) if args.to == "meta" else 1  # each shard takes a slice of every tensor
    total = passes * sum(x.nbytes for x in files.weights.meta.values())
    with tqdm(total=total, desc=f"to {args.to}", unit="B", unit_scale=True) as bar:

        def get(name: str) -> Tensor:
            tensor = files.weights.get(name)
            bar.update(tensor.nbytes)
            return tensor

        {"nano": write_nano, "hf": write_hf, "meta": write_meta}[args.to](files, folder, get, args)


def cli(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default with the program's own arguments."""
    name = "python -m nanochameleon.convert"
    exit_on_user_error(lambda: say(convert(parse(Args, arguments, description=__doc__, prog=name))))


if __name__ == "__main__":
    cli()
