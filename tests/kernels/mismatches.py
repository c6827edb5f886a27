"""Every op with inputs that do not fit one another, on fenced memory: it gives what its reference gives, or it raises.

test_inputs.py runs this file in a process of its own, which an op that reads beyond a tensor ends. Inputs start out
right, and changes make some of them wrong, or only unusual.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fences import fenced
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good_as
from torch import Tensor

from nanochameleon.kernels import (
    add_norm,
    attention,
    linear,
    norm_add,
    qknorm_rope_attention,
    rms_norm,
    swiglu,
)
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import attention_reference, qknorm_rope_attention_reference, visible
from nanochameleon.kernels.block.dropout import dropout, keep_mask
from nanochameleon.kernels.block.linear import linear_reference
from nanochameleon.kernels.block.rms_norm import add_norm_reference, norm_add_reference, rms_norm_reference
from nanochameleon.kernels.block.swiglu import swiglu_reference
from nanochameleon.kernels.zloss.cross_entropy import zloss_cross_entropy_reference
from nanochameleon.losses import fused_next_token_loss, next_token_loss
from nanochameleon.transformer import compute_freqs_cis
from nanochameleon.vocab import Vocab

EPS, Z_LOSS, VOCAB = 1e-5, 1e-2, Vocab()
TYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool


class Op(NamedTuple):
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: dict[str, Tensor]  # that fit


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# ---------------------------------------------------------------------------------------------------------------------
# The ops


def normed(function, q, k, v, freqs_cis, docs, q_weight, q_bias, k_weight, k_bias):
    return function(q, k, v, freqs_cis, Documents(docs, None, 9), (q_weight, q_bias), (k_weight, k_bias), EPS)


def plainly_attended(function, q, k, v, freqs_cis):
    return function(q, k, v, freqs_cis, None, None, None, EPS)


def causal(q, k, v):
    return attention_reference(q, k, v, torch.ones(q.shape[0], q.shape[2], k.shape[2], dtype=torch.bool).tril())


def zloss(logits, targets):
    return next_token_loss(logits, targets, VOCAB, Z_LOSS, 2.0).loss


def in_place(logits, targets):
    return next_token_loss(logits.view_as(logits), targets, VOCAB, Z_LOSS, 2.0, overwrite_logits=True).loss


def zloss_reference(logits, targets):
    cross_entropy, log_z = zloss_cross_entropy_reference(logits, targets)
    return (cross_entropy.sum() + Z_LOSS * log_z.square().sum()) / 2


def with_output_layer(hidden, weight, targets):
    return fused_next_token_loss(hidden, weight, targets, VOCAB, Z_LOSS, 2.0).loss


def dropout_reference(x, keys):
    return x * keep_mask(x.shape, keys, 0.5) * 2


HEADS = {"q": numbers(2, 9, 4, 8), "k": numbers(2, 9, 2, 8), "v": numbers(2, 9, 2, 8)}
TABLE = {"freqs_cis": compute_freqs_cis(torch.arange(9).expand(2, 9), 8, 100.0)}
DOCS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [3, 3, 3, 3, 3, 3, 3, 3, 3]])
NORMS = {"q_weight": numbers(2, 8), "q_bias": numbers(2, 8), "k_weight": numbers(1, 8), "k_bias": numbers(1, 8)}
KEYS = {"q": numbers(2, 4, 5, 8), "k": numbers(2, 2, 7, 8), "v": numbers(2, 2, 7, 8)}
SEEN = {"mask": visible(torch.zeros(2, 5), torch.zeros(2, 7))}
ROWS, TARGETS = {"x": numbers(4, 33), "branch": numbers(4, 33)}, {"targets": torch.tensor([-1, 0, 36, 5])}
WEIGHT, WEIGHTS = {"weight": numbers(33)}, {"w1": numbers(6, 16), "w2": numbers(7, 16)}

OPS = {
    "swiglu": Op(swiglu, swiglu_reference, {"a": numbers(4, 33), "b": numbers(4, 33)}),
    "rms_norm": Op(partial(rms_norm, eps=EPS), partial(rms_norm_reference, eps=EPS), {"x": ROWS["x"]} | WEIGHT),
    "add_norm": Op(partial(add_norm, eps=EPS), partial(add_norm_reference, eps=EPS), ROWS | WEIGHT),
    "norm_add": Op(partial(norm_add, eps=EPS), partial(norm_add_reference, eps=EPS), ROWS | WEIGHT),
    "qknorm_rope_attention": Op(
        partial(normed, qknorm_rope_attention), partial(normed, qknorm_rope_attention_reference),
        HEADS | TABLE | {"docs": DOCS} | NORMS,
    ),
    "qknorm_rope_attention without norms": Op(
        partial(plainly_attended, qknorm_rope_attention), partial(plainly_attended, qknorm_rope_attention_reference),
        HEADS | TABLE,
    ),
    "attention": Op(attention, attention_reference, KEYS | SEEN),
    "causal attention": Op(attention, causal, KEYS | {"q": numbers(2, 4, 7, 8)}),
    "zloss": Op(zloss, zloss_reference, {"logits": numbers(4, 37)} | TARGETS),
    "zloss in place": Op(in_place, zloss_reference, {"logits": numbers(4, 37)} | TARGETS),
    "linear_zloss": Op(
        with_output_layer, lambda hidden, weight, targets: zloss_reference(F.linear(hidden, weight), targets),
        {"hidden": numbers(4, 16), "weight": numbers(37, 16)} | TARGETS,
    ),
    "linear": Op(
        lambda x, *weights: linear(x, weights), lambda x, *weights: linear_reference(x, weights),
        {"x": numbers(2, 3, 16)} | WEIGHTS,
    ),
    "dropout": Op(partial(dropout, p=0.5), dropout_reference, {"x": numbers(3, 10), "keys": torch.arange(3) * 2**40}),
}  # fmt: skip


BY_TORCH_S_RULES = "swiglu", "rms_norm", "add_norm", "norm_add", "linear"  # they take what their references take


# ---------------------------------------------------------------------------------------------------------------------
# Changes of one input


def as_type(dtype: torch.dtype, x: Tensor) -> Tensor:
    return (x.abs() if dtype == torch.uint8 else x).to(dtype)


def sized(dim: int, n: int, x: Tensor) -> Tensor:
    """x with n entries in this dimension, the same ones over again."""
    dim, size = dim % max(x.dim(), 1), x.shape[dim % x.dim()] if x.dim() else 0
    return x.index_select(dim, torch.arange(n) % size) if size else x


def longer(dim: int, by: int, x: Tensor) -> Tensor:
    return sized(dim, max(x.shape[dim % x.dim()] + by, 0), x) if x.dim() else x


def expanded(dim: int, x: Tensor) -> Tensor:
    return x.narrow(dim % x.dim(), 0, 1).expand(x.shape) if x.dim() and x.numel() else x


def flat(x: Tensor) -> Tensor:
    return x.flatten()


def first(x: Tensor) -> Tensor:
    return x[0] if x.dim() and len(x) else x


def one_more(x: Tensor) -> Tensor:
    return x[None]


def strided(x: Tensor) -> Tensor:
    return torch.stack((x, x), -1)[..., 0]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x


def negated(x: Tensor) -> Tensor:
    return x if x.dtype == torch.bool else torch._neg_view(-x.clone())


dims = st.integers(0, 4)
changes = st.one_of(
    st.builds(partial, st.just(as_type), st.sampled_from(TYPES)),
    st.builds(partial, st.just(sized), dims, st.sampled_from([0, 1, 2, 3, 16])),
    st.builds(partial, st.just(longer), dims, st.sampled_from([-1, 1])),
    st.builds(partial, st.just(expanded), dims),
    st.sampled_from([flat, first, one_more, strided, transposed, negated]),
)


# ---------------------------------------------------------------------------------------------------------------------
# What comes of them


def outcome(function: Callable, inputs: dict[str, Tensor], negative: bool) -> list[Tensor] | Exception:
    """Results and gradients, or what was raised. negative: the gradients of the results have the negative bit."""
    x = {name: fenced(y.detach()) for name, y in inputs.items()}
    wanted = [y.requires_grad_() for name, y in x.items() if y.is_floating_point() and name not in TABLE]
    try:
        made = function(*x.values())
        made = [made] if isinstance(made, Tensor) else list(made)
        upstream = [numbers(*y.shape).to(y.dtype) for y in made]
        upstream = [torch._neg_view(-g) if negative else g for g in upstream]
        gradients = torch.autograd.grad(made, wanted, upstream, allow_unused=True, materialize_grads=True)
        return [y.detach() for y in (*made, *gradients)]
    except Exception as error:
        return error


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.resolve_neg().to(dtype) if x.is_floating_point() else x


def check(name: str, changed: dict[str, Callable], dtype=torch.float32, negative: bool = False) -> None:
    """The op raises ValueError, unless it goes by torch's rules, or raises where its reference does; or its results are
    as good as those of the reference."""
    op = OPS[name]
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in op.inputs.items()}
    inputs |= {key: change(inputs[key]) for key, change in changed.items()}
    print(name, {key: (x.shape, x.stride(), x.dtype) for key, x in inputs.items()}, negative, file=sys.stderr)
    ours, plain = (outcome(function, inputs, negative) for function in (op.run, op.reference))
    if isinstance(ours, Exception):
        as_torch = isinstance(plain, Exception) and isinstance(ours, (IndexError, type(plain)))
        assert as_torch or (isinstance(ours, ValueError) and name not in BY_TORCH_S_RULES), f"{name}: {ours!r}"
        return
    exact = outcome(op.reference, {key: widened(x, torch.float64) for key, x in inputs.items()}, negative)
    assert not isinstance(exact, Exception), f"{name}: the reference raises {exact!r}"
    if isinstance(plain, Exception):  # of types that it does not bring together
        plain = outcome(op.reference, {key: widened(x, ours[0].dtype) for key, x in inputs.items()}, negative)
    else:
        assert [x.dtype for x in ours] == [x.dtype for x in plain]
    for result, naive, truth in zip(ours, plain, exact, strict=True):
        largest = truth.abs().max().item() if truth.numel() else 0.0
        assert_as_good_as(result, naive.to(result.dtype), truth, 32 * (1 + largest))


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=25)
@given(st.data())
def test_inputs_that_do_not_fit(name, data):
    names = st.sampled_from(list(OPS[name].inputs))
    changed = data.draw(st.dictionaries(names, changes, max_size=3))
    check(name, changed, data.draw(st.sampled_from([torch.float32, torch.bfloat16])), data.draw(st.booleans()))


@pytest.mark.parametrize("name", OPS)
def test_gradients_with_the_negative_bit(name):
    check(name, {}, negative=True)


def of_type(dtype: torch.dtype) -> Callable:
    return partial(as_type, dtype)


def of_size(dim: int, n: int) -> Callable:
    return partial(sized, dim, n)


def ignored(x: Tensor) -> Tensor:
    return torch.full_like(x, -100)


def number(x: Tensor) -> Tensor:
    return x.flatten()[0]


EXAMPLES = {
    "another type in the gate": ("swiglu", {"b": of_type(torch.bfloat16)}),
    "another type before the gate": ("swiglu", {"a": of_type(torch.bfloat16)}),
    "a wider type": ("swiglu", {"b": of_type(torch.float64)}),
    "whole numbers": ("swiglu", {"b": of_type(torch.int64)}),
    "numbers without dimensions": ("swiglu", {"a": number, "b": number}),
    "a branch that is broadcast, added": ("add_norm", {"branch": of_size(0, 1)}),
    "a branch that is broadcast, normed": ("norm_add", {"branch": of_size(0, 1)}),
    "a wider branch, added": ("add_norm", {"branch": of_type(torch.float64)}),
    "a wider branch, normed": ("norm_add", {"branch": of_type(torch.float64)}),
    "too few targets": ("linear_zloss", {"targets": of_size(0, 2)}),
    "one target": ("zloss", {"targets": of_size(0, 1)}),
    "short keys and values": ("qknorm_rope_attention", {"k": of_size(1, 3), "v": of_size(1, 3)}),
    "short values": ("attention", {"v": of_size(2, 3)}),
    "keys and values of one row": ("qknorm_rope_attention", {"k": of_size(0, 1), "v": of_size(0, 1)}),
    "key heads that do not divide": ("qknorm_rope_attention", {"k": of_size(2, 3), "v": of_size(2, 3)}),
    "keys of another head size": ("qknorm_rope_attention", {"k": of_size(3, 4)}),
    "norms of another size": ("qknorm_rope_attention", {"q_weight": of_size(1, 4), "q_bias": of_size(1, 4)}),
    "norms of three groups": ("qknorm_rope_attention", {"q_weight": of_size(0, 3), "q_bias": of_size(0, 3)}),
    "documents of three positions": ("qknorm_rope_attention", {"docs": of_size(1, 3)}),
    "a norm of half a row": ("rms_norm", {"weight": of_size(0, 16)}),
    "a norm of nothing": ("rms_norm", {"x": of_size(1, 0), "weight": of_size(0, 0)}),
    "heads of nothing": ("qknorm_rope_attention without norms", {key: of_size(3, 0) for key in HEADS | TABLE}),
    "short targets": ("zloss", {"targets": of_type(torch.uint8)}),
    "no vocabulary": ("zloss", {"logits": of_size(1, 0), "targets": ignored}),
    "a negated gate": ("swiglu", {"a": negated}),
    "negated logits": ("zloss", {"logits": negated}),
    "negated logits, in place": ("zloss in place", {"logits": negated}),
    "wide logits, in place": ("zloss in place", {"logits": of_type(torch.float64)}),
    "a negated row": ("rms_norm", {"x": negated}),
    "negated values": ("qknorm_rope_attention", {"v": negated}),
    "negated rotations": ("qknorm_rope_attention", {"freqs_cis": negated}),
    "a matrix of one column": ("linear", {"w1": of_size(1, 1)}),
    "a matrix of another type": ("linear", {"w1": of_type(torch.float64)}),
}


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_example(example, dtype):
    name, changed = EXAMPLES[example]
    check(name, changed, dtype)
