"""Every CUDA kernel, run on a CPU by the emulator through the very calls that launch it on a GPU, against float64.

Each launch is made in two orders of threads on tensors with fences around them: see emulator.py. What this cannot show
is speed, and that the manual's fragments are the hardware's: for that, `python -m nanochameleon.bench kernels --device
cuda` checks every case before it times it.
"""

import pytest
import torch
import torch.nn.functional as F
from attention_problems import EPS, outcome, problems, sizes
from emulator import emulated, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good_as

from nanochameleon.bench import gpu_cases
from nanochameleon.kernels import gpu, linear_zloss_cuda
from nanochameleon.kernels.attention import attention_reference, visible
from nanochameleon.kernels.decode_attention import decode_attention_, decode_attention_reference_
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.kernels.normed_attention import normed_attention, normed_attention_reference
from nanochameleon.kernels.zloss import zloss_cross_entropy_reference
from nanochameleon.transformer import rotary_table

pytestmark = needs_compiler
NARROW = torch.bfloat16


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """gpu.py launches here, and dispatch takes tensors of the CPU for those of a GPU."""
    emulated(monkeypatch)
    monkeypatch.setattr("nanochameleon.kernels.dispatch.why_not_cuda", lambda op, device, dtype: None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


seeds = st.integers(0, 10_000)

# ---------------------------------------------------------------------------------------------------------------------
# Attention as the model calls it


@pytest.mark.parametrize("name", ["cuda", "vendor"])
@settings(max_examples=10)
@given(problem=problems(lengths=[1, 2, 17, 64, 65, 130], head_dims=[6, 64, 128]))
def test_attention_is_as_good_as_the_reference(name, problem):
    """Norm, turn and ours or torch's attention, in value and in gradient."""
    truth = outcome(normed_attention_reference, problem, torch.float64)
    naive = outcome(normed_attention_reference, problem, NARROW)
    with use_kernels(name):
        result = outcome(normed_attention, problem, NARROW)
    size = sizes(problem)
    for x, plain, exact in zip(result, naive, truth, strict=True):
        assert_as_good_as(x, plain, exact, scale=size * (1 + exact.abs().max().item()))


@settings(max_examples=6)
@given(st.sampled_from([1, 9, 70]), st.sampled_from(gpu.HEAD_DIMS), st.sampled_from([1, 3]), st.booleans(), seeds)
def test_both_versions_are_close_to_float64(t, e, shared_by, simple, seed):
    """The plain one and that on tensor cores, at their inputs' precision; and lse is log2 of the softmax's sum."""
    numbers = generator(seed)
    q, k, v, d_out = (
        torch.randn(2, t, heads, e, generator=numbers).to(NARROW) for heads in (2 * shared_by, 2, 2, 2 * shared_by)
    )
    docs = torch.randint(-1, 2, (2, t), generator=numbers)
    first, last = gpu.document_bounds(docs)
    out, lse = gpu.attention(q, k, v, first, simple)
    result = out, *gpu.attention_backward(d_out, out, lse, q, k, v, first, last, simple)

    x = [y.double().requires_grad_() for y in (q, k, v)]
    turned = [y.transpose(1, 2) for y in x]
    truth = attention_reference(*turned, visible(docs, docs)).transpose(1, 2)
    for ours, exact in zip(result, (truth.detach(), *torch.autograd.grad(truth, x, d_out.double())), strict=True):
        assert (ours.double() - exact).norm() <= 2**-7 * exact.norm() + 2**-7 * (t == 1)
    scores = (turned[0] @ turned[1].repeat_interleave(shared_by, 1).mT) / e**0.5
    sums = scores.masked_fill(~visible(docs, docs)[:, None], -torch.inf).logsumexp(-1).detach()
    torch.testing.assert_close(lse.double() * 0.6931471805599453, sums, rtol=1e-3, atol=1e-3)


@settings(max_examples=5)
@given(st.sampled_from([1, 70, 140]), st.sampled_from(gpu.HEAD_DIMS), st.sampled_from([1, 2]), seeds)
def test_hopper_s_own_products_give_the_same(t, e, shared_by, seed):
    """As the kernel above: the same sums in the same order, and so nearly the same bits."""
    with pytest.MonkeyPatch.context() as patch:
        emulated(patch, 90)
        numbers = generator(seed)
        q, k, v = (torch.randn(1, t, n, e, generator=numbers).to(NARROW) for n in (shared_by, 1, 1))
        first, _ = gpu.document_bounds(torch.randint(-1, 2, (1, t), generator=numbers))
        for ours, theirs in zip(gpu.attention_sm90(q, k, v, first), gpu.attention(q, k, v, first), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-9)


@given(st.lists(st.lists(st.integers(-1, 3), min_size=7, max_size=7), min_size=1, max_size=3))
def test_where_documents_begin_and_end(rows):
    first, last = gpu.document_bounds(torch.tensor(rows))
    for row, begins, ends in zip(rows, first.tolist(), last.tolist(), strict=True):
        assert begins == [row.index(doc) for doc in row]
        assert ends == [6 - row[::-1].index(doc) for doc in row]


def test_torch_knows_the_ops():
    """Schema, autograd registration, fake tensors and a traced backward pass."""
    ops, x = torch.ops.nanochameleon, torch.randn(1, 5, 2, 64).to(NARROW).requires_grad_()
    first, last = gpu.document_bounds(torch.tensor([[0, 0, 1, 1, 1]]))
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(ops.attention_cuda.default, (x, x, x, first, last), test_utils=checks)
    weight = torch.ones(2, 64, requires_grad=True)
    torch.library.opcheck(ops.norm_rotary.default, (x, torch.ones(1, 5, 64), weight, weight, EPS), test_utils=checks)
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
    table = torch.ones(shape[0], 1, shape[1], 32, dtype=torch.complex64)
    with use_kernels("cuda"):
        out = normed_attention(x, x, x, table, None, None, None, EPS)
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@st.composite
def steps(draw):
    """New ids' heads, turns, norm, a cache with something in it, positions; in float64 whose values bfloat16 holds."""
    n, t, groups, each = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 3, 4])),
    )
    e, places, numbers = (
        draw(st.sampled_from(gpu.HEAD_DIMS)),
        draw(st.sampled_from([3, 40, 300, 530])),
        generator(draw(seeds)),
    )

    def random(*shape):
        return torch.randn(shape, generator=numbers).to(NARROW).double()

    heads, keys, values = (
        random(n, t, groups * (each + 2), e),
        random(n, groups, places, e),
        random(n, groups, places, e),
    )
    norm = (random(groups * (each + 1), e), random(groups * (each + 1), e)) if draw(st.booleans()) else None
    positions = torch.randint(0, places - t + 1, (n, 1), generator=numbers) + torch.arange(t)
    span = draw(st.integers(int(positions.max()) + 1, places))
    return heads, rotary_table(positions, e, 1e4)[:, 0], norm, keys, values, positions, span


def decoded(function, step, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """-> out, keys, values"""
    heads, turns, norm, keys, values, positions, span = step
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm = norm and tuple(x.to(wide) for x in norm)
    heads, keys, values = (x.to(dtype, copy=True) for x in (heads, keys, values))
    unseen = torch.arange(span) > positions[..., None]
    bias = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)
    return function(heads, turns, norm, EPS, keys, values, positions, bias), keys, values


@settings(max_examples=25)
@given(steps())
def test_decoding_is_as_good_as_the_reference(step):
    truth, naive = (decoded(decode_attention_reference_, step, dtype) for dtype in (torch.float64, NARROW))
    with use_kernels("cuda"):
        result = decoded(decode_attention_, step, NARROW)
    e = step[0].shape[-1]
    longest = (
        e**0.5 if step[2] is None else step[2][0].abs().max().item() * e**0.5 + step[2][1].norm(dim=-1).max().item()
    )
    for x, plain, exact in zip(result, naive, truth, strict=True):
        assert_as_good_as(x, plain, exact, scale=(1 + longest**2 / e**0.5) * (1 + exact.abs().max().item()))


@settings(max_examples=10)
@given(steps())
def test_the_decoding_reference_is_the_formula(step):
    """Id by id, each seeing what came before it, with attention_reference of the prefix."""
    heads, turns, norm, keys, values, positions, _ = step
    out, new_keys, new_values = decoded(decode_attention_reference_, step, torch.float64)
    n, t, groups = *heads.shape[:2], keys.shape[1]
    qk, v = heads[:, :, :-groups], heads[:, :, -groups:]
    if norm is not None:
        qk = F.layer_norm(qk, qk.shape[-1:], eps=EPS) * norm[0] + norm[1]
    pairs = torch.view_as_complex(qk.unflatten(-1, (-1, 2)).contiguous()) * turns[:, :, None]
    x = torch.cat([torch.view_as_real(pairs).flatten(-2), v], 2)
    for i in range(n):
        for j in range(t):
            place = int(positions[i, j])
            torch.testing.assert_close(new_keys[i, :, place], x[i, j, -2 * groups : -groups])
            torch.testing.assert_close(new_values[i, :, place], x[i, j, -groups:])
            seen = (y[i, None, :, : place + 1] for y in (new_keys, new_values))
            q = x[i, j, None, : -2 * groups, None]
            exact = attention_reference(q, *seen, torch.ones(1, 1, place + 1, dtype=torch.bool))
            torch.testing.assert_close(out[i, j], exact[0, :, 0])
    old = torch.ones(keys.shape[2], dtype=torch.bool)
    old[positions.flatten()] = False
    assert torch.equal(new_keys[:, :, old], keys[:, :, old]) and torch.equal(new_values[:, :, old], values[:, :, old])


# ---------------------------------------------------------------------------------------------------------------------
# Loss


@st.composite
def logits(draw):
    """(logits in float64 whose values bfloat16 holds, targets with some ignored)"""
    n, v, numbers = draw(st.integers(1, 5)), draw(st.sampled_from([1, 7, 8, 64, 97, 1_000])), generator(draw(seeds))
    x = draw(st.sampled_from([0.1, 3.0, 50.0])) * torch.randn(n, v, generator=numbers)
    return x.to(NARROW).double(), torch.randint(-1, v, (n,), generator=numbers)


def loss_outcome(x: torch.Tensor, targets: torch.Tensor, z_loss: float, share: float) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    loss, log_z = zloss_cross_entropy_reference(x, targets)
    total = share * (loss + z_loss * log_z.square()).sum()
    return [loss.detach(), log_z.detach(), torch.autograd.grad(total, x)[0]]


def compare_losses(result, x, targets, dtype, z_loss, share) -> None:
    naive, truth = (loss_outcome(x.to(kind), targets, z_loss, share) for kind in (dtype, torch.float64))
    size = 1 + x.abs().max().item()
    for ours, plain, exact, scale in zip(
        result, naive, truth, (size, size, share * (1 + 2 * z_loss * size) * size), strict=True
    ):
        assert_as_good_as(ours, plain, exact, scale=4 * scale)


@pytest.mark.parametrize("dtype", [NARROW, torch.float32])
@given(problem=logits(), z_loss=st.sampled_from([0.0, 0.3]))
def test_the_loss_is_as_good_as_the_reference(dtype, problem, z_loss):
    x, targets = problem
    narrow, share = x.to(dtype), 0.25
    loss, log_z = gpu.zloss_forward(narrow, targets)
    counted = (targets >= 0).float()
    gradient = gpu.zloss_backward(share * counted, 2 * share * z_loss * log_z, narrow, targets, log_z)
    compare_losses([loss, log_z, gradient], x, targets, dtype, z_loss, share)


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("dtype", [NARROW, torch.float32])
@settings(max_examples=25)
@given(problem=logits(), z_loss=st.sampled_from([0.0, 0.3]))
def test_the_gradient_in_the_logits_place(dtype, generation, problem, z_loss, monkeypatch):
    """In one pass where rows are multiples of 16 bytes, else in two; with the copies of either generation."""
    emulated(monkeypatch, generation)
    x, targets = problem
    buffer = x.to(dtype)
    loss, log_z = gpu.zloss_overwrite(buffer, targets, z_loss, 0.25, gpu.shared_kilobytes(0))
    compare_losses([loss, log_z, buffer], x, targets, dtype, z_loss, 0.25)


@pytest.mark.parametrize("generation", [80, 90])
def test_a_row_as_wide_as_a_vocabulary(generation, monkeypatch):
    """Several bulk copies, all of a block's 1,024 threads."""
    emulated(monkeypatch, generation)
    x, targets = torch.randn(2, 40_000, generator=generator(0)).to(NARROW).double(), torch.tensor([39_999, 7])
    buffer = x.to(NARROW)
    loss, log_z = gpu.zloss_overwrite(buffer, targets, 1e-2, 0.5, gpu.shared_kilobytes(0))
    compare_losses([loss, log_z, buffer], x, targets, NARROW, 1e-2, 0.5)


def test_rows_that_start_anywhere_are_read_number_by_number():
    """Slices of 16-bit rows are not 16 byte aligned, though their width may be a multiple."""
    x, targets = torch.randn(3, 64, generator=generator(0)).to(NARROW), torch.tensor([0, 63, -1])
    buffer = torch.zeros(3 * 64 + 3, dtype=NARROW)
    moved = buffer[3:].view(3, 64).copy_(x)
    assert not gpu.fits_one_pass(moved, 227)
    loss, log_z = gpu.zloss_overwrite(moved, targets, 1e-2, 0.5, 227)
    compare_losses([loss, log_z, moved], x.double(), targets, NARROW, 1e-2, 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Output layer and loss


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("dtype", [NARROW, torch.float32])
@settings(max_examples=15)
@given(st.integers(1, 40), st.sampled_from([5, 64]), st.sampled_from([3, 16]), seeds)
def test_the_output_layer_in_chunks(dtype, at_once, n, v, d, seed):
    numbers = generator(seed)
    hidden, weight = (torch.randn(rows, d, generator=numbers).to(NARROW).double() for rows in (n, v))
    targets, z_loss, share = torch.randint(-1, v, (n,), generator=numbers), 0.1, 1 / n

    def plain(kind: torch.dtype) -> list[torch.Tensor]:
        x, w = (y.to(kind).requires_grad_() for y in (hidden, weight))
        loss, log_z = zloss_cross_entropy_reference(F.linear(x, w), targets)
        total = share * (loss + z_loss * log_z.square()).sum()
        return [loss.detach(), log_z.detach(), *torch.autograd.grad(total, (x, w))]

    x, w = hidden.to(dtype), weight.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_zloss_cuda, "CHUNK_BYTES", 0)
        if at_once:
            result = linear_zloss_cuda.gradients(x, w, targets, z_loss, share)
        else:
            loss, log_z = linear_zloss_cuda.forward(x, w, targets)
            g, h = torch.full_like(loss, share), 2 * share * z_loss * log_z
            result = loss, log_z, *linear_zloss_cuda.backward(g, h, x, w, targets, log_z)
    size = 1 + hidden.norm(dim=1).max().item() * weight.norm(dim=1).max().item()
    for ours, naive, exact in zip(result, plain(dtype), plain(torch.float64), strict=True):
        assert_as_good_as(ours, naive, exact, scale=4 * size)


def test_logits_held_are_a_part_of_all():
    """At the sizes of the bench's largest case, and where all logits are few."""
    rows = linear_zloss_cuda.rows_a_chunk(32_768, 65_536, 2)
    assert rows * 65_536 * 2 == 2**29
    assert linear_zloss_cuda.rows_a_chunk(100, 1_000, 2) == 100 and linear_zloss_cuda.rows_a_chunk(0, 1_000, 2) == 0


# ---------------------------------------------------------------------------------------------------------------------
# The bench


@pytest.mark.parametrize("op", ["attention", "zloss", "linear_zloss", "decode"])
def test_the_bench_s_cases_pass_their_checks_and_run(op, monkeypatch):
    """Down to the timed closures, at sizes that the emulator does in a moment."""
    tiny = {"ATTENTION": [(1, 20, 2, 64)], "ZLOSS": [(3, 64)], "LINEAR": [(3, 64, 16)], "DECODE": [(2, 2, 1, 30, 64)]}
    for name, sizes_ in tiny.items():
        monkeypatch.setattr(gpu_cases, name, sizes_)
    monkeypatch.setattr(gpu_cases, "CHECKED_WIDTHS", (33, 64))
    monkeypatch.setattr(gpu_cases, "CHECKED_LENGTHS", (20, 33))
    monkeypatch.setattr("nanochameleon.bench.kernels.own", lambda device: "cuda")
    for case in gpu_cases.cases(torch.device("cpu"), False, op):
        for variant in (*case.variants.values(), *case.extra.values(), *case.extra_forward.values()):
            variant(*case.inputs) if variant in case.variants.values() else variant()
