"""python -m nanochameleon.bench kernels|engine|choices|first|web|train|data [--device cpu|cuda] [--quick] [--json FILE]

python -m nanochameleon.bench plot FILE ... --plot FILE draws rows that --json wrote.
python -m nanochameleon.bench prove checks CUDA kernels on the GPU at hand.
python -m nanochameleon.bench gpu runs all that one GPU should show; see its --help.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Literal

import tyro

from nanochameleon.cli import check_kernels, parse
from nanochameleon.errors import UserError, exit_on_user_error
from nanochameleon.files import check_writable

WITH_LIMITS = "kernels", "engine", "train", "plot"


@dataclass(frozen=True)
class Args:
    """Measure ours next to the peers that are installed, and print a row for each figure."""

    bench: tyro.conf.Positional[
        Literal["kernels", "engine", "choices", "first", "web", "train", "data", "prove", "plot"]
    ]
    """What to measure. choices: scoring multiple-choice items. first: a whole command, to the first image of
    models/toy. web: the page's server, with one client and with many. prove: check the CUDA kernels on this GPU, and
    let `auto` take those that are right and fast. plot: nothing, but draw `files`."""
    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """For plot: files that --json wrote."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to measure it. prove takes the first GPU that CUDA_VISIBLE_DEVICES shows."""
    quick: bool = False
    """Fewer rounds and shorter samples: under 50 seconds on two cores."""
    json: Path | None = None
    """Write the rows to this file."""
    op: Literal["all", "attention", "zloss", "linear_zloss", "decode", "step"] = "all"
    """For kernels and prove: only this op's cases. The cases of decode need a GPU."""
    dry: bool = False
    """For prove: tiny shapes in the emulator on a CPU, to see that the command works. Nothing is kept."""
    plot: Path | None = None
    """For kernels, train, engine and plot: draw each program's share of the limit into this file (PNG)."""


def measure(args: Args) -> Iterator:
    """Yield rows, measured or read."""
    import torch

    if args.bench == "plot":
        from nanochameleon.bench import rows

        return chain.from_iterable(map(rows.load, args.files))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: leave out --device")
    device = torch.device(args.device)
    check_kernels(device, *([torch.float32, torch.bfloat16] if args.bench == "train" else []))
    if args.bench != "kernels" and args.op != "all":
        raise UserError("--op belongs to the bench `kernels`: leave it out")
    if args.bench == "web" and not find_spec("starlette"):
        raise UserError("starlette is missing: pip install -c constraints.txt -e '.[web]'")
    if args.bench != "kernels":
        return import_module(f"nanochameleon.bench.{args.bench}").bench(device, args.quick)
    if args.op == "decode" and args.device == "cpu":
        raise UserError("decode has cases for a GPU only: add --device cuda, or run the bench `engine`")
    from nanochameleon.bench import kernels, subjects

    what = device, args.quick, args.op
    on_gpu = args.device == "cuda"
    found = subjects.checked_cases(device, args.op) if on_gpu else kernels.checked(kernels.cases(*what))
    return kernels.bench(found, *what)


def main(args: Args) -> None:
    from nanochameleon.bench import rows

    if args.bench == "prove":
        from nanochameleon.bench import prove

        if args.op in ("linear_zloss", "step") or args.json or args.plot:
            raise UserError("prove takes --op attention, zloss or decode, --quick and --dry: leave out the others")
        prove.main(args.op, args.quick, args.dry)
        return
    if args.dry:
        raise UserError("--dry belongs to prove: leave it out")
    check_plot(args)
    with writing():
        for path in filter(None, (args.json, args.plot)):  # before an hour of measuring
            check_writable(path.parent)
    measured = []
    try:
        for row in measure(args):
            rows.show(row)
            measured.append(row)
    except BaseException:  # keep what was measured, even if a later case fails
        if measured:
            write_files(replace(args, plot=None), measured)
        raise
    if measured:
        write_files(args, measured)


def check_plot(args: Args) -> None:
    """Raise UserError for a plot of what has no limit, and for files that nobody would read."""
    if args.plot and args.bench not in WITH_LIMITS:
        raise UserError(f"--plot belongs to {', '.join(WITH_LIMITS)}: leave it out")
    if args.bench == "plot" and not (args.files and args.plot):
        raise UserError("plot draws rows: name files that --json wrote, and --plot FILE for the picture")
    if args.files and args.bench != "plot":
        raise UserError(f"{args.files[0]}: only plot reads files: leave it out")


@contextmanager
def writing() -> Iterator[None]:
    """Turn an OSError into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; choose another file") from None


def write_files(args: Args, measured: list) -> None:
    """Write the requested files. Raises UserError where one cannot be written."""
    from nanochameleon.bench import plot, rows

    with writing():
        if args.json:
            rows.save(measured, args.json)
        if args.plot:
            plot.draw(measured, args.plot)


def start(args: list[str]) -> None:
    """Run `gpu`, which has options of its own, or a single bench."""
    if args[:1] != ["gpu"]:
        return main(parse(Args, args, description=__doc__))
    from nanochameleon.bench.gpu import run

    run.main(parse(run.GPUArgs, args[1:]))


if __name__ == "__main__":
    exit_on_user_error(lambda: start(sys.argv[1:]))
