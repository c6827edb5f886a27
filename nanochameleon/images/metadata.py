"""Image files without their metadata, and the orientation that the metadata states.

    without_metadata (PNG and JPEG) -> (the same file without what can break or swell, its orientation)

No pixel depends on metadata, but decoders do: Pillow refuses a good image for a text of 2 MB or a wrong checksum next
to it, and takes gigabytes for a list of tags. So these chunks and segments are removed before a decoder sees the file.
The orientation is the one thing that is read from them.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PARTS = 2**20  # chunks or segments that are read; a photo has some thousands
MAX_METADATA = 2**20  # bytes of one piece of metadata
MAX_TAGS = 2**26  # bytes of all tags of a TIFF together
ORIENTATION = 274  # the tag's number
TAG_FORMATS = {1: "B", 3: "H", 4: "I"}  # types of a tag that can hold an orientation
# bytes of one value of each type of a TIFF's tags
TAG_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


class Spliced(io.RawIOBase):
    """A file made of `head` and the bytes start .. end-1 of another file; nothing is copied."""

    def __init__(self, head: bytes, file: BinaryIO, start: int, end: int):
        self.head, self.file, self.start, self.end, self.position = head, file, start, end, 0

    def tell(self) -> int:
        return self.position

    def seek(self, position: int, whence: int = 0) -> int:
        size = len(self.head) + self.end - self.start
        self.position = max(0, position + {0: 0, 1: self.position, 2: size}[whence])
        return self.position

    def read(self, n: int = -1) -> bytes:
        n = self.end if n < 0 else n
        data = self.head[self.position : self.position + n]
        here = self.start + self.position + len(data) - len(self.head)  # the same position in the other file
        if len(data) < n:
            self.file.seek(here)
            data += self.file.read(max(0, min(n - len(data), self.end - here)))
        self.position += len(data)
        return data


def without_metadata(file: BinaryIO) -> tuple[BinaryIO, int | None]:
    """Return (the file, its orientation 1 to 8); a PNG or JPEG loses its metadata. The orientation is None where none
    is stated, and for other formats.

    Raises ValueError for a file of more parts than MAX_PARTS, or a TIFF whose tags take more memory than an image.
    """
    start = file.read(8)
    if start == SIGNATURE:
        return png_without_metadata(file)
    if start[:3] == b"\xff\xd8\xff":
        return jpeg_without_metadata(file)
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        check_tags(file)
    file.seek(0)
    return file, None


# ---------------------------------------------------------------------------------------------------------------------
# PNG


def chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, size in bytes) of each chunk, up to the first bytes that are not a chunk."""
    place = len(SIGNATURE)
    for _ in range(MAX_PARTS):
        file.seek(place)
        header = file.read(8)
        if len(header) < 8 or not header[4:].isalpha():
            return
        size = struct.unpack(">I", header[:4])[0] + 12  # length, kind and checksum around the data
        yield header[4:], place, size
        place += size
    raise ValueError("it has too many chunks")


def png_without_metadata(file: BinaryIO) -> tuple[BinaryIO, int | None]:
    """Keep the header, the palette, transparency with a right checksum, and the pixels (the first run of IDAT)."""
    head, start, end, orientations = [SIGNATURE], 0, 0, []
    for kind, place, size in chunks(file):
        if kind == b"IDAT" and (not start or place == end):
            start, end = start or place, place + size
        elif size <= MAX_METADATA and kind in (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            file.seek(place)
            chunk = file.read(size)
            if kind in (b"IHDR", b"PLTE") or (kind == b"tRNS" and chunk[-4:] == checksum(chunk)):
                head += [chunk] if not start else []
            elif kind != b"tRNS" and len(orientations) < 100:
                orientations.append(chunk_orientation(kind, chunk[8:-4]))
    return Spliced(b"".join(head), file, start, end), next(filter(None, orientations), None)


def checksum(chunk: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(chunk[4:-4]))


def chunk_orientation(kind: bytes, data: bytes) -> int | None:
    """The orientation in a PNG chunk: as EXIF, as XMP, or as EXIF in the hexadecimal text that ImageMagick writes."""
    if kind == b"eXIf":
        return exif_orientation(data)
    keyword, _, text = data.partition(b"\0")
    compressed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    text = text[1:] if kind == b"zTXt" else text[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else text
    try:
        # max_length bounds the memory: a text of a few KB may decompress to gigabytes
        text = zlib.decompressobj().decompress(text, MAX_METADATA) if compressed else text
        if keyword == b"Raw profile type exif":
            return exif_orientation(bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode()))
    except (ValueError, zlib.error):
        return None
    return xmp_orientation(text) if keyword == b"XML:com.adobe.xmp" else None


# ---------------------------------------------------------------------------------------------------------------------
# JPEG


def segments(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, size in bytes) of each segment, up to the first scan or the first bytes that are none."""
    place = 2
    for _ in range(MAX_PARTS):
        file.seek(place)
        header = file.read(4)
        if len(header) < 4 or header[0] != 0xFF or header[1] < 0xC0 or 0xD0 <= header[1] <= 0xDA:
            return
        # any number of fill bytes 0xFF may precede a marker
        size = 1 if header[1] == 0xFF else struct.unpack(">H", header[2:])[0] + 2
        yield header[1], place, size
        place += size
    raise ValueError("it has too many segments")


def jpeg_without_metadata(file: BinaryIO) -> tuple[BinaryIO, int | None]:
    """Keep JFIF, Adobe's colour transform, all tables, and everything from the first scan on."""
    head, start, exif, xmp = [b"\xff\xd8"], 2, None, None
    for marker, place, size in segments(file):
        start = place + size
        file.seek(place)
        if marker == 0xE1:
            data = file.read(size)[4:]
            exif = exif or (exif_orientation(data) if data.startswith(b"Exif\0\0") else None)
            xmp = xmp or (xmp_orientation(data) if data.startswith(b"http://ns.adobe.com/xap/1.0/\0") else None)
        elif marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker in (0xFE, 0xFF)):
            head.append(file.read(size))
            if len(head) > 1_000:
                raise ValueError("it has too many segments")
    return Spliced(b"".join(head), file, start, file.seek(0, io.SEEK_END)), exif or xmp


# ---------------------------------------------------------------------------------------------------------------------
# Orientations and tags


def exif_orientation(data: bytes) -> int | None:
    """The orientation 1 to 8 in a block of EXIF; None if it states none or is broken."""
    data = re.sub(b"^(Exif\0\0)+", b"", data)
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    try:
        (place,) = struct.unpack_from(f"{order}I", data, 4)
        (n,) = struct.unpack_from(f"{order}H", data, place)
        for entry in range(place + 2, place + 2 + 12 * n, 12):
            tag, kind = struct.unpack_from(f"{order}HH", data, entry)
            if tag == ORIENTATION:
                (value,) = struct.unpack_from(f"{order}{TAG_FORMATS[kind]}", data, entry + 8)
                return value if 1 <= value <= 8 else None
    except (struct.error, KeyError):
        pass
    return None


def xmp_orientation(data: bytes) -> int | None:
    found = re.search(rb'tiff:Orientation(?:="|>)([1-8])', data)
    return int(found[1]) if found else None


def check_tags(file: BinaryIO) -> None:
    """Raise ValueError if the tags of a TIFF's first image have more than MAX_TAGS bytes together.

    Tags may overlap, so the tags of a small file can add up to gigabytes.
    """
    file.seek(0)
    start = file.read(16)
    order = "<" if start[:2] == b"II" else ">"
    large = b"+" in start[2:4]  # BigTIFF: 64-bit offsets and counts
    try:
        (place,) = struct.unpack_from(order + ("Q" if large else "I"), start, 8 if large else 4)
        file.seek(place)
        (n,) = struct.unpack(order + ("Q" if large else "H"), file.read(8 if large else 2))
        entry = struct.Struct(order + ("HHQ8x" if large else "HHI4x"))
        entries = entry.iter_unpack(file.read(entry.size * n) if n < 2**16 else b"")
        size = file.seek(0, io.SEEK_END)  # no tag can have more bytes than the file
        stated = sum(min(TAG_SIZES.get(kind, 0) * count, size) for _, kind, count in entries)
    except (struct.error, OverflowError, ValueError):
        return  # Pillow refuses the file
    if n >= 2**16 or stated > MAX_TAGS:
        raise ValueError("its tags are too large")
