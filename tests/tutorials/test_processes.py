"""The processes of lesson 10 talk to each other, say why one failed, and end with the lesson."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from processes import on_ranks

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"
STARTS_TWO = """
from processes import on_ranks, pool
import os
def its_process(rank, n, data):
    import os
    return os.getpid()
print(*on_ranks(2, its_process), flush=True)
"""


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


@pytest.mark.timeout(300)
def test_ranks_share_sums_and_a_failure_is_said_at_once():
    for _ in range(2):  # the same processes again, and new ones after a failure
        results = on_ranks(2, total, factor, data={"x": torch.ones(3)})
        assert [result["rank"] for result in results] == [0, 1] and results[0]["n"] == 2
        assert all(result["sum"].tolist() == [30, 30, 30] for result in results)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 1 of 2 failed: .*this rank has had enough"):
            on_ranks(2, fails)
        assert time.monotonic() - start < 60


def test_no_process_outlives_the_lesson(tmp_path):
    script = tmp_path / "lesson.py"
    script.write_text(STARTS_TWO)
    environment = os.environ | {"PYTHONPATH": str(TUTORIALS)}
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=True).stdout
    left = deadline = time.monotonic() + 30
    while (left := [pid for pid in said.split() if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(said.split()) == 2 and not left
