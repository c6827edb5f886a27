"""Steps of a running batch, one after the other without Python in between: choose an id for each row, read it, again.

The first member of the team leads: between two jobs it alone looks at the rows and says what comes next. It sees each
row's state, so logits are made of what may come alone, rows that have ended cost nothing, and any number of steps
needs no look by the host.
"""

import ctypes
from collections.abc import Callable
from functools import cache

from nanochameleon.generation.cpu.choose import advance, branch, call_choose, done, kind, number
from nanochameleon.generation.cpu.layers import PHASES, blocks, call_do_block, embed, width
from nanochameleon.generation.cpu.matmul import call_product
from nanochameleon.generation.cpu.memory import inner, ints, map_at, padded
from nanochameleon.generation.cpu.threads import MADE, await_job, post, put, share
from nanochameleon.generation.sampling import FULL, IMAGE, LENGTH, NOTHING, READS
from nanochameleon.kernels.cpu.launch import compiled
from nanochameleon.kernels.cpu.simd import read_row

STOP, READ, CHOOSE = range(3)  # jobs
LOGITS, PICK, EMBED = -3, -2, -1  # the phases of choosing, and that in front of the layers'

# ---------------------------------------------------------------------------------------------------------------------
# The leader, between two jobs


@inner
def plan(m, n):
    """Which of n rows choose, and whose logits they want: of images those of the branches, too -> the job."""
    leads, places = ints(m.leads, m.n_rows), ints(m.places, m.n_rows)
    n_leads = n_places = n_texts = 0
    for images in (False, True):
        for row in range(n):
            what, lead = kind(m, row), branch(m, FULL, row) == row
            if not images and lead and not done(m, row):
                leads[n_leads] = row
                n_leads += 1
            if what == IMAGE if images else what < IMAGE and lead:
                places[row] = n_places
                read_row(m.hidden + 4 * row * m.dim, 4, m.dim, m.asking + 4 * n_places * padded(m.dim))
                n_places += 1
        n_texts = n_texts if images else n_places
    return (CHOOSE if n_leads else STOP), n_leads, n_texts, n_places - n_texts


@inner
def feed(m, n, step):
    """All rows of a sample take its id, and those that read such ids queue up -> how many do.

    A branch of guidance reads images alone, or the open image alone: that begins behind its <s> each time.
    """
    queue, log = ints(m.queue, 3 * m.ids), ints(m.log + 8 * step * m.n_rows, m.n_rows)
    numbers, waiting = ints(m.numbers, 6 * m.n_rows), 0
    for row in range(n):
        log[row] = m.pad
        if done(m, row):
            continue
        token, reads = ints(m.chosen, m.n_rows)[branch(m, FULL, row)], number(m, READS, row)
        log[row] = token
        advance(m, row, token)
        if reads != FULL and not m.first_code <= token <= m.boi:
            continue
        position = 1 if reads == NOTHING and token == m.boi else number(m, LENGTH, row)
        numbers[LENGTH * m.n_rows + row] = position + 1
        if not done(m, row):
            for i, x in enumerate((token, row, position)):
                queue[i * m.ids + waiting] = x
            waiting += 1
    return waiting


# ---------------------------------------------------------------------------------------------------------------------
# Everybody


@inner
def some_logits(m, place, places, first, last):
    """Ids first .. last - 1 of some places."""
    x, out = m.asking + 4 * place * padded(m.dim), m.logits + 4 * place * m.vocab_size
    call_product(
        m.product, x, places, padded(m.dim), m.output, m.dim, m.output_scale, first, last, out, m.vocab_size
    )  # fmt: skip


@inner
def logits(m, block, texts, images):
    """A block of the logits of text for the first places, of codes for those behind them."""
    text = m.vocab_size - m.first_text if texts else 0
    each, each_code = width(m, text), width(m, m.eoi - m.first_code)
    count = (text + each - 1) // each
    if block >= count:
        first = m.first_code + (block - count) * each_code
        some_logits(m, texts, images, first, min(first + each_code, m.eoi))
        return
    first = m.first_text + block * each
    some_logits(m, 0, texts, first, min(first + each, m.vocab_size))
    if block == 0:
        for end in (m.eos, m.boi, m.eot):
            some_logits(m, 0, texts, end, end + 1)


@inner
def blocks_of(m, phase, job):
    _, n, texts, images = job
    if phase in (EMBED, PICK):
        return n
    if phase != LOGITS:
        return blocks(m, phase % PHASES, n)
    text, codes = m.vocab_size - m.first_text if texts else 0, m.eoi - m.first_code if images else 0
    each, each_code = width(m, text), width(m, codes)
    return (text + each - 1) // each + (codes + each_code - 1) // each_code


@inner
def do(m, where, phase, block, job, member, scratch):
    if phase == EMBED:
        embed(m, block)
    elif phase == LOGITS:
        logits(m, block, job[2], job[3])
    elif phase == PICK:
        call_choose(m.choose, where, ints(m.leads, m.n_rows)[block], member)
    else:
        call_do_block(m.do_block, where, phase // PHASES, phase % PHASES, block, job[1], scratch)


def run(where, member, n, steps, reading):
    """The leader: reads the queue's first `reading` ids, then makes up to `steps` steps of the first n rows, and leaves
    on the board how many until all had ended. The others follow until nothing comes for a moment."""
    m = map_at(where)
    step, seen, start, job = 0, 0, 0, (STOP, 0, 0, 0)
    scratch = m.scratch + 4 * member * m.floats
    while True:
        if member > 0:
            seen, job, start = await_job(m.board, seen)
        else:
            if job[0] == CHOOSE:
                reading = feed(m, n, step)
                step += 1
            job = (READ, reading, 0, 0) if reading else (STOP, 0, 0, 0)
            if not reading and step < steps:
                job = plan(m, n)
            reading = 0
            if job[0] != STOP:
                start = post(m.board, job)
        if job[0] == STOP:
            if member == 0:
                put(m.board + MADE, step)
            return
        for phase in range(EMBED, m.n_layers * PHASES) if job[0] == READ else range(LOGITS, EMBED):
            count = blocks_of(m, phase, job)
            for block in share(m.board, start, count):
                do(m, where, phase, block, job, member, scratch)
            start += count


@cache
def runner() -> Callable[[int, int, int, int, int], None]:
    """`run` for Python, whose lock it leaves alone."""
    native = compiled(run, 5)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(native.address)
    function.keep = native
    return function
