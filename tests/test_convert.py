"""A model's folder in four layouts: chains come back bit for bit, what is broken is named, memory stays small."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import TOKENIZER, nano_folder, released_model, tiny_config, tiny_run

from nanochameleon.config import TrainConfig
from nanochameleon.convert import Args, cli, convert
from nanochameleon.errors import UserError
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.training.init_from import resolve_init
from nanochameleon.weights.model_folder import open_model, open_model_files
from nanochameleon.weights.pth_files import Pth
from nanochameleon.weights.tensor_files import write_safetensors

SHAPES = [  # GQA, groups, norm order, type
    dict(), dict(dim=24, n_heads=4, n_kv_heads=2, qk_norm_groups=2, norm_order="post"),
    dict(dim=32, n_heads=8, qk_norm_groups=4), dict(dim=64, n_heads=16, n_kv_heads=8, qk_norm_groups=8),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One model in the three layouts, and a run."""
    place = tmp_path_factory.mktemp("layouts")
    nano = nano_folder(place / "nano", released_model(**SHAPES[1]))
    for to in ("hf", "meta"):
        convert(Args(nano, place / to, to))
    return {name: place / name for name in ("nano", "hf", "meta")} | {"run": tiny_run(place / "run")}


def same(a: Path, b: Path) -> None:
    first, second = open_model_files(a), open_model_files(b)
    assert (first.model, first.vqgan, first.tokenizer_json) == (second.model, second.vqgan, second.tokenizer_json)
    for one, other in ((first.weights, second.weights), (first.vq, second.vq)):
        assert one.meta.keys() == other.meta.keys()
        for name in one.meta:
            x, y = one.get(name), other.get(name)
            assert x.dtype == y.dtype and torch.equal(x, y), name


@settings(max_examples=12)
@given(
    st.sampled_from(SHAPES), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99),
    st.lists(st.sampled_from([("hf", None), ("nano", None), ("meta", None), ("meta", 8)]), min_size=1, max_size=4),
)  # fmt: skip
def test_any_chain_of_conversions_comes_back_bit_for_bit(tmp_path_factory, shape, dtype, seed, chain):
    place = tmp_path_factory.mktemp("chain")
    start = at = nano_folder(place / "start", released_model(seed, dtype, **shape))
    for i, (to, shards) in enumerate(chain):
        fits = (shape.get("n_kv_heads") or shape.get("n_heads", 2)) % 8 == 0
        at = convert(Args(at, place / str(i), to, shards if fits else None, file_gb=1e-5))
    same(start, at)


def test_a_file_that_transformers_reads_is_the_one_we_started_from(folders, tmp_path):
    """Not only our reading of it: names and bytes of Hugging Face's and Meta's files."""
    back = convert(Args(convert(Args(folders["hf"], tmp_path / "m", "meta")), tmp_path / "h", "hf"))
    for name in ("model.safetensors", "vqgan_decoder.safetensors"):
        assert (back / name).read_bytes() == (folders["hf"] / name).read_bytes()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert json.loads((back / name).read_text()) == json.loads((folders["hf"] / name).read_text())
    one, other = (torch.load(p / "models/nano/consolidated.00.pth") for p in (folders["meta"], tmp_path / "m"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert one["rope.freqs"].shape == (3,) and one["layers.0.attention.q_normalization.weight"].shape == (6,)


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


def test_a_source_without_a_decoder_reads_and_does_not_draw(folders, tmp_path, capsys):
    hf = convert(Args(folders["nano"], tmp_path / "hf", "hf"))
    (hf / "vqgan_decoder.safetensors").unlink()
    nano = convert(Args(hf, tmp_path / "nano", "nano"))
    assert "no image decoder" in capsys.readouterr().err
    run, whole = open_model(nano, "cpu"), open_model(folders["nano"], "cpu")
    image = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8).numpy()
    assert torch.equal(run.image_tokenizer.encode(image), whole.image_tokenizer.encode(image))
    with pytest.raises(UserError, match="no image decoder"):
        run.image_tokenizer.decode(torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(UserError, match=r"no image decoder.*--no-decoder"):
        convert(Args(nano, tmp_path / "meta", "meta"))
    same(convert(Args(nano, tmp_path / "meta", "meta", decoder=False)), nano)
    assert "the image decoder is left out" in capsys.readouterr().err


def without_decoder(folders, place: Path) -> Path:
    shutil.copytree(folders["hf"], place)
    (place / "vqgan_decoder.safetensors").unlink()
    return place


def test_another_file_gives_the_image_decoder_that_transformers_drops(folders, tmp_path):
    """To Meta's layout and back to its very bits, and as a run begins."""
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
    with pytest.raises(UserError, match=r"vqgan.ckpt misses decoder"):
        open_model_files(hf, other)


def test_metas_layout_opens_by_any_path_to_it(folders, tmp_path, monkeypatch):
    for place, path in ((".", "."), ("models", "nano"), ("models/nano", "."), ("tokenizer", "../models/nano")):
        monkeypatch.chdir(folders["meta"] / place)
        same(Path(path), folders["nano"])


def test_metas_groups_are_those_of_its_vectors(tmp_path):
    """Two shards whose vectors were trained apart, though the note says one group."""
    meta = convert(Args(nano_folder(tmp_path / "nano", released_model(**SHAPES[0])), tmp_path / "meta", "meta", 2))
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


def with_tokenizer(folders, place: Path, change) -> Path:
    shutil.copytree(folders["nano"], place)
    edit_json(place / "text_tokenizer.json", change)
    return place


def test_a_post_processor_of_ones_own_survives_the_chain(folders, tmp_path):
    own = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": []}
    own["special_tokens"] = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    for i, change in enumerate((lambda c: c.update(post_processor=own), lambda c: c.pop("post_processor"))):
        start = with_tokenizer(folders, tmp_path / f"start{i}", change)
        back = convert(Args(convert(Args(start, tmp_path / f"hf{i}", "hf")), tmp_path / f"back{i}", "nano"))
        kept = json.loads((back / "text_tokenizer.json").read_text())["post_processor"]
        assert kept == (None if i else own)


def test_a_tokenizer_without_a_name_for_image_is_refused_before_a_weight_is_written(folders, tmp_path, monkeypatch):
    def change(content):
        name = TOKENIZER.vocab.name(TOKENIZER.vocab.eot + 1)
        del content["model"]["vocab"][name]
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != name]

    start = with_tokenizer(folders, tmp_path / "start", change)
    monkeypatch.setattr("nanochameleon.convert.write_sharded", lambda *_: pytest.fail("weights were written"))
    with pytest.raises(UserError, match="no reserved name"):
        convert(Args(start, tmp_path / "hf", "hf"))


def test_opening_makes_no_random_weights(folders):
    before = torch.get_rng_state()
    for folder in folders.values():
        parts = open_model_files(folder)
        assert VQGAN.from_state(parts.vqgan, parts.tokenizers.vq_state()).quantize.sums.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), before)


def test_a_conversion_leaves_one_that_is_running_alone(folders, tmp_path):
    """Another process's aside folder stays, a dead one's goes, and who comes second to the name says so."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    running, left = tmp_path / f".tmp-new-{os.getppid()}", tmp_path / f".tmp-new-{dead.pid}"
    running.mkdir()
    left.mkdir()
    convert(Args(folders["nano"], tmp_path / "new", "nano"))
    assert set(tmp_path.iterdir()) == {running, tmp_path / "new"}
    same(tmp_path / "new", folders["nano"])


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, by name; then nothing is left


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {Path('boom').absolute()}",)


def edit_pth(path: Path, change) -> None:
    content = torch.load(path)
    change(content)
    torch.save(content, path)


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_safetensors(path: Path, change) -> None:
    content = load_file(path)
    change(content)
    save_file(content, path)


@pytest.mark.parametrize(
    "layout, file, damage, words",
    [
        ("meta", "models/nano/consolidated.00.pth", lambda p: p.with_name("consolidated.pth").touch(), ["has both"]),
        (
            "meta", "models/nano/consolidated.00.pth",
            lambda p: edit_json(p.with_name("params.json"), lambda c: c["nanochameleon"].update(qk_norm_groups=5)),
            ["groups"],
        ),
        (
            "meta", "models/nano/params.json", lambda p: edit_json(p, lambda c: c["model"].update(multiple_of=0)),
            ["model.multiple_of must be at least 1, not 0"],
        ),
        (
            "meta", "models/nano/params.json",
            lambda p: edit_json(p, lambda c: c["model"].update(ffn_dim_multiplier=1e308)), ["no model has the sizes"],
        ),
        (
            "meta", "models/nano/params.json",
            lambda p: edit_json(p, lambda c: c["model"].update(ffn_dim_multiplier=1e99)), ["cannot be read as"],
        ),
        ("hf", "config.json", lambda p: edit_json(p, lambda c: c.update(intermediate_size=0)), ["intermediate_size 0"]),
        ("hf", "config.json", lambda p: p.write_text("[" * 200_000), ["config.json is damaged"]),
        ("nano", "config.json", lambda p: edit_json(p, lambda c: c["model"].update(multiple_of=0)), ["multiple_of"]),
        ("nano", "config.json", lambda p: edit_json(p, lambda c: c["model"].update(n_kv_heads=0)), ["n_kv_heads"]),
        ("meta", "models/nano/consolidated.01.pth", lambda p: p.unlink(), ["1 of 2 shards"]),
        ("meta", "models/nano/consolidated.00.pth", lambda p: p.unlink(), ["not all from 00"]),
        ("meta", "models/nano/consolidated.01.pth", lambda p: p.write_bytes(pickle.dumps(Bomb())), ["cannot read"]),
        ("meta", "models/nano/consolidated.01.pth", lambda p: torch.save({"x": Bomb()}, p), ["refused"]),
        ("meta", "models/nano/consolidated.01.pth", lambda p: p.write_bytes(p.read_bytes()[:999]), ["consolidated.01"]),
        (
            "meta", "models/nano/consolidated.01.pth", lambda p: edit_pth(p, lambda c: c.pop("norm.weight")),
            ["consolidated.01.pth misses norm.weight"],
        ),
        (
            "meta", "models/nano/consolidated.01.pth", lambda p: edit_pth(p, lambda c: c.update(x=torch.ones(2))),
            ["has left over x"],
        ),
        (
            "meta", "models/nano/consolidated.00.pth",
            lambda p: edit_pth(p, lambda c: c.update({"norm.weight": torch.ones(2)})), ["norm.weight is (2,)", "(24,)"],
        ),
        ("meta", "tokenizer/vqgan.yaml", lambda p: p.write_text("model:"), ["resolution"]),
        ("meta", "tokenizer/text_tokenizer.json", lambda p: p.unlink(), ["text_tokenizer.json"]),
        ("meta", "models/nano/params.json", lambda p: p.write_text('{"model": {"dim": 24}}'), ["lacks"]),
        (
            "hf", "model.safetensors", lambda p: edit_safetensors(p, lambda c: c.update({"model.x": torch.ones(2)})),
            ["has left over model.x"],
        ),
        (
            "hf", "model.safetensors",
            lambda p: edit_safetensors(p, lambda c: c.pop("model.vqmodel.quant_conv.bias")), ["misses quant_conv.bias"],
        ),
        ("hf", "vqgan_decoder.safetensors", lambda p: p.write_bytes(b"x"), ["vqgan_decoder.safetensors"]),
        ("hf", "model.safetensors", lambda p: p.unlink(), ["neither model.safetensors nor"]),
        ("hf", "config.json", lambda p: p.write_text("{"), ["config.json is damaged"]),
        ("nano", "config.json", lambda p: p.write_text('{"layout": "nanochameleon"}'), ["lacks 'model'"]),
        ("nano", "vqgan.safetensors", lambda p: p.unlink(), ["vqgan.safetensors"]),
    ],
)  # fmt: skip
def test_what_is_broken_is_named(layout, file, damage, words, tmp_path, monkeypatch, folders):
    monkeypatch.chdir(tmp_path)
    source = convert(Args(folders["nano"], tmp_path / "source", layout))
    damage(source / file)
    with pytest.raises(UserError) as error:
        convert(Args(source, tmp_path / "target", "nano"))
    assert all(word in str(error.value) for word in words), error.value
    assert [path.name for path in tmp_path.iterdir()] == ["source"]  # no target, no rest of one, no boom


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["{place}", "new", "--to", "hf"], "not a run, or a model"), (["nowhere", "new", "--to", "hf"], "not exist"),
        (["{nano}", "{hf}", "--to", "hf"], "exists"), (["{nano}", "new", "--to", "meta", "--shards", "3"], "3 shards"),
        (["{nano}", "new", "--to", "meta", "--shards", "1"], "2 groups"), (["{run}", "new", "--to", "hf"], "n_groups"),
        (["{nano}", "new", "--to", "tar"], "tar"), (["{nano}", "new", "--to", "meta", "--shards", "-2"], "--shards"),
        (["{nano}", "new", "--to", "nano", "--file-gb", "inf"], "--file-gb"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence(arguments, word, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli([a.format(place=tmp_path, **folders) for a in arguments])
    assert end.value.code == 2 and word in capsys.readouterr().err and list(tmp_path.iterdir()) == []


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
    """The header's text goes through `change`, which keeps its length."""

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
    "control characters": ("nano", rename("\x1b]0;PWNED\x07\x1b[2J" + "long" * 99), r"has left over|misses"),
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


def test_a_byte_order_mark_and_null_sections_are_read(folders, tmp_path):
    shutil.copytree(folders["hf"], tmp_path / "hf")
    set_config(rope_scaling=None, nanochameleon=None)(tmp_path / "hf")
    for name in ("config.json", "tokenizer.json"):
        path = tmp_path / "hf" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    one, other = (open_model(place, "cpu").model.state_dict() for place in (tmp_path / "hf", folders["hf"]))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_full_disk_is_called_so(folders, tmp_path):
    """By a limit on the size of files, which fails like a full disk in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*meta: .*File too large"):
            convert(Args(folders["nano"], tmp_path / "meta", "meta"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


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


def test_two_tensors_of_one_name_and_an_index_that_lies_are_refused(folders, tmp_path):
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


# ---------------------------------------------------------------------------------------------------------------------
# Killed, and large

LARGE = """
    import sys
    from pathlib import Path
    from nanochameleon import convert
    from nanochameleon.weights import tensor_files

    source, target, small, to, shards, hog = sys.argv[1:]
    convert.convert(convert.Args(Path(small), Path(target + "-small"), to, 2 if to == "meta" else None))
    tensor_files.REMAP = 2**22
    if hog == "hog":
        kept, read = [], tensor_files.Safetensors.__getitem__
        tensor_files.Safetensors.__getitem__ = lambda self, name: kept.append(read(self, name).clone()) or kept[-1]

    def status(field):
        return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(field + ":"))

    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew: ru_maxrss is at first the parent's
    before = status("VmRSS")
    convert.convert(convert.Args(Path(source), Path(target), to, int(shards) or None))
    print(status("VmHWM") - before)
"""


def memory(source: Path, target: Path, small: Path, to: str, shards: int, hog: str = "") -> int:
    """Bytes that a conversion holds at its peak beyond those of a process that has done a small one."""
    command = [sys.executable, "-c", textwrap.dedent(LARGE), *map(str, (source, target, small, to, shards, hog))]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="a process's own peak is read from Linux's /proc"
)
def test_memory_stays_below_one_and_a_half_shards(tmp_path, folders):
    """A model of about 100 MB in one piece and in four; and the measurement sees a conversion that keeps all."""
    torch.manual_seed(0)
    model = released_model(dim=512, n_layers=8, n_heads=8, multiple_of=256)
    size = sum(p.nbytes for p in model.parameters())
    start = nano_folder(tmp_path / "nano", model)
    del model
    assert size > 90e6
    for source, to, shards in (("nano", "hf", 0), ("hf", "meta1", 1), ("meta1", "meta4", 4), ("meta4", "nano2", 0)):
        layout = to.rstrip("0123456789")
        used = memory(tmp_path / source, tmp_path / to, folders["nano"], layout, shards)
        bound = 1.5 * size / shards if shards else 0.3 * size  # a file that is written as it comes is never held
        assert used < bound, f"{source} to {to}: {used / 1e6:.0f} MB of {size / 1e6:.0f}"
    same(start, tmp_path / "nano2")
    assert memory(tmp_path / "nano", tmp_path / "hog", folders["nano"], "hf", 0, "hog") > 0.9 * size


def test_a_killed_conversion_leaves_nothing_that_looks_whole(folders, tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from nanochameleon import convert
        written = convert.write_safetensors
        def slow(path, *rest):
            written(path, *rest)
            print("written", flush=True)
            time.sleep(60)
        convert.write_safetensors = slow
        convert.convert(convert.Args(Path(sys.argv[1]), Path(sys.argv[2]), "nano"))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folders["hf"]), str(tmp_path / "new")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    aside = tmp_path / f".tmp-new-{process.pid}"
    assert list(tmp_path.iterdir()) == [aside]
    with pytest.raises(UserError):
        open_model_files(aside)
    same(convert(Args(folders["hf"], tmp_path / "new", "nano")), folders["nano"])
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
