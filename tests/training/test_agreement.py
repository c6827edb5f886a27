"""Ranks that train together run the same kernels: rank 0's proofs, or none where a rank has another GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ranks import run_on
from tiny import training_config

import train
from nanochameleon.config import ModelConfig, ParallelConfig
from nanochameleon.kernels.dispatch import decide, explain, use_kernels, use_proofs
from nanochameleon.kernels.gpu.proof import Entry, Proofs
from nanochameleon.parallel.mesh import Mesh, init_mesh
from nanochameleon.training import startup
from nanochameleon.training.startup import agree, use_agreed_proofs
from nanochameleon.transformer import Chameleon

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ENTRY = Entry(True, "", {}, ("a",), {"own": (1.0,), "torch": (2.0,)})


def decided(gpus: list[str], proven: list[bool]) -> tuple[str, str]:
    """What this rank runs, which has this GPU, and a proof of its own or none."""
    with init_mesh(ParallelConfig(), 2, CPU) as mesh:
        entries = {"zloss_cross_entropy bfloat16 cuda": ENTRY} if proven[mesh.rank] else {}
        mine = Proofs({"gpu": gpus[mesh.rank]}, entries, "2026-12-01")
        with use_kernels("auto"), use_proofs(agree(mesh, mine)):
            return decide("zloss_cross_entropy", GPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("gpus", "proven", "name", "reason"),
    [
        (["H100", "H100"], [True, False], "cuda", "proven on this H100 on 2026-12-01: 2.0 times torch's"),
        (
            ["H100", "H100"],
            [False, True],
            "reference",
            "not proven on this GPU: run python -m nanochameleon.bench prove",
        ),
        (["H100", "A100"], [True, True], "reference", "the ranks differ in their GPUs or versions"),
    ],
)
def test_all_ranks_run_what_rank_0_has_proven_for_the_gpu_of_all(gpus, proven, name, reason):
    for found in run_on(2, decided, gpus, proven):
        assert found[0] == name and found[1].startswith(reason)


def test_ranks_on_cpus_and_one_process_exchange_nothing():
    for mesh in (Mesh(CPU, 0, 2), Mesh(GPU)):
        with use_agreed_proofs(mesh):
            pass


def test_a_run_trains_inside_the_agreement(tmp_path, monkeypatch):
    """From before its first stage on, and no longer."""
    agreed, seen = Proofs({"gpu": "H100"}, {"zloss_cross_entropy bfloat16 cuda": ENTRY}, "2026-12-01"), []

    def run_all(*_) -> None:
        seen.append(decide("zloss_cross_entropy", GPU, torch.bfloat16)[0])

    monkeypatch.setattr(train, "use_agreed_proofs", lambda mesh: use_proofs(agreed))
    monkeypatch.setattr(train, "run_all", run_all)
    with use_kernels("auto"):
        train.main(training_config(tmp_path / "run"))
        run_all()
    assert seen == ["cuda", "reference"]


def test_ranks_on_gpus_agree(monkeypatch):
    monkeypatch.setattr(startup, "agree", lambda mesh, mine: replace(mine, absent="agreed"))
    with use_agreed_proofs(Mesh(GPU, 0, 2)), use_kernels("auto"):
        assert decide("zloss_cross_entropy", GPU, torch.bfloat16) == ("reference", "agreed")


def test_the_first_lines_of_a_run_explain_kernels_for_its_head_size(monkeypatch, capsys):
    """For which attention is proven, and in a form that names the command."""
    monkeypatch.setattr(startup, "explain", lambda device, *rest: explain(GPU, *rest))
    cfg = ModelConfig(vocab_size=8, dim=128, n_layers=1, n_heads=2)
    with torch.device("meta"), use_kernels("auto"):
        startup.log_setup(Chameleon(cfg), SimpleNamespace(sources={}), Mesh(CPU), "bf16", ParallelConfig())
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "qknorm" in line)
    assert line.endswith("reference  not proven on this GPU: run python -m nanochameleon.bench prove")
