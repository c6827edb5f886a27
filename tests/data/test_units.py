"""Units: together they are the sources, each item once, whatever bytes they hold; what cannot be used says why."""

import csv
import errno
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import any_text
from written import IMAGE, lines, write_tar

from nanochameleon.data.reading import MAX_CAPTION, Bad, ImageFile, RawItem, text_lines, walk
from nanochameleon.data.sources import units
from nanochameleon.data.sources.units import CAPTIONED, items, plan
from nanochameleon.documents import EndOfTurn, Text
from nanochameleon.errors import UserError


def found(source: Path, form: str) -> list:
    """All items of all units."""
    return [item for unit in plan([source], form)[0] for item, _ in items(unit, form)]


def texts(source: Path) -> list[str]:
    return [item.doc[0].text for item in found(source, "text")]


@pytest.fixture
def mine(tmp_path) -> Path:
    """A folder with the images red.png and blue.png, twice as wide as high, red and blue in their middles."""
    (tmp_path / "mine").mkdir()
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        image = Image.new("RGB", (16, 8), "black")
        image.paste(colour, (4, 0, 12, 8))
        image.save(tmp_path / "mine" / f"{name}.png")
    return tmp_path / "mine"


# ---------------------------------------------------------------------------------------------------------------------
# Cutting


@given(st.lists(any_text.filter(str.strip), max_size=12), st.integers(1, 200))
def test_every_line_is_in_one_unit_however_long_units_are(written, stretch):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setitem(units.STRETCH, "text", stretch)
        path = lines(Path(name) / "a.jsonl", *({"text": text} for text in written))
        if not written:
            assert plan([path], "text")[0] == []
            return
        assert texts(path) == [text.strip().encode("utf-8", "replace").decode() for text in written]
        cut = plan([path], "text")[0]
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
            assert isinstance(last, RawItem) and last.doc[0].text.rstrip().endswith(("the end", '"}'))
            last.doc[0].text.encode()


def test_bytes_that_are_not_utf_8_are_mended_and_counted_in_texts(tmp_path):
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


def test_captions_come_with_their_images_from_lines_and_tables(mine, tmp_path):
    lines(
        mine / "captions.jsonl", {"image": "red.png", "caption": "red"}, {"file_name": "blue.png", "text": "x" * 2_000}
    )
    (mine / "test").mkdir()
    (mine / "test" / "metadata.csv").write_text("file_name,text\n../blue.png,out\nred.png,gone\n")
    first, second, out, gone = found(mine, "pairs")
    assert first.doc[0] == Text("red") and tuple(first.doc[1].pixels(8)[4, 4]) == (255, 0, 0)
    assert second.cut and len(second.doc[0].text) == MAX_CAPTION and not first.cut
    assert (out.reason, gone.reason) == ("outside the folder", "missing images")
    assert first.where == "mine/captions.jsonl:1" and out.where == "mine/test/metadata.csv:2"


def test_a_chat_has_its_prompts_padded_and_its_answers_cropped(mine):
    first = [[{"text": "and this?"}, {"image": "red.png"}], [{"text": "red"}]]
    (item,) = found(lines(mine / "a.jsonl", {"turns": [*first, [{"text": "draw"}], [{"image": "blue.png"}]]}), "chat")
    text, shown, *_, drawn = item.doc
    assert [type(s) for s in item.doc] == [Text, ImageFile, EndOfTurn, Text, EndOfTurn, Text, EndOfTurn, ImageFile]
    assert text == Text("and this?")
    assert shown.pixels(8)[0].min() == 255 and tuple(shown.pixels(8)[4, 0]) == (0, 0, 0)  # a border above it
    assert (drawn.pixels(8) == (0, 0, 255)).all()  # and the sides of this one are gone


def test_documents_of_segments_come_as_they_are(mine):
    segments = [{"text": "see "}, {"image": "red.png"}, {"text": "\n"}]
    for form in ("interleaved", "pairs"):
        (item,) = found(lines(mine / "a.jsonl", {"segments": segments}), form)
        assert item.doc[::2] == [Text("see "), Text("\n")] and item.doc[1].fit == "crop" and not item.captioned


def test_for_a_folders_images_segments_are_no_caption(mine):
    row = {"image": "red.png", "caption": "red", "segments": [{"text": "see "}, {"image": "blue.png"}]}
    (unit,), _ = plan([lines(mine / "captions.jsonl", row)], "pairs")
    ((item, _),) = items(unit, CAPTIONED)
    assert item.doc[0] == Text("red") and item.captioned


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
    assert isinstance(bad, Bad) and bad.where == "a.jsonl:1"
    assert item.doc == [Text("a"), EndOfTurn(), Text("b")]


def test_a_source_without_anything_of_the_form_is_refused_by_name(mine, tmp_path):
    (tmp_path / "a.txt").write_text("words")
    nothing = (mine, "pairs"), (mine, "chat"), (tmp_path / "a.txt", "pairs")
    for source, form in nothing:
        with pytest.raises(UserError, match=f"{source.name} has nothing to prepare as {form}: that comes from"):
            plan([source], form)
    with pytest.raises(UserError, match="nowhere is not there"):
        plan([tmp_path / "nowhere"], "text")


def test_captions_alone_are_texts(mine):
    np.save(mine / "other.npy", np.zeros(3))
    (mine / "metadata.csv").write_text("file_name,text\nred.png,red\n")
    assert texts(mine) == ["red"]


# ---------------------------------------------------------------------------------------------------------------------
# What goes in comes out: every row, member and file is an item or a bad one that is listed

words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\ufeff"), min_size=1, max_size=30)
words = words.filter(lambda text: text.strip() == text)
ROW_ENDS = st.sampled_from(["\n", "\r\n", "\r"])


def mixture(*kinds: str) -> st.SearchStrategy[list[tuple[str, str]]]:
    """(kind, text) of each item in a drawn order; "good" is one kind among the bad ones."""
    return st.lists(st.tuples(st.sampled_from(["good", "good", *kinds]), words), min_size=1, max_size=12)


def shown(found: list) -> tuple[list[str], int]:
    """(texts of what is good, number of what is bad)."""
    good = [item.doc[0].text for item in found if isinstance(item, RawItem)]
    return good, sum(isinstance(item, Bad) for item in found)


def expected(drawn: list[tuple[str, str]]) -> tuple[list[str], int]:
    good = [text for kind, text in drawn if kind == "good"]
    return good, len(drawn) - len(good)


def captions_of(folder: Path) -> tuple[list[str], int]:
    """What a folder of captions of one image has."""
    (folder / "a.png").write_bytes(IMAGE)
    assert plan([folder], "pairs")[1] == []
    made = found(folder, "pairs")
    assert all(item.doc[1].path == folder / "a.png" for item in made if isinstance(item, RawItem))
    return shown(made)


BAD_ROWS = {
    "broken": '{"file_name": "a.png", "text"', "a list": '["a.png", "a cat"]',
    "null": '{"file_name": "a.png", "text": null}',
    "not a number": '{"file_name": "a.png", "text": NaN}', "list of texts": '{"file_name": "a.png", "text": ["a"]}',
    "no name": '{"text": "a"}', "missing": '{"file_name": "b.png", "text": "a"}', "nothing": "{}",
    "NUL": '{"file_name": "a.png", "text": "\0"}', "outside": '{"file_name": "../a.png", "text": "a"}',
}  # fmt: skip


@given(mixture(*BAD_ROWS), st.sampled_from(["captions.jsonl", "metadata.jsonl", "Captions.JSONL"]), st.data())
def test_each_row_of_a_caption_file_is_a_caption_or_a_bad_one(drawn, name, data):
    rows = [BAD_ROWS.get(kind) or json.dumps({"file_name": "a.png", "text": text}) for kind, text in drawn]
    with tempfile.TemporaryDirectory() as place:
        content = "".join(row + data.draw(ROW_ENDS) * data.draw(st.integers(1, 2)) for row in rows)
        (Path(place) / name).write_bytes(data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + content.encode())
        assert captions_of(Path(place)) == expected(drawn)


BAD_TABLE_ROWS = {
    "stray quote": 'a.png,"a 5 foot sign', "backslashes": 'a.png,"he said \\"hi, you\\" loudly"',
    "commas": "a.png,a, b", "text after a quote": 'a.png,"a" cat', "no caption": "a.png", "no name": ",a",
    "missing": "b.png,a", "latin-1": "a.png,caf\udce9",
}  # fmt: skip


@given(mixture(*BAD_TABLE_ROWS), st.sampled_from(["metadata.csv", "Metadata.CSV"]), ROW_ENDS, st.booleans())
def test_each_row_of_a_table_is_a_caption_or_a_bad_one(drawn, name, end, quoted):
    file = io.StringIO(newline="")
    write = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL).writerow
    write(["file_name", "text"])
    for kind, text in drawn:
        file.write(BAD_TABLE_ROWS[kind] + end) if kind in BAD_TABLE_ROWS else write(["a.png", text])
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / name).write_bytes(file.getvalue().encode(errors="surrogateescape"))
        assert captions_of(Path(place)) == expected(drawn)


BAD_CHATS = {
    "broken": '{"turns": [', "no answer": '{"turns": [[{"text": "a"}]]}', "no turns": "{}", "null": '{"turns": null}',
    "an image that is missing": '{"turns": [[{"image": "b.png"}], [{"text": "a"}]]}', "number": "5",
}  # fmt: skip


@given(mixture(*BAD_CHATS), ROW_ENDS)
def test_each_row_of_a_chat_is_a_conversation_or_a_bad_one(drawn, end):
    good = [{"turns": [[{"text": text}], [{"text": "yes"}]]} for _, text in drawn]
    rows = [BAD_CHATS.get(kind) or json.dumps(row) for (kind, _), row in zip(drawn, good, strict=True)]
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "a.jsonl").write_bytes("".join(row + end for row in rows).encode())
        assert shown(found(Path(place), "chat")) == expected(drawn)


GOOD_SAMPLES = {
    "good": lambda key, text: [(f"{key}.jpg", IMAGE), (f"{key}.txt", text)],
    "text first": lambda key, text: [(f"{key}.txt", text), (f"{key}.PNG", IMAGE)],
    "dots": lambda key, text: [(f"{key}.2021.01.jpg", IMAGE), (f"{key}.2021.01.txt", text)],
    "dots and more": lambda key, text: [
        (f"{key}.2021.cls", b"5"), (f"{key}.2021.jpg", IMAGE), (f"{key}.2021.txt", text), (f"{key}.2021.npy", b"5"),
    ],
    "more": lambda key, text: [
        (f"{key}.cls", b"5"), (f"{key}.jpg", IMAGE), (f"{key}.mask.png", IMAGE), (f"{key}.txt", text),
    ],
    "empty text": lambda key, text: [
        (f"{key}.jpg", IMAGE), (f"{key}.json", json.dumps({"caption": text.decode()}).encode()), (f"{key}.txt", b" "),
    ],
    "next to a Mac's": lambda key, text: [
        (f"._{key}.jpg", b"Mac OS X"), (f"{key}.jpg", IMAGE), (f".ipynb_checkpoints/{key}.txt", b"no"),
        (f"{key}.txt", text),
    ],
}  # fmt: skip
BAD_SAMPLES = {
    "text alone": lambda key: [(f"{key}.txt", b"a")],
    "image alone": lambda key: [(f"{key}.jpg", IMAGE)],
    "something else": lambda key: [(f"{key}.mp4", b"a"), (f"{key}.npy", b"a")],
    "without an ending": lambda key: [(key, b"a")],
    "dots, image alone": lambda key: [(f"{key}.2021.jpg", IMAGE)],
    "UTF-16": lambda key: [(f"{key}.jpg", IMAGE), (f"{key}.txt", "a".encode("utf-16"))],
    "UTF-16 without a mark": lambda key: [(f"{key}.jpg", IMAGE), (f"{key}.txt", "words".encode("utf-16-le"))],
    "a link": lambda key: [(f"{key}.jpg", None)],
}


@given(mixture(*BAD_SAMPLES), st.sampled_from([*GOOD_SAMPLES]), st.booleans(), st.booleans())
def test_each_sample_of_a_tar_is_a_captioned_image_or_a_bad_one(drawn, how, same_name, joined):
    texts, bad = expected(drawn)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "0.tar"
        with tarfile.open(path, "w") as tar:
            for n, (kind, text) in enumerate(drawn):
                key = "good" if same_name and kind == "good" else f"{n:05d}"
                bad_one = kind in BAD_SAMPLES
                for name, data in BAD_SAMPLES[kind](key) if bad_one else GOOD_SAMPLES[how](key, text.encode()):
                    info = tarfile.TarInfo(name)
                    info.size, info.type = len(data or b""), tarfile.SYMTYPE if data is None else tarfile.REGTYPE
                    tar.addfile(info, io.BytesIO(data or b""))
        if joined:
            write_tar(Path(place) / "other", [("a.jpg", IMAGE), ("a.txt", b"a")])
            path.write_bytes(path.read_bytes() + (Path(place) / "other").read_bytes())
        made = found(path, "pairs")
        assert shown(made) == (texts, bad + joined)
        assert all(item.doc[1].data == IMAGE for item in made if isinstance(item, RawItem))


GOOD_FILES = {
    ".txt": str, ".TXT": str, ".jsonl": lambda text: json.dumps({"text": text}),
    ".JSONL": lambda text: "\ufeff" + json.dumps({"caption": text}) + "\r\r",
}  # fmt: skip
BAD_FILES = {
    "packed.jsonl.gz": b"\x1f\x8b", "a table.csv": b"text\na", "notes": b"a", "empty.txt": b"", "blank.jsonl": b"\n\n",
    "UTF-16.txt": "words".encode("utf-16"), "no mark.txt": "words".encode("utf-16-le"),
    "rows.jsonl": "{}".encode("utf-16"), "NUL.TXT": b"abc\0def", "broken.jsonl": b"{", "dangling.txt": None,
}  # fmt: skip
HIDDEN = "._a.txt", ".ipynb_checkpoints/a.txt", ".git/a.jsonl", "an image.PNG"


@given(mixture(*BAD_FILES), st.lists(st.tuples(st.sampled_from([*GOOD_FILES]), st.integers(0, 2)), min_size=12))
def test_each_file_of_a_folder_of_texts_is_a_text_or_a_bad_one(drawn, how):
    """In the folder, in a subfolder or in one that is a link, among hidden files and images."""
    with tempfile.TemporaryDirectory() as place:
        mine, other = Path(place) / "mine", Path(place) / "other"
        for folder in (mine / "below" / "sub", other, *((mine / name).parent for name in HIDDEN)):
            folder.mkdir(parents=True, exist_ok=True)
        (mine / "link").symlink_to(other)
        for name in HIDDEN:
            (mine / name).write_text("hidden")
        good: dict[Path, str] = {mine / "0.txt": "one at least"}
        for n, ((kind, text), (ending, depth)) in enumerate(zip(drawn, how, strict=False), 1):
            folder = (mine, mine / "below" / "sub", mine / "link")[depth]
            if kind == "good":
                good[folder / f"{n:02d}{ending}"] = text
            elif BAD_FILES[kind] is None:
                (folder / f"{n:02d} {kind}").symlink_to("nowhere")
            else:
                (folder / f"{n:02d} {kind}").write_bytes(BAD_FILES[kind])
        for path, text in good.items():
            path.write_bytes(GOOD_FILES[path.suffix](text).encode())
        made, bad = shown(found(mine, "text"))
        assert made == [good[path] for path in sorted(good)]
        assert bad + len(plan([mine], "text")[1]) == expected(drawn)[1]


@given(st.binary(max_size=60), st.integers(1, 12))
def test_lines_end_with_either_sign_and_are_the_same_however_long_they_may_be(noise, longest):
    """bytes.splitlines is the reference; a longer line is one that is left out, and the others come all the same."""
    file = io.BytesIO(noise)
    lines = list(text_lines(file, 0, len(noise), longest))
    assert [line for _, line in text_lines(file, 0, len(noise), 100)] == noise.splitlines(keepends=True)
    assert all(noise[place : place + len(line)] == line for place, line in lines if line is not None)
    short = [line for line in noise.splitlines(keepends=True) if len(line.rstrip(b"\r\n")) < longest - 1]
    kept = [line.rstrip(b"\r\n") for _, line in lines if line is not None and line.rstrip(b"\r\n")]
    assert [line.rstrip(b"\r\n") for line in short if line.rstrip(b"\r\n")] == [k for k in kept if len(k) < longest - 1]


def test_a_folder_is_read_once_whatever_links_lead_to_it(tmp_path):
    """Its own name comes before those that links give it."""
    (tmp_path / "mine" / "z").mkdir(parents=True)
    (tmp_path / "mine" / "z" / "a.txt").write_text("a")
    for name, target in (("a link", "z"), ("a loop", ".")):
        (tmp_path / "mine" / name).symlink_to(target)
    (tmp_path / "mine" / "z" / "up").symlink_to("..")
    files, left = walk(tmp_path / "mine")
    assert [str(path.relative_to(tmp_path / "mine")) for path in files] == ["z/a.txt"]
    assert [bad.where for bad in left] == ["a link", "a loop", "z/up"]
    assert {bad.reason for bad in left} == {"links to folders that are read already"}


# ---------------------------------------------------------------------------------------------------------------------
# What may not be read


@pytest.fixture
def locked():
    """Good texts and captions next to a folder and a file that may not be read; seen by a user who is not root."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        mine = Path(name) / "mine"
        for folder in (mine, mine / "lost+found", mine / "sub"):
            folder.mkdir()
            (folder / "captions.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
        (mine / "a.txt").write_text("a text")
        (mine / "a.png").write_bytes(IMAGE)
        if user == 0:
            for path in (Path(name), mine, *mine.rglob("*")):
                os.chown(path, 65_534, -1)
            os.seteuid(65_534)
        (mine / "lost+found").chmod(0)
        (mine / "sub" / "captions.jsonl").chmod(0)
        yield mine
        mine.chmod(0o700)
        os.seteuid(user)


@pytest.mark.parametrize("form, texts", [("pairs", ["a"]), ("text", ["a text", "a"])])
def test_what_may_not_be_read_is_bad_and_the_rest_comes(form, texts, locked):
    made, unread = found(locked, form), plan([locked], form)[1]
    assert shown(made) == (texts, 1)
    assert Bad("mine/sub/captions.jsonl", "files that may not be read") in made
    assert Bad("mine/lost+found", "folders that may not be read") in unread
    locked.chmod(0)
    with pytest.raises(UserError, match=r"cannot read the folder .*mine: Permission denied"):
        plan([locked], form)


@pytest.mark.parametrize(
    "name, form", [("a.jsonl", "text"), ("a.txt", "text"), ("metadata.csv", "pairs"), ("0.tar", "pairs")]
)
def test_a_fault_of_the_disk_names_the_source_and_loses_nothing(name, form, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"some words")
    unit = plan([tmp_path / name], form)[0][0]

    def fails(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(UserError, match=rf"cannot read .*{name}: Input/output error; once that is fixed"):
        list(items(unit, form))
