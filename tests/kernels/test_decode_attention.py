"""A decode step's attention: the reference against the formula, the CUDA kernels against both.

Run on a CPU through the very calls that launch the kernels on a GPU: see emulator.py.
"""

import pytest
import torch
import torch.nn.functional as F
from attention_problems import EPS, generator, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from rotation import rotated
from tolerance import assert_as_good_as

from nanochameleon.config import ModelConfig
from nanochameleon.generation.decode_torch import FusedStep
from nanochameleon.kernels.attention.decode import decode_attention_, decode_attention_reference_, see_cache
from nanochameleon.kernels.attention.reference import attention_reference
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.transformer import Chameleon, KVCache, compute_freqs_cis

pytestmark = pytest.mark.usefixtures("emulated_gpu")
NARROW = torch.bfloat16


@st.composite
def steps(draw, lengths=(1, 2, 3)):
    """New tokens' qkv, freqs_cis, norm, a filled cache, positions: float64 whose values bfloat16 holds."""
    n, t, groups, each = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from(lengths)),
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

    qkv, keys, values = (
        random(n, t, groups * (each + 2), e),
        random(n, groups, places, e),
        random(n, groups, places, e),
    )
    norm = (random(groups * (each + 1), e), random(groups * (each + 1), e)) if draw(st.booleans()) else None
    positions = torch.randint(0, places - t + 1, (n, 1), generator=numbers) + torch.arange(t)
    kv_len = draw(st.integers(int(positions.max()) + 1, places))
    return qkv, compute_freqs_cis(positions, e, 1e4)[:, 0], norm, keys, values, positions, kv_len


def decoded(function, step, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """-> out, keys, values"""
    qkv, freqs_cis, norm, keys, values, positions, kv_len = step
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm = norm and tuple(x.to(wide) for x in norm)
    qkv, keys, values = (x.to(dtype, copy=True) for x in (qkv, keys, values))
    seen = see_cache(positions, keys, kv_len)
    return function(qkv, freqs_cis, norm, EPS, keys, values, positions, seen), keys, values


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
    qkv, freqs_cis, norm, keys, values, positions, _ = step
    out, new_keys, new_values = decoded(decode_attention_reference_, step, torch.float64)
    n, t, groups = *qkv.shape[:2], keys.shape[1]
    qk, v = qkv[:, :, :-groups], qkv[:, :, -groups:]
    if norm is not None:
        qk = F.layer_norm(qk, qk.shape[-1:], eps=EPS) * norm[0] + norm[1]
    x = torch.cat([rotated(qk, freqs_cis[:, :, None]), v], 2)
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


def test_a_token_beyond_what_is_read_harms_no_other():
    """As in a slot that waits, whose prompt is longer than what the others have."""
    numbers = generator(0)
    qkv, keys, values = (torch.randn(shape, generator=numbers) for shape in ((2, 1, 4, 64), *[(2, 1, 600, 64)] * 2))
    positions = torch.tensor([[5], [580]])
    step = qkv, compute_freqs_cis(positions, 64, 1e4)[:, 0], None, keys, values, positions, 64
    alone = tuple(x if x is None or isinstance(x, int) else x[:1] for x in step)
    for kernels in ("cuda", "reference"):
        with use_kernels(kernels):
            both, one = (decoded(decode_attention_, each, NARROW) for each in (step, alone))
        torch.testing.assert_close([x[:1] for x in both], list(one))


def test_a_token_sees_the_entries_up_to_its_own():
    keys, positions = torch.zeros(2, 3, 9, 8), torch.tensor([[1, 2], [4, 5]])
    assert torch.equal(see_cache(positions, keys, 7) == 0, torch.arange(7) <= positions[..., None])


# ---------------------------------------------------------------------------------------------------------------------
# In a model


@torch.inference_mode()
@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_model_s_step_by_the_kernels(qk_norm):
    """FusedStep token by token, with grouped keys: at most twice the error of torch's operations."""
    cfg = ModelConfig(
        vocab_size=30, dim=128, n_layers=2, n_heads=2, n_kv_heads=1, multiple_of=64, max_seq_len=16, qk_norm=qk_norm
    )
    torch.manual_seed(0)
    model, tokens = Chameleon(cfg).to(NARROW), torch.randint(30, (2, 4))

    def hidden(name: str, dtype: torch.dtype) -> torch.Tensor:
        step, cache = FusedStep(model.to(dtype), 16), KVCache.empty(cfg, 2, 16, torch.device("cpu"), dtype)
        with use_kernels(name):
            places = [torch.tensor([t, t + 5]) for t in range(4)]
            found = [step(tokens[:, t], at, cache, 9) for t, at in enumerate(places)]
        return torch.stack(found).double()

    ours, theirs = hidden("cuda", NARROW), hidden("reference", NARROW)
    truth = hidden("reference", torch.float64)
    assert (ours - truth).norm() < 2 * (theirs - truth).norm() and not torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("wrong", "shape"),
    [("keys", (2, 2, 7, 32)), ("keys", (1, 2, 7, 64)), ("values", (2, 1, 7, 64)), ("values", (2, 2, 6, 64)),
     ("positions", (1, 3)), ("positions", (2, 2)), ("freqs_cis", (2, 2, 32, 2)), ("weight", (4, 64)),
     ("bias", (2, 3, 8))],
)  # fmt: skip
def test_inputs_that_do_not_fit_raise(monkeypatch, wrong, shape):
    monkeypatch.setattr(gpu, "start", None)
    cache = (2, 2, 7, 64)
    shapes = {"keys": cache, "values": cache, "positions": (2, 3), "freqs_cis": (2, 3, 32, 2), "weight": (6, 64),
              "bias": (2, 3, 7)} | {wrong: shape}  # fmt: skip
    keys, values, weight, bias = (torch.zeros(shapes[key]).to(NARROW) for key in ("keys", "values", "weight", "bias"))
    freqs_cis, positions = torch.zeros(shapes["freqs_cis"]), torch.zeros(shapes["positions"]).long()
    qkv = torch.zeros(2, 3, 8, 64).to(NARROW)
    with use_kernels("cuda"), pytest.raises(ValueError, match=r"decode_attention"):
        decode_attention_(qkv, freqs_cis, (weight, weight), EPS, keys, values, positions, bias)
