"""Threads that do one job after the other together, without Python and without waking up in between.

A job is a few numbers on a board. One member leads: it posts jobs and works on them itself. The others follow: they
wait for the next job in compiled code, and go home to Python when none comes for a moment. A job is phases, a phase is
blocks, and whoever is free takes the next block:

    for block in share(board, start, n): ...     # all n blocks are done, by whomever, when the loop ends
    start += n

Blocks are numbered on through all jobs, so two counters that only grow are all there is: NEXT to be taken, DONE. Nobody
waits for a member, only for blocks that somebody has taken: one that comes late, or never, finds the numbers of its
phase gone and walks on. What a member reads before it holds a block must be its own, since others may have gone on.
"""

import os
import platform

from llvmlite import ir
from numba import types

from nanochameleon.generation.cpu.memory import inner
from nanochameleon.kernels.cpu.simd import address, cgutils, count, i64, instruction

NEXT, DONE, ROUND, JOB, MADE = 0, 64, 128, 192, 256  # bytes from the board's address: a cache line each
BOARD = 40  # int64s that it has
TURNS = 200  # of waiting, before others that want the core are let through
PATIENCE = 2_000  # turns before a follower goes home: about a millisecond
PAUSES = platform.machine().lower() in ("x86_64", "amd64")  # has an instruction for waiting
let_through = types.ExternalFunction("sched_yield", types.int32()) if os.name == "posix" else None


def _place(b, p):
    return b.inttoptr(p, i64.as_pointer())


@instruction(count, address)
def watch(b, p):
    """An int64 that others write."""
    return b.load_atomic(_place(b, p), "acquire", 8)


@instruction(types.void, address, count)
def put(b, p, x):
    b.store_atomic(x, _place(b, p), "release", 8)


@instruction(count, address, count)
def add(b, p, x):
    """-> what it was before."""
    return b.atomic_rmw("add", _place(b, p), x, "acq_rel")


@instruction(types.boolean, address, count, count)
def swap(b, p, old, new):
    """Writes `new` where `old` still stands, and tells whether."""
    return b.extract_value(b.cmpxchg(_place(b, p), old, new, "acq_rel", "acquire"), 1)


@instruction(types.void)
def pause(b):
    if PAUSES:
        b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"), [])


@inner
def wait(turn):
    """The turn-th time in vain. Somebody with a block may be waiting for this very core."""
    if turn < TURNS or let_through is None:
        pause()
    else:
        let_through()


@inner
def take(board, start, n):
    """The next of the n blocks from number `start` on, or -1."""
    at = watch(board + NEXT)
    while at < start + n:
        if swap(board + NEXT, at, at + 1):
            return at - start
        at = watch(board + NEXT)
    return -1


@inner
def share(board, start, n):
    """Yields this member's blocks out of 0 .. n - 1, and ends when all of them are done."""
    block = take(board, start, n)
    while block >= 0:
        yield block
        add(board + DONE, 1)
        block = take(board, start, n)
    turn = 0
    while watch(board + DONE) < start + n:
        wait(turn)
        turn += 1


@inner
def post(board, job):
    """The leader's: a job of four numbers -> its first block."""
    start, round = watch(board + DONE), watch(board + ROUND)
    put(board + ROUND, round + 1)  # odd: being written
    for i in range(4):
        put(board + JOB + 8 * i, job[i])
    put(board + JOB + 32, start)
    put(board + ROUND, round + 2)
    return start


@inner
def await_job(board, seen):
    """A follower's: -> (its round, the job, its first block), the first one after round `seen`; zeros, in the end."""
    for turn in range(PATIENCE):
        round = watch(board + ROUND)
        if round > seen and round % 2 == 0:
            job = watch(board + JOB), watch(board + JOB + 8), watch(board + JOB + 16), watch(board + JOB + 24)
            start = watch(board + JOB + 32)
            if watch(board + ROUND) == round:
                return round, job, start
        wait(turn)
    return 0, (0, 0, 0, 0), 0
