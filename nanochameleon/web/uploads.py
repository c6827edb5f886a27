"""How many image files are in work at once: a crowd of uploads costs no more memory than a few."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from nanochameleon.web.refusals import busy


class Uploads:
    """Places for `most` files that arrive or wait, and threads in which some of them are decoded."""

    def __init__(self, most: int = 16, threads: int = 2):
        self.most, self.n = most, 0
        self.threads = asyncio.Semaphore(threads)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Raises Refused (429) where no place is free."""
        if self.n >= self.most:
            raise busy("too many images arrive at once: try again in a second")
        self.n += 1
        try:
            yield
        finally:
            self.n -= 1
