"""Ranks that train together: what they learn does not depend on how many share the work, or in which way."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_on
from small_runs import prepare, trained
from torch import nn

from nanochameleon.config import ModelConfig, ParallelConfig
from nanochameleon.errors import Interrupted, UserError
from nanochameleon.losses import next_token_loss
from nanochameleon.packing import IGNORE
from nanochameleon.parallel.apply import check_tensor_parallel
from nanochameleon.parallel.mesh import init_mesh
from nanochameleon.training import checkpoint
from nanochameleon.training.monitor import read_metrics
from nanochameleon.transformer import Block
from nanochameleon.vocab import Vocab
from nanochameleon.weights.model_folder import open_parts
from nanochameleon.weights.tensor_files import Cut

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------------------------------
# Agreement


def agree(world: int) -> None:
    with init_mesh(ParallelConfig(), 4, CPU) as mesh:
        assert mesh.all_reduce_sum(mesh.rank, 1.0) == [sum(range(world)), world]
        assert mesh.all_reduce_max(mesh.rank, -mesh.rank) == [world - 1, 0]
        assert mesh.broadcast(f"from {mesh.rank}") == "from 0"
        assert mesh.run_on_rank0(lambda: os.environ["RANK"]) == "0"
        for error in (UserError("no such file"), Interrupted(), KeyboardInterrupt()):
            with pytest.raises(type(error), match=str(error) or None):
                mesh.run_on_rank0(lambda error=error: raise_(error))
        assert mesh.batch_slice(8 * world) == slice(8 * mesh.rank, 8 * (mesh.rank + 1))


def raise_(error: BaseException):
    raise error


def test_ranks_agree_on_sums_on_the_largest_and_on_what_the_first_one_found():
    run_on(2, agree, 2)


def test_one_process_is_a_mesh_of_its_own():
    with init_mesh(ParallelConfig(), 3, CPU) as mesh:
        assert (
            mesh.is_rank0
            and mesh.all_reduce_sum(2.0) == [2.0]
            and mesh.all_reduce_max(1.0, 3.0) == [1.0, 3.0]
            and mesh.broadcast("x") == "x"
        )
        assert mesh.batch_slice(5) == slice(0, 5) and mesh.tp_group is None


@pytest.mark.parametrize(
    ("parallel", "batch", "why"),
    [
        (ParallelConfig(tensor_parallel=2), 4, r"parallel\.tensor_parallel is 2, which must divide the 3 processes"),
        (ParallelConfig(), 4, r"train\.batch_size is 4, which 3 ranks cannot share evenly"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(parallel, batch, why, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=why), init_mesh(parallel, batch, CPU):
        pass


def test_layers_that_cannot_be_cut_are_refused():
    model = ModelConfig(dim=64, n_heads=8, n_kv_heads=4, qk_norm_groups=4, multiple_of=8)
    for ranks in (1, 2, 4):
        check_tensor_parallel(model, ranks)
    with pytest.raises(UserError, match="n_kv_heads, 4"):
        check_tensor_parallel(model, 3)
    with pytest.raises(UserError, match="one must divide the other"):
        check_tensor_parallel(replace(model, dim=96, n_heads=12, n_kv_heads=12, multiple_of=24), 6)


# ---------------------------------------------------------------------------------------------------------------------
# The loss over a vocabulary that is spread


def spread_loss(vocab: Vocab, logits: torch.Tensor, targets: torch.Tensor) -> tuple:
    with init_mesh(ParallelConfig(tensor_parallel=2), 1, CPU) as mesh:
        width = -(-vocab.size // 2)
        mine = logits[:, mesh.rank * width : (mesh.rank + 1) * width].clone().requires_grad_()
        parts = next_token_loss(mine, targets, vocab, mesh.tp_group)
        parts.total(1e-2, 3.0).backward()
        return [x.item() for x in parts], mine.grad


@pytest.mark.parametrize("n_merges", [2, 3])  # with one of them the ranks have different shares
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_the_loss_over_spread_columns_is_that_of_all_columns(n_merges, ignored):
    vocab, generator = Vocab.toy(8, n_merges), torch.Generator().manual_seed(n_merges)
    logits = 5 * torch.randn(20, vocab.size, generator=generator)
    targets = torch.randint(vocab.size, (20,), generator=generator)
    targets[torch.rand(20, generator=generator) < ignored] = IGNORE
    whole = logits.clone().requires_grad_()
    expected = next_token_loss(whole, targets, vocab)
    expected.total(1e-2, 3.0).backward()
    results = run_on(2, spread_loss, vocab, logits, targets)
    for numbers, _ in results:
        assert numbers == pytest.approx([x.item() for x in expected], rel=1e-5, abs=1e-5)
    torch.testing.assert_close(torch.cat([grad for _, grad in results], 1), whole.grad, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Read only."""
    return prepare(tmp_path_factory.mktemp("prepared") / "run")


def curve(folder: Path) -> list[dict[str, float]]:
    """By step; a batch without an image to learn has no loss of images."""
    lines = read_metrics(folder / "metrics.jsonl")
    names = ("loss", "loss_text", "loss_image", "log_z", "output_norm", "grad_norm")
    return [{name: line[name] for name in names if line[name] is not None} for line in lines]


@pytest.fixture(scope="module")
def alone(request, prepared, tmp_path_factory) -> Path:
    """The run on one process, with an optimizer. Read only."""
    return trained(prepared, tmp_path_factory.mktemp("alone") / request.param, 1, optim=request.param)


WAYS = {
    "2 ranks": (2, {}),
    "4 ranks": (4, {}),
    "2 ranks, micro-batches of one row": (2, {"micro_batch": 1}),
    "2 shards": (2, {"data_parallel": "fsdp"}),
    "4 shards, micro-batches, recomputed": (
        4,
        {"data_parallel": "fsdp", "micro_batch": 1, "activation_checkpointing": True},
    ),
    "layers over 2 ranks": (2, {"tensor_parallel": 2}),
    "2 shards of layers over 2 ranks": (4, {"tensor_parallel": 2, "activation_checkpointing": True}),
    "layers over 4 ranks": (4, {"tensor_parallel": 4, "micro_batch": 2}),
}


def test_compiled_blocks_learn_the_same(prepared, tmp_path, monkeypatch):
    """By the tracer without its C++, which not every machine can compile."""
    monkeypatch.setattr(Block, "compile", lambda block: nn.Module.compile(block, backend="aot_eager"))
    runs = [trained(prepared, tmp_path / str(compile), 1, until=5, compile=compile) for compile in (False, True)]
    plain, compiled = map(curve, runs)
    assert compiled == [pytest.approx(line, rel=1e-5) for line in plain]


MUON = ("2 ranks", "4 shards, micro-batches, recomputed", "2 shards of layers over 2 ranks")
CASES = [("adamw", way) for way in WAYS] + [("muon", way) for way in MUON]


@pytest.mark.parametrize("alone, way", CASES, indirect=["alone"])
def test_what_is_learnt_does_not_depend_on_how_the_work_is_shared(way, alone, prepared, tmp_path):
    """Losses and norms of twelve steps, dropout included; and the weights at the end, read from what was saved."""
    ranks, parallel = WAYS[way]
    folder = trained(prepared, tmp_path / "run", ranks, optim=alone.name, **parallel)
    assert curve(folder) == [pytest.approx(line, rel=2e-4, abs=1e-6) for line in curve(alone)]
    weights, expected = (open_parts(path).weights for path in (folder, alone))
    moved = sum(line["lr"] for line in read_metrics(folder / "metrics.jsonl"))  # by an optimizer like Adam
    for name in expected.meta:  # on average: where a gradient is nearly 0, rounding decides which way a step goes
        assert (weights.get(name) - expected.get(name)).abs().mean() < 0.01 * moved, name


# ---------------------------------------------------------------------------------------------------------------------
# Going on with other ranks

CHANGES = {
    "4 ranks, 2, 1": [(4, {}), (2, {}), (1, {})],
    "1 rank, 4 shards, 2 shards": [(1, {}), (4, {"data_parallel": "fsdp"}), (2, {"data_parallel": "fsdp"})],
    "4 shards of layers, 2 shards, 1 rank": [(4, {"tensor_parallel": 2}), (2, {"data_parallel": "fsdp"}), (1, {})],
    "2 ranks, layers over 4 ranks, 4 shards": [(2, {}), (4, {"tensor_parallel": 4}), (4, {"data_parallel": "fsdp"})],
}


@pytest.mark.parametrize("alone", ["adamw"], indirect=True)
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_in_another_mesh(change, alone, prepared, tmp_path):
    for until, (ranks, parallel) in zip((3, 7, None), CHANGES[change], strict=True):
        folder = trained(prepared, tmp_path / "run", ranks, until, optim=alone.name, **parallel)
        if until:
            assert checkpoint.newest(folder).name == f"step-{until:06d}"
    assert curve(folder) == [pytest.approx(line, rel=2e-4, abs=1e-6) for line in curve(alone)]


@pytest.mark.parametrize("way", ["2 ranks", "2 shards", "layers over 2 ranks"])
def test_ranks_that_stop_and_go_on_end_with_the_same_bits(way, prepared, tmp_path):
    """Invariant 21, on ranks."""
    ranks, parallel = WAYS[way]
    whole = trained(prepared, tmp_path / "whole", ranks, **parallel)
    for until in (2, 5, None):
        stopped = trained(prepared, tmp_path / "stopped", ranks, until, **parallel)
    assert curve(stopped) == curve(whole)
    ends = [checkpoint.newest(folder) for folder in (stopped, whole)]
    names = checkpoint.stored_shapes(ends[1]).keys()
    tensors, expected = (Cut(sorted(end.glob("*.safetensors")), names) for end in ends)
    assert [name for name in names if not torch.equal(tensors[name], expected[name])] == [] and len(names) > 60
