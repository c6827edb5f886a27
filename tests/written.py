"""Files that tests read: tars, lines of JSON, token shards, prepared data; and a flipped bit."""

import io
import json
import tarfile
from pathlib import Path

from image_bytes import encoded, noise

from nanochameleon.data import write_shards
from nanochameleon.data.prepare.__main__ import Args, main

IMAGE = encoded(noise())


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def lines(path: Path, *rows) -> Path:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def prepare(data: Path, name: str, source: Path, form: str, model: Path | None = None) -> None:
    main(Args((source,), form, data, name, model, device="cpu"))


def write_two_shards(path: Path) -> Path:
    """Documents [1, 2, 3] and [4, 5], [6, 65535]."""
    write_shards(path, [[1, 2, 3], [4, 5], [6, 65_535]], shard_tokens=4)
    return path


def flip(file: Path, place: int, bits: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= bits
    file.write_bytes(content)
