"""Generation: prompts join a running batch and leave it one by one, each in its own state of text or image.

    add(prompt) -> wait -> prefill, chunk by chunk -> steps of all rows at once -> ids -> leave

The host decides who has which row and when to look; all else is tensors (decoder.py). While every row is in an image
nothing is looked at until the first of them ends: the grammar knows what comes. A sample's ids depend on its prompt,
options and seed alone, not on who shares its batch: bit for bit in float32 on a CPU; elsewhere up to rounding, since
there a product may add up in another order in a batch of another size.
It knows nothing of pixels.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from tqdm import tqdm

from nanochameleon.config import SamplingParams
from nanochameleon.data import RawDocument, fuse
from nanochameleon.documents import render
from nanochameleon.errors import UserError
from nanochameleon.generation.decoder import Decoder, Task
from nanochameleon.generation.events import Event, Reader, open_image
from nanochameleon.generation.graphs import Graphs
from nanochameleon.generation.sampling import FULL, IMAGES, NOTHING, Mode, check_stops, needed
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.run import Run
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def prompt_ids(segments: RawDocument, run: Run, ask: Literal["draw", "answer", "go on"] = "go on") -> list[int]:
    """<s> and the segments, as in training; then <boi> to have an image drawn, or the end of turn to have an answer.

    segments: Text, data.RawImage (uint8 (R, R, 3)) and EndOfTurn in any order; "answer" closes the turn by itself.
    """
    ids = render(fuse([segments], run.image_tokenizer)[0], run.tokenizer, run.vocab, end=False)
    return ids + {"draw": [run.vocab.boi], "answer": [run.vocab.eot], "go on": []}[ask]


def make_task(
    prompt: Sequence[int], vocab: Vocab, n_codes: int, context: int, options: SamplingParams, mode: Mode = "both",
    seed: Sequence[int] = (0,), stops: Sequence[int] | None = None,
) -> Task:  # fmt: skip
    """Raises UserError, naming the lengths, for a prompt that leaves no room, ValueError for a wrong mode or stop."""
    if not prompt or prompt[0] != vocab.bos:
        raise ValueError("a prompt starts with <s>")
    if wrong := [token for token in prompt if not 0 <= token < vocab.size]:
        raise ValueError(f"the prompt has id {wrong[0]}, and the vocabulary has {vocab.size}")
    check_stops(mode, stops, vocab)
    begun = open_image(prompt, vocab)
    left = -1 if begun is None else n_codes + 1 - len(begun)
    if begun is not None and left < 0:
        codes = f"{len(begun) - 1} codes, and an image has {n_codes}"
        raise UserError(f"the image that the prompt leaves open has {codes}: end it with <eoi>, or leave codes out")
    need = left + 1 if begun is not None else n_codes + 2 if mode == "image" else 1
    what = "one new id" if need == 1 else f"the {need} ids of an image"
    if len(prompt) + need > context:
        raise UserError(f"the prompt has {len(prompt)} ids, which leaves no room for {what} in a context of {context}")
    if options.max_new_tokens < need:
        raise UserError(f"max_new_tokens is {options.max_new_tokens}, which leaves no room for {what}")
    room = min(options.max_new_tokens, context - len(prompt))
    return Task(tuple(prompt), options, mode, tuple(seed), None if stops is None else tuple(stops), left, room)


def branches(task: Task, vocab: Vocab) -> dict[int, tuple[int, ...]]:
    """What is read beside the whole prompt, for guidance: IMAGES and NOTHING -> its prompt. Only what makes a
    difference: without earlier images the image to come has seen nothing but words."""
    by_text, by_image = task.options.guidance_scale, task.options.image_guidance_scale
    if task.mode == "text" and task.left < 0:
        return {}
    begun = tuple(open_image(task.prompt, vocab) or ())
    nothing = {NOTHING: (vocab.bos, *begun)}
    images = tuple(t for t in task.prompt if t == vocab.bos or vocab.first_code <= t <= vocab.boi)
    if by_text == by_image or (task.mode != "both" and images == nothing[NOTHING]):  # the middle term is 0
        return nothing if by_text != 1 else {}
    return {IMAGES: images} if by_image == 1 else {IMAGES: images} | nothing


# ---------------------------------------------------------------------------------------------------------------------
# The engine


@dataclass(eq=False)
class Row:
    """A row of the batch: where it is, and how far its prompt has been read."""

    place: int
    reads: int
    prompt: tuple[int, ...]
    read: bool = False  # all of it?


@dataclass(eq=False)
class Sample:
    """A task at work, on one to three rows; the first reads everything."""

    handle: int
    task: Task
    rows: list[Row]
    left: int  # as in Grammar, as far as the host has looked
    n_new: int = 0
    begun: bool = False


@dataclass(frozen=True)
class News:
    """What the host has seen of one sample since it last looked."""

    handle: int
    ids: tuple[int, ...]
    ended: bool


@dataclass
class Engine:
    """A running batch. add() queues a task; each step() reads a chunk of the waiting prompts, runs some decode steps
    and tells the news. The model must be in eval mode and keep its weights as long as the engine is in use."""

    model: Chameleon
    vocab: Vocab
    n_codes: int  # codes an image
    n_rows: int = 16  # of the batch; a sample takes one, with guidance up to three
    context: int | None = None  # ids a row can hold; None: as many as the model
    chunk: int = 512  # ids of prompts read between two stretches of decoding
    look: int | None = None  # steps between two looks at most; None: as many as need none
    blind: int = 16  # steps of text without a look, on a CPU, where nobody waits for rows: a step sees ends by itself
    waiting: deque[tuple[int, Task]] = field(default_factory=deque, init=False)
    running: list[Sample] = field(default_factory=list, init=False)
    prompts: dict[tuple[int, ...], list[Row]] = field(default_factory=dict, init=False)  # being read, by whom
    n_live: int = field(default=0, init=False)  # rows in use: the first of the batch
    n_added: int = field(default=0, init=False)

    def __post_init__(self):
        if self.model.training:
            raise ValueError("call model.eval() first: dropout would be on")
        most = self.model.cfg.max_seq_len
        self.context = most if self.context is None else self.context
        if not 1 <= self.context <= most:
            raise ValueError(f"context must be 1 to the model's {most} ids, not {self.context}")
        self.read: dict[tuple[int, ...], int] = {}  # ids of a prompt that have been read
        with torch.inference_mode():
            self.decoder = Decoder(self.model, self.vocab, self.n_codes, self.n_rows, self.context)
        self.graphs = Graphs(self.decoder.device)

    def add(self, prompt: Sequence[int], options: SamplingParams, mode: Mode = "both", seed: Sequence[int] = (0,),
            stops: Sequence[int] | None = None) -> int:  # fmt: skip
        """-> the handle by which its news are told. Raises UserError for a prompt without room."""
        return self.add_task(make_task(prompt, self.vocab, self.n_codes, self.context, options, mode, seed, stops))

    def add_task(self, task: Task) -> int:
        if 1 + len(branches(task, self.vocab)) > self.n_rows:
            raise UserError(f"guidance needs 3 rows of the batch, and it has {self.n_rows}")
        self.waiting.append((self.n_added, task))
        self.n_added += 1
        return self.n_added - 1

    @torch.inference_mode()
    def step(self) -> list[News]:
        """One round; [] where only prompts were read, or nothing is left to do."""
        self.admit()
        self.read_prompts()
        if not any(sample.begun for sample in self.running):
            return []
        return self.tell(self.decode())

    def run(self) -> Iterator[News]:
        """Until all that was added has ended; more may be added meanwhile."""
        while self.waiting or self.running:
            yield from self.step()

    # -----------------------------------------------------------------------------------------------------------------
    # Who has which row

    def admit(self) -> None:
        """In the order of coming, as long as there are rows."""
        while self.waiting:
            handle, task = self.waiting[0]
            wanted = {FULL: task.prompt} | branches(task, self.vocab)
            if self.n_live + len(wanted) > self.n_rows:
                return
            self.waiting.popleft()
            rows = [Row(self.n_live + i, reads, prompt) for i, (reads, prompt) in enumerate(wanted.items())]
            self.n_live += len(rows)
            for row in rows:
                self.decoder.grammar.done[row.place] = True  # it waits for its prompt
                self.prompts.setdefault(row.prompt, []).append(row)
            self.running.append(Sample(handle, task, rows, task.left))

    def read_prompts(self) -> None:
        """A chunk of the oldest prompts. Chunks of a prompt begin at fixed places, whatever else is read."""
        budget, parts, whole = self.chunk, [], []
        for prompt, rows in self.prompts.items():
            start = self.read.get(prompt, 0)
            parts.append((prompt[start : start + self.chunk], rows[0].place, start))
            self.read[prompt] = start + len(parts[-1][0])
            budget -= len(parts[-1][0])
            whole += [prompt] if self.read[prompt] == len(prompt) else []
            if budget <= 0:
                break
        if parts:
            self.decoder.prefill(parts)
        for prompt in whole:
            first, *others = self.prompts.pop(prompt)
            for row in others:
                self.decoder.share(first.place, row.place, self.read[prompt])
            del self.read[prompt]
            for row in (first, *others):
                row.read = True
        ready = [s for s in self.running if not s.begun and all(row.read for row in s.rows)]
        for sample in ready:
            sample.begun = True
            for row in sample.rows:
                self.decoder.begin(row.place, sample.task, row.reads)
        if ready:
            self.seat()

    def leave(self, sample: Sample) -> None:
        """Rows in use stay the first ones: the last ones move into the gaps."""
        self.running.remove(sample)
        for gap in sorted((row.place for row in sample.rows), reverse=True):
            self.n_live -= 1
            last = next((row for s in self.running for row in s.rows if row.place == self.n_live), None)
            if last is not None:
                self.decoder.move(last.place, gap, self.context)
                last.place = gap
        self.seat()

    def seat(self) -> None:
        """Tells the decoder which rows belong together. What a sample does not read is read by its next best row, so
        that the terms of guidance that make no difference are 0."""
        places = torch.arange(self.n_rows).repeat(3, 1)
        for sample in self.running:
            place = {row.reads: row.place for row in sample.rows}
            nothing = place.get(NOTHING, place.get(IMAGES, place[FULL]))
            for row in sample.rows:
                places[FULL, row.place] = place[FULL]
                places[IMAGES, row.place], places[NOTHING, row.place] = place.get(IMAGES, nothing), nothing
        self.decoder.sample.copy_(places)
        begun = [sample for sample in self.running if sample.begun]
        self.needs = needed([sample.task.options for sample in begun])
        self.guided = any(len(sample.rows) > 1 for sample in begun)

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def decode(self) -> tuple[list[list[int]], list[bool]]:
        """As many steps as need no look: inside images the grammar foresees them, and on a CPU steps see ends."""
        samples = [sample for sample in self.running if sample.begun]
        inside = [sample.left >= 0 for sample in samples]
        steps = min(sample.left for sample in samples) + 1 if all(inside) else 1
        if self.decoder.cpu is not None and not self.waiting and not self.prompts:
            steps = max(steps, self.blind)
        steps = min(steps, self.look or steps, len(self.decoder.log))
        if self.decoder.cpu is not None:
            self.decoder.cpu.run(self.n_live, steps)
            return self.decoder.look(self.n_live, steps)
        columns = "image" if all(inside) else "all" if any(inside) else "text"
        longest = max(len(sample.task.prompt) + sample.n_new for sample in samples) + steps
        coarse = max(64, (1 << longest.bit_length()) >> 3)  # in steps of at most a quarter, so that graphs stay few
        span = min(-(-longest // coarse) * coarse, self.context)
        n = self.graphs.size(self.n_live, self.n_rows)
        arguments = (n, span, columns, self.guided, self.needs)
        for _ in range(steps):
            self.graphs.run(arguments, lambda: self.decoder.step(*arguments))
        return self.decoder.look(n, steps)

    def tell(self, looked: tuple[list[list[int]], list[bool]]) -> list[News]:
        news, pad = [], self.vocab.pad
        for sample in [sample for sample in self.running if sample.begun]:
            ids, ended = (x[sample.rows[0].place] for x in looked)
            ids = ids[: ids.index(pad)] if pad in ids else ids  # pad is never drawn: the first one is behind the end
            sample.n_new += len(ids)
            for token in ids:
                inside = sample.left >= 0
                sample.left = sample.left - 1 if inside else self.n_codes if token == self.vocab.boi else -1
            news.append(News(sample.handle, tuple(ids), ended))
        ended = {one.handle for one in news if one.ended}
        for sample in [sample for sample in self.running if sample.handle in ended]:
            self.leave(sample)
        return news


# ---------------------------------------------------------------------------------------------------------------------
# Many samples, or one as it comes


def generate(
    model: Chameleon,
    prompts: Sequence[Sequence[int]],
    vocab: Vocab,
    n_codes: int,
    options: SamplingParams,
    mode: Mode = "both",
    seed: int = 0,
    stops: Sequence[int] | None = None,
    batch_size: int = 256,
    progress: str | None = None,
) -> list[list[int]]:
    """The new ids of each prompt, the stop id included, on the model's device.

    n_codes: codes an image. mode: "text", "image" (one image) or "both", see Grammar. Row i draws its numbers from
    (seed, i), whatever the batch of at most batch_size rows. stops: ids that end a row, by default </s> alone.
    progress: shows a bar of this name. Raises UserError for a prompt without room, before any work.
    """
    context = model.cfg.max_seq_len
    tasks = [
        make_task(prompt, vocab, n_codes, context, options, mode, (seed, row), stops)
        for row, prompt in enumerate(prompts)
    ]
    if not tasks:
        return []
    wanted = [1 + len(branches(task, vocab)) for task in tasks]
    was_training, new = model.training, [[] for _ in tasks]
    try:
        longest = max(len(task.prompt) + task.room for task in tasks)
        engine = Engine(model.eval(), vocab, n_codes, max(min(batch_size, sum(wanted)), *wanted, 1), longest)
        for task in tasks:
            engine.add_task(task)
        with tqdm(total=len(tasks), desc=progress, unit="sample", disable=progress is None) as bar:
            for news in engine.run():
                new[news.handle] += news.ids
                bar.update(news.ended)
    finally:
        model.train(was_training)
    return new


def stream(
    model: Chameleon,
    prompt: Sequence[int],
    tokenizer: TextTokenizer,
    n_codes: int,
    options: SamplingParams,
    mode: Mode = "both",
    seed: int = 0,
    row: int = 0,
    stops: Sequence[int] | None = None,
    preview: int | None = None,
) -> Iterator[Event]:
    """What generate gives as row `row`, event by event: pieces of text, none of which splits a character, images.

    preview: unfinished images are told every so many codes. The model must be in eval mode. Raises UserError, at the
    call and not later, for a prompt without room.
    """
    task = make_task(prompt, tokenizer.vocab, n_codes, model.cfg.max_seq_len, options, mode, (seed, row), stops)
    context = len(prompt) + task.room
    engine = Engine(
        model, tokenizer.vocab, n_codes, 1 + len(branches(task, tokenizer.vocab)), context, look=preview, blind=1
    )
    engine.add_task(task)
    reader = Reader(prompt, tokenizer, preview)
    return (event for news in engine.run() for event in reader.read(news.ids, news.ended))
