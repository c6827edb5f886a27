"""Three layouts: what the permutations mean, how shards are cut, and that configurations convert both ways."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import model_configs
from tiny import RELEASED_VQGAN, TOKENIZER, VOCAB

from nanochameleon.config import ModelConfig, VQGANConfig
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.presets import PRESETS
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.transformer import Chameleon, apply_rotary_emb, compute_freqs_cis
from nanochameleon.vocab import Vocab
from nanochameleon.weights import layouts
from nanochameleon.weights.layout_configs import (
    check_exportable,
    check_vqgan,
    hf_config,
    meta_params,
    model_from_hf,
    model_from_meta,
    resolution_of_yaml,
    vqgan_from_tensors,
    vqgan_yaml,
)
from nanochameleon.weights.layout_tokenizer import tokenizer_from_hf, tokenizer_to_hf
from nanochameleon.weights.tokenizer_json import NOTE, from_json, to_json


def tensors(cfg: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(x.shape, generator=generator) for name, x in layouts.weight_shapes(cfg).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


@settings(max_examples=20)
@given(model_configs(), st.booleans())
def test_the_skeleton_is_the_models(cfg, qk_norm):
    cfg = dataclasses.replace(cfg, qk_norm=qk_norm)
    model, ours = Chameleon(cfg).state_dict(), layouts.weight_shapes(cfg)
    assert list(model) == list(ours) and all(model[name].shape == ours[name].shape for name in model)


@given(model_configs(), st.integers(0, 99))
def test_hugging_faces_order_comes_back(cfg, seed):
    for name, x in tensors(cfg, seed).items():
        assert torch.equal(layouts.from_hf(name, layouts.to_hf(name, x, cfg), cfg), x)


@given(model_configs(), st.integers(0, 99), st.sampled_from([1, 2, 4, 8]))
def test_shards_come_back(cfg, seed, n):
    if layouts.why_not_sharded(cfg, n):
        return
    for name, x in tensors(cfg, seed).items():
        parts = [layouts.to_meta(name, x, i, n) for i in range(n)]
        assert torch.equal(layouts.from_meta(name, parts, cfg, pytest.fail), x)
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)  # torch.save writes storages whole


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 50), st.integers(0, 99))
def test_turning_halves_of_the_permuted_is_turning_neighbours(heads, half, position, seed):
    """The permutation has a purpose: rotating x's halves as transformers does gives the permuted result."""
    e = 2 * half
    x = torch.randn(1, heads, 1, e, generator=torch.Generator().manual_seed(seed)).double()
    table = compute_freqs_cis(torch.tensor([[position]]), e, 10_000.0)
    ours = apply_rotary_emb(x, table)
    theirs = layouts.half_split(x.flatten(), e).view(x.shape)
    cos, sin = (torch.cat([part, part], -1).double() for part in table.unbind(-1))
    turned = torch.cat([-theirs[..., half:], theirs[..., :half]], -1)
    expected = layouts.half_split(ours.flatten(), e).view(x.shape)
    torch.testing.assert_close(theirs * cos + turned * sin, expected, rtol=0, atol=1e-12)


def test_heads_that_drifted_apart_need_more_groups_or_are_refused():
    x = torch.arange(8.0)[:, None].expand(8, 4).contiguous()
    pairs = x[::2].repeat_interleave(2, 0)
    assert layouts.fewest_groups([pairs], 1, 8) == 4 and layouts.fewest_groups([x], 1, 8) == 8
    assert layouts.fewest_groups([pairs[:1].repeat(8, 1)], 2, 8) == 2  # not fewer than the file says
    assert layouts.fewest_groups([x, pairs[::2]], 1, 4) is None  # 8 query heads on 4 key heads
    cfg = ModelConfig(vocab_size=300, dim=32, n_layers=1, n_heads=8, qk_norm_groups=4)
    with pytest.raises(ValueError, match="more than 4 different"):
        layouts.from_hf("layers.0.attention.q_norm.weight", x, cfg)


def test_copies_that_differ_are_averaged_with_a_warning():
    said = []
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])]
    x = layouts.from_meta("layers.0.ffn_norm.weight", parts, ModelConfig(), said.append)
    assert x.tolist() == [2.0, 2.0] and "ffn_norm" in said[0] and "2 shards" in said[0]


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


@given(model_configs(), st.sampled_from([1, 2, 4, 8]))
def test_configurations_come_back(cfg, n_shards):
    assert model_from_meta(meta_params(cfg) | {"model_parallel_size": n_shards}, n_shards) == cfg
    assert model_from_hf(hf_config(cfg, VQGANConfig(), Vocab(), {}, "bfloat16")) == cfg


@given(model_configs(), st.integers(1, 300))
def test_files_without_our_note_say_the_same_model(cfg, ffn_dim):
    params, config = meta_params(cfg), hf_config(cfg, VQGANConfig(), Vocab(), {}, "bfloat16")
    del params[NOTE], config[NOTE]
    assert dataclasses.replace(model_from_meta(params, cfg.qk_norm_groups), max_seq_len=cfg.max_seq_len) == cfg
    other = model_from_hf(config | {"intermediate_size": ffn_dim})
    assert other.ffn_dim == ffn_dim and dataclasses.replace(other, multiple_of=1, ffn_dim_multiplier=None) == (
        dataclasses.replace(cfg, multiple_of=1, ffn_dim_multiplier=None)
    )


@pytest.mark.parametrize(
    "name, n, shards, ffn_dim",
    [("chameleon_7b", 7_013_158_912, 1, 11_008), ("chameleon_34b", 34_293_522_432, 4, 22_016)],
)
def test_the_presets_are_the_released_models(name, n, shards, ffn_dim):
    cfg = PRESETS[name]()
    with torch.device("meta"):
        count = sum(p.numel() for p in Chameleon(cfg.model).parameters())
    assert count == n and cfg.model.ffn_dim == ffn_dim and layouts.why_not_sharded(cfg.model, shards) is None
    released = dict(vocab_size=65_536, norm_eps=1e-5, rope_theta=10_000.0, head_dim=128, max_seq_len=4_096)
    assert {key: getattr(cfg.model, key) for key in released} == released
    params = meta_params(cfg.model)
    assert ("n_kv_heads" in params["model"]) == (name == "chameleon_34b")  # its presence means GQA to transformers
    assert hf_config(cfg.model, cfg.vqgan, Vocab(), {}, "bfloat16")["intermediate_size"] == ffn_dim


@pytest.mark.parametrize(
    "cfg", [VQGANConfig(), RELEASED_VQGAN, dataclasses.replace(RELEASED_VQGAN, mid_attention=False)]
)
def test_the_image_tokenizers_sizes_are_read_from_its_tensors(cfg):
    with torch.device("meta"):
        found = vqgan_from_tensors(VQGAN(cfg).state_dict(), resolution_of_yaml(vqgan_yaml(cfg)))
    assert found == cfg


@pytest.mark.parametrize(
    "layout, changes, word",
    [
        ("meta", dict(norm_eps=1e-6), "norm_eps"), ("hf", dict(norm_eps=1e-6), "norm_eps"),
        ("hf", dict(qk_norm=False), "QK-norm"), ("hf", dict(window=4), "window"),
        ("meta", dict(n_groups=16), "n_groups"), ("meta", dict(mid_attention=False), "attention"),
    ],
)  # fmt: skip
def test_what_the_others_would_compute_otherwise_is_refused(layout, changes, word):
    inside = {field.name for field in dataclasses.fields(ModelConfig)}
    with pytest.raises(ValueError, match=word):
        if changes.keys() <= inside:
            check_exportable(dataclasses.replace(ModelConfig(), **changes), layout)
        else:
            check_vqgan(dataclasses.replace(RELEASED_VQGAN, **changes), layout)


@pytest.mark.parametrize("changes", [dict(hidden_act="gelu"), dict(rope_scaling=dict(type="linear", factor=2.0))])
def test_configurations_that_our_model_does_not_compute_are_refused(changes):
    with pytest.raises(ValueError, match="not Chameleon's"):
        model_from_hf({"model_type": "chameleon"} | changes)


def test_the_resolution_may_have_a_comment_after_it():
    assert resolution_of_yaml("model:\n    ddconfig:\n      resolution: 512  # px\n      ch: 128") == 512


# ---------------------------------------------------------------------------------------------------------------------
# The text tokenizer's file


def test_a_tokenizers_file_comes_back_and_means_the_same():
    content = to_json(TOKENIZER)
    theirs = tokenizer_to_hf(content, VOCAB)
    assert theirs["model"]["vocab"]["<image>"] == VOCAB.eot + 1 and tokenizer_from_hf(theirs) == content


def released_json() -> dict:
    """Return a file in the form of the release: no note of ours, merges as strings, text tokens in another order."""
    vocab = Vocab()
    content = to_json(TextTokenizer([(b"a", b" "), (b"t", b"a")], vocab))
    del content["model"][NOTE]
    names = content["model"]["vocab"]
    text = [name for name, token in names.items() if token >= vocab.first_text]
    for name, token in zip(text, reversed([names[name] for name in text]), strict=True):
        names[name] = token
    names["<sentinel:0>"] = vocab.size - 1
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["added_tokens"].append(content["added_tokens"][0] | {"id": vocab.size - 1, "content": "<sentinel:0>"})
    return content


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_the_released_tokenizers_file_loads(layout):
    content = released_json()
    if layout == "hf":
        assert tokenizer_to_hf(content, Vocab())["model"]["vocab"]["<image>"] == 8_711
        content = tokenizer_from_hf(tokenizer_to_hf(content, Vocab()))
        assert content == released_json()
    tokenizer = from_json(content)
    vocab = tokenizer.vocab
    assert vocab == Vocab() and (vocab.boi, vocab.eoi, vocab.eot) == (8_197, 8_196, 8_710)
    names = content["model"]["vocab"]
    for code in (0, 9, 53, 8_191):
        assert names[Vocab.code_to_name(code)] == vocab.code_to_token(code) == code + 4
        assert vocab.token_to_code(names[Vocab.code_to_name(code)]) == code
    assert tokenizer.decode(tokenizer.encode("taa <s> IMGIMGFDZ")) == "taa <s> IMGIMGFDZ"
    assert all(vocab.is_text(token) for token in tokenizer.encode("<s> IMGIMGFDZ <sentinel:0>"))
    assert tokenizer.encode("ta ") == [names["ta"], names["Ġ"]]
