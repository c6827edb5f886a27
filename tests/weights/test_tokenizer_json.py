"""Files of text tokenizers: `tokenizers` agrees on them, those made elsewhere load, and broken ones are named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import HOSTILE, settled_text, tokenizers, vocabs
from tokenizers import AddedToken, Tokenizer

from nanochameleon.errors import UserError
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.vocab import N_BYTES, Vocab
from nanochameleon.weights.tokenizer_json import (
    NOTE,
    ForeignTokenizer,
    from_json,
    load_text_tokenizer,
    save_text_tokenizer,
    to_json,
)


def loaded_by_tokenizers(path) -> Tokenizer:
    theirs = Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True  # else it turns text that spells a special token into that token
    return theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


def test_training_on_the_names_of_special_tokens_gives_text_tokens_only(folder):
    vocab = Vocab.toy(60, 400)
    names = list(vocab.names())
    tokenizer = TextTokenizer.train([" ".join(names) * 3, "".join(names)] + names * 5, vocab, progress=False)
    assert len(tokenizer.merges) > 50
    save_text_tokenizer(tokenizer, folder / "names.json")
    theirs = loaded_by_tokenizers(folder / "names.json")
    for text in [*names, *HOSTILE, "".join(names), " ".join(names)]:
        tokens = tokenizer.encode(text)
        assert min(tokens) >= vocab.first_text
        assert tokens == theirs.encode(text).ids


@given(tokenizers(), settled_text)
def test_tokenizers_gives_the_same_tokens_on_the_same_file(folder, tokenizer, text):
    save_text_tokenizer(tokenizer, folder / "same.json")
    theirs = loaded_by_tokenizers(folder / "same.json")
    tokens = tokenizer.encode(text)
    assert theirs.encode(text).ids == tokens
    assert theirs.decode(tokens) == text
    assert all(theirs.token_to_id(name) == token for name, token in tokenizer.vocab.names().items())


@given(st.lists(settled_text, max_size=4), settled_text)
def test_tokenizers_gives_the_same_tokens_after_training(folder, texts, text):
    tokenizer = TextTokenizer.train(texts, Vocab.toy(4, 30), progress=False)
    save_text_tokenizer(tokenizer, folder / "trained.json")
    theirs = loaded_by_tokenizers(folder / "trained.json")
    for each in (text, *texts):
        assert theirs.encode(each).ids == tokenizer.encode(each)


def same(a: TextTokenizer, b: TextTokenizer) -> bool:
    return type(a) is type(b) and to_json(a) == to_json(b)


@given(tokenizers())
def test_load_inverts_save(folder, tokenizer):
    save_text_tokenizer(tokenizer, folder / "round.json")
    assert same(load_text_tokenizer(folder / "round.json"), tokenizer)
    assert same(load_text_tokenizer(folder / "round.json", tokenizer.vocab), tokenizer)
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []


def test_merges_of_spaces_newlines_and_every_byte_survive_a_file(folder):
    merges = [(b" ", b" "), (b"  ", b"\n"), (b"\r", b"\n"), (b"\x00", b"\xff"), (b"\xc2", b"\xa0"), (b'"', b"\\")]
    tokenizer = TextTokenizer(merges, Vocab.toy(4, 6))
    save_text_tokenizer(tokenizer, folder / "odd.json")
    assert same(load_text_tokenizer(folder / "odd.json"), tokenizer)


def test_the_vocab_of_the_release_survives_a_file(folder):
    tokenizer = TextTokenizer.train(["the cat"], Vocab(), progress=False)
    save_text_tokenizer(tokenizer, folder / "full.json")
    assert load_text_tokenizer(folder / "full.json").vocab == Vocab()
    content = json.loads((folder / "full.json").read_text("utf-8"))
    assert {name: content["model"]["vocab"][name] for name in ("<s>", "IMGIMGFDZ", "<racm3:break>")} == {
        "<s>": 0, "IMGIMGFDZ": 57, "<racm3:break>": 8197}  # fmt: skip


@given(tokenizers(), settled_text, st.randoms())
def test_a_file_made_elsewhere(folder, tokenizer, text, random):
    """Text tokens in any order, merges as strings, no note of ours."""
    path = folder / "elsewhere.json"
    save_text_tokenizer(tokenizer, path)
    content = json.loads(path.read_text("utf-8"))
    vocab, model = tokenizer.vocab, content["model"]
    pieces = [name for name, token in model["vocab"].items() if token >= vocab.first_text]
    places = random.sample(range(vocab.first_text, vocab.first_text + len(pieces)), len(pieces))
    model["vocab"] |= dict(zip(pieces, places, strict=True))
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    del model[NOTE]
    path.write_text(json.dumps(content))
    loaded, theirs = load_text_tokenizer(path, vocab), loaded_by_tokenizers(path)
    assert loaded.vocab == vocab
    assert loaded.encode(text) == theirs.encode(text).ids
    assert loaded.decode(loaded.encode(text)) == text
    assert load_text_tokenizer(path).vocab.first_text == vocab.first_text


tags = st.lists(
    st.sampled_from(["<my_tag>", "<my", "re", "red", "the", " the", "a b", "\u65e5\u672c", "'s", "12"]), max_size=4
)


@given(tokenizers(), tags, st.lists(settled_text | st.sampled_from(["<my_tag>", "red", " the", "\u65e5\u672c"])))
def test_tokens_that_were_added_are_matched_as_tokenizers_does(folder, tokenizer, names, texts):
    """As a fine-tuner adds them and transformers saves them; those that are special stay out of text's reach."""
    path, text = folder / "added.json", "".join(texts)
    save_text_tokenizer(tokenizer, path)
    theirs = loaded_by_tokenizers(path)
    theirs.add_tokens(names)
    theirs.add_tokens([AddedToken("<verbatim>", normalized=False)])
    theirs.add_special_tokens(["<special>", "cat"])
    theirs.save(str(path))
    ours = load_text_tokenizer(path)
    for each in (text, text + "<verbatim> the red<my_tag><special> cat<s>"):
        tokens = ours.encode(each)
        assert tokens == theirs.encode(each).ids and ours.decode(tokens) == each
        assert all(ours.vocab.is_text(token) for token in tokens) and theirs.token_to_id("<special>") not in tokens
    again = from_json(to_json(ours))
    assert same(again, ours) and again.encode(text) == ours.encode(text)


@given(tokenizers(), settled_text)
def test_words_that_are_pieces_are_kept_whole_where_merges_are_ignored(folder, tokenizer, text):
    content = to_json(tokenizer)
    content["model"]["ignore_merges"] = True
    (folder / "whole.json").write_text(json.dumps(content))
    ours = load_text_tokenizer(folder / "whole.json")
    assert ours.encode(text) == loaded_by_tokenizers(folder / "whole.json").encode(text).ids


def test_a_word_whose_merges_are_never_reached_is_a_piece_where_merges_are_ignored():
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]  # of abc, bc comes first, and a bc is no pair
    vocab = Vocab.toy(4, 3)
    kept, merged = (ForeignTokenizer(merges, vocab, ignore_merges=ignored) for ignored in (True, False))
    assert kept.encode("abc") == [kept.tokens[b"abc"]] and len(merged.encode("abc")) == 2


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
    content = to_json(TextTokenizer([(b"a", b"b")], Vocab.toy(4, 3)))
    release_steps(content)
    assert from_json(content).encode("ab 12")


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
def test_what_decides_tokens_and_is_not_computed_is_named(folder, monkeypatch, why):
    monkeypatch.setattr("nanochameleon.weights.tokenizer_json.SECONDS", 0.2)
    content = to_json(TextTokenizer([], Vocab.toy(4, 3)))
    OTHER_IDS[why](content)
    (folder / "other.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=why):
        load_text_tokenizer(folder / "other.json")


@given(vocabs(), vocabs())
def test_a_file_for_another_vocab_is_refused(folder, mine, other):
    save_text_tokenizer(TextTokenizer([], mine), folder / "mine.json")
    if mine == other:
        assert load_text_tokenizer(folder / "mine.json", other).vocab == mine
    else:
        with pytest.raises(UserError, match=r"mine\.json"):
            load_text_tokenizer(folder / "mine.json", other)


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
    "text over special tokens": lambda content: content["model"]["vocab"].update(a=5),
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
    save_text_tokenizer(TextTokenizer.train(["ab ab ab"], Vocab.toy(4, 40), progress=False), path)
    content = json.loads(path.read_text("utf-8"))
    text = BROKEN[how](content)
    path.write_text(json.dumps(content) if text is None else text)
    with pytest.raises(UserError, match=r"broken\.json"):
        load_text_tokenizer(path)


def test_a_missing_or_binary_file_is_named(folder):
    with pytest.raises(UserError, match=r"nowhere\.json"):
        load_text_tokenizer(folder / "nowhere.json")
    (folder / "binary.json").write_bytes(bytes(range(N_BYTES)))
    with pytest.raises(UserError, match=r"binary\.json"):
        load_text_tokenizer(folder / "binary.json")
