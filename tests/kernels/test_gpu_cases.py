"""The bench's GPU cases, before a GPU sees them: their checks pass and all that is timed runs, in the emulator."""

import pytest
import torch

from nanochameleon.bench import gpu_cases, subjects

pytestmark = pytest.mark.usefixtures("emulated_gpu")


@pytest.mark.parametrize("op", ["attention", "zloss", "linear_zloss", "decode"])
def test_the_bench_s_cases_pass_their_checks_and_run(op):
    """Down to the timed closures, at sizes that the emulator does in a moment."""
    tiny = gpu_cases.Sizes(((1, 20, 2, 64),), ((3, 64),), ((3, 64, 16),), ((2, 2, 1, 30, 64),))
    subjects.check_all(torch.device("cpu"), op, subjects.DRY)
    for case in gpu_cases.cases(torch.device("cpu"), op, tiny):
        for variant in (*case.variants.values(), *case.extra.values(), *case.extra_forward.values()):
            variant(*case.inputs) if variant in case.variants.values() else variant()
