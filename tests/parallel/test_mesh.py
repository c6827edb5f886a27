"""The mesh: collectives, refused sizes, and the loss of logits whose vocabulary is split over ranks."""

import os
from dataclasses import replace

import pytest
import torch
from ranks import run_on

from nanochameleon.config import ModelConfig, ParallelConfig
from nanochameleon.errors import Interrupted, UserError
from nanochameleon.losses import next_token_loss
from nanochameleon.packing import IGNORE
from nanochameleon.parallel.apply import check_tensor_parallel
from nanochameleon.parallel.mesh import init_mesh
from nanochameleon.parallel.vocab_parallel import vocab_parallel_cross_entropy
from nanochameleon.vocab import Vocab

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------------------------------
# Collectives


def check_collectives(world_size: int) -> None:
    with init_mesh(ParallelConfig(), 4, CPU) as mesh:
        assert mesh.all_reduce_sum(mesh.rank, 1.0) == [sum(range(world_size)), world_size]
        assert mesh.all_reduce_max(mesh.rank, -mesh.rank) == [world_size - 1, 0]
        assert mesh.broadcast(f"from {mesh.rank}") == "from 0"
        assert mesh.run_on_rank0(lambda: os.environ["RANK"]) == "0"
        for error in (UserError("no such file"), Interrupted(), KeyboardInterrupt()):
            with pytest.raises(type(error), match=str(error) or None):
                mesh.run_on_rank0(lambda error=error: raise_(error))
        assert mesh.batch_slice(8 * world_size) == slice(8 * mesh.rank, 8 * (mesh.rank + 1))


def raise_(error: BaseException):
    raise error


def test_collectives_give_every_rank_the_same_result():
    run_on(2, check_collectives, 2)


def test_one_process_is_a_mesh_of_one():
    with init_mesh(ParallelConfig(), 3, CPU) as mesh:
        assert mesh.is_rank0 and mesh.broadcast("x") == "x"
        assert mesh.all_reduce_sum(2.0) == [2.0] and mesh.all_reduce_max(1.0, 3.0) == [1.0, 3.0]
        assert mesh.batch_slice(5) == slice(0, 5) and mesh.tp_group is None


@pytest.mark.parametrize(
    ("parallel", "batch", "why"),
    [
        (ParallelConfig(tensor_parallel=2), 4, r"parallel\.tensor_parallel is 2, which must divide the 3 processes"),
        (ParallelConfig(), 4, r"train\.batch_size is 4, which 3 ranks cannot share evenly"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(parallel, batch, why, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=why), init_mesh(parallel, batch, CPU):
        pass


def test_layers_that_cannot_be_split_are_refused():
    model = ModelConfig(dim=64, n_heads=8, n_kv_heads=4, qk_norm_groups=4, multiple_of=8)
    for tp_size in (1, 2, 4):
        check_tensor_parallel(model, tp_size)
    with pytest.raises(UserError, match="n_kv_heads, 4"):
        check_tensor_parallel(model, 3)
    with pytest.raises(UserError, match="one must divide the other"):
        check_tensor_parallel(replace(model, dim=96, n_heads=12, n_kv_heads=12, multiple_of=24), 6)


# ---------------------------------------------------------------------------------------------------------------------
# The loss over a vocabulary that is spread


def spread_loss(vocab: Vocab, logits: torch.Tensor, targets: torch.Tensor) -> tuple:
    with init_mesh(ParallelConfig(tensor_parallel=2), 1, CPU) as mesh:
        width = -(-vocab.size // 2)
        mine = logits[:, mesh.rank * width : (mesh.rank + 1) * width].clone().requires_grad_()
        given_up = mine * 1
        sums = vocab_parallel_cross_entropy(given_up, targets, vocab, 1e-2, 3.0, mesh.tp_group)
        (2 * sums.loss).backward()
        return [x.item() for x in sums], mine.grad


@pytest.mark.parametrize("n_merges", [2, 3])  # with one of them the ranks have different shares
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_the_loss_over_spread_columns_is_that_of_all_columns(n_merges, ignored):
    vocab, generator = Vocab.toy(8, n_merges), torch.Generator().manual_seed(n_merges)
    logits = 5 * torch.randn(20, vocab.size, generator=generator)
    targets = torch.randint(vocab.size, (20,), generator=generator)
    targets[torch.rand(20, generator=generator) < ignored] = IGNORE
    whole = logits.clone().requires_grad_()
    expected = next_token_loss(whole, targets, vocab, 1e-2, 3.0)
    (2 * expected.loss).backward()
    results = run_on(2, spread_loss, vocab, logits, targets)
    for numbers, _ in results:
        assert numbers == pytest.approx([x.item() for x in expected], rel=1e-5, abs=1e-5)
    torch.testing.assert_close(torch.cat([grad for _, grad in results], 1), whole.grad, rtol=1e-5, atol=1e-6)
