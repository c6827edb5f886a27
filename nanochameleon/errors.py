"""What a user can do wrong, said in one sentence.

Every mistake that a user can cause raises UserError with the sentence to print; `exit_on_user_error` turns it into
that sentence on stderr and exit code 2. Anything else is a bug of ours and keeps its traceback.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from nanochameleon.printing import safe_streams, say, short

T = TypeVar("T")


class UserError(Exception):
    """A wrong option, file or prompt: the message names what is wrong and what to do about it."""


class OwnError(UserError):
    """What one of several processes met alone: it says so itself, since the first one may not know."""


class PeerLost(OwnError):
    """Another process of this run is gone: every one that is left says so."""


class GaveUp(UserError):
    """A run whose loss would not become finite again."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, met between two steps: what is done is saved, and the same command goes on."""

    number = signal.SIGINT


def another_rank_speaks() -> bool:
    """Is this one of several processes that torchrun has started, and not rank 0, which says what all have to say?"""
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    several = world.isdecimal() and int(world) > 1 and "MASTER_ADDR" in os.environ
    return several and rank.isdecimal() and int(rank) > 0


def shown(what: object, most: int = 60) -> str:
    """Quote what comes from outside: one line, control characters spelled out, at most `most` characters.

    Of an exception the first line is taken: torch puts a stack of C++ calls after it.
    """
    text = str(what)
    if isinstance(what, BaseException):
        text = text.partition("\n")[0]
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 3]}..."


def exit_on_user_error(main: Callable[[], T], each: bool = False) -> T:
    """Returns main(); a UserError ends the program with its sentence on stderr and exit code 2, Ctrl-C with 130,
    SIGTERM, where it is met between steps, with 143.

    Of several processes, which all find the same fault, the first one says it; with `each` every one its own.
    A disk that is full when main prints never stops it, and is said at its end. A reader that has gone is no fault.
    """
    with safe_streams():
        try:
            result = main()
            lost = sys.stdout.problem
            if isinstance(lost, OSError) and not isinstance(lost, BrokenPipeError):
                raise UserError(f"stdout could not be written ({lost}): what was printed is lost, files are saved")
            return result
        except UserError as error:
            if each or isinstance(error, OwnError) or not another_rank_speaks():
                say(f"error: {short(str(error))}", file=sys.stderr)
            raise SystemExit(2) from None
        except Interrupted as stop:  # which has been told
            raise SystemExit(128 + stop.number) from None
        except KeyboardInterrupt:
            say("\nstopped", file=sys.stderr)
            raise SystemExit(130) from None
