"""The files of a source, cut into units of work, and the items of a unit: documents whose images are not decoded.

    form           from
    pairs          captioned images: tars (webdataset.py), caption files (caption_files.py); either one first
    drawings       the same, the caption always first
    interleaved    the same, two in a row; and .jsonl of {"segments": [{"text": "see"}, {"image": "a.png"}, ...]}
    text           .jsonl of {"text": "..."}, a document a line; .txt, a long text each; captions without images
    chat           .jsonl of {"turns": [[{"text": "what is this?"}, {"image": "a.png"}], [{"text": "a cat"}], ...]}

A unit is a tar, a table, or a range of bytes of another file that begins and ends with a line. The units depend on the
sources alone, so processes agree on them without talking to each other.

In a folder, text files are read at any depth, caption files and tars in the folder itself and in its subfolders.
Endings are read in any letter case, links to files and folders are followed, hidden files are left out. Every other
file, except for images, is counted and listed as not read.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from nanochameleon.data.reading import (
    MAX_LINE,
    NOT_READ,
    TEXT_KEYS,
    Bad,
    ImageFile,
    Item,
    RawItem,
    accounted,
    first_few,
    first_text,
    is_blank,
    is_utf8,
    json_row,
    open_utf8,
    size_of,
    text_lines,
    walk,
)  # fmt: skip
from nanochameleon.data.sources.caption_files import Row, caption_files, csv_rows, fields_of, find_image, read_row
from nanochameleon.data.sources.webdataset import captioned_images, tars_in
from nanochameleon.documents import EndOfTurn, Text
from nanochameleon.errors import UserError

FORMS = ("pairs", "drawings", "interleaved", "text", "chat")
CAPTIONED = "captioned"  # of folder.py: each row is an image and its caption, whatever else it holds
STRETCH = {"text": 2**26, "pairs": 2**20, "drawings": 2**20, "interleaved": 2**21, "chat": 2**21}  # bytes, about
BLOCK = 2**20  # bytes of a .txt that are one item


@dataclass(frozen=True)
class Unit:
    """Bytes start .. end-1 of a file; `name` is the file's name in lists, without its place on this machine."""

    path: Path
    name: str
    start: int
    end: int

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole file."""
        return self.start == 0 and self.end >= size_of(self.path)


# ---------------------------------------------------------------------------------------------------------------------
# Units


def plan(sources: Sequence[Path], form: str) -> tuple[list[Unit], list[Bad]]:
    """All units in order, and the files of the sources that are in no unit.

    Raises UserError for a source that has nothing of this form, or cannot be read.
    """
    endings = {"text": (".txt", ".jsonl", ".csv", ".tar"), "chat": (".jsonl",)}.get(form, (".tar", ".jsonl", ".csv"))
    units, unread = [], []
    for source in sources:
        if not os.path.lexists(source):
            raise UserError(f"{source} is not there: give files or folders that are")
        name = source.resolve().name
        files, left = survey(source, form, name if os.path.isdir(source) else "")
        if not files or any(path.suffix.lower() not in endings for path, _ in files):
            has = f"; it has {first_few(left)}" if left else ""
            raise UserError(f"{source} has nothing to prepare as {form}: that comes from {', '.join(endings)}{has}")
        units += [unit for path, name in files for unit in cut(path, name, form)]
        unread += left
    return units, unread


def survey(source: Path, form: str, name: str = "") -> tuple[list[tuple[Path, str]], list[Bad]]:
    """The files of a source that are read as `form`, with their names below `name`; and what else is there: files that
    are not read or empty, folders that may not be read."""
    if not os.path.isdir(source):
        files, unread = [(source, source.name)] if os.path.isfile(source) else [], []
    else:
        paths, unread = walk(source)
        chosen = chosen_files(source, paths, form)
        unread += [Bad(str(path.relative_to(source)), NOT_READ) for path in paths if path not in set(chosen)]
        unread = [replace(bad, where=os.path.join(name, bad.where)) for bad in unread]
        files = [(path, os.path.join(name, path.relative_to(source))) for path in chosen]
    why = {0: "empty files", -1: "files that may not be read"}
    sizes = [(name, size_of(path)) for path, name in files]
    return files, unread + [Bad(name, why[size]) for name, size in sizes if size in why]


def chosen_files(folder: Path, files: Sequence[Path], form: str) -> list[Path]:
    """For text and chat all text files. For images, and where there are no text files: caption files, else tars."""
    words = {"text": (".txt", ".jsonl"), "chat": (".jsonl",)}.get(form, ())
    captions = caption_files(folder, files)
    found = [path for path in files if path.suffix.lower() in words]
    if not found and form == "interleaved" and not captions:
        found = [path for path in files if path.parent == folder and path.suffix.lower() == ".jsonl"]
    return found or captions or tars_in(folder, files)


def cut(path: Path, name: str, form: str) -> Iterator[Unit]:
    """Cut a file into units. A tar and a table are one unit, since their parts are found from the start only."""
    size = size_of(path)
    edges, following = [0], {".jsonl": next_line, ".txt": next_break}.get(path.suffix.lower())
    if following and size > STRETCH[form]:
        with suppress(PermissionError), open(path, "rb") as file:  # reading the unit reports it
            while edges[-1] + STRETCH[form] < size:
                edges.append(following(file, edges[-1] + STRETCH[form]))
    ends = [*edges[1:], size]
    return (Unit(path, name, start, end) for start, end in zip(edges, ends, strict=True) if start < end)


def next_line(file: BinaryIO, place: int) -> int:
    """Where the next line begins."""
    file.seek(place)
    while (line := file.readline(MAX_LINE)) and not line.endswith(b"\n"):
        pass
    return file.tell()


def next_break(file: BinaryIO, place: int) -> int:
    """Where the next line of a .txt begins; after MAX_LINE bytes without a line's end, where the next letter begins."""
    file.seek(place)
    if not file.readline(MAX_LINE).endswith(b"\n"):
        while (byte := file.read(1)) and byte[0] & 0xC0 == 0x80:  # inside a letter
            pass
        return file.tell() - len(byte)
    return file.tell()


# ---------------------------------------------------------------------------------------------------------------------
# Items


def items(unit: Unit, form: str) -> Iterator[tuple[Item, int]]:
    """Yield the unit's items in order, with the bytes of it read so far. Raises UserError where the disk fails."""
    for found in accounted(read(unit, form), unit.path, unit.name, unit.is_whole):
        yield found if isinstance(found, tuple) else (found, 0)


def read(unit: Unit, form: str) -> Iterator[tuple[Item, int]]:
    ending = unit.path.suffix.lower()
    if ending == ".tar":
        found = captioned_images(unit.path, unit.name)
        return ((without_image(item) if form == "text" else item, end) for item, end in found)
    if ending == ".txt":
        return text_blocks(unit)
    if ending == ".csv":
        rows = csv_rows(unit.path)
        return ((read_item(row, f"{unit.name}:{number}", unit.path.parent, form), 0) for number, row in rows)
    return lines(unit, form)


def without_image(item: Item) -> Item:
    """The caption of a captioned image."""
    return item if isinstance(item, Bad) else RawItem(item.where, item.doc[:1], cut=item.cut)


def lines(unit: Unit, form: str) -> Iterator[tuple[Item, int]]:
    """The rows of a .jsonl, named by line; in a file of several units, where lines are not counted, by byte."""
    counted = unit.is_whole
    with open_utf8(unit.path) as file:
        for number, (place, line) in enumerate(text_lines(file, unit.start, unit.end, MAX_LINE), 1):
            where = f"{unit.name}:{number}" if counted else f"{unit.name} at byte {place}"
            end = place + len(line or b"") - unit.start
            if line is None:
                yield Bad(where, "lines too long"), end
            elif not is_blank(line):
                yield read_line(line, where, unit.path.parent, form), end


def read_line(line: bytes, where: str, folder: Path, form: str) -> Item:
    """A text is long, so bytes that are not UTF-8 are mended in it; elsewhere they make the row bad."""
    mended = form == "text" and not is_utf8(line.decode(errors="surrogateescape"))
    row = json_row(line, "replace" if mended else "surrogateescape")
    found = read_item("broken lines" if row is None else row, where, folder, form)
    return replace(found, mended=True) if mended and isinstance(found, RawItem) else found


def read_item(row: Row, where: str, folder: Path, form: str) -> Item:
    """The document of a row of a .jsonl or of a table."""
    if isinstance(row, str):
        return Bad(where, row)
    if form == "text":
        text = first_text(row, TEXT_KEYS)
        whole = text.encode("utf-8", "replace").decode() == text  # False for half a surrogate pair
        return RawItem(where, [Text(text)], mended=not whole) if text else Bad(where, "without a text", fields_of(row))
    if form == "chat" or ("segments" in row and form != CAPTIONED):
        return conversation(row, where, folder, form)
    return read_row(row, where, folder)


def conversation(row: dict, where: str, folder: Path, form: str) -> Item:
    """Turns that alternate between prompt and answer, or the segments of one document.

    Images in prompts get a border, images in answers are cropped to their middle square (paper section 3.2).
    """
    turns = row.get("turns") if form == "chat" else [row.get("segments")]
    if not isinstance(turns, list) or not turns or (form == "chat" and len(turns) % 2):
        return Bad(where, "without turns of prompt and answer")
    doc: list = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, list) or not turn:
            return Bad(where, "broken turns")
        doc += [EndOfTurn()] if number else []
        for entry in turn:
            segment = read_segment(entry, folder, "pad" if form == "chat" and number % 2 == 0 else "crop", where)
            if isinstance(segment, Bad):
                return segment
            doc.append(segment)
    return RawItem(where, doc)


def read_segment(entry, folder: Path, fit: str, where: str) -> Text | ImageFile | Bad:
    if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(next(iter(entry.values())), str):
        return Bad(where, "broken turns")
    ((kind, value),) = entry.items()
    if kind not in ("text", "image") or not value:
        return Bad(where, "broken turns")
    if not is_utf8(value):
        return Bad(where, "not in UTF-8", ascii(value[:200]))
    if kind == "text":
        return Text(value)
    if isinstance(found := find_image(value, folder), str):
        return Bad(where, found, ascii(value[:200]))
    return ImageFile(f"{where} {value!a}", found, fit=fit)


def text_blocks(unit: Unit) -> Iterator[tuple[Item, int]]:
    """Blocks of a .txt, about BLOCK bytes each, that end with a line, or with a letter where lines are longer."""
    with open_utf8(unit.path) as file:
        place = unit.start
        while place < unit.end:
            end = min(next_break(file, place + BLOCK), unit.end) if place + BLOCK < unit.end else unit.end
            file.seek(place)
            data, where = file.read(end - place), f"{unit.name} at byte {place}"
            text = data.decode("utf-8-sig", "replace")
            mended = "\ufffd" in text and text.count("\ufffd") > data.count("\ufffd".encode())
            place = end
            if "\0" in text:
                yield Bad(where, "NUL bytes"), place - unit.start
            elif text.strip():
                yield RawItem(where, [Text(text)], mended=mended), place - unit.start
