"""When sheets of samples are due during training, by steps and by the clock."""

import math
from collections.abc import Callable

from nanochameleon.config import TrainConfig


class SampleSchedule:
    """Says when a sheet of samples is due: every `sample_every` steps, and every `sample_minutes` of the run.

    Only rank 0 asks, since it draws alone. elapsed: returns seconds.
    """

    def __init__(self, cfg: TrainConfig, elapsed: Callable[[], float]):
        self.steps, self.seconds, self.elapsed = cfg.sample_every, 60 * (cfg.sample_minutes or math.inf), elapsed
        self.next = self.seconds

    def due(self, step: int) -> bool:
        """Whether to draw before this step. To be asked before each step but step 0, where there is nothing to see."""
        if late := self.elapsed() >= self.next:
            self.next = self.elapsed() // self.seconds * self.seconds + self.seconds
        return late or bool(self.steps and step % self.steps == 0)


def spell(seconds: float) -> str:
    """12.3 -> '12 s'; 123 -> '2 min 3 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
