"""Records that the user brings: lines of JSON, whole JSON files, their fields, the images that they name.

Every mistake raises UserError: one sentence that names the file, the line and what to do.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanochameleon.errors import UserError, shown

MAX_LINE = 2**24  # bytes
MAX_FILE = 2**31  # bytes; the largest of the official files has 0.4 GB
KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def find_file(folder: Path | None, *names: str) -> Path:
    """Return the first of these files that the folder has. A name may lie deeper: "data/test.jsonl"."""
    if folder is None:
        raise UserError(f"--data is missing: give the folder that holds {' or '.join(names)}")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no {' and no '.join(names)}: put the file there, or give another --data")
    return found


def read_bytes(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > MAX_FILE:
            raise UserError(f"{path} has {size:,} bytes: at most {MAX_FILE:,} are read")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not data.strip():
        raise UserError(f"{path} is empty: put lines there, or give another file")
    return data


def read_text(path: Path) -> str:
    return decode(read_bytes(path), str(path))


def decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{place} is not UTF-8: save it as UTF-8") from None


def check_unicode(text: str, place: str) -> str:
    """Return the text. Raises UserError for half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{place} has half a surrogate pair in its text: save it as UTF-8")
    return text


def load(text: bytes, place: str, slim: Callable[[dict], Any] | None = None) -> Any:
    """Return the JSON value of a text. slim: what takes the place of each object, as soon as it is read."""
    text = decode(text, place)  # in place of the bytes, whose memory a large file needs
    try:
        return json.loads(text, object_hook=slim)
    except (ValueError, RecursionError) as error:  # RecursionError: lists nested by the thousand
        raise UserError(f"{place} is not JSON ({where(error)}): mend it, or remove it") from None


def where(error: Exception) -> str:
    """Say what is wrong with a JSON text, and at which character of which line: a text of one line has no number."""
    if not isinstance(error, json.JSONDecodeError):
        return shown(error, 80)
    line = f"line {error.lineno:,}, " if "\n" in error.doc.rstrip() else ""
    return f"{error.msg}, {line}character {error.colno:,}"


def read_json_lines(path: Path) -> list[tuple[str, dict]]:
    """Return [(place, object)] of a file with one JSON object per line. A place is "file:3". Skips blank lines."""
    rows = []
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        place = f"{path}:{number}"
        if len(line) > MAX_LINE:
            raise UserError(f"{place} has {len(line):,} bytes: at most {MAX_LINE:,} are read")
        if line.strip():
            row = load(line, place)
            if not isinstance(row, dict):
                raise UserError(f"{place} is not a JSON object: write one object per line, such as {{...}}")
            rows.append((place, row))
    return rows


def read_json_file(path: Path, kind: type = dict, slim: Callable[[dict], Any] | None = None) -> Any:
    """Return the JSON object, or with kind=list the list, that a whole file holds. slim: see load."""
    value = load(read_bytes(path), str(path), slim)
    if not isinstance(value, kind):
        raise UserError(f"{path} does not hold {KINDS[kind]}: it is not a file of this kind")
    return value


def get(row: dict, name: str, kind: type | tuple[type, ...], place: str) -> Any:
    """Return a field of the right kind. A bool is no number."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    value = row.get(name)
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return value
    wanted = " or ".join(KINDS[k] for k in kinds)
    what = f"has {shown(json.dumps(value), 40)} as" if name in row else "has no"
    raise UserError(f"{place} {what} {name!r}: it must be {wanted}")


def check_ids(ids: Iterable[tuple[str, object]]) -> None:
    """Raise UserError if two of these (place, id) have the same id."""
    seen: dict[object, str] = {}
    for place, name in ids:
        if name in seen:
            raise UserError(f"{place} has the id {shown(name)!r}, as {seen[name]} has: ids must differ")
        seen[name] = place


def image_path(folder: Path, name: str, place: str) -> Path:
    """Return the path of an image that a record names, relative to a folder that it must not leave."""
    path = Path(os.path.normpath(folder / name))
    if os.path.isabs(name) or not path.is_relative_to(os.path.normpath(folder)) or "\0" in name:
        raise UserError(f"{place} names the image {shown(name)!r}: names must stay inside {folder}")
    return path
