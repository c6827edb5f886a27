"""Text <-> ids: nothing is lost, nothing special can be spelled, and `tokenizers` agrees on the same file."""

import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import SNIPPETS, any_text, merge_lists, tokenizers, vocabs
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from nanochameleon import text_tokenizer
from nanochameleon.errors import UserError
from nanochameleon.text_tokenizer import BYTES, TextTokenizer, count_words, merge_word, spell, split_words, train
from nanochameleon.vocab import N_BYTES, Vocab

# `tokenizers` and `regex` carry tables of different Unicode versions: only letters that all versions know can agree.
settled_text = st.lists(st.text(st.characters(exclude_categories=["Cn", "Cs"])) | st.sampled_from(SNIPPETS)).map(
    "".join
)
corpora = st.lists(any_text | st.text("ab \n", max_size=60), max_size=4)


def loaded_by_tokenizers(path) -> Tokenizer:
    theirs = Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True  # else it turns text that spells a special token into that token
    return theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


# --- words ---------------------------------------------------------------------------------------------------------


@given(any_text)
def test_words_joined_are_the_text(text):
    assert "".join(split_words(text)) == text


@given(settled_text)
def test_words_are_those_of_the_release(text):
    """The release's five steps one after the other, run by `tokenizers`."""
    steps = [
        pre_tokenizers.Split(Regex("([\\t\\n]|    |  )"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(Regex(r"[\p{P}!-/:-@\[-`{-~]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),  # GPT-2's pattern is inside
    ]
    theirs = pre_tokenizers.Sequence(steps).pre_tokenize_str(text)
    assert [spell(word.encode()) for word in split_words(text)] == [word for word, _ in theirs]


def test_words_of_an_example():
    text = "it's 12 cats;\n\tx+=1   y"
    words = ["it", "'", "s", " ", "1", "2", " cats", ";", "\n", "\t", "x", "+", "=", "1", "  ", " y"]
    assert list(split_words(text)) == words


# --- learning ------------------------------------------------------------------------------------------------------


def naive_train(texts, n_merges):
    """Counts everything anew for each merge."""
    counts = Counter(word for text in texts for word in split_words(text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for pieces, n in words:
            for pair in pairwise(pieces):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        for pieces, _ in words:
            for i in range(len(pieces)):  # pieces shrink on the way: past the end, the slice is no pair
                if tuple(pieces[i : i + 2]) == best:
                    pieces[i : i + 2] = [b"".join(best)]
    return merges


@given(corpora, st.integers(0, 30))
def test_training_always_merges_the_most_frequent_pair(texts, n_merges):
    assert train(texts, n_merges) == naive_train(texts, n_merges)


def test_training_agrees_with_the_naive_one_for_long():
    """Long enough for counts to fall while their entry waits in the queue."""
    texts = [" ".join(f"{chr(97 + i * i % 23)}{chr(97 + i * 7 % 26)}{'on' * (i % 4)}ing" for i in range(600))]
    merges = train(texts, 200)
    assert len(merges) == 200 and merges == naive_train(texts, 200)


@given(corpora, st.randoms())
def test_training_depends_on_counts_alone(texts, random):
    shuffled = random.sample(texts, len(texts))
    assert train(shuffled, 20) == train(texts, 20)


def test_too_small_a_corpus_gives_fewer_merges_and_leaves_ids_unused():
    vocab = Vocab.toy(4, n_merges=100)
    for texts, n in (([], 0), ([""], 0), (["a", "b"], 0), (["abc abc"], 2)):  # " abc" stands only once
        tokenizer = TextTokenizer.train(texts, vocab, progress=False)
        assert len(tokenizer.merges) == n
        assert tokenizer.decode([vocab.size - 1, *tokenizer.encode("abc")]) == "abc"


def test_a_word_longer_than_the_limit_is_cut_in_training():
    counts = count_words(["é" * 100_000])
    assert max(len(word.decode()) for word in counts) <= text_tokenizer.LONGEST_TRAINING_WORD
    assert sum(len(word) * n for word, n in counts.items()) == 200_000


# --- encoding and decoding -----------------------------------------------------------------------------------------


@given(tokenizers(), any_text)
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(corpora, st.integers(0, 30), any_text)
def test_decode_inverts_encode_after_training(texts, n_merges, text):
    tokenizer = TextTokenizer.train(texts, Vocab.toy(4, n_merges), progress=False)
    for each in (text, *texts):
        assert tokenizer.decode(tokenizer.encode(each)) == each


@given(tokenizers(), st.text(st.characters(categories=["Cs", "Ll"])))
def test_lone_surrogates_become_the_replacement_character(tokenizer, text):
    expected = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
    assert tokenizer.decode(tokenizer.encode(text)) == expected


@given(tokenizers(), st.data())
def test_ids_cut_anywhere_still_decode(tokenizer, data):
    """Sampling may stop inside a letter: bytes are exact, text never raises."""
    ids = tokenizer.encode(data.draw(any_text))
    cut = data.draw(st.integers(0, len(ids)))
    assert tokenizer.decode_bytes(ids[:cut]) + tokenizer.decode_bytes(ids[cut:]) == tokenizer.decode_bytes(ids)
    assert isinstance(tokenizer.decode(ids[:cut]), str)


@given(tokenizers())
def test_ids_that_are_not_text_are_refused(tokenizer):
    vocab = tokenizer.vocab
    for token in (-1, vocab.bos, vocab.boi, vocab.eot, vocab.first_text - 1, vocab.size):
        with pytest.raises(ValueError, match="not text"):
            tokenizer.decode([vocab.first_text, token])


def naive_merge(word, ranks):
    """Looks at the whole word for each merge."""
    pieces = [bytes([b]) for b in word]
    while found := [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        _, i = min(found)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


@given(merge_lists(b"abc", 12), st.text("abc", max_size=30))
@example([(b"b", b"c"), (b"a", b"b"), (b"bc", b"a"), (b"a", b"bc")], "abca")  # what was to merge first has changed
def test_merging_takes_the_lowest_rank_first_and_the_leftmost_of_equals(merges, word):
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    assert merge_word(word.encode(), ranks) == naive_merge(word.encode(), ranks)


def test_a_word_of_200_000_letters():
    merges = [(b"a", b"a"), (b"aa", b"aa"), (b"aaaa", b"a")]
    tokenizer = TextTokenizer(merges, Vocab.toy(4, 3))
    ids = tokenizer.encode("a" * 200_001)
    assert tokenizer.decode(ids) == "a" * 200_001
    assert len(ids) == 50_000  # aaaa 49,999 times, then one of five
    assert not tokenizer.cache


def test_the_cache_is_bounded_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(text_tokenizer, "CACHED_WORDS", 10)
    tokenizer = TextTokenizer.train(["abc abcd"] * 2, Vocab.toy(4, 10), progress=False)
    text = " ".join("abcd"[: i % 5] + chr(97 + i % 26) for i in range(200))
    uncached = [tokenizer.ids[p] for word in split_words(text) for p in merge_word(word.encode(), tokenizer.ranks)]
    first = tokenizer.encode(text)
    assert 0 < len(tokenizer.cache) <= 10
    assert first == tokenizer.encode(text) == uncached


# --- no text spells a special id -------------------------------------------------------------------------------------

HOSTILE = ["<s>", "</s>", "<pad>", "<racm3:break>", "<eoss>", "IMGIMGFDZ", "<reserved08706>", "IMGIMG"]


@given(tokenizers(), st.data())
def test_encode_makes_text_ids_only(tokenizer, data):
    names = st.sampled_from([*tokenizer.vocab.names(), *HOSTILE])
    text = data.draw(st.lists(names | any_text).map("".join))
    ids = tokenizer.encode(text)
    assert all(tokenizer.vocab.modality(token) == "text" for token in ids)
    assert tokenizer.decode(ids) == text


def test_not_even_after_training_on_the_names(folder):
    vocab = Vocab.toy(60, 400)
    names = list(vocab.names())
    tokenizer = TextTokenizer.train([" ".join(names) * 3, "".join(names)] + names * 5, vocab, progress=False)
    assert len(tokenizer.merges) > 50
    tokenizer.save(folder / "names.json")
    theirs = loaded_by_tokenizers(folder / "names.json")
    for text in [*names, *HOSTILE, "".join(names), " ".join(names)]:
        ids = tokenizer.encode(text)
        assert min(ids) >= vocab.first_text
        assert ids == theirs.encode(text).ids


def test_a_piece_named_like_a_special_id_is_refused():
    with pytest.raises(ValueError, match="<s>"):
        TextTokenizer([(b"<", b"s"), (b"<s", b">")], Vocab.toy(4, 2))


@pytest.mark.parametrize(
    "merges, ids",
    [
        ([(b"ab", b"c")], None),  # ab has not been made
        ([(b"a", b"b"), (b"b", b"c"), (b"c", b"d")], None),  # no room for three
        ([], {piece: 16 + min(i, 254) for i, piece in enumerate(BYTES)}),  # an id for two bytes
        ([], {piece: i for i, piece in enumerate(BYTES)}),  # text over special ids
        ([], {piece: 16 + i for i, piece in enumerate(BYTES[1:])}),  # a byte without id
    ],
)
def test_merges_and_ids_that_cannot_belong_together_are_refused(merges, ids):
    with pytest.raises(ValueError):
        TextTokenizer(merges, Vocab.toy(4, 2), ids)


# --- files ---------------------------------------------------------------------------------------------------------


@given(tokenizers(), settled_text)
def test_tokenizers_gives_the_same_ids_on_the_same_file(folder, tokenizer, text):
    tokenizer.save(folder / "same.json")
    theirs = loaded_by_tokenizers(folder / "same.json")
    ids = tokenizer.encode(text)
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids) == text
    assert all(theirs.token_to_id(name) == token for name, token in tokenizer.vocab.names().items())


@given(st.lists(settled_text, max_size=4), settled_text)
def test_tokenizers_gives_the_same_ids_after_training(folder, texts, text):
    tokenizer = TextTokenizer.train(texts, Vocab.toy(4, 30), progress=False)
    tokenizer.save(folder / "trained.json")
    theirs = loaded_by_tokenizers(folder / "trained.json")
    for each in (text, *texts):
        assert theirs.encode(each).ids == tokenizer.encode(each)


def same(a: TextTokenizer, b: TextTokenizer) -> bool:
    return (a.merges, a.ids, a.vocab, a.added) == (b.merges, b.ids, b.vocab, b.added)


@given(tokenizers())
def test_load_inverts_save(folder, tokenizer):
    tokenizer.save(folder / "round.json")
    assert same(TextTokenizer.load(folder / "round.json"), tokenizer)
    assert same(TextTokenizer.load(folder / "round.json", tokenizer.vocab), tokenizer)
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []


def test_merges_of_spaces_newlines_and_every_byte_survive_a_file(folder):
    merges = [(b" ", b" "), (b"  ", b"\n"), (b"\r", b"\n"), (b"\x00", b"\xff"), (b"\xc2", b"\xa0"), (b'"', b"\\")]
    tokenizer = TextTokenizer(merges, Vocab.toy(4, 6))
    tokenizer.save(folder / "odd.json")
    assert same(TextTokenizer.load(folder / "odd.json"), tokenizer)


def test_the_vocab_of_the_release_survives_a_file(folder):
    tokenizer = TextTokenizer.train(["the cat"], Vocab(), progress=False)
    tokenizer.save(folder / "full.json")
    assert TextTokenizer.load(folder / "full.json").vocab == Vocab()
    content = json.loads((folder / "full.json").read_text("utf-8"))
    assert {name: content["model"]["vocab"][name] for name in ("<s>", "IMGIMGFDZ", "<racm3:break>")} == {
        "<s>": 0, "IMGIMGFDZ": 57, "<racm3:break>": 8197}  # fmt: skip


@given(tokenizers(), settled_text, st.randoms())
def test_a_file_made_elsewhere(folder, tokenizer, text, random):
    """Text ids in any order, merges as strings, no note of ours."""
    path = folder / "elsewhere.json"
    tokenizer.save(path)
    content = json.loads(path.read_text("utf-8"))
    vocab, model = tokenizer.vocab, content["model"]
    pieces = [name for name, token in model["vocab"].items() if token >= vocab.first_text]
    places = random.sample(range(vocab.first_text, vocab.first_text + len(pieces)), len(pieces))
    model["vocab"] |= dict(zip(pieces, places, strict=True))
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    del model[text_tokenizer.NOTE]
    path.write_text(json.dumps(content))
    loaded, theirs = TextTokenizer.load(path, vocab), loaded_by_tokenizers(path)
    assert loaded.vocab == vocab
    assert loaded.encode(text) == theirs.encode(text).ids
    assert loaded.decode(loaded.encode(text)) == text
    assert TextTokenizer.load(path).vocab.first_text == vocab.first_text


tags = st.lists(
    st.sampled_from(["<my_tag>", "<my", "re", "red", "the", " the", "a b", "\u65e5\u672c", "'s", "12"]), max_size=4
)


@given(tokenizers(), tags, st.lists(settled_text | st.sampled_from(["<my_tag>", "red", " the", "\u65e5\u672c"])))
def test_tokens_that_were_added_are_matched_as_tokenizers_does(folder, tokenizer, names, texts):
    """As a fine-tuner adds them and transformers saves them; those that are special stay out of text's reach."""
    path, text = folder / "added.json", "".join(texts)
    tokenizer.save(path)
    theirs = loaded_by_tokenizers(path)
    theirs.add_tokens(names)
    theirs.add_tokens([AddedToken("<verbatim>", normalized=False)])
    theirs.add_special_tokens(["<special>", "cat"])
    theirs.save(str(path))
    ours = TextTokenizer.load(path)
    for each in (text, text + "<verbatim> the red<my_tag><special> cat<s>"):
        ids = ours.encode(each)
        assert ids == theirs.encode(each).ids and ours.decode(ids) == each
        assert all(ours.vocab.is_text(token) for token in ids) and theirs.token_to_id("<special>") not in ids
    again = text_tokenizer.from_json(text_tokenizer.to_json(ours))
    assert same(again, ours) and again.encode(text) == ours.encode(text)


@given(tokenizers(), settled_text)
def test_words_that_are_pieces_are_kept_whole_where_merges_are_ignored(folder, tokenizer, text):
    content = text_tokenizer.to_json(tokenizer)
    content["model"]["ignore_merges"] = True
    (folder / "whole.json").write_text(json.dumps(content))
    ours = TextTokenizer.load(folder / "whole.json")
    assert ours.encode(text) == loaded_by_tokenizers(folder / "whole.json").encode(text).ids


def test_a_word_whose_merges_are_never_reached_is_a_piece_where_merges_are_ignored():
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]  # of abc, bc comes first, and a bc is no pair
    vocab = Vocab.toy(4, 3)
    kept, merged = (TextTokenizer(merges, vocab, ignore_merges=ignored) for ignored in (True, False))
    assert kept.encode("abc") == [kept.ids[b"abc"]] and len(merged.encode("abc")) == 2


def release_steps(content: dict) -> None:
    """The release's rules in other words: the same split, with the names of its special tokens set apart."""
    split = dict(type="Split", behavior="Isolated", invert=False)
    content["pre_tokenizer"]["pretokenizers"] = [
        split | {"pattern": {"Regex": "<sentinel:[0-9]+>"}},
        split | {"pattern": {"Regex": "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"}},
        split | {"pattern": {"Regex": "([\\t\\n]|    |  )"}}, dict(type="Digits", individual_digits=True),
        split | {"pattern": {"Regex": r"[\p{P}!-/:-@\[-`{-~]"}},
        dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True),
    ]  # fmt: skip


def test_the_same_rules_may_be_written_otherwise():
    content = text_tokenizer.to_json(TextTokenizer([(b"a", b"b")], Vocab.toy(4, 3)))
    release_steps(content)
    assert text_tokenizer.from_json(content).encode("ab 12")


def first_pattern(pattern: str):
    return lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": pattern})


OTHER_IDS = {
    "normalizer": lambda c: c.update(normalizer={"type": "NFKC"}),
    "dropout": lambda c: c["model"].update(dropout=0.1),
    "end_of_word_suffix": lambda c: c["model"].update(end_of_word_suffix="</w>"),
    "continuing_subword_prefix": lambda c: c["model"].update(continuing_subword_prefix="##"),
    "add_prefix_space": lambda c: c["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
    "ByteLevel is the last": lambda c: c.update(pre_tokenizer=None),
    "the step .*Whitespace": lambda c: c["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"}),
    "pre_tokenizer splits text into other words": lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0),
    "pattern .* cannot be used": first_pattern("("),
    r"pattern .*\\x00.* cannot be used": first_pattern(r"(?:.|..|...)*[\x00\x01]"),  # never ends
    "<tag> has lstrip": lambda c: c["added_tokens"].append({"id": 280, "content": "<tag>", "lstrip": True}),
    "added tokens that are text": lambda c: c["added_tokens"].extend(
        {"id": 280 + i, "content": f"<{i}>"} for i in range(2_000)
    ),
}


@pytest.mark.parametrize("why", OTHER_IDS)
def test_what_decides_ids_and_is_not_computed_is_named(folder, monkeypatch, why):
    monkeypatch.setattr("nanochameleon.weights.tokenizer_fields.SECONDS", 0.2)
    content = text_tokenizer.to_json(TextTokenizer([], Vocab.toy(4, 3)))
    OTHER_IDS[why](content)
    (folder / "other.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=why):
        TextTokenizer.load(folder / "other.json")


@given(vocabs(), vocabs())
def test_a_file_for_another_vocab_is_refused(folder, mine, other):
    TextTokenizer([], mine).save(folder / "mine.json")
    if mine == other:
        assert TextTokenizer.load(folder / "mine.json", other).vocab == mine
    else:
        with pytest.raises(UserError, match=r"mine\.json"):
            TextTokenizer.load(folder / "mine.json", other)


def without(content, *keys):
    for key in keys[:-1]:
        content = content[key]
    del content[keys[-1]]


def unname(content, name):
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != name]
    without(content, "model", "vocab", name)


BROKEN = {
    "empty": lambda content: "",
    "cut": lambda content: json.dumps(content)[:-200],
    "nested": lambda content: "[" * 100_000,
    "a list": lambda content: "[1, 2]",
    "a number": lambda content: "3",
    "no model": lambda content: without(content, "model"),
    "no vocab": lambda content: without(content, "model", "vocab"),
    "no merges": lambda content: without(content, "model", "merges"),
    "another model": lambda content: content["model"].update(type="WordPiece"),
    "no byte": lambda content: without(content, "model", "vocab", "a"),
    "an id twice": lambda content: content["model"]["vocab"].update(a=content["model"]["vocab"]["b"]),
    "an id as text": lambda content: content["model"]["vocab"].update(a="17"),
    "text over special ids": lambda content: content["model"]["vocab"].update(a=5),
    "an unknown letter": lambda content: content["model"]["vocab"].update({"日": 299}),
    "a merge of three": lambda content: content["model"]["merges"].append(["a", "b", "c"]),
    "an unknown piece": lambda content: content["model"]["merges"].append(["zz", "z"]),
    "no names": lambda content: content.update(added_tokens=[], model=content["model"] | {"vocab": {"a": 3}}),
    "no begin": lambda content: unname(content, "<s>"),
    "begin of image elsewhere": lambda content: content["added_tokens"][9].update(id=10),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_named(folder, how):
    path = folder / "broken.json"
    TextTokenizer.train(["ab ab ab"], Vocab.toy(4, 40), progress=False).save(path)
    content = json.loads(path.read_text("utf-8"))
    text = BROKEN[how](content)
    path.write_text(json.dumps(content) if text is None else text)
    with pytest.raises(UserError, match=r"broken\.json"):
        TextTokenizer.load(path)


def test_a_missing_or_binary_file_is_named(folder):
    with pytest.raises(UserError, match=r"nowhere\.json"):
        TextTokenizer.load(folder / "nowhere.json")
    (folder / "binary.json").write_bytes(bytes(range(N_BYTES)))
    with pytest.raises(UserError, match=r"binary\.json"):
        TextTokenizer.load(folder / "binary.json")
