"""Documents on a GPU: a training step makes no mask of all pairs of tokens, whatever its precision."""

import pytest

from fake_cuda.harness import run_on_fake_cuda

FLASH, EFFICIENT, CAUSAL = "_varlen_attn", "_efficient_attention_forward", "scaled_dot_product"


def step(precision: str, packed: bool, compiled: bool) -> list[str]:
    """The ops of attention in a training step of two layers, each once, and every op with a result of (B, T, T)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from fake_cuda.device import CUDA, fake_tensors
    from nanochameleon.config import ModelConfig
    from nanochameleon.packing import collate
    from nanochameleon.training.objective import Objective
    from nanochameleon.transformer import Chameleon
    from nanochameleon.vocab import Vocab

    seen: list[str] = []
    Chameleon.init_weights = lambda self: None  # it draws a seed, which is a number

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result, name = function(*args, **kwargs or {}), str(function)
            out = result[0] if isinstance(result, tuple | list) else result
            squared = isinstance(out, torch.Tensor) and out.shape[-2:] == (48, 48)
            seen.extend([name] * (squared or "attention" in name or "varlen" in name))
            return result

    vocab = Vocab.toy(6, 0)
    batch = collate(
        [[[7] * n for n in row] for row in ([[20, 9], [30, 18]] if packed else [[48], [48]])], 48, vocab.pad
    )
    documents = batch.to("cpu").documents
    cfg = ModelConfig(
        vocab_size=vocab.size, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=32, max_seq_len=48
    )
    with fake_tensors() as mode:
        move = lambda x: mode.from_tensor(x).to(CUDA)  # noqa: E731
        ids, cu_seqlens = map(move, documents[:2])
        moved = type(batch)(*(move(x) for x in batch._all()), documents._replace(ids=ids, cu_seqlens=cu_seqlens))
        with torch.device(CUDA):
            model = Chameleon(cfg).train()
        for block in model.layers if compiled else ():
            block.compile(backend="aot_eager")
        with Watch():
            Objective(model, vocab, precision)(moved, None, 1e-4, 1.0).next_token.loss.backward()
    return sorted(set(seen))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_no_mask_of_all_pairs_of_tokens_is_made(compiled):
    for precision, packed in [("bf16", True), ("fp32", True), ("bf16", False), ("fp32", False)]:
        print(precision, packed, run_on_fake_cuda(step, precision=precision, packed=packed, compiled=compiled))
