"""Run a function of a lesson in several processes that talk to each other, as torchrun does on many machines.

    results = on_ranks(2, work, helper, ..., data=tensors)        work(rank, n, data) -> tensors

Each process reads the functions' sources, so a change in the lesson's cell takes effect. The processes meet in a file
of a temporary folder: no port, no network. They wait for the next call, and end when the lesson's own process ends.
"""

import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch

TIMEOUT = 280  # seconds for one call; a rank waits for another no longer than that
RANK = f"""import gc, os, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from nanochameleon.config import ModelConfig, ParallelConfig
from nanochameleon.packing import Batch
from nanochameleon.parallel.apply import parallelize, wrap
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.training.objective import Objective
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

rank, n = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
store, timeout = dist.FileStore("store", n), timedelta(seconds={TIMEOUT})
dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timeout)
for line in sys.stdin:  # until the lesson's process closes it
    job, work = line.split()
    space = dict(globals())
    exec(Path(f"{{job}}.py").read_text(), space)
    torch.save(space[work](rank, n, torch.load(f"{{job}}.pt", weights_only=True)), f"{{job}}-{{rank}}.part")
    del space
    gc.collect()  # torch's DDP must not own tensors when its process ends
    os.replace(f"{{job}}-{{rank}}.part", f"{{job}}-{{rank}}.pt")
dist.destroy_process_group()
"""
JOBS = count()


@cache
def pool(n: int) -> tuple[tempfile.TemporaryDirectory, list[subprocess.Popen]]:
    """Start n processes; return their folder and them."""
    folder, ranks = tempfile.TemporaryDirectory(ignore_cleanup_errors=True), []
    Path(folder.name, "rank.py").write_text(RANK)
    environment = os.environ | {"NANOCHAMELEON_KERNELS": "reference"}  # nothing to compile
    for rank in range(n):
        with open(Path(folder.name, f"{rank}.log"), "w") as log:
            command = [sys.executable, "rank.py", str(rank), str(n)]
            ranks.append(
                subprocess.Popen(
                    command, cwd=folder.name, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
                )
            )
    return folder, ranks


def on_ranks(n: int, work: Callable, *helpers: Callable, data: Any = None) -> list:
    """Return work(rank, n, data) of each rank. Raises RuntimeError with the last line of a rank that failed."""
    sources = [inspect.getsource(function) for function in (*helpers, work)]
    folder, ranks = Path(pool(n)[0].name), pool(n)[1]
    job = f"job{next(JOBS)}"
    (folder / f"{job}.py").write_text("\n".join(sources))
    torch.save(data, folder / f"{job}.pt")
    results = [folder / f"{job}-{rank}.pt" for rank in range(n)]
    try:
        for each in ranks:
            each.stdin.write(f"{job} {work.__name__}\n")
            each.stdin.flush()
        wait_for(results, ranks, folder)
    except BaseException:  # also when the reader stops the cell: a rank that waits for a dead one is of no use
        for each in ranks:
            each.kill()
            each.wait()
        pool.cache_clear()
        raise
    return [torch.load(result, weights_only=True) for result in results]


def wait_for(results: list[Path], ranks: list[subprocess.Popen], folder: Path) -> None:
    """Wait until all results are there. Raises RuntimeError as soon as a rank has ended without one."""
    deadline = time.monotonic() + TIMEOUT
    while not all(result.exists() for result in results):
        for rank, each in enumerate(ranks):
            if each.poll() is not None:
                words = (folder / f"{rank}.log").read_text().strip().splitlines() or ["it said nothing"]
                raise RuntimeError(f"rank {rank} of {len(ranks)} failed: {words[-1]}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the ranks have no result after {TIMEOUT} s")
        time.sleep(0.02)
