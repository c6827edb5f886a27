"""Convert model configurations to and from Meta's and Hugging Face's layouts, as plain dicts.

Each layout lacks some of our fields: Meta's the number of QK-norm groups and the context length, Hugging Face's the
rounding of ffn_dim. Those go into a note under the key NOTE, which the other loaders ignore. A field that the layout
does have is always read from it, so a file that was edited means what it says.

The image tokenizer's sizes are read from its tensors, which cannot contradict themselves. Of Meta's vqgan.yaml only the
resolution is needed: one line is read, and the file is written from a template, without a YAML parser.
"""

import dataclasses
import re

from nanochameleon.config import ModelConfig, VQGANConfig
from nanochameleon.errors import shown
from nanochameleon.training.run import build
from nanochameleon.vocab import Vocab
from nanochameleon.weights.ranges import out_of_range
from nanochameleon.weights.tensor_files import Meta
from nanochameleon.weights.tokenizer_json import NOTE

NOTED = {"meta": ("qk_norm_groups", "max_seq_len"), "hf": ("multiple_of", "ffn_dim_multiplier")}
QK_NORM_EPS = 1e-5  # fixed in Meta's and Hugging Face's code

# ---------------------------------------------------------------------------------------------------------------------
# The transformer's configuration


def note(cfg: ModelConfig, layout: str) -> dict:
    """Return {NOTE: the fields that the layout lacks}."""
    return {NOTE: {name: getattr(cfg, name) for name in NOTED[layout]}}


def noted(content: dict, layout: str) -> dict:
    """Return the fields of the note, {} without one. Raises ValueError for a note that is no object."""
    return {name: value for name, value in section(content, NOTE).items() if name in NOTED[layout]}


def section(content: dict, name: str) -> dict:
    """Return an object inside a configuration, {} if missing or null. Raises ValueError for anything else."""
    found = content.get(name)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{name} is {shown(repr(found))}")
    return found or {}


def field(content: dict, name: str, kind: type, default: object = None):
    """Return a field of type `kind`.

    Raises ValueError naming it for another type, or if it is missing and has no default.
    """
    if name not in content and default is None:
        raise ValueError(f"it lacks {name!r}")
    return build(kind, content.get(name, default), name)


def checked(cfg: ModelConfig) -> ModelConfig:
    """Return the configuration. Raises ValueError for numbers that no model has."""
    if wrong := out_of_range(model=cfg):
        raise ValueError(wrong)
    return cfg


def check_exportable(cfg: ModelConfig, layout: str) -> None:
    """Raise ValueError for a model that Meta's or Hugging Face's code would compute differently."""
    if cfg.norm_eps != QK_NORM_EPS:
        raise ValueError(f"norm_eps is {cfg.norm_eps}, and the QK-norm of {layout} always uses {QK_NORM_EPS}")
    if layout == "hf" and not cfg.qk_norm:
        raise ValueError("it has no QK-norm, which Hugging Face's model always has")


def meta_params(cfg: ModelConfig) -> dict:
    """Return params.json. n_kv_heads is left out without GQA, since transformers' script takes it to mean GQA."""
    model = dict(
        dim=cfg.dim, n_layers=cfg.n_layers, n_heads=cfg.n_heads, vocab_size=cfg.vocab_size,
        multiple_of=cfg.multiple_of, norm_eps=cfg.norm_eps, rope_theta=cfg.rope_theta,
        qk_normalization=cfg.qk_norm, swin_norm=cfg.norm_order == "post",
    )  # fmt: skip
    if cfg.kv_heads != cfg.n_heads:
        model["n_kv_heads"] = cfg.kv_heads
    if cfg.ffn_dim_multiplier is not None:
        model["ffn_dim_multiplier"] = cfg.ffn_dim_multiplier
    return {"model": model} | note(cfg, "meta")


def model_from_meta(params: dict, n_shards: int) -> ModelConfig:
    """params.json, merged or not -> ModelConfig. Each shard is a group unless the note says otherwise."""
    p = params | section(params, "model")
    heads, kv_heads = field(p, "n_heads", int), build(int | None, p.get("n_kv_heads"), "n_kv_heads")
    qk_norm = field(p, "qk_normalization", bool, True)
    fields = dict(
        vocab_size=field(p, "vocab_size", int), dim=field(p, "dim", int), n_layers=field(p, "n_layers", int),
        n_heads=heads, n_kv_heads=None if kv_heads == heads else kv_heads,
        multiple_of=field(p, "multiple_of", int, 256), ffn_dim_multiplier=p.get("ffn_dim_multiplier"),
        norm_eps=field(p, "norm_eps", float), rope_theta=float(field(p, "rope_theta", float, 10_000.0)),
        qk_norm=qk_norm, qk_norm_groups=n_shards if qk_norm else 1,
        norm_order="post" if field(p, "swin_norm", bool, False) else "pre",
    )  # fmt: skip
    return checked(build(ModelConfig, dataclasses.asdict(ModelConfig()) | fields | noted(params, "meta"), "model"))


def hf_config(cfg: ModelConfig, vqgan: VQGANConfig, vocab: Vocab, vocabulary_map: dict, dtype: str) -> dict:
    """Return transformers' config.json. rope_theta and the dtype have the names of versions 4 and 5."""
    vq_config = dict(
        model_type="chameleon_vqgan", embed_dim=vqgan.embed_dim, num_embeddings=vqgan.n_codes, double_latent=False,
        latent_channels=vqgan.z_channels, resolution=vqgan.resolution, in_channels=3, base_channels=vqgan.ch,
        channel_multiplier=list(vqgan.ch_mult), num_res_blocks=vqgan.n_res_blocks, attn_resolutions=None, dropout=0.0,
        attn_type="vanilla" if vqgan.mid_attention else "none",
    )  # fmt: skip
    return dict(
        architectures=["ChameleonForConditionalGeneration"], model_type="chameleon", vocab_size=cfg.vocab_size,
        hidden_size=cfg.dim, intermediate_size=cfg.ffn_dim, num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.kv_heads, hidden_act="silu",
        max_position_embeddings=cfg.max_seq_len, rms_norm_eps=cfg.norm_eps, rope_theta=cfg.rope_theta,
        rope_parameters=dict(rope_type="default", rope_theta=cfg.rope_theta), attention_bias=False, mlp_bias=False,
        attention_dropout=0.0, tie_word_embeddings=False, model_parallel_size=cfg.qk_norm_groups,
        swin_norm=cfg.norm_order == "post", bos_token_id=vocab.bos, eos_token_id=vocab.eos, pad_token_id=vocab.pad,
        torch_dtype=dtype, dtype=dtype, vq_config=vq_config, vocabulary_map=vocabulary_map,
        **note(cfg, "hf"),
    )  # fmt: skip


def model_from_hf(config: dict) -> ModelConfig:
    """config.json -> ModelConfig. Raises ValueError for what our model does not compute."""
    rope = section(config, "rope_parameters") or section(config, "rope_scaling")
    ffn_dim = field(config, "intermediate_size", int, 11_008)
    for bad, what in (
        (config.get("model_type") != "chameleon", f"model_type {config.get('model_type')!r}"),
        (config.get("hidden_act", "silu") != "silu", f"hidden_act {config.get('hidden_act')!r}"),
        (rope.get("rope_type", rope.get("type", "default")) != "default", f"rotary scaling {rope}"),
        (config.get("tie_word_embeddings", False), "tied embeddings"),
        (ffn_dim < 1, f"intermediate_size {ffn_dim}"),
    ):
        if bad:
            raise ValueError(f"{shown(what)} is not Chameleon's")
    heads = field(config, "num_attention_heads", int, 32)
    kv_heads = build(int | None, config.get("num_key_value_heads", 32), "num_key_value_heads")
    fields = dict(
        vocab_size=field(config, "vocab_size", int, 65_536), dim=field(config, "hidden_size", int, 4_096),
        n_layers=field(config, "num_hidden_layers", int, 32), n_heads=heads,
        n_kv_heads=None if kv_heads in (None, heads) else kv_heads,
        max_seq_len=field(config, "max_position_embeddings", int, 4_096),
        norm_eps=field(config, "rms_norm_eps", float, 1e-5),
        rope_theta=float(field(config | rope, "rope_theta", float, 10_000.0)),
        norm_order="post" if field(config, "swin_norm", bool, False) else "pre",
        qk_norm_groups=field(config, "model_parallel_size", int, 1),
    )  # fmt: skip
    cfg = build(ModelConfig, dataclasses.asdict(ModelConfig()) | fields | noted(config, "hf"), "model")
    return with_ffn_dim(checked(cfg), ffn_dim)


def with_ffn_dim(cfg: ModelConfig, ffn_dim: int) -> ModelConfig:
    """Return the configuration whose feed-forward width is `ffn_dim`, with the coarsest rounding that gives it."""
    for multiple_of in (cfg.multiple_of, *(2**n for n in range(12, -1, -1)), ffn_dim):
        if (found := dataclasses.replace(cfg, multiple_of=multiple_of)).ffn_dim == ffn_dim:
            return found
    two_thirds = int(2 * 4 * cfg.dim / 3)
    # plus 0.5, so that truncating the product gives ffn_dim in spite of rounding
    return dataclasses.replace(cfg, multiple_of=1, ffn_dim_multiplier=(ffn_dim + 0.5) / two_thirds)


# ---------------------------------------------------------------------------------------------------------------------
# The image tokenizer's configuration


def vqgan_from_tensors(meta: Meta, resolution: int) -> VQGANConfig:
    """Read an image tokenizer's sizes off its tensors' shapes. Raises ValueError where a tensor is missing."""
    if not any(name.startswith("encoder.") for name in meta):
        raise ValueError("it has no image tokenizer")

    def shape(name: str, n: int) -> tuple[int, ...]:
        if name not in meta or len(meta[name].shape) != n or 0 in meta[name].shape:
            raise ValueError(f"it lacks {name}, which tells the sizes of its image tokenizer")
        return meta[name].shape

    levels = len({name.split(".")[2] for name in meta if name.startswith("encoder.down.")})
    ch, blocks = shape("encoder.conv_in.weight", 4)[0], [n for n in meta if n.startswith("encoder.down.0.block.")]
    n_codes, embed_dim = shape("quantize.embedding.weight", 2)
    return VQGANConfig(
        resolution=resolution, ch=ch, n_codes=n_codes, embed_dim=embed_dim,
        ch_mult=tuple(shape(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] // ch for i in range(levels)),
        n_res_blocks=len({name.split(".")[4] for name in blocks}), z_channels=shape("quant_conv.weight", 4)[1],
        mid_attention="encoder.mid.attn_1.q.weight" in meta,
    )  # fmt: skip


def check_vqgan(cfg: VQGANConfig, layout: str) -> None:
    """Raise ValueError for an image tokenizer that the others, whose numbers are fixed, would compute differently."""
    if cfg.n_groups != 32:
        raise ValueError(f"its image tokenizer has vqgan.n_groups {cfg.n_groups}; Chameleon's has 32")
    if cfg.window is not None:
        raise ValueError("its encoder reads windows (vqgan.window), Chameleon's the whole image")
    if layout == "meta" and not cfg.mid_attention:
        raise ValueError("its image tokenizer has no attention in the middle (vqgan.mid_attention), Chameleon's has")


def vqgan_yaml(cfg: VQGANConfig) -> str:
    """Return Meta's vqgan.yaml, in taming-transformers' form. Its readers ask for `ckpt_path` and `lossconfig`, too."""
    return f"""model:
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: {cfg.embed_dim}
    n_embed: {cfg.n_codes}
    ckpt_path: null
    ddconfig:
      double_z: false
      z_channels: {cfg.z_channels}
      resolution: {cfg.resolution}
      in_channels: 3
      out_ch: 3
      ch: {cfg.ch}
      ch_mult: {list(cfg.ch_mult)}
      num_res_blocks: {cfg.n_res_blocks}
      attn_resolutions: []
      dropout: 0.0
    lossconfig: {{}}
"""


def resolution_of_yaml(text: str) -> int:
    """Return the resolution in vqgan.yaml. Raises ValueError where there is none."""
    found = re.search(r"^[ \t]*resolution:[ \t]*(\d{1,9})[ \t]*(?:#.*)?$", text, re.MULTILINE)
    if not found:
        raise ValueError("vqgan.yaml has no line `resolution:` with a number")
    return int(found[1])
