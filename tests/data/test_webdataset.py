"""WebDataset tars: every sample before a cut comes, bad ones are counted with tar and key, memory stays bounded."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_bytes import bad_images, encoded, odd_images
from PIL import Image
from written import IMAGE, write_tar

from nanochameleon.data.reading import MAX_CAPTION, Bad, RawItem, walk
from nanochameleon.data.sources.folder import FolderSource, prepare_folder
from nanochameleon.data.sources.webdataset import MAX_IMAGE, MAX_JSON, captioned_images, tars_in
from nanochameleon.errors import UserError


def read(path: Path) -> list[RawItem | Bad]:
    return [found for found, _ in captioned_images(path, path.name)]


def caption(item: RawItem) -> str:
    return item.doc[0].text


def said(path: Path) -> list[tuple]:
    """(caption,) of what can be used, (where, reason) of what cannot."""
    return [(f.where, f.reason) if isinstance(f, Bad) else (caption(f),) for f in read(path)]


@pytest.mark.parametrize("ending", ["jpg", "JPG", "jpeg", "png", "webp"])
def test_a_sample_is_what_shares_a_name_up_to_its_first_dot(ending, tmp_path):
    members = [(f"a.b/{n:09d}.{ending}", IMAGE) for n in range(3)]
    members = [each for m, n in zip(members, range(3), strict=True) for each in (
        m, (f"a.b/{n:09d}.txt", f"caption {n}".encode()), (f"a.b/{n:09d}.seg.npy", b"x" * 9)
    )]  # fmt: skip
    found = read(write_tar(tmp_path / "0.tar", members))
    assert [(caption(f), f.where) for f in found] == [(f"caption {n}", f"0.tar:a.b/{n:09d}") for n in range(3)]
    assert all(f.doc[1].pixels(32).shape == (32, 32, 3) for f in found if ending != "webp")


def test_the_caption_is_the_txt_else_that_of_the_json(tmp_path):
    row = json.dumps({"caption": "from json", "url": "x"}).encode()
    members = [("a.jpg", IMAGE), ("a.json", row), ("a.txt", b" from txt\n"), ("b.json", row), ("b.png", IMAGE)]
    assert said(write_tar(tmp_path / "0.tar", members)) == [("from txt",), ("from json",)]


BAD = {
    "without an image": [("x.txt", b"a cat"), ("x.npy", b"123")],
    "without a caption": [("x.jpg", IMAGE), ("x.json", b'{"caption": " "}')],
    "broken JSON": [("x.jpg", IMAGE), ("x.json", b"[" * 100_000)],
    "not in UTF-8": [("x.jpg", IMAGE), ("x.txt", "caf\xe9".encode("latin-1"))],
    "members too large": [("x.jpg", bytes(MAX_IMAGE + 1)), ("x.txt", b"a cat")],
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_sample_is_listed_with_tar_and_key_and_the_others_come(reason, tmp_path):
    members = [("a.jpg", IMAGE), ("a.txt", b"first"), *BAD[reason], ("z.jpg", IMAGE), ("z.txt", b"last")]
    assert said(write_tar(tmp_path / "0.tar", members)) == [("first",), ("0.tar:x", reason), ("last",)]


def test_half_a_surrogate_pair_and_a_huge_json_are_bad_and_a_huge_text_is_cut(tmp_path):
    half, large = b'{"caption": "\\ud83d"}', json.dumps({"caption": "x" * MAX_JSON}).encode()
    long = "é".encode() * 5_000_000  # 10 MB
    members = [("a.jpg", IMAGE), ("a.json", half), ("b.jpg", IMAGE), ("b.json", large), ("c.jpg", IMAGE)]
    found = read(write_tar(tmp_path / "0.tar", [*members, ("c.txt", b" " + long)]))
    assert [f.reason for f in found[:2]] == ["not in UTF-8", "members too large"]
    assert caption(found[2]) == "é" * MAX_CAPTION and found[2].cut


def test_links_are_not_followed_and_folders_are_no_samples(tmp_path):
    with tarfile.open(write_tar(tmp_path / "0.tar", [("a.jpg", IMAGE), ("a.txt", b"a")]), "a") as tar:
        for name, kind in (("b.jpg", tarfile.SYMTYPE), ("c.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    bad = [(f"0.tar:{name}", "without an image") for name in "bc"]
    assert said(tmp_path / "0.tar") == [("a",), *bad]


def whole_tar(folder: Path, n: int = 4) -> bytes:
    members = [(f"{i}.{end}", data) for i in range(n) for end, data in (("jpg", IMAGE), ("txt", b"%d" % i))]
    return write_tar(folder / "whole.tar", members).read_bytes()


@given(st.integers(0, 4 * 6 * 512))
def test_a_tar_that_is_cut_off_gives_what_came_before_the_cut(cut):
    with tempfile.TemporaryDirectory() as name:
        data = whole_tar(Path(name))
        size = -(-len(IMAGE) // 512) * 512 + 3 * 512  # of a sample: two headers and its members
        assert data[4 * size :].strip(b"\0") == b""
        path = Path(name) / "cut.tar"
        path.write_bytes(data[: min(cut * size // 1_000, 4 * size)])
        found, length = read(path), path.stat().st_size
        whole = [caption(f) for f in found if isinstance(f, RawItem)]
        assert len(whole) in (length // size, (length + 511) // size)  # a text's padding may be missing
        assert whole == [str(i) for i in range(len(whole))]
        assert found[-1].reason == "cut off or broken tars" and found[-1].where == "cut.tar"


@given(st.integers(0, 9_000), st.binary(min_size=1, max_size=600))
def test_no_bytes_in_a_tar_make_it_fail_or_run_on(place, garbage):
    with tempfile.TemporaryDirectory() as name:
        data = bytearray(whole_tar(Path(name)))
        place = place * len(data) // 9_000
        data[place : place + len(garbage)] = garbage
        (Path(name) / "0.tar").write_bytes(data)
        assert len(read(Path(name) / "0.tar")) <= 40


@pytest.mark.parametrize("claimed", [2**40, 2**33, -512])
@pytest.mark.parametrize("kind", [b"x", b"L", b"0"])
def test_a_header_that_claims_gigabytes_is_not_believed(kind, claimed, tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = kind, claimed
    header = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "0.tar").write_bytes(whole_tar(tmp_path)[: -2 * 512 * 10] + header + bytes(4_096))
    found = read(tmp_path / "0.tar")
    assert [caption(f) for f in found if isinstance(f, RawItem)][:3] == ["0", "1", "2"] and isinstance(found[-1], Bad)


def test_long_names_are_read(tmp_path):
    stem = "d" * 90 + "/" + "e" * 200
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=kind) as tar:
            for ending, data in (("jpg", IMAGE), ("txt", "grün".encode())):
                info = tarfile.TarInfo(f"{stem}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        assert said(tmp_path / f"{number}.tar") == [("grün",)]


def sample(key: str, caption: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", IMAGE), (f"{key}.txt", caption.encode())]


TARS = {
    "keys with dots": (sample("photo.2021.01", "a") + sample("photo.2021.02", "b"), ["a", "b"], []),
    "keys with dots among others": (sample("a", "a") + sample("photo.v2", "b") + sample("z", "c"), ["a", "b", "c"], []),
    "a sample inside another": (sample("a", "a") + sample("a.small", "b") + sample("b", "c"), ["b", "a", "c"], []),
    "several images of one sample": (
        [("s.input.jpg", IMAGE), ("s.target.jpg", IMAGE)], [],
        [("s.input", "without a caption"), ("s.target", "without a caption")],
    ),
    "one key twice": (sample("a", "one") + sample("a", "two"), ["one", "two"], []),
    "one member twice": ([("a.jpg", IMAGE), *sample("a", "a")], ["a"], [("a", "without a caption")]),
    "sorted by kind": (
        [("a.jpg", IMAGE), ("b.jpg", IMAGE), ("a.txt", b"a"), ("b.txt", b"b")], [],
        [(key, f"without {what}") for what in ("a caption", "an image") for key in "ab"],
    ),
    "what is no sample": (
        [("README", b"a"), ("clip.mp4", b"a"), ("jpg", b"a"), ("dir/00.npy", b"a")], [],
        [(key, "without an image") for key in ("README", "clip", "jpg", "dir/00")],
    ),
    "an empty text next to a good caption": ([*sample("a", " "), ("a.json", b'{"text": "a"}')], ["a"], []),
    "captions that are none": (
        [m for key, text in (("a", b"null"), ("b", b"NaN"), ("c", b'["a"]')) for m in (
            (f"{key}.jpg", IMAGE), (f"{key}.json", b'{"caption": %s}' % text))], [],
        [(key, "without a caption") for key in "abc"],
    ),
    "texts in UTF-16": (
        [("a.jpg", IMAGE), ("a.txt", "words".encode("utf-16")), ("b.jpg", IMAGE), ("b.txt", b"w\0o\0")], [],
        [("a", "not in UTF-8"), ("b", "NUL bytes")],
    ),
    "a Mac's and a notebook's": ([("._a.jpg", b"x"), *sample("a", "a"), (".ipynb_checkpoints/a.txt", b"x")], ["a"], []),
}  # fmt: skip


@pytest.mark.parametrize("kind", TARS)
def test_every_member_is_part_of_a_sample_that_is_used_or_listed(kind, tmp_path):
    tar, captions, bad = TARS[kind]
    listed = said(write_tar(tmp_path / "0.tar", tar))
    assert [each[0] for each in listed if len(each) == 1] == captions
    assert [each for each in listed if len(each) == 2] == [(f"0.tar:{key}", reason) for key, reason in bad]


@pytest.mark.parametrize("gap", [0, 9_728, 3_000_000])
def test_joined_tars_are_listed(gap, tmp_path):
    parts = [write_tar(tmp_path / name, sample(name, name)).read_bytes() for name in "ab"]
    (tmp_path / "0.tar").write_bytes(bytes(gap).join(parts))
    assert said(tmp_path / "0.tar") == [("a",), ("0.tar", "cut off or broken tars")]
    assert "joined from several tars" in read(tmp_path / "0.tar")[-1].detail
    (tmp_path / "0.tar").write_bytes(parts[0] + bytes(gap))
    assert said(tmp_path / "0.tar") == [("a",)]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_is_listed_with_its_kind(pack, tmp_path):
    (tmp_path / "0.tar").write_bytes(pack(whole_tar(tmp_path)))
    assert said(tmp_path / "0.tar") == [("0.tar", "compressed tars")]
    assert read(tmp_path / "0.tar")[0].detail.endswith(": unpack it first")


# ---------------------------------------------------------------------------------------------------------------------
# As a folder of images


def test_a_folder_of_tars_is_taken_like_a_folder_of_images(tmp_path):
    for number in range(3):
        members = [
            (f"{i}.{end}", data)
            for i in range(10 * number, 10 * number + 10)
            for end, data in (
                ("png", encoded(Image.new("RGB", (8, 8), (i, 0, 0)))),
                ("txt", f"image {i}".encode()),
            )
        ]
        write_tar(tmp_path / "mine" / f"{number:05d}.tar", members)
    report = prepare_folder(tmp_path / "mine", tmp_path / "prepared", 8)
    assert (report.images, report.captions, report.skipped) == (30, 30, [])
    train, test = (FolderSource(tmp_path / "prepared", split, 0) for split in ("train", "test"))
    assert (train.size, test.size) == (29, 1)
    for source in (train, test):
        assert all(source.caption(i) == f"image {source.pixels(i)[0, 0, 0]}" for i in range(source.size))


def test_tars_in_folders_for_training_and_test_are_kept_apart(tmp_path):
    for name in ("train", "val"):
        write_tar(tmp_path / "mine" / name / "0.tar", [("a.png", IMAGE), ("a.txt", name.encode())])
    assert [str(path.relative_to(tmp_path)) for path in tars_in(tmp_path / "mine", walk(tmp_path / "mine")[0])] == [
        "mine/train/0.tar", "mine/val/0.tar"
    ]  # fmt: skip
    prepare_folder(tmp_path / "mine", tmp_path / "prepared", 8)
    assert FolderSource(tmp_path / "prepared", "test", 0).caption(0) == "val"


def test_a_caption_file_comes_before_tars(tmp_path):
    write_tar(tmp_path / "mine" / "0.tar", [("a.png", IMAGE), ("a.txt", b"of the tar")])
    (tmp_path / "mine" / "b.png").write_bytes(IMAGE)
    (tmp_path / "mine" / "captions.jsonl").write_text('{"file_name": "b.png", "text": "of the file"}')
    prepare_folder(tmp_path / "mine", tmp_path / "prepared", 8)
    assert FolderSource(tmp_path / "prepared", "train", 0).caption(0) == "of the file"


@pytest.mark.parametrize("content", [b"", b"no tar", bytes(10_240)])
def test_tars_without_anything_to_use_are_refused(content, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match="mine has no image with a caption that can be used"):
        prepare_folder(tmp_path / "mine", tmp_path / "prepared", 8)
    with pytest.raises(UserError, match=r"nowhere\.tar is not there"):
        read(tmp_path / "nowhere.tar")


MEASURE = """
import json, resource, sys
from pathlib import Path
from nanochameleon.data.sources.folder import prepare_folder
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
folder, before = Path(sys.argv[1]), peak()
report = prepare_folder(folder / "mine", folder / "prepared", 16)
print(json.dumps([report.images, [[bad.where, bad.reason] for bad in report.skipped], peak() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize("place", ["tar", "folder"])
def test_every_kind_of_bad_image_is_skipped_with_its_name_in_little_memory(place, tmp_path):
    """Rows 8 and 9 of the fault table: 11 kinds of bad images among odd ones that are good."""
    bad, odd = bad_images(), odd_images()
    names = {name: f"{number:03d}" for number, name in enumerate([*bad, *odd])}
    if place == "tar":
        members = [(f"{names[n]}.{e}", d) for n, x in (bad | odd).items() for e, d in (("jpg", x), ("txt", n.encode()))]
        write_tar(tmp_path / "mine" / "0.tar", members)
    else:
        (tmp_path / "mine").mkdir()
        for name, data in (bad | odd).items():
            (tmp_path / "mine" / f"{names[name]}.jpg").write_bytes(data)
        lines = [json.dumps({"file_name": f"{names[name]}.jpg", "text": name}) + "\n" for name in bad | odd]
        (tmp_path / "mine" / "captions.jsonl").write_text("".join(lines))
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    images, skipped, grown = json.loads(done.stdout)
    assert images == len(odd) and grown < 300
    found = Counter(where.removeprefix("0.tar:").removesuffix(".jpg") for where, _ in skipped)
    assert found == Counter(names[name] for name in bad)
    assert {reason for _, reason in skipped} == {"unreadable images"}
