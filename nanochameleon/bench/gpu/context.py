"""What each part of `make gpu` gets: the plan, the device, a folder; and a way to survive a case that fails."""

import gc
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanochameleon.bench.gpu.plan import Plan
from nanochameleon.bench.rows import Row, make_row
from nanochameleon.errors import say

ROOT = Path(__file__).parents[3]  # with train.py and sample.py


@dataclass(frozen=True)
class Context:
    plan: Plan
    folder: Path  # for files of this part
    failed: list[str] = field(default_factory=list)  # cases that failed, by name

    @property
    def device(self) -> torch.device:
        return torch.device(self.plan.device)

    def row(self, case: str, variant: str, value: float, unit: str) -> Row:
        return make_row("gpu", case, variant, value, unit, self.device)

    def run(self, name: str, command: Sequence[object], seconds: float) -> None:
        """Run a command in the project's root with the same Python. Raises RuntimeError if it fails or hangs."""
        words, limit = [str(word) for word in command], seconds * self.plan.patience
        say(f"$ python {' '.join(words)}")
        try:
            code = subprocess.run([sys.executable, *words], cwd=ROOT, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{name} took longer than {limit:.0f} s and was ended") from None
        if code:
            raise RuntimeError(f"{name} ended with exit code {code}")

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Report an error of the block and continue after it. Memory that does not suffice is no failure."""
        try:
            yield
        except torch.OutOfMemoryError:
            say(f"{name}: this does not fit into the memory of this GPU")
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            say(f"FAILED {name}: {type(error).__name__}")
            self.failed.append(name)
        gc.collect()
        torch.cuda.empty_cache()
