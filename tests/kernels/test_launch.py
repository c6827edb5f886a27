"""Tasks on threads: who waits for whom, and that all of [0, n) is done once."""

import threading

import pytest
import torch

from nanochameleon.kernels import launch


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("fails", ["caller", "helper", None])
def test_nothing_is_still_running_when_run_is_left(two_threads, fails):
    """The slower thread goes on for a while after the other one has failed."""
    caller, both, left = threading.current_thread(), threading.Barrier(2), []

    def task(part, first, last):
        me = "caller" if threading.current_thread() is caller else "helper"
        both.wait(60)
        if me == fails:
            raise RuntimeError(me)
        for _ in range(1_000_000):
            pass
        left.append(me)

    if fails is None:
        launch.run(task, 2, 2)
        assert sorted(left) == ["caller", "helper"]
    else:
        with pytest.raises(RuntimeError, match=fails):
            launch.run(task, 2, 2)
        assert left == [{"caller": "helper", "helper": "caller"}[fails]]
