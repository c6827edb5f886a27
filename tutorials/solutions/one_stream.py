"""Lesson 3's exercises, solved: what the transformer reads next to the tokens of a packed sequence, and the loss."""

import torch
from torch import Tensor

from nanochameleon.documents import Text
from nanochameleon.packing import IGNORE, NO_DOCUMENT


def visible(doc_ids: Tensor) -> Tensor:
    """(T,) -> bool (T, T): whether the token of a row sees the token of a column."""
    causal = torch.ones(len(doc_ids), len(doc_ids), dtype=torch.bool).tril()  # itself and what comes before
    same_document = doc_ids[:, None] == doc_ids[None, :]
    return causal & same_document


def positions(doc_ids: Tensor) -> Tensor:
    """(T,) -> (T,): each token's number in its document, from 0; padding has 0."""
    seen = visible(doc_ids).sum(1)  # a document's first token sees itself alone, its second two tokens, ...
    return torch.where(doc_ids == NO_DOCUMENT, 0, seen - 1)


def targets(tokens: Tensor, doc_ids: Tensor) -> Tensor:
    """(T,), (T,) -> (T,): the next token of the same document, or IGNORE."""
    continues = (doc_ids[1:] == doc_ids[:-1]) & (doc_ids[1:] != NO_DOCUMENT)
    following = torch.where(continues, tokens[1:], IGNORE)
    return torch.cat([following, torch.tensor([IGNORE])])  # nothing follows the last place


def loss(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """(N, V), (N,) -> the sum of cross-entropy and z-loss over the places that have a target."""
    learnt = targets != IGNORE
    logits, targets = logits[learnt], targets[learnt]
    log_z = logits.logsumexp(-1)  # log of the sum of exp(logit)
    target_logit = logits.gather(-1, targets[:, None])[:, 0]
    return (log_z - target_logit + z_loss * log_z**2).sum()


# 512 x 512 pixels are 32 x 32 codes and two tokens around them: 4 images have 4 * 1,026 = 4,104 tokens.
images_in_context = 3

# <s>, 12 tokens of text, begin of image, 1,024 codes, end of image, </s>
image_share = 1_024 / (1 + 12 + 1 + 1_024 + 1 + 1)


# <s>, begin of image, a code, </s>: the image has no end.
refused = [0, 8_197, 4, 2]

# Two texts next to each other are one text in the tokens, where nothing marks the border.
unequal = [Text("a red "), Text("circle")]
