"""Fit a prompt into the room that the context leaves for it: <s> and the right end stay, and no image is cut."""

from collections.abc import Sequence

from nanochameleon.errors import UserError
from nanochameleon.vocab import Vocab


def fit(prompt: Sequence[int], room: int, vocab: Vocab) -> tuple[list[int], bool]:
    """Return a prompt of at most `room` tokens, and whether its left end was cut off.

    An empty prompt is <s> alone. Raises UserError where an image would be cut off, or nothing of the prompt be left.
    """
    tokens = list(prompt) or [vocab.bos]
    if (over := len(tokens) - room) <= 0:
        return tokens, False
    lengths = f"the prompt has {len(tokens)} tokens, and the context has room for {room}"
    if room < 1:
        raise UserError(f"{lengths}: nothing of it would be left; ask for fewer new tokens")
    if any(vocab.first_code <= token <= vocab.boi for token in tokens[1 : 1 + over]):
        raise UserError(f"{lengths}: an image would be cut off; give fewer shots")
    return [tokens[0], *tokens[1 + over :]], True
