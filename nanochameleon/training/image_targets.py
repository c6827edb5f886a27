"""How drawing is learnt from words: which images of a batch are drawn, and noise on the codes that are read back.

An image's first codes say so much about the rest that the words are hardly needed, and a model follows them into what
it has seen before: "a purple star" begins purple and becomes a triangle. Where codes cannot be trusted, every one has
to be looked up in the words. Word dropout does the same for the latent variable of a sentence (arXiv 1511.06349).
Sampling is without noise. An image that opens its document is there to be read, not drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from nanochameleon.config import RunConfig
from nanochameleon.packing import IGNORE, Batch, ignore_targets
from nanochameleon.vocab import Vocab


def mask_targets(batch: Batch, cfg: RunConfig, vocab: Vocab) -> Batch:
    """A batch with targets for the images that the configuration wants learnt."""
    if cfg.train.image_loss == "none":
        return ignore_targets(batch, range(vocab.first_code, vocab.eoi))
    return batch if cfg.train.image_loss == "all" else drawn_alone(batch, cfg.vqgan.codes_per_image, vocab)


def images(batch: Batch, n_codes: int, vocab: Vocab) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each row: its number, the places of its images' codes (P, n_codes), and which images are drawn (P,)."""
    for row, (tokens, positions) in enumerate(zip(batch.tokens.numpy(), batch.positions.numpy(), strict=True)):
        starts = np.flatnonzero(tokens == vocab.boi)
        yield row, starts[:, None] + np.arange(1, n_codes + 1), positions[starts] > 1  # <s> and <boi> are 0 and 1


def drawn_alone(batch: Batch, n_codes: int, vocab: Vocab) -> Batch:
    """Without targets for the codes of images that open their document: nothing tells what they should show."""
    targets = batch.targets.clone()
    for row, places, drawn in images(batch, n_codes, vocab):
        targets[row, places[~drawn] - 1] = IGNORE
    return replace(batch, targets=targets)


def corrupt_image_tokens(
    batch: Batch, n_codes: int, vocab: Vocab, most: float, seed: int, numbers: Sequence[int]
) -> Batch:
    """In each drawn image a share of the codes, between 0 and `most`, is read as those of another document's image
    of the same row, at the same places. Targets stay.

    numbers: of the batch's rows in the whole training, of which (with the seed) the noise is a pure function: it does
    not depend on how rows are spread over ranks, and a resumed run repeats it.
    """
    tokens = batch.tokens.clone()
    for row, places, drawn in images(batch, n_codes, vocab):
        if not drawn.any():
            continue
        rng = np.random.default_rng((seed, int(numbers[row])))
        codes = batch.tokens[row].numpy()[places]
        share = most * drawn[:, None] * rng.random((len(codes), 1))
        others = codes[partners(batch.doc_ids[row].numpy()[places[:, 0]])]
        noise = np.where(rng.random(codes.shape) < share, others, codes)
        tokens[row].numpy()[places] = noise
    return replace(batch, tokens=tokens)


def partners(documents: np.ndarray) -> np.ndarray:
    """Documents (P,) of a row's images, P > 0 -> for each the next image of another one, round and round, or itself
    where there is none. An image of its own document would tell what comes later."""
    n = np.arange(len(documents))
    ahead = (n[:, None] + n) % len(n)  # (P, P): all images in order, each one's row beginning with itself
    return ahead[n, (documents[ahead] != documents[:, None]).argmax(1)]
