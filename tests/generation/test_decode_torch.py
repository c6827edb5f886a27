"""The fused step against the model's own forward pass; concatenating weights takes no memory and changes none."""

import pytest
import torch
from tiny import TINY_MODEL, released_model, tiny_model

from nanochameleon.generation.decode_torch import FusedStep, concat_weights_
from nanochameleon.generation.quantize import quantize_
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.transformer import Chameleon, KVCache

SHAPES = [{}, dict(n_heads=4, n_kv_heads=2, norm_order="post"), dict(n_heads=4, qk_norm_groups=2), dict(qk_norm=False)]
CPU = torch.device("cpu")


def both(model: Chameleon, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """-> from the step and from the model: hidden states (N, T, D) token by token, keys, values.

    Rows start at different positions.
    """
    tokens = torch.randint(TINY_MODEL.vocab_size, (3, 6), generator=torch.Generator().manual_seed(0))
    first, results = torch.tensor([0, 4, 9]), []

    def forward(x: torch.Tensor, at: torch.Tensor, cache: KVCache, kv_len: int) -> torch.Tensor:
        return model(x[:, None], at[:, None], cache=cache.view(slice(0, len(x)), at[:, None], kv_len))[:, 0]

    for step in (FusedStep(model, 20), forward):
        cache, hidden = KVCache.empty(model.cfg, 4, 20, CPU, dtype), []
        for t, column in enumerate(tokens.T):
            positions = first + t
            hidden.append(step(column, positions, cache, 16).clone())
        results.append((torch.stack(hidden, 1), cache.keys, cache.values))
    return results


@torch.inference_mode()
@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["whole", "int8"])
def test_the_step_is_the_forward_pass(changes, int8):
    model = released_model(1, torch.float64, **changes)
    for ours, theirs in zip(*both(quantize_(model) if int8 else model, torch.float64), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_error_is_at_most_twice_that_of_the_model(dtype):
    for changes in SHAPES:
        with use_kernels("reference"):
            (ours, *_), (theirs, *_) = both(released_model(1, dtype, **changes), dtype)
        truth = both(released_model(1, dtype, **changes).double(), torch.float64)[1][0]
        assert ours.dtype == dtype and (ours - truth).norm() < 2 * (theirs - truth).norm()


def test_concatenated_weights_share_memory_with_the_layers():
    model, whole = tiny_model(), tiny_model()
    with torch.inference_mode():  # as the engine does
        step = FusedStep(model, 8)
        again = FusedStep(model, 8)
    for block, joined in zip(step.blocks, again.blocks, strict=True):
        assert block.wqkv[0].data_ptr() == joined.wqkv[0].data_ptr()
    a = model.layers[0].attention
    assert a.wq.weight.data_ptr() == step.blocks[0].wqkv[0].data_ptr()
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), whole.parameters(), strict=True))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.logits(model(torch.arange(5)[None])).logsumexp(-1).sum().backward()
    optimizer.step()
    assert not torch.equal(a.wk.weight, whole.layers[0].attention.wk.weight)
    n = len(a.wq.weight)
    assert torch.equal(step.blocks[0].wqkv[0][n : n + len(a.wk.weight)], a.wk.weight)


def test_adjacent_weights_in_another_order_are_concatenated_again():
    layers = [torch.nn.Linear(4, 3, bias=False) for _ in range(2)]
    weights = [layer.weight.clone() for layer in layers]
    layers[1].weight.data, layers[0].weight.data = torch.cat([weights[1], weights[0]]).data.split(3)
    joined, scale = concat_weights_(layers)
    assert torch.equal(joined, torch.cat(weights)) and scale is None
