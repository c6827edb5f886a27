"""The benchmark's rows and its peer: equal weights give equal ids, and the ratios are what they say."""

import json

import pytest
import torch
from tiny import TINY_VQGAN, TOKENIZER

from nanochameleon.bench import data, engine, rows
from nanochameleon.config import ModelConfig
from nanochameleon.generation.engine import Engine
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.vocab import Vocab

SMALL, VOCAB = (
    ModelConfig(396, 32, 2, 4, n_kv_heads=2, multiple_of=8, max_seq_len=64, qk_norm_groups=2),
    Vocab.toy(64, 64),
)


def test_rows_hold_the_figures_and_the_ratio_is_their_time_over_ours(tmp_path):
    made = rows.rows_of("engine", "case", "nano", {"nano": 0.5, "peer": 2.0}, 100, "tokens/s", "here")
    assert [(r.variant, r.value, r.ratio, r.ratio_to) for r in made] == [
        ("nano", 200, 4, "peer"), ("peer", 50, None, None),
    ]  # fmt: skip
    assert rows.rows_of("engine", "case", "nano", {"nano": 0.5}, 100, "ms a step", "here")[0].value == 5
    rows.save(made, tmp_path / "rows.json")
    names = ["bench", "case", "variant", "value", "unit", "ratio", "ratio_to", "device", "torch", "commit"]
    assert [list(row) for row in json.loads((tmp_path / "rows.json").read_text())] == [names] * 2


def test_jobs_take_turns_after_one_round_that_is_not_measured():
    calls = []
    taken = rows.take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 3, 60.0)
    assert calls == ["a", "b"] * 4 and set(taken) == {"a", "b"}


def test_transformers_says_the_same_with_the_same_weights():
    pytest.importorskip("transformers", reason="transformers is optional: pip install transformers to compare with it")
    model = engine.random_model(SMALL, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.output.weight[: VOCAB.first_text] *= 1e-3
    prompts = torch.randint(VOCAB.first_text, SMALL.vocab_size, (3, 7))
    prompts[:, 0] = VOCAB.bos
    theirs = engine.their_ids(engine.as_transformers(model, VOCAB), prompts, 12)
    assert theirs == engine.our_ids(Engine(model, VOCAB, 4, 3, 20), prompts, 12)
    assert len({tuple(row) for row in theirs}) == 3 and len(set(theirs[0])) > 3


def test_ids_are_set_beside_what_eats_them_and_images_beside_nothing(monkeypatch):
    monkeypatch.setattr(data, "seconds", lambda jobs, rounds, device: {"nano": 0.5})
    cpu = torch.device("cpu")
    made = data.rows("case", lambda: None, {"ids/s": 35_000, "images/s": 10}, ("toy step", "H100 1.4B"), cpu)
    assert [(r.value, r.unit, r.ratio, r.ratio_to) for r in made] == [
        (70_000, "ids/s", 3.5, "toy step"), (70_000, "ids/s", 70 / 65, "H100 1.4B"), (20, "images/s", None, None),
    ]  # fmt: skip


def test_preparing_is_timed_on_what_comes_out(tmp_path, monkeypatch):
    """Every run of the job prepares anew, and its ids are counted, not reckoned."""
    jobs = []
    monkeypatch.setattr(data, "seconds", lambda each, rounds, device: jobs.append(each["nano"]) or {"nano": 1.0})
    image_tokenizer = ImageTokenizer(VQGAN(TINY_VQGAN))
    source = data.tar_of_images(tmp_path / "a.tar", 3, (12, 10))
    made = data.prepare_rows("case", source, "pairs", image_tokenizer, TOKENIZER, ("toy step",))
    caption = TOKENIZER.encode("a big red circle above a small blue star on white, number 0")
    assert [(r.unit, r.value) for r in made] == [("ids/s", 3 * (len(caption) + 4 + 4)), ("images/s", 3)]
