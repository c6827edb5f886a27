"""Generation: ids in, ids out, one step an id, many rows at once, each in its own state of text or picture.

    prompts, left-padded -> prefill -> [logits of what may come -> guide -> filter -> pick -> feed] until all have ended

Padding has document id -1, which attention never sees, and positions count from each row's <s>, so a row's ids do not
depend on the rows beside it. With guidance every row has an unconditional twin that reads [<s>, <boi>, codes so far].
It leaves out CUDA graphs, a scheduler that takes in new rows, and any knowledge of pixels.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nanochameleon.config import SampleConfig
from nanochameleon.data import RawDocument, fuse
from nanochameleon.documents import Image, Text, render
from nanochameleon.errors import UserError
from nanochameleon.run import Run
from nanochameleon.sampling import CLOSE, OPEN, PICTURE, SHUT, Grammar, Mode, filtered, guide, pick
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.transformer import Chameleon, KVCache
from nanochameleon.vocab import Vocab

# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def prompt_ids(segments: RawDocument, run: Run, ask: Literal["draw", "answer", "go on"] = "go on") -> list[int]:
    """<s> and the segments, as in training; then <boi> to have a picture drawn, or the end of turn to have an answer.

    segments: Text, data.Picture (uint8 (R, R, 3)) and EndOfTurn in any order, no closing EndOfTurn needed for "answer".
    """
    ids = render(fuse([segments], run.images)[0], run.tokenizer, run.vocab, end=False)
    return ids + {"draw": [run.vocab.boi], "answer": [run.vocab.eot], "go on": []}[ask]


def open_picture(prompt: Sequence[int], vocab: Vocab) -> list[int] | None:
    """<boi> and the codes behind it where a prompt ends inside a picture, else None."""
    start = len(prompt)
    while start and vocab.first_code <= prompt[start - 1] < vocab.eoi:
        start -= 1
    return list(prompt[start - 1 :]) if start and prompt[start - 1] == vocab.boi else None


def start_grammar(
    model: Chameleon,
    prompts: Sequence[Sequence[int]],
    vocab: Vocab,
    n_codes: int,
    options: SampleConfig,
    mode: Mode,
    stops: Sequence[int] | None,
) -> Grammar:
    """Each row's state after its prompt. Raises UserError, naming the lengths, for a prompt that leaves no room."""
    context, left, room = model.cfg.max_seq_len, [], []
    for prompt in prompts:
        if not prompt or prompt[0] != vocab.bos:
            raise ValueError("a prompt starts with <s>")
        begun = open_picture(prompt, vocab)
        left.append(-1 if begun is None else n_codes + 1 - len(begun))
        need = left[-1] + 1 if begun is not None else n_codes + 2 if mode == "image" else 1
        what = "one new id" if need == 1 else f"the {need} ids of a picture"
        if len(prompt) + need > context:
            raise UserError(
                f"the prompt has {len(prompt)} ids, which leaves no room for {what} in a context of {context}"
            )
        if options.max_new < need:
            raise UserError(f"max_new is {options.max_new}, which leaves no room for {what}")
        room.append(min(options.max_new, context - len(prompt)))
    device = model.output.weight.device
    return Grammar.start(
        vocab, n_codes, mode, torch.tensor(left, device=device), torch.tensor(room, device=device), stops
    )


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def pad_left(rows: Sequence[Sequence[int]], width: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of ids -> tokens, positions, doc_ids, each (N, width): padding in front, document -1, position 0."""
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    gaps = width - torch.tensor([len(row) for row in rows])
    positions = torch.arange(width) - gaps[:, None]
    return tokens, positions.clamp(min=0), torch.where(positions < 0, -1, 0)


@dataclass
class Rows:
    """N rows in one cache, or 2 N with the unconditional twins behind them.

    Outside of a picture a twin is fed <s> as a new document at each step, so it always stands right before a <boi>.
    """

    model: Chameleon
    cache: KVCache
    twins: bool
    n: int
    positions: Tensor = field(init=False)  # (N or 2 N,) of the newest id
    doc_ids: Tensor = field(init=False)

    def prefill(self, prompts: Sequence[Sequence[int]], vocab: Vocab) -> Tensor:
        """Hidden states (N or 2 N, D) at the last id of each prompt."""
        rows = list(prompts)
        if self.twins:
            rows += [[vocab.bos, *(open_picture(prompt, vocab) or [])] for prompt in prompts]
        tensors = pad_left(rows, max(map(len, rows)), vocab.pad)
        tokens, positions, doc_ids = (x.to(self.cache.doc_ids.device) for x in tensors)
        self.positions, self.doc_ids = positions[:, -1], doc_ids[:, -1]
        return self.model(tokens, positions, doc_ids, self.cache)[:, -1]

    def feed(self, ids: Tensor, grammar: Grammar) -> Tensor:
        """The rows' next ids (N,), after which `grammar` holds -> hidden states (N or 2 N, D)."""
        positions, doc_ids = self.positions[: self.n] + 1, self.doc_ids[: self.n]
        if self.twins:
            inside = grammar.left >= 0
            ids = torch.cat([ids, torch.where(inside, ids, grammar.vocab.bos)])
            positions = torch.cat([positions, torch.where(inside, self.positions[self.n :] + 1, 0)])
            doc_ids = torch.cat([doc_ids, self.doc_ids[self.n :] + ~inside])
        self.positions, self.doc_ids = positions, doc_ids
        return self.model(ids[:, None], positions[:, None], doc_ids[:, None], self.cache)[:, 0]


def choose(model: Chameleon, hidden: Tensor, grammar: Grammar, options: SampleConfig, uniforms: Tensor) -> Tensor:
    """Hidden states (N or 2 N, D) and one uniform number a row (N,) -> ids (N,).

    Logits are computed for the rows that have a choice, and in a picture for the codes alone.
    """
    vocab, n, o = grammar.vocab, len(uniforms), options
    kinds = grammar.kinds()
    ids = torch.where(kinds == CLOSE, vocab.eoi, vocab.pad)
    in_text = ((kinds == OPEN) | (kinds == SHUT), slice(0, vocab.size), (o.temperature, o.top_k, o.top_p))
    in_picture = (
        kinds == PICTURE,
        slice(vocab.first_code, vocab.eoi),
        (o.image_temperature, o.image_top_k, o.image_top_p),
    )
    for which, columns, settings in (in_text, in_picture):
        rows = which.nonzero()[:, 0]
        if not len(rows):
            continue
        weight = model.output.weight[columns]
        logits = F.linear(hidden[rows], weight).float()
        if columns is in_picture[1] and len(hidden) > n:
            logits = guide(logits, F.linear(hidden[n + rows], weight).float(), o.guidance)
        logits = logits.masked_fill(~grammar.table[kinds[rows], columns], -torch.inf)
        ids[rows] = pick(filtered(logits, *settings), uniforms[rows.to(uniforms.device)]) + columns.start
    return ids


@torch.inference_mode()
def steps(
    model: Chameleon, prompts: Sequence[Sequence[int]], grammar: Grammar, options: SampleConfig, uniforms: Tensor
) -> Iterator[tuple[Tensor, Grammar]]:
    """Yields each step's ids (N,), pad for rows that have ended, and the state after them, until all rows have ended.

    uniforms: (N, S) float64, one for each row and step, S at least the largest room.
    """
    device, n_steps = model.output.weight.device, int(grammar.room.max())
    auto = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if auto else model.output.weight.dtype
    pictures = grammar.mode != "text" or bool((grammar.left >= 0).any())
    twins = pictures and options.guidance != 1
    longest = max(map(len, prompts))
    cache = KVCache.empty(model.cfg, len(prompts) * (1 + twins), longest + n_steps, device, dtype)
    rows = Rows(model, cache, twins, len(prompts))
    hidden = rows.prefill(prompts, grammar.vocab)
    if device.type != "mps":  # which has no float64; pick moves what it needs
        uniforms = uniforms.to(device)
    for step in range(n_steps):
        ids = choose(model, hidden, grammar, options, uniforms[:, step])
        grammar = grammar.after(ids)
        yield ids, grammar
        if grammar.done.all():
            return
        hidden = rows.feed(ids, grammar)


def row_uniforms(seed: int, rows: Sequence[int], n: int) -> Tensor:
    """(len(rows), n) float64 in [0, 1): row r's are a function of (seed, r) alone."""
    return torch.from_numpy(np.stack([np.random.default_rng((seed, row)).random(n) for row in rows]))


# ---------------------------------------------------------------------------------------------------------------------
# Many rows


def generate(
    model: Chameleon,
    prompts: Sequence[Sequence[int]],
    vocab: Vocab,
    n_codes: int,
    options: SampleConfig,
    mode: Mode = "both",
    seed: int = 0,
    stops: Sequence[int] | None = None,
    batch_size: int = 256,
    progress: str | None = None,
) -> list[list[int]]:
    """The new ids of each prompt, the stop id included, on the model's device.

    n_codes: codes a picture. mode: "text", "image" (one picture) or "both", see Grammar. Row i draws its numbers from
    (seed, i), whatever the batch. stops: ids that end a row, by default </s> alone. progress: shows a bar of this name.
    Raises UserError for a prompt without room.
    """
    grammars = [  # all of them first: a prompt that is too long is refused before any work
        start_grammar(model, prompts[i : i + batch_size], vocab, n_codes, options, mode, stops)
        for i in range(0, len(prompts), batch_size)
    ]
    out, was_training = [], model.training
    totals = [int(grammar.room.max()) for grammar in grammars]
    bar = tqdm(total=sum(totals), desc=progress, unit="step", disable=progress is None)
    model.eval()
    try:
        for number, (grammar, total) in enumerate(zip(grammars, totals, strict=True)):
            batch = prompts[number * batch_size : (number + 1) * batch_size]
            first = number * batch_size
            uniforms = row_uniforms(seed, range(first, first + len(batch)), total)
            out += run_batch(steps(model, batch, grammar, options, uniforms), vocab.pad, bar)
            bar.update(sum(totals[: number + 1]) - bar.n)
    finally:
        model.train(was_training)
        bar.close()
    return out


def run_batch(batch: Iterator[tuple[Tensor, Grammar]], pad: int, bar: tqdm) -> list[list[int]]:
    """The ids of each row up to its end; pad is never drawn, so the first one is behind it."""
    columns = []
    for ids, _ in batch:
        columns.append(ids)
        bar.update()
    return [row[: row.index(pad)] if pad in row else row for row in torch.stack(columns, 1).tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# One row, as it comes


@dataclass(frozen=True)
class PictureStarted:
    """The model has begun to draw."""


@dataclass(frozen=True)
class End:
    ids: tuple[int, ...]  # all new ids, the stop id included


Event = Text | PictureStarted | Image | End


def stream(
    model: Chameleon,
    prompt: Sequence[int],
    tokenizer: TextTokenizer,
    n_codes: int,
    options: SampleConfig,
    mode: Mode = "both",
    seed: int = 0,
    row: int = 0,
    stops: Sequence[int] | None = None,
) -> Iterator[Event]:
    """What generate gives as row `row`, event by event: pieces of text, none of which splits a character, pictures.

    The model must be in eval mode. Raises UserError, at the call and not later, for a prompt without room.
    """
    if model.training:
        raise ValueError("call model.eval() before stream: dropout would be on")
    grammar = start_grammar(model, [prompt], tokenizer.vocab, n_codes, options, mode, stops)
    uniforms = row_uniforms(seed, [row], int(grammar.room.max()))
    return events(steps(model, [prompt], grammar, options, uniforms), prompt, tokenizer)


def events(run: Iterator[tuple[Tensor, Grammar]], prompt: Sequence[int], tokenizer: TextTokenizer) -> Iterator[Event]:
    """Steps of one row -> events."""
    vocab, letters, new = tokenizer.vocab, codecs.getincrementaldecoder("utf-8")("replace"), []
    picture = open_picture(prompt, vocab)
    if picture is not None:
        yield PictureStarted()
    for ids, _ in run:
        token = int(ids[0])
        new.append(token)
        is_text = vocab.is_text(token)
        text = letters.decode(tokenizer.decode_bytes([token]) if is_text else b"", final=not is_text)
        if text:
            yield Text(text)
        if token == vocab.boi:
            picture = [token]
            yield PictureStarted()
        elif token == vocab.eoi:
            yield Image(codes_of(picture, vocab))
            picture = None
        elif picture is not None:
            picture.append(token)
    if text := letters.decode(b"", final=True):
        yield Text(text)
    yield End(tuple(new))


def codes_of(picture: Sequence[int], vocab: Vocab) -> tuple[int, ...]:
    """<boi> and picture ids -> codes."""
    return tuple(vocab.id_to_code(token) for token in picture[1:])
