"""`prove` on a CPU: each planted fault is found and named, the others stay proven, and the command runs whole."""

import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import planted
import pytest
import torch

from nanochameleon.bench import prove, subjects
from nanochameleon.bench.__main__ import Args, main
from nanochameleon.bench.bands import Bands
from nanochameleon.bench.kernels import Case
from nanochameleon.errors import UserError
from nanochameleon.kernels.dispatch import CUDA_DTYPES
from nanochameleon.kernels.gpu import proof

NAMES = [subject.name for subject in subjects.subjects()]
CPU = torch.device("cpu")


@pytest.fixture
def in_this_process(tmp_path, monkeypatch):
    """Proofs are made without other processes. Returns the folder that their file is in."""
    monkeypatch.setenv("NANOCHAMELEON_CACHE", str(tmp_path))
    monkeypatch.setattr(
        prove, "outcomes", lambda names, work, limit: ((name, prove.attempt(work, name)) for name in names)
    )
    return tmp_path


def known(folder) -> dict[str, proof.Entry]:
    (path,) = folder.iterdir()
    return proof.read(path, proof.identity(CPU)).entries


def test_every_fault_is_named_and_the_other_kernels_stay_proven(in_this_process, capsys):
    faults = [fault for fault in planted.REASONS if fault.__name__ not in ("hanging", "crashing", "leaving")]
    where = dict(zip(NAMES, (fault.__name__ for fault in faults), strict=False))
    prove.prove_all("all", CPU, partial(planted.work, where), 60.0, in_this_process)
    entries, printed = known(in_this_process), capsys.readouterr().out
    assert list(entries) == NAMES
    for name, entry in entries.items():
        if fault := planted.FAULTS.get(where.get(name)):
            assert not entry.ok and re.fullmatch(planted.REASONS[fault], entry.why) and entry.why in printed
        else:
            assert entry.ok and entry.speedup == 1.9 and entry.errors["y"] <= 1
    assert sum(entry.ok for entry in entries.values()) == len(NAMES) - len(faults) > 0


def test_a_kernel_that_hangs_or_ends_its_process_costs_only_itself():
    where = {"b": "hanging", "c": "crashing"}
    found = dict(prove.outcomes(list("abcd"), partial(planted.work, where), 5.0))
    assert {name: entry.ok for name, entry in found.items()} == {"a": True, "b": False, "c": False, "d": True}
    for name, fault in where.items():
        assert re.fullmatch(planted.REASONS[planted.FAULTS[fault]], found[name].why)


def test_ctrl_c_keeps_what_is_proven_and_another_op_is_added(in_this_process):
    def work(name: str) -> proof.Entry:
        if name == NAMES[2]:
            raise KeyboardInterrupt
        return planted.work({}, name)

    with pytest.raises(KeyboardInterrupt):
        prove.prove_all("all", CPU, work, 60.0, in_this_process)
    assert list(known(in_this_process)) == NAMES[:2]
    prove.prove_all("decode", CPU, partial(planted.work, {}), 60.0, in_this_process)
    assert list(known(in_this_process)) == NAMES[:4]


def test_real_kernels_are_proven_in_another_process(tmp_path):
    """One op in the emulator, and its times."""
    path = prove.prove_all("decode", CPU, partial(prove.work_on, "cpu", subjects.DRY), 60.0, tmp_path)
    entries = proof.read(path, proof.identity(CPU)).entries
    assert {name: entry.ok for name, entry in entries.items()} == dict.fromkeys(NAMES[2:4], True)
    assert set(entries[NAMES[2]].errors) == {"out", "keys", "values"}


def test_a_dry_run_of_the_command_leaves_no_proof(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAMELEON_CACHE", str(tmp_path))
    command = [sys.executable, "-m", "nanochameleon.bench", "prove", "--dry", "--op", "decode"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "2 of 2, done" in ran.stdout and ran.stdout.endswith("no proof is kept of a dry run\n") and not ran.stderr
    assert not [*tmp_path.glob("*.json")]


def test_the_output_layer_is_proven_as_training_runs_it():
    """In bf16 with a fp32 weight, whose gradient a GPU sums by a call that no other op makes."""
    (loss,) = [each for each in subjects.subjects("zloss") if each.dtype == torch.bfloat16]
    (layer,) = [each for each in loss.problems(subjects.DRY, CPU) if "weight" in each.inputs]
    assert layer.inputs["hidden"].dtype == torch.bfloat16 and layer.inputs["weight"].dtype == torch.float32


def test_the_largest_heads_are_proven_first_and_they_alone_are_compiled_in_a_hurry(monkeypatch):
    heads = [each.head_dim for each in subjects.subjects("attention")]
    assert heads == sorted(heads, reverse=True)
    asked = {}
    monkeypatch.setattr(subjects.Subject, "case", lambda *_: Case("", [], {}))
    monkeypatch.setattr(subjects.Subject, "jobs", lambda self, _, compiled: asked.update({self.head_dim: compiled}))
    monkeypatch.setattr(subjects, "median_seconds", lambda *_, **options: {"own": 1.0, "torch": 1.0})
    for each in subjects.subjects("attention"):
        subjects.time_it(each, subjects.QUICK, CPU, {})
    assert asked == {128: True, 64: False, 32: False}


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (Args("prove"), "there is no CUDA device here: prove needs an NVIDIA GPU"),
        (Args("prove", op="step"), "prove takes --op attention"),
        (Args("kernels", dry=True), "--dry belongs to prove"),
    ],
)
def test_a_misuse_is_one_sentence(monkeypatch, args, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=why):
        main(args)


def test_too_little_memory_for_many_logits_is_said_and_fails_nothing(emulated_gpu, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(subjects.gpu_checks, "check_many_logits", fail)
    (loss,) = [each for each in subjects.subjects("zloss") if each.dtype == torch.bfloat16]
    assert subjects.prove(loss, replace(subjects.DRY, widths=(8, 33), runs=1), CPU).ok
    assert "512 logits at once are not checked" in capsys.readouterr().out


def test_a_compiler_that_fails_leaves_torch_s_own_operations_to_compare_with(monkeypatch, capsys):
    x = torch.ones(2, requires_grad=True)
    case = Case("sum", [x], {"reference": lambda x: x.sum()})
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    assert set(subjects.compiled_job(case.variants["reference"], case)) == {"compiled"}
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda x: 1 / 0)
    assert subjects.compiled_job(case.variants["reference"], case) == {}
    assert "torch.compile does not work here" in capsys.readouterr().out


def test_new_memory_has_bands_and_is_poisoned_wherever_it_comes_from():
    bands = Bands()
    with bands.everywhere():
        made = [torch.empty(2, 3), torch.empty((2, 3), dtype=torch.bfloat16), torch.empty_like(torch.ones(2, 3)),
                torch.ones(4).new_empty(2, 3)]  # fmt: skip
        zeros = torch.zeros(2, 3)
    assert len(bands.buffers) == 5 and not zeros.any() and bands.broken() is None
    assert all(x.isnan().all() and x.shape == (2, 3) and x.is_contiguous() for x in made)
    assert torch.empty is bands.empty
    zeros.as_strided((1,), (1,), zeros.storage_offset() + 6).fill_(1)
    assert bands.broken() == "new memory"


def test_what_is_proven_is_what_dispatch_can_choose():
    assert len(set(NAMES)) == len(NAMES) and {subject.op for subject in subjects.subjects()} == {*CUDA_DTYPES}
    for subject in subjects.subjects():
        entries = {subject.name: proof.Entry(True, "", {}, **planted.RIGHT)}
        found = proof.Proofs({"gpu": "H100"}, entries, "2026-12-01")
        assert found.choose(subject.op, subject.dtype, subject.head_dim)[0] == subject.kernels
