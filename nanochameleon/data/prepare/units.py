"""What there is to prepare, cut into units of work, and the items of a unit: files in, loose documents out.

    form           from
    pairs          captioned images: tars (webdataset.py), caption files (folder.py); either one first, half and half
    drawings       the same, the caption always first
    interleaved    the same, two in turn; and .jsonl of {"segments": [{"text": "see"}, {"image": "a.png"}, ...]}
    text           .jsonl of {"text": "..."}, a document a line; .txt, a long text each; captions without images
    chat           .jsonl of {"turns": [[{"text": "what is this?"}, {"image": "a.png"}], [{"text": "a cat"}], ...]}

A unit is a tar, a table, or a stretch of another file that begins and ends with a line. Which units there are depends
on the sources alone, so that processes need not talk to agree.

In a folder, files of words are read at any depth, caption files and tars in the folder itself and in its subfolders.
Endings are read in any letter case, links are followed to files and to folders, hidden files are left out. Every other
file, but for images, is counted and listed as one that is not read (left_out).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from nanochameleon.data.reading import (
    MAX_LINE,
    TEXT_KEYS,
    Bad,
    File,
    accounted,
    first_few,
    first_text,
    is_blank,
    is_utf8,
    json_row,
    not_read,
    opened,
    shortened,
    size_of,
    text_lines,
    walk,
)
from nanochameleon.data.sources.folder import Row, caption_files, csv_rows, fields_of, image_at, read_row
from nanochameleon.data.sources.webdataset import captioned, tars_in
from nanochameleon.documents import EndOfTurn, Text
from nanochameleon.errors import UserError

FORMS = ("pairs", "drawings", "interleaved", "text", "chat")
STRETCH = {"text": 2**26, "pairs": 2**20, "drawings": 2**20, "interleaved": 2**21, "chat": 2**21}  # bytes, about
BLOCK = 2**20  # bytes of a .txt that are one item


@dataclass(frozen=True)
class Unit:
    """Bytes start .. end-1 of a file; `name` is what it is called in lists, without where it lies on this machine."""

    path: Path
    name: str
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Loose:
    """A document whose images are not decoded yet."""

    where: str
    doc: list[Text | File | EndOfTurn]
    captioned: bool = False  # a caption and its image
    cut: bool = False  # something was left out
    mended: bool = False  # bytes that were no UTF-8 have become U+FFFD


Item = Loose | Bad

# ---------------------------------------------------------------------------------------------------------------------
# Units


def plan(sources: Sequence[Path], form: str) -> list[Unit]:
    """All units in order. Raises UserError for a source that has nothing of this form, or cannot be read."""
    return [unit for source in sources for path, name in survey(source, form)[0] for unit in cut(path, name, form)]


def left_out(sources: Sequence[Path], form: str) -> list[Bad]:
    """What lies in the sources and is in no unit: files that are not read or empty, folders that may not be read."""
    return [bad for source in sources for bad in survey(source, form)[1]]


def survey(source: Path, form: str) -> tuple[list[tuple[Path, str]], list[Bad]]:
    """(files to read with their names, what is left out) of a source. Raises UserError if there is nothing to read."""
    if not os.path.lexists(source):
        raise UserError(f"{source} is not there: give files or folders that are")
    left, name = [], source.resolve().name
    if os.path.isdir(source):
        files, left = walk(source)
        found = found_in(source, files, form)
        left += not_read(source, files, found)
        left = [replace(bad, where=f"{name}/{bad.where}") for bad in left]
        named = [(path, f"{name}/{path.relative_to(source)}") for path in found]
    else:
        named = [(source, source.name)] if os.path.isfile(source) else []
    endings = {"text": (".txt", ".jsonl", ".csv", ".tar"), "chat": (".jsonl",)}.get(form, (".tar", ".jsonl", ".csv"))
    if not named or any(path.suffix.lower() not in endings for path, _ in named):
        has = f"; it has {first_few(left)}" if left else ""
        raise UserError(f"{source} has nothing to prepare as {form}: that comes from {', '.join(endings)}{has}")
    why = {0: "empty files", -1: "files that may not be read"}
    sizes = [(name, size_of(path)) for path, name in named]
    return named, left + [Bad(name, why[size]) for name, size in sizes if size in why]


def found_in(folder: Path, files: Sequence[Path], form: str) -> list[Path]:
    """For text and chat all files of words; for images, and where there are none, caption files, else tars."""
    words = {"text": (".txt", ".jsonl"), "chat": (".jsonl",)}.get(form, ())
    captions = caption_files(folder, files)
    found = [path for path in files if path.suffix.lower() in words]
    if not found and form == "interleaved" and not captions:
        found = [path for path in files if path.parent == folder and path.suffix.lower() == ".jsonl"]
    return found or captions or tars_in(folder, files)


def cut(path: Path, name: str, form: str) -> Iterator[Unit]:
    """A tar and a table are one unit: their parts can be found by reading them from the start alone."""
    size = size_of(path)
    edges, following = [0], {".jsonl": next_line, ".txt": next_break}.get(path.suffix.lower())
    if following and size > STRETCH[form]:
        with suppress(PermissionError), open(path, "rb") as file:  # a unit that may not be read says so itself
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
    """The same in a .txt; after MAX_LINE bytes without one, where the next letter begins."""
    file.seek(place)
    if not file.readline(MAX_LINE).endswith(b"\n"):
        while (byte := file.read(1)) and byte[0] & 0xC0 == 0x80:  # inside a letter
            pass
        return file.tell() - len(byte)
    return file.tell()


# ---------------------------------------------------------------------------------------------------------------------
# Items


def items(unit: Unit, form: str) -> Iterator[tuple[Item, int]]:
    """The unit's items in order, each with the bytes of the unit read so far. Raises UserError where the disk fails."""
    whole = unit.start == 0 and unit.end >= size_of(unit.path)
    for found in accounted(read(unit, form), unit.path, unit.name, whole):
        yield found if isinstance(found, tuple) else (found, 0)


def read(unit: Unit, form: str) -> Iterator[tuple[Item, int]]:
    ending = unit.path.suffix.lower()
    if ending == ".tar":
        return ((loose(found, form), end) for found, end in captioned(unit.path, unit.name))
    if ending == ".txt":
        return prose(unit)
    if ending == ".csv":
        rows = csv_rows(unit.path)
        return ((of_row(row, f"{unit.name}:{number}", unit.path.parent, form), 0) for number, row in rows)
    return lines(unit, form)


def loose(found, form: str) -> Item:
    """Of a captioned image."""
    if isinstance(found, Bad):
        return found
    if form == "text":
        return Loose(found.where, [Text(found.caption)], cut=found.cut)
    return Loose(found.where, [Text(found.caption), found.image], captioned=True, cut=found.cut)


def lines(unit: Unit, form: str) -> Iterator[tuple[Item, int]]:
    """Of a .jsonl, each called by the byte it begins at."""
    with opened(unit.path) as file:
        for place, line in text_lines(file, unit.start, unit.end, MAX_LINE):
            where, behind = f"{unit.name} at byte {place}", place + len(line or b"") - unit.start
            if line is None:
                yield Bad(where, "lines too long"), behind
            elif not is_blank(line):
                yield of_line(line, where, unit.path.parent, form), behind


def of_line(line: bytes, where: str, folder: Path, form: str) -> Item:
    """Bytes that are no UTF-8 are mended in a text, which is long, and no reason to take the rest of it."""
    mended = form == "text" and not is_utf8(line.decode(errors="surrogateescape"))
    row = json_row(line, "replace" if mended else "surrogateescape")
    found = of_row("broken lines" if row is None else row, where, folder, form)
    return replace(found, mended=True) if mended and isinstance(found, Loose) else found


def of_row(row: Row, where: str, folder: Path, form: str) -> Item:
    """One row of a .jsonl or of a table."""
    if isinstance(row, str):
        return Bad(where, row)
    if form == "text":
        text = first_text(row, TEXT_KEYS)
        whole = text.encode("utf-8", "replace").decode() == text  # else half surrogate pairs
        return Loose(where, [Text(text)], mended=not whole) if text else Bad(where, "without a text", fields_of(row))
    if form == "chat" or "segments" in row:
        return conversation(row, where, folder, form)
    found = read_row(row, where, folder)
    if isinstance(found, Bad):
        return found
    caption, was_cut = shortened(found[1])
    image = File(f"{where} {found[0].name!a}", found[0])
    return Loose(where, [Text(caption), image], captioned=True, cut=was_cut)


def conversation(row: dict, where: str, folder: Path, form: str) -> Item:
    """Turns that alternate between prompt and answer, or the segments of one document. Images of prompts are fitted
    into a border, those of answers lose what is outside their middle square (paper section 3.2)."""
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
    return Loose(where, doc)


def read_segment(entry, folder: Path, fit: str, where: str) -> Text | File | Bad:
    if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(next(iter(entry.values())), str):
        return Bad(where, "broken turns")
    ((kind, value),) = entry.items()
    if kind not in ("text", "image") or not value:
        return Bad(where, "broken turns")
    if not is_utf8(value):
        return Bad(where, "not in UTF-8", ascii(value[:200]))
    if kind == "text":
        return Text(value)
    if isinstance(found := image_at(value, folder), str):
        return Bad(where, found, ascii(value[:200]))
    return File(f"{where} {value!a}", found, fit=fit)


def prose(unit: Unit) -> Iterator[tuple[Item, int]]:
    """Of a .txt: blocks of about BLOCK bytes that end with a line, or with a letter where lines are longer."""
    with opened(unit.path) as file:
        place = unit.start
        while place < unit.end:
            behind = min(next_break(file, place + BLOCK), unit.end) if place + BLOCK < unit.end else unit.end
            file.seek(place)
            data, where = file.read(behind - place), f"{unit.name} at byte {place}"
            text = data.decode("utf-8-sig", "replace")
            mended = "\ufffd" in text and text.count("\ufffd") > data.count("\ufffd".encode())
            place = behind
            if "\0" in text:
                yield Bad(where, "NUL bytes"), place - unit.start
            elif text.strip():
                yield Loose(where, [Text(text)], mended=mended), place - unit.start
