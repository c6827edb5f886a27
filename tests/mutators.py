"""Damage to a file: flipped, cut or inserted bytes, wrong lengths, odd values in JSON. Checksums around the damage are
made right again, so that the damage reaches the reader.

Every mutator is (data, rng) -> data; `mutated` picks one for the file's kind.
"""

import io
import json
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable

NUMBERS = (0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES = (
    None, True, 0, 1, -1, 3, 0.5, 1e-300, 2**31, 2**53, 2**64, 10**400, float("nan"), float("inf"), "", "a", "\0",
    "a" * 100_000, "\x1b[2J\x07\n\u202e", "\ud800", "../../x", "/", "1e400", [], {}, [[]], [0] * 1_000, {"": None},
)  # fmt: skip
RAW = ("1e400", "-1e400", "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "9" * 5_000)
ODD = (  # how a file shows that it is no longer of its kind; RuntimeError: its parts are packed or encrypted
    ValueError, IndexError, KeyError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile,
    tarfile.TarError,
)  # fmt: skip
HOLE = "a value that no JSON library writes"


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def lose(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice([1, 4, 100, 1_000]) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.choice([1, 4, 100, 1_000])]
    return data[:start] + piece * rng.choice([2, 3, 500 if len(piece) < 200 else 2]) + data[start + len(piece) :]


def put_in(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    piece = rng.choice([rng.randbytes(rng.choice([1, 7, 300])), bytes(rng.choice([1, 600])), b"\xff" * 8, b"\n" * 3])
    return data[:start] + piece + data[start:]


def exchange(data: bytes, rng: random.Random) -> bytes:
    n = rng.choice([2, 4, 8, 64])
    a, b = sorted(rng.randrange(max(1, len(data) - n)) // n * n for _ in range(2))
    return data if b < a + n else data[:a] + data[b : b + n] + data[a + n : b] + data[a : a + n] + data[b + n :]


def lie(data: bytes, rng: random.Random) -> bytes:
    """A number where a length may be, mostly near the start."""
    form = rng.choice(["<H", ">H", "<I", ">I", "<Q", ">Q"])
    piece = struct.pack(form, rng.choice(NUMBERS) % 256 ** struct.calcsize(form))
    place = rng.randrange(min(len(data), rng.choice([16, 200, len(data)])))
    return data[:place] + piece + data[place + len(piece) :]


def nothing(data: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b"\0" * len(data), rng.randbytes(200), b"null", b"[]", b"{}", b"<!doctype html>"])


BYTES = (flip, flip, flip, cut, lose, repeat, put_in, exchange, lie, lie, nothing)


def any_bytes(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(BYTES)(data, rng) if data else rng.randbytes(9)


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def places(value, found: list | None = None) -> list[tuple]:
    """(container, key) of every value inside."""
    found = [] if found is None else found
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found.append((value, key))
        places(inner, found)
    return found


def odd_json(data: bytes, rng: random.Random) -> bytes:
    """One or two values of a JSON text are others, gone, or under another name."""
    content = json.loads(data)
    raw = None
    for _ in range(rng.choice([1, 1, 2])):
        if not (found := places(content)):
            return json.dumps(rng.choice(VALUES)).encode()
        container, key = rng.choice(found)
        if rng.random() < 0.2:
            del container[key]
        elif rng.random() < 0.2 and isinstance(container, dict):
            container[rng.choice([key + "x", "", "\x1b[2J", "__class__"])] = container.pop(key)
        elif rng.random() < 0.1:
            raw, container[key] = rng.choice(RAW), HOLE
        elif isinstance(container[key], int) and rng.random() < 0.5:
            container[key] = rng.choice([container[key] + 1, -container[key], container[key] * 2, *NUMBERS])
        else:
            container[key] = rng.choice(VALUES)
    text = json.dumps(content)
    return (text if raw is None else text.replace(json.dumps(HOLE), raw)).encode()


def odd_line(data: bytes, rng: random.Random) -> bytes:
    """Of .jsonl, .csv, .txt and YAML: a line is another one."""
    rows = data.split(b"\n")
    n = rng.randrange(len(rows))
    words = [b'"', b",", b"\t", b"\xff", b"\0", b"\xef\xbb\xbf", b"\x1b[2J", b"x" * 100_000, "\ud83d".encode("utf-16")]
    if rows[n][:1] == b"{" and rng.random() < 0.7:
        rows[n] = odd_json(rows[n], rng)
    elif rng.random() < 0.3:
        rows[n] = json.dumps(rng.choice(VALUES)).encode()
    else:
        place = rng.randrange(len(rows[n]) + 1)
        rows[n] = rows[n][:place] + rng.choice(words) + rows[n][place:]
    return b"\n".join(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Files with checksums or lengths of their own, which are mended


def odd_safetensors(data: bytes, rng: random.Random) -> bytes:
    (n,) = struct.unpack("<Q", data[:8])
    header = rng.choice([odd_json, odd_json, any_bytes])(data[8 : 8 + n], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + n :]


def odd_zip(data: bytes, rng: random.Random) -> bytes:
    """One member of an archive, as a .pth is, is another, twice there, or deflated."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    members = [(name, archive.read(name)) for name in archive.namelist()]
    n = rng.choice([i for i, (name, _) in enumerate(members) if name.endswith(".pkl")] or [0])
    n = n if rng.random() < 0.7 else rng.randrange(len(members))
    members[n] = members[n][0], any_bytes(members[n][1], rng)
    if rng.random() < 0.1:
        members[n] = rng.choice(["../x", "", "archive/data.pkl", "a" * 300]), members[n][1]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def odd_tar(data: bytes, rng: random.Random) -> bytes:
    """A header with a field that is another, and the right checksum."""
    headers = [place for place in range(0, len(data) - 511, 512) if data[place + 257 : place + 262] == b"ustar"]
    place = rng.choice(headers)
    header = bytearray(data[place : place + 512])
    start, size = rng.choice([(0, 100), (100, 8), (108, 8), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155)])
    numbers = [b"\0", b"7" * size, b"\x80" + b"\xff" * size, b"\xff" * size, b"-1\0"]
    names = [b"../../x\0", b"/etc/x\0", b"x.png\0", bytes([rng.choice(b"01234567xgKLSDV")]), rng.randbytes(size)]
    piece = rng.choice(numbers + names)[:size]
    header[start : start + len(piece)] = piece
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:place] + bytes(header) + data[place + 512 :]


def odd_png(data: bytes, rng: random.Random) -> bytes:
    """A chunk with other content and the right checksum, or one more chunk."""
    starts, place = [], 8
    while place + 12 <= len(data):
        starts.append(place)
        place += 12 + struct.unpack(">I", data[place : place + 4])[0]
    place = rng.choice(starts)
    size = struct.unpack(">I", data[place : place + 4])[0]
    kind, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
    if rng.random() < 0.3:
        kind, size = rng.choice([b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"tRNS", b"acTL", b"fcTL", b"PLTE"]), -12
        content = rng.randbytes(rng.choice([0, 4, 26, 300]))
    else:
        content = any_bytes(content, rng)
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:place] + chunk + data[place + 12 + size :]


def odd_array(data: bytes, rng: random.Random) -> bytes:
    """Integers of two to eight bytes, one after another: some are others."""
    size = rng.choice([2, 4, 8])
    place = rng.randrange(max(1, len(data) // size)) * size
    return data[:place] + (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little") + data[place + size :]


KINDS: dict[str, Callable] = {
    ".json": odd_json, ".jsonl": odd_line, ".csv": odd_line, ".txt": odd_line, ".yaml": odd_line, ".png": odd_png,
    ".safetensors": odd_safetensors, ".pth": odd_zip, ".ckpt": odd_zip, ".tar": odd_tar, ".bin": odd_array,
    ".npy": odd_array,
}  # fmt: skip


def mutated(name: str, data: bytes, rng: random.Random) -> bytes:
    """The content of a file that is called `name`, changed a little; now and then not at all, or twice."""
    suited = KINDS.get(name[name.rfind(".") :], any_bytes)
    for _ in range(rng.choice([1, 1, 1, 2])):
        try:
            data = rng.choice([suited, suited, any_bytes])(data, rng)
        except ODD:
            data = any_bytes(data, rng)
    return data
