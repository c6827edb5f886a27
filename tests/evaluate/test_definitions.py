"""Which definition fits a word: made-up files in WordNet's format and as JSON lines."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny import TOKENIZER, VOCAB, tiny_run

from nanochameleon.errors import UserError
from nanochameleon.evaluate import definitions
from nanochameleon.evaluate.definitions import Entry, held_out, read_entries
from nanochameleon.evaluate.scoring import score
from nanochameleon.evaluate.task import Options
from nanochameleon.weights.model_folder import open_model

[TASK] = definitions.TASKS
LICENCE = "  1 This line is of the licence, and indented.\n"


def synset(number: int, part: str, words: list[str], gloss: str) -> str:
    """Return a line of WordNet's data files, with one pointer."""
    names = " ".join(f"{word} 0" for word in words)
    return f"{number:08} 03 {part} {len(words):02x} {names} 001 @ 00001740 n 0000 | {gloss}  \n"


def write_wordnet(folder: Path, n: int = 300) -> None:
    folder.mkdir(exist_ok=True)
    for name, part in (("noun", "n"), ("verb", "v")):
        lines = [synset(i, part, [f"{name}_{i}"], f'made-up {name} number {i}; "an example of it"') for i in range(n)]
        (folder / f"data.{name}").write_text(LICENCE + "".join(lines))


def test_lines_of_wordnet(tmp_path):
    lines = [
        synset(1, "n", ["red_tar", "Tar"], 'a tar that is red; sticky; "red tar burns"; "tar"'),
        synset(2, "n", [f"w{i}" for i in range(17)], "seventeen words; 11 in hexadecimal"),
    ]
    (tmp_path / "data.noun").write_text(LICENCE + "".join(lines))
    (tmp_path / "data.adj").write_text(synset(3, "s", ["galore(ip)", "big"], "in great numbers"))
    assert read_entries(tmp_path) == [
        Entry(("red tar", "Tar"), "n", "a tar that is red; sticky"),
        Entry(tuple(f"w{i}" for i in range(17)), "n", "seventeen words; 11 in hexadecimal"),
        Entry(("galore", "big"), "a", "in great numbers"),
    ]
    (tmp_path / "dict").mkdir()
    (tmp_path / "data.noun").rename(tmp_path / "dict/data.noun")
    (tmp_path / "data.adj").unlink()
    assert [entry.part for entry in read_entries(tmp_path)] == ["n", "n"]


@pytest.mark.parametrize(
    "line", ["00000001 03 n 02 one 0 000", "x", "00000001 03 n zz one 0 000 | d", "1 03 n 01 a 0 | "]
)
def test_a_broken_line_is_named(tmp_path, line):
    (tmp_path / "data.verb").write_text(synset(1, "v", ["go"], "move") + line + "\n")
    with pytest.raises(UserError, match=r"data\.verb:2 is no line of WordNet"):
        TASK.read(Options(tmp_path))


def test_own_files(tmp_path):
    rows = [{"word": f"word{i}", "definition": f"made-up thing {i}"} for i in range(200)]
    path = tmp_path / "definitions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = TASK.read(Options(tmp_path))
    assert {item.content["word"] for item in items} == {r["word"] for r in rows if held_out(r["definition"])}
    path.write_text('{"word": "a", "definition": "b"}\n{"word": "a"}\n')
    with pytest.raises(UserError, match=r"definitions\.jsonl:2 has no 'definition'"):
        TASK.read(Options(tmp_path))
    path.write_text('{"word": "a", "definition": " "}\n')
    with pytest.raises(UserError, match=r"definitions\.jsonl:1 has an empty word or definition"):
        TASK.read(Options(tmp_path))
    path.write_text('{"word": "a", "definition": "b"}\n')
    with pytest.raises(UserError, match="no 4 make a choice"):
        TASK.read(Options(tmp_path))
    with pytest.raises(UserError, match=r"has no data\.noun"):
        TASK.read(Options(tmp_path / ".."))


def test_one_definition_in_16_is_held_out():
    assert 80 < sum(held_out(f"definition {i}") for i in range(1_600)) < 120


def test_choices_are_held_out_of_one_part_of_speech_and_the_same_in_every_run(tmp_path):
    write_wordnet(tmp_path)
    items = TASK.read(Options(tmp_path))
    assert TASK.read(Options(tmp_path)) == items and TASK.read(Options(tmp_path, limit=5)) == items[:5]
    assert TASK.read(Options(tmp_path, seed=1)) != items
    assert {item.group for item in items} == {"n", "v"} and len({item.id for item in items}) == len(items) > 20
    for item in items:
        candidates, right = item.content["candidates"], item.content["right"]
        kind, number = item.content["word"].split()  # "noun 12"
        assert candidates[right] == f"made-up {kind} number {number}"
        assert len(set(candidates)) == 4 and all(kind in each and held_out(each) for each in candidates)
    assert len(Counter(item.content["right"] for item in items)) == 4


def test_no_candidate_is_another_sense_of_the_word(tmp_path):
    """All but three entries share the word "set", so each of those gets the same three."""
    glosses = [gloss for i in range(400) if held_out(gloss := f"made-up meaning {i}")][:12]
    words = [["set", f"w{i}"] if i < 9 else [f"w{i}"] for i in range(12)]
    lines = [synset(i, "n", words[i], gloss) for i, gloss in enumerate(glosses)]
    (tmp_path / "data.noun").write_text("".join(lines))
    for item in TASK.read(Options(tmp_path)):
        if item.content["word"] == "set":
            right = item.content["candidates"][item.content["right"]]
            assert sorted(item.content["candidates"]) == sorted([right, *glosses[9:]])


def test_definitions_are_scored_after_the_word_and_alone(tmp_path):
    write_wordnet(tmp_path)
    run = open_model(tiny_run(tmp_path / "run"), "cpu")
    [item] = TASK.read(Options(tmp_path, limit=1))
    [answer] = TASK.answer(run, [item], Options(tmp_path))
    new = [TOKENIZER.encode(f" {text}") for text in item.content["candidates"]]
    assert answer.prompt == [VOCAB.bos, *TOKENIZER.encode(f"{item.content['word']}:")]
    for name, prompt in (("log_probs", answer.prompt), ("blind", [VOCAB.bos])):
        wanted = [each.log_prob for each in score(run, [(prompt, each) for each in new])]
        assert answer.output[name] == pytest.approx(wanted, abs=1e-3)
    assert "acc, blind" in TASK.score(item.content, answer.output)[1]


def test_a_definition_longer_than_the_context_is_left_out_alone(tmp_path):
    write_wordnet(tmp_path)
    run = open_model(tiny_run(tmp_path / "run"), "cpu")
    good, bad = TASK.read(Options(tmp_path, limit=2))
    bad.content["candidates"][3] = "long " * run.cfg.model.max_seq_len
    answers = TASK.answer(run, [bad, good], Options(tmp_path))
    assert "a continuation has" in answers[0].output["problem"] and "log_probs" not in answers[0].output
    assert len(answers[1].output["log_probs"]) == len(answers[1].output["blind"]) == 4
