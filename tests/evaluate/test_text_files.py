"""Text benchmarks as the authors' files and as the hub's parquet: the same rows, and one sentence for a bad file."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from text_sets import AUTHORS, ITEMS, authors_file, put, write_authors, write_hub, write_parquet

from nanochameleon.errors import UserError
from nanochameleon.evaluate.text.files import SOURCES, find_split, read_split

SPLITS = [(name, split) for name, splits in ITEMS.items() for split in splits]
USED = {name: list(splits)[-1] for name, splits in ITEMS.items()}  # the split that is asked
SHAPES = {"authors": write_authors, "hub": write_hub}


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


# ---------------------------------------------------------------------------------------------------------------------
# Places


def test_a_set_may_have_the_folder_for_itself(authors, hub):
    for name, folder, split in [
        ("piqa", "piqa/physicaliqa-train-dev", "validation"),
        ("hellaswag", "hellaswag", "train"),
        ("arc_easy", "ARC-V1-Feb2018-2", "test"),
        ("openbookqa", "openbookqa/OpenBookQA-V1-Sep2018/Data/Main", "test"),
        ("math", "MATH", "test"),
        ("mmlu", "mmlu/data", "dev"),
    ]:
        assert [row for _, row in read_split(name, authors / folder, split)] == ITEMS[name][split]
    for name, folder in [("mmlu", "mmlu"), ("math", "hendrycks_math"), ("arc_challenge", "ai2_arc"), ("siqa", "siqa")]:
        name = name.replace("siqa", "social_iqa")
        assert [row for _, row in read_split(name, hub / folder, USED[name])] == ITEMS[name][USED[name]]


def test_parts_of_a_split_are_joined_and_places_name_them(hub, tmp_path):
    rows = ITEMS["boolq"]["train"]
    for part, some in enumerate((rows[:5], rows[5:])):
        write_parquet(tmp_path / f"boolq/train-0000{part}-of-00002.parquet", some)
    found = read_split("boolq", tmp_path, "train")
    assert [row for _, row in found] == rows
    assert found[5][0] == str(tmp_path / "boolq/train-00001-of-00002.parquet:1")


def test_places_name_the_line(authors):
    places = [place for place, _ in read_split("mmlu", authors, "dev")]
    assert places[1] == str(authors / "mmlu/data/dev/abstract_algebra_dev.csv:2")
    places = [place for place, _ in read_split("math", authors, "train")]
    assert places[9:] == [str(authors / f"MATH/train/algebra/{n}.json") for n in (9, 10, 11)]  # by number


def test_a_question_of_several_lines_keeps_them(tmp_path):
    path = put(tmp_path / "mmlu/dev/law_dev.csv", '"Two\nlines",a,"b, c",c,d,B\nlast,a,b,c,d,A\n')
    (_, first), (place, _) = read_split("mmlu", tmp_path, "dev")
    assert (first["question"], first["choices"][1], first["answer"]) == ("Two\nlines", "b, c", 1)
    assert place == f"{path}:3"


@pytest.mark.parametrize(
    ("archive", "name", "split"),
    [
        ("physicaliqa-train-dev.zip", "piqa", "validation"),
        ("mmlu/data.tar", "mmlu", "test"),
        ("MATH.tar", "math", "test"),
        ("gsm8k/main.tar.gz", "gsm8k", "train"),
    ],
)
def test_an_archive_is_not_unpacked(tmp_path, archive, name, split):
    path = put(tmp_path / archive, "zip")
    assert message(name, tmp_path, split).endswith(f"unpack {path} where it is")


def test_folders_of_other_sets_are_not_read(hub):
    """ARC's folders hold test-*.parquet as MMLU's do."""
    assert "has no test split of mmlu" in message("mmlu", hub / "ai2_arc", "test")
    assert "has no test split of math" in message("math", hub / "gsm8k", "test")


def test_what_is_missing_is_named(tmp_path):
    said = message("hellaswag", tmp_path, "validation")
    assert said == (
        f"{tmp_path} has no validation split of hellaswag: put hellaswag_val.jsonl or the hub's validation-*.parquet "
        f"into {tmp_path / 'hellaswag'}"
    )
    assert "--data is missing" in message("hellaswag", None, "validation")


# ---------------------------------------------------------------------------------------------------------------------
# Bad files


def message(name, data, split) -> str:
    with pytest.raises(UserError) as raised:
        read_split(name, data, split)
    return str(raised.value)


def edited(folder: Path, name: str, split: str, line: int, change) -> tuple[Path, str]:
    """Write all sets, change one line (from 1) of a file with JSON lines -> (the file, what reading says)."""
    path = authors_file(write_authors(folder), name, split)
    lines = path.read_text().splitlines()
    lines[line - 1] = change(lines[line - 1])
    path.write_text("\n".join(lines) + "\n")
    return path, message(name, folder, split)


def setting(**fields):
    """Change fields of a row; None removes one."""

    def change(line: str) -> str:
        row = json.loads(line) | fields
        return json.dumps({name: value for name, value in row.items() if value is not None})

    return change


FIRST_SENTENCE = ITEMS["winogrande"]["validation"][0]["sentence"]


def broken(line: str) -> str:
    return line[:-5]


BAD = [
    ("piqa", setting(sol2=None), "has no 'sol2': it must be a text"),
    *((name, broken, "is not JSON") for name in AUTHORS),
    ("piqa", lambda line: "[1]", "is not a JSON object"),
    ("social_iqa", setting(answerC=3), "has 3 as 'answerC': it must be a text"),
    ("hellaswag", setting(endings=["a", "b", "c"]), "has 3 'endings': there must be 4 texts"),
    ("hellaswag", setting(label=4), "has '4' as 'label': it must be one of 0, 1, 2, 3"),
    ("hellaswag", setting(label=True), "has true as 'label'"),
    ("winogrande", setting(sentence="no gap"), "has 0 '_' in its sentence"),
    ("winogrande", setting(sentence="_ and _"), "has 2 '_' in its sentence"),
    ("winogrande", setting(answer="3"), "has '3' as 'answer': it must be one of 1, 2"),
    ("winogrande", setting(qID=f"Q-{FIRST_SENTENCE}"), "ids must differ"),
    ("arc_easy", setting(id="E1"), "has the id 'E1'"),
    ("openbookqa", setting(id="7-1"), "ids must differ"),
    ("arc_easy", setting(answerKey="Z"), "has 'Z' as 'answerKey': it must be one of 1, 2, 3"),
    ("arc_easy", setting(question={"stem": "q", "choices": []}), "has 0 'label': there must be 3 to 5 texts"),
    ("arc_easy", setting(question={"stem": "q", "choices": "ab"}), "has \"ab\" as 'choices': it must be a list"),
    ("arc_easy", setting(question={"stem": "q", "choices": [1, 2, 3]}), "choices that are no objects"),
    (
        "arc_challenge",
        setting(question={"stem": "q", "choices": [{"text": t, "label": "A"} for t in "abc"]}, answerKey="A"),
        "one label for two choices",
    ),
    ("openbookqa", setting(question="flat"), "has \"flat\" as 'question': it must be an object"),
    ("boolq", setting(answer=1), "has 1 as 'answer': it must be true or false"),
    ("boolq", setting(title=None), "has no 'title'"),
    ("gsm8k", setting(answer="so it is 5"), "has an answer without '####'"),
]


@pytest.mark.parametrize(("name", "change", "said"), BAD)
def test_a_bad_row_is_named(tmp_path, name, change, said):
    path, sentence = edited(tmp_path, name, USED[name], 2, change)
    assert sentence.startswith(f"{path}:2 ") and said in sentence


@pytest.mark.parametrize("name", AUTHORS)
def test_an_empty_file_is_named(tmp_path, name):
    path = put(authors_file(tmp_path, name, USED[name]), "\n")
    assert message(name, tmp_path, USED[name]).startswith(f"{path} is empty")


def test_a_bad_problem_is_named(tmp_path):
    path = put(tmp_path / "MATH/test/algebra/7.json", '{"problem": "p", "level": "Level 1", "type": "Algebra"}')
    assert message("math", tmp_path, "test") == f"{path} has no 'solution': it must be a text"
    path.write_text("[]")
    assert message("math", tmp_path, "test").startswith(f"{path} does not hold an object")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("0\n1\n", "has 2 lines for the 3 items of dev.jsonl"),
        ("0\n2\n0\n", ":2 has '2' as 'label': it must be one of 0, 1"),
        ("0\n\n0\n", ":2 has '' as 'label'"),
        ("", "is empty"),
    ],
)
def test_bad_labels_are_named(tmp_path, labels, said):
    path = authors_file(write_authors(tmp_path), "piqa", "validation").with_name("dev-labels.lst")
    path.write_text(labels)
    assert message("piqa", tmp_path, "validation").startswith(str(path) + (said if said[0] == ":" else f" {said}"))
    path.unlink()
    assert f"{path.parent} has no dev-labels.lst" in message("piqa", tmp_path, "validation")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("q,a,b,c,A\n", ":1 has 5 columns: there must be 6"),
        ("q,a,b,c,d,E\n", ":1 has 'E' as 'letter': it must be one of A, B, C, D"),
        ('q,a,b,c,d,A\n"q,a,b,c,d,A\n', ":2 is not CSV"),
        ("\n", " is empty"),
    ],
)
def test_bad_columns_are_named(tmp_path, text, said):
    path = put(tmp_path / "mmlu/test/law_test.csv", text)
    assert message("mmlu", tmp_path, "test").startswith(f"{path}{said}")


def test_a_bad_parquet_file_is_named(tmp_path):
    path = tmp_path / "boolq/validation-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_bytes(b"no parquet")
    assert message("boolq", tmp_path, "validation").startswith(f"{path} is no readable parquet file")
    write_parquet(path, [{"question": b"q", "passage": "p", "label": -1}])  # as in the hub's test split: no answer
    assert "has -1 as 'label'" in message("boolq", tmp_path, "validation")
    write_parquet(path, [])
    assert message("boolq", tmp_path, "validation").startswith(f"{path} is")


def test_parquet_needs_pyarrow(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert 'pip install "nanochameleon[eval]"' in message("boolq", hub, "validation")


# ---------------------------------------------------------------------------------------------------------------------
# Any damage


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Folders that each example leaves as they were."""
    return {shape: write(tmp_path_factory.mktemp(shape)) for shape, write in SHAPES.items()}


FILES = [(name, split, shape) for name, split in SPLITS if split in ("validation", "dev", "test") for shape in SHAPES]


@given(st.sampled_from(FILES), st.integers(0, 10**6), st.integers(1, 255), st.booleans(), st.integers(0, 10**6))
def test_damage_gives_all_rows_or_one_sentence(pristine, file, place, change, is_cut, which):
    """A flipped byte, or a line without its end. A line that is gone altogether cannot be noticed."""
    name, split, shape = file
    folder = pristine[shape]
    files = files_of(folder, name, split)
    path = files[which % len(files)]
    good = path.read_bytes()
    data = bytearray(good)
    at = place % len(data)
    if is_cut:
        assume(at > 0 and data[at - 1] != ord("\n"))
        del data[at : data.find(b"\n", at) if b"\n" in data[at:] else None]
    else:
        data[at] ^= change
    try:
        path.write_bytes(data)
        with suppress(UserError):
            assert len(read_split(name, folder, split)) == len(ITEMS[name][split])
    finally:
        path.write_bytes(good)


def files_of(folder: Path, name: str, split: str) -> list[Path]:
    """The files of a split, its labels included."""
    found = find_split(name, folder, split)
    return found + [labels for path in found if (labels := path.with_name(f"{path.stem}-labels.lst")).is_file()]
