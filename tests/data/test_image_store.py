"""Stored images: what is stored comes back, and damage is found and named."""

import zlib

import numpy as np
import pytest
from written import flip

from nanochameleon.data import ImageStore, stored_images, write_images
from nanochameleon.data.index import write_index
from nanochameleon.errors import OwnError, UserError


def test_a_changed_image_is_found_when_it_is_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    write_images(tmp_path, ((p, {}) for p in pixels), 4)
    flip(tmp_path / "images.bin", 50)
    assert (ImageStore(tmp_path)[0] == pixels[0]).all()
    with pytest.raises(OwnError, match=r"images\.bin has changed since it was written"):
        ImageStore(tmp_path)[1]


def test_stored_images_come_back_with_their_objects(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    assert write_images(tmp_path, ((p, {"n": i}) for i, p in enumerate(pixels)), 4) == 3
    stored = ImageStore(tmp_path)
    assert (stored.pixels == pixels).all() and stored.items == [{"n": 0}, {"n": 1}, {"n": 2}] and stored.resolution == 4
    (tmp_path / "images.bin").write_bytes(pixels.tobytes()[:-1])
    with pytest.raises(UserError, match=r"images\.bin has 143 bytes where 144 were written"):
        ImageStore(tmp_path)


def test_images_of_an_earlier_run_are_found_under_their_older_names(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    assert stored_images(tmp_path) == tmp_path / "images"
    older = tmp_path / "pictures"
    older.mkdir()
    (older / "pictures.bin").write_bytes(pixels.tobytes())
    index = {"resolution": 4, "items": [{}] * 3, "checksums": [zlib.crc32(p.tobytes()) for p in pixels]}
    write_index(older, "pictures.json", "a folder of prepared pictures", index)
    assert (ImageStore(stored_images(tmp_path))[2] == pixels[2]).all()
    flip(older / "pictures.bin", 0)
    with pytest.raises(OwnError, match=r"pictures\.bin has changed since it was written"):
        ImageStore(stored_images(tmp_path))[0]
