"""Preparing at scale: the same bytes however many processes share the work and whenever they are killed; text is text;
what does not fit is cut between images; what is wrong is one sentence."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_bytes import encoded
from PIL import Image as PILImage
from strategies import SNIPPETS, any_text
from tiny import TOKENIZER, VOCAB, tiny_run
from tqdm import tqdm
from written import lines, write_tar

from nanochameleon.data import Shards
from nanochameleon.data.prepare import tokenizing
from nanochameleon.data.prepare.__main__ import Args, main
from nanochameleon.data.prepare.fit import fit
from nanochameleon.data.prepare.tokenizing import PrepareJob, UnitResult, run, tokenize
from nanochameleon.data.reading import MAX_CAPTION
from nanochameleon.data.sources.units import Unit, plan
from nanochameleon.documents import EndOfTurn, Image, Text, parse, render
from nanochameleon.errors import UserError
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.run import TEXT_TOKENIZER


class Levels:
    """Takes the place of an image tokenizer: the 4 codes of an image are the red of its 2 x 2 pixels, over 32."""

    vqgan = SimpleNamespace(cfg=SimpleNamespace(resolution=2))

    def encode(self, images):
        return torch.from_numpy(images[..., 0].reshape(len(images), 4) // 32).long()


def job(directory: Path, form: str, sources: list[Path], most: int = 64, seed: int = 0) -> PrepareJob:
    return PrepareJob(directory, form, most, seed, TOKENIZER, Levels(), "digest", *plan(sources, form))


def prepare(directory: Path, form: str, sources: list[Path], **more) -> list[list]:
    run(job(directory, form, sources, **more), 0, 1, 2)
    return [parse(ids.tolist(), TOKENIZER, VOCAB) for ids in Shards(directory)]


def tar_of(path: Path, levels, **more) -> Path:
    """A tar of images of one red each, its caption the code that it has."""
    members = []
    for number, level in enumerate(levels):
        image = encoded(PILImage.new("RGB", (2, 2), (32 * level, 0, 0)))
        members += [(f"{number:04d}.png", image), (f"{number:04d}.txt", b"red %d" % level)]
    return write_tar(path, members)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """Seven tars of 20 images, a bad one in each."""
    folder = tmp_path_factory.mktemp("web")
    for number in range(7):
        levels = np.random.default_rng(number).integers(0, 8, 20).tolist()
        tar_of(folder / f"{number:05d}.tar", levels)
        with open(folder / f"{number:05d}.tar", "r+b") as file:
            file.seek(512 + 10)  # inside the first image
            file.write(b"xxxx")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Forms


def test_pairs_have_either_one_first_half_and_half_and_every_caption_its_image(tmp_path):
    levels = [i % 8 for i in range(400)]
    docs = prepare(tmp_path / "out", "pairs", [tar_of(tmp_path / "0.tar", levels)])
    first = sum(isinstance(doc[0], Text) for doc in docs)
    assert len(docs) == 400 and abs(first - 200) < 50  # 5 standard deviations
    for doc, level in zip(docs, levels, strict=True):
        text, image = sorted(doc, key=lambda s: isinstance(s, Image))
        assert text == Text(f"red {level}") and image == Image((level,) * 4)
    other = prepare(tmp_path / "seed", "pairs", [tmp_path / "0.tar"], seed=1)
    assert [doc[0] for doc in other] != [doc[0] for doc in docs]


def test_drawings_begin_with_the_caption_and_interleaved_ones_are_two(tmp_path):
    tar = tar_of(tmp_path / "0.tar", range(5))
    drawn = [[Text(f"red {i}"), Image((i,) * 4)] for i in range(5)]
    assert prepare(tmp_path / "a", "drawings", [tar]) == drawn
    assert prepare(tmp_path / "b", "interleaved", [tar]) == [drawn[0] + drawn[1], drawn[2] + drawn[3], drawn[4]]
    assert prepare(tmp_path / "c", "text", [tar]) == [[text] for text, _ in drawn]


def test_a_chat_is_prompts_and_answers(tmp_path):
    PILImage.new("RGB", (2, 2), (96, 0, 0)).save(tmp_path / "a.png")
    turns = [[{"text": "draw"}], [{"image": "a.png"}], [{"image": "a.png"}, {"text": "?"}], [{"text": "red"}]]
    (doc,) = prepare(tmp_path / "out", "chat", [lines(tmp_path / "a.jsonl", {"turns": turns})])
    three, end = Image((3,) * 4), EndOfTurn()
    assert doc == [Text("draw"), end, three, end, three, Text("?"), end, Text("red")]


@given(st.lists(any_text.filter(str.strip), min_size=1, max_size=6), st.integers(3, 60))
def test_no_text_injects_a_special_token_and_none_of_it_is_lost(tmp_path_factory, written, most):
    """Row 12 of the fault table: any text, spellings of special tokens among them, becomes text tokens alone."""
    written = [text.strip() for text in (*written, *SNIPPETS) if text.strip()]
    place = tmp_path_factory.mktemp("text")
    run(job(place / "out", "text", [lines(place / "a.jsonl", *({"text": t} for t in written))], most), 0, 1, 1)
    given_back = b""
    for ids in Shards(place / "out"):
        assert ids[0] == VOCAB.bos and ids[-1] == VOCAB.eos and 3 <= len(ids) <= most
        assert (ids[1:-1] >= VOCAB.first_text).all()
        given_back += TOKENIZER.decode_bytes(ids[1:-1])
    assert given_back.decode() == "".join(written)


def test_captions_that_spell_special_tokens_add_no_image_and_no_turn(tmp_path):
    """The same next to images, where such tokens are expected."""
    image = encoded(PILImage.new("RGB", (2, 2), (96, 0, 0)))
    spelled = [VOCAB.name(i) for i in range(VOCAB.first_text)] + ["<image>", "<boi>"]
    members = [m for n, word in enumerate(spelled) for m in ((f"{n}.png", image), (f"{n}.txt", word.encode()))]
    assert prepare(tmp_path / "out", "drawings", [write_tar(tmp_path / "0.tar", members)]) == [
        [Text(word), Image((3,) * 4)] for word in spelled
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Too long


words = st.integers(0, 40).map(lambda n: Text("x" * n))
image = st.just(Image((1, 2, 3, 4)))


@given(words, st.booleans(), st.integers(9, 60))
def test_a_caption_that_is_too_long_loses_its_end_and_never_its_image(text, first, most):
    doc = [text, Image((1, 2, 3, 4))] if first else [Image((1, 2, 3, 4)), text]
    (ids,), cut = fit(doc, "pairs", most, TOKENIZER)
    kept = text.text[: most - 8]
    assert ids == render([Text(kept) if isinstance(s, Text) else s for s in doc], TOKENIZER, VOCAB)
    assert cut == (kept != text.text) and len(ids) <= most


@given(st.lists(words | image, min_size=1, max_size=6), st.integers(9, 80))
def test_a_document_that_is_too_long_ends_before_the_image_that_does_not_fit(doc, most):
    lists, cut = fit(doc, "interleaved", most, TOKENIZER)
    whole = render(doc, TOKENIZER, VOCAB)
    assert cut == (len(whole) > most and bool(lists))
    for ids in lists:
        assert len(ids) <= most
        kept = parse(ids, TOKENIZER, VOCAB)  # raises for half an image
        n_images = sum(isinstance(s, Image) for s in kept)
        before = [s for s in doc if isinstance(s, Image)][:n_images]
        assert [s for s in kept if isinstance(s, Image)] == before
        assert whole[: len(ids) - 1] == ids[:-1] or n_images  # a text may lose its end before an image


@given(st.lists(st.tuples(words, words | image), min_size=1, max_size=5), st.integers(9, 90))
def test_a_chat_that_is_too_long_keeps_whole_turns(pairs, most):
    doc = [s for number, (a, b) in enumerate(pairs) for s in ([EndOfTurn()] * (number > 0) + [a, EndOfTurn(), b])]
    lists, _ = fit(doc, "chat", most, TOKENIZER)
    sizes = [len(render(doc[: 4 * n - 1], TOKENIZER, VOCAB)) for n in range(1, len(pairs) + 1)]
    fitting = [n for n, size in enumerate(sizes, 1) if size <= most]
    assert lists == ([render(doc[: 4 * fitting[-1] - 1], TOKENIZER, VOCAB)] if fitting else [])


def test_a_caption_of_ten_megabytes_is_cut_at_once(tmp_path, monkeypatch):
    """No more of it is encoded than could fit."""
    encode, lengths = TextTokenizer.encode, []
    monkeypatch.setattr(
        TextTokenizer, "encode", lambda self, text, *rest: lengths.append(len(text)) or encode(self, text, *rest)
    )
    image = encoded(PILImage.new("RGB", (2, 2)))
    tar = write_tar(tmp_path / "0.tar", [("a.png", image), ("a.txt", "é".encode() * 5_000_000)])
    (doc,) = prepare(tmp_path / "out", "drawings", [tar], most=64)
    assert 0 < max(lengths) <= MAX_CAPTION
    assert doc == [Text("é" * 28), Image((0,) * 4)]
    assert json.loads((tmp_path / "out" / "index.json").read_text())["cut"] == 1  # at its limit, and again to fit


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.parametrize("world", [2, 3, 9])
def test_the_bytes_do_not_depend_on_how_many_share_the_work(world, tars, tmp_path):
    said = run(job(tmp_path / "one", "pairs", [tars]), 0, 1, 2)
    assert "133 documents" in said and "7 skipped: 7 unreadable images" in said
    for rank in reversed(range(world)):
        run(job(tmp_path / "many", "pairs", [tars]), rank, world, 3)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert run(job(tmp_path / "many", "pairs", [tars]), 0, 1, 1).endswith("is prepared already")


def test_processes_at_the_same_time_need_not_talk(tars, tmp_path):
    run(job(tmp_path / "one", "pairs", [tars]), 0, 1, 2)
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(run, job(tmp_path / "many", "pairs", [tars]), rank, 4, 1) for rank in range(4)]
        assert [future.result() for future in done]
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_what_is_done_is_not_done_again_and_nothing_is_there_before_all_is(tars, tmp_path, monkeypatch):
    done = []

    def stops(number, *rest):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(number)
        return tokenize(number, *rest)

    monkeypatch.setattr(tokenizing, "tokenize", stops)
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path / "out", "pairs", [tars]), 0, 1, 2)
    with pytest.raises(UserError, match=r"no readable index\.json"):
        Shards(tmp_path / "out")
    monkeypatch.setattr(tokenizing, "tokenize", lambda number, *rest: done.append(number) or tokenize(number, *rest))
    run(job(tmp_path / "out", "pairs", [tars]), 0, 1, 2)
    run(job(tmp_path / "one", "pairs", [tars]), 0, 1, 2)
    assert sorted(done[:7]) == list(range(7)) and contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"lengths": [3], "skipped": []}'])
def test_a_unit_whose_result_is_damaged_is_done_again(content, tars, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "finish", lambda job: "stopped before its end")
    run(job(tmp_path / "out", "pairs", [tars]), 0, 1, 2)
    monkeypatch.undo()
    (tmp_path / "out" / "unit-00003.json").write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"unit-00003\.json is gone or damaged"):
        tokenizing.finish(job(tmp_path / "out", "pairs", [tars]))
    run(job(tmp_path / "out", "pairs", [tars]), 0, 1, 2)
    run(job(tmp_path / "one", "pairs", [tars]), 0, 1, 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("model") / "tiny")


def command(*words, env=None, ranks: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0"]
    start = torchrun + ["-m"] if ranks > 1 else ["-m"]
    return [sys.executable, *start, "nanochameleon.data.prepare", *map(str, words), "--device", "cpu"]


def test_torchrun_and_one_process_write_the_same_folder(tars, model, tmp_path):
    for ranks in (1, 2):
        words = tars, "--form", "pairs", "--tokenizers", model, "--out", tmp_path / str(ranks), "--name", "web"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command(*words, ranks=ranks), capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and "133 documents" in done.stdout, done.stderr
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert {path.name for path in (tmp_path / "1").iterdir()} == {
        "web", "prepared.json", "text_tokenizer.json", "image_tokenizer"
    }  # fmt: skip


def test_a_process_killed_at_any_moment_resumes_to_the_same_bytes(tars, model, tmp_path):
    def start(out: Path):
        words = tars, "--form", "pairs", "--tokenizers", model, "--out", out, "--name", "web"
        return subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "one").wait() == 0
    for kept in (1, 4):  # units that are there when the signal comes
        process, out = start(tmp_path / "killed"), tmp_path / "killed" / "web"
        while process.poll() is None and len(list(out.glob("unit-*"))) < kept and not (out / "index.json").exists():
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def args(sources: list[Path], model: Path | None, out: Path, **more) -> Args:
    options = dict(form="pairs", name="web", device="cpu") | more
    return Args(tuple(sources), out=out, tokenizers=model, **options)


def test_a_hundred_bad_items_in_a_row_end_it_and_ninety_nine_do_not(tmp_path):
    for n, where in ((99, "fine"), (100, "wrong")):
        rows = [{"file_name": "nowhere.png", "text": "a"}] * n
        (tmp_path / where).mkdir()
        PILImage.new("RGB", (2, 2)).save(tmp_path / where / "a.png")
        lines(tmp_path / where / "captions.jsonl", *rows, {"file_name": "a.png", "text": "a"}, *rows[:99])
    assert len(prepare(tmp_path / "a", "pairs", [tmp_path / "fine"])) == 1
    with pytest.raises(UserError, match=r"100 items in a row cannot be used, the last one wrong/captions\.jsonl:"):
        prepare(tmp_path / "b", "pairs", [tmp_path / "wrong"])


def test_what_is_in_no_unit_is_counted_and_listed(model, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    lines(tmp_path / "mine" / "a.jsonl", {"text": "words"}, b"broken\n")
    for name in ("b.txt", "more.jsonl.gz"):
        (tmp_path / "mine" / name).write_bytes(b"")
    main(args([tmp_path / "mine"], model, tmp_path / "out", form="text"))
    assert "3 skipped: 1 broken lines, 1 files that are not read, 1 empty files" in capsys.readouterr().out
    listed = (tmp_path / "out" / "web" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(bad)["where"] for bad in listed] == [
        "mine/a.jsonl:2", "mine/more.jsonl.gz", "mine/b.txt"
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "web" / "index.json").read_text())["skipped"] == 3


def test_nothing_usable_is_one_sentence_and_no_index(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"nothing": 1}, b"[]\n")
    with pytest.raises(UserError, match=r"nothing of .*out can be used: a\.jsonl:1 \(without a text: its"):
        prepare(tmp_path / "out", "text", [path])
    assert not (tmp_path / "out" / "index.json").exists()
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.txt \(empty files\)"):
        prepare(tmp_path / "empty", "text", [tmp_path / "empty.txt"])


def test_other_sources_or_options_are_refused_for_the_same_name(tars, tmp_path):
    prepare(tmp_path / "out", "pairs", [tars])
    before = contents(tmp_path)
    for other in (job(tmp_path / "out", "drawings", [tars]), job(tmp_path / "out", "pairs", [tars], seed=1)):
        with pytest.raises(UserError, match="other sources or options, or its sources have changed"):
            run(other, 0, 1, 1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="was not written by this program"):
        run(job(tmp_path / "notes", "pairs", [tars]), 0, 1, 1)
    assert contents(tmp_path).items() >= before.items()


def test_a_second_source_needs_the_same_tokenizers_and_need_not_name_them(tars, model, tmp_path):
    main(args([tars], model, tmp_path / "out"))
    main(args([tars], None, tmp_path / "out", name="more", form="text"))
    other = tiny_run(tmp_path / "other")
    content = json.loads((other / TEXT_TOKENIZER).read_text())
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (other / TEXT_TOKENIZER).write_text(json.dumps(content))
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="holds data of other tokenizers"):
        main(args([tars], other, tmp_path / "out", name="third"))
    assert contents(tmp_path / "out") == before and len(Shards(tmp_path / "out" / "more")) == 140


WRONG = {
    "a name with a slash": ({"name": "../up"}, "--name must be"),
    "the tokenizers' name": ({"name": "image_tokenizer"}, "--name must be"),
    "no tokens": ({"seq_len": 0}, "--seq-len must be at least 1"),
    "no room for an image": ({"seq_len": 8}, "--seq-len must be at least 9 for this form"),
    "no threads": ({"threads": 0}, "--threads must be"),
    "a negative seed": ({"seed": -1}, "--seed must be"),
    "another device": ({"device": "abacus"}, "device 'abacus' is not available"),
    "no tokenizers": ({"tokenizers": None}, r"it has no readable prepared\.json"),
    "no sources": ({"sources": ()}, "name at least one file or folder"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_option_is_one_sentence_and_writes_nothing(kind, tars, model, tmp_path):
    change, sentence = WRONG[kind]
    with pytest.raises(UserError, match=sentence):
        main(dataclasses.replace(args([tars], model, tmp_path / "out"), **change))
    assert not list(tmp_path.iterdir())


def test_the_program_ends_with_code_2_and_one_sentence(model, tmp_path):
    words = tmp_path / "nowhere", "--form", "text", "--tokenizers", model, "--out", tmp_path / "out", "--name", "a"
    done = subprocess.run(command(*words), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    environment = os.environ | {"RANK": "first"}
    done = subprocess.run(command(*words), capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "RANK is 'first' in the environment" in done.stderr
    (tmp_path / "file").write_text("x")
    words = model / "config.json", "--form", "text", "--tokenizers", model, "--out", tmp_path / "out", "--name", "a"
    done = subprocess.run(command(*words), capture_output=True, text=True)
    assert done.returncode == 2 and "nothing to prepare as text" in done.stderr


def test_a_unit_writes_as_many_images_as_documents(tmp_path, tars):
    unit = plan([tars], "pairs")[0][0]
    made = dataclasses.replace(job(tmp_path, "pairs", [tars]), units=[unit])
    with ThreadPoolExecutor(1) as pool:
        result = tokenize(0, made, pool, tqdm(disable=True))
    assert isinstance(unit, Unit) and isinstance(result, UnitResult) and result.images == len(result.lengths) == 19
