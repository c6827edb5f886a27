"""Which implementation runs: a wish by call, by environment, by table; and what cannot be met is said."""

import pytest
import torch

from nanochameleon.kernels import dispatch
from nanochameleon.kernels.dispatch import (
    AMX,
    AUTO,
    NAMES,
    OPS,
    STEP,
    VARIABLE,
    architecture,
    choose,
    decide,
    explain,
    use_kernels,
)

CPU = torch.device("cpu")
x = torch.zeros(1)


def test_a_wish_beats_the_environment_which_beats_the_table(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose("normed_attention", x) == AUTO["normed_attention", torch.float32][0]
    monkeypatch.setenv(VARIABLE, "reference")
    assert choose("normed_attention", x) == "reference"
    with use_kernels("numba"):
        assert choose("normed_attention", x) == "numba"
        with use_kernels("reference"):
            assert choose("normed_attention", x) == "reference"
        assert choose("normed_attention", x) == "numba"
    assert choose("normed_attention", x) == "reference"


@pytest.mark.parametrize(
    ("tensor", "reason"), [(x.double(), "not float64"), (torch.zeros(1, device="meta"), "tensors are on meta")]
)
def test_a_wish_that_cannot_be_met_says_why(tensor, reason):
    with use_kernels("numba"), pytest.raises(ValueError, match=reason):
        choose("normed_attention", tensor)
    with use_kernels("auto"):
        assert choose("normed_attention", tensor) == "reference"


def test_cuda_must_be_asked_for_and_says_what_is_missing(monkeypatch):
    with use_kernels("cuda"), pytest.raises(ValueError, match="tensors are on cpu"):
        choose("normed_attention", x)
    gpu = torch.device("cuda")
    monkeypatch.setattr("nanochameleon.kernels.dispatch.installed", lambda name: False)
    with use_kernels("cuda"):
        with pytest.raises(ValueError, match=r"cupy-cuda13x is not installed: pip install -e '\.\[cuda\]'"):
            decide("zloss_cross_entropy", gpu, torch.bfloat16)
        with pytest.raises(ValueError, match="do not take float32"):
            decide("normed_attention", gpu, torch.float32)
        assert decide("swiglu", gpu, torch.bfloat16)[0] == "reference"  # never written
    with use_kernels("auto"):
        assert decide("zloss_cross_entropy", gpu, torch.bfloat16)[0] == "reference"  # until it was measured


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
            with pytest.raises(ValueError, match="numba's kernels were asked for rms_norm, but NUMBA_DISABLE_JIT"):
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
    monkeypatch.setattr(dispatch, "installed", lambda name: True)
    monkeypatch.setattr(dispatch, "distribution", there.__contains__)
    assert dispatch.missing_for_cuda() == missing
    assert dispatch.cuda_extra() == ("cuda" if cuda == "13.0" else "cuda12")


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="'nmba': choose one of auto"), use_kernels("nmba"):
        pass
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="'fast'"):
        choose("normed_attention", x)


def test_the_table_names_each_op_for_each_type_once():
    assert set(AUTO) == {(op, dtype) for op in OPS for dtype in (torch.float32, torch.bfloat16)}
    assert {name for name, _ in AUTO.values()} <= {*NAMES, "joined"} - {"auto"}  # the last: linear.py's own


def test_explain_has_a_line_for_each_op_of_a_step():
    with use_kernels("auto"):
        lines = explain(CPU, torch.bfloat16).splitlines()
        expected = {op: decide(op, CPU, torch.bfloat16) for op in STEP}
    for line, op in zip(lines, STEP, strict=True):
        assert line.split()[:2] == [op, expected[op][0]] and expected[op][1] in line
    assert not {"linear_zloss_cross_entropy", "decode_attention"} & set(STEP)  # losses.py takes logits


@pytest.mark.parametrize("missing", [None, "this processor has no AMX-TILE"])
def test_tiles_are_taken_where_there_are_some_and_never_without_a_word(monkeypatch, missing):
    monkeypatch.setattr("nanochameleon.kernels.amx.why_not", lambda: missing)
    table = AUTO["normed_attention", torch.bfloat16]
    with use_kernels("auto"):
        decided = decide("normed_attention", CPU, torch.bfloat16)
        assert decided == (table if missing else ("amx", AMX["normed_attention"]))
        assert decide("normed_attention", CPU, torch.float32) == AUTO["normed_attention", torch.float32]
    with use_kernels("amx"):
        assert decide("swiglu", CPU, torch.bfloat16)[0] == "numba"  # nothing of it is a product
        with pytest.raises(ValueError, match="they take bfloat16, not float32"):
            decide("normed_attention", CPU, torch.float32)
        if missing:
            with pytest.raises(ValueError, match="amx's kernels were asked for normed_attention, but this processor"):
                decide("normed_attention", CPU, torch.bfloat16)


def test_a_gpu_that_no_kernel_was_written_for_is_named(monkeypatch):
    monkeypatch.setattr("nanochameleon.kernels.dispatch.installed", lambda name: True)
    decided = {}
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        with use_kernels("cuda"):
            try:
                decide("zloss_cross_entropy", torch.device("cuda"), torch.bfloat16)
                decided[capability] = architecture(*capability)
            except ValueError as error:
                assert f"not written for a GPU of compute capability {capability[0]}.{capability[1]}" in str(error)
    assert decided == {(8, 0): "sm_80", (8, 9): "sm_80", (9, 0): "sm_90a", (10, 0): "sm_100a"}
