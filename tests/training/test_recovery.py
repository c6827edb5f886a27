"""Losses that are not finite: updates are skipped, the run rolls back, in the end it gives up. And full memory."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import training_config

import train
from nanochameleon.data.build import open_loader
from nanochameleon.errors import OwnError, UserError
from nanochameleon.training import checkpoint, recovery
from nanochameleon.training.image_targets import corrupt_image_tokens, mask_targets, noise_fraction
from nanochameleon.training.monitor import read_metrics
from nanochameleon.training.objective import Objective
from nanochameleon.training.run import TEXT_TOKENIZER
from nanochameleon.training.train_tokenizers import open_image_tokenizer
from nanochameleon.weights.tokenizer_json import load_text_tokenizer

BROKEN = {
    "nan": lambda sums: sums._replace(loss=sums.loss * math.nan, cross_entropy=sums.cross_entropy * math.nan),
    "infinite, with a finite gradient": lambda sums: sums._replace(
        loss=sums.loss + math.inf, cross_entropy=sums.cross_entropy + math.inf
    ),
}


def break_losses(monkeypatch, kind: str, broken: Callable[[int], bool]) -> list[torch.Tensor]:
    """Breaks the loss of those forward passes, counted from 1; -> a list that gets the weights at each of them."""
    real, weights = Objective.forward, []

    def forward(self, *inputs):
        if not torch.is_grad_enabled():  # for the attention logits
            return real(self, *inputs)
        weights.append(torch.cat([p.detach().flatten() for p in self.model.parameters()]))
        sums = real(self, *inputs)
        return sums._replace(next_token=BROKEN[kind](sums.next_token)) if broken(len(weights)) else sums

    monkeypatch.setattr(Objective, "forward", forward)
    monkeypatch.setattr(train, "make_report", lambda *_: None)
    return weights


@pytest.mark.parametrize("kind", BROKEN)
def test_a_loss_that_is_not_finite_changes_nothing_and_its_batch_is_dumped(kind, before_transformer, monkeypatch):
    broken = range(2, 11)  # nine in a row
    weights = break_losses(monkeypatch, kind, lambda call: call in broken)
    cfg = training_config(before_transformer)
    train.main(cfg)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert moved == [call not in broken for call in range(1, 12)]
    assert read_metrics(before_transformer / "metrics.jsonl")[1]["loss"] is None
    kept = sorted((before_transformer / "bad").iterdir())
    assert [path.name for path in kept] == [f"step-{call - 1:06d}-rank-0.safetensors" for call in broken]
    image_tokenizer = open_image_tokenizer(before_transformer, cfg.vqgan, torch.device("cpu"))
    text = load_text_tokenizer(before_transformer / TEXT_TOKENIZER)
    loader = open_loader(cfg, image_tokenizer, text, before_transformer)
    learnt = mask_targets(loader.batch(1), cfg.train.image_loss, 16, text.vocab)
    learnt = corrupt_image_tokens(learnt, noise_fraction(1, cfg.train), 16, text.vocab, cfg.seed, [2, 3])
    tensors = {name: x.tolist() for name, x in vars(learnt).items() if name != "documents"}
    assert {name: x.tolist() for name, x in load_file(kept[0]).items()} == tensors


def test_many_such_steps_in_a_row_roll_the_run_back_and_later_batches_follow(before_transformer, monkeypatch, capsys):
    """A checkpoint after 5 steps; of the calls that follow the second to the fourth fail, three in a row."""
    monkeypatch.setattr(train, "MAX_NONFINITE_STEPS", 3)
    monkeypatch.setattr(recovery, "MAX_NONFINITE_STEPS", 3)
    weights = break_losses(monkeypatch, "nan", lambda call: 7 <= call <= 9)
    cfg = training_config(before_transformer)
    train.main(replace(cfg, train=replace(cfg.train, log_every=1)))
    assert f"back to {before_transformer / 'step-000005'}" in capsys.readouterr().err
    assert len(weights) == 9 + 7 and torch.equal(weights[9], weights[5]) and not torch.equal(weights[9], weights[8])
    state = checkpoint.load(before_transformer)[1]
    assert state["step"] == 12 and state["skipped_batches"] == 9 - 5 and state["skipped_updates"] == 3
    assert [line["step"] for line in read_metrics(before_transformer / "metrics.jsonl")] == list(range(12))


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_rolling_back_does_not_help_gives_up_with_a_sentence(saved, before_transformer, monkeypatch):
    monkeypatch.setattr(train, "MAX_NONFINITE_STEPS", 3)
    monkeypatch.setattr(recovery, "MAX_NONFINITE_STEPS", 3)
    cfg = training_config(before_transformer)
    weights = break_losses(monkeypatch, "nan", lambda call: call > 6)
    with pytest.raises(UserError, match=r"3 steps in a row had no finite loss.*--optim\.lr 0\.003"):
        train.main(replace(cfg, train=replace(cfg.train, save_every=5 if saved else 100)))
    assert len(weights) == (6 + 3 * (1 + recovery.MAX_ROLLBACKS) if saved else 9)


def test_failures_long_after_a_checkpoint_end_a_run_as_well(before_transformer, monkeypatch):
    """Each time three good steps follow the checkpoint of step 5, and none that is saved."""
    monkeypatch.setattr(train, "MAX_NONFINITE_STEPS", 3)
    monkeypatch.setattr(recovery, "MAX_NONFINITE_STEPS", 3)
    weights = break_losses(monkeypatch, "nan", lambda call: call > 5 and (call - 6) % 6 >= 3)
    cfg = training_config(before_transformer)
    with pytest.raises(UserError, match=r"3 steps in a row had no finite loss"):
        train.main(replace(cfg, train=replace(cfg.train, save_every=5)))
    assert len(weights) == 5 + 6 * (1 + recovery.MAX_ROLLBACKS)
    assert checkpoint.load(before_transformer)[1]["step"] == 5


def test_a_save_that_was_due_in_a_streak_of_failures_happens_after_it(before_transformer, monkeypatch):
    break_losses(monkeypatch, "nan", lambda call: call in (5, 6))
    cfg = training_config(before_transformer)
    train.main(replace(cfg, train=replace(cfg.train, save_every=5, keep_checkpoints=9)))
    steps = sorted(int(path.name[5:]) for path in checkpoint.checkpoints(before_transformer))
    assert steps == [7, 10, 12]


def test_roll_backs_long_ago_do_not_count(before_transformer, monkeypatch):
    """Of each six batches three in a row fail; a second roll-back to the same checkpoint would end the run."""
    monkeypatch.setattr(train, "MAX_NONFINITE_STEPS", 3)
    monkeypatch.setattr(recovery, "MAX_ROLLBACKS", 1)
    weights = break_losses(monkeypatch, "nan", lambda call: call > 4 and call % 6 < 3)
    cfg = training_config(before_transformer)
    train.main(replace(cfg, train=replace(cfg.train, save_every=1)))
    state = checkpoint.load(before_transformer)[1]
    assert state["step"] == 12 and state["skipped_updates"] == 3 + 3 + 1 and len(weights) == 12 + 6


@pytest.mark.parametrize("micro_batch, fewer", [(None, "--parallel.micro-batch 1 or "), (1, "")])
def test_a_gpu_whose_memory_is_full_is_a_sentence_that_says_what_to_lower(
    micro_batch, fewer, before_transformer, monkeypatch
):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "forward_backward", full)
    cfg = training_config(before_transformer)
    cfg = replace(cfg, parallel=replace(cfg.parallel, micro_batch=micro_batch))
    rows = rf"the memory of cpu \(rank 0\) does not hold {micro_batch or 2} sequences of {cfg.train.seq_len} tokens"
    with pytest.raises(
        OwnError,
        match=f"{rows}: resume with {fewer}--parallel.activation-checkpointing or --parallel.data-parallel fsdp",
    ):
        train.main(cfg)
