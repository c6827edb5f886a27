"""Documents that are tokenized when a batch asks for them: no shards, at the price of encoding images in training.

What a row holds must be known before: texts are tokenized once for their lengths, and every image has as many ids.
"""

from collections.abc import Sequence

import numpy as np

from nanochameleon.data.forms import RawDocument, RawImage, Source, fuse
from nanochameleon.documents import Text, render
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.text_tokenizer import TextTokenizer


class Live:
    """Documents 0, 1, 2, ... of a source, until they hold `n_ids` ids or, if given, are `n_documents`."""

    def __init__(
        self,
        source: Source,
        image_tokenizer: ImageTokenizer,
        tokenizer: TextTokenizer,
        n_ids: int,
        n_documents: int | None,
    ):
        self.source, self.image_tokenizer, self.tokenizer = source, image_tokenizer, tokenizer
        lengths, total = [], 0
        while len(lengths) < n_documents if n_documents else total < n_ids:
            lengths.append(self.length(source.document(len(lengths))))
            total += lengths[-1]
        self.lengths = np.array(lengths, np.int64)
        self.groups = [(0, len(lengths))]

    def length(self, doc: RawDocument) -> int:
        """Ids of a document, <s> and </s> included."""
        image = self.image_tokenizer.n_codes_per_image + 2
        ids = (
            len(self.tokenizer.encode(s.text)) if isinstance(s, Text) else image if isinstance(s, RawImage) else 1
            for s in doc
        )
        return 2 + sum(ids)

    def sizes(self, first: int, last: int) -> np.ndarray:
        return self.lengths[first:last]

    def fetch(self, numbers: Sequence[int]) -> list[np.ndarray]:
        docs = fuse([self.source.document(i) for i in numbers], self.image_tokenizer)
        return [np.array(render(doc, self.tokenizer, self.tokenizer.vocab)) for doc in docs]
