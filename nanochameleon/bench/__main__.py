"""python -m nanochameleon.bench kernels [--op NAME] [--device cpu|cuda] [--quick] [--json FILE] [--plot FILE]"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from nanochameleon.errors import UserError, exit_on_user_error


@dataclass(frozen=True)
class Args:
    """Measures ours beside the peers that are installed and prints a row for each figure."""

    bench: tyro.conf.Positional[Literal["kernels"]]
    """What to measure."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    quick: bool = False
    """Fewer rounds and shorter samples: under 50 seconds on two cores."""
    json: Path | None = None
    """File for the rows."""
    op: Literal["all", "attention", "zloss", "linear_zloss", "step"] = "all"
    """Of kernels: only this op's cases."""
    plot: Path | None = None
    """File for a drawing of the ratios (PNG)."""


def main(args: Args) -> None:
    import torch

    from nanochameleon.bench import gpu_cases, kernels, rows, timing

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: leave --device out")
    what = torch.device(args.device), args.quick, args.op
    found = gpu_cases.cases(*what) if args.device == "cuda" else kernels.checked(kernels.cases(*what))
    measured = []
    for row in kernels.bench(found, *what):
        rows.show(row)
        measured.append(row)
    try:
        if args.json:
            rows.save(measured, args.json)
        if args.plot:
            timing.plot(args.plot, measured)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; choose another file") from None


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    exit_on_user_error(lambda: main(args))
