"""Ctrl-C and SIGTERM as a flag that loops read between steps; and how long each stage has taken."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from nanochameleon.errors import is_nonzero_rank, warn
from nanochameleon.files import is_finite_number, write_file

SAME_STOP = 5.0  # seconds: a terminal signals all processes, then torchrun signals its ranks; both are one stop


class GracefulShutdown:
    """Records the first Ctrl-C or SIGTERM in `asked`, which loops read between steps; a second one stops at once.

    If `at_once` is set, the first one raises KeyboardInterrupt. The end of torchrun counts as SIGTERM.
    """

    def __init__(self):
        self.asked = 0  # the signal's number
        self.at_once = False
        self.since = 0.0
        self.before: dict[int, object] = {}
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __call__(self) -> bool:
        if not self.asked and self.launcher not in (None, os.getppid()):
            self.asked = signal.SIGTERM
            say_at_once("torchrun has ended without its ranks: stopping after this step")
        return bool(self.asked)

    def _note(self, number: int, frame: object) -> None:
        if self.asked:
            if time.monotonic() - self.since > SAME_STOP:
                self._restore()
                os.kill(os.getpid(), number)
            return
        self.asked, self.since = number, time.monotonic()
        if self.launcher is None:
            self._restore()
        if self.at_once:
            raise KeyboardInterrupt
        say_at_once("stopping after this step; once more to stop at once")

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __enter__(self) -> "GracefulShutdown":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread, as in a notebook's server
                break
        return self

    def __exit__(self, *error) -> None:
        self._restore()


def say_at_once(sentence: str) -> None:
    """Print on rank 0 without Python's buffers, since a signal may arrive inside a print."""
    if not is_nonzero_rank():
        with suppress(OSError):  # stderr may be closed
            os.write(2, f"\n{sentence}\n".encode())


class StageTimer:
    """Seconds of each stage, kept in the run's folder so that they add up when a run is resumed."""

    def __init__(self, folder: Path):
        self.path, self.started = folder / "seconds.json", time.perf_counter()
        self.last = self.started
        self.seconds = self.read() if self.path.exists() else {}

    def read(self) -> dict[str, float]:
        """Read the file. A damaged one is a warning and the times start from zero: a timer must not stop a run."""
        try:
            seconds = json.loads(self.path.read_text())
            if all(is_finite_number(value) for value in seconds.values()):
                return seconds
        except (OSError, ValueError, AttributeError, RecursionError):
            pass
        if not is_nonzero_rank():
            warn(f"{self.path} is damaged: the seconds of each stage are counted from zero")
        return {}

    def elapsed(self) -> float:
        """Seconds since this process began with the run."""
        return time.perf_counter() - self.started

    def add(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now
        with suppress(OSError):  # a timer must not stop a run
            write_file(self.path, json.dumps(self.seconds).encode())
