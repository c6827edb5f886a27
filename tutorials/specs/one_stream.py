"""What lesson 3's answers must do: checked against vocab.py, documents.py, packing.py and losses.py."""

import operator
import random
from collections.abc import Iterator

import torch

from checks import Wrong, close, compare, shown
from nanochameleon.documents import Image, Segment, parse, render
from nanochameleon.kernels.attention import reference
from nanochameleon.losses import next_token_loss
from nanochameleon.packing import IGNORE, Batch, pack
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.vocab import Vocab

RELEASE = Vocab()


def _packed(n: int = 20) -> Iterator[Batch]:
    """Packed sequences, a small one first; some have no padding, some a document of one token."""
    rng = random.Random(0)
    cases = [(4, [2, 1]), (8, [8]), *((8, [rng.randint(1, 6) for _ in range(9)]) for _ in range(n))]
    for seq_len, lengths in cases:
        batch = pack([[rng.randint(10, 99) for _ in range(n)] for n in lengths], seq_len, RELEASE.pad)
        yield from (batch[i : i + 1] for i in range(len(batch.tokens)))


def visible(answer):
    """The mask equals `reference.visible`'s."""
    compare(answer, lambda ids: reference.visible(ids[None], ids[None])[0], ((b.doc_ids[0],) for b in _packed()))


def positions(answer):
    """The positions equal those of `pack`."""
    expected = {tuple(b.doc_ids[0].tolist()): b.positions[0] for b in _packed()}
    compare(answer, lambda ids: expected[tuple(ids.tolist())], ((b.doc_ids[0],) for b in _packed()))


def targets(answer):
    """The targets equal those of `pack`."""
    expected = {tuple(b.tokens[0].tolist()): b.targets[0] for b in _packed()}
    compare(
        answer,
        lambda tokens, _: expected[tuple(tokens.tolist())],
        ((b.tokens[0], b.doc_ids[0]) for b in _packed()),
    )


def loss(answer):
    """The loss equals `next_token_loss`'s, with and without z-loss, and for no target at all."""
    torch.manual_seed(0)
    inputs = [(2 * torch.randn(3, 4), torch.tensor([2, IGNORE, 0]), z_loss) for z_loss in (0.0, 0.1)]
    inputs += [(5 * torch.randn(2, 4) + 30, torch.full((2,), IGNORE), 0.1)]
    inputs += [(100 * torch.randn(6, 9), torch.tensor([0, 8, IGNORE, 3, 3, IGNORE]), 1e-3)]
    vocab = Vocab.toy(8, 0)
    compare(answer, lambda logits, targets, z: next_token_loss(logits, targets, vocab, z).loss, inputs)


def images_in_context(answer):
    """How many images of 512 x 512 pixels fit into 4,096 tokens."""
    close(answer, 4_096 // (32 * 32 + 2), 0.0)


def image_share(answer):
    """The share of image codes among the tokens of a caption of 12 tokens and its image."""
    close(answer, 1_024 / 1_040, 5e-4)


def _tokenizer() -> TextTokenizer:
    return TextTokenizer([], RELEASE)


def refused(answer):
    """`parse` refuses tokens that are all of the release's vocabulary."""
    try:
        answer = [operator.index(token) for token in answer]  # ints of Python, NumPy and torch
    except TypeError:
        raise Wrong(f"the answer is a list of whole numbers, not {shown(answer)}") from None
    if outside := [token for token in answer if not 0 <= token < RELEASE.size]:
        raise Wrong(f"{outside[0]} is no token: they are 0 to {RELEASE.size - 1:,}")
    try:
        doc = parse(answer, _tokenizer(), RELEASE)
    except ValueError:
        return
    raise Wrong(f"parse reads {answer} as {doc}")


def unequal(answer):
    """The document comes back from its tokens as another one."""
    if not isinstance(answer, (list, tuple)) or not all(isinstance(segment, Segment) for segment in answer):
        raise Wrong(f"the answer is a document, a list of Text and Image, not {shown(answer)}")
    # codes in a list are the same codes
    document = [Image(tuple(each.codes)) if isinstance(each, Image) else each for each in answer]
    if parse(render(document, _tokenizer(), RELEASE), _tokenizer(), RELEASE) == document:
        raise Wrong(f"{document} comes back as it was")
