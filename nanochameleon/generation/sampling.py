"""Sampling: from logits to the next token. Filters, the draw, classifier-free guidance, and the grammar.

    guidance -> grammar mask -> repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

All are pure functions of logits (N, V): N rows of a batch, V tokens, and every row has its own parameters (N,).
A token whose logit is -inf cannot be drawn. `Grammar` replaces the stack of logits processors of the released code: it
is one table, which a test can check in full. No shape depends on a value, so that a CUDA graph can capture a whole step
(graphs.py). This file runs no model.
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


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make tokens of the context, where `seen` (N, V), less likely (CTRL, arXiv 1909.05858); penalty (N,), 1 is off."""
    penalty = penalty[:, None].to(logits.dtype)
    # Dividing a negative logit would reward the token, so negative logits are multiplied.
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def temperature(logits: Tensor, t: Tensor) -> Tensor:
    """Divide by t (N,). With t = 0 only the largest logit keeps any probability, so the draw is greedy."""
    smallest = 1e-30  # the smallest divisor: in float32, 0 / 0 would be NaN
    # The maximum moves to 0 first, so that dividing by a small t cannot overflow.
    return (logits - logits.amax(-1, keepdim=True)) / t[:, None].clamp(min=smallest).to(logits.dtype)


def top_k_top_p(logits: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """Keep the k largest logits and, of those, the fewest that together reach p (arXiv 1904.09751).

    Of equal logits the first are kept, so top-k keeps exactly min(k, V). The largest logit always stays. k = inf and
    p = 1 keep everything.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # (N, V) each
    keep = torch.arange(logits.shape[-1], device=logits.device) < k[:, None]  # (N, V), in sorted order
    probs = probabilities(ordered.masked_fill(~keep, -torch.inf))
    before, p = probs.cumsum(-1) - probs, p[:, None].to(probs.device)  # probability of all larger logits
    keep &= ((before < p) | (p >= 1)).to(keep.device)  # p >= 1: rounding of the sum would cut the tail
    keep[:, 0] = True
    return logits.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -torch.inf)


def min_p(logits: Tensor, threshold: Tensor) -> Tensor:
    """Keep tokens with at least `threshold` (N,) of the likeliest one's probability (arXiv 2407.01082); 0 keeps all."""
    least = threshold.log()[:, None].to(logits.dtype)
    return logits.masked_fill(logits - logits.amax(-1, keepdim=True) < least, -torch.inf)


def probabilities(logits: Tensor) -> Tensor:
    """Softmax in float64; on the CPU where the device lacks float64 (Apple's MPS)."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double().softmax(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters of a batch

# Rows of SamplingTensors.table. The first four are pairs: text's, then (+ 1) images'.
TEMPERATURE, TOP_K, TOP_P, MIN_P = range(0, 8, 2)
PENALTY, GUIDANCE, IMAGE_GUIDANCE = range(8, 11)


@dataclass(frozen=True)
class SamplingTensors:
    """The SamplingParams of N rows as one table (11, N), whose rows are TEMPERATURE .. IMAGE_GUIDANCE."""

    table: Tensor

    @staticmethod
    def of(params: Sequence[SamplingParams], device: torch.device) -> "SamplingTensors":
        columns = [
            (p.temperature, p.image_temperature,
             *(torch.inf if k is None else k for k in (p.top_k, p.image_top_k)),  # inf: top-k is off
             p.top_p, p.image_top_p, p.min_p, p.image_min_p, p.repetition_penalty,
             p.guidance_scale, p.image_guidance_scale)
            for p in params
        ]  # fmt: skip
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return SamplingTensors(torch.tensor(columns, dtype=dtype).T.contiguous().to(device))

    def select(self, name: int, in_image: Tensor) -> Tensor:
        """The parameter (N,) for image tokens where in_image (N,), else for text."""
        return torch.where(in_image, self.table[name + 1], self.table[name])


def required_filters(params: Sequence[SamplingParams]) -> tuple[bool, bool, bool]:
    """Which parts of sampling these params need: (a draw, a sort, the repetition penalty). The others are skipped."""
    draws = any(t > 0 for p in params for t in (p.temperature, p.image_temperature))
    sorts = draws and any(
        k is not None or top_p < 1
        for p in params for k, top_p in ((p.top_k, p.top_p), (p.image_top_k, p.image_top_p))
    )  # fmt: skip
    return draws, sorts, any(p.repetition_penalty != 1 for p in params)


def apply_filters(logits: Tensor, params: SamplingTensors, in_image: Tensor, sorts: bool = True) -> Tensor:
    """Apply temperature, top-k and top-p (if `sorts`) and min-p: images' where in_image (N,), else text's."""
    t, k, p, threshold = (params.select(name, in_image) for name in (TEMPERATURE, TOP_K, TOP_P, MIN_P))
    logits = temperature(logits, t)
    return min_p(top_k_top_p(logits, k, p) if sorts else logits, threshold)


# ---------------------------------------------------------------------------------------------------------------------
# The draw


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row, (N,), by inverse CDF at each row's uniform number in [0, 1), (N,) float64.

    Each row has its own number, so its tokens do not depend on the other rows.
    """
    probs = probabilities(logits)
    cdf = probs.cumsum(-1)  # (N, V)
    tokens = torch.searchsorted(cdf, (uniforms.to(cdf.device) * cdf[:, -1])[:, None], right=True)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)  # (N, 1)
    # A parallel sum need not be monotone to the last bit, so the search can hit an impossible token at an edge.
    return torch.where(probs.gather(-1, tokens) > 0, tokens, probs.argmax(-1, keepdim=True))[:, 0].to(logits.device)


# What a guidance branch is conditioned on: the whole prompt, the prompt's images alone, or nothing.
COND, IMAGE_COND, UNCOND = range(3)


def classifier_free_guidance(
    cond: Tensor, image_cond: Tensor, uncond: Tensor, text_scale: Tensor, image_scale: Tensor
) -> Tensor:
    """Guide by a prompt of text and images (InstructPix2Pix, arXiv 2211.09800); logits (N, V), scales (N,).

        guided = uncond + image_scale * (image_cond - uncond) + text_scale * (cond - image_cond)

    The logits of the whole prompt are returned where both scales are 1, and where all three branches are the same.
    """
    by_text, by_image = (scale[:, None].to(cond.dtype) for scale in (text_scale, image_scale))
    guided = uncond + by_image * (image_cond - uncond) + by_text * (cond - image_cond)
    return torch.where((by_text == 1) & (by_image == 1), cond, guided)  # bit for bit; the sum would round


# ---------------------------------------------------------------------------------------------------------------------
# Grammar

Modality = Literal["text", "image", "both"]  # what a request may generate
MODALITIES = ("text", "image", "both")
# The states of a row. What may come in each (n = tokens of an image):
#
#   state          | it holds when                      | "text"       | "image"  | "both"
#   ---------------|------------------------------------|--------------|----------|--------------------
#   TEXT           | n + 2 or more tokens left          | text, stops  | <boi>    | text, stops, <boi>
#   TEXT_NO_IMAGE  | fewer tokens left                  | text, stops  | stops    | text, stops
#   IN_IMAGE       | the open image lacks tokens        | image tokens, whatever the modality
#   AT_EOI         | the open image has all n           | <eoi>
#   DONE           | after a stop, or no tokens left    | <pad>; in "image" also after <eoi>
TEXT, TEXT_NO_IMAGE, IN_IMAGE, AT_EOI, DONE = range(5)
CONTINUE, STOP = -1, -2  # values of Grammar.transitions

# Names of Grammar's tensors with one entry per row; the tables are the same for all rows.
GRAMMAR_STATE = ("index", "image_tokens_left", "tokens_left", "done")


def check_stops(modality: Modality, stops: Sequence[int] | None, vocab: Vocab) -> None:
    """Raise ValueError for an unknown modality, and for a stop token that could also mean something else."""
    possible = {vocab.eos, vocab.eot, vocab.boi}
    if modality not in MODALITIES or (stops is not None and not (stops and set(stops) <= possible)):
        raise ValueError(
            f"modality is one of {MODALITIES} and stops are </s>, end of turn or <boi>: {modality}, {stops}"
        )
    if stops is not None and vocab.boi in stops and modality != "text":
        raise ValueError(f"<boi> can be a stop in modality text only, not in {modality}")


def grammar_index(modality: Modality, stops: Sequence[int] | None, vocab: Vocab) -> int:
    """Number modality and stops: 8 times the modality, plus a bit each for the stops </s>, end of turn and <boi>."""
    possible = (vocab.eos, vocab.eot, vocab.boi)
    bits = sum((stop in (stops or (vocab.eos,))) << i for i, stop in enumerate(possible))
    return 8 * MODALITIES.index(modality) + bits


@dataclass(frozen=True)
class Grammar:
    """What may come next in each of N rows. Rows differ in modality, stops and state.

    An image has exactly image_len tokens and then <eoi>, and starts only where all of it fits. <pad>, <s>, <unk> and
    reserved tokens never come, nor an image token outside an image. A row that is done gives <pad>.
    """

    vocab: Vocab
    image_len: int  # tokens per image
    allowed: Tensor  # (24 * 5, V) bool: by grammar_index and state, which tokens may come
    transitions: Tensor  # (24, V) int32: where a token leads: CONTINUE, STOP, or image_len for <boi>
    index: Tensor  # (N,) grammar_index
    image_tokens_left: Tensor  # (N,) tokens that the open image lacks; -1 outside an image
    tokens_left: Tensor  # (N,) tokens that may still be written
    done: Tensor  # (N,) bool

    @staticmethod
    def start(
        vocab: Vocab,
        image_len: int,
        modalities: Sequence[Modality],
        image_tokens_left: Sequence[int],
        tokens_left: Sequence[int],
        stops: Sequence[Sequence[int] | None],
    ) -> "Grammar":
        """One row per entry of the sequences; image_tokens_left = image_len starts inside an image.

        stops None: </s> alone. With <boi> as a stop, a row ends where the model wants to draw, as in the released code.
        Raises ValueError where the open image does not fit, or a stop could also mean something else.
        """
        for modality, some, lacks, left in zip(modalities, stops, image_tokens_left, tokens_left, strict=True):
            check_stops(modality, some, vocab)
            if lacks > image_len or (lacks >= 0 and left < lacks + 1) or left < 1:
                raise ValueError("a row has no room for one new token or for the rest of its image")
        index = [grammar_index(modality, some, vocab) for modality, some in zip(modalities, stops, strict=True)]
        state = (torch.tensor(x, dtype=torch.long) for x in (index, image_tokens_left, tokens_left))
        done = torch.zeros(len(index), dtype=torch.bool)
        return Grammar(vocab, image_len, *grammar_tables(vocab, image_len), *state, done)

    def rows(self, which) -> "Grammar":
        """Some of the rows, by a slice or by indices."""
        return replace(self, **{name: getattr(self, name)[which] for name in GRAMMAR_STATE})

    def state(self) -> Tensor:
        """The state of each row, (N,): TEXT .. DONE."""
        state = torch.where(self.tokens_left >= self.image_len + 2, TEXT, TEXT_NO_IMAGE)  # + 2: <boi> and <eoi>
        state = state.masked_fill(self.image_tokens_left > 0, IN_IMAGE)
        return state.masked_fill(self.image_tokens_left == 0, AT_EOI).masked_fill(self.done, DONE)

    def mask(self, state: Tensor | None = None) -> Tensor:
        """Which tokens may come, (N, V) bool. state: the result of `state`, if it is at hand."""
        return self.allowed[self.index * 5 + (self.state() if state is None else state)]

    def advance(self, tokens: Tensor) -> "Grammar":
        """The grammar after each row's next token, (N,), which must be an allowed one."""
        transition, tokens_left = self.transitions[self.index, tokens], self.tokens_left - 1
        inside = self.image_tokens_left >= 0
        # Counting down ends at 0 (<eoi> is due); <eoi> makes it -1. Outside, a <boi> sets it to image_len.
        image_tokens_left = torch.where(inside, self.image_tokens_left - 1, transition.clamp(min=CONTINUE))
        done = self.done | (transition == STOP) | (tokens_left <= 0)
        return replace(self, image_tokens_left=image_tokens_left, tokens_left=tokens_left, done=done)


def grammar_tables(vocab: Vocab, image_len: int) -> tuple[Tensor, Tensor]:
    """Grammar.allowed and Grammar.transitions: the table of states above, for all modalities and sets of stops."""
    allowed = torch.zeros(len(MODALITIES), 8, 5, vocab.size, dtype=torch.bool)
    transitions = torch.full((len(MODALITIES), 8, vocab.size), CONTINUE, dtype=torch.int32)
    text, image, both = range(len(MODALITIES))
    # 1. Each state's own tokens
    for modality in (text, both):
        allowed[modality, :, TEXT:IN_IMAGE, vocab.first_text :] = True
    for modality in (image, both):
        allowed[modality, :, TEXT, vocab.boi] = True
    allowed[:, :, IN_IMAGE, vocab.first_code : vocab.eoi] = True
    allowed[:, :, AT_EOI, vocab.eoi] = True
    allowed[:, :, DONE, vocab.pad] = True
    # 2. Where they lead
    transitions[:, :, vocab.boi] = image_len
    transitions[image, :, vocab.eoi] = STOP
    # 3. Stops, which may be tokens of their own; <boi> as a stop starts no image
    for bits in range(8):
        for stop in (stop for i, stop in enumerate((vocab.eos, vocab.eot, vocab.boi)) if bits >> i & 1):
            transitions[:, bits, stop] = STOP
            allowed[[text, both], bits, TEXT:IN_IMAGE, stop] = True
            allowed[image, bits, TEXT_NO_IMAGE, stop] = True  # in TEXT, an image comes first
    return allowed.flatten(0, 2), transitions.flatten(0, 1)
