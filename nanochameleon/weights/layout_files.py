"""What stands beside the tensors in Meta's and Hugging Face's layouts: configurations and the text tokenizer's file.

All of it as plain values: a dict is read, a dict comes out. What a layout has no word for (Meta's the number of QK-norm
groups and the context, Hugging Face's our ffn rounding) goes into a note under the key NOTE, which the others' loaders
pass over; for what it has a word, that word counts, so a file that was edited means what it says. The image
tokenizer's sizes are read from its tensors, which cannot disagree with themselves; of Meta's vqgan.yaml only the
resolution is needed, so one line of it is read and the file written from a template: no YAML parser.
"""

import copy
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
    """{NOTE: what the layout has no word for}."""
    return {NOTE: {name: getattr(cfg, name) for name in NOTED[layout]}}


def noted(content: dict, layout: str) -> dict:
    """The fields of such a note; none without one. Raises ValueError for a note that is no object."""
    return {name: value for name, value in section(content, NOTE).items() if name in NOTED[layout]}


def section(content: dict, name: str) -> dict:
    """An object inside a configuration; {} where it is missing or null. Raises ValueError for anything else."""
    found = content.get(name)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{name} is {shown(repr(found))}")
    return found or {}


def field(content: dict, name: str, kind: type, default: object = None):
    """A field of a configuration, which has the type `kind`. Raises ValueError, naming it, for another type, and where
    it is missing and there is no default."""
    if name not in content and default is None:
        raise ValueError(f"it lacks {name!r}")
    return build(kind, content.get(name, default), name)


def checked(cfg: ModelConfig) -> ModelConfig:
    """Raises ValueError for numbers that no model has."""
    if wrong := out_of_range(model=cfg):
        raise ValueError(wrong)
    return cfg


def check_exportable(cfg: ModelConfig, layout: str) -> None:
    """Raises ValueError for a model that Meta's and Hugging Face's code would compute otherwise."""
    if cfg.norm_eps != QK_NORM_EPS:
        raise ValueError(f"norm_eps is {cfg.norm_eps}, and {layout}'s QK-norm has {QK_NORM_EPS} in any case")
    if layout == "hf" and not cfg.qk_norm:
        raise ValueError("it has no QK-norm, which Hugging Face's model always has")


def meta_params(cfg: ModelConfig) -> dict:
    """-> params.json. n_kv_heads is left out without GQA: transformers' script takes its presence to mean GQA."""
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
    """params.json, merged or not, -> ModelConfig. Each shard is a group unless the note says else."""
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
    """-> config.json of transformers' ChameleonConfig, with rope_theta and the type as versions 4 and 5 name them."""
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
    """The configuration whose feed-forward width is `ffn_dim`: of coarse rounding if that gives it."""
    for multiple_of in (cfg.multiple_of, *(2**n for n in range(12, -1, -1)), ffn_dim):
        if (found := dataclasses.replace(cfg, multiple_of=multiple_of)).ffn_dim == ffn_dim:
            return found
    two_thirds = int(2 * 4 * cfg.dim / 3)  # half a unit more, so that cutting off the fraction gives ffn_dim
    return dataclasses.replace(cfg, multiple_of=1, ffn_dim_multiplier=(ffn_dim + 0.5) / two_thirds)


# ---------------------------------------------------------------------------------------------------------------------
# The image tokenizer's configuration


def vqgan_from_tensors(meta: Meta, resolution: int) -> VQGANConfig:
    """Sizes of an image tokenizer, by its tensors' shapes. Raises ValueError where a tensor is missing."""
    if not any(name.startswith("encoder.") for name in meta):
        raise ValueError("it has no image tokenizer")

    def shape(name: str, n: int) -> tuple[int, ...]:
        if name not in meta or len(meta[name].shape) != n or 0 in meta[name].shape:
            raise ValueError(f"it lacks {name}, of which its image tokenizer's sizes are read")
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
    """Raises ValueError for an image tokenizer that the others, with their fixed numbers, would compute otherwise."""
    if cfg.n_groups != 32:
        raise ValueError(f"its image tokenizer has vqgan.n_groups {cfg.n_groups}; Chameleon's has 32")
    if cfg.window is not None:
        raise ValueError("its encoder sees windows (vqgan.window), Chameleon's the whole image")
    if layout == "meta" and not cfg.mid_attention:
        raise ValueError("its image tokenizer has no attention in the middle (vqgan.mid_attention), Chameleon's has")


def vqgan_yaml(cfg: VQGANConfig) -> str:
    """Meta's vqgan.yaml, in taming-transformers' form. `ckpt_path` and `lossconfig` are there since readers ask."""
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
    """Raises ValueError where there is none."""
    found = re.search(r"^[ \t]*resolution:[ \t]*(\d{1,9})[ \t]*(?:#.*)?$", text, re.MULTILINE)
    if not found:
        raise ValueError("it names no resolution")
    return int(found[1])


# ---------------------------------------------------------------------------------------------------------------------
# The text tokenizer

PLACEHOLDER = "<image>"  # Hugging Face's name for the reserved id behind the end of turn (8711)


def bos_first() -> dict:
    """The post-processor with which `tokenizers` puts <s> first; Meta's own code does so itself."""
    bos = "<s>"
    word, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [word, text, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {bos: {"id": bos, "ids": [Vocab.bos], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": [word, text], "pair": pair, "special_tokens": special}


def renamed(content: dict, old: str, new: str) -> dict:
    """A tokenizer's JSON with one special name in place of another."""
    content = copy.deepcopy(content)
    content["model"]["vocab"] = {new if name == old else name: i for name, i in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        token["content"] = new if token["content"] == old else token["content"]
    return content


def tokenizer_to_hf(content: dict, vocab: Vocab) -> dict:
    """text_tokenizer.json -> tokenizer.json: a reserved name becomes <image>, and <s> is put first.

    Raises ValueError where no id is reserved behind the end of turn, or where the file has no name for it.
    """
    if vocab.eot + 1 >= vocab.first_text or vocab.name(vocab.eot + 1) not in vocabulary_map(content):
        raise ValueError("its vocabulary has no reserved name behind the end of turn for Hugging Face's <image>")
    content = renamed(content, vocab.name(vocab.eot + 1), PLACEHOLDER)
    return content | {"post_processor": content.get("post_processor") or bos_first()}


def tokenizer_from_hf(content: dict) -> dict:
    """Inverse of tokenizer_to_hf: a post-processor that is not the one added there stays."""
    names, after = vocabulary_map(content), content.get("post_processor")
    if PLACEHOLDER in names:
        content = renamed(content, PLACEHOLDER, f"<reserved{names[PLACEHOLDER] - Vocab.first_code:05d}>")
    return content | {"post_processor": None if after == bos_first() else after}


def vocabulary_map(content: dict) -> dict[str, int]:
    """Every name -> id, for config.json. Raises ValueError for a file of another form."""
    try:
        return content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"its text tokenizer has no names with ids ({shown(error)})") from None


def processor_files(vocab: Vocab, vqgan: VQGANConfig) -> dict[str, dict]:
    """File name -> content: what ChameleonProcessor and generate() read beside config.json and tokenizer.json.

    The pixels' scale is 2/255, Meta's; transformers' own default, 0.0078, makes white 0.989.
    """
    side = vqgan.resolution
    special = dict(bos_token=vocab.bos, eos_token=vocab.eos, unk_token=vocab.unk, pad_token=vocab.pad)
    names = {role: vocab.name(token) for role, token in special.items()} | {"sep_token": vocab.name(vocab.eot)}
    processor = dict(
        image_processor_type="ChameleonImageProcessor", processor_class="ChameleonProcessor", do_convert_rgb=True,
        do_resize=True, size={"shortest_edge": side}, resample=1, do_center_crop=True,
        crop_size={"height": side, "width": side}, do_rescale=True, rescale_factor=2 / 255, do_normalize=True,
        image_mean=[1.0] * 3, image_std=[1.0] * 3,
    )  # fmt: skip
    image = dict(image_seq_length=vqgan.codes_per_image, image_token=PLACEHOLDER)
    return {
        "generation_config.json": dict(bos_token_id=vocab.bos, eos_token_id=vocab.eos, pad_token_id=vocab.pad),
        "preprocessor_config.json": processor,
        "processor_config.json": dict(processor_class="ChameleonProcessor", **image),
        "special_tokens_map.json": names,
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", processor_class="ChameleonProcessor",
            clean_up_tokenization_spaces=False, model_max_length=10**30, **names,
        ),
    }  # fmt: skip
