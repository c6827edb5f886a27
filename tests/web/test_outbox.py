"""What a client has not read yet: nothing said is lost, and it stays small."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.documents import Text
from nanochameleon.generation.events import ImageStarted
from nanochameleon.web.outbox import DecodedImage, Finished, Outbox

PIXELS = np.zeros((1, 1, 3), np.uint8)
previews = st.builds(DecodedImage, st.tuples(st.integers(0, 9)), st.just(PIXELS), st.just(False))
images = st.builds(DecodedImage, st.tuples(st.integers(0, 9)), st.just(PIXELS), st.just(True))
pieces = st.one_of(st.builds(Text, st.text(max_size=3)), st.just(ImageStarted()), previews, images)
events = st.lists(st.tuples(st.integers(0, 2), pieces))


def said(taken: list, sample: int) -> list:
    """Everything that must not be lost: all text as one string between other events, whole images, starts."""
    found: list = [""]
    for index, event in taken:
        if index != sample or (isinstance(event, DecodedImage) and not event.complete):
            continue
        if isinstance(event, Text) and isinstance(found[-1], str):
            found[-1] += event.text
        else:
            found.append(event)
            found += [""] if not isinstance(event, Text) else []
    return found


@given(events, st.lists(st.booleans()))
def test_a_slow_reader_gets_all_that_was_said(put, reads):
    async def run() -> list:
        outbox, taken = Outbox(), []
        for i, (sample, event) in enumerate(put):
            outbox.put(sample, event)
            if i < len(reads) and reads[i]:
                outbox.wake()
                taken += await outbox.take()
        outbox.put(0, Finished((), True))
        outbox.wake()
        return taken + await outbox.take()

    taken = asyncio.run(run())
    for sample in range(3):
        mine = [event for index, event in put if index == sample] + [Finished((), True)] * (sample == 0)
        assert said(taken, sample) == said([(sample, event) for event in mine], sample)


def test_text_joins_and_of_previews_the_newest_is_kept():
    async def run() -> list:
        outbox = Outbox()
        for i in range(1_000):
            outbox.put(0, Text("a"))
            outbox.put(1, DecodedImage((i,), PIXELS, False))
        assert outbox.holds_preview(1) and not outbox.holds_preview(0) and not outbox.holds_preview(2)
        outbox.put(1, DecodedImage((7, 7), PIXELS, True))
        outbox.put(1, DecodedImage((8, 8), PIXELS, True))
        outbox.wake()
        return await outbox.take()

    taken = asyncio.run(run())
    assert [(i, getattr(event, "text", None) or event.codes) for i, event in taken] == [
        (0, "a" * 1_000), (1, (7, 7)), (1, (8, 8)),
    ]  # fmt: skip


def test_an_error_comes_after_what_was_put_before():
    async def run() -> list:
        outbox = Outbox()
        outbox.put(0, Text("a"))
        outbox.fail(RuntimeError("broken"))
        outbox.fail(RuntimeError("later"))
        taken = await outbox.take()
        with pytest.raises(RuntimeError, match="broken"):
            await outbox.take()
        return taken

    assert asyncio.run(run()) == [(0, Text("a"))]


def test_a_reader_whose_loop_has_ended_is_no_error():
    async def make() -> Outbox:
        return Outbox()

    outbox = asyncio.run(make())
    outbox.put(0, Text("a"))
    outbox.wake()
    outbox.fail(RuntimeError())
