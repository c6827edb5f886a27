"""The slots of a running batch as tensors that stay in place, and one decode step of all of them at once.

    hidden states -> logits -> guidance -> grammar mask -> filters -> draw -> grammar -> model -> hidden states

No shape and no branch depends on a value, so a step can be one CUDA graph, and the host syncs only when it wants to.
Every slot has a KV cache, a length, sampling parameters and uniform numbers of its own. With guidance a request takes
up to three slots: COND has read the whole prompt, IMAGE_COND its images alone, UNCOND only [<s>, <boi>, open image].
All three take the tokens that are sampled for COND. The engine decides which request has which slots (engine.py).

The model is a Chameleon (transformer.py). This file is the reference; fastest.py swaps in faster versions of it.
Shapes: N slots, n of them in use, V tokens, D = dim.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from nanochameleon.config import SamplingParams
from nanochameleon.generation.graphs import Graphs
from nanochameleon.generation.request import Request
from nanochameleon.generation.sampling import (
    AT_EOI,
    COND,
    DONE,
    GRAMMAR_STATE,
    GUIDANCE,
    IMAGE_COND,
    IMAGE_GUIDANCE,
    IN_IMAGE,
    PENALTY,
    TEMPERATURE,
    UNCOND,
    Grammar,
    SamplingTensors,
    apply_filters,
    classifier_free_guidance,
    grammar_index,
    grammar_tables,
    repetition_penalty,
    sample,
)
from nanochameleon.vocab import Vocab

VocabPart = Literal["text", "image", "all"]  # "text" is everything but the image tokens

# Rows of Decoder.slot_state.
INDEX, IMAGE_TOKENS_LEFT, TOKENS_LEFT, N_SAMPLED, CFG_BRANCH, LENGTH = range(6)


Chunk = tuple[Sequence[int], int, int]  # tokens of a prompt, slot, position of the first of them
# Tokens, padding included, that a GPU reads in one pass over the weights, which costs less than a pass for each prompt.
PREFILL_TOGETHER = 512


def read_together(chunks: Sequence[Chunk], most: int) -> list[list[Chunk]]:
    """Group chunks that follow one another, of neighbouring slots and from one position on, up to `most` tokens."""
    groups: list[list[Chunk]] = []
    for chunk in chunks:
        group = [*groups[-1], chunk] if groups else [chunk]
        fits = len(group) * max(len(tokens) for tokens, *_ in group) <= most
        if len(group) > 1 and fits and chunk[1:] == (group[-2][1] + 1, group[-2][2]):
            groups[-1] = group
        else:
            groups.append([chunk])
    return groups


def uniforms(seed: Sequence[int], n: int) -> Tensor:
    """(n,) float64 in [0, 1), a function of the seed alone."""
    return torch.from_numpy(np.random.default_rng(seed).random(n))


class Decoder:
    """N slots, of which a step runs the first n. All tensors are allocated here and written in place from then on."""

    sees_ends = False  # do steps notice by themselves that requests have finished, so that any number may follow?

    def __init__(self, model: nn.Module, vocab: Vocab, image_len: int, n_slots: int, context: int):
        device = model.output.weight.device
        self.model, self.vocab, self.context, self.device = model, vocab, context, device
        self.n_slots, self.graphs = n_slots, Graphs(device)
        self.prefill_together = PREFILL_TOGETHER if device.type == "cuda" else 1  # a CPU waits for the arithmetic
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else model.tok_embeddings.weight.dtype
        self.cache = model.empty_cache(n_slots, context, dtype)
        self.hidden = torch.zeros(n_slots, model.cfg.dim, device=device, dtype=dtype)  # (N, D) at the newest token read
        self.slot_state = torch.zeros(6, n_slots, dtype=torch.long, device=device)  # rows: INDEX .. LENGTH
        self.n_sampled, self.length = self.slot_state[N_SAMPLED], self.slot_state[LENGTH]  # length: tokens in the cache
        tables = (table.to(device) for table in grammar_tables(vocab, image_len))
        state = (self.slot_state[name] for name in (INDEX, IMAGE_TOKENS_LEFT, TOKENS_LEFT))
        done = torch.ones(n_slots, dtype=torch.bool, device=device)  # an empty slot is done
        self.grammar = Grammar(vocab, image_len, *tables, *state, done)
        self.params = SamplingTensors.of([SamplingParams()] * n_slots, device)
        self.context_mask = torch.zeros(n_slots, vocab.size, dtype=torch.bool, device=device)  # (N, V) tokens so far
        no_float64 = device.type == "mps"
        self.uniforms = torch.zeros(n_slots, context, dtype=torch.float64, device="cpu" if no_float64 else device)
        self.branch_slots = torch.zeros(3, n_slots, dtype=torch.long, device=device)  # of each slot's request
        self.token_buffer = torch.zeros(image_len + 1, n_slots, dtype=torch.long, device=device)  # since the last sync
        self.step_idx = torch.zeros(1, dtype=torch.long, device=device)  # steps since the last sync

    def slot_tensors(self) -> list[Tensor]:
        """All tensors of the slots, slot first, except their caches and `branch_slots`."""
        return [
            self.hidden, self.context_mask, self.uniforms, self.slot_state.T, self.grammar.done, self.params.table.T
        ]  # fmt: skip

    # -----------------------------------------------------------------------------------------------------------------
    # What the engine does with a slot

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """Read (tokens, slot, start): a prompt's next tokens, from position `start`, into a slot's cache."""
        for tokens, slot, start in chunks:
            self.length[slot] = start + len(tokens)  # steps of other slots write this slot's cache after its prompt
        self.read_chunks(chunks)

    def read_chunks(self, chunks: Sequence[Chunk]) -> None:
        for some in read_together(chunks, self.prefill_together):
            self.read_padded(some)

    def read_padded(self, chunks: Sequence[Chunk]) -> None:
        """Read chunks of neighbouring slots from one position on in one pass, padded to the longest.

        What padding writes to a slot's cache comes after its chunk. It is overwritten before a token sees it.
        """
        slots, start, lengths = slice(chunks[0][1], chunks[-1][1] + 1), chunks[0][2], [len(c[0]) for c in chunks]
        end = start + max(lengths)
        tokens = [[*c[0], *[self.vocab.pad] * (max(lengths) - len(c[0]))] for c in chunks]
        x, ends = (torch.tensor(numbers, device=self.device) for numbers in (tokens, lengths))  # (B, T), (B,)
        positions = torch.arange(start, end, device=self.device).expand(len(chunks), -1)
        hidden = self.model(x, positions, cache=self.cache.view(slots, positions, end))  # (B, T, D)
        self.hidden[slots] = hidden[torch.arange(len(chunks), device=self.device), ends - 1]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the prompt that was just read into slot `source`."""
        self.cache.copy_prefix(source, target, length)
        self.length[target], self.hidden[target] = length, self.hidden[source]

    def start(self, slot: int, request: Request, cfg_branch: int) -> None:
        """Let a slot whose prompt has been read take part in all steps from the next one on."""
        index = grammar_index(request.modality, request.stops, self.vocab)
        state = [index, request.image_tokens_left, request.max_new_tokens, 0, cfg_branch]
        self.slot_state[:LENGTH, slot] = torch.tensor(state, device=self.device)
        self.grammar.done[slot] = False
        self.params.table[:, slot] = SamplingTensors.of([request.params], self.device).table[:, 0]
        self.context_mask[slot] = False
        self.context_mask[slot, torch.tensor(request.prompt, device=self.device)] = True
        self.uniforms[slot, : request.max_new_tokens] = uniforms(request.seed, request.max_new_tokens)

    def move(self, source: int, target: int) -> None:
        self.cache.copy_prefix(source, target, self.context)
        for x in self.slot_tensors():
            x[target] = x[source]

    def sync(self, n: int, steps: int) -> tuple[list[list[int]], list[bool]]:
        """Copy the last steps' tokens of n slots, and which slots are done, to the host: the one transfer of a round.

        A slot's tokens are followed by <pad> from its end on.
        """
        self.step_idx.zero_()
        tokens = torch.cat([self.token_buffer[:steps, :n], self.grammar.done[None, :n].long()]).T.tolist()
        return [row[:-1] for row in tokens], [bool(row[-1]) for row in tokens]

    # -----------------------------------------------------------------------------------------------------------------
    # A step

    def run(
        self, n: int, steps: int, longest: int, part: VocabPart, guided: bool, needs: tuple[bool, bool, bool]
    ) -> None:
        """Run `steps` steps of the first n slots. longest: tokens of the longest slot after them; see `step`."""
        # Rounding the cache's length up, by at most a quarter above 256, keeps the number of captured graphs small.
        granularity = max(64, (1 << longest.bit_length()) >> 3)
        kv_len = min(-(-longest // granularity) * granularity, self.context)
        arguments = (self.graphs.round_up(n, self.n_slots), kv_len, part, guided, needs)
        for _ in range(steps):
            self.graphs.run(arguments, lambda: self.step(*arguments))

    def step(self, n: int, kv_len: int, part: VocabPart, guided: bool, needs: tuple[bool, bool, bool]) -> None:
        """One token for each of the first n slots.

        kv_len: entries of the cache to read, at least the longest slot's next length. part: the logits to compute,
        "text" where no slot is in an image, "image" where all are. guided: does a request have more than one slot?
        needs: the result of required_filters.
        """
        grammar = self.grammar.rows(slice(0, n))
        # 1. Sample; every branch takes COND's token.
        tokens = self.next_tokens(n, grammar, part, guided, needs)  # (n,)
        if guided:
            tokens = tokens[self.branch_slots[COND, :n]]
        # 2. Write it down: the grammar's state, the buffer that sync reads, the repetition penalty's mask.
        after = grammar.advance(tokens)
        for name in GRAMMAR_STATE:
            getattr(grammar, name).copy_(getattr(after, name))
        self.token_buffer[:, :n].index_copy_(0, self.step_idx, tokens[None])
        self.step_idx.add_(1)
        self.n_sampled[:n].add_(1)
        self.context_mask[:n].scatter_(1, tokens[:, None], True)
        # 3. Feed it to the model.
        self.forward_step(n, tokens, kv_len)

    def next_tokens(
        self, n: int, grammar: Grammar, part: VocabPart, guided: bool, needs: tuple[bool, bool, bool]
    ) -> Tensor:
        """Sample (n,) tokens from the slots' hidden states."""
        vocab, state, params = self.vocab, grammar.state(), SamplingTensors(self.params.table[:, :n])
        draws, sorts, penalised = needs
        in_image = state == IN_IMAGE
        logits = self.logits(self.hidden[:n], part)  # (n, V')
        if guided and part != "text":
            branches = (logits[self.branch_slots[branch, :n]] for branch in (COND, IMAGE_COND, UNCOND))
            guided_logits = classifier_free_guidance(*branches, params.table[GUIDANCE], params.table[IMAGE_GUIDANCE])
            logits = torch.where(in_image[:, None], guided_logits, logits)
        if part != "image":  # inside images every image token is allowed, and none is penalised
            if penalised:
                penalty = params.table[PENALTY].masked_fill(in_image, 1.0)
                logits = repetition_penalty(logits, self.slice_vocab(self.context_mask[:n], part), penalty)
            logits = logits.masked_fill(~self.slice_vocab(grammar.mask(state), part), -torch.inf)
        tokens = logits.argmax(-1)
        if draws:
            column = self.n_sampled[:n, None].clamp(max=self.context - 1).to(self.uniforms.device)  # (n, 1)
            drawn = sample(apply_filters(logits, params, in_image, sorts), self.uniforms[:n].gather(1, column)[:, 0])
            tokens = torch.where(params.select(TEMPERATURE, in_image) > 0, drawn, tokens)
        if part == "image":  # from columns of the slice to tokens
            tokens = tokens + vocab.first_code
        elif part == "text":
            tokens = torch.where(tokens < vocab.first_code, tokens, tokens + vocab.n_codes)
        return torch.where(state == AT_EOI, vocab.eoi, torch.where(state == DONE, vocab.pad, tokens))

    def logits(self, hidden: Tensor, part: VocabPart) -> Tensor:
        """(n, D) -> (n, V') in float32 or float64, of a part of the vocabulary."""
        parts = [self.model.logits(hidden, columns) for columns in self.vocab_slices(part)]
        logits = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return logits if logits.dtype == torch.float64 else logits.float()

    def vocab_slices(self, part: VocabPart) -> list[slice]:
        first, end = self.vocab.first_code, self.vocab.eoi  # the image tokens
        text = [slice(0, first), slice(end, self.vocab.size)]
        return {"text": text, "image": [slice(first, end)], "all": [slice(0, self.vocab.size)]}[part]

    def slice_vocab(self, x: Tensor, part: VocabPart) -> Tensor:
        """(n, V) -> (n, V'), the columns that `logits` computes."""
        return torch.cat([x[:, columns] for columns in self.vocab_slices(part)], -1)

    def forward_step(self, n: int, tokens: Tensor, kv_len: int) -> None:
        """Feed the sampled token to every slot whose branch conditions on it.

        The other slots run, too, since shapes are fixed. What they write to their cache is overwritten later, and they
        keep their hidden state: a slot that has read its prompt may wait while its request's other branches read.
        """
        vocab, branch, length = self.vocab, self.slot_state[CFG_BRANCH, :n], self.length[:n]
        of_image = (tokens >= vocab.first_code) & (tokens <= vocab.boi)  # image tokens, <eoi> and <boi>
        # UNCOND reads one image at a time: each <boi> goes to position 1, after <s>, over the image before it.
        restarts = (branch == UNCOND) & (tokens == vocab.boi)
        positions = torch.where(restarts, 1, length).clamp(max=self.context - 1)  # (n,)
        reads = ((branch == COND) | of_image) & (tokens != vocab.pad)
        length.copy_(torch.where(reads, positions + 1, length))
        self.hidden[:n] = torch.where(reads[:, None], self.forward(tokens, positions, kv_len), self.hidden[:n])

    def forward(self, tokens: Tensor, positions: Tensor, kv_len: int) -> Tensor:
        """Run the model on one token (n,) per slot at its position (n,) -> hidden states (n, D)."""
        cache = self.cache.view(slice(0, len(tokens)), positions[:, None], kv_len)
        return self.model(tokens[:, None], positions[:, None], cache=cache)[:, 0]
