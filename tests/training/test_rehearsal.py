"""A rehearsal tells how long a run takes and leaves nothing; sheets of samples come by steps and by the clock."""

import itertools
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import training_config
from train_helpers import assert_same_weights, contents

import train
from nanochameleon.config import DataConfig, ModelConfig, StageConfig, TrainConfig
from nanochameleon.errors import Interrupted, UserError
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.training import rehearsal
from nanochameleon.training.init_from import InitFrom
from nanochameleon.training.rehearsal import Forecast, Stopwatch, rehearse, rounded, step_seconds, worth
from nanochameleon.training.sample_schedule import SampleSchedule, spell
from nanochameleon.training.signals import StageTimer

CPU = Mesh(torch.device("cpu"))


def forecast(cfg, folder: Path) -> Forecast:
    def steps(few, run, loader, place, stopped):
        train.train_transformer(few, run, InitFrom(), loader, place, CPU, StageTimer(place), stopped)

    return rehearse(cfg, InitFrom(), folder, CPU.device, steps)


def test_neither_a_rehearsal_nor_samples_change_what_is_learnt(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rehearsal, "FEWEST", 1)
    cfg = training_config(tmp_path / "run")
    train.main(replace(cfg, train=replace(cfg.train, sample_every=3, sample_minutes=1e-9)))
    assert_same_weights(tmp_path / "run", finished)
    assert_same_weights(tmp_path / "run" / "image_tokenizer", finished / "image_tokenizer")
    said = capsys.readouterr().out
    assert "about " in said and " on this machine: " in said
    assert f"{tmp_path / 'run' / 'samples' / 'step-000001.png'}, after " in said


def test_ctrl_c_in_a_rehearsal_ends_the_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "FEWEST", 1)
    monkeypatch.setattr(train, "rehearse", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted) as stop:
        train.main(training_config(tmp_path / "run"))
    assert stop.value.number == signal.SIGINT and not (tmp_path / "run" / "text_tokenizer.json").exists()


def test_an_unknown_source_is_refused_before_the_rehearsal(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "FEWEST", 1)
    monkeypatch.setattr(train, "rehearse", lambda *_: pytest.fail("a rehearsal of documents that do not exist"))
    cfg = replace(training_config(tmp_path / "run"), stages=(StageConfig(weights=(("pairs", 1.0), ("foo", 1.0))),))
    with pytest.raises(UserError, match="names 'foo'"):
        train.main(cfg)


def test_a_rehearsal_leaves_the_folder_and_the_generator_as_they_were(finished, tmp_path, capsys):
    torch.manual_seed(3)
    before, state = contents(finished), torch.get_rng_state()
    whole = forecast(training_config(tmp_path / "new"), tmp_path / "new")
    assert min(vars(whole).values()) > 0
    done = forecast(training_config(finished), finished)
    assert (done.image_tokenizer, done.tokens, done.transformer) == (0, 0, 0) and done.report > 0
    assert contents(finished) == before and not (tmp_path / "new").exists()
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")


def test_a_resumed_run_is_told_what_is_left(before_transformer):
    left = forecast(training_config(before_transformer), before_transformer)
    assert left.image_tokenizer == left.tokens == 0 < left.transformer
    half = replace(training_config(before_transformer), train=replace(TrainConfig(), steps=10**6))
    (before_transformer / "step-500000").mkdir()
    assert rehearsal.steps_left(before_transformer, half.train.steps) == 500_000


@pytest.mark.parametrize("changes", [
    dict(mesh=Mesh(torch.device("cuda"))), dict(mesh=replace(CPU, world_size=2)), dict(data=DataConfig("emoji")),
    dict(steps=99), dict(model=ModelConfig()),
])  # fmt: skip
def test_only_a_long_run_of_small_steps_on_one_cpu_is_rehearsed(tmp_path, changes):
    cfg = training_config(tmp_path)
    cfg = replace(cfg, train=replace(cfg.train, steps=100))
    assert worth(cfg, tmp_path, CPU)
    mesh, steps = changes.pop("mesh", CPU), changes.pop("steps", 100)
    assert not worth(replace(cfg, train=replace(cfg.train, steps=steps), **changes), tmp_path, mesh)


@given(st.integers(1, 20), st.integers(0, 30), st.integers(0, 50), st.booleans())
def test_a_loop_ends_after_the_steps_that_are_timed(n, most, steps, slow):
    taken = []
    clock = itertools.count(step=rehearsal.ENOUGH + 1 if slow else rehearsal.ENOUGH / 100)

    def loop(stopped: Stopwatch) -> None:
        for step in range(steps):
            taken.append(step)
            if stopped():
                return

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        seconds = step_seconds(loop, n, most)
    expected = max(
        n, min(most, 2) if slow else most
    )  # slow: the clock starts after one step, and the second is too much
    assert len(taken) == min(steps, expected + 1) and len(seconds) == max(0, len(taken) - 1)


def test_a_forecast_is_a_sentence():
    said = Forecast(35.2, 0.0, 430.0, 10.4).sentence(100.0, Path("runs/toy/samples"))
    expected = "about 8 min on this machine: image tokenizer 35 s, transformer 7 min, report 10 s"
    assert said == f"{expected}; the first samples after about 1.5 min, in runs/toy/samples"
    assert Forecast(35.2, 0.0, 430.0, 10.4).sentence(None, Path("samples")) == expected
    assert [rounded(s) for s in (0.6, 89, 100, 150, 1_800, 9_000)] == ["1 s", "89 s", "1.5 min", "2.5 min", "30 min",
                                                                       "2.5 hours"]  # fmt: skip
    assert [spell(s) for s in (0.4, 59.4, 59.6, 123)] == ["0 s", "59 s", "1 min 0 s", "2 min 3 s"]


@given(st.lists(st.floats(0, 500), max_size=40), st.sampled_from([None, 7]), st.sampled_from([None, 2.0]))
def test_samples_are_due_every_so_many_steps_and_once_in_every_two_minutes(intervals, every, minutes):
    now = 0.0
    schedule = SampleSchedule(TrainConfig(sample_every=every, sample_minutes=minutes), lambda: now)
    for step, interval in enumerate(intervals, 1):
        before, now = now, now + interval
        passed = minutes is not None and now // 120 > before // 120
        assert schedule.due(step) == (passed or (every is not None and step % every == 0))
