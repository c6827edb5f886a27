"""Runs that start from another model, in any layout."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import SHAPES_VQGAN, nano_folder, released_model, training_config
from train_helpers import REPORT, SHARE, assert_shape

import train
from nanochameleon.config import EvalConfig, ModelConfig
from nanochameleon.convert import Args, convert
from nanochameleon.data.sources.alignment import CATEGORIES
from nanochameleon.errors import UserError
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.presets import mixed
from nanochameleon.training import checkpoint
from nanochameleon.training.run import CONFIG, read_config
from nanochameleon.weights.model_folder import open_model_files


def test_a_run_starts_with_the_sizes_tokenizers_and_weights_of_another(finished, tmp_path):
    """From a run and from our layout; the context and all sizes are the other's, dropout and steps the new run's."""
    nano = convert(Args(finished, tmp_path / "nano", "nano"))
    cfg = training_config(tmp_path / "more", train=replace(training_config(tmp_path).train, steps=1, save_every=1))
    before = {name: checkpoint.load(finished / name)[0] for name in (".", "image_tokenizer")}
    runs = []
    for source in (finished, nano):
        other = replace(cfg, init_from=source, out=tmp_path / source.name / "more", model=ModelConfig(dropout=0.0))
        train.main(replace(other, optim=replace(cfg.optim, lr=1e-30, weight_decay=0.0)))
        runs.append(other.out)
    for place in runs:
        read = read_config(place)
        assert read.model == replace(read_config(finished).model, dropout=0.0) and read.vqgan == cfg.vqgan
        assert (place / "text_tokenizer.json").read_bytes() == (finished / "text_tokenizer.json").read_bytes()
        kept = checkpoint.load(place / "image_tokenizer")[0]["model"]
        assert all(torch.equal(x, kept[name]) for name, x in before["image_tokenizer"]["model"].items())
        weights = checkpoint.load(place)[0]["weights"]
        for name, x in before["."]["weights"].items():
            torch.testing.assert_close(weights[name], x, rtol=0, atol=1e-6)  # one step of nearly no length
        assert (place / "report.json").is_file()


def other_model(place: Path, layout: str) -> Path:
    """A model with the release's forms, of images as large as the shapes world's, in a layout; its tokenizer's file
    has a name that we have no use for."""
    vqgan = replace(SHAPES_VQGAN, ch=32, n_groups=32, n_codes=8, mid_attention=True)
    nano = nano_folder(place / "nano", released_model(max_seq_len=256), VQGAN(vqgan))
    content = json.loads((nano / "text_tokenizer.json").read_text())
    last = content["model"]["merges"].pop()
    token = content["model"]["vocab"].pop("".join(last))
    content["added_tokens"].append(content["added_tokens"][0] | {"id": token, "content": "<sentinel:0>"})
    (nano / "text_tokenizer.json").write_text(json.dumps(content))
    source = convert(Args(nano, place / layout, layout.split("-")[0]))
    if layout == "hf-encoder":
        (source / "vqgan_decoder.safetensors").unlink()
    return source


@pytest.mark.parametrize("layout", ["hf", "hf-encoder", "meta"])
def test_a_run_starts_from_a_model_in_another_layout_and_resumes_without_it(layout, tmp_path, capsys):
    source, run = other_model(tmp_path, layout), tmp_path / "run"
    parts, few = open_model_files(source), training_config(tmp_path).train
    train_cfg = replace(few, steps=2, save_every=1, seq_len=256)
    cfg = training_config(run, init_from=source, train=train_cfg, stages=mixed(pairs=1.0))
    cfg = replace(cfg, evaluation=EvalConfig(1, 1, 1), model=ModelConfig(dropout=0.0))
    cfg = replace(cfg, optim=replace(cfg.optim, lr=1e-30, weight_decay=0.0))
    train.main(cfg)
    assert json.loads((run / "text_tokenizer.json").read_text()) == parts.tokenizer_json
    weights, image_tokenizer = checkpoint.load(run)[0]["weights"], checkpoint.load(run / "image_tokenizer")[0]["model"]
    for name in parts.weights.meta:
        torch.testing.assert_close(weights[name], parts.weights.get(name), rtol=0, atol=1e-6)
    assert image_tokenizer.keys() == parts.vq.meta.keys() and all(
        torch.equal(x, parts.vq.get(k)) for k, x in image_tokenizer.items()
    )
    assert ("without samples" in capsys.readouterr().out) == (layout == "hf-encoder")
    shutil.rmtree(source)
    shutil.rmtree(run / "step-000002")  # as if it had been stopped
    train.main(cfg)
    assert checkpoint.newest(run).name == "step-000002"
    train.main(replace(cfg, init_from=tmp_path / "moved"))
    with pytest.raises(UserError, match="does not exist"):
        train.main(replace(cfg, overwrite=True))
    assert (run / "step-000002").is_dir()


def test_a_run_does_not_overwrite_the_model_it_starts_from(finished, tmp_path):
    run = tmp_path / "run"
    inside = convert(Args(finished, run / "nano", "nano"))
    (run / CONFIG).write_text((finished / CONFIG).read_text())
    with pytest.raises(UserError, match=r"is inside .* choose another --out"):
        train.main(training_config(run, init_from=inside, overwrite=True))
    open_model_files(inside)


def test_rows_longer_than_the_other_models_context_are_refused(finished, tmp_path):
    cfg = training_config(tmp_path / "more", init_from=finished)
    with pytest.raises(UserError, match="context of 192"):
        train.main(replace(cfg, train=replace(cfg.train, seq_len=193)))
    with pytest.raises(UserError, match="does not exist"):
        train.main(replace(cfg, init_from=tmp_path / "nowhere"))
    assert not (tmp_path / "more").exists()
    with pytest.raises(UserError, match="choose another --out"):
        train.main(replace(cfg, init_from=finished, out=finished, overwrite=True))


def test_a_run_of_the_shapes_is_aligned_and_each_category_measured(finished, tmp_path):
    few = replace(training_config(tmp_path).train, steps=4, save_every=4, assistant_only_loss=True)
    stages = mixed(**dict.fromkeys(CATEGORIES, 1.0))
    cfg = training_config(tmp_path / "aligned", init_from=finished, train=few, stages=stages)
    train.main(replace(cfg, evaluation=replace(cfg.evaluation, alignment=2)))
    report = json.loads((tmp_path / "aligned" / "report.json").read_text())
    assert_shape(report, REPORT | {"alignment": dict.fromkeys(CATEGORIES, SHARE)})
    assert {path.name for path in (tmp_path / "aligned" / "data").iterdir()} == set(CATEGORIES)
    assert "alignment" not in json.loads((finished / "report.json").read_text())
