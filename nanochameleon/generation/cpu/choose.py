"""Compiled sampling of one slot's next token: the filters, the draw and the grammar of sampling.py a second time.

sampling.py is the reference; the tests compare the two token by token. The logits of the tokens that may come are
first gathered in one line, in the tokens' order: the others are never computed.
"""

import math
from functools import cache

import numpy as np
from numba import types

from nanochameleon.generation.cpu.memory import bools, call_at, doubles, floats, inner, ints, ints32, map_at
from nanochameleon.generation.decoder import IMAGE_TOKENS_LEFT, INDEX, N_SAMPLED, TOKENS_LEFT
from nanochameleon.generation.sampling import (
    AT_EOI,
    COND,
    CONTINUE,
    DONE,
    GUIDANCE,
    IMAGE_COND,
    IMAGE_GUIDANCE,
    IN_IMAGE,
    MIN_P,
    PENALTY,
    STOP,
    TEMPERATURE,
    TEXT,
    TEXT_NO_IMAGE,
    TOP_K,
    TOP_P,
    UNCOND,
)
from nanochameleon.kernels.cpu.launch import compiled
from nanochameleon.kernels.cpu.simd import address, count, instruction

SMALLEST_TEMPERATURE = 1e-30  # as in temperature()
INTERVALS = 128  # of an eighth each, that logits below the largest one are sorted into

# ---------------------------------------------------------------------------------------------------------------------
# The draw


@inner
def ahead(line, i, j):
    """Is i ahead of j: larger, or the first of equal ones?"""
    return line[i] > line[j] or (line[i] == line[j] and i < j)


@inner
def sift_down(line, heap, at, size):
    """Move entry `at` of the heap down until nothing below it is ahead of it."""
    child = 2 * at + 1
    while child < size:
        if child + 1 < size and ahead(line, heap[child + 1], heap[child]):
            child += 1
        if ahead(line, heap[at], heap[child]):
            return
        heap[at], heap[child] = heap[child], heap[at]
        at, child = child, 2 * child + 1


@inner
def interval(x):
    """The interval, out of INTERVALS, of a logit below the largest one, x <= 0; all far ones and NaN share the last."""
    at = np.float32(-8) * x
    return int(at) if at < INTERVALS - 1 else INTERVALS - 1


@inner
def last_kept(line, weights, n, k, mass, masses, heap):
    """The last token, in the order of their logits, of the fewest that are k tokens or, with k = 0, have this mass.

    Sums over intervals of the logits show in which one it is, so that only the tokens there must be put in order. A
    heap does that, which yields the largest tokens one by one.
    """
    target, taken, here, size = mass if k == 0 else k, 0.0, 0, 0
    for i in range(INTERVALS):
        masses[i] = 0
    for i in range(n):
        at = interval(line[i])
        if at < INTERVALS - 1:  # the last one's sum decides nothing
            masses[at] += weights[i] if k == 0 else 1
    while here < INTERVALS - 1 and taken + masses[here] < target:
        taken += masses[here]
        here += 1
    for i in range(n):
        if interval(line[i]) == here:
            heap[size] = i
            size += 1
    for at in range(size // 2 - 1, -1, -1):
        sift_down(line, heap, at, size)
    last = heap[0]
    if size == 0:  # the intervals' sums rounded to less than the target: all tokens are kept
        last = 0
        for i in range(1, n):
            last = i if ahead(line, last, i) else last
    while size > 0 and taken < target:
        last = heap[0]
        taken += weights[last] if k == 0 else 1
        size -= 1
        heap[0] = heap[size]
        sift_down(line, heap, 0, size)
    return last


@inner
def keep_up_to(line, weights, n, last):
    """Set the weights of the tokens after `last` to 0 -> the sum of all weights."""
    mass = 0.0
    for i in range(n):
        weights[i] = 0 if ahead(line, last, i) else weights[i]
        mass += weights[i]
    return mass


@inner
def top_k_top_p(line, weights, n, k, p, masses, heap):
    """Set the weights of all tokens to 0 that top_k_top_p() of sampling.py removes. With both, p is of the k's mass."""
    mass = 0.0
    for i in range(n):
        mass += weights[i]
    if k < n:
        mass = keep_up_to(line, weights, n, last_kept(line, weights, n, k, 0.0, masses, heap))
    if p < 1:
        keep_up_to(line, weights, n, last_kept(line, weights, n, 0, p * mass, masses, heap))


@inner
def sample(line, n, t, k, p, min_p, uniform, weights, masses, heap):
    """Greedy where t is 0; else temperature(), top_k_top_p(), min_p() and sample() of sampling.py."""
    best = 0
    for i in range(1, n):
        if line[i] > line[best]:
            best = i
    if t == 0:
        return best
    largest, divisor = line[best], np.float32(max(t, SMALLEST_TEMPERATURE))
    for i in range(n):
        line[i] = (line[i] - largest) / divisor
        weights[i] = math.exp(line[i])
    if k < n or p < 1:
        top_k_top_p(line, weights, n, k, p, masses, heap)
    least, s = np.float32(math.log(min_p) if min_p > 0 else -math.inf), 0.0
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
def slot_state(m, name, slot):
    return ints(m.slot_state, 6 * m.n_slots)[name * m.n_slots + slot]


@inner
def done(m, slot):
    return bools(m.done, m.n_slots)[slot]


@inner
def param(m, name, slot):
    return doubles(m.params, 11 * m.n_slots)[name * m.n_slots + slot]


@inner
def branch_slot(m, branch, slot):
    """The slot of this guidance branch of a slot's request."""
    return ints(m.branch_slots, 3 * m.n_slots)[branch * m.n_slots + slot]


@inner
def context_mask(m, slot):
    """(V,) bool"""
    return bools(m.context_mask + slot * m.vocab_size, m.vocab_size)


@inner
def logits_of(m, slot):
    """(V,) float32; only those of tokens that may come have been computed."""
    return floats(m.logits + 4 * ints(m.logit_rows, m.n_slots)[slot] * m.vocab_size, m.vocab_size)


@inner
def state(m, slot):
    """As Grammar.state."""
    if done(m, slot):
        return DONE
    left = slot_state(m, IMAGE_TOKENS_LEFT, slot)
    if left >= 0:
        return IN_IMAGE if left > 0 else AT_EOI
    return TEXT if slot_state(m, TOKENS_LEFT, slot) >= m.image_len + 2 else TEXT_NO_IMAGE


@inner
def penalised(logit, seen, penalty):
    if seen:
        return logit / penalty if logit > 0 else logit * penalty
    return logit


@inner
def gather_text(m, slot, state, line, specials):
    """Gather the logits that may come outside an image -> the number of special tokens among them, and of all."""
    logits, seen, penalty = logits_of(m, slot), context_mask(m, slot), np.float32(param(m, PENALTY, slot))
    row, n = slot_state(m, INDEX, slot) * 5 + state, 0
    allowed = bools(m.allowed + row * m.vocab_size, m.vocab_size)
    for token in (m.eos, m.boi, m.eot):
        if allowed[token]:
            specials[n], line[n] = token, penalised(logits[token], seen[token], penalty)
            n += 1
    n_specials = n
    for token in range(m.first_text, m.vocab_size if allowed[m.first_text] else 0):
        line[n] = penalised(logits[token], seen[token], penalty)
        n += 1
    return n_specials, n


@inner
def gather_image_tokens(m, slot, line):
    """As classifier_free_guidance()."""
    by_text, by_image = np.float32(param(m, GUIDANCE, slot)), np.float32(param(m, IMAGE_GUIDANCE, slot))
    cond, image_cond = logits_of(m, branch_slot(m, COND, slot)), logits_of(m, branch_slot(m, IMAGE_COND, slot))
    uncond, unguided = logits_of(m, branch_slot(m, UNCOND, slot)), by_text == 1 and by_image == 1
    for i in range(m.eoi - m.first_code):
        token = m.first_code + i
        x, y, z = cond[token], image_cond[token], uncond[token]
        line[i] = x if unguided else z + by_image * (y - z) + by_text * (x - y)


@inner
def sample_allowed(m, slot, thread):
    """Sample the next token of a slot where more than one may come."""
    now, v = state(m, slot), m.vocab_size
    line, weights = floats(m.lines + 4 * thread * v, v), doubles(m.weights + 8 * thread * v, v)
    masses = doubles(m.masses + 8 * thread * INTERVALS, INTERVALS)
    heap = ints(m.heaps + 8 * thread * (v + 3), v)
    specials = ints(m.heaps + 8 * (thread * (v + 3) + v), 3)
    if now == IN_IMAGE:
        gather_image_tokens(m, slot, line)
        n_specials, n, image, first = 0, m.eoi - m.first_code, 1, m.first_code
    else:
        n_specials, n = gather_text(m, slot, now, line, specials)
        image, first = 0, m.first_text
    column = min(slot_state(m, N_SAMPLED, slot), m.context - 1)
    at = sample(
        line, n, param(m, TEMPERATURE + image, slot), param(m, TOP_K + image, slot), param(m, TOP_P + image, slot),
        param(m, MIN_P + image, slot), doubles(m.uniforms + 8 * slot * m.context, m.context)[column], weights, masses,
        heap,
    )  # fmt: skip
    return specials[at] if at < n_specials else first + at - n_specials


def choose(m_address, slot, thread):
    """Write the next token of a COND slot to m.chosen."""
    m = map_at(m_address)
    ints(m.chosen, m.n_slots)[slot] = m.eoi if state(m, slot) == AT_EOI else sample_allowed(m, slot, thread)


@cache
def choose_address() -> int:
    return compiled(choose, 3).address


@instruction(types.void, address, address, count, count)
def call_choose(b, function, m_address, slot, thread):
    call_at(b, function, m_address, slot, thread)


# ---------------------------------------------------------------------------------------------------------------------
# What has come


@inner
def advance(m, slot, token):
    """As Grammar.advance, in place; also the token's count and the context mask."""
    state, n = ints(m.slot_state, 6 * m.n_slots), m.n_slots
    left, at = state[IMAGE_TOKENS_LEFT * n + slot], slot_state(m, INDEX, slot) * m.vocab_size + token
    transition = ints32(m.transitions + 4 * at, 1)[0]
    state[IMAGE_TOKENS_LEFT * n + slot] = left - 1 if left >= 0 else max(transition, CONTINUE)
    state[TOKENS_LEFT * n + slot] -= 1
    state[N_SAMPLED * n + slot] += 1
    context_mask(m, slot)[token] = True
    bools(m.done, n)[slot] = transition == STOP or state[TOKENS_LEFT * n + slot] <= 0
