"""Prompts of a study, and answers of other systems, from files of JSON lines.

    {"id": 7, "prompt": "What is <img> ?", "task_type": "Identification", "image_urls": ["https://.../cat.jpg"]}
    {"id": "7", "segments": [{"text": "What is "}, {"image": "cat.jpg"}], "task_type": "Identification"}
    {"id": "7", "segments": [{"text": "A cat:"}, {"image": "out/7-1.png"}]}                       an answer

The first form is that of the paper's released prompts; a file may also be one list. Nothing is downloaded: of a URL
only the file name counts.
"""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.people.study import Segments
from nanochameleon.evaluate.records import (
    check_ids,
    check_unicode,
    get,
    image_path,
    read_bytes,
    read_json_file,
    read_json_lines,
)

MARK = "<img>"
UNNAMED = "unnamed"  # the kind of task where the file names none


@dataclass(frozen=True)
class Prompt:
    id: str
    task_type: str
    segments: Segments  # images are paths


def read_prompts(path: Path, images: Path | None, limit: int | None = None) -> list[Prompt]:
    """Read prompts of either form. images: the folder of the image files; None: that of the prompts."""
    folder, prompts, places = images or path.parent, [], []
    for place, row in read_rows(path)[:limit]:
        own = "segments" in row
        segments = read_segments(row, folder, place) if own else marked(row, folder, place)
        if not segments:
            raise UserError(f"{place} is an empty prompt: give it words or an image, or remove the line")
        task_type = get(row, "task_type", str, place).strip() if "task_type" in row else ""
        prompts.append(Prompt(read_id(row, place), task_type or UNNAMED, segments))
        places.append((place, prompts[-1].id))
    check_ids(places)
    return prompts


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """Return [(place, object)] of JSON lines, or of one list."""
    if not read_bytes(path).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return read_json_lines(path)
    rows = [(f"{path}, entry {number}", row) for number, row in enumerate(read_json_file(path, list), 1)]
    if wrong := [place for place, row in rows if not isinstance(row, dict)]:
        raise UserError(f"{wrong[0]} is not a JSON object: write objects, such as {{...}}")
    return rows


def read_answers(path: Path, prompts: list[Prompt]) -> list[Segments]:
    """Read another system's answers, in the order of the prompts. Image files are relative to the file's folder."""
    rows = [(place, read_id(row, place), row) for place, row in read_json_lines(path)]
    check_ids((place, name) for place, name, _ in rows)
    answers = {name: read_segments(row, path.parent, place) for place, name, row in rows}
    if missing := [prompt.id for prompt in prompts if prompt.id not in answers]:
        raise UserError(f"{path} has no answer to the prompt {shown(missing[0])!r}: add one line for each prompt")
    return [answers[prompt.id] for prompt in prompts]


def read_id(row: dict, place: str) -> str:
    return str(get(row, "id", (str, int), place))


def read_segments(row: dict, folder: Path, place: str) -> Segments:
    segments: Segments = []
    for part in get(row, "segments", list, place):
        if not isinstance(part, dict) or len(part) != 1 or part.keys() - {"text", "image"}:
            raise UserError(f'{place} has a broken segment: write {{"text": "..."}} or {{"image": "FILE"}}')
        if "text" in part:
            add_text(segments, get(part, "text", str, place), place)
        else:
            segments.append({"image": str(existing(folder, get(part, "image", str, place), place))})
    return segments


def marked(row: dict, folder: Path, place: str) -> Segments:
    """The paper's form: the text is cut at its marks, and an image is put at each."""
    pieces = get(row, "prompt", str, place).split(MARK)
    urls = get(row, "image_urls", list, place) if row.get("image_urls") is not None else []
    if len(urls) != len(pieces) - 1:
        raise UserError(
            f"{place} has {len(pieces) - 1} marks {MARK} and {len(urls)} image_urls: give one for each mark"
        )
    segments: Segments = []
    for number, piece in enumerate(pieces):
        if number:
            segments.append({"image": str(existing(folder, file_name(str(urls[number - 1])), place))})
        add_text(segments, piece, place)
    return segments


def add_text(segments: Segments, text: str, place: str) -> None:
    """Append a text, joined to the one before it, if any. Space alone is no segment."""
    check_unicode(text, place)
    if segments and "text" in segments[-1]:
        segments[-1] = {"text": segments[-1]["text"] + text}
    elif text.strip():
        segments.append({"text": text})


def file_name(url: str) -> str:
    """The file that a URL or a path names."""
    return PurePosixPath(unquote(urlsplit(url).path)).name if "://" in url else url


def existing(folder: Path, name: str, place: str) -> Path:
    path = image_path(folder, name, place)
    if not os.path.isfile(path):  # unlike Path.is_file, never raises, however odd the name
        raise UserError(f"{place} names the image {shown(name)!r}, which is not in {folder}: put the file there")
    return path
