"""What there is to prepare, cut into units of work, and the items of a unit: files in, loose documents out.

    form           from
    pairs          captioned pictures: tars (webdataset.py), caption files (folder.py); either one first, half and half
    drawings       the same, the caption always first
    interleaved    the same, two in turn; and .jsonl of {"segments": [{"text": "see"}, {"image": "a.png"}, ...]}
    text           .jsonl of {"text": "..."}, a document a line; .txt, a long text each; captions without pictures
    chat           .jsonl of {"turns": [[{"text": "what is this?"}, {"image": "a.png"}], [{"text": "a cat"}], ...]}

A unit is a tar, a table, or a stretch of another file that begins and ends with a line. Which units there are depends
on the sources alone, so that processes need not talk to agree.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from nanochameleon.data.reading import TEXT_KEYS, Bad, File, first_text, shortened
from nanochameleon.documents import EndOfTurn, Text
from nanochameleon.errors import UserError
from nanochameleon.folder import FILE_KEYS, caption_files, csv_rows, problem
from nanochameleon.webdataset import captioned, tars_in

FORMS = ("pairs", "drawings", "interleaved", "text", "chat")
STRETCH = {"text": 2**26, "pairs": 2**20, "drawings": 2**20, "interleaved": 2**21, "chat": 2**21}  # bytes, about
BLOCK = 2**20  # bytes of a .txt that are one item
MAX_LINE = 2**25  # bytes; a longer line is skipped


@dataclass(frozen=True)
class Unit:
    """Bytes start .. end-1 of a file; `name` is what it is called in lists, without where it lies on this machine."""

    path: Path
    name: str
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Loose:
    """A document whose pictures are not decoded yet."""

    where: str
    doc: list[Text | File | EndOfTurn]
    captioned: bool = False  # a caption and its picture
    cut: bool = False  # something was left out
    mended: bool = False  # bytes that were no UTF-8 have become U+FFFD


Item = Loose | Bad

# ---------------------------------------------------------------------------------------------------------------------
# Units


def plan(sources: Sequence[Path], form: str) -> list[Unit]:
    """All units in order. Raises UserError for a source that has nothing of this form."""
    return [unit for source in sources for path, name in files_of(source, form) for unit in cut(path, name, form)]


def files_of(source: Path, form: str) -> list[tuple[Path, str]]:
    if source.is_dir():
        found = found_in(source, form)
        names = [f"{source.resolve().name}/{path.relative_to(source)}" for path in found]
    else:
        found, names = [source] if source.is_file() else [], [source.name]
    endings = {"text": (".txt", ".jsonl", ".csv", ".tar"), "chat": (".jsonl",)}.get(form, (".tar", ".jsonl", ".csv"))
    if not found or any(path.suffix not in endings for path in found):
        raise UserError(f"{source} has nothing to prepare as {form}: that comes from {', '.join(endings)}")
    return list(zip(found, names, strict=True))


def found_in(folder: Path, form: str) -> list[Path]:
    """For text and chat all files of words; for pictures, and where there are none, caption files, else tars."""
    words = {"text": ("*.txt", "*.jsonl"), "chat": ("*.jsonl",)}.get(form, ())
    found = sorted(path for pattern in words for path in folder.rglob(pattern) if path.is_file())
    if not found and form == "interleaved" and not caption_files(folder):
        found = sorted(folder.glob("*.jsonl"))
    return found or caption_files(folder) or tars_in(folder)


def cut(path: Path, name: str, form: str) -> Iterator[Unit]:
    """A tar and a table are one unit: their parts can be found by reading them from the start alone."""
    size = path.stat().st_size
    edges, following = [0], {".jsonl": next_line, ".txt": next_break}.get(path.suffix)
    if following:
        with open(path, "rb") as file:
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
    """The unit's items in order, each with the bytes of the unit read so far."""
    if unit.path.suffix == ".tar":
        return ((loose(found, form), end) for found, end in captioned(unit.path, unit.name))
    if unit.path.suffix == ".txt":
        return prose(unit)
    if unit.path.suffix == ".csv":
        rows = csv_rows(unit.path)
        return ((of_row(row, f"{unit.name}:{number}", unit.path.parent, form), 0) for number, row in rows)
    return lines(unit, form)


def loose(found, form: str) -> Item:
    """Of a captioned picture."""
    if isinstance(found, Bad):
        return found
    if form == "text":
        return Loose(found.where, [Text(found.caption)], cut=found.cut)
    return Loose(found.where, [Text(found.caption), found.picture], captioned=True, cut=found.cut)


def lines(unit: Unit, form: str) -> Iterator[tuple[Item, int]]:
    """Of a .jsonl, each called by the byte it begins at."""
    with open(unit.path, "rb") as file:
        file.seek(unit.start)
        while (place := file.tell()) < unit.end:
            line, where = file.readline(MAX_LINE), f"{unit.name} at byte {place}"
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield Bad(where, "lines too long"), file.tell() - unit.start
            elif line.strip(b" \t\r\n\xef\xbb\xbf"):
                yield of_line(line, where, unit.path.parent, form), file.tell() - unit.start


def of_line(line: bytes, where: str, folder: Path, form: str) -> Item:
    """Bytes that are no UTF-8 are mended in a text, which is long, and no reason to take the rest of it."""
    mended = False
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        mended = form == "text"
        text = line.decode("utf-8-sig", "replace" if mended else "surrogateescape")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    found = of_row(row if isinstance(row, dict) else None, where, folder, form)
    return replace(found, mended=True) if mended and isinstance(found, Loose) else found


def of_row(row: dict | None, where: str, folder: Path, form: str) -> Item:
    """One row of a .jsonl or of a table."""
    if row is None:
        return Bad(where, "broken lines")
    if form == "text":
        text = first_text(row, TEXT_KEYS)
        whole = text.encode("utf-8", "replace").decode() == text  # else half surrogate pairs
        return Loose(where, [Text(text)], mended=not whole) if text else Bad(where, "without a text")
    if form == "chat" or "segments" in row:
        return conversation(row, where, folder, form)
    name, caption = first_text(row, FILE_KEYS), first_text(row, TEXT_KEYS)
    if reason := problem(row, name, caption, folder):
        return Bad(where, reason, ascii(name[:200]))
    caption, was_cut = shortened(caption)
    return Loose(where, [Text(caption), File(f"{where} {name!a}", folder / name)], captioned=True, cut=was_cut)


def conversation(row: dict, where: str, folder: Path, form: str) -> Item:
    """Turns that alternate between prompt and answer, or the segments of one document. Pictures of prompts are fitted
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
    if kind == "image":
        reason = problem({}, value, "a picture", folder)
        return Bad(where, reason, ascii(value[:200])) if reason else File(f"{where} {value!a}", folder / value, fit=fit)
    if kind != "text" or not value:
        return Bad(where, "broken turns")
    return Text(value) if problem({}, "x", value, folder) != "not in UTF-8" else Bad(where, "not in UTF-8")


def prose(unit: Unit) -> Iterator[tuple[Item, int]]:
    """Of a .txt: blocks of about BLOCK bytes that end with a line, or with a letter where lines are longer."""
    with open(unit.path, "rb") as file:
        place = unit.start
        while place < unit.end:
            behind = min(next_break(file, place + BLOCK), unit.end) if place + BLOCK < unit.end else unit.end
            file.seek(place)
            data, where = file.read(behind - place), f"{unit.name} at byte {place}"
            text = data.decode("utf-8-sig", "replace")
            mended = "\ufffd" in text and text.count("\ufffd") > data.count("\ufffd".encode())
            place = behind
            if text.strip():
                yield Loose(where, [Text(text)], mended=mended), place - unit.start
            elif place == unit.end and unit.start == 0 and os.path.getsize(unit.path) == len(data):
                yield Bad(where, "without a text"), place - unit.start
