"""Attention by documents: torch's kernels for GPUs, stood in for by a formula, against the masked formula."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.kernels.attention import by_documents, flash, reference
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import attention_reference, visible


def document_by_document(q, k, v, cu_seqlens, longest):
    """Flash attention's contract for (N, H, E), in plain operations. Heads must be as many."""
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens[0] == 0 and cu_seqlens[-1] == len(q) == len(k) == len(v)
    assert q.shape[1] == k.shape[1] == v.shape[1]
    outs = []
    for a, b in itertools.pairwise(cu_seqlens):
        assert 0 <= b - a <= longest  # a kernel would leave out what is beyond
        x = (y[a:b].transpose(0, 1)[None] for y in (q, k, v))
        outs.append(attention_reference(*x, torch.ones(1, b - a, b - a, dtype=torch.bool).tril())[0].transpose(0, 1))
    return torch.cat(outs)


def flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug):
    assert cu_q is cu_k and max_q == max_k and (dropout, causal, debug) == (0, True, False)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return document_by_document(q, k, v, cu_q, max_q), *[None] * 4


def efficient(q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout, mask, log_sum_exp):
    assert bias is None and cu_q is cu_k and max_q == max_k and (dropout, mask, log_sum_exp) == (0, 1, True)
    assert len(q) == len(k) == len(v) == 1
    return document_by_document(q[0], k[0], v[0], cu_q, max_q)[None], *[None] * 5


@pytest.fixture(params=["flash", "efficient"])
def kernel(request, monkeypatch):
    """The name of a kernel whose place a formula takes."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", efficient)
    return request.param


@st.composite
def packed_problems(draw):
    """(q, k, v, gradient of the output, documents) in float64; each sequence is cut anywhere, or nowhere."""
    t, e = draw(st.integers(1, 20)), draw(st.sampled_from([2, 8, 12]))
    groups, shared = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    cuts = draw(st.lists(st.lists(st.integers(1, max(t - 1, 1)), max_size=5), min_size=1, max_size=3))
    ids = torch.stack([(torch.arange(t)[:, None] >= torch.tensor(row, dtype=torch.int64)).sum(1) for row in cuts])
    if draw(st.booleans()):  # padding is a document, too
        ids = torch.where(ids == ids[:, -1:], -1, ids)
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 1_000)))
    shapes = [(len(cuts), t, heads, e) for heads in (groups * shared, groups, groups, groups * shared)]
    q, k, v, upstream = (torch.randn(shape, generator=numbers, dtype=torch.float64) for shape in shapes)
    return q, k, v, upstream, Documents.of(ids)


def outcome(function, q, k, v, upstream) -> list[torch.Tensor]:
    x = [y.clone().requires_grad_() for y in (q, k, v)]
    out = function(*x)
    return [out.detach(), *torch.autograd.grad(out, x, upstream)]


def masked(documents, q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attention_reference(q, k, v, visible(documents.ids, documents.ids)).transpose(1, 2)


def test_documents_one_by_one_are_the_masked_formula(kernel):
    """Values and gradients, through the flattening, cu_seqlens and head groups that the kernels need."""

    @given(packed_problems())
    def check(problem):
        *inputs, documents = problem
        run = partial(by_documents.attention_by_documents, documents=documents, kernel=kernel)
        for x, exact in zip(outcome(run, *inputs), outcome(partial(masked, documents), *inputs), strict=True):
            torch.testing.assert_close(x, exact, rtol=1e-9, atol=1e-10)

    check()


def test_no_mask_is_made_where_a_kernel_reads_documents(kernel, monkeypatch):
    """And what does not fit is refused, since the kernels read memory as documents say."""
    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 8, generator=numbers, dtype=torch.float64) for _ in "qkv")
    packed, whole = (Documents.of(torch.arange(9).expand(2, 9) // n) for n in (4, 9))
    expected = [masked(documents, q, k, v) for documents in (packed, whole)]
    monkeypatch.setattr(reference, "kernel_for", lambda device, dtype, e: kernel)
    monkeypatch.setattr(reference, "visible", lambda *_: pytest.fail("a mask of all pairs of tokens was made"))
    torch.testing.assert_close(reference.attention_within_documents(q, k, v, packed), expected[0])
    for x in ("k", "v", "ids"):
        short = {"k": k, "v": v, "ids": packed.ids} | {x: {"k": k, "v": v, "ids": packed.ids}[x][:, :8]}
        with pytest.raises(ValueError, match="attention"):
            reference.attention_within_documents(q, short["k"], short["v"], packed._replace(ids=short["ids"]))
    torch.testing.assert_close(reference.attention_within_documents(q, k, v, whole), expected[1])


@pytest.mark.parametrize(
    "capability, dtype, e, expected",
    [
        ((9, 0), torch.bfloat16, 128, "flash"),
        ((8, 0), torch.float16, 64, "flash"),
        ((9, 0), torch.bfloat16, 20, None),
        ((9, 0), torch.bfloat16, 512, "efficient"),
        ((9, 0), torch.float32, 128, "efficient"),
        ((7, 5), torch.float16, 128, "efficient"),
        ((7, 5), torch.bfloat16, 128, None),
        ((9, 0), torch.float64, 128, None),
    ],
)
def test_which_kernel_takes_which_heads(monkeypatch, capability, dtype, e, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert by_documents.kernel_for(torch.device("cuda"), dtype, e) == expected
    assert by_documents.kernel_for(torch.device("cpu"), dtype, e) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")  # an AMD GPU, where nobody has tried the kernels
    assert by_documents.kernel_for(torch.device("cuda"), dtype, e) is None


@given(packed_problems())
def test_bounds_are_the_first_and_last_place_of_each_id(problem):
    documents = problem[-1]
    first, last = documents.bounds()
    assert first.dtype == last.dtype == torch.int32
    for row, begins, ends in zip(documents.ids.tolist(), first.tolist(), last.tolist(), strict=True):
        assert begins == [row.index(doc) for doc in row]
        assert ends == [len(row) - 1 - row[::-1].index(doc) for doc in row]


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "available"),
    [
        ("cuda", torch.bfloat16, 128, (8, 0), True), ("cuda", torch.float16, 64, (9, 0), True),
        ("cpu", torch.bfloat16, 128, (8, 0), False), ("cuda", torch.float32, 128, (9, 0), False),
        ("cuda", torch.float16, 128, (7, 5), False), ("cuda", torch.bfloat16, 36, (9, 0), False),
        ("cuda", torch.bfloat16, 264, (9, 0), False),
    ],
)  # fmt: skip
def test_flash_takes_what_torch_s_kernel_takes(monkeypatch, device, dtype, head_dim, capability, available):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert flash.flash_available(torch.device(device), dtype, head_dim) == available
    monkeypatch.setattr(torch.version, "hip", "7.0")  # an AMD GPU, where nobody has tried it
    assert not flash.flash_available(torch.device(device), dtype, head_dim)


def test_the_operation_takes_what_it_is_called_with():
    """By position in every torch from 2.5 on, where it has no name but torch.ops.aten's."""
    names = [argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    given = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask"]
    assert names[:10] == ["query", "key", "value", *given]
