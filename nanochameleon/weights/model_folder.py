"""A model by its path, in any of four layouts; its tensors come one at a time, under our names.

    run     what train.py writes
    nano    config.json, model.safetensors (or shards with an index), vqgan.safetensors, text_tokenizer.json
    hf      transformers' folder; the image decoder, which transformers has not, in vqgan_decoder.safetensors
    meta    models/NAME/{consolidated.pth or .NN.pth, params.json, consolidate_params.json},
            tokenizer/{text_tokenizer.json, vqgan.ckpt, vqgan.yaml}; the path is that of the whole or of models/NAME

Every tensor is accounted for: one too many, one missing or one of another shape is an error that names it.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanochameleon.config import DataConfig, ModelConfig, OptimConfig, RunConfig, VQGANConfig
from nanochameleon.errors import UserError, shown, warn
from nanochameleon.files import read_json
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.text_tokenizer import TextTokenizer, from_json, spell
from nanochameleon.training import checkpoint
from nanochameleon.training.run import CONFIG, IMAGE_TOKENIZER, TEXT_TOKENIZER, Run, command, pick_device, read_config
from nanochameleon.transformer import Chameleon
from nanochameleon.weights import layout_files, layouts
from nanochameleon.weights.checks import expected_weights, finite, match, match_images
from nanochameleon.weights.layouts import DECODER, VQ_PREFIX, skeleton
from nanochameleon.weights.tensor_files import Cut, Pth, Safetensors, Tensors, open_safetensors

NANO = "nanochameleon"  # what config.json of our own folders says under "layout"
HF_DECODER, NANO_VQGAN = "vqgan_decoder", "vqgan"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Tokenizers:
    """Both tokenizers, not loaded: all that decides which ids a document becomes."""

    vocab_size: int
    context: int  # ids that their model reads at most; it has no say in ids
    vqgan: VQGANConfig
    tokenizer_json: dict
    vq: Tensors

    def text(self) -> TextTokenizer:
        """Raises ValueError and the like, as from_json does, where the two do not belong together."""
        found = from_json(self.tokenizer_json)
        if found.vocab.size != self.vocab_size:  # the release's last ids need not have pieces
            found = from_json(self.tokenizer_json, dataclasses.replace(found.vocab, size=self.vocab_size))
        if found.vocab.n_codes != self.vqgan.n_codes:
            raise ValueError(f"it has {found.vocab.n_codes} image codes, the image tokenizer {self.vqgan.n_codes}")
        return found

    def vq_state(self) -> dict[str, Tensor]:
        """The image tokenizer's tensors in fp32, in memory of their own: what was read is a map of its file."""
        return {name: self.vq.get(name).to(torch.float32, copy=True) for name in self.vq.meta}

    def image_tokenizer(self, device: torch.device) -> ImageTokenizer:
        return ImageTokenizer(VQGAN.from_state(self.vqgan, self.vq_state()).to(device))

    def digest(self) -> str:
        """Equal where every document becomes the same ids: the image decoder has no say in that."""
        text = self.text()
        pieces = {spell(piece): token for piece, token in text.ids.items()}
        merges = [[spell(left), spell(right)] for left, right in text.merges]
        sizes = [dataclasses.asdict(each) for each in (text.vocab, self.vqgan)]
        rare = [text.added, text.ignore_merges] if any(text.added) or text.ignore_merges else []
        found = hashlib.sha256(json.dumps([*sizes, pieces, merges, *rare], sort_keys=True).encode())
        for name in sorted(self.vq.meta):
            if not name.startswith(DECODER):
                x = self.vq.get(name).to(torch.float32).contiguous()
                found.update(name.encode() + x.numpy().data)
        return found.hexdigest()


@dataclass(frozen=True)
class LoadedModel:
    """A model that is not loaded: sizes, the text tokenizer's JSON, and its tensors under our names."""

    layout: str
    model: ModelConfig
    vqgan: VQGANConfig
    tokenizer_json: dict
    weights: Tensors
    vq: Tensors

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.meta["output.weight"].dtype

    @property
    def has_decoder(self) -> bool:
        return any(name.startswith(DECODER) for name in self.vq.meta)

    @property
    def tokenizers(self) -> Tokenizers:
        return Tokenizers(self.model.vocab_size, self.model.max_seq_len, self.vqgan, self.tokenizer_json, self.vq)


def layout_of(path: Path) -> tuple[str, Path]:
    """-> 'run', 'nano', 'hf' or 'meta', and the folder with the configuration. Raises UserError for anything else."""
    try:
        return found_layout(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def found_layout(path: Path) -> tuple[str, Path]:
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
def naming(path: Path, layout: str) -> Iterator[None]:
    """Makes a sentence of what a damaged folder raises. A KeyError is none of that: it is a bug of ours."""
    reader = f"{path} cannot be read as a Chameleon in {layout} layout"
    try:
        yield
    except (ValueError, AttributeError, IndexError, OSError) as error:
        raise UserError(f"{reader}: {shown(error, 120)}") from None
    except (ArithmeticError, RuntimeError, TypeError) as error:  # torch's, of a tensor of 10^300 rows
        raise UserError(f"{reader}: no model has the sizes that it names ({shown(error, 80)})") from None


def open_parts(path: Path, vqgan: Path | None = None) -> LoadedModel:
    """Opens a folder and checks that all tensors are there. `vqgan`: a file with the image decoder (with_decoder).

    Raises UserError naming what is missing or broken.
    """
    layout, folder = layout_of(Path(path))
    with naming(path, layout):
        parts = {"run": open_run_parts, "nano": open_nano, "hf": open_hf, "meta": open_meta}[layout](folder)
        match_images(parts.vqgan, parts.vq.meta, f"{path}: image tokenizer")
    if vqgan:
        parts = with_decoder(parts, Path(vqgan), path)
    return dataclasses.replace(parts, weights=finite(parts.weights, path), vq=finite(parts.vq, path))


# ---------------------------------------------------------------------------------------------------------------------
# The four layouts


def plain(files: Safetensors | Cut, cfg: ModelConfig, where: Path) -> Tensors:
    """Tensors that stand under our names."""
    ours = expected_weights(cfg, files.meta)
    match(ours, files.meta, str(where))
    return Tensors({name: files.meta[name] for name in ours}, files.__getitem__)


def open_run_parts(folder: Path) -> LoadedModel:
    cfg = read_config(folder)
    if not checkpoint.checkpoints(folder):
        line = command("train.py", cfg.name)
        raise UserError(f"{folder} is not trained yet: go on with the line that began it, such as {line}")
    whole = checkpoint.locate(folder)
    model = dataclasses.replace(cfg.model, dropout=0.0)  # of training, not of the weights
    listed = checkpoint.tensor_files(whole)
    if (whole / "weights.safetensors") in listed:
        files = Safetensors([whole / "weights.safetensors"])
    else:  # written by ranks that had a shard of each tensor
        files = Cut(listed, {name for name in checkpoint.stored_shapes(whole) if layouts.is_ours(name)})
    weights, kept = plain(files, model, whole), run_tokenizers(folder)
    return LoadedModel("run", model, cfg.vqgan, kept.tokenizer_json, weights, kept.vq)


def run_tokenizers(folder: Path) -> Tokenizers:
    """Of a run, whose transformer need not be trained."""
    cfg = read_config(folder)
    return stored_tokenizers(folder, cfg.model.vocab_size, cfg.model.max_seq_len, cfg.vqgan)


def stored_tokenizers(folder: Path, vocab_size: int, context: int, vqgan: VQGANConfig) -> Tokenizers:
    """As runs and prepared data hold them."""
    whole = checkpoint.locate(folder / IMAGE_TOKENIZER)
    vq = Safetensors([file for file in checkpoint.tensor_files(whole) if file.stem == "model"])
    match_images(vqgan, vq.meta, f"{folder}: image tokenizer")
    tensors = finite(Tensors(vq.meta, vq.__getitem__), folder)
    return Tokenizers(vocab_size, context, vqgan, read_json(folder / TEXT_TOKENIZER), tensors)


def open_nano(folder: Path) -> LoadedModel:
    content = read_json(folder / CONFIG)
    model = layout_files.checked(layout_files.field(content, "model", ModelConfig))
    vqgan = layout_files.field(content, "vqgan", VQGANConfig)
    vq = open_safetensors(folder, NANO_VQGAN)
    weights = plain(open_safetensors(folder), model, folder)
    return LoadedModel(
        "nano", model, vqgan, read_json(folder / TEXT_TOKENIZER), weights, Tensors(vq.meta, vq.__getitem__)
    )


def open_hf(folder: Path) -> LoadedModel:
    config, files = read_json(folder / CONFIG), open_safetensors(folder)
    model = layout_files.model_from_hf(config)
    ours = expected_weights(model, files.meta)
    theirs = {layouts.rule(name).hf: name for name in ours}
    found = {name: x for name, x in files.meta.items() if not name.startswith(VQ_PREFIX)}
    match({hf: layouts.to_hf(name, ours[name], model) for hf, name in theirs.items()}, found, str(folder))
    norms = [files[hf] for hf, name in theirs.items() if layouts.rule(name).cut == layouts.GROUPS]
    n_groups = layouts.n_groups_of_heads(norms, model.qk_norm_groups, model.kv_heads)
    if n_groups is None:
        raise ValueError("its QK-norm differs within the query heads of one key head, for which we have no place")
    model = dataclasses.replace(model, qk_norm_groups=n_groups)

    def get(name: str) -> Tensor:
        return layouts.from_hf(name, files[layouts.rule(name).hf], model)

    def get_vq(name: str) -> Tensor:
        return decoder[name] if name.startswith(DECODER) else files[VQ_PREFIX + name]

    decoder = open_safetensors(folder, HF_DECODER) if (folder / f"{HF_DECODER}.safetensors").is_file() else None
    vq = {name.removeprefix(VQ_PREFIX): x for name, x in files.meta.items() if name.startswith(VQ_PREFIX)}
    vq |= decoder.meta if decoder else {}
    resolution = layout_files.field(layout_files.section(config, "vq_config"), "resolution", int, 512)
    vqgan = layout_files.vqgan_from_tensors(vq, resolution)
    meta = {name: x.to(files.meta[layouts.rule(name).hf].dtype) for name, x in skeleton(model).items()}
    tokenizer = layout_files.tokenizer_from_hf(read_json(folder / "tokenizer.json"))
    return LoadedModel("hf", model, vqgan, tokenizer, Tensors(meta, get), Tensors(vq, get_vq))


def meta_shards(folder: Path) -> list[Path]:
    """consolidated.pth, or consolidated.00.pth and so on. Raises UserError for both, or where one is missing."""
    paths = sorted(path for path in folder.iterdir() if re.fullmatch(r"consolidated\.\d\d\.pth", path.name))
    if (whole := folder / "consolidated.pth").is_file():
        if paths:
            raise UserError(f"{folder} has both {whole.name} and {paths[0].name}: take one of the two models away")
        return [whole]
    if not paths or paths[-1].name != f"consolidated.{len(paths) - 1:02d}.pth":
        raise UserError(f"{folder} has {len(paths)} consolidated.NN.pth, not all from 00 on")
    return paths


def open_meta(folder: Path) -> LoadedModel:
    paths = meta_shards(folder)
    shards = [Pth(path, n_shards=len(paths)) for path in paths]
    params = read_json(folder / "params.json")
    params |= layout_files.section(params, "model")  # Meta's loader merges in this order, the later winning
    if (folder / "consolidate_params.json").is_file():
        params |= read_json(folder / "consolidate_params.json")
    columns = (
        shards[0].meta.get("tok_embeddings.weight", torch.empty(0, 0)).shape[1:]
    )  # of which each shard has so many
    needed = layout_files.field(params, "dim", int) // columns[0] if all(columns) else len(shards)
    if needed != len(shards):
        raise UserError(f"{folder} has {len(shards)} of {needed} shards")
    model = layout_files.model_from_meta(params, len(shards))
    ours = expected_weights(model, shards[0].meta)
    for i, shard in enumerate(shards):
        expected = {layouts.rule(name).meta: layouts.to_meta(name, x, i, len(shards)) for name, x in ours.items()}
        found = {name: x for name, x in shard.meta.items() if name != "rope.freqs"}
        match(expected, found, str(shard.path))
    model = with_groups_of_shards(model, shards)

    said: set[str] = set()  # a tensor is read once for each shard that is written

    def warn_once(sentence: str) -> None:
        if sentence not in said:
            warn(sentence)
        said.add(sentence)

    def get(name: str) -> Tensor:
        return layouts.from_meta(name, [shard[layouts.rule(name).meta] for shard in shards], model, warn_once)

    meta = {name: x.to(shards[0].meta[layouts.rule(name).meta].dtype) for name, x in ours.items()}
    beside = Path(os.path.abspath(folder)).parent.parent / "tokenizer"  # of a path as short as "7b" or "."
    vq = open_vqgan(beside / "vqgan.ckpt")
    resolution = layout_files.resolution_of_yaml((beside / "vqgan.yaml").read_text(encoding="utf-8-sig"))
    vqgan = layout_files.vqgan_from_tensors(vq.meta, resolution)
    return LoadedModel("meta", model, vqgan, read_json(beside / TEXT_TOKENIZER), Tensors(meta, get), vq)


def open_vqgan(path: Path) -> Tensors:
    """Meta's vqgan.ckpt, or a .safetensors with these tensors or the decoder's alone. Raises UserError."""
    vq = Safetensors([path]) if path.suffix == ".safetensors" else Pth(path, key="state_dict")
    kept = {name: x for name, x in vq.meta.items() if not name.startswith("loss.")}  # taming's, of training alone
    return Tensors(kept, vq.__getitem__)


def with_decoder(parts: LoadedModel, vqgan: Path, path: Path) -> LoadedModel:
    """The model with the image decoder of another file, whose other tensors, if it has any, are to be the model's.

    Those are taken from that file, too: it may have more digits. Raises UserError for another model's file.
    """
    given = open_vqgan(vqgan)
    if not any(name.startswith(DECODER) for name in given.meta):
        raise UserError(f"{vqgan} holds no image decoder: give Meta's vqgan.ckpt or a vqgan_decoder.safetensors")
    rest = {name: x for name, x in parts.vq.meta.items() if not name.startswith(DECODER)}
    match_images(parts.vqgan, rest | given.meta, str(vqgan))
    for name in rest.keys() & given.meta.keys():
        x = parts.vq.get(name)
        if not torch.equal(given.get(name).to(x.dtype), x):
            raise UserError(f"{vqgan} does not belong to {path}: its {name} has other values")

    def get(name: str) -> Tensor:
        return given.get(name) if name in given.meta else parts.vq.get(name)

    return dataclasses.replace(parts, vq=Tensors(rest | given.meta, get))


def with_groups_of_shards(cfg: ModelConfig, shards: list[Pth]) -> ModelConfig:
    """With as many groups of QK-norm as the shards' vectors need. Raises ValueError where there is no such number."""
    names = [layouts.rule(name).meta for name in skeleton(cfg) if layouts.rule(name).cut == layouts.GROUPS]
    vectors = [torch.stack([shard[name] for shard in shards]) for name in names]
    n_groups = layouts.n_groups_of_heads(vectors, cfg.qk_norm_groups, len(shards)) if vectors else cfg.qk_norm_groups
    if n_groups is None:
        raise ValueError(f"{len(shards)} shards do not hold {cfg.qk_norm_groups} or more groups of QK-norm")
    return dataclasses.replace(cfg, qk_norm_groups=n_groups)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def copy_weights(parts: LoadedModel, model: Chameleon) -> None:
    """Reads each tensor straight into its place, in the model's own type and on its device."""
    with torch.no_grad():
        for name, target in model.state_dict().items():
            target.copy_(parts.weights.get(name))


def load_model(parts: LoadedModel, device: torch.device, dtype: torch.dtype | None = None) -> Chameleon:
    """The transformer in its final type on its device: made there without content, then filled; no second copy."""
    with torch.device("meta"):
        model = Chameleon(parts.model).to(dtype or parts.dtype)
    model.to_empty(device=device)
    copy_weights(parts, model)
    return model.eval()


def open_model(path: Path, device: str = "auto", dtype: str = "auto", vqgan: Path | None = None) -> Run:
    """A run or a model in any layout, ready for sampling. dtype: 'auto' is the files'. vqgan: as in open_parts.

    Raises UserError.
    """
    where, parts = pick_device(device), open_parts(path, vqgan)
    tokenizer, image_tokenizer = text_of(parts.tokenizers, path), parts.tokenizers.image_tokenizer(where)
    if parts.layout == "run":
        cfg = read_config(path)
    else:
        cfg = RunConfig("converted", parts.vqgan, parts.model, OptimConfig(), data=DataConfig(source="folder"))
    return Run(cfg, tokenizer.vocab, tokenizer, image_tokenizer, load_model(parts, where, DTYPES.get(dtype)))


def text_of(tokenizers: Tokenizers, path: Path) -> TextTokenizer:
    """Raises UserError, naming the folder."""
    try:
        return tokenizers.text()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it lacks {shown(error)}" if isinstance(error, KeyError) else shown(error, 140)
        raise UserError(f"the text tokenizer in {path} is not usable with its model ({why})") from None


def open_tokenizers(path: Path) -> Tokenizers:
    """Those of a run, whose transformer need not be trained, or of a model in any layout. Raises UserError."""
    layout, folder = layout_of(Path(path))
    if layout != "run":
        return open_parts(path).tokenizers
    with naming(path, layout):
        return run_tokenizers(folder)
