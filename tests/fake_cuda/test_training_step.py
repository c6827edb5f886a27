"""A step of train.py on the fake device: each precision, optimizer and set of kernels, eager and compiled."""

import pytest

from fake_cuda.harness import run_on_fake_cuda
from fake_cuda.training_step import SEQ_LEN, SEQUENCES, WIDE, saved_bytes, training_steps
from nanochameleon.bench.scaling import Cluster, memory_bytes

EAGER = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16, Muon, all logits, dropout": {"precision": "bf16", "optim": "muon", "fused_output": "off", "dropout": 0.1},
    "bf16, activation checkpointing": {"precision": "bf16", "activation_checkpointing": True},
    "bf16, vendor": {"precision": "bf16", "kernels": "vendor"},
    "bf16, cuda": {"precision": "bf16", "kernels": "cuda"},
}
COMPILED = {
    "fp32": {"precision": "fp32", "compile": True},
    "bf16": {"precision": "bf16", "compile": True},
    "bf16, activation checkpointing": {"precision": "bf16", "compile": True, "activation_checkpointing": True},
    "bf16, vendor": {"precision": "bf16", "compile": True, "kernels": "vendor"},
    "bf16, cuda": {"precision": "bf16", "compile": True, "kernels": "cuda"},
}
READS = ("clip_gradients: _local_scalar_dense", "between: _local_scalar_dense")  # the norm and the loss, at the end


@pytest.mark.parametrize("cases", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_a_step_waits_for_nothing_and_keeps_all_on_the_gpu(cases):
    found = run_on_fake_cuda(training_steps, cases=cases)
    for name, step in found.items():
        assert [line for line in step["syncs"] if not line.startswith(READS)] == [], name
        assert len(step["syncs"]) == len(READS), name
        assert step["mixed"] == [], name
        assert step["misplaced"] == [], name  # of the optimizer's state, after a step and after loading
        assert step["dense"] == [], name  # no mask (T, T)
        # a graph for the first block, which has no branch to add yet, and one for all others; with the second set of
        # documents both are compiled once more, for any number and length of documents
        assert (step["graphs"], step["graph_breaks"]) == (4 if cases is COMPILED else 0, 0), name


def test_a_layer_keeps_what_the_scaling_page_says():
    """Within 5%. The page's clusters have sharded weights in bf16 already, so copies of weights do not count."""
    cluster = Cluster(1, seq_len=SEQ_LEN, micro_batch=SEQUENCES, activation_checkpointing=False)
    said = memory_bytes(WIDE, cluster)["activations"] / WIDE.n_layers
    assert run_on_fake_cuda(saved_bytes) == pytest.approx(said, rel=0.05)
