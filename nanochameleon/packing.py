"""Documents of tokens -> sequences of one length, each with several whole documents, and the target at each position.

    seq_len 8, documents [a b c] [d e f g] [h i]:

    tokens     a b c h i . . .      d e f g . . . .        . is <pad>
    targets    b c - i - - - -      e f g - - - - -        - is IGNORE
    doc_ids    0 0 0 1 1 x x x      0 0 0 0 x x x x        x is NO_DOCUMENT
    positions  0 1 2 0 1 0 0 0      0 1 2 3 0 0 0 0

No document is cut, so no image is; attention keeps documents apart by doc_ids (transformer.py). Which documents come
in which order, and from where, is data/loader.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nanochameleon.kernels.attention.documents import Documents, move

IGNORE = -100  # a target that no loss counts; torch's own default
NO_DOCUMENT = -1  # doc_id of padding


@dataclass(frozen=True, eq=False)
class Batch:
    """Four int64 tensors (B, T), as in the table above, and where their documents begin once the batch was moved."""

    tokens: torch.Tensor
    targets: torch.Tensor
    doc_ids: torch.Tensor
    positions: torch.Tensor
    documents: Documents | None = None

    def to(self, device) -> "Batch":
        """Move the batch. The CPU still knows where documents begin; a GPU would have to be waited for."""
        documents = self.documents or Documents.of(self.doc_ids)
        return Batch(*(move(t, device) for t in self._all()), documents.to(device))

    def __getitem__(self, sequences: slice) -> "Batch":
        """Some of its sequences: a micro-batch, or one rank's part. Slice before you move: documents are dropped."""
        return Batch(*(t[sequences] for t in self._all()))

    def _all(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.targets, self.doc_ids, self.positions


def best_fit(lengths: Sequence[int], seq_len: int) -> np.ndarray:
    """Assign each document to a sequence: (n,) int64, sequences numbered from 0 without a gap.

    Best fit: a document goes to the sequence with the least room that still holds it, or to a new one. For documents
    of 72 to 94 tokens and sequences of 256 this fills 96% of the positions. Closing a sequence at the first document
    that does not fit fills 87%.

    Raises ValueError for a document that is empty or longer than seq_len.
    """
    assigned = np.empty(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # sequences by the room they have left
    # Bit r is set if with_room[r] is not empty. So a shift finds the smallest room that is large enough, and 1,000,000
    # documents take half a second.
    rooms = 0
    n_sequences = 0
    for i, length in enumerate(np.asarray(lengths, np.int64).tolist()):
        if not 1 <= length <= seq_len:
            raise ValueError(f"document {i} has {length} tokens; a sequence holds 1 to {seq_len}")
        # 1. the sequence with the smallest room that is large enough, or a new one
        if large_enough := rooms >> length:
            room = length + (large_enough & -large_enough).bit_length() - 1  # x & -x is the lowest bit that is set
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence = seq_len, n_sequences
            n_sequences += 1
        # 2. put the document there
        assigned[i] = sequence
        if left := room - length:
            with_room[left].append(sequence)
            rooms |= 1 << left
    return assigned


def answer_mask(tokens: Sequence[int], eot: int) -> np.ndarray:
    """Mark the tokens of a conversation that belong to an answer: (n,) bool.

    Turns end with `eot`; the second, fourth, ... turn is an answer, and the token that ends it belongs to it (paper
    section 3.2: loss on answers alone).
    """
    turns_ended = np.cumsum(np.asarray(tokens) == eot)
    return np.concatenate([[0], turns_ended[:-1]]) % 2 == 1


def ignore_targets(batch: Batch, tokens: range) -> Batch:
    """Return the same batch without these tokens among its targets."""
    ignored = (batch.targets >= tokens.start) & (batch.targets < tokens.stop)
    return replace(batch, targets=batch.targets.masked_fill(ignored, IGNORE))


def collate(
    sequences: Sequence[Sequence[Sequence[int]]], seq_len: int, pad: int, assistant_eot: int | None = None
) -> Batch:
    """Build a Batch from the documents of each sequence, which must fit into seq_len.

    assistant_eot: the end-of-turn token; if given, only answers have targets.
    """
    shape = len(sequences), seq_len
    tokens, targets = np.full(shape, pad, np.int64), np.full(shape, IGNORE, np.int64)
    doc_ids, positions = np.full(shape, NO_DOCUMENT, np.int64), np.zeros(shape, np.int64)
    # What no document overwrites stays padding in all four.
    for s, docs in enumerate(sequences):
        start = 0
        for doc_id, doc in enumerate(docs):
            end = start + len(doc)
            next_tokens = np.asarray(doc[1:], np.int64)
            if assistant_eot is not None:
                next_tokens = np.where(answer_mask(doc, assistant_eot)[1:], next_tokens, IGNORE)
            tokens[s, start:end] = doc
            targets[s, start : end - 1] = next_tokens  # the last token of a document predicts nothing
            doc_ids[s, start:end] = doc_id
            positions[s, start:end] = np.arange(end - start)  # each document starts at 0, as it will in sampling
            start = end
    return Batch(*(torch.from_numpy(array) for array in (tokens, targets, doc_ids, positions)))


def pack(docs: Sequence[Sequence[int]], seq_len: int, pad: int, assistant_eot: int | None = None) -> Batch:
    """Pack documents by best fit: each document whole, exactly once, and in the order given within its sequence.

    assistant_eot: as in collate. Raises ValueError for a document that is empty or longer than seq_len: the caller cuts
    or counts those.
    """
    sequences: list[list[Sequence[int]]] = []
    for doc, s in zip(docs, best_fit([len(doc) for doc in docs], seq_len).tolist(), strict=True):
        if s == len(sequences):  # best_fit numbers sequences in the order in which it opens them
            sequences.append([])
        sequences[s].append(doc)
    return collate(sequences, seq_len, pad, assistant_eot)
