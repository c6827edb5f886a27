"""Processes in the place of torchrun's ranks. They are kept between tests, since starting one costs seconds of imports.

    run_on(4, function, argument, ...)  ->  the result of each rank

`function` belongs to a module below this folder, where the processes can import it. It calls init_mesh itself.
"""

import atexit
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
LIMIT = 240  # seconds for one call


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(rank: int, pipe) -> None:
    """Answer calls (function, arguments, environment) until the pipe closes."""
    sys.path[:0] = [str(TESTS), str(TESTS.parent), *(str(folder) for folder in TESTS.iterdir() if folder.is_dir())]
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, environment = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            pipe.send((function(*arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


@cache
def pool(n: int) -> list:
    """Start n processes; return the pipes to them."""
    spawn = multiprocessing.get_context("spawn")
    pipes = []
    for rank in range(n):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(rank, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        atexit.register(process.kill)
    return pipes


def run_on(n: int, function: Callable, *arguments) -> list:
    """Run function(*arguments) on n ranks at once and return their results.

    Raises AssertionError with the tracebacks of ranks that failed; the next call then starts new processes.
    """
    port, pipes = free_port(), pool(n)
    for rank, pipe in enumerate(pipes):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        pipe.send((function, arguments, environment))
    results = [pipe.recv() if pipe.poll(LIMIT) else (None, f"rank {rank} hangs") for rank, pipe in enumerate(pipes)]
    failures = [failure for _, failure in results if failure]
    if failures:
        pool.cache_clear()
        raise AssertionError("\n".join(failures))
    return [result for result, _ in results]
