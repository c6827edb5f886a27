"""The stopwatch of a run's stages stops no run, whatever its file holds."""

import json

import pytest

from nanochameleon.training.signals import StageTimer

DAMAGED = ["", "[1, 2]", "{", '{"data": "x"}', '{"data": NaN}', '{"data": 1e400}', '{"data": null}', "3", "[" * 100_000]


def test_seconds_add_up_over_interruptions(tmp_path):
    StageTimer(tmp_path).add("data")
    first = json.loads((tmp_path / "seconds.json").read_text())["data"]
    again = StageTimer(tmp_path)
    again.add("data")
    assert again.seconds["data"] > first > 0


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_begins_from_zero_with_a_warning(content, tmp_path, capsys):
    (tmp_path / "seconds.json").write_text(content)
    laps = StageTimer(tmp_path)
    assert laps.seconds == {} and "seconds.json is damaged" in capsys.readouterr().err
    laps.add("data")
    assert json.loads((tmp_path / "seconds.json").read_text()).keys() == {"data"}


def test_a_folder_that_cannot_be_written_stops_no_run(tmp_path):
    (tmp_path / "file").touch()
    laps = StageTimer(tmp_path)
    laps.path = tmp_path / "file" / "seconds.json"
    laps.add("data")
    assert laps.seconds["data"] > 0


def test_bytes_that_are_no_text_are_damage(tmp_path):
    (tmp_path / "seconds.json").write_bytes(b"\xff\xfe{")
    assert StageTimer(tmp_path).seconds == {}
