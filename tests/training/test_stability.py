"""The stability study: what it says of a curve, and that all variants run on shared data and are not run twice."""

import json
import math
from dataclasses import replace

import pytest
from tiny import training_config

from nanochameleon.errors import GaveUp, Interrupted, UserError
from nanochameleon.training import stability
from nanochameleon.training.run import read_config


def curve(losses: list[float | None], logits: float = 1.0) -> list[dict]:
    return [
        {"step": i, "loss": loss, "output_norm": 2.0 + i, "log_z": -3.0, "attention_logits": [0.5, logits]}
        for i, loss in enumerate(losses)
    ]


FALLING = [5 - 0.1 * i for i in range(40)]


@pytest.mark.parametrize(
    "losses, diverged, spike",
    [
        (FALLING, False, 0.0),
        (FALLING[:20] + [9.0] + FALLING[20:], False, 9.0 - FALLING[19]),
        (FALLING[:30] + [4.0] * 10, True, 4.0 - FALLING[29]),
        (FALLING[:36] + [None] * 4, True, math.inf),
    ],
)
def test_a_run_that_ends_above_what_it_had_reached_has_diverged_and_a_spike_that_heals_has_not(losses, diverged, spike):
    found = stability.summarize(curve(losses))
    assert found["diverged"] == diverged and found["worst_spike"] == pytest.approx(spike)
    assert found["output_norm"] == pytest.approx(sum(2.0 + i for i in range(len(losses) - 4, len(losses))) / 4)
    assert found["attention_logit"] == 1.0 and found["log_z"] == 3.0


def test_a_logit_that_is_not_finite_is_the_largest():
    assert stability.summarize(curve(FALLING, logits=None))["attention_logit"] == math.inf


def test_the_table_has_a_row_for_each_recipe_and_rate_with_the_median_seed():
    curves = {("7B recipe", "hot"): [curve([float(x)] * 5) for x in (3, 1, 2)], ("34B recipe", "plain"): [curve([4.0])]}
    rows = [line.split(" | ") for line in stability.table(curves).splitlines()[2:]]
    assert [row[:3] for row in rows] == [["| 7B recipe", "5a 5b 5c 6a", "hot"], ["| 34B recipe", "6a 6c", "plain"]]
    assert rows[0][3:5] == ["0 of 3", "2"]


def test_variants_change_what_they_say_and_nothing_else(tmp_path):
    base = training_config(tmp_path)
    by_name = {variant.name: variant.config(base, "hot", 2) for variant in stability.VARIANTS}
    assert len({cfg.folder for cfg in by_name.values()}) == len(by_name)
    for cfg in by_name.values():
        assert cfg.optim.lr == pytest.approx(10 * base.optim.lr) and cfg.seed == 2
    assert not by_name["without QK-norm"].model.qk_norm and by_name["without QK-norm"].model.dropout == 0.1
    assert by_name["34B recipe"].model.norm_order == "post" and by_name["without z-loss"].train.z_loss == 0
    images = [by_name[name].train.image_loss for name in ("without both, no drawing", "7B recipe")]
    assert images == ["none", base.train.image_loss]


def test_the_study_runs_each_variant_once_on_the_first_one_s_tokenizers_and_data(tmp_path, monkeypatch, capsys):
    import train

    variants = [v for v in stability.VARIANTS if v.name in ("7B recipe", "without QK-norm", "without both, no drawing")]
    monkeypatch.setattr(stability, "VARIANTS", variants)
    monkeypatch.setattr(stability, "SEEDS", 1)
    monkeypatch.setattr(stability, "RATES", {"hot": 10.0})
    cfg = training_config(tmp_path / "study")

    def small(one):
        return train.main(one, with_report=False)

    folder = stability.run_ablations(replace(cfg, train=replace(cfg.train, log_every=1)), small)
    assert (folder / "stability.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((folder / "stability.json").read_text())
    assert [row["recipe"] for row in rows] == [v.name for v in variants] and (folder / "stability.md").is_file()
    runs = sorted(path.parent for path in folder.glob("*/config.json"))
    assert len({(run / "text_tokenizer.json").read_bytes() for run in runs}) == 1 and len(runs) == 3
    assert {read_config(run).model.qk_norm for run in runs} == {True, False}
    calls = []
    monkeypatch.setattr(train, "forward_backward", lambda *_: calls.append(1))
    stability.run_ablations(replace(cfg, train=replace(cfg.train, log_every=1)), small)
    assert not calls and "stability 3/3" in capsys.readouterr().out


def test_a_stopped_study_ends_without_results_and_a_variant_that_gave_up_does_not_stop_it(tmp_path):
    begun, cfg = [], training_config(tmp_path / "study")

    def stops(one):
        begun.append(one.folder)
        raise Interrupted

    with pytest.raises(Interrupted):
        stability.run_ablations(cfg, stops)
    assert len(begun) == 1 and not (cfg.folder / "stability.md").exists()

    def gives_up(one):
        begun.append(one.folder)
        raise GaveUp("no finite loss") if len(begun) == 2 else UserError("this folder holds another run")

    with pytest.raises(UserError, match="another run"):
        stability.run_ablations(cfg, gives_up)
    assert len(begun) == 3


def test_under_torchrun_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start them without torchrun"):
        stability.run_ablations(training_config(tmp_path), lambda cfg: cfg.folder)
