"""Norm, rotation and attention on a GPU, forward and backward, against float64.

Run on a CPU through the very calls that launch the kernels on a GPU: see emulator.py.
"""

import pytest
import torch
from attention_problems import EPS, outcome, problems, seeds, sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good_as

import nanochameleon.kernels.attention.decode  # noqa: F401 - registers its op
from nanochameleon.bench.gpu_checks import check, own_attention_problem
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.qknorm_rope_attention import qknorm_rope_attention
from nanochameleon.kernels.attention.reference import qknorm_rope_attention_reference
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.kernels.gpu import launch as gpu

pytestmark = pytest.mark.usefixtures("emulated_gpu")
NARROW = torch.bfloat16


@pytest.mark.parametrize("name", ["cuda", "vendor"])
@settings(max_examples=10)
@given(problem=problems(lengths=[1, 2, 17, 64, 65, 130], head_dims=[6, 64, 128]))
def test_attention_is_as_good_as_the_reference(name, problem):
    """Norm, rotation and ours or torch's attention, in value and in gradient."""
    truth = outcome(qknorm_rope_attention_reference, problem, torch.float64)
    naive = outcome(qknorm_rope_attention_reference, problem, NARROW)
    with use_kernels(name):
        result = outcome(qknorm_rope_attention, problem, NARROW)
    size = sizes(problem)
    for x, plain, exact in zip(result, naive, truth, strict=True):
        assert_as_good_as(x, plain, exact, scale=size * (1 + exact.abs().max().item()))


@settings(max_examples=6)
@given(st.sampled_from([9, 70]), st.sampled_from(gpu.HEAD_DIMS), st.sampled_from([1, 3]), seeds)
def test_it_is_as_good_as_the_formula(t, e, shared_by, seed):
    """By the check that a GPU proves it with: values, bands, inputs."""
    check(own_attention_problem(t, 2 * shared_by, 2, e, torch.device("cpu"), seed), NARROW)


def test_torch_knows_the_ops():
    """Schema, autograd registration, fake tensors and a traced backward pass."""
    ops, x = torch.ops.nanochameleon, torch.randn(1, 5, 2, 64).to(NARROW).requires_grad_()
    first, last = Documents.of(torch.tensor([[0, 0, 1, 1, 1]])).bounds()
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(ops.attention_cuda.default, (x, x, x, first, last), test_utils=checks)
    weight = torch.ones(2, 64, requires_grad=True)
    torch.library.opcheck(
        ops.qknorm_rope_cuda.default, (x, torch.ones(1, 5, 64), weight, weight, EPS), test_utils=checks
    )
    heads, cache, positions = (
        torch.randn(2, 1, 4, 64).to(NARROW),
        torch.zeros(2, 1, 9, 64, dtype=NARROW),
        torch.tensor([[3], [8]]),
    )
    arguments = heads, torch.ones(2, 1, 64), None, None, EPS, cache, cache.clone(), positions, 9
    torch.library.opcheck(ops.decode_attention.default, arguments, test_utils=checks)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows_and_no_positions(shape):
    x = torch.zeros(*shape, 2, 64, dtype=NARROW, requires_grad=True)
    table = torch.ones(shape[0], 1, shape[1], 32, 2)
    with use_kernels("cuda"):
        out = qknorm_rope_attention(x, x, x, table, None, None, None, EPS)
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape


SHAPES = {"k": (2, 5, 2, 64), "v": (2, 5, 2, 64), "table": (2, 1, 5, 32, 2), "docs": (2, 5), "weight": (2, 64)}


@pytest.mark.parametrize("name", ["cuda", "vendor"])
@pytest.mark.parametrize(
    ("wrong", "shape"),
    [("k", (2, 3, 2, 64)), ("v", (2, 3, 2, 64)), ("v", (1, 5, 2, 64)), ("k", (2, 5, 3, 64)), ("k", (2, 5, 2, 32)),
     ("table", (2, 1, 3, 32, 2)), ("table", (2, 1, 5, 16, 2)), ("table", (2, 1, 5, 64)), ("docs", (2, 3)),
     ("weight", (3, 64)), ("weight", (2, 16))],
)  # fmt: skip
def test_what_does_not_fit_is_refused(monkeypatch, name, wrong, shape):
    monkeypatch.setattr(gpu, "start", lambda file, kernel, grid, block, *x, **more: None)
    shapes = SHAPES | {wrong: shape}
    k, v, weight = (torch.randn(shapes[key]).to(NARROW) for key in ("k", "v", "weight"))
    table, docs = torch.ones(shapes["table"]), torch.zeros(shapes["docs"]).long()
    q = torch.randn(2, 5, 4, 64).to(NARROW)
    with use_kernels(name), pytest.raises((ValueError, RuntimeError)):
        qknorm_rope_attention(q, k, v, table, Documents(docs, None, 5), (weight, weight), None, EPS)
