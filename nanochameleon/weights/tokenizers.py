"""Both tokenizers of a model, as runs, prepared data and every layout hold them, opened without loading them."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanochameleon.config import VQGANConfig
from nanochameleon.errors import UserError, shown
from nanochameleon.files import read_json
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training import checkpoint
from nanochameleon.training.run import IMAGE_TOKENIZER, TEXT_TOKENIZER, read_config
from nanochameleon.weights.checks import check_finite, check_image_tokenizer
from nanochameleon.weights.layouts import DECODER
from nanochameleon.weights.tensor_files import LazyTensors, Safetensors
from nanochameleon.weights.tokenizer_json import ForeignTokenizer, from_json, spell


@dataclass(frozen=True)
class Tokenizers:
    """All that decides which tokens a document becomes."""

    vocab_size: int
    context: int  # tokens that their model reads at most; does not affect tokens
    vqgan: VQGANConfig
    tokenizer_json: dict
    vq: LazyTensors

    def text(self) -> TextTokenizer:
        """Load the text tokenizer. Raises ValueError and others, as from_json does, if the two do not fit together."""
        found = from_json(self.tokenizer_json)
        if found.vocab.size != self.vocab_size:  # the release's last tokens need not have pieces
            found = from_json(self.tokenizer_json, dataclasses.replace(found.vocab, size=self.vocab_size))
        if found.vocab.n_codes != self.vqgan.n_codes:
            raise ValueError(f"it has {found.vocab.n_codes} image codes, the image tokenizer {self.vqgan.n_codes}")
        return found

    def vq_state(self) -> dict[str, Tensor]:
        """Return the image tokenizer's tensors in fp32, copied out of the mapped file."""
        return {name: self.vq.get(name).to(torch.float32, copy=True) for name in self.vq.meta}

    def image_tokenizer(self, device: torch.device) -> ImageTokenizer:
        return ImageTokenizer(VQGAN.from_state(self.vqgan, self.vq_state()).to(device))

    def digest(self) -> str:
        """Return a hash that is equal if every document becomes the same tokens. The image decoder is left out."""
        text = self.text()
        pieces = {spell(piece): token for piece, token in text.tokens.items()}
        merges = [[spell(left), spell(right)] for left, right in text.merges]
        sizes = [dataclasses.asdict(each) for each in (text.vocab, self.vqgan)]
        # rare fields only where they are set, so that the digest of other tokenizers stays as it was
        rare = [text.added, text.ignore_merges] if isinstance(text, ForeignTokenizer) else []
        found = hashlib.sha256(json.dumps([*sizes, pieces, merges, *rare], sort_keys=True).encode())
        for name in sorted(self.vq.meta):
            if not name.startswith(DECODER):
                x = self.vq.get(name).to(torch.float32).contiguous()
                found.update(name.encode() + x.numpy().data)
        return found.hexdigest()


def open_text_tokenizer(tokenizers: Tokenizers, path: Path) -> TextTokenizer:
    """Load the text tokenizer. Raises UserError naming `path`, the folder it is from."""
    try:
        return tokenizers.text()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it lacks {shown(error)}" if isinstance(error, KeyError) else shown(error, 140)
        raise UserError(f"the text tokenizer in {path} is not usable with its model ({why})") from None


def run_tokenizers(folder: Path) -> Tokenizers:
    """Open a run's tokenizers. Its transformer need not be trained yet."""
    cfg = read_config(folder)
    return stored_tokenizers(folder, cfg.model.vocab_size, cfg.model.max_seq_len, cfg.vqgan)


def stored_tokenizers(folder: Path, vocab_size: int, context: int, vqgan: VQGANConfig) -> Tokenizers:
    """Open the tokenizers in a run or in prepared data."""
    newest = checkpoint.locate(folder / IMAGE_TOKENIZER)
    vq = Safetensors([file for file in checkpoint.tensor_files(newest) if file.stem == "model"])
    check_image_tokenizer(vqgan, vq.meta, f"{folder}: image tokenizer")
    tensors = check_finite(LazyTensors(vq.meta, vq.__getitem__), folder)
    return Tokenizers(vocab_size, context, vqgan, read_json(folder / TEXT_TOKENIZER), tensors)
