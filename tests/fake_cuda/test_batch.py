"""A batch reaches a GPU from pinned memory: no copy waits for what the GPU still has to do."""

from fake_cuda.harness import run_on_fake_cuda


def moved() -> dict:
    import torch

    from fake_cuda.device import CUDA, fake_tensors
    from nanochameleon.kernels.attention.documents import Documents
    from nanochameleon.packing import Batch

    pinned = []
    torch.cuda.is_available = lambda: True
    torch.Tensor.pin_memory = lambda x: (pinned.append(x), x)[1]
    with fake_tensors():
        documents = Documents(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(4, dtype=torch.int32), 4)
        batch = Batch(*(torch.zeros(2, 8, dtype=torch.int64) for _ in range(4)), documents).to(CUDA)
        again = batch.to(CUDA)  # is there already
        tensors = [x for some in (batch, again) for x in (*some._all(), *some.documents[:2])]
    return {"pinned": len(pinned), "devices": sorted({str(x.device) for x in tensors})}


def test_a_batch_is_copied_from_pinned_memory():
    assert run_on_fake_cuda(moved) == {"pinned": 6, "devices": ["cuda:0"]}
