"""Token shards: what is stored comes back, and damage is found and named."""

import json
import math
import os
import signal
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written import flip, write_two_shards

from nanochameleon.data import Shards, write_shards
from nanochameleon.errors import OwnError, UserError

documents = st.lists(st.lists(st.integers(0, 65_535) | st.just(65_535), min_size=1, max_size=9), max_size=12)


@given(documents, st.integers(1, 20))
def test_shards_give_back_every_document(docs, shard_tokens):
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder) / "tokens", docs, shard_tokens)
        shards = Shards(Path(folder) / "tokens")
        assert [ids.tolist() for ids in shards] == docs and len(shards) == len(docs)
        assert all(ids.dtype == np.uint16 for ids in shards)
        assert shards.sizes(0, len(docs)).tolist() == [len(ids) for ids in docs]
        assert [i for first, last in shards.groups for i in range(first, last)] == list(range(len(docs)))
        sizes = [f.stat().st_size // 2 for f in (Path(folder) / "tokens").glob("shard-*.bin")]
        assert sum(sizes) == sum(map(len, docs)) and all(n <= max(shard_tokens, *map(len, docs)) for n in sizes)


@pytest.mark.parametrize("ids", [[], [65_536], [-1]])
def test_a_token_that_16_bits_do_not_hold_is_refused_and_leaves_nothing(ids, tmp_path):
    with pytest.raises(ValueError, match="document 1 is empty or has tokens outside"):
        write_shards(tmp_path / "tokens", [[5], ids])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00001.bin", "offsets.bin", "index.json"])
@pytest.mark.parametrize("damage", ["cut", "longer", "missing"])
def test_a_damaged_shard_folder_is_refused_by_the_file_s_name(name, damage, tmp_path):
    file = write_two_shards(tmp_path / "tokens") / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[:-1] if damage == "cut" else content + b"x")
    with pytest.raises(UserError, match=name):
        Shards(tmp_path / "tokens")


def exchange(file: Path, a: int, b: int, size: int) -> None:
    """Two parts of a file change places."""
    content = file.read_bytes()
    parts = content[:a], content[b : b + size], content[a + size : b], content[a : a + size], content[b + size :]
    file.write_bytes(b"".join(parts))


def mend(index: Path, **changes) -> None:
    """Change an index and make its checksum right again; "left out" removes a field."""
    content = {
        k: v for k, v in (json.loads(index.read_text()) | changes).items() if v != "left out" and k != "checksum"
    }
    checksum = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    index.write_text(json.dumps(content | {"checksum": checksum}))


@pytest.mark.parametrize("place", range(14))
def test_a_flipped_bit_in_a_shard_is_found_when_its_document_is_read(place, tmp_path):
    """The shards hold [1, 2, 3] and [4, 5], [6, 65535]."""
    path = write_two_shards(tmp_path / "tokens")
    name, document = ("shard-00000.bin", 0) if place < 6 else ("shard-00001.bin", 1 + (place - 6) // 4)
    flip(path / name, place if place < 6 else place - 6)
    shards = Shards(path)
    with pytest.raises(OwnError, match=rf"{name} has changed since it was written: delete .*tokens, and the command"):
        shards.fetch([document])
    others = [number for number in range(3) if number != document]
    assert [ids.tolist() for ids in shards.fetch(others)] == [[[1, 2, 3], [4, 5], [6, 65_535]][n] for n in others]


@pytest.mark.parametrize("name", ["offsets.bin", "checksums.bin", "index.json"])
def test_a_changed_byte_in_the_files_next_to_the_shards_is_refused(name, tmp_path):
    path = write_two_shards(tmp_path / "tokens")
    content = (path / name).read_bytes()
    for place in range(len(content)):
        flip(path / name, place)
        with pytest.raises(UserError, match=rf"{name} (is broken|has changed since it was written): delete"):
            Shards(path)
        (path / name).write_bytes(content)
    assert len(Shards(path)) == 3


def test_exchanged_offsets_are_refused(tmp_path):
    path = write_two_shards(tmp_path / "tokens")
    exchange(path / "offsets.bin", 8, 16, 8)
    with pytest.raises(UserError, match=r"offsets\.bin has changed"):
        Shards(path)


def test_exchanged_shards_are_refused(tmp_path):
    write_shards(tmp_path / "tokens", [[1, 2], [3, 4]], shard_tokens=2)
    names = [tmp_path / "tokens" / f"shard-0000{number}.bin" for number in (0, 1)]
    first, second = (file.read_bytes() for file in names)
    names[0].write_bytes(second)
    names[1].write_bytes(first)
    with pytest.raises(OwnError, match="has changed"):
        Shards(tmp_path / "tokens").fetch([1])


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    shards = Shards(write_two_shards(tmp_path / "tokens"), vocab_size=100)
    assert shards.fetch([0, 1])[1].tolist() == [4, 5]
    with pytest.raises(
        OwnError, match=r"shard-00001\.bin has the token 65535, which is outside a vocabulary of 100: delete"
    ):
        shards.fetch([0, 2])


COUNTS = [
    "left out", None, "x", ["1", "2"], [None], [math.inf], [1.5, 1.5], [True, 2], [-1, 4], [2**63, 2**63], [1, 2, 3], {}
]  # fmt: skip


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_an_index_with_odd_fields_is_one_sentence_that_says_what_to_delete(counts, tmp_path):
    path = write_two_shards(tmp_path / "tokens")
    mend(path / "index.json", documents_per_shard=counts)
    with pytest.raises(UserError, match=r"tokens/(index\.json|offsets\.bin) .*: delete .*tokens, and the command that"):
        Shards(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"format": []}', '{"format": "a folder of token shards, with"}']
)
def test_an_index_that_is_cut_or_odd_is_one_sentence(text, tmp_path):
    path = write_two_shards(tmp_path / "tokens")
    (path / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is broken: delete .*tokens, and the command that wrote it makes"):
        Shards(path)


@pytest.mark.parametrize("files", [None, ["offsets.bin"], "x", 1])
def test_an_index_with_its_checksum_mended_and_odd_files_is_one_sentence(files, tmp_path):
    path = write_two_shards(tmp_path / "tokens")
    mend(path / "index.json", files=files)
    with pytest.raises(UserError, match=r"index\.json is broken: delete .*tokens, and the command that"):
        Shards(path)


def test_a_path_that_is_no_shard_folder_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("hello")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").write_text('{"format": "a cook book"}')
    for name in ("absent", "file", "other"):
        with pytest.raises(UserError, match=name):
            Shards(tmp_path / name)


@given(st.integers(0, 5), st.booleans())
@settings(max_examples=12)
def test_a_killed_or_failing_writer_leaves_what_was_there_before(stop, killed):
    def docs():
        for i in range(6):
            if i == stop:
                if killed:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
            yield [i, i]

    with tempfile.TemporaryDirectory() as folder:
        fresh, earlier = Path(folder) / "fresh", write_two_shards(Path(folder) / "earlier")
        for path in (fresh, earlier):
            if killed:
                if (child := os.fork()) == 0:
                    try:
                        write_shards(path, docs(), shard_tokens=2)
                    finally:
                        os._exit(1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            else:
                with pytest.raises(KeyboardInterrupt):
                    write_shards(path, docs(), shard_tokens=2)
        with pytest.raises(UserError):
            Shards(fresh)
        assert [ids.tolist() for ids in Shards(earlier)] == [[1, 2, 3], [4, 5], [6, 65_535]]
        write_shards(fresh, [[7]])
        write_shards(earlier, [[8]])
        assert (Shards(fresh)[0], Shards(earlier)[0]) == (7, 8)
        assert {p.name for p in Path(folder).iterdir()} == {"fresh", "earlier"}


def test_a_folder_left_aside_by_a_kill_between_two_renames_comes_back(tmp_path):
    write_two_shards(tmp_path / "tokens").rename(tmp_path / ".tokens.old")
    with pytest.raises(ValueError, match="document 0"):
        write_shards(tmp_path / "tokens", [[]])
    assert len(Shards(tmp_path / "tokens")) == 3 and len(list(tmp_path.iterdir())) == 1


def test_a_folder_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(UserError, match="is in the way"):
        write_shards(tmp_path, [[1]])
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"
