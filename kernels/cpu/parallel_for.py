"""What every thread does while a kernel runs: it takes stretches of the work until none is left.

A `region` is eight words in memory, written by launch.py, and all threads run the function of that name on them. So it
does not matter whose threads they are and how many come: OpenMP's, Python's, or the caller alone. A kernel is a
function of five integers, kernel(job, part, first, last, scratch): the address of its job (`reader`), the number of the
stretch [first, last) that it is to do, and memory of this thread alone.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanochameleon.kernels.cpu.simd import address, count, f32, i64, instruction, load1_int, pointer

WORDS = ("kernel", "job", "n", "parts", "scratch", "bytes", "threads", "taken")  # the last two are counters


@instruction(count, address)
def fetch_add(b, p):
    """The counter at p before it is one more; no two threads get the same."""
    return b.atomic_rmw("add", b.inttoptr(p, i64.as_pointer()), ir.Constant(i64, 1), "monotonic")


@instruction(types.void, address, address, count, count, count, address)
def call(b, function, job, part, first, last, scratch):
    kind = ir.FunctionType(ir.VoidType(), [i64] * 5)
    b.call(b.inttoptr(function, kind.as_pointer()), (job, part, first, last, scratch))


def parallel_for(p):
    n, parts = load1_int(p + 16), load1_int(p + 24)
    scratch = load1_int(p + 32) + load1_int(p + 40) * fetch_add(p + 48)
    part = fetch_add(p + 56)
    while part < parts:
        call(load1_int(p), load1_int(p + 8), part, n * part // parts, n * (part + 1) // parts, scratch)
        part = fetch_add(p + 56)


def args_unpacker(job: type):
    """An instruction that reads this NamedTuple of int and float fields from the address where pack_args wrote it."""
    kinds = [types.float32 if kind is float else types.int64 for kind in job.__annotations__.values()]
    tuple_type = types.NamedTuple(kinds, job)

    @intrinsic
    def read(context, p):
        def codegen(context, b, signature, args):
            words = [(f32 if kind == types.float32 else i64, 2 * i) for i, kind in enumerate(kinds)]
            values = [b.load(pointer(b, args[0], kind, floats), align=4) for kind, floats in words]
            return context.make_tuple(b, tuple_type, values)

        return tuple_type(types.int64), codegen

    return read
