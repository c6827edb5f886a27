"""One space of tokens: each token is exactly one thing, and image codes and tokens map one to one."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import vocabs

from nanochameleon.vocab import N_BYTES, Vocab


def test_tokens_of_the_release():
    vocab = Vocab()
    assert (vocab.bos, vocab.pad, vocab.eos, vocab.unk) == (0, 1, 2, 3)
    assert (vocab.code_to_token(0), vocab.code_to_token(8191)) == (4, 8195)
    assert (vocab.eoi, vocab.boi, vocab.eot, vocab.size) == (8196, 8197, 8710, 65_536)
    names = {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>", 57: "IMGIMGFDZ", 4: "IMGIMGAZ", 8195: "IMGIMGIBJBZ",
             8196: "<eoss>", 8197: "<racm3:break>", 8710: "<reserved08706>", 8711: "<reserved08707>"}  # fmt: skip
    assert {token: vocab.name(token) for token in names} == names
    assert vocab.name_to_code("IMGIMGFDZ") == 53


@given(vocabs())
def test_text_image_and_special_tokens_partition_the_space(vocab):
    kinds = {kind: [t for t in range(vocab.size) if vocab.modality(t) == kind] for kind in ("text", "image", "special")}
    assert sum(map(len, kinds.values())) == vocab.size
    assert kinds["image"] == [vocab.code_to_token(code) for code in range(vocab.n_codes)]
    assert kinds["text"] == list(range(vocab.first_text, vocab.size)) and len(kinds["text"]) == vocab.n_text
    special = {vocab.bos, vocab.pad, vocab.eos, vocab.unk, vocab.eoi, vocab.boi, vocab.eot}
    assert len(special) == 7 and special <= set(kinds["special"])
    tokens = torch.arange(vocab.size)
    assert tokens[vocab.is_image(tokens)].tolist() == kinds["image"]
    assert tokens[vocab.is_text(tokens)].tolist() == kinds["text"]


@given(vocabs())
def test_codes_and_names_are_bijections(vocab):
    for code in range(vocab.n_codes):
        assert vocab.token_to_code(vocab.code_to_token(code)) == code
        assert vocab.name_to_code(vocab.name(vocab.code_to_token(code))) == code
    names = vocab.names()
    assert list(names.values()) == list(range(vocab.first_text))


KINDS = {
    "int64 tensor": lambda codes: torch.tensor(codes, dtype=torch.int64),
    "uint8 tensor": lambda codes: torch.tensor(codes, dtype=torch.uint8),
    "uint8 array": lambda codes: np.array(codes, dtype=np.uint8),
    "uint16 array": lambda codes: np.array(codes, dtype=np.uint16),
    "list": list,
}


@pytest.mark.parametrize("kind", KINDS)
@given(codes=st.lists(st.integers(0, 255), max_size=8))
def test_codes_of_any_integer_type(kind, codes):
    """uint8 is the trap: code 255 + 4 would wrap round to 3, a special id."""
    vocab, values = Vocab.toy(256, 0), KINDS[kind](codes)
    tokens = vocab.code_to_token(values)
    assert tokens.tolist() == [code + 4 for code in codes]
    assert vocab.token_to_code(tokens).tolist() == codes
    assert tokens.shape == (len(codes),) and isinstance(tokens, torch.Tensor) == isinstance(values, torch.Tensor)


@given(vocabs(), st.data())
def test_out_of_range_raises(vocab, data):
    outside = st.integers(max_value=-1) | st.integers(min_value=0)
    code = data.draw(outside.filter(lambda code: not 0 <= code < vocab.n_codes))
    with pytest.raises(ValueError, match="outside"):
        vocab.code_to_token(code)
    with pytest.raises(ValueError, match="outside"):
        vocab.token_to_code(code + vocab.first_code)
    with pytest.raises(ValueError, match="outside"):
        vocab.modality(data.draw(outside.filter(lambda token: not 0 <= token < vocab.size)))
    with pytest.raises(ValueError, match="outside"):
        vocab.code_to_token(torch.tensor([0, vocab.n_codes]))
    with pytest.raises(ValueError, match="outside"):
        vocab.token_to_code(np.array([[vocab.first_code, vocab.first_code - 1]]))


@pytest.mark.parametrize("values", [torch.tensor([1.5]), np.array([1.5]), float("nan")])
def test_codes_that_are_not_whole_raise(values):
    with pytest.raises(ValueError, match="whole"):
        Vocab().code_to_token(values)


def test_text_has_no_name_here():
    with pytest.raises(ValueError, match="text piece"):
        Vocab().name(Vocab().first_text)


@pytest.mark.parametrize(
    "name", ["IMGIMGZ", "IMGIMGKZ", "IMGIMG5Z", "IMGIMGFD", "FDZ", "<s>", "", "IMGIMGAFDZ", "IMGIMG٣Z"]
)
def test_other_names_are_no_codes(name):
    with pytest.raises(ValueError, match="not the name"):
        Vocab.name_to_code(name)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(size=4 + 4 + 8 + N_BYTES - 1, n_codes=4, n_reserved=8, eot_slot=2),  # one byte too few
        dict(size=1_000, n_codes=0, n_reserved=8, eot_slot=2),
        dict(size=1_000, n_codes=4, n_reserved=8, eot_slot=8),  # end of turn would be text
        dict(size=1_000, n_codes=4, n_reserved=8, eot_slot=1),  # end of turn would begin images
    ],
)
def test_a_layout_without_room_is_refused(sizes):
    with pytest.raises(ValueError):
        Vocab(**sizes)
