"""Documents on a GPU: the kernels that a training step takes, and that it makes no mask of all pairs of tokens."""

from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pytest

from fake_cuda.harness import run_on_fake_cuda

T = 48  # no other size of the model below
PACKED = [[20, 9], [30, 18]]
WHOLE = [[48], [48]]
OTHERS = [[[7] * 6, [48]], WHOLE, [[3] * 16, [1] * 40], PACKED, [[12, 12, 12], [47]], WHOLE]
LARGER = [[[20, 9], [30, 18], [48]], [[7] * 6, [48], [2] * 9], [*WHOLE, [48]], [[1] * 40, [48], [47]], [*WHOLE, [48]]]


def refuse(*_):
    raise AssertionError("a mask of all pairs of tokens was made")


def steps(precision: str, layouts: list, compiled: bool) -> tuple[list[str], int]:
    """Ops of attention and ops with a result of (..., T, T) in training steps, one for each layout of documents; and
    how many graphs were compiled."""
    import torch
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch.utils._python_dispatch import TorchDispatchMode

    from fake_cuda.device import CUDA, fake_tensors
    from nanochameleon.config import ModelConfig
    from nanochameleon.kernels.attention import reference
    from nanochameleon.packing import Batch, collate
    from nanochameleon.parallel.compile import compile_blocks
    from nanochameleon.training.objective import Objective
    from nanochameleon.transformer import Chameleon
    from nanochameleon.vocab import Vocab

    def note(op, result) -> None:
        name, out = str(op), result[0] if isinstance(result, tuple | list) else result
        if "attention" in name or getattr(out, "shape", ())[-2:] == (T, T):
            seen.add(name)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **kwargs or {})
            note(op, result)
            return result

    def read(graph, inputs):
        for node in graph.graph.nodes:
            note(node.target, node.meta.get("val"))
        return make_boxed_func(graph.forward)

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_autograd(fw_compiler=read)(graph, inputs)

    seen, graphs, vocab = set(), [], Vocab.toy(6, 0)
    cfg = ModelConfig(vocab_size=vocab.size, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=32, max_seq_len=T)
    Chameleon.init_weights = lambda self: None  # it draws a seed, and fake tensors have no numbers
    reference.visible = refuse
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # torch would run the block as it is
    batches = [collate([[[7] * n for n in row] for row in rows], T, vocab.pad).to("cpu") for rows in layouts]
    with fake_tensors() as mode:
        with torch.device(CUDA):
            model = Chameleon(cfg).train()
        with patch("torch.compile", partial(torch.compile, backend=backend)):
            compile_blocks(model.layers, "on" if compiled else "off", CUDA)
        for batch in batches:
            tensors = [mode.from_tensor(x).to(CUDA) for x in (*batch._all(), *batch.documents[:2])]
            moved = Batch(*tensors[:4], batch.documents._replace(ids=tensors[4], cu_seqlens=tensors[5]))
            with nullcontext() if compiled else Watch():  # nothing is compiled below such a mode
                Objective(model, vocab, precision)(moved, None, 1e-4, 1.0).next_token.loss.backward()
    return sorted(seen), len(graphs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "precision, kernel", [("bf16", "aten._flash_attention"), ("fp32", "aten._efficient_attention")]
)
def test_no_mask_of_all_pairs_of_tokens_is_made(precision, kernel, compiled):
    seen, graphs = run_on_fake_cuda(steps, precision=precision, layouts=[PACKED], compiled=compiled)
    assert set(seen) == {f"{kernel}_forward.default", f"{kernel}_backward.default"}
    assert graphs == (2 if compiled else 0)  # the first block, and all others


@pytest.mark.parametrize("layouts, most", [([PACKED, *OTHERS], 6), ([PACKED, *OTHERS, *LARGER], 12)])
def test_documents_that_change_compile_few_graphs(layouts, most):
    """One for these documents, one for any, one for a document a sequence; each for the first block and the others, and
    once more for micro-batches of another size. None runs as it is.

    Causal attention without documents makes no mask either: `refuse`.
    """
    assert run_on_fake_cuda(steps, precision="bf16", layouts=layouts, compiled=True)[1] <= most
