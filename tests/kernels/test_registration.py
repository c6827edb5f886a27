"""The compiled ops as torch sees them: registered, one graph under torch.compile, safe in other processes."""

import subprocess
import sys

import pytest
import torch

from nanochameleon.kernels import qknorm_rope_attention, use_kernels
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.losses import next_token_loss
from nanochameleon.transformer import compute_freqs_cis
from nanochameleon.vocab import Vocab

B, T, H, G, E, V = 2, 19, 4, 2, 6, 37


def attention_inputs(dtype=torch.float32):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, E, dtype=dtype, requires_grad=True) for heads in (H, G, G))
    norms = [torch.randn(n, E, requires_grad=True) for n in (H, H, G, G)]
    return q, k, v, compute_freqs_cis(torch.arange(T).expand(B, T), E, 1e4), torch.randint(0, 2, (B, T)), norms


def op_inputs():
    q, k, v, table, docs, norms = attention_inputs()
    return {
        "qknorm_rope_attention": (q, k, v, table[:, 0].flatten(-2), docs, *norms, 1e-5, False),
    }


@pytest.mark.parametrize("name", list(op_inputs()))
def test_opcheck(name):
    """Schema, autograd registration, fake tensors and a traced backward pass."""
    torch.library.opcheck(getattr(torch.ops.nanochameleon, name).default, op_inputs()[name])


def cases():
    q, k, v, table, docs, norms = attention_inputs()
    targets = torch.arange(T) - 1

    def attend(q, k, v, *norms):
        out = qknorm_rope_attention(q, k, v, table, Documents(docs, None, T), norms[:2], norms[2:], 1e-5)
        return (out * torch.arange(E)).sum()

    def score(logits):
        return next_token_loss(logits * 2, targets, Vocab.toy(4, 0), 0.1, 3.0, overwrite_logits=True).loss

    return [(attend, (q, k, v, *norms)), (score, (torch.randn(T, V, requires_grad=True),))]


@pytest.mark.parametrize("case", range(2), ids=["attention", "zloss"])
def test_one_graph_under_torch_compile(case):
    function, inputs = cases()[case]
    with use_kernels("numba"):
        value = function(*inputs)
        expected = torch.autograd.grad(value, inputs)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
        result = torch.autograd.grad(compiled, inputs)
    torch.testing.assert_close(compiled, value)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("case", range(2), ids=["attention", "zloss"])
def test_any_number_of_threads_gives_the_same_bits(case):
    """No two tasks of these write one number."""
    function, inputs = cases()[case]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.autograd.grad(function(*inputs), inputs))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


FORKED = """
import os, torch
from nanochameleon.kernels import zloss_cross_entropy
torch.set_num_threads(2)
logits, targets = torch.randn(64, 50), torch.arange(50).repeat(2)[:64]
expected = zloss_cross_entropy(logits, targets)[0].tolist()
class Rows(torch.utils.data.Dataset):
    def __len__(self): return 3
    def __getitem__(self, i): return zloss_cross_entropy(logits, targets)[0]
rows = list(torch.utils.data.DataLoader(Rows(), batch_size=1, num_workers=1, multiprocessing_context="fork"))
assert [row[0].tolist() for row in rows] == [expected] * 3
child = os.fork()
if not child:
    os._exit(int(zloss_cross_entropy(logits, targets)[0].tolist() != expected))
assert os.waitpid(child, 0)[1] == 0
"""


COLD = """
import os, torch
from nanochameleon.kernels import zloss_cross_entropy
torch.set_num_threads(2)
logits, targets, square = torch.randn(64, 50), torch.arange(50).repeat(2)[:64], torch.randn(512, 512)
square @ square  # torch's threads are there, and no kernel has run
child = os.fork()
if not child:
    zloss_cross_entropy(logits, targets)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("program", [FORKED, COLD], ids=["warm", "cold"])
def test_forked_workers_may_call_kernels(program):
    """A DataLoader's worker, which has one thread, and a bare fork, which believes to have its parent's."""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


RANK = """
import torch, torch.distributed as dist
from nanochameleon.kernels import zloss_cross_entropy
dist.init_process_group("gloo")
torch.manual_seed(0)
loss = zloss_cross_entropy(torch.randn(64, 50), torch.arange(50).repeat(2)[:64])[0].sum()
total = loss.clone()
dist.all_reduce(total)
assert total == 2 * loss
dist.destroy_process_group()  # gloo's threads may abort a process that ends without it
"""


def test_ranks_of_torchrun_may_call_kernels(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
