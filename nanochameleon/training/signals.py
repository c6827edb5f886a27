"""Ctrl-C and SIGTERM, turned into a question that loops ask between steps; and how long the stages have taken."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from nanochameleon.errors import is_nonzero_rank, warn
from nanochameleon.files import is_finite_number, write_file

ONE_STOP = 5.0  # seconds in which torchrun's own signal follows the one that a terminal sends to all


class GracefulShutdown:
    """The first Ctrl-C or SIGTERM is noted in `asked`, which loops look at between steps; a second one stops at once.
    Where `at_once` is set, the first one raises KeyboardInterrupt. The end of torchrun counts as SIGTERM."""

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
            if time.monotonic() - self.since > ONE_STOP:
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
    """By rank 0, past Python's own buffers: a signal may come within a print."""
    if not is_nonzero_rank():
        with suppress(OSError):  # stderr may be closed
            os.write(2, f"\n{sentence}\n".encode())


class StageTimer:
    """Seconds of each stage, kept in the run's folder so that they add up over interruptions."""

    def __init__(self, folder: Path):
        self.path, self.last = folder / "seconds.json", time.perf_counter()
        self.seconds = self.read() if self.path.exists() else {}

    def read(self) -> dict[str, float]:
        """From zero, with a warning, where the file is damaged: a stopwatch stops no run."""
        try:
            seconds = json.loads(self.path.read_text())
            if all(is_finite_number(value) for value in seconds.values()):
                return seconds
        except (OSError, ValueError, AttributeError, RecursionError):
            pass
        if not is_nonzero_rank():
            warn(f"{self.path} is damaged: the seconds of each stage are counted from zero")
        return {}

    def add(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now
        with suppress(OSError):  # a stopwatch stops no run
            write_file(self.path, json.dumps(self.seconds).encode())
