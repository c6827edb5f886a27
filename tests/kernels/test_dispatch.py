"""Which implementation runs: a request by call, by environment, by table, and the reason where it cannot be met."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import nanochameleon
from nanochameleon.config import ModelConfig
from nanochameleon.kernels import qknorm_rope_attention
from nanochameleon.kernels.block.linear import linear
from nanochameleon.kernels.block.rms_norm import rms_norm
from nanochameleon.kernels.constant import assume_constant_result
from nanochameleon.kernels.dispatch import (
    AUTO,
    BF16_OPS,
    CUDA_DTYPES,
    NAMES,
    OPS,
    TRAINING_OPS,
    VARIABLE,
    choose,
    decide,
    explain,
    use_kernels,
)
from nanochameleon.kernels.gpu import packages, proof
from nanochameleon.transformer import Chameleon, compute_freqs_cis

CPU = torch.device("cpu")
x = torch.zeros(1)


def test_a_request_beats_the_environment_which_beats_the_table(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose("qknorm_rope_attention", x) == AUTO["qknorm_rope_attention"][0]
    monkeypatch.setenv(VARIABLE, "reference")
    assert choose("qknorm_rope_attention", x) == "reference"
    with use_kernels("numba"):
        assert choose("qknorm_rope_attention", x) == "numba"
        with use_kernels("reference"):
            assert choose("qknorm_rope_attention", x) == "reference"
        assert choose("qknorm_rope_attention", x) == "numba"
    assert choose("qknorm_rope_attention", x) == "reference"


def test_an_empty_variable_requests_nothing(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    assert choose("qknorm_rope_attention", x) == AUTO["qknorm_rope_attention"][0]


def test_threads_do_not_see_one_another_s_request():
    """All threads are in their block before any of them looks, and all look before any of them leaves it."""
    names = ["reference", "numba", "auto", "reference"]
    together = threading.Barrier(len(names))

    def chosen(name: str) -> tuple[str, str]:
        with use_kernels(name):
            together.wait(60)
            inside = choose("rms_norm", x)
            together.wait(60)
        return inside, choose("rms_norm", x)

    table = AUTO["rms_norm"][0]
    with use_kernels("reference"), ThreadPoolExecutor(len(names)) as pool:
        seen = list(pool.map(chosen, names))
    assert seen == [(table if name == "auto" else name, table) for name in names]


def in_another_thread(function) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


def test_the_backward_pass_runs_what_the_forward_pass_ran(monkeypatch):
    """On a GPU it is in a thread of autograd's, which requests nothing."""
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    with use_kernels("numba"):
        out = qknorm_rope_attention(q, q, q, compute_freqs_cis(torch.arange(5)[None], 8, 1e4), None, None, None, 1e-5)
    monkeypatch.setenv(VARIABLE, "cuda")  # which cannot be had
    in_another_thread(lambda: out.sum().backward())
    assert q.grad.isfinite().all()


def test_recomputation_runs_what_the_forward_pass_ran():
    model = Chameleon(ModelConfig(vocab_size=280, dim=32, n_layers=2, n_heads=2, multiple_of=8, max_seq_len=64)).train()
    gradients = []
    for model.activation_checkpointing, name in (
        (False, "reference"),
        (True, "reference"),
        (True, "numba"),
        (False, "numba"),
    ):
        model.zero_grad()
        with use_kernels(name):
            hidden = model(torch.arange(30)[None])
        in_another_thread((hidden * torch.arange(32.0)).sum().backward)
        gradients.append(model.layers[0].attention.wq.weight.grad.clone())
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[2], gradients[3])


@pytest.mark.parametrize(
    ("tensor", "reason"), [(x.double(), "not float64"), (torch.zeros(1, device="meta"), "tensors are on meta")]
)
def test_a_request_that_cannot_be_met_says_why(tensor, reason):
    with use_kernels("numba"), pytest.raises(ValueError, match=reason):
        choose("qknorm_rope_attention", tensor)
    with use_kernels("auto"):
        assert choose("qknorm_rope_attention", tensor) == "reference"


def test_cuda_must_be_requested_and_says_what_is_missing(monkeypatch):
    with use_kernels("cuda"), pytest.raises(ValueError, match="tensors are on cpu"):
        choose("qknorm_rope_attention", x)
    gpu = torch.device("cuda")
    monkeypatch.setattr(packages, "installed", lambda name: False)
    with use_kernels("cuda"):
        with pytest.raises(ValueError, match=r"cupy-cuda13x is not installed: pip install -e '\.\[cuda\]'"):
            decide("zloss_cross_entropy", gpu, torch.bfloat16)
        with pytest.raises(ValueError, match="do not take float32"):
            decide("qknorm_rope_attention", gpu, torch.float32)
        assert decide("swiglu", gpu, torch.bfloat16)[0] == "reference"  # never written
    with use_kernels("auto"):
        assert decide("zloss_cross_entropy", gpu, torch.bfloat16)[0] == "reference"  # until it was measured


@pytest.mark.parametrize("name", ["cuda", "vendor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_samples_are_drawn_from_weights_of_any_dtype_whatever_was_requested(monkeypatch, name, dtype):
    """A training in bfloat16 draws samples from its float32 weights, hours after it has begun."""
    monkeypatch.setattr(packages, "missing_cuda_package", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    with use_kernels(name):
        chosen, reason = decide("decode_attention", gpu, dtype)
        assert (chosen, reason) == ("reference", f"they do not take {str(dtype).removeprefix('torch.')}")
        assert {decide(op, gpu, dtype)[0] for op in ("rms_norm", "linear", "swiglu")} == {"reference"}
        assert decide("decode_attention", gpu, torch.bfloat16) == (name, "requested")
        with pytest.raises(ValueError, match="tensors are on cpu"):
            decide("decode_attention", CPU, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_op_on_a_gpu_is_given_a_name_that_it_does_not_know(monkeypatch, name, dtype):
    """It would run its kernel for CPUs, on addresses of the GPU."""
    monkeypatch.setattr(packages, "missing_cuda_package", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(proof, "load", lambda device: proof.Proofs())
    known = {op: {"reference"} | ({"cuda"} if op in CUDA_DTYPES else set()) for op in OPS}
    for op in ("qknorm_rope_attention", "decode_attention"):
        known[op].add("vendor")
    for op in OPS:
        with use_kernels(name), suppress(ValueError):  # a request that cannot be met
            assert decide(op, torch.device("cuda"), dtype)[0] in known[op], op


@pytest.mark.parametrize(("value", "works"), [("1", False), ("0", True), ("", True)])
def test_numba_that_does_not_compile_leaves_all_to_the_reference(monkeypatch, value, works):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", value)
    with use_kernels("auto"):
        kinds = {decide(op, CPU, torch.float32) for op in OPS}
        assert works or {name for name, _ in kinds} == {"reference"}
        assert works or all("NUMBA_DISABLE_JIT is set" in reason for _, reason in kinds)
        assert ("NUMBA_DISABLE_JIT" in explain(CPU, torch.float32)) == (not works)
    with use_kernels("numba"):
        if works:
            assert choose("rms_norm", x) == "numba"
        else:
            with pytest.raises(ValueError, match="numba kernels were requested for rms_norm, but NUMBA_DISABLE_JIT"):
                choose("rms_norm", x)


@pytest.mark.parametrize(
    ("cuda", "there", "missing"),
    [
        ("13.0", {"cupy-cuda13x"}, None),
        ("13.0", {"cupy-cuda12x"}, "cupy-cuda13x"),
        ("12.6", {"cupy-cuda12x"}, None),
        ("12.6", {"cupy-cuda13x"}, "cupy-cuda12x"),
        ("12.6", {"cupy-cuda12x", "cupy-cuda13x"}, None),
        ("12.9", set(), None),  # built here, or conda's
    ],
)
def test_cupy_is_for_the_cuda_of_torch(monkeypatch, cuda, there, missing):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(packages, "installed", lambda name: True)
    monkeypatch.setattr(packages, "distribution", there.__contains__)
    assert packages.missing_cuda_package() == missing
    assert packages.cuda_extra() == ("cuda" if cuda == "13.0" else "cuda12")


def test_unknown_names_raise(monkeypatch):
    with pytest.raises(ValueError, match="'nmba': choose one of auto"), use_kernels("nmba"):
        pass
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="'fast'"):
        choose("qknorm_rope_attention", x)


def test_the_table_names_implementations_that_exist():
    assert {name for name, _ in AUTO.values()} <= {*NAMES, "joined"} - {"auto"}  # the last: linear.py's own


def test_explain_has_a_line_for_each_op_of_a_step():
    with use_kernels("auto"):
        lines = explain(CPU, torch.bfloat16).splitlines()
        expected = {op: decide(op, CPU, torch.bfloat16) for op in TRAINING_OPS}
    for line, op in zip(lines, TRAINING_OPS, strict=True):
        assert line.split()[:2] == [op, expected[op][0]] and expected[op][1] in line
    assert "decode_attention" not in TRAINING_OPS


@pytest.mark.parametrize("missing", [None, "this processor has neither AMX nor AVX512-BF16"])
def test_pairs_of_bf16_are_chosen_where_they_run_and_their_absence_is_explained(monkeypatch, missing):
    monkeypatch.setattr("nanochameleon.kernels.cpu.bf16.matmul.why_unavailable", lambda: missing)
    table = AUTO["qknorm_rope_attention"]
    with use_kernels("auto"):
        decided = decide("qknorm_rope_attention", CPU, torch.bfloat16)
        assert decided == (table if missing else ("bf16", BF16_OPS["qknorm_rope_attention"]))
        assert decide("qknorm_rope_attention", CPU, torch.float32) == AUTO["qknorm_rope_attention"]
    with use_kernels("bf16"):
        assert decide("swiglu", CPU, torch.bfloat16)[0] == "numba"  # it has no matmul
        with pytest.raises(ValueError, match="they take bfloat16, not float32"):
            decide("qknorm_rope_attention", CPU, torch.float32)
        if missing:
            with pytest.raises(ValueError, match="requested for qknorm_rope_attention, but this processor"):
                decide("qknorm_rope_attention", CPU, torch.bfloat16)


@pytest.mark.parametrize("on_tiles", [False, True])
def test_weight_gradients_are_ours_only_on_a_matrix_unit(monkeypatch, on_tiles):
    monkeypatch.setattr("nanochameleon.kernels.cpu.bf16.matmul.why_unavailable", lambda: None)
    monkeypatch.setattr("nanochameleon.kernels.cpu.bf16.matmul.ON_TILES", on_tiles)
    with use_kernels("auto"):
        assert decide("linear", CPU, torch.bfloat16)[0] == ("bf16" if on_tiles else "joined")
    with use_kernels("bf16"):
        assert decide("linear", CPU, torch.bfloat16)[0] == "bf16"


def test_a_gpu_that_no_kernel_was_written_for_is_named(monkeypatch):
    monkeypatch.setattr(packages, "missing_cuda_package", lambda: None)
    gpu, capabilities = (
        torch.device("cuda"),
        ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)),
    )
    refused = []
    for capability in capabilities:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        with use_kernels("cuda"):
            try:
                assert decide("zloss_cross_entropy", gpu, torch.bfloat16)[0] == "cuda"
            except ValueError as error:
                assert str(error).endswith(
                    f"not written for a GPU of compute capability {capability[0]}.{capability[1]}"
                )
                refused.append(capability)
    assert refused == [(7, 5), (11, 0)]


def test_ops_give_shapes_on_the_meta_device():
    x, weight = torch.zeros(4, 8, device="meta"), torch.zeros(8, device="meta")
    assert rms_norm(x, weight, 1e-5).shape == (4, 8)
    assert linear(x, [weight.expand(3, 8)])[0].shape == (4, 3)


def test_the_mark_of_a_constant_is_the_one_of_torch():
    def ours(): ...
    def theirs(): ...

    marks = vars(torch.compiler.assume_constant_result(theirs))
    assert vars(assume_constant_result(ours)) == marks != {}, (
        f"torch {torch.__version__} marks constants by {marks}: make kernels/constant.py do the same"
    )


def test_torchs_compiler_does_not_look_into_what_is_marked():
    @assume_constant_result
    def marked() -> int:
        return os.getpid()  # the compiler cannot look into it

    @torch.compile(backend="eager", fullgraph=True)
    def doubled(x):
        return x * (2 if marked() > 0 else 3)

    try:
        assert doubled(torch.ones(())) == 2
    except torch._dynamo.exc.Unsupported:
        pytest.fail(f"torch {torch.__version__} ignores the mark of kernels/constant.py: set the one that it reads")


def test_the_programs_start_without_torchs_compiler():
    """Its import takes longer than drawing an image with the toy."""
    code = "import sys, sample, nanochameleon.generation.complete; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(nanochameleon.__file__).parents[1])
