"""Which folders a run may be written into, and which it leaves untouched."""

from dataclasses import replace

import pytest
from tiny import training_config
from train_helpers import KilledHere, contents, killed

import train
from nanochameleon.config import EvalConfig
from nanochameleon.errors import UserError
from nanochameleon.training.run import CONFIG, read_config, start_folder


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
            train=replace(cfg.train, log_every=1, keep_checkpoints=1),
        )
    )
    assert read_config(copy).evaluation == EvalConfig(1, 1, 1)


def test_overwrite_starts_anew_and_nothing_of_the_old_run_is_left(copy):
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
