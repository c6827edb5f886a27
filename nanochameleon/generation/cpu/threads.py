"""Threads that do one job after another together, without Python and without sleeping in between.

A job is a few numbers on a board. Thread 0 leads: it posts jobs and works on them, too. The others follow: they spin
in compiled code until the next job, and return to Python when none comes for a moment. A job is phases, a phase is
blocks, and a thread that is free takes the next block:

    for block in share(board, start, n): ...     # when the loop ends, all n blocks are done, by any thread
    start += n

Blocks are numbered through all jobs, so two counters that only grow are enough: NEXT to take, and DONE. A thread waits
for blocks that were taken, never for another thread: one that is late finds the blocks of its phase gone and moves on.
Until a thread holds a block, other threads may already be in a later phase, so it may read only its own memory.
"""

import os
import platform

from llvmlite import ir
from numba import types

from nanochameleon.generation.cpu.memory import inner
from nanochameleon.kernels.cpu.simd import address, cgutils, count, i64, instruction

NEXT, DONE, ROUND, JOB, MADE = 0, 64, 128, 192, 256  # offsets in bytes: one cache line each
BOARD = 40  # its size in int64s
SPINS = 200  # before a waiting thread yields its core
PATIENCE = 2_000  # spins before a follower returns to Python: about a millisecond
HAS_PAUSE = platform.machine().lower() in ("x86_64", "amd64")  # the instruction for spin loops
sched_yield = types.ExternalFunction("sched_yield", types.int32()) if os.name == "posix" else None


def _pointer(b, p):
    return b.inttoptr(p, i64.as_pointer())


@instruction(count, address)
def watch(b, p):
    """Load an int64 that other threads write."""
    return b.load_atomic(_pointer(b, p), "acquire", 8)


@instruction(types.void, address, count)
def put(b, p, x):
    b.store_atomic(x, _pointer(b, p), "release", 8)


@instruction(count, address, count)
def add(b, p, x):
    """Add x, and return the value before."""
    return b.atomic_rmw("add", _pointer(b, p), x, "acq_rel")


@instruction(types.boolean, address, count, count)
def swap(b, p, old, new):
    """Compare and swap: write `new` if the value is still `old`; returns whether it was."""
    return b.extract_value(b.cmpxchg(_pointer(b, p), old, new, "acq_rel", "acquire"), 1)


@instruction(types.void)
def pause(b):
    if HAS_PAUSE:
        b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"), [])


@inner
def wait(spins):
    """Spin; after SPINS times yield, since a thread with a block may need this core."""
    if spins < SPINS or sched_yield is None:
        pause()
    else:
        sched_yield()


@inner
def take(board, start, n):
    """Take the next of the n blocks that start at number `start`; -1 if none is left."""
    at = watch(board + NEXT)
    while at < start + n:
        if swap(board + NEXT, at, at + 1):
            return at - start
        at = watch(board + NEXT)
    return -1


@inner
def share(board, start, n):
    """Yield this thread's blocks out of 0 .. n - 1; return when all n are done."""
    block = take(board, start, n)
    while block >= 0:
        yield block
        add(board + DONE, 1)
        block = take(board, start, n)
    spins = 0
    while watch(board + DONE) < start + n:
        wait(spins)
        spins += 1


@inner
def post(board, job):
    """The leader posts a job of four numbers -> the number of its first block."""
    start, round = watch(board + DONE), watch(board + ROUND)
    put(board + ROUND, round + 1)  # odd: being written
    for i in range(4):
        put(board + JOB + 8 * i, job[i])
    put(board + JOB + 32, start)
    put(board + ROUND, round + 2)
    return start


@inner
def await_job(board, seen):
    """A follower waits for the first job after round `seen` -> (its round, the job, its first block), or zeros."""
    for spins in range(PATIENCE):
        round = watch(board + ROUND)
        if round > seen and round % 2 == 0:
            job = watch(board + JOB), watch(board + JOB + 8), watch(board + JOB + 16), watch(board + JOB + 24)
            start = watch(board + JOB + 32)
            if watch(board + ROUND) == round:
                return round, job, start
        wait(spins)
    return 0, (0, 0, 0, 0), 0
