"""One vocabulary for text and images: which token means what.

Early fusion IS this file: text pieces and image codes are rows of one embedding table and columns of one softmax.
The layout is that of the released Chameleon (paper section 2.1), scaled down for toys:

    0 <s>   1 <pad>   2 </s>   3 <unk>
    4 .. 4+K-1              image codes, token = code + 4        (K = 8,192 in the release: 4 .. 8195)
    4+K      <eoss>         end of image                           (8196)
    4+K+1    <racm3:break>  begin of image, one above its end       (8197)
    4+K+2 .. 4+K+R-1        <reservedNNNNN>, token = NNNNN + 4; one of them ends a turn (8710 = <reserved08706>)
    4+K+R .. V-1            text pieces: 256 bytes first, then BPE merges

How text is split and images are coded is not here: text_tokenizer.py, images/tokenizer.py.
"""

from dataclasses import dataclass

import numpy as np

N_BYTES = 256
# The release spells the digits of an image code as letters: 53 is IMGIMGFDZ.
CODE_NAME = str.maketrans("0123456789", "ABCDEFGHIJ")
CODE_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


@dataclass(frozen=True)
class Vocab:
    """The layout above. Raises ValueError when there is no room for the special tokens or for the 256 bytes."""

    size: int = 65_536  # V, all tokens
    n_codes: int = 8_192  # K, entries of the image tokenizer's codebook
    n_reserved: int = 8_192  # R, tokens after the codes: end and begin of image, then reserved ones
    eot_slot: int = 514  # which of those R ends a turn (8710 - 8196)

    # The first four tokens are the same in every layout.
    bos = 0
    pad = 1
    eos = 2
    unk = 3
    first_code = 4

    def __post_init__(self):
        if self.n_codes < 1 or not 2 <= self.eot_slot < self.n_reserved:
            raise ValueError(f"need n_codes >= 1 and 2 <= eot_slot < n_reserved, got {self}")
        if self.n_text < N_BYTES:
            raise ValueError(f"{self.size} tokens leave {self.n_text} for text; the 256 bytes alone need {N_BYTES}")

    @staticmethod
    def toy(n_codes: int, n_merges: int) -> "Vocab":
        """The same scheme, just large enough: `n_codes` image codes, 8 reserved tokens, 256 bytes and `n_merges`."""
        return Vocab(4 + n_codes + 8 + N_BYTES + n_merges, n_codes, n_reserved=8, eot_slot=2)

    @property
    def eoi(self) -> int:
        return self.first_code + self.n_codes  # first of the R tokens after the codes

    @property
    def boi(self) -> int:
        return self.eoi + 1  # in the release, too, the end of an image comes before its begin

    @property
    def eot(self) -> int:
        return self.eoi + self.eot_slot  # one of the reserved tokens

    @property
    def first_text(self) -> int:
        return self.eoi + self.n_reserved  # the bytes, then the merges

    @property
    def n_text(self) -> int:
        return self.size - self.first_text

    def code_to_token(self, code):
        """Code 0..K-1 (an int, or an integer array or tensor of any shape) -> token. Raises ValueError outside."""
        return self._checked(code, 0, self.n_codes, "code") + self.first_code

    def token_to_code(self, token):
        """Inverse of code_to_token. Raises ValueError for a token that is not an image code."""
        return self._checked(token, self.first_code, self.eoi, "image token") - self.first_code

    def modality(self, token: int) -> str:
        """'text', 'image' (a code) or 'special'. Raises ValueError outside [0, V)."""
        self._checked(token, 0, self.size, "token")
        # From the top of the vocabulary: text, the R tokens after the codes, image codes, the first four.
        if token >= self.first_text:
            return "text"
        return "image" if self.first_code <= token < self.eoi else "special"

    def is_image(self, tokens):
        """Elementwise: is this token an image code? For arrays and tensors."""
        return (tokens >= self.first_code) & (tokens < self.eoi)

    def is_text(self, tokens):
        """Elementwise: is this token a text piece? For arrays and tensors."""
        return tokens >= self.first_text

    def name(self, token: int) -> str:
        """The release's name of a token that is not text: 0 -> '<s>', 57 -> 'IMGIMGFDZ', 8710 -> '<reserved08706>'."""
        named = {self.bos: "<s>", self.pad: "<pad>", self.eos: "</s>", self.unk: "<unk>",
                 self.eoi: "<eoss>", self.boi: "<racm3:break>"}  # fmt: skip
        if token in named:
            return named[token]
        if self.modality(token) == "image":
            return self.code_to_name(self.token_to_code(token))
        if self.modality(token) == "special":
            return f"<reserved{token - self.first_code:05d}>"
        raise ValueError(f"token {token} is a text piece; the text tokenizer knows its spelling")

    def names(self) -> dict[str, int]:
        """Every name that is not text -> its token, in the order of the tokens."""
        return {self.name(token): token for token in range(self.first_text)}

    @staticmethod
    def code_to_name(code: int) -> str:
        """53 -> 'IMGIMGFDZ': the decimal digits as letters."""
        return f"IMGIMG{str(code).translate(CODE_NAME)}Z"

    @staticmethod
    def name_to_code(name: str) -> int:
        """'IMGIMGFDZ' -> 53. Raises ValueError for any other form, leading zeros included."""
        # Compare with the only right spelling, so that IMGIMGAFDZ is not a second name of code 53.
        digits = name.removeprefix("IMGIMG").removesuffix("Z").translate(CODE_DIGITS)
        if not (digits.isascii() and digits.isdigit()) or Vocab.code_to_name(int(digits)) != name:
            raise ValueError(f"{name!r} is not the name of an image code")
        return int(digits)

    @staticmethod
    def _checked(values, low: int, high: int, what: str):
        """Check that all are in [low, high). Arrays and tensors become int64: uint8 codes + 4 could wrap round."""
        if isinstance(values, int):
            smallest = largest = values
        elif hasattr(values, "numel"):  # a torch tensor, recognised without importing torch
            if values.is_floating_point() or values.is_complex():
                raise ValueError(f"{what} must be whole, got {values.dtype}")
            values = values.long()
            smallest, largest = (int(values.min()), int(values.max())) if values.numel() else (low, low)
        else:
            values = np.asarray(values)
            if values.size and values.dtype.kind not in "iu":
                raise ValueError(f"{what} must be whole, got {values.dtype}")
            values = values.astype(np.int64)
            smallest, largest = (int(values.min()), int(values.max())) if values.size else (low, low)
        if not low <= smallest <= largest < high:
            raise ValueError(f"{what} outside [{low}, {high}): {smallest}..{largest}")
        return values
