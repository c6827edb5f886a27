"""Which id comes next: filters on logits, the draw itself, guidance, and the grammar of what may come at all.

    guide -> forbid what the grammar forbids -> temperature -> top_k -> top_p -> draw

All are pure functions of logits (N, V), one row a sample; -inf is an id that cannot come. `Grammar` replaces the stack
of logits processors of the released code by one table that a test can prove. It runs no model (engine.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nanochameleon.vocab import Vocab

# ---------------------------------------------------------------------------------------------------------------------
# Filters


def temperature(logits: Tensor, t: float) -> Tensor:
    """Logits over t, the maximum moved to 0 first, so that no small t overflows. t = 0 keeps the largest alone."""
    if t == 0:
        return _only(logits, logits.argmax(-1, keepdim=True))
    return (logits - logits.amax(-1, keepdim=True)) / max(t, 1e-30)  # what float32 can hold: 0 / 0 would be NaN


def top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest, exactly min(k, V) of them: of equal ones the first; the others become -inf."""
    # torch.topk may take any of equal ones, so a stable sort
    return _only(logits, logits.argsort(dim=-1, descending=True, stable=True)[..., :k])


def top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest most probable ids that together reach p (arXiv 1904.09751), always the most probable one."""
    if p >= 1:  # rounding would cut the tail
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = probabilities(ordered)
    reached = (probs.cumsum(-1) - probs >= p).to(logits.device)  # by those before it
    reached[..., 0] = False
    return logits.masked_fill(torch.zeros_like(reached).scatter(-1, order, reached), -torch.inf)


def probabilities(logits: Tensor) -> Tensor:
    """In float64, and on the CPU where the device has no such numbers (Apple's)."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double().softmax(-1)


def _only(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, logits.gather(-1, ids))


def filtered(logits: Tensor, t: float, k: int | None, p: float) -> Tensor:
    """The three filters in the order of the released code; k = None is without top_k."""
    logits = temperature(logits, t)
    return top_p(logits if k is None else top_k(logits, k), p)


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


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): unconditional + scale * (conditional - unconditional).

    lerp gives the conditional logits exactly at 1 and the unconditional ones exactly at 0.
    """
    return torch.lerp(unconditional, conditional, float(scale))


# ---------------------------------------------------------------------------------------------------------------------
# Grammar

Mode = Literal["text", "image", "both"]
OPEN, SHUT, PICTURE, CLOSE, DONE = range(5)  # in text with room for a picture, without; in a picture; at its end; ended


@dataclass(frozen=True)
class Grammar:
    """What may come next in each of N rows, in state (left, room, done).

    Modes: "text" never starts a picture; "image" is one picture and then the end; "both" mixes freely. A picture has
    exactly n_codes codes, then <eoi> with certainty, and starts only where all of it has room. Nowhere do pad, <s>,
    <unk> and reserved ids come, nor a code outside of a picture; a row that has ended gives pad.
    """

    vocab: Vocab
    n_codes: int  # codes a picture
    mode: Mode
    stops: tuple[int, ...]  # ids that end a row
    table: Tensor  # (5, V) bool: which ids may come in OPEN .. DONE
    left: Tensor  # (N,) codes that the open picture lacks; -1 outside of a picture
    room: Tensor  # (N,) ids that may still be written
    done: Tensor  # (N,) bool

    @staticmethod
    def start(
        vocab: Vocab, n_codes: int, mode: Mode, left: Tensor, room: Tensor, stops: Sequence[int] | None = None
    ) -> "Grammar":
        """left, room (N,) int64, as above; left = n_codes starts inside a picture. stops: by default </s> alone.

        Raises ValueError where an open picture has no room or a stop id could also be something else.
        """
        stops = (vocab.eos,) if stops is None else tuple(stops)
        if mode not in ("text", "image", "both") or not set(stops) <= {vocab.eos, vocab.eot} or not stops:
            raise ValueError(f"mode is text, image or both and stops are </s>, end of turn or both: {mode}, {stops}")
        if (left >= n_codes + 1).any() or ((left >= 0) & (room < left + 1)).any() or (room < 1).any():
            raise ValueError("a row has no room for one new id or for the rest of its picture")
        table = torch.zeros(5, vocab.size, dtype=torch.bool)
        table[OPEN:PICTURE, list(stops)] = True
        table[OPEN:PICTURE, vocab.first_text :] = True
        table[OPEN, vocab.boi] = mode == "both"
        if mode == "image":
            table[OPEN] = torch.arange(vocab.size) == vocab.boi
            table[SHUT, vocab.first_text :] = False
        table[PICTURE, vocab.first_code : vocab.eoi] = True
        table[CLOSE, vocab.eoi] = True
        table[DONE, vocab.pad] = True
        return Grammar(vocab, n_codes, mode, stops, table.to(left.device), left, room, torch.zeros_like(left) > 0)

    def kinds(self) -> Tensor:
        """(N,) which row of the table holds."""
        kinds = torch.where(self.room >= self.n_codes + 2, OPEN, SHUT)
        kinds = kinds.masked_fill(self.left > 0, PICTURE).masked_fill(self.left == 0, CLOSE)
        return kinds.masked_fill(self.done, DONE)

    def allowed(self) -> Tensor:
        """(N, V) bool."""
        return self.table[self.kinds()]

    def after(self, ids: Tensor) -> "Grammar":
        """The state after each row's next id, (N,)."""
        inside, room = self.left >= 0, self.room - 1
        outside = torch.where(ids == self.vocab.boi, self.n_codes, -1)
        stopped = (ids[:, None] == torch.tensor(self.stops, device=ids.device)).any(1)
        if self.mode == "image":
            stopped = stopped | (self.left == 0)
        done = self.done | stopped | (room <= 0)
        left = torch.where(inside, self.left - 1, outside).masked_fill(self.done, -1)
        return replace(self, left=left, room=room, done=done)
