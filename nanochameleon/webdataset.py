"""WebDataset tars, as img2dataset writes them (LAION, CC12M, DataComp): captioned pictures, read one after another.

    00000.tar   000000012.jpg  000000012.txt  000000012.json  000000013.jpg ...

Members that follow each other and share their name up to the first dot of its last part are one sample. Its caption is
the .txt, else "text" or "caption" of the .json. Nothing is unpacked onto the disk, no member is read beyond a limit.
Left out: compressed tars, and what else a sample may hold.
"""

import codecs
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanochameleon.data.reading import MAX_CAPTION, TEXT_KEYS, Bad, Captioned, File, first_text, is_utf8, shortened
from nanochameleon.errors import UserError

PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
MAX_PICTURE = 2**25  # bytes of a picture; a larger one is skipped
MAX_JSON = 2**22  # bytes
MAX_TEXT = 4 * MAX_CAPTION + 4  # bytes of a .txt that are read: enough to see that it is too long
MAX_HEADER = 2**16  # bytes of a header beyond its 512: long names


def tars_in(folder: Path) -> list[Path]:
    """Those of the folder, then those of its subfolders, each by name."""
    folder = Path(folder)
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())] if folder.is_dir() else []
    return [path for place in places for path in sorted(place.glob("*.tar")) if path.is_file()]


# ---------------------------------------------------------------------------------------------------------------------
# Members


class Bounded:
    """A file for tarfile that gives only as much at once as we ask for: a header may claim gigabytes."""

    def __init__(self, file):
        self.file, self.tell, self.seek = file, file.tell, file.seek

    def read(self, n: int) -> bytes:
        if not 0 <= n <= max(MAX_HEADER, MAX_PICTURE):
            raise tarfile.ReadError(f"a header of {n:,} bytes")
        return self.file.read(n)


def limit(ending: str) -> int | None:
    """How many bytes of such a member are read; None for one that is passed over."""
    return {"json": MAX_JSON, "txt": MAX_TEXT}.get(ending, MAX_PICTURE if ending in PICTURE_ENDINGS else None)


def members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, int]]:
    """(tar, member, bytes of the tar up to its end). Raises tarfile.TarError where the tar is cut off or broken."""
    with open(path, "rb") as file, tarfile.open(fileobj=Bounded(file), mode="r:") as tar:
        end = -1
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            if member.size < 0 or tar.offset <= end:
                raise tarfile.ReadError("a header of a size below 0")
            end = tar.offset
            yield tar, member, end
        file.seek(tar.offset)
        if file.read(512) != bytes(512):  # the end that every tar is given
            raise tarfile.ReadError("unexpected end of data")


@dataclass
class Sample:
    key: str
    members: dict[str, bytes] = field(default_factory=dict)  # by ending; of several pictures the first
    too_large: str = ""  # which member is over its limit

    def wants(self, ending: str) -> bool:
        has_picture = any(each in PICTURE_ENDINGS for each in self.members)
        return ending not in self.members and not (has_picture and ending in PICTURE_ENDINGS)

    def read(self, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, most: int) -> None:
        if member.size > most and ending != "txt":  # a text will be cut
            self.too_large = f"{member.name!a} has {member.size:,} bytes"
        else:
            self.members[ending] = tar.extractfile(member).read(min(member.size, most))


def samples(path: Path) -> Iterator[tuple[Sample | Bad, int]]:
    """(sample, bytes of the tar so far), then what is wrong with the tar, if anything is."""
    sample, end, damage = None, 0, []
    try:
        for tar, member, position in members(path):
            place, name = os.path.split(member.name)
            stem, _, ending = name.partition(".")
            key, most = os.path.join(place, stem), limit(ending.lower())
            if most is None or not member.isreg():
                continue
            if sample is None or sample.key != key:
                if sample:
                    yield sample, end
                sample = Sample(key)
            if sample.wants(ending.lower()):
                sample.read(tar, member, ending.lower(), most)
            end = position
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        damage = [(Bad(path.name, "cut off or broken tars", str(error)), os.path.getsize(path))]
    if sample:
        yield sample, end
    yield from damage


# ---------------------------------------------------------------------------------------------------------------------
# Captioned pictures


def caption_of(sample: Sample) -> tuple[str, str]:
    """(caption, '') or ('', why there is none)."""
    if "txt" in sample.members:
        data = sample.members["txt"]
        whole = len(data) < MAX_TEXT  # else the last letter may be cut
        try:
            text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole).strip()
        except UnicodeDecodeError:
            return "", "not in UTF-8"
    else:
        try:
            row = json.loads(sample.members.get("json", b"{}"))
        except (ValueError, RecursionError):
            return "", "broken JSON"
        text = first_text(row, TEXT_KEYS) if isinstance(row, dict) else ""
        if not is_utf8(text):
            return "", "not in UTF-8"
    return text, "" if text else "without a caption"


def captioned(path: Path, name: str) -> Iterator[tuple[Captioned | Bad, int]]:
    """The captioned pictures of a tar that is called `name`, and what is not one; each with the bytes read so far.

    Raises UserError for a tar that cannot be opened.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there or is not a file")
    for sample, end in samples(path):
        yield usable(sample, name), end


def usable(sample: Sample | Bad, name: str) -> Captioned | Bad:
    if isinstance(sample, Bad):
        return Bad(name, sample.reason, sample.detail)
    where = f"{name}:{ascii(sample.key)[1:-1]}"
    if sample.too_large:
        return Bad(where, "members too large", sample.too_large)
    picture = next((ending for ending in PICTURE_ENDINGS if ending in sample.members), None)
    if picture is None:
        return Bad(where, "without a picture")
    caption, problem = caption_of(sample)
    if problem:
        return Bad(where, problem)
    caption, cut = shortened(caption)
    return Captioned(where, caption, File(f"{where}.{picture}", data=sample.members[picture]), cut)
