"""Rows hold the right ratios, jobs are timed alternately, and the peer with equal weights makes equal tokens."""

import json
from typing import ClassVar

import pytest
import torch
from tiny import TINY_VQGAN, TOKENIZER

from nanochameleon.bench import data, engine, first, rows
from nanochameleon.bench.measure import median_seconds
from nanochameleon.config import ModelConfig
from nanochameleon.errors import UserError
from nanochameleon.generation.engine import Engine
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.vocab import Vocab

CPU = torch.device("cpu")
SMALL, VOCAB = (
    ModelConfig(396, 32, 2, 4, n_kv_heads=2, multiple_of=8, max_seq_len=64, qk_norm_groups=2),
    Vocab.toy(64, 64),
)


NAMES = ["bench", "case", "variant", "value", "unit", "ratio", "ratio_to", "device", "torch", "commit", "of_limit"]


def test_rows_hold_the_figures_and_the_ratio_is_their_time_over_ours(tmp_path):
    made = rows.rows_against_peers("engine", "case", "nano", {"nano": 0.5, "peer": 2.0}, 100, "tokens/s", CPU)
    assert [(r.variant, r.value, r.ratio, r.ratio_to) for r in made] == [
        ("nano", 200, 4, "peer"), ("peer", 50, None, None),
    ]  # fmt: skip
    assert rows.rows_against_peers("engine", "case", "nano", {"nano": 0.5}, 100, "ms a step", CPU)[0].value == 5
    rows.save(made, tmp_path / "rows.json")
    assert [list(row) for row in json.loads((tmp_path / "rows.json").read_text())] == [NAMES] * 2


def test_variants_of_a_kernel_have_their_ratio_to_one_of_them(tmp_path):
    made = rows.rows_against_one("kernels", "zloss 1 x 2", {"reference": 4.0, "numba": 1.0}, "reference", "ms", CPU)
    assert [(row.value, row.unit, row.ratio) for row in made] == [(4.0, "ms", 1.0), (1.0, "ms", 4.0)]
    rows.save(made, tmp_path / "rows.json")
    assert rows.load(tmp_path / "rows.json") == made


@pytest.mark.parametrize("content", [None, "", "{}3", '[{"case": 3}]', "[3]"])
def test_a_file_without_rows_is_one_sentence(tmp_path, content):
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"rows\.json"):
        rows.load(path)


def test_jobs_alternate_after_one_round_that_is_not_measured():
    calls = []
    taken = median_seconds({name: lambda name=name: calls.append(name) for name in "ab"}, 3, CPU)
    assert calls == ["a", "b"] * 4 and set(taken) == {"a", "b"} and min(taken.values()) >= 0


def test_rounds_end_early_but_not_before_the_second():
    calls = []
    median_seconds({"a": lambda: calls.append("a")}, 9, CPU, max_seconds=0.0)
    assert calls == ["a"] * 3


class Event:
    """Stands for torch.cuda.Event. A job takes as many milliseconds as there are jobs in the log once it has ended."""

    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.at = len(self.log)

    def synchronize(self):
        self.log.append("wait")

    def elapsed_time(self, end):
        return end.at


def test_a_gpu_is_waited_for_after_the_last_round_alone(monkeypatch):
    monkeypatch.setattr(Event, "log", log := [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: real(1, dtype=dtype))
    taken = median_seconds({name: lambda name=name: log.append(name) for name in "ab"}, 3, torch.device("cuda"))
    assert log == ["a", "b"] * 4 + ["wait"] * 6
    assert taken == {"a": 0.005, "b": 0.006}  # the median of the jobs that end at 3, 5, 7 and 4, 6, 8


def test_kernels_are_launched_while_the_gpu_waits(monkeypatch):
    """So the time between launches is not theirs."""
    monkeypatch.setattr(Event, "log", log := [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: real(1, dtype=dtype))
    median_seconds({"a": lambda: log.append("a")}, 2, torch.device("cuda"), launches=False)
    assert log == ["a", "sleep", "a", "sleep", "a", "wait", "wait"]


def test_transformers_says_the_same_with_the_same_weights():
    pytest.importorskip("transformers", reason="transformers is optional: pip install transformers to compare with it")
    model = engine.random_model(SMALL, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.output.weight[: VOCAB.first_text] *= 1e-3
    prompts = torch.randint(VOCAB.first_text, SMALL.vocab_size, (3, 7))
    prompts[:, 0] = VOCAB.bos
    theirs = engine.their_tokens(engine.as_transformers(model, VOCAB), prompts, 12)
    assert theirs == engine.our_tokens(Engine(model, VOCAB, 4, 3, 20), prompts, 12)
    assert len({tuple(row) for row in theirs}) == 3 and len(set(theirs[0])) > 3


def test_tokens_have_a_ratio_to_each_consumer_and_images_have_none(monkeypatch):
    monkeypatch.setattr(data, "median_seconds", lambda jobs, rounds, device: {"nano": 0.5})
    made = data.rows("case", lambda: None, {"tokens/s": 35_000, "images/s": 10}, ("toy step", "H100 1.4B"), CPU)
    assert [(r.value, r.unit, r.ratio, r.ratio_to) for r in made] == [
        (70_000, "tokens/s", 70 / 30, "toy step"),
        (70_000, "tokens/s", 70 / 65, "H100 1.4B"),
        (20, "images/s", None, None),
    ]


def test_preparing_is_timed_on_what_comes_out(tmp_path, monkeypatch):
    """Every run of the job prepares anew, and its tokens are counted, not estimated."""
    jobs = []
    monkeypatch.setattr(data, "median_seconds", lambda each, rounds, device: jobs.append(each["nano"]) or {"nano": 1.0})
    image_tokenizer = ImageTokenizer(VQGAN(TINY_VQGAN))
    source = data.tar_of_images(tmp_path / "a.tar", 3, (12, 10))
    made = data.prepare_rows("case", source, "pairs", image_tokenizer, TOKENIZER, ("toy step",))
    caption = TOKENIZER.encode("a big red circle above a small blue star on white, number 0")
    assert [(r.unit, r.value) for r in made] == [("tokens/s", 3 * (len(caption) + 4 + 4)), ("images/s", 3)]


def test_the_first_image_is_timed_as_a_whole_process_with_empty_caches(monkeypatch):
    """Its rows are medians of the clock and of CPU time; a command that fails is no figure."""
    seen = []

    def run_once(arguments):
        seen.append(arguments[-1])
        return 10.0 * len(seen), float(len(seen))

    monkeypatch.setattr(first, "run_once", run_once)
    made = [(row.case, row.variant, row.value, row.unit) for row in first.bench(CPU, True)]
    imports, whole = (f"first image: {part}" for part in first.PARTS)
    assert made == [
        (imports, "clock", 30.0, "s"), (imports, "CPU time", 3.0, "s"),
        (whole, "clock", 40.0, "s"), (whole, "CPU time", 4.0, "s"),
    ]  # fmt: skip
    assert seen == [first.IMPORTS, "--out"] * 3


def test_a_first_image_has_caches_of_its_own_and_a_failure_is_no_figure():
    code = (
        "import os; assert not any(os.path.exists(os.environ[x]) for x in ('NUMBA_CACHE_DIR', 'NANOCHAMELEON_CACHE'))"
    )
    seconds, cpu = first.run_once(("-c", code))
    assert seconds > 0 and cpu > 0
    with pytest.raises(UserError, match=r"failed: .*no circle"):
        first.run_once(("-c", "raise SystemExit('no circle')"))
