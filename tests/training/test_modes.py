"""Deterministic algorithms: what is set, that sampling does without, and that a CPU's bits are the same either way."""

import os

import pytest
import torch
from small_runs import config, prepare, trained

from nanochameleon.config import ParallelConfig
from nanochameleon.errors import UserError
from nanochameleon.training import checkpoint
from nanochameleon.training.modes import make_deterministic, sampling_mode

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)


def state() -> tuple[bool, bool, str | None]:
    enabled = torch.are_deterministic_algorithms_enabled()
    return enabled, torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.parametrize("asked, device, expected", [
    (True, CUDA, (True, False, ":4096:8")), (False, CUDA, (False, True, None)), (True, CPU, (False, True, None)),
])  # fmt: skip
def test_a_gpu_that_is_asked_for_it_is_deterministic(asked, device, expected):
    make_deterministic(ParallelConfig(deterministic=asked), device)
    assert state() == expected


def test_new_tensors_are_not_filled():
    make_deterministic(ParallelConfig(deterministic=True), CUDA)
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_a_run_sets_it_before_its_first_stage(tmp_path, monkeypatch):
    import train

    def asked(parallel, device):
        raise UserError(f"{parallel.deterministic} on {device}")

    monkeypatch.setattr(train, "make_deterministic", asked)
    with pytest.raises(UserError, match="True on cpu"):
        train.main(config(tmp_path / "run", deterministic=True))
    assert not (tmp_path / "run").exists()


def test_sampling_does_without():
    make_deterministic(ParallelConfig(deterministic=True), CUDA)
    with pytest.raises(KeyError), sampling_mode():
        assert not torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert torch.are_deterministic_algorithms_enabled()


def test_a_cpu_has_the_same_bits_with_and_without(tmp_path):
    prepared = prepare(tmp_path / "prepared")
    runs = [trained(prepared, tmp_path / str(on), 1, until=3, deterministic=on) for on in (False, True)]
    (plain, _), (deterministic, _) = map(checkpoint.load, runs)
    assert plain.keys() == deterministic.keys()
    for group, tensors in plain.items():
        assert all(torch.equal(x, deterministic[group][name]) for name, x in tensors.items())
