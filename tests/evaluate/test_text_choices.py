"""The text benchmarks by candidate scoring: the questions to the letter, shots, normalisations, figures, a model."""

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_sets import ITEMS, write_authors, write_hub
from tiny import TOKENIZER, VOCAB, tiny_config, tiny_model

from nanochameleon.errors import UserError
from nanochameleon.evaluate.task import Line, Options
from nanochameleon.evaluate.text import choices, mmlu
from nanochameleon.evaluate.text.candidates import names, question_of
from nanochameleon.evaluate.text.prompts import QUESTIONS, clean
from nanochameleon.training.run import Run

TASKS = {task.name: task for task in (*choices.TASKS, *mmlu.TASKS)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_authors(tmp_path_factory.mktemp("authors"))


def tiny_run(**changes) -> Run:
    model = tiny_model(**{"max_seq_len": 1024} | changes)
    return Run(tiny_config(model=model.cfg), VOCAB, TOKENIZER, None, model)


# ---------------------------------------------------------------------------------------------------------------------
# What the model is asked

OAK = "Oak -- An oak is a tree with hard wood.\nQuestion: is oak a wood?\nAnswer:"
ROW_50 = "Which row, of abstract_algebra, has 50?\nA. 50 lamps\nB. 51 lamps\nC. 52 lamps\nD. 53 lamps\nAnswer:"
ASKED = {  # (set, index of an item): (context, continuation) of each option, and the index of the right one
    ("piqa", 1): (
        [("Question: To dry a plate,\nAnswer:", "put it under water"),
         ("Question: To dry a plate,\nAnswer:", "use a towel")],
        1,
    ),
    ("social_iqa", 2): (
        [("Q: Pat is late. Why?\nA:", "it is blue"), ("Q: Pat is late. Why?\nA:", "the sea"),
         ("Q: Pat is late. Why?\nA:", "the bus broke down")],
        2,
    ),
    ("hellaswag", 0): (
        [("Baking: A man stands in a Kitchen. He opens the oven", ending)
         for ending in ("and sings.", "and bakes.", "and.", "x.")],
        1,
    ),
    ("hellaswag", 1): (
        [("Home and Garden: How to water a fern. Fill a can. Use rain.", ending)
         for ending in (" Pour it slowly.", "Burn it. Now.", "Eat the can.", "Sell it.")],
        0,
    ),
    ("winogrande", 1): (
        [("Ana thanked Bea because Ana", "had helped her."), ("Ana thanked Bea because Bea", "had helped her.")],
        1,
    ),
    ("arc_easy", 1): (
        [("Question: Which is cold?\nAnswer:", "fire"), ("Question: Which is cold?\nAnswer:", "steam"),
         ("Question: Which is cold?\nAnswer:", "snow")],
        2,
    ),
    ("arc_challenge", 1): (
        [("Question: What is iron?\nAnswer:", text) for text in ("a metal", "a gas", "a plant", "a sound")],
        0,
    ),
    ("openbookqa", 0): ([("A magnet pulls", text) for text in ("wood", "iron", "paper", "glass")], 1),
    ("boolq", 0): ([(OAK, "no"), (OAK, "yes")], 1),
    ("mmlu", 0): (
        [(ROW_50, letter) for letter in "ABCD"],
        3,
    ),
}  # fmt: skip
USED = {name: list(splits)[-1] for name, splits in ITEMS.items()}  # the split that is asked


@pytest.mark.parametrize(("name", "index"), ASKED)
def test_what_is_asked(name, index):
    question = QUESTIONS[name](ITEMS[name][USED[name]][index])
    assert (question.pairs(), question.right) == ASKED[name, index]


def test_every_set_is_asked_from_the_split_that_others_report(data):
    for task in TASKS.values():
        asked = [item.content["contexts"] for item in task.read(Options(data=data))]
        name = {"siqa": "social_iqa", "obqa": "openbookqa"}.get(task.name, task.name.removesuffix("_10shot"))
        assert sorted(asked) == sorted(QUESTIONS[name](row).contexts for row in ITEMS[name][USED[name]])


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a b  ", "a b"),
        ("How to sing [title] Stand up.", "How to sing. Stand up."),
        ("[header] Go", " Go"),  # stripped before, not after
        ("a [b] c", "a c"),
        ("a [b] [c] d", "a  d"),  # three spaces lose one, once
        ("a [b c] d] e", "a d] e"),  # the shortest brackets
        ("[title] a", " a"),  # no space before it: a mark as any other
        ("a [b\n] c", "a [b\n] c"),  # brackets of one line
    ],
)
def test_hellaswag_is_cleaned(text, cleaned):
    assert clean(text) == cleaned


# ---------------------------------------------------------------------------------------------------------------------
# Shots


def test_shots_are_solved_training_items(data):
    item = TASKS["piqa"].read(Options(data=data, shots=2))[1]
    *shots, end = item.content["preamble"].split("\n\n")
    solved = {f"Question: To move {n} stones,\nAnswer: use a cart" for n in range(12)}
    assert len(set(shots)) == 2 and set(shots) < solved and end == ""
    [first] = [i for i in TASKS["winogrande"].read(Options(data=data, shots=1)) if i.content["right"] == 0]
    assert first.content["preamble"].endswith("fits the box as the cup is small.\n\n")


def test_shots_depend_on_the_seed_and_the_item_alone(data, tmp_path):
    task = TASKS["hellaswag_10shot"]
    items = task.read(Options(data=data))
    assert items[:1] == task.read(Options(data=data, limit=1))
    assert items == task.read(Options(data=write_hub(tmp_path / "hub")))
    assert items != task.read(Options(data=data, seed=1))
    assert len({item.content["preamble"] for item in items}) == 3
    moved = write_authors(tmp_path / "moved")
    for name in ("train", "val"):
        path = moved / f"hellaswag/hellaswag_{name}.jsonl"
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert items == task.read(Options(data=moved))[::-1]


def test_too_many_shots_are_refused(data):
    with pytest.raises(UserError, match="12 items, too few for 13 shots"):
        TASKS["piqa"].read(Options(data=data, shots=13))
    with pytest.raises(UserError, match="mmlu has 5 dev items of abstract_algebra, too few for 6 shots"):
        TASKS["mmlu"].read(Options(data=data, shots=6))
    with pytest.raises(UserError, match="hellaswag_10shot always has 10 shots, not 3"):
        TASKS["hellaswag_10shot"].read(Options(data=data, shots=3))


def test_ids_are_unique_and_stay():
    rows = [{"q": "a"}, {"q": "b"}, {"q": "a"}, {"id": "x"}, {"q": "a"}]
    a, b, a2, x, a3 = names(rows)
    assert (a2, a3, x) == (f"{a}-2", f"{a}-3", "x") and a != b
    assert names(rows[1:]) == [b, a, x, a2]


def test_mmlu_has_the_first_dev_items_of_the_subject_as_shots(data):
    items = TASKS["mmlu"].read(Options(data=data))
    assert [item.group for item in items] == ["abstract_algebra", "world_religions"] * 3  # a limit asks about all
    preamble = items[1].content["preamble"]
    *shots, end = preamble.split("\n\n")
    assert shots[0] == "The following are multiple choice questions (with answers) about world religions."
    assert shots[2] == (
        "Which row, of world_religions, has 1?\nA. 1 lamps\nB. 2 lamps\nC. 3 lamps\nD. 4 lamps\nAnswer: B"
    )
    assert len(shots) == 6 and end == ""
    assert TASKS["mmlu"].read(Options(data=data, shots=0))[1].content["preamble"] == f"{shots[0]}\n\n"


# ---------------------------------------------------------------------------------------------------------------------
# Scores from log-probabilities


def content(*options: str, right: int = 0) -> dict:
    return {"preamble": "", "contexts": ["c"], "continuations": [*options], "options": [*options], "right": right}


def test_characters_change_the_winner():
    output = {"log_probs": [-4.0, -5.0]}
    found, metrics = TASKS["piqa"].score(content("four", "eight 8ch", right=1), output)
    assert metrics == {"acc": 0.0, "acc_norm": 1.0}  # -4/4 < -5/9
    assert found == "eight 8ch"  # what the paper's metric chooses


def test_the_answer_prompt_changes_the_winner():
    output = {"log_probs": [-4.0, -5.0], "answer_log_probs": [-1.0, -9.0]}
    found, metrics = TASKS["obqa"].score(content("ab", "cd", right=1), output)
    assert (found, metrics) == ("cd", {"acc_answer": 1.0, "acc": 0.0, "acc_norm": 0.0})


def test_winogrande_and_mmlu_have_one_metric():
    for name in ("winogrande", "mmlu"):
        assert TASKS[name].score(content("a", "b"), {"log_probs": [-1.0, -2.0]}) == ("a", {"acc": 1.0})


def test_an_empty_option_can_be_scored():
    assert TASKS["piqa"].score(content("", "b"), {"log_probs": [-1.0, -2.0]})[1] == {"acc": 1.0, "acc_norm": 1.0}


@given(st.lists(st.floats(-1e3, 0), min_size=3, max_size=5), st.lists(st.text(max_size=9), min_size=5, max_size=5))
def test_equal_lengths_or_equal_priors_change_nothing(log_probs, texts):
    options = texts[: len(log_probs)]
    same = [text.ljust(9, "x") for text in options]
    plain = {"log_probs": log_probs, "answer_log_probs": [-3.0] * len(log_probs)}
    (_, metrics), right = TASKS["obqa"].score(content(*same), plain), log_probs[0] == max(log_probs)
    assert metrics["acc"] == float(right)
    if sorted(log_probs)[-1] - sorted(log_probs)[-2] > 1e-9 or right:  # else rounding decides
        assert len(set(metrics.values())) == 1


def lines_of(task, items, outputs) -> list[Line]:
    scored = [task.score(item.content, output) for item, output in zip(items, outputs, strict=True)]
    return [
        Line(item.id, item.group, item.content, output, found, metrics)
        for item, output, (found, metrics) in zip(items, outputs, scored, strict=True)
    ]


def test_figures_have_chance_the_longest_option_and_the_paper(data):
    task = TASKS["arc_easy"]
    items = task.read(Options(data=data))
    outputs = [{"log_probs": [-1.0, *[-90.0] * (len(item.content["options"]) - 1)]} for item in items]
    norm, acc = task.figures(lines_of(task, items, outputs))
    assert (norm.name, acc.name, norm.n) == ("acc_norm", "acc", 3)
    assert acc.value == pytest.approx(1 / 3)  # the first option is right once
    assert acc.chance == pytest.approx((1 / 4 + 1 / 3 + 1 / 5) / 3)
    assert acc.baseline == 0.0  # "iron bars", "steam" and "a stone" are the longest, and wrong
    assert "76.1" in norm.note and "84.1" in norm.note and acc.note == "sum of log P"


def test_mmlu_counts_questions_and_subjects(data):
    task = TASKS["mmlu"]
    items = task.read(Options(data=data))[:5]  # three of one subject, two of the other
    right = [{"log_probs": [0.0 if i == item.content["right"] else -1.0 for i in range(4)]} for item in items]
    wrong = {"log_probs": [0.0 if i != items[1].content["right"] else -1.0 for i in range(4)]}
    total, *subjects = task.figures(lines_of(task, items, [right[0], wrong, *right[2:]]))
    assert (total.name, total.value, total.n, total.chance) == ("acc", 4 / 5, 5, 0.25) and "52.1" in total.note
    assert [(f.name, f.value, f.n) for f in subjects] == [
        ("acc, abstract_algebra", 1.0, 3),
        ("acc, world_religions", 0.5, 2),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# A model


@pytest.mark.parametrize("name", TASKS)
def test_a_model_answers_and_json_keeps_all_that_a_score_needs(data, name):
    task, options = TASKS[name], Options(data=data)
    items = task.read(options)[:2]
    answers = task.answer(tiny_run(), items, options)
    for item, answer in zip(items, answers, strict=True):
        assert not answer.truncated and answer.prompt[0] == VOCAB.bos
        assert len(answer.output["log_probs"]) == len(item.content["options"])
        assert all(log_prob < 0 for log_prob in answer.output["log_probs"])
        kept = json.loads(json.dumps([item.content, answer.output]))
        assert task.score(*kept) == task.score(item.content, answer.output)


@pytest.mark.parametrize("name", ["piqa", "obqa"])
def test_an_item_whose_option_is_longer_than_the_context_is_left_out_alone(data, name):
    run, task = tiny_run(max_seq_len=64), TASKS[name]
    good, bad = task.read(Options(data=data))[:2]
    bad.content["continuations"][0] = bad.content["options"][0] = "word " * 40
    answers = task.answer(run, [bad, good], Options())
    assert answers[0].output == {"problem": "a continuation has 201 tokens, and the model's context 64"}
    assert answers[1].output["log_probs"] == pytest.approx(
        task.answer(run, [good], Options())[0].output["log_probs"], abs=1e-3
    )


def log_prob(run: Run, context: str, continuation: str) -> float:
    """By the definition: one forward pass over <s>, the context and the continuation."""
    before, after = TOKENIZER.encode(context), TOKENIZER.encode(continuation)
    tokens = torch.tensor([[VOCAB.bos, *before, *after]])
    with torch.no_grad():
        logits = run.model.logits(run.model(tokens[:, :-1])[0]).double().log_softmax(-1)
    return sum(float(logits[len(before) + i, token]) for i, token in enumerate(after))


@pytest.mark.parametrize("name", ["siqa", "winogrande", "obqa", "mmlu"])
def test_log_probabilities_are_those_of_the_text(data, name):
    run, task = tiny_run(), TASKS[name]
    item = task.read(Options(data=data, shots=1))[1]
    [answer] = task.answer(run, [item], Options())
    pairs = question_of(item.content).pairs()
    expected = [log_prob(run, item.content["preamble"] + context, " " + text) for context, text in pairs]
    assert answer.output["log_probs"] == pytest.approx(expected, abs=1e-3)
    if name == "obqa":
        plain = [log_prob(run, "Answer:", " " + text) for _, text in pairs]
        assert answer.output["answer_log_probs"] == pytest.approx(plain, abs=1e-3)


def saying(letters: str) -> Run:
    """A model that expects these bytes everywhere, whatever it reads."""
    run = tiny_run()
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "tok_embeddings" in name:
                parameter.fill_(1.0)
            elif name.endswith(("wo.weight", "w2.weight", "output.weight")):
                parameter.zero_()
        run.model.output.weight[[TOKENIZER.tokens[letter.encode()] for letter in letters]] = 1.0
    return run


def ask(name: str, run: Run, data) -> list[Line]:
    task, options = TASKS[name], Options(data=data)
    items = task.read(options)
    return lines_of(task, items, [answer.output for answer in task.answer(run, items, options)])


def test_a_model_that_knows_the_letter_wins(data):
    for letter in "AD":
        for line in ask("mmlu", saying(letter), data):
            assert line.extracted == line.content["options"]["ABCD".index(letter)]
            assert line.metrics["acc"] == float("ABCD"[line.content["right"]] == letter)


def test_a_model_that_always_says_yes_gains_nothing_by_the_answer_prompt(data):
    lines = ask("boolq", saying("yes"), data)
    assert [line.metrics["acc"] for line in lines] == [1.0, 0.0, 1.0]  # right where the answer is yes
    for line in lines:
        output = line.output
        assert output["log_probs"] == pytest.approx(output["answer_log_probs"], abs=1e-6)


def test_an_answer_depends_on_its_item_alone(data):
    run, task = tiny_run(), TASKS["boolq"]
    items = task.read(Options(data=data))
    together = task.answer(run, items, Options())
    alone = [task.answer(run, [item], Options())[0] for item in items]
    shuffled = random.Random(0).sample(range(len(items)), len(items))
    again = task.answer(run, [items[i] for i in shuffled], Options())
    for other in (alone, [again[shuffled.index(i)] for i in range(len(items))]):
        for a, b in zip(together, other, strict=True):
            assert a.prompt == b.prompt
            assert a.output["log_probs"] == pytest.approx(b.output["log_probs"], abs=1e-4)


def test_a_long_prompt_is_marked_as_cut(data):
    model = tiny_model(max_seq_len=64)
    run = Run(tiny_config(model=model.cfg), VOCAB, TOKENIZER, None, model)
    for name in ("boolq", "mmlu"):
        [answer] = TASKS[name].answer(run, TASKS[name].read(Options(data=data))[:1], Options())
        assert answer.truncated
