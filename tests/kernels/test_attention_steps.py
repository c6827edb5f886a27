"""Each rung of attention, on a CPU and on a GPU, computes what the formula says, whatever the documents and sizes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochameleon.kernels import ladder
from nanochameleon.kernels.attention import steps, steps_checks
from nanochameleon.kernels.attention.steps_checks import for_gpu, inputs

CPU = torch.device("cpu")
lengths = st.sampled_from([1, 2, 17, 63, 64, 65, 128, 130])


@pytest.fixture(scope="module")
def on_cpu():
    return steps.on_cpu()


def check(ladders: list[ladder.Ladder], problem: tuple) -> None:
    forward, gradient = ladders
    ladder.check(replace(forward, problems=lambda: [problem[:4]]))
    ladder.check(replace(gradient, problems=lambda: [problem]))


@settings(max_examples=30)
@given(
    b=st.integers(1, 2),
    t=lengths,
    heads=st.integers(1, 2),
    e=st.sampled_from([2, 6, 16, 48]),
    length=st.sampled_from([1, 2, 40, 200]),
    size=st.sampled_from([0.1, 1.0, 30.0, 1e3]),
    back=st.booleans(),
)
@example(b=1, t=130, heads=1, e=6, length=1, size=1.0, back=False)  # documents of one token
@example(b=2, t=130, heads=2, e=16, length=40, size=1e3, back=True)  # scores of a million
def test_every_rung_on_a_cpu_is_the_formula(on_cpu, b, t, heads, e, length, size, back):
    check(on_cpu, inputs(b, t, heads, heads, e, length, size, back))


@pytest.mark.usefixtures("emulated_gpu")
@settings(max_examples=6)
@given(
    t=st.sampled_from([1, 15, 64, 70]),
    shared_by=st.sampled_from([1, 2]),
    e=st.sampled_from(steps_checks.HEAD_DIMS),
    length=st.sampled_from([1, 20, 100]),
    size=st.sampled_from([1.0, 6.0]),
)
@example(t=70, shared_by=2, e=64, length=1, size=1.0)
@example(t=130, shared_by=1, e=128, length=100, size=1.0)  # more tiles than one
def test_every_rung_on_a_gpu_is_the_formula(t, shared_by, e, length, size):
    check(on_gpu(), for_gpu(CPU, *inputs(1, t, shared_by, 1, e, length, size)))


def on_gpu() -> list[ladder.Ladder]:
    return steps.on_gpu(ladder.emulator_kernel, CPU)


def test_what_is_timed_is_seen_in_part_and_the_limit_counts_that():
    """Two matmuls are 4 E operations for each pair of a query and a key that it sees."""
    q, _, _, docs, *_ = inputs(1, 10, 3, 3, 16, length=5)
    assert steps_checks.flops(docs, *q.shape[2:], 2) == 4 * 16 * 3 * (15 + 15)


def test_a_key_too_many_is_seen_by_the_check(on_cpu):
    """A rung that sees one key ahead is off by more than is allowed: in float32 and, on a GPU, in bfloat16."""

    def sees_ahead(q, k, v, docs):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        mask = torch.ones(1, q.shape[1], q.shape[1], dtype=torch.bool).tril(1)
        return (steps_checks.attention_reference(*heads, mask).transpose(1, 2),)

    problem = inputs(1, 70, 1, 1, 64, length=70)
    wrong = ladder.Rung("ahead", "", sees_ahead, "")
    for found, x in ((on_cpu[0], problem), (replace(on_cpu[0], scales=scales_of_out), for_gpu(CPU, *problem))):
        with pytest.raises(ladder.WrongRung, match="out of 1 x 70 x 1 x 64 is off"):
            ladder.check(replace(found, rungs=[wrong], problems=lambda x=x: [x[:4]]))


def scales_of_out(*x) -> list[float]:
    return steps_checks.forward_scales(*x)[:1]


def test_one_command_checks_and_times_both_ladders(monkeypatch, capsys):
    monkeypatch.setattr(ladder, "ROUNDS", 1)
    assert ladder.main("purpose", steps.on_cpu, steps.on_gpu, []) == 0
    out = capsys.readouterr().out
    assert "5. shipped" in out and "2. shipped" in out and "of limit" in out


def test_the_file_runs_as_a_script():
    """Its folder holds a cuda.py, which must not hide NVIDIA's package from torch."""
    ran = subprocess.run([sys.executable, Path(steps.__file__), "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and "--cuda" in ran.stdout, ran.stderr
