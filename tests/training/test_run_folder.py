"""Which folders a run may be written into, and which it leaves untouched."""

import dataclasses
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_config, tiny_run, training_config
from train_helpers import KilledHere, contents, killed

import train
from nanochameleon.config import DataConfig, EvalConfig
from nanochameleon.errors import UserError
from nanochameleon.training import run_folder
from nanochameleon.training.run import CONFIG, config_to_json, read_config
from nanochameleon.training.run_folder import LOCK, claim, start_folder


def test_another_configuration_in_the_same_folder_is_refused_by_the_fields_name(copy):
    cfg, before = training_config(copy), contents(copy)
    others = {
        "train.steps was 12 and is 13": replace(cfg, train=replace(cfg.train, steps=13)),
        "vqgan.n_codes was 16 and is 17": replace(cfg, vqgan=replace(cfg.vqgan, n_codes=17)),
        "seed was 0 and is 1": replace(cfg, seed=1),
        "tokenizers.optim.lr was 0.003 and is 0.1": replace(
            cfg, tokenizers=replace(cfg.tokenizers, optim=replace(cfg.optim, lr=0.1))
        ),
    }
    for sentence, other in others.items():
        with pytest.raises(UserError, match=f"holds another run .*{sentence}"):
            train.main(other)
    assert contents(copy) == before


def test_what_does_not_touch_the_training_may_change(copy):
    cfg = training_config(copy)
    start_folder(
        replace(
            cfg,
            evaluation=EvalConfig(1, 1, 1),
            device="auto",
            train=replace(cfg.train, log_every=1, keep_checkpoints=1, fused_output="on"),
        )
    )
    assert read_config(copy).evaluation == EvalConfig(1, 1, 1)


def test_overwrite_starts_again_and_leaves_nothing_of_the_old_run(copy):
    cfg = training_config(copy, seed=5, overwrite=True)
    assert start_folder(cfg) == copy
    assert set(contents(copy)) == {CONFIG} and read_config(copy).seed == 5


def test_a_restart_by_torchrun_does_not_overwrite_what_it_began(copy, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(train, "store_images", killed)
    before = contents(copy)
    with pytest.raises(KilledHere):
        train.main(training_config(copy, overwrite=True))
    assert contents(copy) | {CONFIG: b""} == before | {CONFIG: b""}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_a_folder_with_other_files_is_refused_and_untouched(name, overwrite, tmp_path):
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    (tmp_path / "mine" / name).write_text('{"model_type": "llama"}')
    (tmp_path / "mine" / "sub" / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="mine"):
        train.main(training_config(tmp_path / "mine", overwrite=overwrite))
    assert contents(tmp_path) == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="file"):
            train.main(training_config(out))


def test_a_run_of_another_version_is_not_overwritten_and_the_way_out_is_said(tmp_path):
    (tmp_path / CONFIG).write_text(config_to_json(tiny_config()).replace("{", '{"renamed": 1,', 1))
    with pytest.raises(UserError, match=r"no field 'renamed'.*delete the folder"):
        start_folder(tiny_config(out=tmp_path, overwrite=True))
    assert (tmp_path / CONFIG).exists()


def test_a_path_by_another_spelling_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    first = tiny_config(out=tmp_path / "run", data=DataConfig("folder", Path("data")))
    start_folder(first)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    for path in (tmp_path / "data", tmp_path / "link", Path("x/../data")):
        start_folder(dataclasses.replace(first, data=DataConfig("folder", path)))
    with pytest.raises(UserError, match=r"holds another run \(data\.path was .*data and is .*other\)"):
        start_folder(dataclasses.replace(first, data=DataConfig("folder", tmp_path / "other")))


def test_a_folder_has_one_training_at_a_time_and_its_lock_ends_with_it(tmp_path):
    folder = tmp_path / "runs" / "new"
    with claim(folder):
        assert (folder / LOCK).read_text() == str(os.getpid())
        with pytest.raises(UserError, match=f"process {os.getpid()} trains in {folder}: wait"), claim(folder):
            pass
        (folder / LOCK).write_text("\x1b[2J")
        with pytest.raises(UserError, match=f"another process trains in {folder}"), claim(folder):
            pass
    assert not folder.exists()  # where nothing came of it
    with claim(folder):
        (folder / CONFIG).write_text("{}")
    assert [path.name for path in folder.iterdir()] == [CONFIG]
    (folder / LOCK).write_text("1")  # left by a killed process
    with claim(folder):
        assert (folder / LOCK).read_text() == str(os.getpid())


def test_a_lock_that_is_removed_while_it_is_opened_is_not_taken(tmp_path, monkeypatch):
    real, removed = run_folder.fcntl.flock, []

    def removes_it_first(file, how):
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        real(file, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", removes_it_first)
    with claim(tmp_path), pytest.raises(UserError, match="trains in"), claim(tmp_path):
        pass


def test_a_lock_that_is_a_link_leaves_the_file_that_it_leads_to_alone(tmp_path):
    other, folder = tmp_path / "other", tmp_path / "run"
    other.write_text("precious")
    folder.mkdir()
    (folder / LOCK).symlink_to(other)
    with pytest.raises(UserError, match=f"cannot write to {folder}"), claim(folder):
        pass
    assert other.read_text() == "precious"


@pytest.mark.parametrize("reason", ["No locks available", "Windows"])
def test_where_nothing_can_be_locked_a_run_continues_with_a_warning(reason, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(37, reason)

    if reason == "Windows":
        monkeypatch.setattr(run_folder, "fcntl", None)
    else:
        monkeypatch.setattr(run_folder.fcntl, "flock", fail)
    with claim(tmp_path):
        (tmp_path / CONFIG).touch()
    assert reason in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == [CONFIG]


def test_overwriting_deletes_what_a_run_has_and_nothing_that_it_links_to(tmp_path):
    data, folder = tmp_path / "data", tiny_run(tmp_path / "run")
    data.mkdir()
    (data / "mine").touch()
    (folder / "data").symlink_to(data)
    with claim(folder):
        start_folder(tiny_config(out=folder, overwrite=True))
        assert {path.name for path in folder.iterdir()} == {CONFIG, LOCK}
    assert (data / "mine").exists()
