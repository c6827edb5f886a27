"""What a user can do wrong, said in one sentence; and printing that cannot stop a run.

Every mistake that a user can cause raises UserError with the sentence to print; `exit_on_user_error` prints it to
stderr and exits with code 2. Anything else is a bug of ours and keeps its traceback.

A run of hours must not end because the reader of its output has gone. `safe_streams` wraps stdout and stderr, which
covers progress bars, --help and the warnings of other packages, too. `say` and `warn` print text from files and models
and replace the characters that a terminal would obey. Left out: colours and images, which are control characters by
intent.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# Errors


class UserError(Exception):
    """A wrong option, file or prompt: the message names what is wrong and what to do about it."""


class OwnError(UserError):
    """An error only one rank has seen; that rank prints it, since rank 0 cannot."""


class PeerLost(OwnError):
    """Another process of this run is gone; every process that is left prints so."""


class GaveUp(UserError):
    """The loss of a run would not become finite again."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, noticed between two steps. All progress is saved; the same command resumes."""

    number = signal.SIGINT


def is_nonzero_rank() -> bool:
    """Whether torchrun started several processes and this is not rank 0, which prints what all of them would print."""
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    several = world.isdecimal() and int(world) > 1 and "MASTER_ADDR" in os.environ
    return several and rank.isdecimal() and int(rank) > 0


def exit_on_user_error(main: Callable[[], T], each: bool = False) -> T:
    """Return main(). UserError prints its sentence on stderr and exits with 2; Ctrl-C exits with 130, SIGTERM with 143.

    Of several ranks, which all find the same fault, only rank 0 prints it; with `each`, every rank prints its own.
    A full disk never stops a main that prints; it is reported at the end. A reader that has gone is no fault.
    """
    with safe_streams():
        try:
            result = main()
            lost = sys.stdout.problem
            if isinstance(lost, OSError) and not isinstance(lost, BrokenPipeError):
                raise UserError(f"stdout could not be written ({lost}): what was printed is lost, files are saved")
            return result
        except UserError as error:
            if each or isinstance(error, OwnError) or not is_nonzero_rank():
                say(f"error: {short(str(error))}", file=sys.stderr)
            raise SystemExit(2) from None
        except Interrupted as stop:  # its sentence has been printed already
            raise SystemExit(128 + stop.number) from None
        except KeyboardInterrupt:
            say("\nstopped", file=sys.stderr)
            raise SystemExit(130) from None


# ---------------------------------------------------------------------------------------------------------------------
# Text that is safe to print

LONGEST = 300  # characters of an error or a warning
# Every control character except tab, line feed and the carriage return of a line end; and the bidi overrides, which can
# show words in another order than they have. Joiners and wide spaces stay: many scripts need them.
OBEYED = re.compile("\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Replace each character that a terminal obeys instead of showing by U+FFFD."""
    return OBEYED.sub("\ufffd", text)


def short(sentence: str) -> str:
    """Put the sentence on one line. A long one loses its middle, because its end says what to do."""
    line = " ".join(sentence.splitlines())
    return line if len(line) <= LONGEST else f"{line[:135]} ... {line[-160:]}"


def shown(what: object, most: int = 60) -> str:
    """Quote what comes from outside: one line, control characters spelled out, at most `most` characters.

    An exception gives its first line: torch puts a stack of C++ calls after it.
    """
    text = str(what)
    if isinstance(what, BaseException):
        text = text.partition("\n")[0]
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 3]}..."


def say(text: object = "", end: str = "\n", file=None) -> None:
    """Print to stdout, or to `file`, without buffering."""
    print(printable(str(text)), end=end, file=file, flush=True)


def warn(sentence: str) -> None:
    """Print one line to stderr, above a progress bar if there is one."""
    say_above(f"warning: {short(sentence)}", sys.stderr)


def say_above(sentence: str, file=None) -> None:
    """Print one line to stdout, or to `file`, above a progress bar if there is one."""
    from tqdm import tqdm

    file = file or sys.stdout
    tqdm.write(printable(sentence), file=file)
    file.flush()  # a pipe would keep it until something else is printed


# ---------------------------------------------------------------------------------------------------------------------
# Streams that cannot stop a run


class Stream:
    """A text stream whose writes never raise: after an error text is dropped; characters without a code are escaped."""

    def __init__(self, stream):
        self.stream = stream
        self.problem: Exception | None = None  # the error that ended the stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if self.problem is None:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:  # raised before anything is written
                encoding = self.stream.encoding
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self.end(error)
        return len(text)

    def flush(self) -> None:
        if self.problem is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self.end(error)

    def isatty(self) -> bool:
        return self.problem is None and not self.stream.closed and self.stream.isatty()

    def end(self, error: Exception) -> None:
        """Send what the stream still holds to the null device, or Python complains about it at exit."""
        self.problem = error
        with suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self.stream.fileno())


@contextmanager
def safe_streams() -> Iterator[None]:
    """Wrap sys.stdout and sys.stderr in Streams, closed or missing ones included, and restore them at the end."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # a closed descriptor: the next opened file would take its number, and receive the warnings
            os.open(os.devnull, os.O_RDWR)
    before = [stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr)]  # noqa: SIM115
    sys.stdout, sys.stderr = (stream if isinstance(stream, Stream) else Stream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
