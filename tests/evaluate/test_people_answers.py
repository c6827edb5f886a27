"""Our models' answers: images and texts in order, the same after a kill; and the command from prompts to report."""

import copy
import io
import json
from dataclasses import replace

import pytest
from PIL import Image
from tiny import VOCAB, tiny_model, tiny_run

from nanochameleon.errors import UserError
from nanochameleon.evaluate.drawing import each
from nanochameleon.evaluate.people import answers
from nanochameleon.evaluate.people.answers import answer_all, generated
from nanochameleon.evaluate.people.command import cli
from nanochameleon.evaluate.people.prompts import Prompt
from nanochameleon.evaluate.people.study import open_key, open_study
from nanochameleon.evaluate.people.votes import Votes
from nanochameleon.weights.model_folder import open_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A random model that often begins an image."""
    model = tiny_model()
    model.output.weight.data[VOCAB.boi] *= 8
    return open_model(tiny_run(tmp_path_factory.mktemp("run") / "r", model), "cpu")


def asked(n: int, image=None) -> list[Prompt]:
    extra = [{"image": str(image)}, {"text": "a red"}] if image else []
    return [Prompt(f"p{i}", "x", [{"text": "red tar " * (i % 3 + 1)}, *extra]) for i in range(n)]


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_answers_are_texts_and_images_in_the_order_of_the_tokens(run, tmp_path):
    Image.new("RGB", (9, 5), "red").save(tmp_path / "red.png")
    prompts = asked(6, tmp_path / "red.png")
    found = [list(answer) for answer in generated(run, prompts, seed=3)]
    kinds = {type(part) for answer in found for part in answer}
    assert kinds == {str, bytes} and any(len(answer) > 2 for answer in found)
    for prompt, answer in zip(prompts, found, strict=True):
        request = answers.request_of(run, prompt, 3)
        assert request.prompt[0] == run.vocab.bos and run.vocab.boi in request.prompt
        (alone,) = [list(one) for one in generated(run, [prompt], seed=3)]
        assert alone == answer  # on a CPU the same bytes, whatever the batch
    sides = {Image.open(io.BytesIO(part)).size for answer in found for part in answer if isinstance(part, bytes)}
    assert sides == {(512, 512)}


def test_text_and_images_keep_their_places(run):
    v, request = run.vocab, answers.request_of(run, asked(1)[0], 0)
    words = run.tokenizer.encode("a red")
    image = [v.boi, *(v.code_to_token(code) for code in (1, 2, 3, 4)), v.eoi]
    parts = answers.read_answer(run, request, [*words, *image, *image, *words, v.eos])
    assert [part if isinstance(part, str) else "image" for part in parts] == ["a red", "image", "image", "a red"]
    assert parts[1] == parts[2] and Image.open(io.BytesIO(parts[1])).format == "PNG"


def test_a_killed_run_resumes_to_the_same_bytes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "CHUNK", 2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = answer_all(run, "ours", asked(6), whole, 0)
    assert len(expected) == 6 and len(contents(whole)) > 3
    answer_all(run, "ours", asked(3), cut, 0)
    log = cut / "ours.jsonl"
    log.write_bytes(log.read_bytes()[:-9])  # killed while it wrote the third line
    answer_all(run, "ours", asked(6), cut, 0)
    assert contents(cut) == contents(whole)
    monkeypatch.setattr(answers, "generated", lambda *_: pytest.fail("made again"))
    assert answer_all(run, "ours", asked(6), whole, 0) == expected


@pytest.mark.parametrize("change", ["seed", "prompt", "sampling", "a weight", "the image tokenizer"])
def test_answers_to_something_else_are_not_taken(run, tmp_path, change):
    answer_all(run, "ours", asked(2), tmp_path, 0)
    prompts = asked(2) if change != "prompt" else [replace(asked(1)[0], segments=[{"text": "a"}])]
    other = copy.deepcopy(run)
    if change == "sampling":
        other = replace(run, cfg=replace(run.cfg, sample=replace(run.cfg.sample, top_p=0.5)))
    elif change == "a weight":
        other.model.layers[-1].feed_forward.w2.weight.data[0, 0] += 1
    elif change == "the image tokenizer":
        next(other.image_tokenizer.vqgan.parameters()).data.view(-1)[0] += 1
    with pytest.raises(UserError, match="holds answers to other prompts, or of another model, device or seed"):
        answer_all(other, "ours", prompts, tmp_path, int(change == "seed"))


def test_an_image_of_a_prompt_counts_by_its_content_and_not_by_its_place(run, tmp_path, monkeypatch):
    for name, colour in (("a.png", "red"), ("moved.png", "red"), ("changed.png", "blue")):
        Image.new("RGB", (9, 5), colour).save(tmp_path / name)
    expected = answer_all(run, "ours", asked(1, tmp_path / "a.png"), tmp_path / "s", 0)
    with pytest.raises(UserError, match="holds answers to other prompts"):
        answer_all(run, "ours", asked(1, tmp_path / "changed.png"), tmp_path / "s", 0)
    monkeypatch.setattr(answers, "generated", lambda *_: pytest.fail("made again"))
    assert answer_all(run, "ours", asked(1, tmp_path / "moved.png"), tmp_path / "s", 0) == expected


def test_a_gpu_that_holds_few_slots_gives_the_same_answers(run, monkeypatch):
    expected, made, start = list(generated(run, asked(5), 0)), [], each.Engine
    monkeypatch.setattr(each, "slots_that_fit", lambda run, context: 2)
    monkeypatch.setattr(each, "Engine", lambda *args: made.append(args[3]) or start(*args))
    assert list(generated(run, asked(5), 0)) == expected
    assert made == [3]  # a guided request needs three


def test_a_prompt_that_does_not_fit_is_named(run, tmp_path):
    with pytest.raises(UserError, match=r"the prompt long cannot be asked: the prompt has .* no room"):
        answer_all(run, "ours", [Prompt("long", "x", [{"text": "b" * 500}])], tmp_path, 0)


def test_words_that_look_like_a_file_or_a_mark_are_words(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "cat.png")
    tokens = answers.request_of(run, Prompt("p", "x", [{"text": "cat.png"}]), 0).prompt
    assert run.vocab.boi not in tokens and run.tokenizer.decode(list(tokens[1:-1])) == "cat.png"
    assert tokens[-1] == run.vocab.eot  # the model's turn, whatever its files say of it


def test_from_prompts_to_report(tmp_path, capsys, monkeypatch):
    tiny_run(tmp_path / "run")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.jpg")
    rows = [{"id": i, "prompt": "a red <img>", "task_type": "Other", "image_urls": ["red.jpg"]} for i in range(2)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs = [{"id": i, "segments": [{"text": "a red thing"}, {"image": "red.jpg"}]} for i in range(2)]
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in theirs))
    models = [f"ours={tmp_path / 'run'}", f"theirs={tmp_path / 'theirs.jsonl'}"]
    study = tmp_path / "study"
    cli(["make", "--prompts", str(tmp_path / "prompts.jsonl"), "--models", *models, "--out", str(study), "--votes", "1",
         "--device", "cpu"])  # fmt: skip
    assert open_key(study).models == ("ours", "theirs")
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n" * 200))
    cli(["annotate", str(study), "--annotator", "ann"])
    capsys.readouterr()
    cli(["report", str(study)])
    report = capsys.readouterr().out
    assert "| ours | theirs |" in report and "| ann |" in report
    for form in ("jsonl", "csv", "lmsys", "labelstudio"):
        cli(["export", str(study), "--format", form, "--to", str(tmp_path / f"votes.{form}")])
        assert (tmp_path / f"votes.{form}").stat().st_size > 100
    cli(["import", str(study), "--votes", str(tmp_path / "votes.jsonl")])
    n = len(Votes(open_study(study)).log())
    assert capsys.readouterr().out == f"0 of {n} votes are new\n"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--models", "ours"], "give NAME=PATH"),
        (["--models", "a/b=x"], "give NAME=PATH"),
        (["--models", "a=x", "a=y"], "give NAME=PATH"),
        (["--models", "a=x", "tie=y"], "--models has the name tie, which results use"),
        (["--models", "a=x", "--questions", "relative"], "a pair needs two"),
        (["--models", "a=x", "--votes", "0"], "--votes must be 1 or more, not 0"),
        (["--models", "a=x", "--duplicates", "1.5"], "--duplicates must be from 0 to 1"),
        (["--models", "a=x"], "cannot read"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_2(tmp_path, capsys, more, sentence):
    with pytest.raises(SystemExit) as stop:
        cli(["make", "--prompts", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "s"), *more])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in said and said.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_the_papers_command_prints_and_writes(tmp_path, capsys):
    cli(["paper"])
    printed = capsys.readouterr().out
    cli(["paper", "--to", str(tmp_path / "paper.md")])
    assert printed == (tmp_path / "paper.md").read_text() and "58.8" in printed
