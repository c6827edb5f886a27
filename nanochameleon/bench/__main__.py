"""python -m nanochameleon.bench engine [--device cpu|cuda] [--quick] [--json FILE]"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from nanochameleon.errors import UserError, exit_on_user_error


@dataclass(frozen=True)
class Args:
    """Measures ours beside the peers that are installed and prints a row for each figure."""

    bench: tyro.conf.Positional[Literal["engine"]]
    """What to measure."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    quick: bool = False
    """Fewer rounds and shorter samples: under 50 seconds on two cores."""
    json: Path | None = None
    """File for the rows."""


def main(args: Args) -> None:
    import torch

    from nanochameleon.bench import engine, rows

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: leave --device out")
    measured = []
    for row in engine.bench(torch.device(args.device), args.quick):
        rows.show(row)
        measured.append(row)
    if args.json:
        try:
            rows.save(measured, args.json)
        except OSError as error:
            raise UserError(f"cannot write {args.json}: {error.strerror}; choose another file with --json") from None


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    exit_on_user_error(lambda: main(args))
