"""The outbox holds a client's unread events: the worker's thread puts them in, the client's event loop takes them out.

    put(0, Text("a ")), put(0, Text("star")) -> take() -> [(0, Text("a star"))]

A client that reads slowly gets fewer and larger events: text joins, and of an unfinished image only the newest is kept.
So what waits is never more than the client's own samples hold.
"""

import asyncio
import threading
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from nanochameleon.documents import Text
from nanochameleon.generation.events import ImageStarted


@dataclass(frozen=True)
class DecodedImage:
    """An image as far as it is drawn."""

    codes: tuple[int, ...]  # so far, in raster order
    pixels: np.ndarray  # uint8 (R, R, 3); the first code fills what is missing
    complete: bool


@dataclass(frozen=True)
class Finished:
    tokens: tuple[int, ...]  # all new tokens, stop token included
    stopped: bool  # by a stop token or the end of the image; False: no room was left, or max_new_tokens was reached


Event = Text | ImageStarted | DecodedImage | Finished


def merge(old: Event, new: Event) -> Event | None:
    """Return one event that says what the two say one after the other, or None."""
    if isinstance(old, Text) and isinstance(new, Text):
        return Text(old.text + new.text)
    if isinstance(old, DecodedImage) and isinstance(new, DecodedImage) and not old.complete:
        return new
    return None


class Outbox:
    """Made on the event loop that reads it."""

    def __init__(self):
        self.loop, self.filled = asyncio.get_running_loop(), asyncio.Event()
        self.lock = threading.Lock()
        self.unread: list[tuple[int, Event]] = []  # (sample, event)
        self.last: dict[int, int] = {}  # sample -> where its newest event is
        self.woken = False  # since the reader took what was there
        self.error: Exception | None = None

    def put(self, sample: int, event: Event) -> None:
        with self.lock:
            at = self.last.get(sample)
            merged = None if at is None else merge(self.unread[at][1], event)
            if merged is not None:
                self.unread[at] = (sample, merged)
                return
            self.last[sample] = len(self.unread)
            self.unread.append((sample, event))

    def holds_preview(self, sample: int) -> bool:
        """Is an unfinished image of this sample the newest that it has not read?"""
        with self.lock:
            at = self.last.get(sample)
            return at is not None and isinstance(self.unread[at][1], DecodedImage)

    def fail(self, error: Exception) -> None:
        """End with an error, after what was put before."""
        self.error = self.error or error
        self.wake()

    def wake(self) -> None:
        """Let the reader know that there is something to read."""
        with self.lock:
            woken, self.woken = self.woken, True
        if woken:
            return
        with suppress(RuntimeError):  # its loop has ended, so nobody reads
            self.loop.call_soon_threadsafe(self.filled.set)

    async def take(self) -> list[tuple[int, Event]]:
        """Wait for events, and return all of them. Raises the error once they have been read."""
        while True:
            await self.filled.wait()
            self.filled.clear()
            with self.lock:
                taken, self.unread, self.last, self.woken = self.unread, [], {}, False
            if taken:
                if self.error is not None:
                    self.filled.set()
                return taken
            if self.error is not None:
                raise self.error
