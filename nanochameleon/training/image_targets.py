"""How drawing is learnt from words: which images of a batch are learnt, and noise on the image tokens that are read.

The first tokens of an image say so much about the rest that the words are hardly needed: a model continues into what it
has seen before, so "a purple star" begins purple and becomes a triangle. Where image tokens cannot be trusted, each one
has to be looked up in the words. Word dropout does the same for the latent variable of a sentence (arXiv 1511.06349).
Sampling is without noise, so towards the end of training there may be less of it: a model that trusts no token does
not know what it has drawn already.

An image is *drawn* if words precede it in its document. An image that opens its document is there to be read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from nanochameleon.config import TrainConfig
from nanochameleon.packing import IGNORE, Batch, ignore_targets
from nanochameleon.vocab import Vocab


def mask_targets(batch: Batch, image_loss: str, n_codes: int, vocab: Vocab) -> Batch:
    """Keep the targets of all images, of drawn ones, or of none, as train.image_loss says."""
    if image_loss == "none":
        return ignore_targets(batch, range(vocab.first_code, vocab.eoi))
    return batch if image_loss == "all" else without_read_images(batch, n_codes, vocab)


def image_positions(batch: Batch, n_codes: int, vocab: Vocab) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each sequence: its number in the batch, the positions of its images' tokens (P, n_codes), and which of the
    images are drawn (P,)."""
    for row, (tokens, positions) in enumerate(zip(batch.tokens.numpy(), batch.positions.numpy(), strict=True)):
        starts = np.flatnonzero(tokens == vocab.boi)
        yield row, starts[:, None] + np.arange(1, n_codes + 1), positions[starts] > 1  # <s> is at 0, <boi> at 1


def without_read_images(batch: Batch, n_codes: int, vocab: Vocab) -> Batch:
    """Remove the targets of images that open their document: nothing before them says what they show."""
    targets = batch.targets.clone()
    for row, where, drawn in image_positions(batch, n_codes, vocab):
        targets[row, where[~drawn] - 1] = IGNORE  # the target at t is the token at t + 1
    return replace(batch, targets=targets)


def noise_fraction(step: int, cfg: TrainConfig) -> float:
    """The largest fraction of an image's tokens to corrupt in step 0 .. cfg.steps - 1: linear from first to last."""
    first, last = cfg.image_token_noise, cfg.image_token_noise_end
    return first if last is None else first + (last - first) * step / max(1, cfg.steps - 1)


def corrupt_image_tokens(
    batch: Batch, max_fraction: float, n_codes: int, vocab: Vocab, seed: int, sample_indices: Sequence[int]
) -> Batch:
    """Replace a random fraction of each drawn image's tokens, between 0 and max_fraction; targets stay.

    The replacements are the tokens at the same positions of another document's image in the same sequence. The noise is
    a pure function of the seed and sample_indices, the numbers (B,) of the sequences in the whole training. So it does
    not depend on how sequences are spread over ranks, and a resumed run repeats it.
    """
    if not max_fraction:
        return batch
    tokens = batch.tokens.clone()
    for row, where, drawn in image_positions(batch, n_codes, vocab):
        if not drawn.any():
            continue
        rng = np.random.default_rng((seed, int(sample_indices[row])))
        codes = batch.tokens[row].numpy()[where]  # (P, n_codes)
        fraction = max_fraction * drawn[:, None] * rng.random((len(codes), 1))  # one for each image
        others = codes[next_of_other_document(batch.doc_ids[row].numpy()[where[:, 0]])]
        tokens[row].numpy()[where] = np.where(rng.random(codes.shape) < fraction, others, codes)
    return replace(batch, tokens=tokens)


def next_of_other_document(documents: np.ndarray) -> np.ndarray:
    """The documents (P,) of a sequence's images, P > 0 -> for each image the next one of another document, cyclically,
    or itself if there is none. An image of the same document could reveal what comes later."""
    n = np.arange(len(documents))
    ahead = (n[:, None] + n) % len(n)  # (P, P): row i lists all images in order, starting with image i
    return ahead[n, (documents[ahead] != documents[:, None]).argmax(1)]
