"""Run a CUDA kernel on the CPU and say what is wrong with it: no GPU is needed, but g++ is.

    python -m nanochameleon.kernels.emulate kernels/zloss/steps.cu zloss_block_a_row --grid 4 --block 256 \\
        float32:4x1000:random int64:4:range float32:4:zeros float32:4:zeros int:4 int:1000 float:1e-5 float:0.25

Arguments are words: TYPE:SHAPE:FILL is a tensor (fill: zeros, ones, range, random), int:N and float:X have 32 bits,
long:N 64, null is a null pointer. The kernel is declared extern "C". Exit code: 0 if no mistake was found, 1 for a
mistake, 2 for a call that makes no sense. Without g++ it says so.
"""

import argparse
import sys
from pathlib import Path

import torch

from nanochameleon.kernels.gpu.emulator.kernel import emulated_kernel
from nanochameleon.kernels.gpu.emulator.source import EmulatorError, NotLaunched
from nanochameleon.kernels.gpu.emulator.words import WrongWord, argument

UNSEEN = (
    "The emulator does not see: speed; whether hardware follows the manual; threads that order themselves by atomics "
    "and fences; clusters, textures and denormals."
)
SHOWN = 6  # values of a tensor


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}; --help shows an example\n")


def sizes(word: str) -> tuple[int, ...]:
    """16x8 -> (16, 8)."""
    return tuple(int(n) for n in word.split("x"))


def parse(args: list[str] | None) -> argparse.Namespace:
    about, *rest = __doc__.split("\n\n", 1)
    parser = Parser(
        "python -m nanochameleon.kernels.emulate", description=about, epilog="\n\n".join(rest),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("file", type=Path, metavar="FILE.cu")
    parser.add_argument("kernel", metavar="KERNEL")
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="a word for each parameter of the kernel")
    parser.add_argument("--grid", type=sizes, default=(1,), metavar="XxYxZ", help="blocks, such as 4 or 4x2")
    parser.add_argument("--block", type=sizes, default=(32,), metavar="XxYxZ", help="threads of a block")
    parser.add_argument("--shared", type=int, default=0, metavar="BYTES", help="dynamic shared memory of a block")
    parser.add_argument("--generation", type=int, default=80, choices=(80, 90), help="80: A100, 90: H100")
    return parser.parse_intermixed_args(args)


def values(x: torch.Tensor) -> str:
    first = x.flatten()[:SHOWN].tolist()
    return " ".join(f"{n:.6g}" for n in first) + (" ..." if x.numel() > SHOWN else "")


def show(k: int, x: torch.Tensor, before: torch.Tensor) -> None:
    changed = "unchanged" if torch.equal(x.view(torch.uint8), before.view(torch.uint8)) else "changed"
    print(f"argument {k}  {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}, {changed}: {values(x)}")


def emulate(options: argparse.Namespace) -> int:
    """Run the kernel and print what was found. Returns the exit code: 1 for a mistake of the kernel."""
    arguments = [argument(word) for word in options.arguments]
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    kernel = emulated_kernel(options.file, options.kernel, options.generation)
    try:
        kernel(options.grid, options.block, tuple(arguments), shared_mem=options.shared)
    except NotLaunched:
        raise
    except EmulatorError as mistake:
        print(f"{mistake}\n{UNSEEN}")
        return 1
    print("no mistake found in two orders of threads")
    for k, x in enumerate(arguments):
        if isinstance(x, torch.Tensor):
            show(k, x, before[k])
    print(UNSEEN)
    return 0


def main(args: list[str] | None = None) -> int:
    options = parse(args)
    try:
        return emulate(options)
    except (NotLaunched, WrongWord, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
