"""GSM8K and MATH on made-up items: prompts, shots, samples, scores, from files to figures."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from text_sets import ITEMS, authors_file, put, write_authors, write_hub
from tiny import TOKENIZER, VOCAB, nano_folder, tiny_config, tiny_model

from nanochameleon.errors import UserError
from nanochameleon.evaluate.runner import evaluate, rescore
from nanochameleon.evaluate.task import Line, Options
from nanochameleon.evaluate.text import answers, word_problems
from nanochameleon.evaluate.text.word_problems import GSM8K, MATH, TASKS, answer, read, score, shots
from nanochameleon.evaluate.writing import Written

STUB = SimpleNamespace(vocab=VOCAB, tokenizer=TOKENIZER, cfg=tiny_config())
BENCHMARKS = pytest.mark.parametrize("benchmark", [GSM8K, MATH], ids=lambda benchmark: benchmark.name)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_authors(tmp_path_factory.mktemp("authors"))


def say(monkeypatch, reply):
    """Let a function of (text of the prompt, sample number, keywords) write in place of the model."""
    calls = []

    def write(run, prompts, max_new_tokens, **keywords):
        calls.append(keywords | {"n": len(prompts), "max_new_tokens": max_new_tokens})
        seen = {}
        texts = []
        for prompt in prompts:
            assert prompt[0] == VOCAB.bos
            text = TOKENIZER.decode(prompt[1:])
            seen[text] = seen.get(text, -1) + 1
            texts.append(Written(reply(text, seen[text]), False, True))
        return texts

    monkeypatch.setattr(word_problems, "write", write)
    return calls


def lines_of(benchmark, options):
    items = read(benchmark, options)
    lines = []
    for item, found in zip(items, answer(benchmark, STUB, items, options), strict=True):
        extracted, metrics = score(benchmark, item.content, json.loads(json.dumps(found.output)))
        lines.append(Line(item.id, item.group, item.content, found.output, extracted, metrics))
    return lines


def solution_of(benchmark, prompt: str) -> str:
    rows = ITEMS[benchmark.name]["test"]
    return next(benchmark.solution(row) for row in rows if prompt.endswith(benchmark.question(row)))


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def test_prompts_are_shots_and_the_question(data):
    item = read(GSM8K, Options(data, shots=2))[0]
    text = item.content["preamble"] + item.content["question"]
    first, second, asked = text.split("\n\n")
    for shot in (first, second):
        assert shot.startswith("Question: Ann has ") and "<<" not in shot and "\nAnswer: Ann has " in shot
        assert shot.splitlines()[-1].startswith("#### ")
    assert asked == "Question: Ann has 20 pens and buys 5. How many has she now?\nAnswer:"
    assert item.content["target"] == "25"


def test_shots_of_math_end_in_the_sentence_that_minervas_rule_reads(data):
    item = read(MATH, Options(data))[0]
    shots = item.content["preamble"].split("Problem:\n")[1:]
    assert len(shots) == 4
    for shot in shots:
        assert answers.final_answer(shot) == f"${answers.boxed(shot)}$"
    assert item.content["question"] == "Problem:\nFind $2x$ for $x=3$.\n\nSolution:" and item.content["target"] == "6"


@BENCHMARKS
def test_shots_are_the_papers_number_chosen_by_the_seed_and_the_same_for_all_items(benchmark, data):
    items = read(benchmark, Options(data))
    assert len(items) == 3 and len({item.content["preamble"] for item in items}) == 1
    chosen = {tuple(shots(benchmark, Options(data, seed=seed))) for seed in range(5)}
    assert {len(set(some)) for some in chosen} == {8 if benchmark is GSM8K else 4} and len(chosen) == 5
    assert shots(benchmark, Options(data, shots=0)) == []
    assert [replace(item, content={}) for item in read(benchmark, Options(data, limit=2))] == [
        replace(item, content={}) for item in items[:2]
    ]


@BENCHMARKS
def test_both_shapes_of_the_files_give_the_same_items(benchmark, data, tmp_path):
    assert read(benchmark, Options(write_hub(tmp_path))) == read(benchmark, Options(data))


def test_drawings_in_source_code_and_problems_without_an_answer_are_no_shots(data, tmp_path):
    rows = ITEMS["math"]["train"]
    bad = [rows[0] | {"problem": f"[asy] draw {i} [/asy]"} for i in range(9)] + [rows[0] | {"solution": "It is 3."}] * 9
    for number, row in enumerate([*bad, *rows[:4]]):
        put(tmp_path / "MATH/train/algebra" / f"{number}.json", json.dumps(row))
    assert sorted(shots(MATH, Options(tmp_path))) == sorted(
        map(lambda r: MATH.question(r) + MATH.solution(r), rows[:4])
    )
    with pytest.raises(UserError, match="training split of math has 4 usable items for 5 shots"):
        shots(MATH, Options(tmp_path, shots=5))


def test_a_problem_without_an_answer_is_named(tmp_path):
    for row, target in ((ITEMS["math"]["test"][0] | {"solution": "It is 3."}, MATH), (None, GSM8K)):
        if target is MATH:
            put(tmp_path / "MATH/test/algebra/0.json", json.dumps(row))
        else:
            put(authors_file(tmp_path, "gsm8k", "test"), json.dumps({"question": "Why?", "answer": "#### so"}) + "\n")
        with pytest.raises(UserError, match=r"(0\.json|test\.jsonl:1) has no answer that can be read"):
            read(target, Options(tmp_path, shots=0))


# ---------------------------------------------------------------------------------------------------------------------
# Answers and scores


@BENCHMARKS
def test_right_solutions_score_1_by_both_readings(benchmark, data, monkeypatch):
    calls = say(monkeypatch, lambda prompt, sample: solution_of(benchmark, prompt))
    lines = lines_of(benchmark, Options(data))
    second = "strict maj@1" if benchmark is GSM8K else "minerva maj@1"
    assert all(line.metrics == {"maj@1": 1.0, second: 1.0} for line in lines)
    assert calls[0]["temperature"] == 0 and calls[0]["top_p"] == 1
    assert calls[0]["stop_strings"] == ["Question:" if benchmark is GSM8K else "Problem:"]
    context = STUB.cfg.model.max_seq_len
    assert calls[0]["max_new_tokens"] == context // 2  # since that is short


@BENCHMARKS
def test_empty_and_wrong_solutions_score_0(benchmark, data, monkeypatch):
    for text in ("", " I do not know.", r" #### 3.14159 \boxed{3.14159}"):
        say(monkeypatch, lambda prompt, sample, text=text: text)
        assert all(set(line.metrics.values()) == {0.0} for line in lines_of(benchmark, Options(data)))


def test_own_and_strict_readings_differ(data, monkeypatch):
    say(monkeypatch, lambda prompt, sample: f" The answer is ${solution_of(GSM8K, prompt).split('#### ')[1]}.00")
    lines = lines_of(GSM8K, Options(data))
    assert [line.metrics for line in lines] == [{"maj@1": 1.0, "strict maj@1": 0.0}] * 3
    say(monkeypatch, lambda prompt, sample: solution_of(MATH, prompt).split(answers.BEFORE)[0])
    assert [line.metrics for line in lines_of(MATH, Options(data))] == [{"maj@1": 1.0, "minerva maj@1": 0.0}] * 3


@pytest.mark.parametrize(
    "said, right",  # of each item: r right, w and v wrong, n no answer
    [("rrwwv", True), ("wrrwv", False), ("nnnrw", True), ("nnnnn", False), ("rwwrr", True)],
)
def test_a_majority_of_samples_decides(said, right, data, monkeypatch):
    """Ties go to the answer that was seen first, and samples without one do not vote."""
    others = {"w": "#### 77777", "v": "#### 88888", "n": "no idea"}
    calls = say(monkeypatch, lambda prompt, sample: others.get(said[sample], solution_of(GSM8K, prompt)))
    lines = lines_of(GSM8K, Options(data, samples=5))
    expected = {"maj@5": float(right), "strict maj@5": float(right), "one sample": said.count("r") / 5}
    assert [line.metrics for line in lines] == [expected] * 3
    assert (calls[0]["temperature"], calls[0]["top_p"], calls[0]["n"]) == (0.6, 0.95, 15)
    assert len(set(calls[0]["seeds"])) == 15
    assert all(len(line.output["texts"]) == 5 for line in lines)


def test_seeds_of_samples_depend_on_the_item_alone(data, monkeypatch):
    calls = say(monkeypatch, lambda prompt, sample: "")
    options = Options(data, samples=3)
    items = read(GSM8K, options)
    answer(GSM8K, STUB, items, options)
    answer(GSM8K, STUB, items[1:2], options)
    assert calls[0]["seeds"][3:6] == calls[1]["seeds"]
    answer(GSM8K, STUB, items[1:2], replace(options, seed=1))
    assert not set(calls[1]["seeds"]) & set(calls[2]["seeds"])


def test_figures_of_math_are_by_subject_and_by_level(data, monkeypatch):
    say(monkeypatch, lambda prompt, sample: solution_of(MATH, prompt) if "remainder" in prompt[-60:] else "")
    lines = lines_of(MATH, Options(data))
    figures = {figure.name: figure for figure in word_problems.figures(MATH, lines)}
    values = {name: figure.value for name, figure in figures.items() if name.startswith("maj@1")}
    assert values == {
        "maj@1": 1 / 3, "maj@1, Algebra": 0.0, "maj@1, Number Theory": 1.0,
        "maj@1, Level 2": 0.0, "maj@1, Level 3": 1.0, "maj@1, Level 5": 0.0,
    }  # fmt: skip
    assert "11.5" in figures["maj@1"].note and "24.7" in figures["maj@1"].note
    assert not figures["maj@1, Algebra"].note and not figures["minerva maj@1"].note


def test_no_lines_give_no_figures():
    assert word_problems.figures(GSM8K, []) == []


# ---------------------------------------------------------------------------------------------------------------------
# A model that answers right


def model_that_says(text: str):
    """A model that writes `text` after every ':' and then ends: the next token depends on the newest one alone."""
    chain = [*TOKENIZER.encode(f":{text}"), VOCAB.eos]
    model = tiny_model(max_seq_len=512)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.wo.weight.zero_()
            layer.feed_forward.w2.weight.zero_()
        model.tok_embeddings.weight.zero_()
        model.output.weight.zero_()
        for number, (token, following) in enumerate(pairwise(chain)):
            model.tok_embeddings.weight[token, number] = 1
            model.output.weight[following, number] = 9
    return model


def test_a_model_that_answers_right_scores_1_from_files_to_tables_and_again_without_it(data, tmp_path, capsys):
    """Every item is one whose answer the model says."""
    row = ITEMS["gsm8k"]["test"][0]
    rows = [
        row,
        row | {"question": "What is 20 + 5?"},
        row | {"question": "How much is 5 times 5?", "answer": "#### 25.0"},
    ]
    put(authors_file(tmp_path, "gsm8k", "test"), "".join(json.dumps(row) + "\n" for row in rows))
    folder = nano_folder(tmp_path / "model", model_that_says(" 25"))
    for samples in (1, 4):
        options = Options(tmp_path, shots=0, samples=samples, out=tmp_path / f"out-{samples}")
        content = evaluate(folder, [TASKS[0]], options, device="cpu")
        figures = {figure["name"]: figure["value"] for figure in content["tasks"]["gsm8k"]["figures"]}
        more = {"one sample": 1.0} if samples > 1 else {}
        assert figures == {f"maj@{samples}": 1.0, f"strict maj@{samples}": 0.0} | more
        log = options.out / "gsm8k" / "items.jsonl"
        before = log.read_bytes()
        assert json.loads(before.splitlines()[0])["output"] == {"texts": [" 25"] * samples, "stopped": [True] * samples}
        again = rescore([TASKS[0]], options)
        assert again["tasks"] == content["tasks"] and log.read_bytes() == before
    capsys.readouterr()


def test_samples_do_not_depend_on_the_chunk(data):
    run = SimpleNamespace(
        vocab=VOCAB, tokenizer=TOKENIZER, cfg=STUB.cfg, model=tiny_model(max_seq_len=512), device=torch.device("cpu"),
        image_tokenizer=SimpleNamespace(n_codes_per_image=4),
    )  # fmt: skip
    options = Options(data, shots=0, samples=3)
    items = read(GSM8K, options)
    ask = partial(answer, GSM8K, run)
    together = ask(items, options)
    assert together == [found for item in items[::-1] for found in ask([item], options)][::-1]
    assert len({text for found in together for text in found.output["texts"]}) == 9
