"""The rows of a running batch as tensors that stay in place, and one step of all of them at once.

    step: hidden states -> logits of what may come -> guide -> filter -> draw -> grammar -> feed -> hidden states

No shape and no branch depends on a value, so that a step is one CUDA graph and the host looks only when it wants to.
Every row has a cache, a length, options and uniform numbers of its own. With guidance a sample has up to three rows:
one that read the whole prompt, one that read its images alone, and one that reads [<s>, <boi>, codes so far]. All
take the ids of the first. Which request has which row is the host's to know (engine.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nanochameleon.config import SamplingParams
from nanochameleon.generation.decode_torch import TorchStep
from nanochameleon.generation.sampling import (
    BY_RULES,
    CLOSE,
    COUNT,
    DONE,
    FULL,
    GUIDANCE,
    GUIDANCE_IMAGE,
    IMAGE,
    IMAGES,
    LEFT,
    LENGTH,
    NOTHING,
    PENALTY,
    READS,
    ROOM,
    STATE,
    TEMPERATURE,
    Grammar,
    Mode,
    Options,
    filtered,
    grammar_tables,
    guide,
    pick,
    repetition,
    rules_of,
)
from nanochameleon.kernels.dispatch import why_numba_unavailable
from nanochameleon.parallel.sharding import is_sharded
from nanochameleon.transformer import Chameleon, KVCache
from nanochameleon.vocab import Vocab

Columns = Literal["text", "image", "all"]


@dataclass(frozen=True)
class Task:
    """One sample to be made."""

    prompt: tuple[int, ...]  # begins with <s>
    options: SamplingParams
    mode: Mode
    seed: tuple[int, ...]
    stops: tuple[int, ...] | None
    left: int  # codes that an image left open by the prompt lacks; -1 without
    room: int  # ids to write at most


def uniforms(seed: Sequence[int], n: int) -> Tensor:
    """(n,) float64 in [0, 1), a function of the seed alone."""
    return torch.from_numpy(np.random.default_rng(seed).random(n))


class Decoder:
    """N rows, of which a step runs the first n. All tensors are made here, and written in place from then on."""

    def __init__(self, model: Chameleon, vocab: Vocab, n_codes: int, rows: int, context: int):
        device = model.output.weight.device
        self.model, self.vocab, self.context, self.device = model, vocab, context, device
        auto = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if auto else model.tok_embeddings.weight.dtype
        self.cache = KVCache.empty(model.cfg, rows, context, device, dtype)
        self.hidden = torch.zeros(rows, model.cfg.dim, device=device, dtype=dtype)  # at the newest id, normed
        self.numbers = torch.zeros(6, rows, dtype=torch.long, device=device)  # BY_RULES .. LENGTH
        tables = (table.to(device) for table in grammar_tables(vocab, n_codes))
        state = (self.numbers[name] for name in (BY_RULES, LEFT, ROOM))
        ended = torch.ones(rows, dtype=torch.bool, device=device)
        self.grammar = Grammar(vocab, n_codes, *tables, *state, ended)
        self.count, self.length = self.numbers[COUNT], self.numbers[LENGTH]  # ids drawn; ids in the cache
        self.options = Options.of([SamplingParams()] * rows, device)
        self.seen = torch.zeros(rows, vocab.size, dtype=torch.bool, device=device)  # ids of the context
        self.uniforms = torch.zeros(
            rows, context, dtype=torch.float64, device="cpu" if device.type == "mps" else device
        )
        self.sample = torch.zeros(3, rows, dtype=torch.long, device=device)  # the sample's row that reads each of them
        self.log = torch.zeros(n_codes + 1, rows, dtype=torch.long, device=device)  # ids since the host last looked
        self.tick = torch.zeros(1, dtype=torch.long, device=device)  # steps since then
        self.cpu = self.joined = None
        if auto or any(is_sharded(x) for x in model.parameters()):  # sums in place have rules of their own there
            return
        compiles = why_numba_unavailable(device, torch.float32) is None
        if compiles and all(x.dtype == torch.float32 for x in model.parameters()):
            from nanochameleon.generation.cpu.decode import CPUDecoder

            self.cpu = CPUDecoder(self)
        else:
            self.joined = TorchStep(model, context)

    def row_tensors(self) -> list[Tensor]:
        """All that belongs to a row, rows first, but for its cache and its place in `sample`."""
        return [self.hidden, self.seen, self.uniforms, self.numbers.T, self.grammar.done, self.options.table.T]

    # -----------------------------------------------------------------------------------------------------------------
    # What the host does with a row

    def prefill(self, parts: Sequence[tuple[Sequence[int], int, int]]) -> None:
        """(ids, row, start): a prompt's next ids, from place `start`, into a row's cache and its hidden state."""
        for ids, row, start in parts:
            self.length[row] = start + len(ids)  # steps of other rows, before this one begins, write behind it
        if self.cpu is not None:
            return self.cpu.read(parts)
        for ids, row, start in parts:
            tokens, places = (torch.tensor([x], device=self.device) for x in (ids, range(start, start + len(ids))))
            cache = self.cache.view(slice(row, row + 1), places, start + len(ids))
            self.hidden[row] = self.model(tokens, places, cache=cache)[0, -1]

    def share(self, source: int, target: int, length: int) -> None:
        """`target` has the prompt that has just been read into `source`."""
        self.cache.copy_prefix(source, target, length)
        self.length[target], self.hidden[target] = length, self.hidden[source]

    def begin(self, row: int, task: Task, reads: int) -> None:
        """A prompt that has been read whole: from the next step on the row takes part."""
        numbers = [rules_of(task.mode, task.stops, self.vocab), task.left, task.room, 0, reads]
        self.numbers[:LENGTH, row] = torch.tensor(numbers, device=self.device)
        self.grammar.done[row] = False
        self.options.table[:, row] = Options.of([task.options], self.device).table[:, 0]
        self.seen[row] = False
        self.seen[row, torch.tensor(task.prompt, device=self.device)] = True
        self.uniforms[row, : task.room] = uniforms(task.seed, task.room)

    def move(self, source: int, target: int, length: int) -> None:
        self.cache.copy_prefix(source, target, length)
        for x in self.row_tensors():
            x[target] = x[source]

    def look(self, n: int, steps: int) -> tuple[list[list[int]], list[bool]]:
        """-> each of n rows' ids of the last steps, pad behind its end; which have ended. The one trip to the host."""
        self.tick.zero_()
        ids = torch.cat([self.log[:steps, :n], self.grammar.done[None, :n].long()]).T.tolist()
        return [row[:-1] for row in ids], [bool(row[-1]) for row in ids]

    # -----------------------------------------------------------------------------------------------------------------
    # A step

    def step(self, n: int, span: int, columns: Columns, guided: bool, needs: tuple[bool, bool, bool]) -> None:
        """One id for each of the first n rows. span: places of the cache in sight, at least the longest row's next.

        columns: of the logits, "text" where no row is in an image, "image" where all are. guided: some sample has
        more than one row. needs: see needed() in sampling.py.
        """
        grammar = self.grammar.rows(slice(0, n))
        ids = self.choose(n, grammar, columns, guided, needs)
        if guided:
            ids = ids[self.sample[FULL, :n]]
        after = grammar.after(ids)
        for name in STATE:
            getattr(grammar, name).copy_(getattr(after, name))
        self.log[:, :n].index_copy_(0, self.tick, ids[None])
        self.tick.add_(1)
        self.count[:n].add_(1)
        self.seen[:n].scatter_(1, ids[:, None], True)
        self.feed(n, ids, span)

    def choose(
        self, n: int, grammar: Grammar, columns: Columns, guided: bool, needs: tuple[bool, bool, bool]
    ) -> Tensor:
        """ids (n,) from the rows' hidden states."""
        vocab, kinds, options = self.vocab, grammar.kinds(), Options(self.options.table[:, :n])
        draws, sorts, penalised = needs
        in_image = kinds == IMAGE
        logits = self.logits(self.hidden[:n], columns)
        if guided and columns != "text":
            full, image, nothing = (logits[self.sample[reads, :n]] for reads in (FULL, IMAGES, NOTHING))
            by_image = guide(full, image, nothing, options.table[GUIDANCE], options.table[GUIDANCE_IMAGE])
            logits = torch.where(in_image[:, None], by_image, logits)
        if columns != "image":
            if penalised:
                penalty = options.table[PENALTY].masked_fill(in_image, 1.0)
                logits = repetition(logits, self.taken(self.seen[:n], columns), penalty)
            logits = logits.masked_fill(~self.taken(grammar.allowed(kinds), columns), -torch.inf)
        ids = logits.argmax(-1)
        if draws:
            uniforms = self.uniforms[:n].gather(
                1, self.count[:n, None].clamp(max=self.context - 1).to(self.uniforms.device)
            )[:, 0]
            drawn = pick(filtered(logits, options, in_image, sorts), uniforms)
            ids = torch.where(options.of_each(TEMPERATURE, in_image) > 0, drawn, ids)
        if columns == "image":
            ids = ids + vocab.first_code
        elif columns == "text":
            ids = torch.where(ids < vocab.first_code, ids, ids + vocab.n_codes)
        return torch.where(kinds == CLOSE, vocab.eoi, torch.where(kinds == DONE, vocab.pad, ids))

    def logits(self, hidden: Tensor, columns: Columns) -> Tensor:
        """(n, D) -> (n, V'), float32 or wider, of the columns that may come."""
        parts = [self.model.logits(hidden, part) for part in self.slices(columns)]
        logits = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return logits if logits.dtype == torch.float64 else logits.float()

    def slices(self, columns: Columns) -> list[slice]:
        """Ids in front of the codes, codes, ids behind them."""
        first, behind = self.vocab.first_code, self.vocab.eoi
        front, codes, back = slice(0, first), slice(first, behind), slice(behind, self.vocab.size)
        return {"text": [front, back], "image": [codes], "all": [slice(0, self.vocab.size)]}[columns]

    def taken(self, x: Tensor, columns: Columns) -> Tensor:
        """The same columns of (n, V)."""
        return torch.cat([x[:, part] for part in self.slices(columns)], -1)

    def feed(self, n: int, ids: Tensor, span: int) -> None:
        """Each row reads its sample's next id, if it reads such ids; if not, what it writes is overwritten later."""
        vocab, reads, length = self.vocab, self.numbers[READS, :n], self.length[:n]
        of_image = (ids >= vocab.first_code) & (ids <= vocab.boi)
        begins = (reads == NOTHING) & (ids == vocab.boi)  # [<s>] is in the cache, and the last image is forgotten
        positions = torch.where(begins, 1, length).clamp(max=self.context - 1)
        goes_on = ((reads == FULL) | of_image) & (ids != vocab.pad)
        length.copy_(torch.where(goes_on, positions + 1, length))
        cache = self.cache.view(slice(0, n), positions[:, None], span)
        if self.joined is not None:
            self.hidden[:n] = self.joined(ids, positions, cache)
        else:
            self.hidden[:n] = self.model(ids[:, None], positions[:, None], cache=cache)[:, 0]
