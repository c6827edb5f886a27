"""Documents that are tokenized when a batch asks for them: no shards on disk, but images are encoded during training.

Packing needs every document's length in advance: texts are tokenized once for it, and every image has as many tokens.
"""

from collections.abc import Sequence

import numpy as np

from nanochameleon.data.forms import RawDocument, RawImage, Source, fuse
from nanochameleon.documents import Text, render
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.text_tokenizer import TextTokenizer


class OnTheFly:
    """Documents 0, 1, 2, ... of a source, until they hold `n_tokens` tokens or, if given, are `n_documents`.

    Reads like Shards (loader.Documents).
    """

    def __init__(
        self,
        source: Source,
        image_tokenizer: ImageTokenizer,
        tokenizer: TextTokenizer,
        n_tokens: int,
        n_documents: int | None,
    ):
        self.source, self.image_tokenizer, self.tokenizer = source, image_tokenizer, tokenizer
        lengths, total = [], 0
        while len(lengths) < n_documents if n_documents else total < n_tokens:
            lengths.append(self.length(source.document(len(lengths))))
            total += lengths[-1]
        self.lengths = np.array(lengths, np.int64)
        self.groups = [(0, len(lengths))]

    def length(self, doc: RawDocument) -> int:
        """Tokens of a document, <s> and </s> included."""
        image = self.image_tokenizer.n_codes_per_image + 2  # <boi> and <eoi>
        tokens = (
            len(self.tokenizer.encode(s.text)) if isinstance(s, Text) else image if isinstance(s, RawImage) else 1
            for s in doc
        )
        return 2 + sum(tokens)

    def sizes(self, first: int, last: int) -> np.ndarray:
        return self.lengths[first:last]

    def fetch(self, numbers: Sequence[int]) -> list[np.ndarray]:
        docs = fuse([self.source.document(i) for i in numbers], self.image_tokenizer)
        return [np.array(render(doc, self.tokenizer, self.tokenizer.vocab)) for doc in docs]
