"""Our own layout with int8 weights and with what sampling needs: there and back, and a sentence for what is damaged."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from model_folders import SHAPES, edit_json, edit_safetensors
from safetensors.torch import load_file
from tiny import nano_folder, released_model, tiny_config, tiny_model, tiny_run

from nanochameleon.config import DataConfig, SamplingParams, TrainConfig
from nanochameleon.convert import Args, convert
from nanochameleon.documents import Text
from nanochameleon.errors import UserError
from nanochameleon.generation.prompts import resolve_mode
from nanochameleon.generation.quantize import QuantizedLinear, quantize, quantize_
from nanochameleon.training.run import CONFIG, config_to_json
from nanochameleon.weights.model_folder import open_model, open_model_files


@pytest.fixture(scope="module")
def int8(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("int8")
    return convert(
        Args(nano_folder(place / "start", released_model(**SHAPES[1])), place / "int8", "nano", dtype="int8")
    )


@pytest.mark.parametrize(("shape", "dtype"), [(SHAPES[0], torch.float32), (SHAPES[1], torch.bfloat16)])
def test_the_numbers_are_those_of_quantizing_a_loaded_model(tmp_path, shape, dtype):
    start = nano_folder(tmp_path / "start", released_model(5, dtype, **shape))
    stored = convert(Args(start, tmp_path / "int8", "nano", dtype="int8"))
    whole, ours = open_model(start, "cpu").model, open_model(stored, "cpu").model
    assert all(x.dtype == torch.float32 for x in ours.parameters())
    again, layers = dict(quantize_(ours).named_modules()), quantize_(open_model(start, "cpu").model).named_modules()
    for name, layer in layers:
        if isinstance(layer, QuantizedLinear):
            assert torch.equal(again[name].weight, layer.weight), name
            torch.testing.assert_close(again[name].scale, layer.scale, rtol=1e-6, atol=0)
    norms = [name for name in whole.state_dict() if "norm" in name or "embeddings" in name]
    found = open_model(stored, "cpu").model.state_dict()
    assert norms and all(torch.equal(found[n], whole.state_dict()[n].bfloat16().float()) for n in norms)


def test_images_are_read_and_drawn_from_int8_as_well(int8):
    whole, ours = (open_model_files(folder).tokenizers.vq_state() for folder in (int8.parent / "start", int8))
    assert whole.keys() == ours.keys()
    for name, x in whole.items():
        row = x.abs().flatten(1).amax(1) if x.ndim > 1 else x.abs()
        room = (row / 127 * 0.501).clamp(min=1e-9) if "embedding" not in name and x.ndim > 1 else row / 256
        assert ((ours[name] - x).abs() <= room.view(-1, *[1] * (x.ndim - 1))).all(), name


def test_a_file_is_a_third_as_large_and_holds_a_scale_for_each_row(int8):
    stored = load_file(int8 / "model.safetensors") | load_file(int8 / "vqgan.safetensors")
    matrices = {name for name, x in stored.items() if x.dtype == torch.int8}
    assert {"output.weight", "layers.0.attention.wq.weight", "encoder.conv_in.weight"} <= matrices
    for name in matrices:
        assert stored[name.removesuffix("weight") + "scale"].shape == stored[name].shape[:1]
    assert {x.dtype for name, x in stored.items() if name.endswith("norm.bias")} == {torch.bfloat16}
    size, before = ((p / "vqgan.safetensors").stat().st_size for p in (int8, int8.parent / "start"))
    assert size < before / 2.5


@pytest.mark.parametrize("chain", [["hf"], ["meta"], ["hf", "meta"], ["nano"]], ids=str)
def test_a_chain_to_other_layouts_and_back_keeps_the_integers(int8, tmp_path, chain):
    at = int8
    for i, to in enumerate(chain):
        at = convert(Args(at, tmp_path / str(i), to))
    first, other = open_model_files(int8), open_model_files(at)
    for one, two in ((first.weights, other.weights), (first.vq, other.vq)):
        assert all(
            torch.equal(one.get(name), two.get(name)) and two.get(name).dtype == torch.float32 for name in one.meta
        )
    again = load_file(convert(Args(at, tmp_path / "again", "nano", dtype="int8")) / "model.safetensors")
    for name, x in load_file(int8 / "model.safetensors").items():
        if x.dtype == torch.int8:
            assert torch.equal(again[name], x), name
        else:
            torch.testing.assert_close(again[name], x, rtol=1e-6, atol=0)


def test_int8_is_of_our_own_layout(int8, tmp_path):
    for to in ("hf", "meta"):
        with pytest.raises(UserError, match="with int8 weights: use --to nano"):
            convert(Args(int8, tmp_path / to, to, dtype="int8"))


SCALE = "layers.0.attention.wq.scale"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.pop(SCALE), f"layers.0.attention.wq.weight is int8 and lacks its scales, {SCALE}"),
        (lambda x: x.update({SCALE: x[SCALE][:-1].clone()}), f"{SCALE} is float32 (23,), not float32 (24,)"),
        (lambda x: x.update({SCALE: x[SCALE].half()}), f"{SCALE} is float16 (24,), not float32 (24,)"),
        (lambda x: x.update({SCALE: x[SCALE].to(torch.int8)}), f"{SCALE} is int8 (24,), not float32 (24,)"),
        (lambda x: x.update({SCALE: x[SCALE] * torch.nan}), "not finite: 576 of 576 values of layers.0.attention.wq"),
        (lambda x: x.update({"norm.scale": torch.ones(24)}), "unexpected tensor, norm.scale"),
        (lambda x: x.update({"output.weight": x["output.weight"].short()}), "output.weight in"),
        (lambda x: x.update({"output.weight": x["output.weight"][:, :-1].clone()}), "output.weight is (280, 23)"),
    ],
)
def test_damage_is_one_sentence(int8, tmp_path, change, words):

    folder = Path(shutil.copytree(int8, tmp_path / "damaged"))
    edit_safetensors(folder / "model.safetensors", change)
    with pytest.raises(UserError) as error:
        open_model(folder, "cpu")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_other_layouts_hold_no_int8(int8, tmp_path):
    folder = convert(Args(int8, tmp_path / "hf", "hf"))
    q, _ = quantize(load_file(folder / "model.safetensors")["lm_head.weight"])
    edit_safetensors(folder / "model.safetensors", lambda x: x.update({"lm_head.weight": q}))
    with pytest.raises(UserError, match="of type int8: float32, float16, bfloat16 and float64 are read"):
        open_model(folder, "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# What sampling needs


def test_a_converted_run_is_sampled_as_the_run(tmp_path):
    run, sample = tiny_run(tmp_path / "run", source="shapes"), SamplingParams(image_temperature=0.5, guidance_scale=1.0)
    train = TrainConfig(assistant_only_loss=True)
    cfg = tiny_config(model=tiny_model().cfg, data=DataConfig("shapes"), sample=sample, train=train)
    (run / CONFIG).write_text(config_to_json(cfg))
    nano = convert(Args(run, tmp_path / "nano", "nano", dtype="int8"))
    again = convert(Args(nano, tmp_path / "again", "nano"))
    for found in (open_model(nano, "cpu").cfg, open_model(again, "cpu").cfg):
        assert (found.sample, found.data.source, found.train.assistant_only_loss) == (sample, "shapes", True)
        assert resolve_mode("auto", [Text("a red star")], found)[0] == "chat"
    made = open_model_files(again).usage.made
    assert made[0].startswith("train.py tiny, ") and "commit" in made[1] and "torch" in made[1]


def test_a_folder_from_before_opens_with_the_defaults(int8, tmp_path):

    folder = Path(shutil.copytree(int8, tmp_path / "older"))
    edit_json(folder / CONFIG, lambda content: content.pop("usage"))
    cfg = open_model(folder, "cpu").cfg
    assert (cfg.sample, cfg.data.source, cfg.train.assistant_only_loss) == (SamplingParams(), "folder", False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(sample=dataclasses.asdict(SamplingParams()) | {"top_p": 2.0}), "sample.top_p must be above 0"),
        (dict(source="films"), "source is 'films'"),
        (dict(chats="yes"), "chats is 'yes'"),
        (dict(made=[1]), "made is 1"),
        (dict(colour="red"), "Usage has no field 'colour'"),
    ],
)
def test_a_wrong_field_is_named(int8, tmp_path, change, words):

    folder = Path(shutil.copytree(int8, tmp_path / "wrong"))
    edit_json(folder / CONFIG, lambda content: content["usage"].update(change))
    with pytest.raises(UserError) as error:
        open_model(folder, "cpu")
    assert words in str(error.value) and "\n" not in str(error.value)
