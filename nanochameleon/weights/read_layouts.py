"""Open a model in each of the four layouts: its configuration, and its tensors under our names, read one at a time.

Every tensor is accounted for: one that is left over, missing or of another shape is an error that names it.
"""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanochameleon.config import ModelConfig, VQGANConfig
from nanochameleon.errors import UserError, warn
from nanochameleon.files import read_json
from nanochameleon.training import checkpoint
from nanochameleon.training.restore import stored_shapes
from nanochameleon.training.run import CONFIG, TEXT_TOKENIZER, command, read_config
from nanochameleon.weights import layout_configs, layout_tokenizer, layouts
from nanochameleon.weights.checks import check_tensors, expected_weights
from nanochameleon.weights.int8 import dequantized
from nanochameleon.weights.layouts import DECODER, VQ_PREFIX, weight_shapes
from nanochameleon.weights.pth_files import Pth
from nanochameleon.weights.ranges import out_of_range
from nanochameleon.weights.tensor_files import LazyTensors, Safetensors, ShardedSafetensors, open_safetensors
from nanochameleon.weights.tokenizers import Tokenizers, run_tokenizers
from nanochameleon.weights.usage import Usage

HF_DECODER, NANO_VQGAN = "vqgan_decoder", "vqgan"


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk, opened and not loaded: sizes, the text tokenizer's JSON, its tensors under our names."""

    layout: str
    model: ModelConfig
    vqgan: VQGANConfig
    tokenizer_json: dict
    weights: LazyTensors
    vq: LazyTensors
    usage: Usage = field(default_factory=Usage)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.meta["output.weight"].dtype

    @property
    def has_decoder(self) -> bool:
        return any(name.startswith(DECODER) for name in self.vq.meta)

    @property
    def tokenizers(self) -> Tokenizers:
        return Tokenizers(self.model.vocab_size, self.model.max_seq_len, self.vqgan, self.tokenizer_json, self.vq)


# ---------------------------------------------------------------------------------------------------------------------
# A run, and our own layout


def open_run(folder: Path) -> ModelFiles:
    cfg = read_config(folder)
    if not checkpoint.checkpoints(folder):
        line = command("train.py", cfg.name)
        raise UserError(f"{folder} is not trained yet: resume it with the command that started it, such as {line}")
    newest = checkpoint.locate(folder)
    model = dataclasses.replace(cfg.model, dropout=0.0)  # of training, not of the weights
    if (newest / "weights.safetensors") in checkpoint.tensor_files(newest):
        files = Safetensors([newest / "weights.safetensors"])
    else:  # a sharded checkpoint, whose files hold the optimizer's state, too
        shapes = stored_shapes(newest)
        weights = {name: shape for name, shape in shapes.items() if layouts.is_weight(name)}
        files = ShardedSafetensors(checkpoint.tensor_files(newest), weights)
    weights = with_our_names(LazyTensors(files.meta, files.__getitem__), model, newest)
    tokenizers = run_tokenizers(folder)
    return ModelFiles("run", model, cfg.vqgan, tokenizers.tokenizer_json, weights, tokenizers.vq, Usage.of_run(cfg))


def open_nano(folder: Path) -> ModelFiles:
    content = read_json(folder / CONFIG)
    model = layout_configs.checked(layout_configs.field(content, "model", ModelConfig))
    vqgan = layout_configs.field(content, "vqgan", VQGANConfig)
    usage = layout_configs.field(content, "usage", Usage, {})  # older folders have none
    if wrong := out_of_range(sample=usage.sample):
        raise ValueError(wrong)
    files, vq = open_safetensors(folder), open_safetensors(folder, NANO_VQGAN)
    weights = with_our_names(dequantized(LazyTensors(files.meta, files.__getitem__), folder), model, folder)
    vq = dequantized(LazyTensors(vq.meta, vq.__getitem__), folder)
    return ModelFiles("nano", model, vqgan, read_json(folder / TEXT_TOKENIZER), weights, vq, usage)


def with_our_names(tensors: LazyTensors, cfg: ModelConfig, where: Path) -> LazyTensors:
    """Check tensors that are stored under our names, and put them in the model's order."""
    ours = expected_weights(cfg, tensors.meta)
    check_tensors(ours, tensors.meta, str(where))
    return LazyTensors({name: tensors.meta[name] for name in ours}, tensors.get)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's layout


def open_hf(folder: Path) -> ModelFiles:
    config, files = read_json(folder / CONFIG), open_safetensors(folder)
    model = hf_model(config, files, folder)

    def get(name: str) -> Tensor:
        return layouts.from_hf(name, files[layouts.names_of(name).hf], model)

    meta = {name: x.to(files.meta[layouts.names_of(name).hf].dtype) for name, x in weight_shapes(model).items()}
    vq = hf_image_tokenizer(files, folder)
    resolution = layout_configs.field(layout_configs.section(config, "vq_config"), "resolution", int, 512)
    vqgan = layout_configs.vqgan_from_tensors(vq.meta, resolution)
    tokenizer = layout_tokenizer.tokenizer_from_hf(read_json(folder / "tokenizer.json"))
    return ModelFiles("hf", model, vqgan, tokenizer, LazyTensors(meta, get), vq)


def hf_model(config: dict, files: Safetensors, folder: Path) -> ModelConfig:
    """Read the configuration, check the transformer's tensors, and count the groups of QK-norm that they need."""
    cfg = layout_configs.model_from_hf(config)
    ours = expected_weights(cfg, files.meta)
    theirs = {layouts.names_of(name).hf: name for name in ours}
    found = {name: x for name, x in files.meta.items() if not name.startswith(VQ_PREFIX)}
    check_tensors({hf: layouts.to_hf(name, ours[name], cfg) for hf, name in theirs.items()}, found, str(folder))
    norms = [files[hf] for hf, name in theirs.items() if layouts.names_of(name).cut == layouts.GROUPS]
    n_groups = layouts.fewest_groups(norms, cfg.qk_norm_groups, cfg.kv_heads)
    if n_groups is None:
        raise ValueError(
            "QK-norm weights differ between query heads that share a KV head; our layout cannot represent that"
        )
    return dataclasses.replace(cfg, qk_norm_groups=n_groups)


def hf_image_tokenizer(files: Safetensors, folder: Path) -> LazyTensors:
    """Open the encoder in the model's files, and the decoder in a file of its own, which transformers has not."""
    decoder = open_safetensors(folder, HF_DECODER) if (folder / f"{HF_DECODER}.safetensors").is_file() else None

    def get(name: str) -> Tensor:
        return decoder[name] if name.startswith(DECODER) else files[VQ_PREFIX + name]

    meta = {name.removeprefix(VQ_PREFIX): x for name, x in files.meta.items() if name.startswith(VQ_PREFIX)}
    return LazyTensors(meta | (decoder.meta if decoder else {}), get)


# ---------------------------------------------------------------------------------------------------------------------
# Meta's layout


def open_meta(folder: Path) -> ModelFiles:
    shards = open_shards(folder)
    params = read_json(folder / "params.json")
    params |= layout_configs.section(params, "model")  # Meta's loader merges in this order, the later winning
    if (folder / "consolidate_params.json").is_file():
        params |= read_json(folder / "consolidate_params.json")
    check_all_shards(params, shards, folder)
    model, meta = meta_model(params, shards)

    warned: set[str] = set()

    def warn_once(sentence: str) -> None:  # a tensor is read once for each shard that is written
        if sentence not in warned:
            warn(sentence)
        warned.add(sentence)

    def get(name: str) -> Tensor:
        return layouts.from_meta(name, [shard[layouts.names_of(name).meta] for shard in shards], model, warn_once)

    tokenizers = Path(os.path.abspath(folder)).parent.parent / "tokenizer"  # abspath: the path may be as short as "."
    vq = open_vqgan(tokenizers / "vqgan.ckpt")
    resolution = layout_configs.resolution_of_yaml((tokenizers / "vqgan.yaml").read_text(encoding="utf-8-sig"))
    vqgan = layout_configs.vqgan_from_tensors(vq.meta, resolution)
    return ModelFiles("meta", model, vqgan, read_json(tokenizers / TEXT_TOKENIZER), LazyTensors(meta, get), vq)


def open_shards(folder: Path) -> list[Pth]:
    """Open consolidated.pth, or consolidated.00.pth and so on. Raises UserError for both, or if one is missing."""
    paths = sorted(path for path in folder.iterdir() if re.fullmatch(r"consolidated\.\d\d\.pth", path.name))
    if (whole := folder / "consolidated.pth").is_file():
        if paths:
            raise UserError(f"{folder} has both {whole.name} and {paths[0].name}: remove one of the two models")
        paths = [whole]
    elif not paths or paths[-1].name != f"consolidated.{len(paths) - 1:02d}.pth":
        raise UserError(f"{folder} has {len(paths)} consolidated.NN.pth, not all from 00 on: copy the missing ones")
    return [Pth(path, n_shards=len(paths)) for path in paths]


def check_all_shards(params: dict, shards: list[Pth], folder: Path) -> None:
    """Raise UserError where the last shards are missing: the columns of the embedding are divided among all."""
    columns = shards[0].meta.get("tok_embeddings.weight", torch.empty(0, 0)).shape[1:]
    needed = layout_configs.field(params, "dim", int) // columns[0] if all(columns) else len(shards)
    if needed != len(shards):
        raise UserError(f"{folder} has {len(shards)} of {needed} shards: copy the missing ones")


def meta_model(params: dict, shards: list[Pth]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read the configuration and check each shard's tensors. Returns it and our tensors on the meta device."""
    cfg = layout_configs.model_from_meta(params, len(shards))
    ours = expected_weights(cfg, shards[0].meta)
    names = {name: layouts.names_of(name) for name in ours}
    for i, shard in enumerate(shards):
        expected = {names[name].meta: layouts.to_meta(name, x, i, len(shards)) for name, x in ours.items()}
        check_tensors(expected, {name: x for name, x in shard.meta.items() if name != "rope.freqs"}, str(shard.path))
    norms = [name.meta for name in names.values() if name.cut == layouts.GROUPS]
    vectors = [torch.stack([shard[name] for shard in shards]) for name in norms]
    n_groups = layouts.fewest_groups(vectors, cfg.qk_norm_groups, len(shards)) if vectors else cfg.qk_norm_groups
    if n_groups is None:
        raise ValueError(f"{len(shards)} shards do not hold {cfg.qk_norm_groups} or more groups of QK-norm")
    meta = {name: x.to(shards[0].meta[names[name].meta].dtype) for name, x in ours.items()}
    return dataclasses.replace(cfg, qk_norm_groups=n_groups), meta


def open_vqgan(path: Path) -> LazyTensors:
    """Open Meta's vqgan.ckpt, or a .safetensors with the same tensors or the decoder's alone. Raises UserError."""
    vq = Safetensors([path]) if path.suffix == ".safetensors" else Pth(path, key="state_dict")
    kept = {name: x for name, x in vq.meta.items() if not name.startswith("loss.")}  # taming's, used in training only
    return LazyTensors(kept, vq.__getitem__)
