"""A model as slow as a test wants: each step of its engine, which makes one token, needs a permit.

pace = Pace(); monkeypatch.setattr("nanochameleon.web.batch.Engine", paced_engine(pace))
pace.allow(20)  # tokens, or image codes, of all requests together in the batch
"""

import math
import threading

from nanochameleon.generation.engine import Engine
from nanochameleon.generation.request import RequestOutput

PAUSE = 0.01  # seconds that the engine waits for a permit before the worker may do other things


class Pace:
    def __init__(self):
        self.permits, self.changed = math.inf, threading.Condition()

    def hold(self) -> None:
        """Let the engine do nothing."""
        with self.changed:
            self.permits = 0

    def allow(self, steps: float = math.inf) -> None:
        """Let the engine do so many steps more."""
        with self.changed:
            self.permits += steps
            self.changed.notify_all()

    def take(self) -> bool:
        with self.changed:
            taken = self.changed.wait_for(lambda: self.permits > 0, PAUSE)
            self.permits -= taken
            return taken


def paced_engine(pace: Pace) -> type[Engine]:
    class PacedEngine(Engine):
        def step(self) -> list[RequestOutput]:
            if not (self.running or self.waiting):
                return super().step()
            if not pace.take():
                return []
            self.max_steps_between_syncs = 1
            return super().step()

    return PacedEngine
