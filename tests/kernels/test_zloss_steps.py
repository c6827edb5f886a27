"""Every rung of the loss's two ladders is right, and a fault planted in a rung of steps.cu does not pass."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochameleon.kernels import ladder
from nanochameleon.kernels.gpu.emulator.emulator import EmulatorError
from nanochameleon.kernels.gpu.emulator.kernel import emulated_kernel
from nanochameleon.kernels.ladder import Ladder, WrongRung
from nanochameleon.kernels.zloss import steps

CPU = torch.device("cpu")
SIZES = [1, 2, 7, 16, 31, 63, 64, 65, 128, 257, 1_025]


@st.composite
def problems(draw, fewest: int = 0):
    """(logits (N, V) as large as 1e4 on either side, targets of which some or all are ignored, z_loss, scale)"""
    n, v = draw(st.integers(fewest, 6)), draw(st.sampled_from(SIZES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    size, offset = draw(st.sampled_from([0.1, 1.0, 30.0])), draw(st.sampled_from([0.0, -1e4, 1e4]))
    logits = offset + size * torch.randn(n, v, generator=generator)
    targets = torch.randint(v, (n,), generator=generator)
    ignored = torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return logits, torch.where(ignored, -100, targets), draw(st.sampled_from([0.0, 0.3])), 0.25


@cache
def on_gpu() -> Ladder:
    return steps.on_gpu(ladder.emulator_kernel, CPU)


@given(problems())
def test_every_rung_on_a_cpu_is_right(problem):
    ladder.check(replace(steps.on_cpu(), problems=lambda: [problem]))


@pytest.mark.usefixtures("emulated_gpu")
@settings(max_examples=20)
@given(problems(fewest=1))
def test_every_rung_in_cuda_is_right(problem):
    ladder.check(replace(on_gpu(), problems=lambda: [problem]))


@pytest.mark.usefixtures("emulated_gpu")
@pytest.mark.parametrize("found", [steps.on_cpu, on_gpu])
def test_ignored_rows_are_zeros_and_the_problems_of_the_command_pass(found):
    logits, _, *numbers = steps.inputs(3, 70)
    for rung in found().rungs:
        results = rung.function(logits.clone(), torch.tensor([-1, 69, -100]), *numbers)
        assert all((x[[0, 2]] == 0).all() and (x[1] != 0).all() for x in results), rung.name
    assert ladder.check(found()) <= 1


def test_a_rung_shows_its_code():
    """What the lessons print; the last rung is the shipped kernel itself."""
    sources = [rung.source for rung in steps.on_cpu().rungs]
    assert ["zloss_loops" in sources[1], "def zloss_registers" in sources[3], "def overwrite" in sources[5]] == [
        True
    ] * 3
    assert all(5 <= len(source.splitlines()) <= 35 for source in sources)


FILE = Path(steps.__file__).with_name("steps.cu")
ORDER = "race|order of its threads"
FAULTS = {  # kernel, right, wrong, what is said
    "a missing barrier": ("zloss_block_a_row", "__syncthreads();  // the parts", "// the parts", ORDER),
    "a result before its barrier": ("zloss_block_a_row", "  }\n  __syncthreads();\n  float z", "  }\n  float z", ORDER),
    "a neighbour's part": (
        "zloss_block_a_row",
        "maxima[t + half], sums",
        "maxima[t + half - 1], sums",
        f"off by|{ORDER}",
    ),
    "half of the parts": ("zloss_block_a_row", "int half = blockDim.x / 2", "int half = blockDim.x / 4", "off by"),
    "a logit left out": ("zloss_block_a_row", "int i = t; i < v", "int i = t + 1; i < v", "off by|not finite"),
    "sums of unlike maxima": ("zloss_warps", "s = s * expf(m - new_max) + s2", "s = s + s2", "off by"),
    "half of a warp": ("zloss_warps", "int o = 16", "int o = 8", f"off by|{ORDER}"),
    "odd rows by 16 bytes": ("zloss_warps", "v % 4 || (unsigned long long)x % 16 ? 0 : v / 4", "v / 4", "alignment"),
    "rows that do not exist": ("zloss_thread_a_row", "if (row >= n) return;", "", "outside|out of bounds"),
    "no z-loss in the gradient": ("zloss_thread_a_row", "scale * (1.f + 2.f * z_loss * z)", "scale", "off by"),
}


@pytest.mark.usefixtures("emulated_gpu")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_cuda_does_not_pass(fault):
    kernel, right, wrong, sentence = FAULTS[fault]
    number = {"zloss_thread_a_row": 0, "zloss_block_a_row": 1, "zloss_warps": 2}[kernel]
    source = FILE.read_text()
    assert right in source
    planted = emulated_kernel(source.replace(right, wrong), kernel)
    rows, threads = (64, 64) if number == 0 else (1, 256)
    rung = replace(on_gpu().rungs[number], function=steps.launched(planted, rows, threads))
    inputs = torch.linspace(-8, 8, 2 * 1_026).view(2, -1), torch.tensor([3, 1_025]), 0.1, 0.5
    with pytest.raises((WrongRung, EmulatorError), match=sentence):
        ladder.check(replace(on_gpu(), rungs=[rung], problems=lambda: [inputs]))
