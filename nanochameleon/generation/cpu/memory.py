"""Where everything lies that a compiled step reads or writes: one record of sizes and addresses, MAP.

Functions take it as `m`, one pointer, so that it costs nothing to pass on. D = dim, F = ffn_dim, H query
heads, G key heads, E = head_dim; D', F', E' are rounded up to whole registers, and what fills a row up is 0. N rows of
the batch, V ids.
"""

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import carray, from_dtype, njit, types

from nanochameleon.kernels.cpu.simd import W, address, instruction


def inner(function: Callable):
    """What only compiled code calls: no wrappers for Python, and one version whatever constants it is called with."""
    made = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")(function)
    version_for = made.get_call_template
    made.get_call_template = lambda args, kws: version_for([types.unliteral(kind) for kind in args], kws)
    return made


SIZES = (
    "dim", "ffn_dim", "n_heads", "kv_heads", "head_dim", "n_layers", "vocab_size",
    "context",  # ids that a row of the cache holds
    "groups",  # of QK-norm; 0 is without
    "pre",  # 1: a norm before each branch; 0: behind it
    "n_rows",  # of the batch
    "members",  # of the team
)  # fmt: skip
IDS = ("eos", "pad", "eot", "boi", "eoi", "first_code", "first_text", "codes_each")  # the vocabulary's; codes an image
WEIGHTS = (
    "product",
    "product_fp32",  # functions: products.py for weights of the model's type, and for those of 4 bytes
    "do_block",  # layers.py
    "choose",  # choose.py
    "embeddings",  # (V, D)
    "norm",  # (D')
    "output",  # (V, D)
    "output_scale",  # (V,)
    "rotations",  # (context, E'): cos and sin of each pair in turn
    "layers",  # (L, SLOTS) int64: see layers.py
)
ACTIVATIONS = (  # one line for each id that is being read, except the last three
    "queue",  # (3, ids) int64: ids to be read, their rows and positions
    "ids",  # how many that are at most
    "x", "normed", "branch",  # (ids, D')
    "qkv",  # (ids, (H + 2 G) E)
    "heads",  # (ids, H E)
    "up", "gate",  # (ids, F')
    "scratch",  # (members, floats)
    "floats",
    "hidden",  # (N, D): the outcome, a row's newest
)  # fmt: skip
ROWS = (  # decoder.py's tensors
    "numbers",  # (6, N) int64: BY_RULES .. LENGTH
    "done",  # (N,) bool
    "may",
    "turns",  # the grammar's tables
    "options",  # (11, N) float64
    "seen",  # (N, V) bool
    "uniforms",  # (N, context) float64
    "sample",  # (3, N) int64
    "log",  # (steps, N) int64
)
CHOICE = (  # a place is a row's among those whose logits are wanted
    "asking",  # (N, D'): hidden states by place, those of text first
    "logits",  # (N, V) by place
    "places",  # (N,) int64: of each row
    "leads",  # (N,) int64: the rows whose id is chosen
    "chosen",  # (N,) int64: ids, by row
    "lines",  # (members, V) float32
    "weights",  # (members, V) float64
    "heaps",  # (members, V + 3) int64
)
NAMES = ("board", *SIZES, *IDS, *WEIGHTS, *ACTIVATIONS, *ROWS, *CHOICE)
MAP = np.dtype([*((name, np.int64) for name in NAMES), ("eps", np.float64)])


RECORD = from_dtype(MAP)


@instruction(RECORD, address)
def map_at(b, p):
    """m, from its address."""
    return b.inttoptr(p, ir.ArrayType(ir.IntType(8), RECORD.size).as_pointer())


def call_at(b, function, *arguments) -> None:
    """Calls a function by its address: what is called so is compiled once, on its own, and not with each caller."""
    kind = ir.FunctionType(ir.VoidType(), [x.type for x in arguments])
    b.call(b.inttoptr(function, kind.as_pointer()), arguments)


@inner
def padded(n):
    return (n + W - 1) // W * W


def pointer_to(kind):
    @instruction(types.CPointer(kind), address)
    def pointer(b, p):
        return b.inttoptr(p, kinds[kind].as_pointer())

    return pointer


kinds = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.int64: ir.IntType(64),
         types.int32: ir.IntType(32), types.boolean: ir.IntType(8)}  # fmt: skip
_float, _double, _bool = (pointer_to(kind) for kind in (types.float32, types.float64, types.boolean))
_int, _int32 = (pointer_to(kind) for kind in (types.int64, types.int32))


@inner
def floats(p, n):
    """n float32 at an address, as an array; the others alike."""
    return carray(_float(p), n)


@inner
def doubles(p, n):
    return carray(_double(p), n)


@inner
def ints(p, n):
    return carray(_int(p), n)


@inner
def bools(p, n):
    return carray(_bool(p), n)


@inner
def ints32(p, n):
    return carray(_int32(p), n)
