"""Text benchmarks as the authors' files and as the hub's parquet: the same rows, and one sentence for a bad file."""

import pytest
from text_sets import ITEMS, write_authors, write_hub

from nanochameleon.evaluate.text.files import SOURCES, read_split

SPLITS = [(name, split) for name, splits in ITEMS.items() for split in splits]


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    return write_authors(tmp_path_factory.mktemp("authors"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("hub"))


def test_there_are_items_of_every_set():
    assert set(ITEMS) == set(SOURCES)
    assert all(set(ITEMS[name]) == set(source.splits) for name, source in SOURCES.items())


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_both_shapes_give_the_items(authors, hub, name, split):
    for folder in (authors, hub):
        assert [row for _, row in read_split(name, folder, split)] == ITEMS[name][split]
