"""Stop strings: the text ends at the first one, however it is split, and no more is held back than must be."""

from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.web.openai.stop_strings import StopStrings

texts = st.text("ab\n", max_size=20)
stop_lists = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: the shortest beginning of the text that ends with a stop string, without the longest such one."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], True
    return text, False


@given(texts, stop_lists, st.data())
def test_a_text_ends_at_its_first_stop_string_however_it_is_split(text, stops, data):
    stop, sent, rest = StopStrings(stops), "", text
    while rest and not stop.met:
        n = data.draw(st.integers(1, len(rest)))
        sent, rest = sent + stop.add(rest[:n]), rest[n:]
    assert (sent + stop.flush(), stop.met) == expected(text, stops)


@given(texts, stop_lists)
def test_only_what_may_begin_a_stop_string_is_held_back(text, stops):
    stop = StopStrings(stops)
    sent = stop.add(text)
    if not stop.met:
        held = text[len(sent) :]
        assert sent + held == text
        assert not held or any(s.startswith(held) for s in stops)
        # Nothing before it began one: else a longer end would be held.
        assert not any(s.startswith(text[i:]) for s in stops for i in range(len(sent)))


def test_an_image_decides_that_no_stop_string_began():
    stop = StopStrings(["END"])
    assert [stop.add("the EN"), stop.flush(), stop.add("D"), stop.met] == ["the ", "EN", "D", False]
