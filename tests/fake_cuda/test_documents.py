"""Documents on a GPU: the kernels that a training step takes, and that it makes no mask of all pairs of tokens."""

import pytest

from fake_cuda.harness import run_on_fake_cuda

T = 48  # no other size of the model below


def steps(compiled: bool) -> list[list[str]]:
    """For each case the ops of attention in a training step, and all ops with a result of (..., T, T)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from fake_cuda.device import CUDA, fake_tensors
    from nanochameleon.config import ModelConfig
    from nanochameleon.packing import Batch, collate
    from nanochameleon.training.objective import Objective
    from nanochameleon.transformer import Chameleon
    from nanochameleon.vocab import Vocab

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen: set[str] = set()

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result, name = op(*args, **kwargs or {}), str(op)
            out = result[0] if isinstance(result, tuple | list) else result
            if "attention" in name or "varlen" in name or getattr(out, "shape", ())[-2:] == (T, T):
                self.seen.add(name)
            return result

    def step(precision: str, lengths: list[list[int]]) -> list[str]:
        batch = collate([[[7] * n for n in row] for row in lengths], T, vocab.pad).to("cpu")
        with fake_tensors() as mode, torch.device(CUDA):
            tensors = [mode.from_tensor(x).to(CUDA) for x in (*batch._all(), *batch.documents[:2])]
            moved = Batch(*tensors[:4], batch.documents._replace(ids=tensors[4], cu_seqlens=tensors[5]))
            model = Chameleon(cfg).train()
            for block in model.layers if compiled else ():
                block.compile(backend="aot_eager")
            with Watch() as watch:
                Objective(model, vocab, precision)(moved, None, 1e-4, 1.0).next_token.loss.backward()
        return sorted(watch.seen)

    vocab = Vocab.toy(6, 0)
    cfg = ModelConfig(vocab_size=vocab.size, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=32, max_seq_len=T)
    Chameleon.init_weights = lambda self: None  # it draws a seed, and fake tensors have no numbers
    packed = [[20, 9], [30, 18]]
    return [step("bf16", packed), step("fp32", packed)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_no_mask_of_all_pairs_of_tokens_is_made(compiled):
    flash, efficient = run_on_fake_cuda(steps, compiled=compiled)
    assert flash == ["torch_attn._varlen_attn.default", "torch_attn._varlen_attn_backward.default"]
    assert efficient == ["aten._efficient_attention_backward.default", "aten._efficient_attention_forward.default"]
