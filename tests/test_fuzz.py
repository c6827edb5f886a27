"""The fuzzers work: a few inputs of every reader, and each kind of planted fault is found."""

import mmap
import random

import fuzz
import fuzz_readers
import pytest
from fuzz_readers import READERS, Reader
from hypothesis import given, settings
from hypothesis import strategies as st
from mutators import KINDS, mutated

from nanochameleon.errors import UserError


def test_a_few_damaged_files_of_every_reader_end_as_they_should():
    findings = []
    counts = fuzz.run(READERS, 3, 3 * len(READERS), 0, 1, lambda *finding: findings.append(finding))
    assert findings == [] and {name: each.total() for name, each in counts.items()} == {r.name: 3 for r in READERS}


def burn() -> None:
    while True:
        pass


def test_the_reader_of_texts_opens_the_images_of_every_form(tmp_path, monkeypatch):
    fuzz_readers.make_texts(tmp_path)
    opened = []
    monkeypatch.setattr(fuzz_readers, "pixels_of", opened.append)
    for name, n in {"a.jsonl": 5, "b.txt": 0, "c.csv": 2}.items():
        opened.clear()
        fuzz_readers.read_texts(tmp_path, tmp_path / name)
        assert len(opened) == n, name


def take_memory() -> None:
    """New pages: what malloc gives may be memory that the process has freed and kept."""
    with mmap.mmap(-1, 2**25) as pages:
        pages.write(b"x" * 2**25)


FAULTS = {
    "traceback": lambda: {}["missing"],
    "slow": burn,
    "memory": take_memory,
    "silent": lambda: "other",
    "sentence": lambda: exec("raise UserError('')", {"UserError": UserError}),
    "crash": lambda: fuzz.os._exit(9),
}


@pytest.mark.parametrize("verdict", FAULTS)
def test_a_planted_fault_is_found_and_the_rest_continues(verdict, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    monkeypatch.setattr(fuzz, "MEMORY", 2**24)

    def read(folder, changed):
        return "good" if changed.read_bytes() == good else FAULTS[verdict]()

    findings, good = [], bytes(range(256))
    planted = Reader("planted", lambda folder: (folder / "a").write_bytes(good), read, exact=True)
    sound = Reader("sound", planted.make, lambda folder, changed: changed.stat().st_ino and None)
    counts = fuzz.run((planted, sound), 5, 4, 0, 1, lambda *finding: findings.append(finding[:3]))
    assert findings == [("planted", 5, verdict), ("planted", 6, verdict)]
    assert counts["sound"] == {"ok": 2}


@pytest.mark.parametrize("ending", [*KINDS, ".jpg"])
@settings(max_examples=20)
@given(data=st.binary(max_size=600), seed=st.integers(0, 2**32))
def test_any_file_can_be_damaged_and_a_seed_says_how(ending, data, seed):
    one, other = (mutated("a" + ending, data, random.Random(seed)) for _ in range(2))
    assert isinstance(one, bytes) and one == other
