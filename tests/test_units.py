"""Units: together they are the sources, each item once, whatever bytes stand there; what cannot be used says why."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import any_text

from nanochameleon import units
from nanochameleon.data.reading import MAX_CAPTION, Bad, File
from nanochameleon.documents import EndOfTurn, Text
from nanochameleon.errors import UserError
from nanochameleon.units import Loose, items, plan


def found(source: Path, form: str) -> list:
    """All items of all units."""
    return [item for unit in plan([source], form) for item, _ in items(unit, form)]


def texts(source: Path) -> list[str]:
    return [item.doc[0].text for item in found(source, "text")]


def lines(path: Path, *rows) -> Path:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


@pytest.fixture
def mine(tmp_path) -> Path:
    """A folder with the pictures red.png and blue.png, twice as wide as high, red and blue in their middles."""
    (tmp_path / "mine").mkdir()
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        picture = Image.new("RGB", (16, 8), "black")
        picture.paste(colour, (4, 0, 12, 8))
        picture.save(tmp_path / "mine" / f"{name}.png")
    return tmp_path / "mine"


# ---------------------------------------------------------------------------------------------------------------------
# Cutting


@given(st.lists(any_text.filter(str.strip), max_size=12), st.integers(1, 200))
def test_every_line_is_in_one_unit_however_long_units_are(written, stretch):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setitem(units.STRETCH, "text", stretch)
        path = lines(Path(name) / "a.jsonl", *({"text": text} for text in written))
        if not written:
            assert plan([path], "text") == []
            return
        assert texts(path) == [text.strip().encode("utf-8", "replace").decode() for text in written]
        cut = plan([path], "text")
        assert [unit.end for unit in cut[:-1]] == [unit.start for unit in cut[1:]]
        for unit in cut:
            assert [end for _, end in items(unit, "text")][-1:] in ([], [unit.end - unit.start])


@given(st.lists(any_text, max_size=9), st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
def test_a_long_text_is_whole_however_it_is_cut(written, stretch, block, longest):
    """Lines longer than `longest` are cut, but no letter is."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setitem(units.STRETCH, "text", stretch)
        patch.setattr(units, "BLOCK", block)
        patch.setattr(units, "MAX_LINE", longest)
        whole = (
            "a\n" + "\n".join(written).replace("\ufeff", "").replace("\0", "").encode("utf-8", "replace").decode() + "z"
        )
        (Path(name) / "a.txt").write_text(whole, encoding="utf-8", newline="")
        given_back = texts(Path(name) / "a.txt")
        blank = [text for text in given_back if not text.strip()]
        assert blank == [] and "".join("".join(given_back).split()) == "".join(whole.split())


@given(st.binary(max_size=300), st.integers(1, 80))
def test_no_bytes_stop_a_text(noise, stretch):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setitem(units.STRETCH, "text", stretch)
        patch.setattr(units, "BLOCK", 40)
        for ending in ("txt", "jsonl"):
            path = Path(name) / f"a.{ending}"
            path.write_bytes(b"# " + noise.replace(b"\0", b"") + b'\n{"text": "the end"}\n')
            last = found(path, "text")[-1]
            assert isinstance(last, Loose) and last.doc[0].text.rstrip().endswith(("the end", '"}'))
            last.doc[0].text.encode()


def test_bytes_that_are_no_utf_8_are_mended_and_counted_in_texts(tmp_path):
    bad = '{"text": "caf\xe9"}\n'.encode("latin-1")
    half = {"text": "half \ud83d"}
    first, second, third = found(lines(tmp_path / "a.jsonl", bad, half, {"text": "\ufffd is written so"}), "text")
    assert (first.doc, first.mended) == ([Text("caf\ufffd")], True)
    assert second.mended and not third.mended
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xef\xbf\xbd")
    assert [item.mended for item in found(tmp_path / "a.txt", "text")] == [True]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfas it is \xef\xbf\xbd")
    (whole,) = found(tmp_path / "b.txt", "text")
    assert (whole.doc, whole.mended) == ([Text("as it is \ufffd")], False)


def test_a_line_without_an_end_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "MAX_LINE", 100)
    for stretch in (10, 120, 1_000):
        monkeypatch.setitem(units.STRETCH, "text", stretch)
        path = lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b" * 250}, {"text": "c"})
        first, long, last = found(path, "text")
        assert (first.doc, long.reason, last.doc) == ([Text("a")], "lines too long", [Text("c")])


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_captions_come_with_their_pictures_from_lines_and_tables(mine, tmp_path):
    lines(
        mine / "captions.jsonl", {"image": "red.png", "caption": "red"}, {"file_name": "blue.png", "text": "x" * 2_000}
    )
    (mine / "test").mkdir()
    (mine / "test" / "metadata.csv").write_text("file_name,text\n../blue.png,out\nred.png,gone\n")
    first, second, out, gone = found(mine, "pairs")
    assert first.doc[0] == Text("red") and tuple(first.doc[1].pixels(8)[4, 4]) == (255, 0, 0)
    assert second.cut and len(second.doc[0].text) == MAX_CAPTION and not first.cut
    assert (out.reason, gone.reason) == ("outside the folder", "missing pictures")
    assert first.where == "mine/captions.jsonl at byte 0" and out.where == "mine/test/metadata.csv:2"


def test_a_chat_has_its_prompts_padded_and_its_answers_cropped(mine):
    first = [[{"text": "and this?"}, {"image": "red.png"}], [{"text": "red"}]]
    (item,) = found(lines(mine / "a.jsonl", {"turns": [*first, [{"text": "draw"}], [{"image": "blue.png"}]]}), "chat")
    text, shown, *_, drawn = item.doc
    assert [type(s) for s in item.doc] == [Text, File, EndOfTurn, Text, EndOfTurn, Text, EndOfTurn, File]
    assert text == Text("and this?")
    assert shown.pixels(8)[0].min() == 255 and tuple(shown.pixels(8)[4, 0]) == (0, 0, 0)  # a border above it
    assert (drawn.pixels(8) == (0, 0, 255)).all()  # and the sides of this one are gone


def test_documents_of_segments_come_as_they_are(mine):
    segments = [{"text": "see "}, {"image": "red.png"}, {"text": "\n"}]
    (item,) = found(lines(mine / "a.jsonl", {"segments": segments}), "interleaved")
    assert item.doc[::2] == [Text("see "), Text("\n")] and item.doc[1].fit == "crop" and not item.captioned


BROKEN_CHATS = {
    "no object": b'["turns"]\n',
    "no turns": {"text": "a"},
    "turns are text": {"turns": "ab"},
    "three turns": {"turns": [[{"text": "a"}]] * 3},
    "an empty turn": {"turns": [[{"text": "a"}], []]},
    "no text": {"turns": [[{"text": ""}], [{"text": "a"}]]},
    "a number": {"turns": [[{"text": 5}], [{"text": "a"}]]},
    "two things at once": {"turns": [[{"text": "a", "image": "red.png"}], [{"text": "a"}]]},
    "something else": {"turns": [[{"video": "a"}], [{"text": "a"}]]},
    "half a surrogate pair": {"turns": [[{"text": "\ud800"}], [{"text": "a"}]]},
    "up and out": {"turns": [[{"image": "../red.png"}], [{"text": "a"}]]},
    "missing": {"turns": [[{"image": "green.png"}], [{"text": "a"}]]},
    "latin-1": '{"turns": [[{"text": "caf\xe9"}], [{"text": "a"}]]}\n'.encode("latin-1"),
}


@pytest.mark.parametrize("kind", BROKEN_CHATS)
def test_a_broken_chat_is_bad_and_the_next_one_comes(kind, mine):
    good = {"turns": [[{"text": "a"}], [{"text": "b"}]]}
    bad, item = found(lines(mine / "a.jsonl", BROKEN_CHATS[kind], good), "chat")
    assert isinstance(bad, Bad) and bad.where == "a.jsonl at byte 0"
    assert item.doc == [Text("a"), EndOfTurn(), Text("b")]


def test_a_source_without_anything_of_the_form_is_refused_by_name(mine, tmp_path):
    (tmp_path / "a.txt").write_text("words")
    nothing = (mine, "pairs"), (mine, "chat"), (tmp_path / "nowhere", "text"), (tmp_path / "a.txt", "pairs")
    for source, form in nothing:
        with pytest.raises(UserError, match=f"{source.name} has nothing to prepare as {form}: that comes from"):
            plan([source], form)


def test_captions_alone_are_texts(mine):
    np.save(mine / "other.npy", np.zeros(3))
    (mine / "metadata.csv").write_text("file_name,text\nred.png,red\n")
    assert texts(mine) == ["red"]
