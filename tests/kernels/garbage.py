"""Memory full of something else: what an op reads before it has written it shows."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

GARBAGE = 0.0, torch.nan, 1e30


def outcomes_in_garbage(monkeypatch, run: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """Of a run in each kind of it: every new tensor of kernels/, and fresh scratch."""
    empty, like, new, outcomes = torch.empty, torch.empty_like, Tensor.new_empty, []
    for garbage in GARBAGE:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *shape, g=garbage, **kw: empty(*shape, **kw).fill_(g))
            patch.setattr(torch, "empty_like", lambda x, g=garbage, **kw: like(x, **kw).fill_(g))
            patch.setattr(Tensor, "new_empty", lambda x, *shape, g=garbage, **kw: new(x, *shape, **kw).fill_(g))
            patch.setattr("nanochameleon.kernels.cpu.launch._own", threading.local())
            outcomes.append(run())
    return outcomes


def assert_same_in_garbage(monkeypatch, run: Callable[[], list[Tensor]]) -> None:
    first, *others = outcomes_in_garbage(monkeypatch, run)
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
