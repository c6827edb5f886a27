"""Every variant of a decode step can be one CUDA graph: it reads nothing."""

from fake_cuda.decoding import all_decode_steps
from fake_cuda.harness import run_on_fake_cuda


def test_a_decode_step_waits_for_nothing():
    found = run_on_fake_cuda(all_decode_steps)
    assert {len(variants) for variants in found.values()} == {18}
    for case, variants in found.items():
        for variant, step in variants.items():
            assert step["syncs"] == [] == step["mixed"], f"{case}: {variant}"
