"""Score continuations: the log-probability that a model gives to them after a context.

    contexts and continuations -> packed sequences -> hidden states that predict a continuation -> logits -> sums

Log-probabilities are over the whole vocabulary, image tokens included, and are summed in float64.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochameleon.errors import UserError
from nanochameleon.kernels import use_kernels
from nanochameleon.packing import best_fit, collate
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.run import Run
from nanochameleon.vocab import Vocab

BATCH_TOKENS = 8_192  # of the sequences that run at once
LOGITS = 2**24  # float64 logits at once: 128 MB


class Scored(NamedTuple):
    """What a continuation is worth."""

    log_prob: float  # the sum over its tokens
    greedy: bool  # would greedy decoding write it? Of equal logits the first one wins, as in decoding
    truncated: bool  # was the left end of the context cut off?


def context_and_continuation(tokenizer: TextTokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encode a pair, without <s>, by the rule of lm-evaluation-harness.

    Trailing spaces of the context move to the continuation, whose first word takes them. Then the whole text is split
    after as many tokens as the context alone has.
    """
    kept = context.rstrip()
    whole, n = tokenizer.encode(context + continuation), len(tokenizer.encode(kept))
    return whole[:n], whole[n:]


def fit(context: Sequence[int], room: int, vocab: Vocab) -> tuple[list[int], bool]:
    """Return a context of at most `room` tokens, and whether it was cut: <s> and the right end stay.

    An empty context is <s> alone. Raises UserError where an image would be cut off.
    """
    tokens = list(context) or [vocab.bos]
    if (over := len(tokens) - room) <= 0:
        return tokens, False
    if any(vocab.is_image(t) or t in (vocab.boi, vocab.eoi) for t in tokens[1 : 1 + over]):
        why = f"a prompt of {len(tokens)} tokens has room for {room} only, and an image would be cut off"
        raise UserError(f"{why}: give fewer shots")
    return [vocab.bos, *tokens[1 + over :]], True


@torch.inference_mode()
def score(run: Run, requests: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
    """Score each (context with <s> first, continuation). Equal requests are computed once.

    Raises UserError for a continuation that does not fit into the model's context after <s>.
    """
    longest = run.cfg.model.max_seq_len + 1  # the last token of a continuation is predicted, never read
    if (most := max((len(continuation) for _, continuation in requests), default=0)) >= longest:
        raise UserError(f"a continuation has {most} tokens, and the model's context {longest - 1}: give shorter ones")
    fitted = [fit(context, longest - len(continuation), run.vocab) for context, continuation in requests]
    asked = [(tuple(c), tuple(new)) for (c, _), (_, new) in zip(fitted, requests, strict=True)]
    distinct = sorted(dict.fromkeys(pair for pair in asked if pair[1]), key=lambda pair: -len(pair[0] + pair[1]))
    found = {pair: (0.0, True) for pair in asked}  # what empty continuations get
    for batch in batches(distinct):
        for pair, hidden in zip(batch, predicting(run, batch), strict=True):
            found[pair] = sum_log_probs(run, hidden, pair[1])
    return [Scored(*found[pair], cut) for pair, (_, cut) in zip(asked, fitted, strict=True)]


@torch.inference_mode()
def next_scores(run: Run, contexts: Sequence[Sequence[int]], candidates: Sequence[int]) -> list[list[float]]:
    """Return, for each context with <s> first, the log-probabilities of single tokens that may come next."""
    fitted = [tuple(fit(context, run.cfg.model.max_seq_len, run.vocab)[0]) for context in contexts]
    pairs = sorted(((context, (0,)) for context in dict.fromkeys(fitted)), key=lambda pair: -len(pair[0]))
    found = {}
    for batch in batches(pairs):
        hidden = torch.cat(list(predicting(run, batch)))  # (contexts, D)
        log_probs = run.model.logits(hidden).double().log_softmax(-1)[:, list(candidates)]
        found |= {context: row for (context, _), row in zip(batch, log_probs.tolist(), strict=True)}
    return [list(found[context]) for context in fitted]


# ---------------------------------------------------------------------------------------------------------------------
# Running the model

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # context, continuation


def batches(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Split into batches of about BATCH_TOKENS tokens."""
    batch, size = [], 0
    for context, continuation in pairs:
        batch.append((context, continuation))
        size += len(context) + len(continuation)
        if size >= BATCH_TOKENS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def predicting(run: Run, pairs: Sequence[Pair]) -> Iterator[Tensor]:
    """Run the model on packed sequences -> for each pair the hidden states (n, D) that predict its continuation."""
    documents = [[*context, *continuation[:-1]] for context, continuation in pairs]
    lengths = [len(document) for document in documents]
    seq_len = max(lengths)
    rows = best_fit(lengths, seq_len)
    sequences: list[list[list[int]]] = [[] for _ in range(rows.max() + 1)]
    ends = np.zeros(len(sequences), np.int64)
    packed = []
    for document, row in zip(documents, rows.tolist(), strict=True):
        sequences[row].append(document)
        ends[row] += len(document)
        packed.append((row, int(ends[row])))
    batch = collate(sequences, seq_len, run.vocab.pad).to(run.device)
    with use_kernels("auto"):  # in the weights' dtype, for which the kernels requested for training may not exist
        hidden = run.model(batch.tokens, batch.positions, batch.documents)
    for (row, end), (_, continuation) in zip(packed, pairs, strict=True):
        yield hidden[row, end - len(continuation) : end]


def sum_log_probs(run: Run, hidden: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Return (log-probability, is it greedy) of a continuation from the hidden states (n, D) that predict it."""
    total, greedy = 0.0, True
    targets = torch.tensor(continuation, device=run.device)
    step = max(1, LOGITS // run.vocab.size)
    for part, target in zip(hidden.split(step), targets.split(step), strict=True):
        logits = run.model.logits(part)  # (n, V)
        log_probs = logits.double().log_softmax(-1).gather(1, target[:, None])
        total += float(log_probs.sum())
        greedy = greedy and bool((logits.argmax(-1) == target).all())
    return total, greedy
