"""Compiled decode steps: sample a token for each slot, run the model on it, again, without Python in between.

One thread leads: between two jobs it alone looks at the slots and decides what comes next. It knows each slot's state,
so only the logits that may be sampled are computed, finished slots cost nothing, and any number of steps needs no sync.
"""

import ctypes
from collections.abc import Callable
from functools import cache

from nanochameleon.generation.cpu.choose import advance, branch_slot, call_choose, done, slot_state, state
from nanochameleon.generation.cpu.layers import PHASES, blocks, call_do_block, embed, width
from nanochameleon.generation.cpu.matmul import call_matmul
from nanochameleon.generation.cpu.memory import inner, ints, map_at, padded
from nanochameleon.generation.cpu.threads import MADE, await_job, post, put, share
from nanochameleon.generation.decoder import CFG_BRANCH, LENGTH
from nanochameleon.generation.sampling import COND, IN_IMAGE, UNCOND
from nanochameleon.kernels.cpu.launch import compiled
from nanochameleon.kernels.cpu.simd import read_row

STOP, FORWARD, SAMPLE = range(3)  # jobs
LOGITS, CHOOSE, EMBED = -3, -2, -1  # phases: two of sampling, and one before the layers' phases

# ---------------------------------------------------------------------------------------------------------------------
# The leader, between two jobs


@inner
def plan_sampling(m, n):
    """Which of n slots sample, and of which the logits are needed: in images, of all branches -> the job."""
    cond_slots, logit_rows = ints(m.cond_slots, m.n_slots), ints(m.logit_rows, m.n_slots)
    n_cond = n_rows = n_texts = 0
    for images in (False, True):  # rows of logits: text first, then images
        for slot in range(n):
            now, is_cond = state(m, slot), branch_slot(m, COND, slot) == slot
            if not images and is_cond and not done(m, slot):
                cond_slots[n_cond] = slot
                n_cond += 1
            if now == IN_IMAGE if images else now < IN_IMAGE and is_cond:
                logit_rows[slot] = n_rows
                read_row(m.hidden + 4 * slot * m.dim, 4, m.dim, m.logit_inputs + 4 * n_rows * padded(m.dim))
                n_rows += 1
        n_texts = n_texts if images else n_rows
    return (SAMPLE if n_cond else STOP), n_cond, n_texts, n_rows - n_texts


@inner
def queue_tokens(m, n, step):
    """Give every slot its request's token, and queue it for the model in the slots that condition on it -> how many.

    As Decoder.forward_step: IMAGE_COND and UNCOND read images alone, and UNCOND restarts at each <boi>.
    """
    queue, new_tokens = ints(m.queue, 3 * m.queue_size), ints(m.token_buffer + 8 * step * m.n_slots, m.n_slots)
    states, n_queued = ints(m.slot_state, 6 * m.n_slots), 0
    for slot in range(n):
        new_tokens[slot] = m.pad
        if done(m, slot):
            continue
        token, branch = ints(m.chosen, m.n_slots)[branch_slot(m, COND, slot)], slot_state(m, CFG_BRANCH, slot)
        new_tokens[slot] = token
        advance(m, slot, token)
        if branch != COND and not m.first_code <= token <= m.boi:
            continue
        position = 1 if branch == UNCOND and token == m.boi else slot_state(m, LENGTH, slot)
        states[LENGTH * m.n_slots + slot] = position + 1
        if not done(m, slot):
            for i, x in enumerate((token, slot, position)):
                queue[i * m.queue_size + n_queued] = x
            n_queued += 1
    return n_queued


# ---------------------------------------------------------------------------------------------------------------------
# All threads


@inner
def part_of_logits(m, row, n_rows, first, last):
    """Logits of tokens first .. last - 1, for some rows."""
    x, out = m.logit_inputs + 4 * row * padded(m.dim), m.logits + 4 * row * m.vocab_size
    call_matmul(
        m.matmul, x, n_rows, padded(m.dim), m.output, m.dim, m.output_scale, first, last, out, m.vocab_size
    )  # fmt: skip


@inner
def logits(m, block, texts, images):
    """One block of the logits: text for the first rows, image tokens for the rows after them."""
    text = m.vocab_size - m.first_text if texts else 0
    each, each_image = width(m, text), width(m, m.eoi - m.first_code)
    n_text_blocks = (text + each - 1) // each
    if block >= n_text_blocks:
        first = m.first_code + (block - n_text_blocks) * each_image
        part_of_logits(m, texts, images, first, min(first + each_image, m.eoi))
        return
    first = m.first_text + block * each
    part_of_logits(m, 0, texts, first, min(first + each, m.vocab_size))
    if block == 0:
        for special in (m.eos, m.boi, m.eot):
            part_of_logits(m, 0, texts, special, special + 1)


@inner
def blocks_of(m, phase, job):
    """The number of blocks in a phase."""
    _, n, texts, images = job
    if phase in (EMBED, CHOOSE):
        return n
    if phase != LOGITS:
        return blocks(m, phase % PHASES, n)
    text, image = m.vocab_size - m.first_text if texts else 0, m.eoi - m.first_code if images else 0
    each, each_image = width(m, text), width(m, image)
    return (text + each - 1) // each + (image + each_image - 1) // each_image


@inner
def do(m, m_address, phase, block, job, thread, scratch):
    if phase == EMBED:
        embed(m, block)
    elif phase == LOGITS:
        logits(m, block, job[2], job[3])
    elif phase == CHOOSE:
        call_choose(m.choose, m_address, ints(m.cond_slots, m.n_slots)[block], thread)
    else:
        call_do_block(m.do_block, m_address, phase // PHASES, phase % PHASES, block, job[1], scratch)


def run(m_address, thread, n, steps, n_queued):
    """Thread 0 leads: it runs the model on the first n_queued tokens of the queue, then up to `steps` decode steps of
    the first n slots, and writes to the board how many until all slots were done. The others follow until no job comes
    for a moment."""
    m = map_at(m_address)
    step, seen, start, job = 0, 0, 0, (STOP, 0, 0, 0)
    scratch = m.scratch + 4 * thread * m.scratch_size
    while True:
        # 1. The next job
        if thread > 0:
            seen, job, start = await_job(m.board, seen)
        else:
            if job[0] == SAMPLE:
                n_queued = queue_tokens(m, n, step)
                step += 1
            job = (FORWARD, n_queued, 0, 0) if n_queued else (STOP, 0, 0, 0)
            if not n_queued and step < steps:
                job = plan_sampling(m, n)
            n_queued = 0
            if job[0] != STOP:
                start = post(m.board, job)
        if job[0] == STOP:
            if thread == 0:
                put(m.board + MADE, step)
            return
        # 2. Its phases, each shared by all threads
        for phase in range(EMBED, m.n_layers * PHASES) if job[0] == FORWARD else range(LOGITS, EMBED):
            count = blocks_of(m, phase, job)
            for block in share(m.board, start, count):
                do(m, m_address, phase, block, job, thread, scratch)
            start += count


@cache
def runner() -> Callable[[int, int, int, int, int], None]:
    """`run` for Python; ctypes releases the GIL while it runs."""
    native = compiled(run, 5)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(native.address)
    function.keep = native
    return function
