"""Which id comes next: filters on logits, the draw itself, guidance, and the grammar of what may come at all.

    guide -> forbid what the grammar forbids -> repetition -> temperature -> top_k -> top_p -> min_p -> draw

All are pure functions of logits (N, V), one row a sample, each row with numbers of its own (N,); -inf is an id that
cannot come. `Grammar` replaces the stack of logits processors of the released code by one table that a test can prove.
No shape depends on a value, so that a whole step can be captured (engine.py). It runs no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nanochameleon.config import SamplingParams
from nanochameleon.vocab import Vocab

# ---------------------------------------------------------------------------------------------------------------------
# Filters


def repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Ids seen (N, V) in the context lose: positive logits are divided by the penalty, negative ones multiplied.

    CTRL's (arXiv 1909.05858), with the sign taken care of.
    """
    penalty = penalty[:, None].to(logits.dtype)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def temperature(logits: Tensor, t: Tensor) -> Tensor:
    """Logits over t, the maximum moved to 0 first, so that no small t overflows; t = 0 is as good as greedy."""
    least = 1e-30  # what float32 can hold: 0 / 0 would be NaN
    return (logits - logits.amax(-1, keepdim=True)) / t[:, None].clamp(min=least).to(logits.dtype)


def top(logits: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """The k largest, and of those the fewest that together reach p (arXiv 1904.09751); the others become -inf.

    Exactly min(k, V) under ties, the first of equal ones, and always one. k = inf and p = 1 leave everything.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    keep = torch.arange(logits.shape[-1], device=logits.device) < k[:, None]
    probs = probabilities(ordered.masked_fill(~keep, -torch.inf))
    before, p = probs.cumsum(-1) - probs, p[:, None].to(probs.device)
    keep &= ((before < p) | (p >= 1)).to(keep.device)  # p >= 1: rounding would cut the tail
    keep[:, 0] = True
    return logits.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -torch.inf)


def min_p(logits: Tensor, share: Tensor) -> Tensor:
    """Ids at least `share` times as probable as the likeliest (arXiv 2407.01082); 0 leaves everything."""
    least = share.log()[:, None].to(logits.dtype)
    return logits.masked_fill(logits - logits.amax(-1, keepdim=True) < least, -torch.inf)


def probabilities(logits: Tensor) -> Tensor:
    """In float64, and on the CPU where the device has no such numbers (Apple's)."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double().softmax(-1)


TEMPERATURE, TOP_K, TOP_P, MIN_P = range(0, 8, 2)  # rows of Options: of text, and behind it of image codes
PENALTY, GUIDANCE, GUIDANCE_IMAGE = range(8, 11)


@dataclass(frozen=True)
class Options:
    """SamplingParams for N rows, (11, N): TEMPERATURE .. GUIDANCE_IMAGE; top_k inf is without."""

    table: Tensor

    @staticmethod
    def of(configs: Sequence[SamplingParams], device: torch.device) -> "Options":
        columns = [
            (c.temperature, c.image_temperature, *(torch.inf if k is None else k for k in (c.top_k, c.image_top_k)),
             c.top_p, c.image_top_p, c.min_p, c.image_min_p, c.repetition_penalty,
             c.guidance_scale, c.image_guidance_scale)
            for c in configs
        ]  # fmt: skip
        kind = torch.float32 if device.type == "mps" else torch.float64
        return Options(torch.tensor(columns, dtype=kind).T.contiguous().to(device))

    def of_each(self, name: int, in_image: Tensor) -> Tensor:
        """(N,): that of images where in_image (N,), else that of text."""
        return torch.where(in_image, self.table[name + 1], self.table[name])


def needed(configs: Sequence[SamplingParams]) -> tuple[bool, bool, bool]:
    """What rows of these options need at all: (a draw, a sort, the repetition penalty). The rest is left out."""
    draws = any(t > 0 for c in configs for t in (c.temperature, c.image_temperature))
    sorts = draws and any(
        k is not None or p < 1 for c in configs for k, p in ((c.top_k, c.top_p), (c.image_top_k, c.image_top_p))
    )
    return draws, sorts, any(c.repetition_penalty != 1 for c in configs)


def filtered(logits: Tensor, options: Options, in_image: Tensor, sorts: bool = True) -> Tensor:
    """The filters of text or, where in_image (N,), of images, in the order of the released code."""
    t, k, p, share = (options.of_each(name, in_image) for name in (TEMPERATURE, TOP_K, TOP_P, MIN_P))
    logits = temperature(logits, t)
    return min_p(top(logits, k, p) if sorts else logits, share)


# ---------------------------------------------------------------------------------------------------------------------
# The draw


def pick(logits: Tensor, uniforms: Tensor) -> Tensor:
    """ids (N,): the inverse of each row's distribution function at its uniform number in [0, 1), (N,) float64.

    One number a row makes a row's ids independent of the rows beside it.
    """
    probs = probabilities(logits)
    sums = probs.cumsum(-1)
    ids = torch.searchsorted(sums, (uniforms.to(sums.device) * sums[:, -1])[:, None], right=True)
    ids = ids.clamp(max=logits.shape[-1] - 1)
    # A parallel sum need not be monotone to the last bit, so an impossible id could be hit at an edge.
    return torch.where(probs.gather(-1, ids) > 0, ids, probs.argmax(-1, keepdim=True))[:, 0].to(logits.device)


FULL, IMAGES, NOTHING = range(3)  # what a branch reads of its sample: everything, images alone, the open one alone


def guide(full: Tensor, image: Tensor, nothing: Tensor, text_scale: Tensor, image_scale: Tensor) -> Tensor:
    """Guidance on a prompt of text and images (InstructPix2Pix, arXiv 2211.09800), scales (N,):

        nothing + image_scale * (image - nothing) + text_scale * (full - image),

    of logits that saw the whole prompt, its images alone, and nothing of it. Where all three are the same row, or
    both scales 1, it is the logits of the whole prompt.
    """
    by_text, by_image = (scale[:, None].to(full.dtype) for scale in (text_scale, image_scale))
    guided = nothing + by_image * (image - nothing) + by_text * (full - image)
    return torch.where((by_text == 1) & (by_image == 1), full, guided)


# ---------------------------------------------------------------------------------------------------------------------
# Grammar

Mode = Literal["text", "image", "both"]
MODES = ("text", "image", "both")
OPEN, SHUT, IMAGE, CLOSE, DONE = range(5)  # in text with room for an image, without; in an image; at its end; ended


def check_stops(mode: Mode, stops: Sequence[int] | None, vocab: Vocab) -> None:
    """Raises ValueError for a mode that is none, and for a stop id that could also be something else."""
    ends = {vocab.eos, vocab.eot, vocab.boi}
    if mode not in MODES or (stops is not None and not (stops and set(stops) <= ends)):
        raise ValueError(f"mode is {MODES} and stops are </s>, end of turn or <boi>: {mode}, {stops}")
    if stops is not None and vocab.boi in stops and mode != "text":
        raise ValueError(f"<boi> can end a row in mode text alone, not in {mode}")


def rules_of(mode: Mode, stops: Sequence[int] | None, vocab: Vocab) -> int:
    """Mode and stops as a number below RULES: 8 times the mode, and a bit each for </s>, the end of turn, <boi>."""
    ends = (vocab.eos, vocab.eot, vocab.boi)
    return 8 * MODES.index(mode) + sum((end in (stops or (vocab.eos,))) << i for i, end in enumerate(ends))


RULES = 8 * len(MODES)
GOES_ON, STOPS = -1, -2  # in Grammar.turns


@dataclass(frozen=True)
class Grammar:
    """What may come next in each of N rows, in state (left, room, done), each in a mode and with stops of its own.

    Modes: "text" never starts an image; "image" is one image and then the end; "both" mixes freely. An image has
    exactly n_codes codes, then <eoi> with certainty, and starts only where all of it has room. Nowhere do pad, <s>,
    <unk> and reserved ids come, nor a code outside of an image; a row that has ended gives pad.
    """

    vocab: Vocab
    n_codes: int  # codes an image
    may: Tensor  # (RULES * 5, V) bool: which ids may come by each rules in OPEN .. DONE
    turns: Tensor  # (RULES, V) int32: outside of an image an id GOES_ON, STOPS, or begins so many codes
    rules: Tensor  # (N,), see rules_of
    left: Tensor  # (N,) codes that the open image lacks; -1 outside of an image
    room: Tensor  # (N,) ids that may still be written
    done: Tensor  # (N,) bool

    @staticmethod
    def start(
        vocab: Vocab,
        n_codes: int,
        modes: Sequence[Mode],
        left: Sequence[int],
        room: Sequence[int],
        stops: Sequence[Sequence[int] | None],
    ) -> "Grammar":
        """A row for each mode, left, room and stops, as above; left = n_codes starts inside an image.

        stops None: </s> alone; <boi> as a stop ends a row where the model wants to draw, as the released code does.
        Raises ValueError where an open image has no room or a stop id could also be something else.
        """
        for mode, some, lacks, free in zip(modes, stops, left, room, strict=True):
            check_stops(mode, some, vocab)
            if lacks > n_codes or (lacks >= 0 and free < lacks + 1) or free < 1:
                raise ValueError("a row has no room for one new id or for the rest of its image")
        rules = [rules_of(mode, some, vocab) for mode, some in zip(modes, stops, strict=True)]
        state = (torch.tensor(x, dtype=torch.long) for x in (rules, left, room))
        return Grammar(
            vocab, n_codes, *grammar_tables(vocab, n_codes), *state, torch.zeros(len(rules), dtype=torch.bool)
        )

    def rows(self, which) -> "Grammar":
        """Some of the rows, by a slice or by indices."""
        return replace(self, **{name: getattr(self, name)[which] for name in STATE})

    def kinds(self) -> Tensor:
        """(N,) OPEN .. DONE."""
        kinds = torch.where(self.room >= self.n_codes + 2, OPEN, SHUT)
        kinds = kinds.masked_fill(self.left > 0, IMAGE).masked_fill(self.left == 0, CLOSE)
        return kinds.masked_fill(self.done, DONE)

    def allowed(self, kinds: Tensor | None = None) -> Tensor:
        """(N, V) bool. kinds: those of `kinds`, if they are at hand."""
        return self.may[self.rules * 5 + (self.kinds() if kinds is None else kinds)]

    def after(self, ids: Tensor) -> "Grammar":
        """The state after each row's next id, (N,), one that may come."""
        turns, room = self.turns[self.rules, ids], self.room - 1
        left = torch.where(self.left >= 0, self.left - 1, turns.clamp(min=GOES_ON))
        return replace(self, left=left, room=room, done=self.done | (turns == STOPS) | (room <= 0))


STATE = ("rules", "left", "room", "done")
BY_RULES, LEFT, ROOM, COUNT, READS, LENGTH = range(6)  # rows of Decoder.numbers, (6, N) int64


def grammar_tables(vocab: Vocab, n_codes: int) -> tuple[Tensor, Tensor]:
    """The tables of Grammar."""
    may = torch.zeros(len(MODES), 8, 5, vocab.size, dtype=torch.bool)
    turns = torch.full((len(MODES), 8, vocab.size), GOES_ON, dtype=torch.int32)
    text, image, both = range(len(MODES))
    for mode in (text, both):
        may[mode, :, OPEN:IMAGE, vocab.first_text :] = True
    for mode in (image, both):
        may[mode, :, OPEN, vocab.boi] = True
    may[:, :, IMAGE, vocab.first_code : vocab.eoi] = True
    may[:, :, CLOSE, vocab.eoi] = True
    may[:, :, DONE, vocab.pad] = True
    turns[:, :, vocab.boi] = n_codes
    turns[image, :, vocab.eoi] = STOPS
    for bits in range(8):
        for end in (end for i, end in enumerate((vocab.eos, vocab.eot, vocab.boi)) if bits >> i & 1):
            turns[:, bits, end] = STOPS
            may[[text, both], bits, OPEN:IMAGE, end] = True
            may[image, bits, SHUT, end] = True  # where an image has room, one comes first
    return may.flatten(0, 2), turns.flatten(0, 1)
