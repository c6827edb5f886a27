"""The engine: requests are batched continuously, each in its own state of text or image.

    add(prompt) -> waiting -> slots -> prefill, chunk by chunk -> decode steps of all slots -> outputs -> release

The engine runs on the host: it decides which request has which slots and when to sync. All else is tensors
(decoder.py). While every slot is inside an image the host need not sync until the first image ends, since the grammar
knows what comes. A request's tokens depend on its prompt, parameters and seed alone, not on its batch: bit for bit in
float32 on a CPU; elsewhere up to rounding, because a matmul may sum in another order for another batch size.
This file knows tokens only: prompts.py makes them from text and images, events.py turns them back.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from nanochameleon.config import SamplingParams
from nanochameleon.errors import UserError
from nanochameleon.generation.decoder import Decoder
from nanochameleon.generation.request import Request, RequestOutput, RunningRequest, Slot, cfg_branches, make_request
from nanochameleon.generation.sampling import COND, IMAGE_COND, UNCOND, Modality, required_filters
from nanochameleon.vocab import Vocab


@dataclass
class Engine:
    """A running batch. add() queues a request. Each step() prefills a chunk of the waiting prompts, runs some decode
    steps and returns their outputs. The model must be in eval mode, and its weights must stay as they are."""

    model: nn.Module  # a Chameleon
    vocab: Vocab
    image_len: int  # tokens per image
    n_slots: int = 16  # rows of the batch; a request takes one, with guidance up to three
    context: int | None = None  # tokens that a slot can hold; None: the model's
    prefill_chunk: int = 512  # tokens of prompts to read between two rounds of decode steps
    max_steps_between_syncs: int | None = None  # None: no limit of its own
    steps_between_syncs: int = 16  # text steps between syncs, if none waits and the decoder notices ends itself
    waiting: deque[tuple[int, Request]] = field(default_factory=deque, init=False)
    running: list[RunningRequest] = field(default_factory=list, init=False)
    prefilling: dict[tuple[int, ...], list[Slot]] = field(default_factory=dict, init=False)  # prompt -> who needs it
    n_prefilled: dict[tuple[int, ...], int] = field(default_factory=dict, init=False)  # tokens read of such a prompt
    n_live: int = field(default=0, init=False)  # slots in use: always the first ones
    n_added: int = field(default=0, init=False)

    def __post_init__(self):
        if self.model.training:
            raise ValueError("call model.eval() first: dropout would be on")
        longest = self.model.cfg.max_seq_len
        self.context = longest if self.context is None else self.context
        if not 1 <= self.context <= longest:
            raise ValueError(f"context must be 1 to the model's {longest} tokens, not {self.context}")
        from nanochameleon.generation.fastest import fastest_decoder  # optional code is imported late

        with torch.inference_mode():
            sizes = self.vocab, self.image_len, self.n_slots, self.context
            self.decoder: Decoder = fastest_decoder(self.model, *sizes)

    def add(self, prompt: Sequence[int], params: SamplingParams, modality: Modality = "both",
            seed: Sequence[int] = (0,), stops: Sequence[int] | None = None) -> int:  # fmt: skip
        """Queue a request and return its request_id. Raises UserError for a prompt that does not fit."""
        sizes = self.vocab, self.image_len, self.context
        return self.add_request(make_request(prompt, *sizes, params, modality, seed, stops))

    def add_request(self, request: Request) -> int:
        if len(cfg_branches(request, self.vocab)) > self.n_slots:
            raise UserError(f"guidance needs 3 slots of the batch, and it has {self.n_slots}")
        self.waiting.append((self.n_added, request))
        self.n_added += 1
        return self.n_added - 1

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """One round. Returns [] if only prompts were read, or if nothing is left to do."""
        self.schedule()  # 1. waiting requests get slots
        self.prefill()  # 2. their prompts are read, a chunk per round, so that the other requests need not wait long
        if not any(running.prefilled for running in self.running):
            return []
        tokens, done = self.decode()  # 3. all slots decode
        return self.collect_outputs(tokens, done)  # 4. finished requests leave

    def run(self) -> Iterator[RequestOutput]:
        """Run until every request has finished; more may be added meanwhile."""
        while self.waiting or self.running:
            yield from self.step()

    @torch.inference_mode()
    def cancel(self, request_id: int) -> None:
        """Free a request's slots. No more of its tokens come out. Does nothing if the request has finished."""
        running = next((running for running in self.running if running.request_id == request_id), None)
        if running is None:
            self.waiting = deque(entry for entry in self.waiting if entry[0] != request_id)
            return
        for slot in running.slots:
            if not slot.prefilled:
                self.stop_reading(slot)
        self.release(running)
        self.assign_slots()

    # -----------------------------------------------------------------------------------------------------------------
    # Scheduling: which request has which slots

    def schedule(self) -> None:
        """Give slots to waiting requests, first come, first served."""
        while self.waiting:
            request_id, request = self.waiting[0]
            branches = cfg_branches(request, self.vocab)
            if self.n_live + len(branches) > self.n_slots:
                return  # later requests wait, too, even if they would fit: so none waits for ever
            self.waiting.popleft()
            slots = [Slot(self.n_live + i, *branch) for i, branch in enumerate(branches.items())]
            self.n_live += len(slots)
            for slot in slots:
                self.decoder.grammar.done[slot.index] = True  # until its prompt is read
                self.prefilling.setdefault(slot.prompt, []).append(slot)
            self.running.append(RunningRequest(request_id, request, slots, request.image_tokens_left))

    def prefill(self) -> None:
        """Read a chunk of the oldest prompts. Equal prompts are read once and copied, and so are equal beginnings."""
        # 1. Choose chunks of the oldest prompts, up to the budget.
        budget, chunks, complete = self.prefill_chunk, [], []
        for prompt, slots in self.prefilling.items():
            if prompt not in self.n_prefilled:
                self.n_prefilled[prompt] = self.copy_beginning(slots[0])
            start = self.n_prefilled[prompt]
            # Not cut to the budget: chunks begin at fixed positions, so on a CPU rounding does not depend on other
            # prompts. A GPU reads neighbours together.
            tokens = prompt[start : start + self.prefill_chunk]
            chunks.append((tokens, slots[0].index, start))
            self.n_prefilled[prompt] = start + len(tokens)
            complete += [prompt] if self.n_prefilled[prompt] == len(prompt) else []
            budget -= len(tokens)
            if budget <= 0:
                break
        # 2. Run the model on them.
        if chunks:
            self.decoder.prefill(chunks)
        # 3. Copy the prompts that are complete to all slots that need them.
        for prompt in complete:
            first, *others = slots = self.prefilling.pop(prompt)
            for slot in others:
                self.decoder.copy_prefix(first.index, slot.index, self.n_prefilled[prompt])
            del self.n_prefilled[prompt]
            for slot in slots:
                slot.prefilled = True
        self.start_prefilled()

    def copy_beginning(self, slot: Slot) -> int:
        """Copy as much of a slot's prompt as another slot has read of the same beginning. Returns the number of tokens.

        Whole chunks are copied, so on a CPU rounding does not depend on other prompts. The last token is always read,
        because sampling starts from its hidden state. What is read in this round is not yet in the cache: a whole chunk
        is the last one of its round, so no later prompt of the round asks for it.
        """
        sources = [(slots[0], self.n_prefilled.get(prompt, 0)) for prompt, slots in self.prefilling.items()]
        slots = [slot for running in self.running for slot in running.slots if slot.prefilled]
        # UNCOND writes each image over the one before, prompt or not.
        sources += [(slot, len(slot.prompt)) for slot in slots if slot.cfg_branch != UNCOND]
        best, source, chunk = 0, slot, self.prefill_chunk
        for other, n_read in sources:
            n = min(n_read, len(slot.prompt) - 1) // chunk * chunk
            while slot.prompt[:n] != other.prompt[:n]:
                n -= chunk
            best, source = (n, other) if n > best else (best, source)
        if best:
            self.decoder.copy_prefix(source.index, slot.index, best)
        return best

    def stop_reading(self, slot: Slot) -> None:
        """Take a slot away from those that need a prompt. What was read of the prompt moves to the next of them."""
        slots = self.prefilling[slot.prompt]
        first = slots[0]
        slots.remove(slot)
        n_read = self.n_prefilled.get(slot.prompt, 0)
        if not slots:
            del self.prefilling[slot.prompt]
            self.n_prefilled.pop(slot.prompt, None)
        elif first is slot and n_read:
            self.decoder.copy_prefix(slot.index, slots[0].index, n_read)

    def start_prefilled(self) -> None:
        """Let requests take part in decoding once the prompts of all their branches have been read."""
        ready = [r for r in self.running if not r.prefilled and all(slot.prefilled for slot in r.slots)]
        for running in ready:
            running.prefilled = True
            for slot in running.slots:
                self.decoder.start(slot.index, running.request, slot.cfg_branch)
        if ready:
            self.assign_slots()

    def release(self, finished: RunningRequest) -> None:
        """Free a request's slots. The last slots in use move into the gaps, so those in use stay the first ones.

        assign_slots comes after the last release of a step, since it costs as much as all requests together.
        """
        self.running.remove(finished)
        for gap in sorted((slot.index for slot in finished.slots), reverse=True):  # so the last one is never a gap
            self.n_live -= 1
            last = next((slot for r in self.running for slot in r.slots if slot.index == self.n_live), None)
            if last is not None:
                self.decoder.move(last.index, gap)
                last.index = gap

    def assign_slots(self) -> None:
        """Tell the decoder which slots hold the three guidance branches of each slot's request.

        A branch that was left out points to another one, so that its term in the guidance sum is zero.
        """
        branch_slots = np.tile(np.arange(self.n_slots), (3, 1))  # (3, N); a tensor's elements are slow to set
        for running in self.running:
            index = {slot.cfg_branch: slot.index for slot in running.slots}  # COND is always there
            uncond = index.get(UNCOND, index.get(IMAGE_COND, index[COND]))
            for slot in running.slots:
                branch_slots[COND, slot.index] = index[COND]
                branch_slots[IMAGE_COND, slot.index] = index.get(IMAGE_COND, uncond)
                branch_slots[UNCOND, slot.index] = uncond
        self.decoder.branch_slots.copy_(torch.from_numpy(branch_slots))
        decoding = [running for running in self.running if running.prefilled]
        self.needs = required_filters([running.request.params for running in decoding])
        self.guided = any(len(running.slots) > 1 for running in decoding)

    # -----------------------------------------------------------------------------------------------------------------
    # Decoding

    def decode(self) -> tuple[list[list[int]], list[bool]]:
        """Decode until the host must sync. Inside images, the number of tokens left is known."""
        decoding = [running for running in self.running if running.prefilled]
        inside = [running.image_tokens_left >= 0 for running in decoding]
        # 1. How many steps? If all are inside an image: until the first of these images has its <eoi>. In text each
        #    token may be a stop, so the host syncs after every step.
        steps = min(running.image_tokens_left for running in decoding) + 1 if all(inside) else 1
        #    More if the decoder notices ends itself and no other request could use a freed slot.
        if self.decoder.sees_ends and not self.waiting and not self.prefilling:
            steps = max(steps, self.steps_between_syncs)
        steps = min(steps, self.max_steps_between_syncs or steps, len(self.decoder.token_buffer))
        # 2. Which logits may be needed? Image tokens and text are separate parts of the vocabulary.
        part = "image" if all(inside) else "all" if any(inside) else "text"
        # 3. How much of the cache is read? That of the longest request.
        longest = max(len(running.request.prompt) + running.n_new for running in decoding) + steps
        self.decoder.run(self.n_live, steps, longest, part, self.guided, self.needs)
        return self.decoder.sync(self.n_live, steps)

    def collect_outputs(self, tokens: list[list[int]], done: list[bool]) -> list[RequestOutput]:
        """The outputs of all requests from the synced slots; requests that are done leave."""
        outputs, pad = [], self.vocab.pad
        for running in [running for running in self.running if running.prefilled]:
            index = running.slots[0].index  # COND
            new = tokens[index]
            new = new[: new.index(pad)] if pad in new else new  # <pad> is never sampled: it follows the end
            running.n_new += len(new)
            for token in new:  # as Grammar.advance
                inside = running.image_tokens_left >= 0
                after_text = self.image_len if token == self.vocab.boi else -1
                running.image_tokens_left = running.image_tokens_left - 1 if inside else after_text
            outputs.append(RequestOutput(running.request_id, tuple(new), done[index]))
        finished = {output.request_id for output in outputs if output.finished}
        for running in [running for running in self.running if running.request_id in finished]:
            self.release(running)
        if finished:
            self.assign_slots()
        return outputs


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    vocab: Vocab,
    image_len: int,
    params: SamplingParams,
    modality: Modality = "both",
    seed: int = 0,
    stops: Sequence[int] | None = None,
    batch_size: int = 256,
    progress: str | None = None,
) -> list[list[int]]:
    """Generate the new tokens of each prompt, stop token included, on the model's device.

    image_len: tokens per image. modality: "text", "image" (one image) or "both", see Grammar. Prompt i draws from the
    seed (seed, i). batch_size: slots at most; draws do not depend on it. stops: tokens that end a sample; None: </s>.
    progress: the name of a progress bar to show. Raises UserError for a prompt that does not fit, before any work.
    """
    context = model.cfg.max_seq_len
    requests = [
        make_request(prompt, vocab, image_len, context, params, modality, (seed, i), stops)
        for i, prompt in enumerate(prompts)
    ]
    if not requests:
        return []
    n_branches = [len(cfg_branches(request, vocab)) for request in requests]
    was_training, new = model.training, [[] for _ in requests]
    try:
        # Slots need only hold the longest request, which may be far shorter than the model's context.
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        engine = Engine(model.eval(), vocab, image_len, max(min(batch_size, sum(n_branches)), *n_branches, 1), longest)
        for request in requests:
            engine.add_request(request)
        with tqdm(total=len(requests), desc=progress, unit="sample", disable=progress is None) as bar:
            for output in engine.run():
                new[output.request_id] += output.tokens
                bar.update(output.finished)
    finally:
        model.train(was_training)
    return new
