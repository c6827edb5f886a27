"""Signals become a question between steps, and a damaged file of the stage timer stops no run."""

import json
import os
import signal

import pytest

from nanochameleon.training.signals import GracefulShutdown, StageTimer

DAMAGED = ["", "[1, 2]", "{", '{"data": "x"}', '{"data": NaN}', '{"data": 1e400}', '{"data": null}', "3", "[" * 100_000]


def test_seconds_add_up_over_interruptions(tmp_path):
    StageTimer(tmp_path).add("data")
    first = json.loads((tmp_path / "seconds.json").read_text())["data"]
    again = StageTimer(tmp_path)
    again.add("data")
    assert again.seconds["data"] > first > 0


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_starts_from_zero_with_a_warning(content, tmp_path, capsys):
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


@pytest.fixture
def heard_ctrl_c():
    """Ctrl-C as in a terminal: a shell starts what runs in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stop_is_recorded_where_nothing_can_be_printed(heard_ctrl_c, monkeypatch):
    def fail(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", fail)
    with GracefulShutdown() as stopped:
        signal.raise_signal(signal.SIGTERM)
        assert stopped()


def test_the_second_ctrl_c_stops_at_once_and_handlers_are_put_back(heard_ctrl_c):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with GracefulShutdown() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGTERM)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with GracefulShutdown():
        pass
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
