"""The loop that every thread runs while a kernel is launched: take the next chunk of [0, n) until none is left.

launch.py writes a header of eight int64 words, the fields of HEADER, and all threads call `parallel_for` on it. So it
does not matter whose threads they are or how many come: OpenMP's, Python's, or the caller alone.

A kernel is a function of five int64s, kernel(args, chunk, first, last, scratch): the address of its arguments, the
number and the range [first, last) of a chunk, and scratch memory that no other thread touches.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanochameleon.kernels.cpu.simd import address, count, f32, i64, instruction, load1_int, pointer

# the last two are counters, which threads raise: how many threads have come, how many chunks are taken
HEADER = ("kernel", "args", "n", "chunks", "scratch", "scratch_bytes", "threads", "taken")


@instruction(count, address)
def fetch_add(b, p):
    """Atomically add 1 to the int64 at p; returns the value before, so no two threads get the same."""
    return b.atomic_rmw("add", b.inttoptr(p, i64.as_pointer()), ir.Constant(i64, 1), "monotonic")


@instruction(types.void, address, address, count, count, count, address)
def call(b, function, args, chunk, first, last, scratch):
    kind = ir.FunctionType(ir.VoidType(), [i64] * 5)
    b.call(b.inttoptr(function, kind.as_pointer()), (args, chunk, first, last, scratch))


def parallel_for(p):
    n, chunks = load1_int(p + 16), load1_int(p + 24)
    scratch = load1_int(p + 32) + load1_int(p + 40) * fetch_add(p + 48)
    chunk = fetch_add(p + 56)
    while chunk < chunks:
        call(load1_int(p), load1_int(p + 8), chunk, n * chunk // chunks, n * (chunk + 1) // chunks, scratch)
        chunk = fetch_add(p + 56)


def args_unpacker(kind: type):
    """An instruction that loads a NamedTuple of int and float fields from the address where launch.py packed it."""
    fields = [types.float32 if field is float else types.int64 for field in kind.__annotations__.values()]
    tuple_type = types.NamedTuple(fields, kind)

    @intrinsic
    def unpack_args(context, p):
        def codegen(context, b, signature, args):
            words = [(f32 if field == types.float32 else i64, 2 * i) for i, field in enumerate(fields)]
            values = [b.load(pointer(b, args[0], field, floats), align=4) for field, floats in words]
            return context.make_tuple(b, tuple_type, values)

        return tuple_type(types.int64), codegen

    return unpack_args
