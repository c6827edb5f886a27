"""What is learned does not depend on the number of ranks, or on how they share the work."""

from pathlib import Path

import pytest
import torch
from small_runs import prepare, trained

from nanochameleon.training import checkpoint
from nanochameleon.training.monitor import read_metrics
from nanochameleon.training.restore import stored_shapes
from nanochameleon.weights.model_folder import open_model_files
from nanochameleon.weights.tensor_files import ShardedSafetensors


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Read only."""
    return prepare(tmp_path_factory.mktemp("prepared") / "run")


def curve(folder: Path) -> list[dict[str, float]]:
    """Losses and norms of each step. A batch without image targets has no image loss."""
    lines = read_metrics(folder / "metrics.jsonl")
    names = ("loss", "loss_text", "loss_image", "log_z", "output_norm", "grad_norm")
    return [{name: line[name] for name in names if line[name] is not None} for line in lines]


@pytest.fixture(scope="module")
def alone(request, prepared, tmp_path_factory) -> Path:
    """The run on one process, with the optimizer of the parameter. Read only."""
    return trained(prepared, tmp_path_factory.mktemp("alone") / request.param, 1, optim=request.param)


WAYS = {
    "2 ranks": (2, {}),
    "4 ranks": (4, {}),
    "2 ranks, micro-batches of one sequence, fused output": (2, {"micro_batch": 1, "fused_output": "on"}),
    "fsdp 2, fused output": (2, {"data_parallel": "fsdp", "fused_output": "on"}),
    "fsdp 4, micro-batches, activation checkpointing": (
        4,
        {"data_parallel": "fsdp", "micro_batch": 1, "activation_checkpointing": True},
    ),
    "tensor parallel 2": (2, {"tensor_parallel": 2}),
    "fsdp 2 x tensor parallel 2": (4, {"tensor_parallel": 2, "activation_checkpointing": True}),
    "tensor parallel 4": (4, {"tensor_parallel": 4, "micro_batch": 2}),
}


@pytest.mark.parametrize("ranks, parallel", [(1, {}), (2, {"data_parallel": "fsdp", "activation_checkpointing": True})])
def test_compiled_blocks_learn_the_same(ranks, parallel, prepared, tmp_path):
    runs = [trained(prepared, tmp_path / on, ranks, until=5, compile=on, **parallel) for on in ("off", "on")]
    plain, compiled = map(curve, runs)
    assert compiled == [pytest.approx(line, rel=1e-5) for line in plain]


MUON = ("2 ranks", "fsdp 4, micro-batches, activation checkpointing", "fsdp 2 x tensor parallel 2")
CASES = [("adamw", way) for way in WAYS] + [("muon", way) for way in MUON]


@pytest.mark.parametrize("alone, way", CASES, indirect=["alone"])
def test_losses_and_weights_do_not_depend_on_the_parallelism(way, alone, prepared, tmp_path):
    """Twelve steps with dropout, and the weights at the end, read from the checkpoint."""
    ranks, parallel = WAYS[way]
    folder = trained(prepared, tmp_path / "run", ranks, optim=alone.name, **parallel)
    assert curve(folder) == [pytest.approx(line, rel=2e-4, abs=1e-6) for line in curve(alone)]
    weights, expected = (open_model_files(path).weights for path in (folder, alone))
    moved = sum(line["lr"] for line in read_metrics(folder / "metrics.jsonl"))  # by Adam in one direction
    for name in expected.meta:  # the mean, since rounding decides the sign of a step where the gradient is nearly 0
        assert (weights.get(name) - expected.get(name)).abs().mean() < 0.01 * moved, name


# ---------------------------------------------------------------------------------------------------------------------
# Resuming on other ranks

CHANGES = {
    "4 ranks, 2, 1": [(4, {}), (2, {}), (1, {})],
    "1 rank, fsdp 4, fsdp 2": [(1, {}), (4, {"data_parallel": "fsdp"}), (2, {"data_parallel": "fsdp"})],
    "fsdp 2 x tensor parallel 2, fsdp 2, 1 rank": [
        (4, {"tensor_parallel": 2}),
        (2, {"data_parallel": "fsdp"}),
        (1, {}),
    ],
    "2 ranks, tensor parallel 4, fsdp 4": [(2, {}), (4, {"tensor_parallel": 4}), (4, {"data_parallel": "fsdp"})],
}


@pytest.mark.parametrize("alone", ["adamw"], indirect=True)
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_resumes_on_another_mesh(change, alone, prepared, tmp_path):
    for until, (ranks, parallel) in zip((3, 7, None), CHANGES[change], strict=True):
        folder = trained(prepared, tmp_path / "run", ranks, until, optim=alone.name, **parallel)
        if until:
            assert checkpoint.newest(folder).name == f"step-{until:06d}"
    assert curve(folder) == [pytest.approx(line, rel=2e-4, abs=1e-6) for line in curve(alone)]


@pytest.mark.parametrize("way", ["2 ranks", "fsdp 2, fused output", "tensor parallel 2"])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(way, prepared, tmp_path):
    ranks, parallel = WAYS[way]
    whole = trained(prepared, tmp_path / "whole", ranks, **parallel)
    for until in (2, 5, None):
        stopped = trained(prepared, tmp_path / "stopped", ranks, until, **parallel)
    assert curve(stopped) == curve(whole)
    ends = [checkpoint.newest(folder) for folder in (stopped, whole)]
    names = stored_shapes(ends[1])
    tensors, expected = (ShardedSafetensors(sorted(end.glob("*.safetensors")), names) for end in ends)
    assert [name for name in names if not torch.equal(tensors[name], expected[name])] == [] and len(names) > 60
