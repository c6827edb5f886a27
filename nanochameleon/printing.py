"""The one place where the programs print, and streams that cannot stop their work.

A run of hours must not end because the reader of its output has gone. `safe_streams` wraps stdout and stderr, so that
progress bars, --help and warnings of other packages are covered, too. `say` and `warn` print text from files and
models: they replace what a terminal would obey. Left out: colours and images, which are control characters by intent.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LONGEST = 300  # characters of an error or a warning
# Every control character but tab, line feed and the carriage return of a line end; and the bidi overrides, which can
# show words in another order than they have. Joiners and wide spaces stay: many scripts need them.
OBEYED = re.compile("\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with U+FFFD for each character that a terminal obeys and does not show."""
    return OBEYED.sub("\ufffd", text)


def short(sentence: str) -> str:
    """The sentence in one line. The middle of a long one is left out: its end says what to do."""
    line = " ".join(sentence.splitlines())
    return line if len(line) <= LONGEST else f"{line[:135]} ... {line[-160:]}"


def say(text: object = "", end: str = "\n", file=None) -> None:
    """Prints to stdout, or to `file`, at once."""
    print(printable(str(text)), end=end, file=file, flush=True)


def warn(sentence: str) -> None:
    """Prints one line to stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"warning: {printable(short(sentence))}", file=sys.stderr)


class Stream:
    """A text stream whose writes never raise. What cannot be written any more is lost, what has no code is escaped."""

    def __init__(self, stream):
        self.stream = stream
        self.problem: Exception | None = None  # which ended the stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if self.problem is None:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:  # raised before anything is written
                encoding = self.stream.encoding
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # the latter: it was closed
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
        """Lets what the stream still holds go to the null device, or Python complains of it at its end."""
        self.problem = error
        with suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self.stream.fileno())


@contextmanager
def safe_streams() -> Iterator[None]:
    """Makes sys.stdout and sys.stderr Streams, those that are closed or missing too, and puts them back."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would take the number, and warnings be written into it
            os.open(os.devnull, os.O_RDWR)
    before = [stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr)]  # noqa: SIM115
    sys.stdout, sys.stderr = (stream if isinstance(stream, Stream) else Stream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
