"""What hypothesis draws, shared by the test files: small objects built from the library's own parts."""

from hypothesis import strategies as st

from nanochameleon.config import ModelConfig
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.vocab import Vocab

# --- text ----------------------------------------------------------------------------------------------------------

HOSTILE = ["<s>", "</s>", "<pad>", "<racm3:break>", "<eoss>", "IMGIMGFDZ", "<reserved08706>", "IMGIMG"]
# Where tokenizers disagree: runs of white space, code, apostrophes, digits, marks, several scripts, names of specials.
SNIPPETS = [
    " ", "  ", "   ", "    ", "\t", "\n", "\r", "\r\n", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "\x00",
    "the", " the", "the cat", "don't", "'s", "'ll", " 'RE", "12", " 3.14", "\u0663", "x\u00bd\u2167",
    "def f(x):\n\treturn x**2  # a", "x += 1;", "<a href=''>", "{\"k\": [1, 2]}", "_", "$", "+", "~",
    "\u2014", "\u3002", "\ufeff", "\u00e9", "e\u0301", "na\u00efve", "\u65e5\u672c\u8a9e", "\u0440\u0443\u0441",
    "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0639\u0631\u0628\u064a", "\u0e44\u0e17\u0e22", "\U0001f44d\U0001f3fd",
    "\U0001f468\u200d\U0001f469", "\ufffd", "\u200b",
    *HOSTILE,
]  # fmt: skip

any_text = st.lists(st.text() | st.sampled_from(SNIPPETS)).map("".join)
# `tokenizers` and `regex` carry tables of different Unicode versions: only letters that all versions know can agree.
settled_text = st.lists(st.text(st.characters(exclude_categories=["Cn", "Cs"])) | st.sampled_from(SNIPPETS)).map(
    "".join
)


@st.composite
def vocabs(draw) -> Vocab:
    n_codes, n_reserved = draw(st.integers(1, 40)), draw(st.integers(3, 12))
    size = 4 + n_codes + n_reserved + 256 + draw(st.integers(0, 20))
    return Vocab(size, n_codes, n_reserved, eot_slot=draw(st.integers(2, n_reserved - 1)))


@st.composite
def merge_lists(draw, letters: bytes, most: int) -> list[tuple[bytes, bytes]]:
    """Any merges of pieces made before, not only those that training finds."""
    pieces, merges = [bytes([b]) for b in letters], []
    for i, j in draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=most)):
        pair = pieces[-1 - i % len(pieces)], pieces[-1 - j % len(pieces)]
        if pair not in merges:
            merges.append(pair)
            pieces.append(pair[0] + pair[1])
    return merges


@st.composite
def tokenizers(draw) -> TextTokenizer:
    """With any merges; some text ids may stay unused."""
    vocab = draw(vocabs())
    return TextTokenizer(draw(merge_lists(b" athe'1\n\t\xc3\xa9\xe6\x97", vocab.n_text - 256)), vocab)


# --- models --------------------------------------------------------------------------------------------------------


@st.composite
def model_configs(draw, vocab_size: int = 280) -> ModelConfig:
    """GQA, QK-norm groups, both norm orders, odd widths."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    n_heads = kv_heads * draw(st.integers(1, 3))
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if kv_heads % n == 0]))
    return ModelConfig(
        vocab_size=vocab_size, dim=n_heads * 2 * draw(st.integers(1, 5)), n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads, n_kv_heads=None if kv_heads == n_heads else kv_heads, qk_norm_groups=groups,
        multiple_of=draw(st.sampled_from([1, 3, 8, 24])), max_seq_len=draw(st.sampled_from([64, 4_096])),
        ffn_dim_multiplier=draw(st.sampled_from([None, 0.4, 1.3])), rope_theta=draw(st.sampled_from([1e4, 1e3])),
        norm_order=draw(st.sampled_from(["pre", "post"])),
    )  # fmt: skip
