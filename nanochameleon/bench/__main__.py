"""python -m nanochameleon.bench kernels [--op NAME] [--device cpu|cuda] [--quick] [--json FILE] [--plot FILE]"""

import sys
from importlib import import_module

from nanochameleon.errors import UserError, exit_on_user_error

BENCHES = ("kernels",)


def main(words: list[str]) -> None:
    """The first word names the bench, the others are its options."""
    if not words or words[0] not in BENCHES:
        raise UserError(f"name a bench: python -m nanochameleon.bench {'|'.join(BENCHES)}")
    import_module(f"nanochameleon.bench.{words[0]}").main(words[1:])


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
