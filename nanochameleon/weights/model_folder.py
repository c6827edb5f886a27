"""Open a model by its path, whichever of four layouts it has.

run     what train.py writes
nano    config.json, model.safetensors (or shards with an index), vqgan.safetensors, text_tokenizer.json; weights may be
        int8 (int8.py), and config.json says how the model is used (usage.py)
hf      transformers' folder; the image decoder, which transformers lacks, is in vqgan_decoder.safetensors
meta    models/NAME/{consolidated.pth or .NN.pth, params.json, consolidate_params.json},
        tokenizer/{text_tokenizer.json, vqgan.ckpt, vqgan.yaml}; the path is either the whole folder or models/NAME
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from nanochameleon.config import RunConfig
from nanochameleon.errors import UserError, shown
from nanochameleon.files import read_json
from nanochameleon.training.run import CONFIG, Run, pick_device, read_config
from nanochameleon.transformer import Chameleon
from nanochameleon.weights.checks import check_finite, check_image_tokenizer
from nanochameleon.weights.layouts import DECODER
from nanochameleon.weights.read_layouts import ModelFiles, open_hf, open_meta, open_nano, open_run, open_vqgan
from nanochameleon.weights.tensor_files import LazyTensors
from nanochameleon.weights.tokenizers import Tokenizers, open_text_tokenizer, run_tokenizers

NANO = "nanochameleon"  # the value of "layout" in config.json of our own folders
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------------------
# Which layout


def layout_of(path: Path) -> tuple[str, Path]:
    """Return 'run', 'nano', 'hf' or 'meta', and the folder of the configuration. Raises UserError for anything else."""
    try:
        return find_layout(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def find_layout(path: Path) -> tuple[str, Path]:
    if not path.is_dir():
        raise UserError(f"{path} {'is a file' if path.exists() else 'does not exist'}: give a model's folder")
    if (path / "params.json").is_file():
        return "meta", path
    inside = sorted(p.parent for p in path.glob("models/*/params.json"))
    if len(inside) > 1:
        raise UserError(f"{path} holds several models: name one, such as {inside[0]}")
    if inside:
        return "meta", inside[0]
    content = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if content.get("model_type") == "chameleon":
        return "hf", path
    if content.get("layout") == NANO:
        return "nano", path
    if (path / CONFIG).is_file() and "name" in content:
        return "run", path
    wanted = "a run, or a model in our, Hugging Face's or Meta's layout"
    raise UserError(f"{path} is not {wanted}: it has no {CONFIG} of Chameleon, no params.json and no models/")


@contextmanager
def explained(path: Path, layout: str) -> Iterator[None]:
    """Turn whatever a damaged folder raises into a UserError. A KeyError is not caught: it would be a bug of ours."""
    reader = f"{path} cannot be read as a Chameleon in {layout} layout"
    try:
        yield
    except (ValueError, AttributeError, IndexError, OSError) as error:
        raise UserError(f"{reader}: {shown(error, 120)}") from None
    except (ArithmeticError, RuntimeError, TypeError) as error:  # from torch, for a tensor of 10^300 rows
        raise UserError(f"{reader}: no model has the sizes that it names ({shown(error, 80)})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def open_model_files(path: Path, vqgan: Path | None = None) -> ModelFiles:
    """Open a model without loading it, and check that all its tensors are there.

    vqgan: a file with the image decoder, for a model that lacks one. Raises UserError naming what is missing or broken.
    """
    layout, folder = layout_of(Path(path))
    with explained(path, layout):
        files = {"run": open_run, "nano": open_nano, "hf": open_hf, "meta": open_meta}[layout](folder)
        check_image_tokenizer(files.vqgan, files.vq.meta, f"{path}: image tokenizer")
    if vqgan:
        files = with_decoder(files, Path(vqgan), path)
    return dataclasses.replace(files, weights=check_finite(files.weights, path), vq=check_finite(files.vq, path))


def with_decoder(files: ModelFiles, vqgan: Path, path: Path) -> ModelFiles:
    """Add the image decoder of another file. The file's other tensors, if it has any, must equal the model's.

    Those tensors are then read from that file, which may have more digits. Raises UserError for another model's file.
    """
    given = open_vqgan(vqgan)
    if not any(name.startswith(DECODER) for name in given.meta):
        raise UserError(f"{vqgan} holds no image decoder: give Meta's vqgan.ckpt or a vqgan_decoder.safetensors")
    rest = {name: x for name, x in files.vq.meta.items() if not name.startswith(DECODER)}
    check_image_tokenizer(files.vqgan, rest | given.meta, str(vqgan))
    for name in rest.keys() & given.meta.keys():
        x = files.vq.get(name)
        if not torch.equal(given.get(name).to(x.dtype), x):
            raise UserError(f"{vqgan} does not belong to {path}: its {name} has other values")

    def get(name: str) -> Tensor:
        return given.get(name) if name in given.meta else files.vq.get(name)

    return dataclasses.replace(files, vq=LazyTensors(rest | given.meta, get))


def open_tokenizers(path: Path) -> Tokenizers:
    """Open the tokenizers of a run, trained or not, or of a model in any layout. Raises UserError."""
    layout, folder = layout_of(Path(path))
    if layout != "run":
        return open_model_files(path).tokenizers
    with explained(path, layout):
        return run_tokenizers(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def open_model(path: Path, device: str = "auto", dtype: str = "auto", vqgan: Path | None = None) -> Run:
    """Load a run or a model in any layout, ready for sampling. Raises UserError.

    dtype: 'auto' keeps the files' dtype. vqgan: as in open_model_files.
    """
    where, files = pick_device(device), open_model_files(path, vqgan)
    tokenizer, image_tokenizer = open_text_tokenizer(files.tokenizers, path), files.tokenizers.image_tokenizer(where)
    return Run(
        config_of(files, path), tokenizer.vocab, tokenizer, image_tokenizer, load_model(files, where, DTYPES.get(dtype))
    )


def open_config(path: Path) -> RunConfig:
    """Return the configuration that open_model would give, without loading any weights. Raises UserError."""
    return config_of(open_model_files(path), path)


def config_of(files: ModelFiles, path: Path) -> RunConfig:
    return read_config(path) if files.layout == "run" else files.usage.run_config(files.model, files.vqgan)


def load_model(files: ModelFiles, device: torch.device, dtype: torch.dtype | None = None) -> Chameleon:
    """Load the transformer. It is allocated once, in its final dtype on its device, and then filled."""
    with torch.device("meta"):
        model = Chameleon(files.model).to(dtype or files.dtype)
    model.to_empty(device=device)
    copy_weights(files, model)
    return model.eval()


def copy_weights(files: ModelFiles, model: Chameleon) -> None:
    """Copy each tensor into the model, in the model's own dtype and on its device."""
    with torch.no_grad():
        for name, target in model.state_dict().items():
            target.copy_(files.weights.get(name))
