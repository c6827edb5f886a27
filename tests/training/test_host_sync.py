"""A training step never waits for its device between the first micro-batch and the gradient norm.

On the meta device tensors have no values, so whatever reads one raises.
"""

import pytest
import torch
from test_transformer import TINY
from torch.utils._python_dispatch import TorchDispatchMode

import train
from nanochameleon.config import ModelConfig
from nanochameleon.kernels.zloss.cross_entropy import zloss_cross_entropy
from nanochameleon.losses import next_token_loss
from nanochameleon.packing import pack
from nanochameleon.parallel.apply import ParallelModel
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.training.objective import Objective
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

META, VOCAB = torch.device("meta"), Vocab.toy(6, 0)
DOCS = [[VOCAB.boi, 4, 5, 6, 9, VOCAB.eoi, 20, 2], [7, 8, 9], [30, 31, 32, 33]]


class Ops(TorchDispatchMode):
    """Collects the names of all ops."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def meta_model(fused_output: str, dropout: float = 0.1) -> ParallelModel:
    sizes = {name: getattr(TINY, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of")}
    with META:
        model = Chameleon(ModelConfig(vocab_size=VOCAB.size, dropout=dropout, **sizes)).train()
    objective = Objective(model, VOCAB, "fp32", fused_output=fused_output)
    return ParallelModel(objective, objective, Mesh(META))


@pytest.mark.parametrize("fused_output", ["on", "off"])
def test_forward_and_backward_read_nothing_from_the_device(fused_output):
    model, batch = meta_model(fused_output), pack(DOCS, 9, VOCAB.pad)
    ops = Ops()
    with ops:
        sums, n_supervised = train.forward_backward(
            model, batch, torch.zeros(len(batch.tokens), dtype=torch.int64, device=META), 1e-5, 1
        )
    assert n_supervised == sum(len(doc) - 1 for doc in DOCS)  # counted on the CPU
    assert all(x.is_meta for x in sums.next_token) and all(p.grad.is_meta for p in model.model.parameters())
    assert not ops.names & {"aten::lift_fresh"}  # torch.tensor(number, device=...), a copy that a GPU waits for


def test_the_loss_by_modality_reads_nothing_from_the_device():
    logits, targets = torch.zeros(3, VOCAB.size, device=META), torch.zeros(3, dtype=torch.int64, device=META)
    assert next_token_loss(logits, targets, VOCAB).image_cross_entropy.is_meta
    assert zloss_cross_entropy(logits, targets)[0].is_meta
