"""A folder of images: what is good is used, what is bad is skipped, counted and listed, and never stops the rest."""

import csv
import io
import json
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nanochameleon.data import RawImage
from nanochameleon.data.sources.folder import FolderSource, Report, find_units, is_test, prepare_folder, read_images
from nanochameleon.documents import Text
from nanochameleon.errors import UserError

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]


def save(path: Path, colour=(250, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), colour).save(path)


def line(name, text, keys=("file_name", "text")) -> bytes:
    return json.dumps(dict(zip(keys, (name, text), strict=True))).encode() + b"\n"


def png_bytes() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


BLANK = b" \t\r\n\xef\xbb\xbf"  # what an empty line may hold
BAD_LINES = {
    "broken": (b'{"file_name": "good.png", "text"\n', "broken lines"),
    "a list": (b'["good.png", "a cat"]\n', "broken lines"),
    "nested too deep": (b"[" * 100_000 + b"\n", "broken lines"),
    "latin-1": ('{"file_name": "good.png", "text": "caf\xe9"}\n'.encode("latin-1"), "not in UTF-8"),
    "half a surrogate pair": (b'{"file_name": "good.png", "text": "\\ud83d"}\n', "not in UTF-8"),
    "no name": (b'{"text": "a cat"}\n', "without a file name"),
    "name is a number": (line(5, "a cat"), "without a file name"),
    "no caption": (b'{"file_name": "good.png"}\n', "without a caption"),
    "blank caption": (line("good.png", " \n\t"), "without a caption"),
    "up and out": (line("sub/../../outside.png", "a secret"), "outside the folder"),
    "absolute": (line("/etc/passwd", "a secret"), "outside the folder"),
    "missing": (line("nowhere.png", "a cat"), "missing images"),
    "a folder": (line("sub", "a cat"), "missing images"),
    "NUL in the name": (line("good.png\0", "a cat"), "missing images"),
    "name too long": (line("x" * 5_000, "a cat"), "missing images"),
    "text as image": (line("text.png", "a cat"), "unreadable images"),
    "empty image": (line("empty.png", "a cat"), "unreadable images"),
    "cut image": (line("cut.png", "a cat"), "unreadable images"),
}


@pytest.fixture
def folder(tmp_path):
    """Good images good.png and sub/also.png, three that cannot be read, and one outside."""
    save(tmp_path / "mine" / "good.png")
    save(tmp_path / "mine" / "sub" / "also.png", COLOURS[1])
    save(tmp_path / "outside.png")
    (tmp_path / "mine" / "text.png").write_text("this is no image")
    (tmp_path / "mine" / "empty.png").write_bytes(b"")
    (tmp_path / "mine" / "cut.png").write_bytes(png_bytes()[:-900])
    return tmp_path / "mine"


def captions_in(directory: Path) -> dict[str, list[str]]:
    stored = FolderSource(directory, "train", 0).stored
    return {item["file"]: item["captions"] for item in stored.items}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_item_is_skipped_with_its_line_and_reason(kind, folder, tmp_path):
    bad, reason = BAD_LINES[kind]
    (folder / "captions.jsonl").write_bytes(line("good.png", "red") + bad + b"\n" + line("sub/also.png", "green"))
    report = prepare_folder(folder, tmp_path / "prepared", 16)
    assert [item.reason for item in report.skipped] == [reason]
    assert report.skipped[0].where == "captions.jsonl:2" or reason == "unreadable images"
    assert (report.images, report.captions) == (2, 2) and f"1 skipped: 1 {reason}" in str(report)
    assert captions_in(tmp_path / "prepared") == {"good.png": ["red"], "sub/also.png": ["green"]}


def test_all_bad_items_together_are_counted_and_listed(folder, tmp_path):
    lines = b"".join(bad for bad, _ in BAD_LINES.values())
    (folder / "captions.jsonl").write_bytes(line("good.png", "red") + lines + line("sub/also.png", "green"))
    report = prepare_folder(folder, tmp_path / "prepared", 16)
    assert Counter(item.reason for item in report.skipped) == Counter(reason for _, reason in BAD_LINES.values())
    listed = (tmp_path / "prepared" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(entry) for entry in listed] == [asdict(bad) for bad in report.skipped]
    assert report.images == 2


@given(st.binary(max_size=200))
def test_no_bytes_in_a_caption_file_stop_the_good_lines(noise):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder / "good.png")
        (folder / "captions.jsonl").write_bytes(noise + b"\n" + line("good.png", "red"))
        report = Report()
        found = [item["captions"] for _, item in read_images(folder, find_units(folder, report), 16, report)]
        if not json.detect_encoding(noise[:4] + b"\n{").startswith("utf-8"):
            assert found == [] and [bad.reason for bad in report.skipped] == ["files not in UTF-8"]
            return
        assert found == [["red"]]
        assert len(report.skipped) == sum(bool(part.strip(BLANK)) for part in noise.splitlines())


@pytest.mark.parametrize(
    "content", [None, b"", b"\n\n", b"nonsense\n", line("nowhere.png", "a cat"), line("cut.png", "a cat")]
)
def test_a_folder_with_nothing_to_use_is_refused_and_leaves_nothing(content, folder, tmp_path):
    if content is not None:
        (folder / "captions.jsonl").write_bytes(content)
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"mine has no (caption file|image with a caption)"):
        prepare_folder(folder, tmp_path / "prepared", 16)
    assert set(tmp_path.iterdir()) == before


def test_a_path_that_is_no_folder_or_an_empty_one_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("absent", "file", "empty"):
        with pytest.raises(UserError, match=name):
            prepare_folder(tmp_path / name, tmp_path / "prepared", 16)


@pytest.mark.parametrize("keys", [("file_name", "text"), ("image", "caption"), ("file_name", "caption")])
@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl", "metadata.csv"])
def test_every_spelling_of_a_caption_file_is_read(name, keys, folder, tmp_path):
    rows = [("good.png", 'red, "bright",\nand flat'), ("sub/also.png", "grün 🟩")]
    if name.endswith("csv"):
        with open(folder / name, "w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([(*keys, "licence"), *((*row, "none") for row in rows)])
    else:
        (folder / name).write_bytes(b"".join(line(*row, keys) for row in rows))
    report = prepare_folder(folder, tmp_path / "prepared", 16)
    assert report.skipped == []
    assert captions_in(tmp_path / "prepared") == {file: [text] for file, text in rows}


def test_bad_rows_of_a_csv_are_skipped(folder, tmp_path):
    huge = b"good.png," + b"x" * 200_000 + b"\n"  # more than the csv module takes for one field
    rows = b"file_name,text\ngood.png,red\ngood.png\n,no name\n" + huge + b"good.png,caf\xe9\nsub/also.png,green\n"
    (folder / "metadata.csv").write_bytes(rows)
    report = prepare_folder(folder, tmp_path / "prepared", 16)
    assert [(bad.where, bad.reason) for bad in report.skipped] == [
        ("metadata.csv:3", "without a caption"),
        ("metadata.csv:4", "without a file name"),
        ("metadata.csv:5", "broken lines"),
        ("metadata.csv:6", "not in UTF-8"),
    ]
    assert captions_in(tmp_path / "prepared") == {"good.png": ["red"], "sub/also.png": ["green"]}


def test_a_huge_caption_is_cut_and_counted(folder, tmp_path):
    (folder / "captions.jsonl").write_bytes(line("good.png", "word " * 2_000_000) + line("sub/also.png", "y" * 1_000))
    report = prepare_folder(folder, tmp_path / "prepared", 16)
    assert report.cut == 1 and "1 of them cut" in str(report)
    assert captions_in(tmp_path / "prepared") == {"good.png": [("word " * 200).strip()], "sub/also.png": ["y" * 1_000]}


def test_subfolders_for_training_and_test_are_kept_apart(tmp_path):
    for number, place in enumerate(["train", "train", "train", "test", "validation"]):
        save(tmp_path / "mine" / place / f"{number}.png", COLOURS[number])
        with open(tmp_path / "mine" / place / "metadata.jsonl", "ab") as file:
            file.write(line(f"{number}.png", f"colour {number}"))
    prepare_folder(tmp_path / "mine", tmp_path / "prepared", 16)
    train, test = (FolderSource(tmp_path / "prepared", split, 0) for split in ("train", "test"))
    assert {train.caption(i) for i in range(train.size)} == {"colour 0", "colour 1", "colour 2"}
    assert {test.caption(i) for i in range(test.size)} == {"colour 3", "colour 4"}
    assert tuple(test.pixels(0)[8, 8]) == COLOURS[3]


@given(st.lists(st.integers(0, 50), min_size=2, max_size=300))
def test_without_such_folders_equal_images_stay_in_one_split_and_neither_is_empty(lucks):
    items = [{"folder": f"{n}.png", "luck": luck} for n, luck in enumerate(lucks)]
    test = is_test(items)
    held_out = {luck for luck, is_held in zip(lucks, test, strict=True) if is_held}
    assert held_out.isdisjoint(luck for luck, is_held in zip(lucks, test, strict=True) if not is_held)
    different = len(set(lucks))
    assert len(held_out) == (max(1, different // 20) if different > 1 else 0)


def test_a_split_that_is_empty_is_refused(folder, tmp_path):
    (folder / "captions.jsonl").write_bytes(line("good.png", "red"))
    prepare_folder(folder, tmp_path / "prepared", 16)
    assert FolderSource(tmp_path / "prepared", "train", 0).size == 1
    with pytest.raises(UserError, match="test split"):
        FolderSource(tmp_path / "prepared", "test", 0)


@pytest.fixture
def source(tmp_path):
    """Four images to train on, each with three captions that name its colour."""
    lines = b""
    for number, colour in enumerate(COLOURS):
        save(tmp_path / "mine" / f"{number}.png", colour)
        lines += b"".join(line(f"{number}.png", f"{colour} in words {words}") for words in "abc")
    (tmp_path / "mine" / "captions.jsonl").write_bytes(lines)
    prepare_folder(tmp_path / "mine", tmp_path / "prepared", 16)
    return FolderSource(tmp_path / "prepared", "train", 7)


@pytest.mark.parametrize("form", FolderSource.FORMS)
def test_documents_pair_each_image_with_its_own_captions(form, source, tmp_path):
    source, orders = FolderSource(tmp_path / "prepared", "train", 7, form), Counter()
    for i in range(200):
        doc = source.document(i)
        orders[" ".join(type(s).__name__ for s in doc)] += 1
        texts = [s.text for s in doc if isinstance(s, Text)]
        colours = [tuple(s.pixels[8, 8].tolist()) for s in doc if isinstance(s, RawImage)]
        assert form == "text" or [text.split(" in ")[0] for text in texts] == [str(colour) for colour in colours]
    expected = {
        "pairs": {"RawImage Text", "Text RawImage"}, "interleaved": {"Text RawImage Text RawImage"},
        "text": {"Text"}, "drawings": {"Text RawImage"},
    }  # fmt: skip
    assert set(orders) == expected[form] and min(orders.values()) > 70
    assert {source.caption(i)[-1] for i in (0, 4, 8)} == {"a", "b", "c"}  # another caption in every epoch


def test_captions_show_every_one_before_any_twice(source):
    assert len(set(source.captions(12))) == 12 and len(list(source.captions(30))) == 30


def test_a_document_depends_on_the_index_alone(source, tmp_path):
    def shown(doc):
        return [s.pixels.tobytes() if isinstance(s, RawImage) else s for s in doc]

    again = FolderSource(tmp_path / "prepared", "train", 7)
    forwards = [shown(source.document(i)) for i in range(50)]
    assert [shown(again.document(i)) for i in reversed(range(50))][::-1] == forwards
    other = FolderSource(tmp_path / "prepared", "train", 8)
    assert [shown(other.document(i)) for i in range(50)] != forwards


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is skipped in silence


def said(folder: Path, prepared: Path) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """(captions of each image, where and why something was skipped)."""
    report = prepare_folder(folder, prepared, 16)
    return captions_in(prepared), [(bad.where, bad.reason) for bad in report.skipped]


TABLES = {
    "a stray quote takes no row with it": (
        'good.png,"a 5 foot sign\nsub/also.png,second\ngood.png,third\n',
        {"sub/also.png": ["second"], "good.png": ["third"]}, [(2, "broken quotes")],
    ),
    "nor does one that a later row closes": (
        'good.png,"a 5 foot sign\nsub/also.png,a 6 foot sign"\ngood.png,"third, at last"\n',
        {"sub/also.png": ['a 6 foot sign"'], "good.png": ["third, at last"]}, [(2, "broken quotes")],
    ),
    "a caption of several lines is one": (
        'good.png,"a cat,\na dog, and\nmore"\nsub/also.png,\'a bird\'\n',
        {"good.png": ["a cat,\na dog, and\nmore"], "sub/also.png": ["'a bird'"]}, [],
    ),
    "commas": (
        "good.png,a cat, a dog\nsub/also.png,b\n", {"sub/also.png": ["b"]}, [(2, "more fields than the header")],
    ),
    "a quote that stays open beyond the longest field": (
        'good.png,"a 5 foot sign\n' + "sub/also.png,second\n" * 10_000,
        {"sub/also.png": ["second"] * 10_000}, [(2, "broken quotes")],
    ),
    "a comma at the end of every line": (
        "good.png,a cat,\nsub/also.png,b,,\n", {"good.png": ["a cat"], "sub/also.png": ["b"]}, [],
    ),
    "a row with too many commas is swallowed": (
        'good.png,"a 5 foot sign\nsub/also.png,a cat, a dog\ngood.png,third"\n',
        {"good.png": ['third"']}, [(2, "broken quotes"), (3, "more fields than the header")],
    ),
    "backslashes": ('good.png,"he \\"said\\" so"\nsub/also.png,b\n', {"sub/also.png": ["b"]}, [(2, "broken quotes")]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_loses_no_row_and_no_half_of_a_caption(kind, folder, tmp_path):
    rows, captions, bad = TABLES[kind]
    (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    assert said(folder, tmp_path / "out") == (captions, [(f"metadata.csv:{n}", reason) for n, reason in bad])


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_table_of_another_kind_is_refused_with_the_header_that_was_found(separator, folder, tmp_path):
    (folder / "metadata.csv").write_text(f"file_name{separator}text\ngood.png{separator}red\n")
    with pytest.raises(UserError) as error:
        prepare_folder(folder, tmp_path / "out", 16)
    assert f"without a file name: its fields are {f'file_name{separator}text'!a}" in str(error.value)
    assert len(str(error.value).replace(str(tmp_path), "")) < 300


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.csv"])
def test_another_encoding_is_named(name, encoding, folder, tmp_path):
    content = line("good.png", "red").decode() if name.endswith("jsonl") else "file_name,text\ngood.png,red\n"
    (folder / name).write_bytes(content.encode(encoding))
    (folder / "sub" / "captions.jsonl").write_bytes(line("also.png", "green"))
    assert said(folder, tmp_path / "out") == ({"sub/also.png": ["green"]}, [(name, "files not in UTF-8")])


def test_what_is_not_read_is_counted_and_named_and_hidden_files_are_not(folder, tmp_path):
    (folder / "captions.jsonl").write_bytes(line("good.png", "red"))
    for name in (
        "metadata.csv",
        "sub/0.tar",
        "sub/deep/captions.jsonl",
        "more.jsonl.gz",
        ".DS_Store",
        "._captions.jsonl",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"file_name,text\n")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "captions.jsonl").write_bytes(line("../good.png", "green"))
    report = prepare_folder(folder, tmp_path / "out", 16)
    assert captions_in(tmp_path / "out") == {"good.png": ["red"]}
    assert [bad.where for bad in report.skipped] == [
        "metadata.csv",
        "more.jsonl.gz",
        "sub/0.tar",
        "sub/deep/captions.jsonl",
    ]
    assert str(report) == "1 images with 1 captions; 4 skipped: 4 files that are not read"


def test_a_folder_of_packed_captions_is_refused_with_their_name(folder, tmp_path):
    (folder / "captions.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(
        UserError, match=r"has no caption file: .*; it has captions\.jsonl\.gz \(files that are not read\)"
    ):
        prepare_folder(folder, tmp_path / "out", 16)


NAMES = ["caf\u00e9.png", "cafe\u0301.png"]  # as one letter; as a letter and an accent, so a Mac writes it


@pytest.mark.parametrize("listed, there", [NAMES, NAMES[::-1]])
def test_a_name_finds_the_only_file_that_is_spelled_with_other_code_points(listed, there, folder, tmp_path):
    folder_there = there.removesuffix(".png")
    save(folder / folder_there / there)
    (folder / "captions.jsonl").write_bytes(
        line(f"{listed.removesuffix('.png')}/{listed}", "red") + line("caf.png", "x")
    )
    assert said(folder, tmp_path / "out") == (
        {f"{folder_there}/{there}": ["red"]}, [("captions.jsonl:2", "missing images")]
    )  # fmt: skip


def test_of_two_files_whose_names_look_the_same_each_is_found_by_its_own(folder, tmp_path):
    for name, colour in zip(NAMES, COLOURS, strict=False):
        save(folder / name, colour)
    three = "\u1e69", "s\u0323\u0307", "s\u0307\u0323"  # one letter: two files, and a row that spells it a third way
    for name in three[1:]:
        save(folder / f"{name}.png", COLOURS[4])
    rows = [line(name, str(n)) for n, name in enumerate([*NAMES, *(f"{name}.png" for name in three)])]
    (folder / "captions.jsonl").write_bytes(b"".join(rows))
    captions, skipped = said(folder, tmp_path / "out")
    assert captions == {name: [str(n)] for n, name in enumerate(NAMES)} | {
        f"{three[1]}.png": ["3"],
        f"{three[2]}.png": ["4"],
    }
    assert skipped == [("captions.jsonl:3", "missing images")]


def test_an_absolute_name_inside_the_folder_is_read(folder, tmp_path, monkeypatch):
    rows = [line(str(folder / "sub" / "also.png"), "green"), line(str(tmp_path / "outside.png"), "secret")]
    (folder / "captions.jsonl").write_bytes(b"".join(rows))
    monkeypatch.chdir(tmp_path)
    assert said(Path("mine"), tmp_path / "out") == (
        {"sub/also.png": ["green"]}, [("captions.jsonl:2", "outside the folder")]
    )  # fmt: skip


def test_links_are_followed_to_files_and_folders_and_no_folder_is_read_twice(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "captions.jsonl").write_bytes(line("there.png", "blue"))
    save(tmp_path / "elsewhere" / "there.png", COLOURS[2])
    (folder / "train").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to("train")
    (folder / "captions.jsonl").write_bytes(line("link.png", "red"))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    assert said(folder, tmp_path / "out") == (
        {"link.png": ["red"], "again/there.png": ["blue"]}, [("train", "links to folders that are read already")]
    )  # fmt: skip
