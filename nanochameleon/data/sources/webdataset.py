"""WebDataset tars, as img2dataset writes them (LAION, CC12M, DataComp): captioned images, read one after another.

    00000.tar   000000012.jpg  000000012.txt  000000012.json  000000013.jpg ...

A sample is a run of successive members that share their key: their name up to the first dot of its last part. Where
that leaves an ending that is not read, the key ends at the last dot (photo.2021.01.jpg). An ending that comes a second
time begins another sample of the same key. The caption is the .txt, else "text" or "caption" of the .json.

Nothing is unpacked onto the disk, and no member is read beyond a limit. Left out: hidden members (._a.jpg), a sample's
second image and its other members. Compressed or joined tars, links, and samples that are not whole are bad items.
"""

import codecs
import errno
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanochameleon.data.reading import (
    IMAGE_ENDINGS,
    MAX_CAPTION,
    TEXT_KEYS,
    Bad,
    ImageFile,
    Item,
    accounted,
    captioned_item,
    first_text,
    is_utf8,
    near,
)  # fmt: skip
from nanochameleon.errors import UserError

MAX_IMAGE = 2**25  # bytes of an image; a larger one is skipped
MAX_JSON = 2**22  # bytes
MAX_TEXT = 4 * MAX_CAPTION + 4  # bytes of a .txt that are read: enough to know that it is too long
MAX_HEADER = 2**16  # bytes of a header beyond the usual 512: long names
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}


def tars_in(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Of the files (reading.walk): tars in the folder, then the tars in each of its subfolders, by name."""
    return [path for path in near(folder, files) if path.suffix.lower() == ".tar"]


# ---------------------------------------------------------------------------------------------------------------------
# Members


class Bounded:
    """A file for tarfile that refuses large reads: a header may claim gigabytes."""

    def __init__(self, file):
        self.file, self.tell, self.seek = file, file.tell, file.seek

    def read(self, n: int) -> bytes:
        if not 0 <= n <= max(MAX_HEADER, MAX_IMAGE):
            raise tarfile.ReadError(f"a header of {n:,} bytes")
        return self.file.read(n)


def limit(ending: str) -> int | None:
    """How many bytes of a member with this ending are read; None if it is skipped."""
    return {"json": MAX_JSON, "txt": MAX_TEXT}.get(ending, MAX_IMAGE if ending in IMAGE_ENDINGS else None)


def members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, int]]:
    """Yield (tar, member, bytes of the tar up to its end). Raises tarfile.TarError if the tar is cut off or broken."""
    with open(path, "rb") as file, tarfile.open(fileobj=Bounded(file), mode="r:") as tar:
        end = -1
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep them all
            if member.size < 0 or tar.offset <= end:
                raise tarfile.ReadError("a header of a size below 0")
            end = tar.offset
            yield tar, member, end
        file.seek(tar.offset)
        if file.read(512) != bytes(512):  # the end of every whole tar
            raise tarfile.ReadError("unexpected end of data")
        while rest := file.read(2**20):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("data after its end: if it was joined from several tars, give them separately")


@dataclass
class Sample:
    key: str
    first: str  # name of its first member
    members: dict[str, bytes] = field(default_factory=dict)  # by ending; the first of several images
    too_large: str = ""  # a member over its limit

    @property
    def image(self) -> str | None:
        """The ending of the sample's image."""
        return next((ending for ending in IMAGE_ENDINGS if ending in self.members), None)

    @property
    def is_whole(self) -> bool:
        return self.image is not None and not {"txt", "json"}.isdisjoint(self.members)

    def read(self, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> None:
        if ending in IMAGE_ENDINGS and self.image:
            return
        most = limit(ending)
        if too_large := member.size > most and ending != "txt":  # a longer text is cut
            self.too_large = f"{member.name!a} has {member.size:,} bytes"
        self.members[ending] = b"" if too_large else tar.extractfile(member).read(min(member.size, most))


def is_hidden(name: str) -> bool:
    """Whether a part of a member's name begins with a dot: ._a.jpg of a Mac, .ipynb_checkpoints/a.txt."""
    return any(part.startswith(".") and part.strip(".") for part in name.split("/"))


def key_of(name: str, begun: list[Sample]) -> tuple[str, str]:
    """The key of a member that follows the samples `begun`, and its ending; '' if it is not read."""
    place, last = os.path.split(name)
    stem, _, ending = last.partition(".")
    key = os.path.join(place, stem)
    if limit(ending.lower()) is not None:
        return key, ending.lower()
    longer, ending = os.path.splitext(last)
    if limit(ending[1:].lower()) is not None:
        return os.path.join(place, longer), ending[1:].lower()
    return next((sample.key for sample in reversed(begun) if name.startswith(f"{sample.key}.")), key), ""


def begin(begun: list[Sample], name: str, key: str, ending: str) -> Iterator[Sample]:
    """Make the member's sample the last one of `begun`; yield the samples that end before it.

    Inside sample 7 there may be one called 7.small: if that is not whole, its members are other members of 7.
    """
    if begun and not begun[-1].members and begun[-1].first.startswith(f"{key}."):
        begun[-1].key = key  # the first name had left the key open
    while begun and (begun[-1].key != key or ending in begun[-1].members):
        if len(begun) == 1 and begun[0].members and key.startswith(f"{begun[0].key}."):
            break
        ended = begun.pop()
        if not begun or ended.is_whole:
            yield ended
    if not begun or begun[-1].key != key:
        begun.append(Sample(key, name))


def samples(path: Path) -> Iterator[tuple[Sample | Bad, int]]:
    """Yield (sample, bytes of the tar so far), then what is wrong with the tar, if anything is."""
    begun, end, damage = [], 0, []
    try:
        for tar, member, position in members(path):
            if member.isdir() or is_hidden(member.name):
                continue
            key, ending = key_of(member.name, begun)
            for ended in begin(begun, member.name, key, ending):
                yield ended, end
            if ending and member.isreg():
                begun[-1].read(tar, member, ending)
            end = position
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which an odd size in a header causes
            raise
        damage = [(broken_tar(path, error), os.path.getsize(path))]
    for number, sample in enumerate(begun):
        if number == 0 or sample.is_whole:
            yield sample, end
    yield from damage


def broken_tar(path: Path, error: Exception) -> Bad:
    """Why a tar raised `error`."""
    with open(path, "rb") as file:
        head = file.read(8)
    packed = [kind for start, kind in PACKED.items() if head.startswith(start)]
    if packed:
        return Bad(path.name, "compressed tars", f"{packed[0]}: unpack it first")
    return Bad(path.name, "cut off or broken tars", str(error))


# ---------------------------------------------------------------------------------------------------------------------
# Captioned images


def caption_of(sample: Sample) -> tuple[str, str]:
    """Return (caption, '') or ('', why there is none)."""
    data = sample.members.get("txt", b"")
    whole = len(data) < MAX_TEXT  # else the last letter may be cut
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole).strip()
    except UnicodeDecodeError:
        return "", "not in UTF-8"
    if "\0" in text:
        return "", "NUL bytes"
    if not text:
        try:
            row = json.loads(sample.members.get("json", b"{}"))
        except (ValueError, RecursionError):
            return "", "broken JSON"
        text = first_text(row, TEXT_KEYS) if isinstance(row, dict) else ""
        if not is_utf8(text):
            return "", "not in UTF-8"
    return text, "" if text else "without a caption"


def captioned_images(path: Path, name: str) -> Iterator[tuple[Item, int]]:
    """Yield the captioned images of a tar, called `name`, and its bad items, each with the bytes read so far.

    Raises UserError for a tar that cannot be opened.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} is not there or is not a file")
    for found in accounted(samples(path), path, name):
        sample, end = found if isinstance(found, tuple) else (found, 0)
        yield read_sample(sample, name), end


def read_sample(sample: Sample | Bad, name: str) -> Item:
    if isinstance(sample, Bad):
        return Bad(name, sample.reason, sample.detail)
    where = f"{name}:{ascii(sample.key)[1:-1]}"
    if sample.too_large:
        return Bad(where, "members too large", sample.too_large)
    if sample.image is None:
        return Bad(where, "without an image", f"its first member is {sample.first[:200]!a}")
    caption, problem = caption_of(sample)
    if problem:
        return Bad(where, problem, f"its first member is {sample.first[:200]!a}")
    return captioned_item(where, caption, ImageFile(f"{where}.{sample.image}", data=sample.members[sample.image]))
