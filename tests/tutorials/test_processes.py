"""The processes of lesson 10 talk to each other, say why one failed, and end with the lesson."""

import pytest
import torch
import torch.distributed as dist

from processes import on_ranks, pool


def factor():
    return 10


def total(rank, n, data):
    x = data["x"] * (rank + 1) * factor()
    dist.all_reduce(x)
    return {"rank": rank, "n": n, "sum": x}


def fails(rank, n, data):
    if rank == 1:
        raise ValueError("this rank has had enough")
    dist.all_reduce(torch.zeros(1))  # waits for the other in vain


def test_ranks_share_sums_and_a_failure_is_said_at_once():
    for _ in range(2):  # after a failure, new processes start
        results = on_ranks(2, total, factor, data={"x": torch.ones(3)})
        assert [result["rank"] for result in results] == [0, 1] and results[0]["n"] == 2
        assert all(result["sum"].tolist() == [30, 30, 30] for result in results)
        with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed: .*this rank has had enough"):
            on_ranks(2, fails)


def test_ranks_end_well_when_the_lesson_does():
    on_ranks(1, total, factor, data={"x": torch.ones(3)})
    _, ranks = pool(1)
    for each in ranks:
        each.stdin.close()
    assert [each.wait(60) for each in ranks] == [0]
    pool.cache_clear()
