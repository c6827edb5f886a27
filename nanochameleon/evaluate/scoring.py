"""Score continuations: the log-probability that a model gives to them after a context.

    contexts and continuations -> trees (token_trees.py) -> hidden states that predict a token -> logits -> sums

Log-probabilities are over the whole vocabulary, image tokens included. All sums are in float64.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochameleon.errors import UserError
from nanochameleon.evaluate.fit import fit
from nanochameleon.evaluate.token_trees import Tokens, Tree, read_prefix, read_trees, shared_prefixes
from nanochameleon.kernels import use_kernels
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.run import Run

BATCH_TOKENS, BATCH_TOKENS_GPU = 2_048, 16_384  # that run at once: on a CPU, what fits its caches
LOGITS = 2**24  # logits at once: 64 MB in float32, and as much for their powers


class Scored(NamedTuple):
    """The score of a continuation."""

    log_prob: float  # the sum over its tokens
    greedy: bool  # would greedy decoding write it? Of equal logits the first one wins, as in decoding
    truncated: bool  # was the left end of the context cut off?


def too_long(run: Run, continuations: Iterable[Sequence[int]]) -> str:
    """Return one sentence if a continuation does not fit into the model's context after <s>, else ""."""
    most, context = max(map(len, continuations), default=0), run.cfg.model.max_seq_len
    return f"a continuation has {most:,} tokens, and the model's context {context:,}" if most > context else ""


def context_and_continuation(tokenizer: TextTokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encode a pair, without <s>, by the rule of lm-evaluation-harness.

    Trailing spaces of the context move to the continuation, whose first word takes them. Then the whole text is split
    after as many tokens as the context alone has.
    """
    kept = context.rstrip()
    whole, n = tokenizer.encode(context + continuation), len(tokenizer.encode(kept))
    return whole[:n], whole[n:]


@torch.inference_mode()
def score(run: Run, requests: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
    """Score each (context with <s> first, continuation). What requests share is computed once.

    Raises UserError for a continuation that does not fit into the model's context after <s>.
    """
    longest = run.cfg.model.max_seq_len + 1  # the last token of a continuation is predicted, never read
    if problem := too_long(run, (continuation for _, continuation in requests)):
        raise UserError(f"{problem}: give shorter ones")
    fitted = [fit(context, longest - len(continuation), run.vocab) for context, continuation in requests]
    asked = [(tuple(context), tuple(new)) for (context, _), (_, new) in zip(fitted, requests, strict=True)]
    continuations: dict[Tokens, dict[Tokens, None]] = {}  # dictionaries keep the order, as sets do not
    for context, continuation in asked:
        if continuation:
            continuations.setdefault(context, {})[continuation] = None
    found = {pair: (0.0, True) for pair in asked}  # what empty continuations get
    for length, contexts in shared_prefixes(list(continuations)):
        grown = [(context, Tree.grow(context[length:], list(continuations[context]))) for context in contexts]
        found |= score_trees(run, grown, length)
    return [Scored(*found[pair], cut) for pair, (_, cut) in zip(asked, fitted, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Trees -> sums

Grown = list[tuple[Tokens, Tree]]  # contexts, and the trees that have them and their continuations


def score_trees(run: Run, grown: Grown, length: int) -> dict[tuple[Tokens, Tokens], tuple[float, bool]]:
    """Return {(context, continuation): (log-probability, is it greedy)} of contexts that share `length` tokens."""
    found = {}
    with use_kernels("auto"):  # in the weights' dtype, for which the kernels requested for training may not exist
        prefix = read_prefix(run.model, grown[0][0][:length]) if length else None
        most = BATCH_TOKENS if run.device.type == "cpu" else BATCH_TOKENS_GPU
        for batch in batches(grown, length, most):
            hidden = read_trees(run.model, [tree for _, tree in batch], run.vocab.pad, prefix)
            found |= sums(run, hidden, batch)
    return found


def batches(grown: Grown, length: int, most: int) -> Iterator[Grown]:
    """Split into batches of trees of similar size, of at most `most` tokens with prefix and padding."""
    batch: Grown = []
    for each in sorted(grown, key=lambda pair: len(pair[1].tokens)):
        if batch and (len(batch) + 1) * (length + len(each[1].tokens)) > most:
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


def sums(run: Run, hidden: Tensor, batch: Grown) -> dict[tuple[Tokens, Tokens], tuple[float, bool]]:
    """Sum the log-probabilities of each continuation from the hidden states (trees, nodes, D)."""
    keys = [(context, continuation) for context, tree in batch for continuation in tree.paths]
    nodes, size = [], hidden.shape[1]  # the nodes that predict a token, in the order of all tokens to predict
    for i, (_, tree) in enumerate(batch):
        nodes += [i * size + node for path in tree.paths.values() for node in path]
    distinct, which = np.unique(nodes, return_inverse=True)
    targets = [token for _, continuation in keys for token in continuation]
    log_probs, greedy = predictions(
        run, hidden.flatten(0, 1)[torch.from_numpy(distinct).to(run.device)], which, targets
    )
    ends = np.cumsum([len(continuation) for _, continuation in keys])[:-1]
    parts = zip(np.split(log_probs, ends), np.split(greedy, ends), strict=True)
    return {key: (float(x.sum()), bool(y.all())) for key, (x, y) in zip(keys, parts, strict=True)}


def predictions(run: Run, hidden: Tensor, which: np.ndarray, targets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-probabilities (tokens,) of targets, float64, and whether each is the likeliest token.

    which: for each target the row of hidden (n, D) that predicts it.
    """
    rows, targets = torch.from_numpy(which).to(run.device), torch.tensor(targets, device=run.device)
    log_probs = torch.empty(len(targets), dtype=torch.float64, device=run.device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=run.device)
    step = max(1, LOGITS // run.vocab.size)
    for start in range(0, len(hidden), step):
        logits = run.model.logits(hidden[start : start + step])  # (step, V)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        best, likeliest = logits.max(-1)  # of equal ones the first
        # float32 powers are within 1e-7 of float64's, which take ten times as long; the sum needs float64
        log_z = (logits - best[:, None]).exp_().sum(-1, dtype=torch.float64).log() + best
        here = (rows >= start) & (rows < start + step)
        row, target = rows[here] - start, targets[here]
        log_probs[here] = logits[row, target] - log_z[row]
        greedy[here] = likeliest[row] == target
    return log_probs.cpu().numpy(), greedy.cpu().numpy()
