"""A model opens by its path in any layout, and a damaged folder is one short sentence."""

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import SHAPES, assert_same, edit_json, edit_pth, edit_safetensors, make_folders
from safetensors.torch import load_file
from tiny import TOKENIZER, nano_folder, released_model, tiny_config

from nanochameleon.config import TrainConfig
from nanochameleon.convert import Args, convert
from nanochameleon.errors import UserError
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.training.init_from import resolve_init
from nanochameleon.weights.model_folder import open_model, open_model_files
from nanochameleon.weights.pth_files import Pth
from nanochameleon.weights.tensor_files import write_safetensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("layouts"))


def test_our_safetensors_are_those_of_the_library(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b.c": torch.tensor(2.0), "empty": torch.zeros(0, 4), "h": torch.ones(7).half()}
    write_safetensors(tmp_path / "x.safetensors", {k: x.to("meta") for k, x in tensors.items()}, tensors.__getitem__)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[k], tensors[k]) for k in found)


def test_every_layout_opens_for_sampling_with_the_same_numbers(folders):
    ids = torch.randint(20, 280, (1, 9))
    runs = [open_model(folders[name], "cpu") for name in ("nano", "hf", "meta")]
    first = runs[0].model(ids)
    for run in runs:
        assert torch.equal(run.model(ids), first) and run.tokenizer.encode("a red") == TOKENIZER.encode("a red")
    assert open_model(folders["meta"] / "models" / "nano", "cpu", "bf16").model.output.weight.dtype == torch.bfloat16
    assert open_model(folders["run"], "cpu", "bf16").model.output.weight.dtype == torch.bfloat16


def test_opening_makes_no_random_weights(folders):
    before = torch.get_rng_state()
    for folder in folders.values():
        parts = open_model_files(folder)
        assert VQGAN.from_state(parts.vqgan, parts.tokenizers.vq_state()).quantize.sums.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), before)


def test_metas_layout_opens_by_any_path_to_it(folders, tmp_path, monkeypatch):
    for place, path in ((".", "."), ("models", "nano"), ("models/nano", "."), ("tokenizer", "../models/nano")):
        monkeypatch.chdir(folders["meta"] / place)
        assert_same(Path(path), folders["nano"])


def test_metas_groups_are_those_of_its_vectors(tmp_path):
    """Two shards whose vectors were trained apart, though the note says one group."""
    meta = convert(
        Args(nano_folder(tmp_path / "nano", released_model(**SHAPES[0])), tmp_path / "meta", "meta", shards=2)
    )
    edit_pth(meta / "models/nano/consolidated.01.pth", lambda c: c["layers.0.attention.q_normalization.weight"].add_(1))
    parts = open_model_files(meta)
    assert parts.model.qk_norm_groups == 2 and parts.weights.get("layers.0.attention.q_norm.weight").shape == (2, 8)
    open_model(meta, "cpu")


def test_what_a_file_says_counts_more_than_our_note_in_it(folders, tmp_path):
    hf = convert(Args(folders["nano"], tmp_path / "hf", "hf"))
    edit_json(hf / "config.json", lambda c: c.update(max_position_embeddings=77))
    edit_json(hf / "config.json", lambda c: c["nanochameleon"].update(max_seq_len=5, qk_norm_groups=1, rope_theta=2.0))
    assert open_model_files(hf).model == dataclasses.replace(open_model_files(folders["nano"]).model, max_seq_len=77)
    meta = convert(Args(folders["nano"], tmp_path / "meta", "meta"))
    edit_json(meta / "models/nano/params.json", lambda c: c["nanochameleon"].update(multiple_of=3, rope_theta=2.0))
    assert open_model_files(meta).model == open_model_files(folders["nano"]).model


def test_a_byte_order_mark_and_null_sections_are_read(folders, tmp_path):
    shutil.copytree(folders["hf"], tmp_path / "hf")
    set_config(rope_scaling=None, nanochameleon=None)(tmp_path / "hf")
    for name in ("config.json", "tokenizer.json"):
        path = tmp_path / "hf" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    one, other = (open_model(place, "cpu").model.state_dict() for place in (tmp_path / "hf", folders["hf"]))
    assert all(torch.equal(one[name], other[name]) for name in other)


# ---------------------------------------------------------------------------------------------------------------------
# The image decoder in a file of its own


def without_decoder(folders, place: Path) -> Path:
    shutil.copytree(folders["hf"], place)
    (place / "vqgan_decoder.safetensors").unlink()
    return place


def test_another_file_gives_the_image_decoder_that_transformers_drops(folders, tmp_path):
    """The decoder comes back bit for bit in Meta's layout, and a run can start from such a model."""
    hf = without_decoder(folders, tmp_path / "hf")
    for i, file in enumerate((folders["meta"] / "tokenizer/vqgan.ckpt", folders["hf"] / "vqgan_decoder.safetensors")):
        meta = convert(Args(hf, tmp_path / str(i), "meta", vqgan=file))
        for name, key in (("models/nano/consolidated.00.pth", None), ("tokenizer/vqgan.ckpt", "state_dict")):
            one, other = (torch.load(place / name) for place in (meta, folders["meta"]))
            one, other = (content[key] if key else content for content in (one, other))
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert open_model(hf, "cpu", vqgan=file).image_tokenizer.can_draw
    cfg = tiny_config(init_from=hf, init_vqgan=file, train=TrainConfig(seq_len=64), out=tmp_path / "run")
    assert resolve_init(cfg)[1].model.has_decoder


def test_an_image_decoder_of_another_model_is_refused(folders, tmp_path):
    hf, other = without_decoder(folders, tmp_path / "hf"), tmp_path / "vqgan.ckpt"
    state = torch.load(folders["meta"] / "tokenizer/vqgan.ckpt")["state_dict"]
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"] + 1
    torch.save({"state_dict": state}, other)
    with pytest.raises(UserError, match=r"vqgan.ckpt does not belong to .*hf: its quantize.embedding.weight"):
        open_model_files(hf, other)
    torch.save({name: x for name, x in state.items() if not name.startswith("decoder.")}, other)
    with pytest.raises(UserError, match="holds no image decoder"):
        open_model_files(hf, other)
    torch.save({"decoder.conv_in.weight": torch.ones(2)}, other)
    with pytest.raises(UserError, match=r"vqgan.ckpt lacks decoder"):
        open_model_files(hf, other)


# ---------------------------------------------------------------------------------------------------------------------
# What no model has


def set_config(**changes):
    return lambda p: edit_json(p / "config.json", lambda c: c.update(changes))


def set_part(part: str, **changes):
    return lambda p: edit_json(p / "config.json", lambda c: c[part].update(changes))


def set_params(**changes):
    return lambda p: edit_json(p / "models/nano/params.json", lambda c: c["model"].update(changes))


def set_tensor(name: str, change):
    return lambda p: edit_safetensors(p / "model.safetensors", lambda c: c.update({name: change(c[name])}))


def rename(prefix: str):
    def change(content: dict) -> None:
        for name in list(content):
            content[prefix + name] = content.pop(name)

    return lambda p: edit_safetensors(p / "model.safetensors", change)


def with_nan(x: torch.Tensor) -> torch.Tensor:
    return x.flatten().index_fill(0, torch.tensor([1, 3]), torch.nan).view(x.shape)


def edit_header(change):
    """Apply `change` to the text of the header."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        text = change(data[8:end].decode().rstrip()).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return damage


def set_pth(change):
    return lambda p: edit_pth(p / "models/nano/consolidated.00.pth", change)


class Hog:
    def __reduce__(self):
        return bytearray, (3 * 10**9,)


W2, HUGE = "layers.0.feed_forward.w2.weight", 10**7
UNFIT = {
    "layers without end": ("nano", set_part("model", n_layers=HUGE), "n_layers is 10000000, and its files hold"),
    "layers of transformers": ("hf", set_config(num_hidden_layers=HUGE), "n_layers is 10000000"),
    "layers of Meta": ("meta", set_params(n_layers=HUGE), "n_layers is 10000000"),
    "blocks without end": ("nano", set_part("vqgan", n_res_blocks=HUGE), "vqgan.n_res_blocks is 10000000"),
    "ids without end": ("nano", set_part("model", vocab_size=2**64), "model.vocab_size must be at most"),
    "levels without end": ("nano", set_part("vqgan", ch_mult=[1] * 99), "ch_mult must have"),
    "no number": ("nano", set_part("model", norm_eps=float("nan")), "model.norm_eps must be above 0 and at most 1"),
    "a base below 0": ("hf", set_config(rope_parameters=None, rope_theta=-5.0), "model.rope_theta must be above 0"),
    "an endless base": ("meta", set_params(rope_theta=float("inf")), "model.rope_theta must be above 0"),
    "an endless context": ("nano", set_part("model", max_seq_len=10**30), "model.max_seq_len must be from 1 to"),
    "dropout of all": ("nano", set_part("model", dropout=float("nan")), "model.dropout must be at least 0"),
    "groups below 0": ("nano", set_part("vqgan", n_groups=-1), "vqgan.n_groups must be at least 1"),
    "a field less": (
        "nano", lambda p: edit_json(p / "config.json", lambda c: c["model"].pop("rope_theta")),
        "ModelConfig lacks 'rope_theta'",
    ),
    "an image tokenizer's field less": (
        "nano", lambda p: edit_json(p / "config.json", lambda c: c["vqgan"].pop("window")), "VQGANConfig lacks 'window'"
    ),
    "a word for a number": ("hf", set_config(rms_norm_eps="x" * 9_999), "rms_norm_eps is 'xxx"),
    "null for a number": ("hf", set_config(hidden_size=None), "hidden_size is None"),
    "a list for an object": ("hf", set_config(vq_config=[1]), r"vq_config is \[1\]"),
    "a side of a billion": ("hf", set_config(vq_config={"resolution": 10**9}), "vqgan.resolution must be from 1 to"),
    "a word in the note": (
        "meta", lambda p: edit_json(
            p / "models/nano/params.json", lambda c: c["nanochameleon"].update(max_seq_len="x")
        ), "max_seq_len is 'x'",
    ),
    "a run's number": ("run", set_part("model", norm_eps=-1.0), "model.norm_eps must be above 0"),
    "a run's layers": ("run", set_part("model", n_layers=HUGE), "n_layers is 10000000"),
    "whole numbers for weights": ("nano", set_tensor("output.weight", torch.Tensor.int), "is of type I32: float32"),
    "whole numbers inside": ("hf", set_tensor("lm_head.weight", torch.Tensor.bool), "is of type BOOL: float32"),
    "8 bits": (
        "nano", set_tensor(W2, lambda x: x.to(torch.float8_e4m3fn)), f"{W2} in .* is of type F8_E4M3: float32, float16"
    ),
    "whole numbers of Meta": ("meta", set_pth(lambda c: c.update({W2: c[W2].char()})), "is of type int8: float32"),
    "no numbers": ("nano", set_tensor(W2, with_nan), f"not finite: 2 of .* values of {W2}"),
    "no numbers of Meta": ("meta", set_pth(lambda c: c[W2].fill_(torch.inf)), "not finite"),
    "a name twice": (
        "nano", edit_header(lambda text: text[:-1] + ", " + text[text.index('"norm.weight"') :].split("}")[0] + "}}"),
        "describes norm.weight twice",
    ),
    "a module of torch.compile": ("nano", rename("_orig_mod."), "'_orig_mod.' in its tensors' names"),
    "a module of DDP": ("hf", rename("module."), "'module.' in its tensors' names"),
    "control characters": ("nano", rename("\x1b]0;PWNED\x07\x1b[2J" + "long" * 99), r"unexpected tensor|lacks"),
    "no image tokenizer": (
        "hf", lambda p: edit_safetensors(
            p / "model.safetensors", lambda c: [c.pop(name) for name in list(c) if name.startswith("model.vqmodel.")]
        ), "it has no image tokenizer",
    ),
    "memory by a number": ("meta", set_pth(lambda c: c.update(x=Hog())), "more than tensors .* bytearray"),
    "one value for many": (
        "meta", set_pth(lambda c: c.update({W2: torch.ones(1).expand(10**6, 10**6)})), "larger than the file"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", UNFIT)
def test_what_no_model_has_is_one_short_sentence(how, folders, tmp_path):
    layout, damage, words = UNFIT[how]
    shutil.copytree(folders[layout], tmp_path / "it")
    damage(tmp_path / "it")
    with pytest.raises(UserError, match=words) as error:
        open_model(tmp_path / "it", "cpu")
    said = str(error.value).replace(str(tmp_path), "")
    assert len(said) < 300 and said.isprintable()


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files


@settings(max_examples=60)
@given(st.integers(0, 10**9), st.sampled_from(["flip", "cut", "copy"]))
def test_a_damaged_pth_is_a_sentence_or_the_same_names(folders, tmp_path_factory, seed, how):
    data = bytearray((folders["meta"] / "tokenizer/vqgan.ckpt").read_bytes())
    chance, end = random.Random(seed), 30_000  # the pickle is in front
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(end) if chance.random() < 0.7 else chance.randrange(len(data))
        if how == "flip":
            data[at] = chance.randrange(256)
        elif how == "cut":
            del data[at : at + chance.randint(1, 9)]
        else:
            data[at : at + 4] = data[chance.randrange(end) :][:4]
    path = tmp_path_factory.mktemp("pth") / "x.pth"
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        assert all(isinstance(x, torch.Tensor) for x in Pth(path, "state_dict").tensors.values())


@pytest.mark.parametrize("what", ["", "config.json", "model.safetensors"])
def test_what_may_not_be_read_is_called_so(what, folders, tmp_path, monkeypatch):
    shutil.copytree(folders["nano"], tmp_path / "it")
    shut = str(tmp_path / "it" / what)

    def guarded(function):
        def call(path, *rest, **more):
            if str(path).startswith(shut):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *rest, **more)

        return call

    monkeypatch.setattr("os.stat" if what == "" else "builtins.open", guarded(os.stat if what == "" else open))
    monkeypatch.setattr("io.open", guarded(io.open))
    with pytest.raises(UserError, match=f"cannot read {shut}.*: Permission denied$"):
        open_model_files(tmp_path / "it")


def test_two_tensors_of_one_name_and_a_false_index_are_refused(folders, tmp_path):
    split = convert(Args(folders["nano"], tmp_path / "split", "hf", file_gb=1e-5))
    index = split / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = list(content["weight_map"].values())
    name, file = next((n, f) for n, f in content["weight_map"].items() if files.count(f) > 1)
    other = next(f for f in files if f != file)
    index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {name: other}}))
    with pytest.raises(UserError, match="which it does not"):
        open_model_files(split)
    edit_safetensors(split / other, lambda c: c.update({name: torch.ones(1)}))
    with pytest.raises(UserError, match=f"{name} is both in"):
        open_model_files(split)
    (split / other).unlink()
    with pytest.raises(UserError, match=f"names {other}, which is missing"):
        open_model_files(split)
