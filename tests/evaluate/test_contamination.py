"""A benchmark's items are found in training data wherever they lie, and nothing else is."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_sets import ITEMS, write_authors
from tiny import TOKENIZER

from nanochameleon.data import write_shards
from nanochameleon.errors import UserError
from nanochameleon.evaluate import contamination
from nanochameleon.evaluate.contamination import FREQUENT, SHORTEST, N, blocks, check, check_item, cli, words_of
from nanochameleon.evaluate.task import Item, Options
from nanochameleon.evaluate.tasks import TASKS

WORDS = st.lists(st.sampled_from("abcdefghij"), min_size=0, max_size=40)
PUNCTUATION = st.sampled_from([" ", ", ", ".\n", " -- ", '" ', "; ("])


def item(*words: str):
    return check_item("made_up", Item("1", {"question": " ".join(words), "preamble": "shots are not looked for"}))


def numbered(n: int, start: int = 0) -> list[str]:
    return [f"w{i}" for i in range(start, start + n)]


@given(st.integers(SHORTEST, 40), WORDS, WORDS, st.lists(PUNCTUATION, min_size=1, max_size=5), st.booleans())
def test_a_copy_is_found_in_other_words_and_punctuation(tmp_path_factory, n, before, after, marks, upper):
    words = before + numbered(n) + after
    text = "".join(word + marks[i % len(marks)] for i, word in enumerate(words))
    path = tmp_path_factory.mktemp("training") / "a.jsonl"
    path.write_text(json.dumps({"text": text.upper() if upper else text}))
    (found,) = check([item(*numbered(n))], [path])
    assert found.state == "dirty" and found.share == 1 and found.where == f"{path}:1"
    assert found.example == " ".join(numbered(min(n, N)))


@given(st.lists(st.sampled_from("abc"), min_size=SHORTEST, max_size=30), WORDS)
def test_found_is_what_a_plain_search_finds(tmp_path_factory, asked, training):
    path = tmp_path_factory.mktemp("training") / "a.jsonl"
    path.write_text(json.dumps({"text": " ".join(training)}))
    (found,) = check([item(*asked)], [path])
    n, text = min(N, len(asked)), f" {' '.join(training)} "
    runs = [i for i in range(len(asked) - n + 1) if f" {' '.join(asked[i : i + n])} " in text]
    assert found.share == len({word for i in runs for word in range(i, i + n)}) / len(asked)


def test_half_a_copy_is_a_part(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(numbered(20)))
    (found,) = check([item(*numbered(40))], [tmp_path / "a.txt"])
    assert found.share == 0.5 and found.state == "part"


def test_shots_and_the_names_of_images_are_not_looked_for():
    f, g = numbered(SHORTEST), numbered(SHORTEST, 50)
    content = {"preamble": "a " * 20, "shots": ["d " * 20], "image": "e." * 20, "choices": [" ".join(f), "short"]}
    content |= {"options": [{"text": f"Question: {' '.join(g)}\nAnswer:"}, " ".join(f)], "target": 3}
    assert check_item("t", Item("1", content)).texts == [f, g]  # each once


@pytest.mark.parametrize("name", ["gsm8k", "math", "boolq", "piqa"])
def test_a_copy_of_the_file_is_found_although_a_prompt_has_other_words_in_another_order(tmp_path, name):
    rows = [json.dumps(row) for split in ("test", "validation") for row in ITEMS[name].get(split, [])]
    (tmp_path / "leak.jsonl").write_text("\n".join(rows))
    task = next(task for task in TASKS if task.name == name)
    items = [check_item(name, item) for item in task.read(Options(write_authors(tmp_path / "data"), shots=0))]
    states = {each.state for each in check(items, [tmp_path / "leak.jsonl"])}
    assert "dirty" in states and states <= {"dirty", "too short"}


def test_what_many_documents_have_is_a_phrase(tmp_path):
    rows = [json.dumps({"text": " ".join(numbered(N))})] * (FREQUENT + 1)
    for n, state in ((FREQUENT, "dirty"), (FREQUENT + 1, "clean")):
        (tmp_path / "a.jsonl").write_text("\n".join(rows[:n]))
        assert check([item(*numbered(N))], [tmp_path / "a.jsonl"])[0].state == state


def test_a_short_item_is_counted_and_proves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(numbered(SHORTEST)))
    assert check([item(*numbered(SHORTEST - 1))], [tmp_path / "a.txt"])[0].state == "too short"
    assert check([item(*numbered(SHORTEST))], [tmp_path / "a.txt"])[0].state == "dirty"


@given(st.integers(1, 300), st.integers(0, 60))
def test_blocks_of_a_file_cut_no_run_of_words(tmp_path_factory, size, start):
    words = numbered(120)
    path = tmp_path_factory.mktemp("training") / "a.txt"
    path.write_text(" ".join(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "BLOCK", size)
        texts = [words_of(text) for _, text in blocks(path)]
        (found,) = check([item(*words[start : start + N])], [path])
    assert found.share == 1
    assert any(words[start : start + N] == text[i : i + N] for text in texts for i in range(len(text)))


def test_prepared_data_are_decoded_and_their_test_split_is_left_out(tmp_path, monkeypatch):
    vocab = TOKENIZER.vocab
    leak, other = (" ".join(numbered(N, start)) for start in (0, 100))
    image = [vocab.boi, vocab.code_to_token(1), vocab.eoi]
    for name, text in (("pairs", leak), ("test", other)):
        write_shards(tmp_path / name, [np.array([vocab.bos, *image, *TOKENIZER.encode(text), vocab.eos], np.uint16)])
    (tmp_path / contamination.INDEX).write_text("{}")
    monkeypatch.setattr(contamination, "open_prepared", lambda _: type("T", (), {"text": lambda self: TOKENIZER})())
    found = check([item(*leak.split()), item(*other.split())], [tmp_path])
    assert [each.state for each in found] == ["dirty", "clean"]
    assert found[0].where == f"{tmp_path / 'pairs'}:0"


def test_the_command(tmp_path, capsys):
    write_authors(tmp_path / "data")
    (tmp_path / "train.txt").write_text("nothing of it")
    common = [str(tmp_path / "train.txt"), "--data", str(tmp_path / "data"), "--tasks"]
    cli([*common, "arc_easy,gsm8k", "--out", str(tmp_path / "out.jsonl")])
    table = capsys.readouterr().out
    assert "arc\\_easy" in table and "| dirty" in table
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {line["task"] for line in lines} == {"arc_easy", "gsm8k"} and all(line["share"] == 0 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "--tasks", "gsm8k"], "nowhere is not there"),
        (["{here}", "--tasks", "gsm8k", "--data", "{here}/data"], "is no training data"),
        (["{here}/train.txt", "--tasks", "gsm9k"], "did you mean gsm8k"),
        (["{here}/train.txt", "--tasks", "gsm8k", "--data", "{here}/data", "--results", "{here}"], "has no gsm8k"),
        (["{here}/train.txt", "--tasks", "gsm8k", "--limit", "0"], "--limit 1 or more"),
        (
            ["{here}/train.txt", "--tasks", "gsm8k", "--data", "{here}/data", "--out", "{here}/no/where.jsonl"],
            r"cannot write .*/no/where.jsonl \(No such file or directory\): choose another --out",
        ),
    ],
)
def test_what_a_user_can_do_wrong(tmp_path, arguments, says):
    write_authors(tmp_path / "data")
    (tmp_path / "train.txt").write_text("words")
    with pytest.raises(UserError, match=says):
        cli([argument.format(here=tmp_path) for argument in arguments])
