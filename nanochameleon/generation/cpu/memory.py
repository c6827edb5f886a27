"""One record of sizes and addresses, MAP: everything that a compiled step reads or writes.

Functions take it as `m`, one pointer, so that passing it on costs nothing. N slots of the batch, V tokens, D = dim,
F = ffn_dim, H query heads, G key heads, E = head_dim. D', F' and E' are rounded up to whole registers; zeros fill up.
"""

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import carray, from_dtype, njit, types

from nanochameleon.kernels.cpu.simd import W, address, instruction


def inner(function: Callable):
    """Compile a function that only compiled code calls: without wrappers for Python, and once for all constants."""
    made = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")(function)
    version_for = made.get_call_template
    made.get_call_template = lambda args, kws: version_for([types.unliteral(kind) for kind in args], kws)
    return made


SIZES = (
    "dim", "ffn_dim", "n_heads", "kv_heads", "head_dim", "n_layers", "vocab_size",
    "context",  # tokens that a slot's cache holds
    "groups",  # of QK-norm; 0: no QK-norm
    "pre_norm",  # 1: a norm before each branch; 0: after it
    "n_slots",  # of the batch
    "n_threads",
)  # fmt: skip
TOKENS = ("eos", "pad", "eot", "boi", "eoi", "first_code", "first_text", "image_len")  # of the vocabulary
WEIGHTS = (
    "matmul",
    "matmul_fp32",  # functions: matmul.py for weights of the model's type, and for float32
    "do_block",  # layers.py
    "choose",  # choose.py
    "embeddings",  # (V, D)
    "norm",  # (D')
    "output",  # (V, D)
    "output_scale",  # (V,)
    "freqs_cis",  # (context, E'): cos and sin of each pair in turn
    "layers",  # (L, FIELDS) int64, see layers.py
)
ACTIVATIONS = (  # one line for each queued token, except the last three
    "queue",  # (3, queue_size) int64: tokens that the model reads next, their slots and positions
    "queue_size",
    "x", "normed", "branch",  # (queue_size, D')
    "qkv",  # (queue_size, (H + 2 G) E)
    "heads",  # (queue_size, H E)
    "up", "gate",  # (queue_size, F')
    "scratch",  # (n_threads, scratch_size)
    "scratch_size",
    "hidden",  # (N, D): the result, at each slot's newest token
)  # fmt: skip
SLOTS = (  # decoder.py's tensors
    "slot_state",  # (6, N) int64: INDEX .. LENGTH
    "done",  # (N,) bool
    "allowed",
    "transitions",  # the grammar's tables
    "params",  # (11, N) float64
    "context_mask",  # (N, V) bool
    "uniforms",  # (N, context) float64
    "branch_slots",  # (3, N) int64
    "token_buffer",  # (steps, N) int64
)
SAMPLING = (  # of the slots whose logits are needed in a step, those in text come first
    "logit_inputs",  # (N, D'): their hidden states
    "logits",  # (N, V)
    "logit_rows",  # (N,) int64: each slot's row in these two
    "cond_slots",  # (N,) int64: the slots that sample
    "chosen",  # (N,) int64: their tokens, by slot
    "lines",  # (n_threads, V) float32
    "weights",  # (n_threads, V) float64
    "masses",  # (n_threads, INTERVALS) float64
    "heaps",  # (n_threads, V + 3) int64
)
NAMES = ("board", *SIZES, *TOKENS, *WEIGHTS, *ACTIVATIONS, *SLOTS, *SAMPLING)
MAP = np.dtype([*((name, np.int64) for name in NAMES), ("eps", np.float64)])


RECORD = from_dtype(MAP)


@instruction(RECORD, address)
def map_at(b, p):
    """m, from its address."""
    return b.inttoptr(p, ir.ArrayType(ir.IntType(8), RECORD.size).as_pointer())


def call_at(b, function, *arguments) -> None:
    """Call a function by its address, so that it is compiled once on its own instead of with each caller."""
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
    """n float32 at an address, as an array; likewise the functions below."""
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
