"""A compiled layer of the 1.4B moves few bytes between matmuls: what Inductor decides to fuse stays fused."""

from fake_cuda.layer_bytes import between_matmuls


def test_a_compiled_layer_moves_at_most_6_2_gb():
    """At full size: tensors are fake, so the time goes to Inductor, which takes as long for small ones."""
    passes = between_matmuls()
    assert set(passes) == {"forward", "backward"} and all(len(kernels) > 10 for kernels in passes.values())
    assert sum(n for kernels in passes.values() for _, n in kernels) <= 6.2e9
