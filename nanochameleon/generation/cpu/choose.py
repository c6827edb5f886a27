"""The next id of a row, chosen from its logits: the filters, the draw and the grammar of sampling.py once more, for one
row at a time and in compiled code. Those are the reference; tests hold the two together, id by id.

The logits of the ids that may come are first gathered in one line, in the ids' order: nothing else is ever looked at.
"""

import math
from functools import cache

import numpy as np
from numba import types

from nanochameleon.generation.cpu.memory import bools, call_at, doubles, floats, inner, ints, ints32, map_at
from nanochameleon.generation.sampling import (
    BY_RULES,
    CLOSE,
    COUNT,
    DONE,
    FULL,
    GOES_ON,
    GUIDANCE,
    GUIDANCE_IMAGE,
    IMAGE,
    IMAGES,
    LEFT,
    MIN_P,
    NOTHING,
    OPEN,
    PENALTY,
    ROOM,
    SHUT,
    STOPS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)
from nanochameleon.kernels.cpu.launch import compiled
from nanochameleon.kernels.cpu.simd import address, count, instruction

LEAST_HEAT = 1e-30  # as in temperature()

# ---------------------------------------------------------------------------------------------------------------------
# The draw


@inner
def before(line, i, j):
    """Is i ahead of j: larger, or the first of equal ones?"""
    return line[i] > line[j] or (line[i] == line[j] and i < j)


@inner
def sink(line, heap, at, size):
    """Entry `at` goes down until nothing below it is ahead of it."""
    child = 2 * at + 1
    while child < size:
        if child + 1 < size and before(line, heap[child + 1], heap[child]):
            child += 1
        if before(line, heap[at], heap[child]):
            return
        heap[at], heap[child] = heap[child], heap[at]
        at, child = child, 2 * child + 1


@inner
def keep_top(line, weights, n, k, p, heap):
    """As top(): the k largest, and of those the fewest that together reach p; the weights of the others become 0.

    The largest ones come out of a heap one by one, to its end. Of all that are rarer than (1 - p) / n on the average
    nobody can be needed for p.
    """
    mass, size, few = 0.0, 0, k < n
    for i in range(n):
        mass += weights[i]
    for i in range(n):
        if few or weights[i] * n >= (1 - p) * mass:
            heap[size] = i
            size += 1
    for at in range(size // 2 - 1, -1, -1):
        sink(line, heap, at, size)
    end, taken = size, 0.0
    while size > 0 and (size == end or (end - size < k if few else taken < p * mass)):
        size -= 1
        heap[0], heap[size] = heap[size], heap[0]
        sink(line, heap, 0, size)
        taken += weights[heap[size]]
    if few and p < 1:
        mass, taken, size = taken, 0.0, end
        while size == end or taken < p * mass:
            size -= 1
            taken += weights[heap[size]]
    for i in range(n):
        if before(line, heap[size], i):
            weights[i] = 0


@inner
def pick(line, n, t, k, p, share, uniform, weights, heap):
    """Greedy where t is 0, else temperature(), top(), min_p() and pick() of sampling.py."""
    best = 0
    for i in range(1, n):
        if line[i] > line[best]:
            best = i
    if t == 0:
        return best
    largest, heat = line[best], np.float32(max(t, LEAST_HEAT))
    for i in range(n):
        line[i] = (line[i] - largest) / heat
        weights[i] = math.exp(line[i])
    if k < n or p < 1:
        keep_top(line, weights, n, k, p, heap)
    least, s = np.float32(math.log(share) if share > 0 else -math.inf), 0.0
    for i in range(n):
        if line[i] < least:
            weights[i] = 0
        s += weights[i]
    end, s = uniform * s, 0.0
    for i in range(n):
        s += weights[i]
        if s > end:
            return i
    return n - 1 if weights[n - 1] > 0 else best


# ---------------------------------------------------------------------------------------------------------------------
# What may come


@inner
def number(m, name, row):
    return ints(m.numbers, 6 * m.n_rows)[name * m.n_rows + row]


@inner
def done(m, row):
    return bools(m.done, m.n_rows)[row]


@inner
def option(m, name, row):
    return doubles(m.options, 11 * m.n_rows)[name * m.n_rows + row]


@inner
def branch(m, reads, row):
    """The row that reads this of a row's sample."""
    return ints(m.sample, 3 * m.n_rows)[reads * m.n_rows + row]


@inner
def seen_by(m, row):
    """(V,) bool"""
    return bools(m.seen + row * m.vocab_size, m.vocab_size)


@inner
def logits_of(m, row):
    """(V,) float32, of which those that may come have been made."""
    return floats(m.logits + 4 * ints(m.places, m.n_rows)[row] * m.vocab_size, m.vocab_size)


@inner
def kind(m, row):
    """As Grammar.kinds."""
    if done(m, row):
        return DONE
    left = number(m, LEFT, row)
    if left >= 0:
        return IMAGE if left > 0 else CLOSE
    return OPEN if number(m, ROOM, row) >= m.codes_each + 2 else SHUT


@inner
def penalised(logit, seen, penalty):
    if seen:
        return logit / penalty if logit > 0 else logit * penalty
    return logit


@inner
def gather_text(m, row, what, line, ends):
    """Outside of an image -> how many ids that may come are none of text, and how many in all."""
    logits, seen, penalty = logits_of(m, row), seen_by(m, row), np.float32(option(m, PENALTY, row))
    may, n = bools(m.may + (number(m, BY_RULES, row) * 5 + what) * m.vocab_size, m.vocab_size), 0
    for end in (m.eos, m.boi, m.eot):
        if may[end]:
            ends[n], line[n] = end, penalised(logits[end], seen[end], penalty)
            n += 1
    behind = n
    for token in range(m.first_text, m.vocab_size if may[m.first_text] else 0):
        line[n] = penalised(logits[token], seen[token], penalty)
        n += 1
    return behind, n


@inner
def gather_codes(m, row, line):
    """As guide()."""
    by_text, by_image = np.float32(option(m, GUIDANCE, row)), np.float32(option(m, GUIDANCE_IMAGE, row))
    full, image = logits_of(m, branch(m, FULL, row)), logits_of(m, branch(m, IMAGES, row))
    nothing, plain = logits_of(m, branch(m, NOTHING, row)), by_text == 1 and by_image == 1
    for i in range(m.eoi - m.first_code):
        token = m.first_code + i
        x, y, z = full[token], image[token], nothing[token]
        line[i] = x if plain else z + by_image * (y - z) + by_text * (x - y)


@inner
def choice(m, row, member):
    """-> the next id, where more than one may come."""
    what, v = kind(m, row), m.vocab_size
    line, weights = floats(m.lines + 4 * member * v, v), doubles(m.weights + 8 * member * v, v)
    heap = ints(m.heaps + 8 * member * (v + 3), v)
    ends = ints(m.heaps + 8 * (member * (v + 3) + v), 3)
    if what == IMAGE:
        gather_codes(m, row, line)
        behind, n, column, first = 0, m.eoi - m.first_code, 1, m.first_code
    else:
        behind, n = gather_text(m, row, what, line, ends)
        column, first = 0, m.first_text
    count = min(number(m, COUNT, row), m.context - 1)
    at = pick(
        line, n, option(m, TEMPERATURE + column, row), option(m, TOP_K + column, row), option(m, TOP_P + column, row),
        option(m, MIN_P + column, row), doubles(m.uniforms + 8 * row * m.context, m.context)[count], weights, heap,
    )  # fmt: skip
    return ends[at] if at < behind else first + at - behind


def choose(where, row, member):
    """The next id of a row that reads everything, into m.chosen; `where` m lies."""
    m = map_at(where)
    ints(m.chosen, m.n_rows)[row] = m.eoi if kind(m, row) == CLOSE else choice(m, row, member)


@cache
def choose_address() -> int:
    return compiled(choose, 3).address


@instruction(types.void, address, address, count, count)
def call_choose(b, function, where, row, member):
    call_at(b, function, where, row, member)


# ---------------------------------------------------------------------------------------------------------------------
# What has come


@inner
def advance(m, row, token):
    """As Grammar.after, in place."""
    numbers, n = ints(m.numbers, 6 * m.n_rows), m.n_rows
    left, at = numbers[LEFT * n + row], number(m, BY_RULES, row) * m.vocab_size + token
    turn = ints32(m.turns + 4 * at, 1)[0]
    numbers[LEFT * n + row] = left - 1 if left >= 0 else max(turn, GOES_ON)
    numbers[ROOM * n + row] -= 1
    numbers[COUNT * n + row] += 1
    seen_by(m, row)[token] = True
    bools(m.done, n)[row] = turn == STOPS or numbers[ROOM * n + row] <= 0
