"""CIDEr-D and its words: published values, and what must and must not change a score."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.evaluate.cider import cider_d, words

REFERENCES = [
    ["a red circle above a blue square", "there is a red circle over a blue square"],
    ["two green triangles", "a pair of green triangles on white"],
    ["a yellow star left of a purple circle", "a purple circle right of a yellow star"],
    ["three small blue circles in a row", "three blue circles"],
]
HYPOTHESES = ["a red circle above a green square", "two green triangles", "a purple star", "three small blue circles"]


def test_a_small_set_scores_what_the_official_scorer_says():
    mean, scores = cider_d(HYPOTHESES, REFERENCES)
    assert mean == pytest.approx(3.7431501232879736, abs=1e-12)
    assert scores == pytest.approx(
        [4.353165519033947, 4.5433583728063525, 1.6498963706016836, 4.426180230709909], abs=1e-12
    )


@pytest.mark.parametrize(
    ("hypothesis", "references", "score"),
    [
        ("a b c d", ["a b c d"], 10),
        ("a b c", ["a b c"], 7.5),  # an order that is missing counts 0
        ("a", ["a"], 2.5),
        ("a b c d", ["a b c d", "e f g h"], 5),
        ("a a a a", ["a b c d"], 0.3125),
        ("a b c d e f g h i j", ["a b c d"], 3.1657417043967033),
        ("", ["a b c d"], 0),
    ],
)
def test_one_image_of_three(hypothesis, references, score):
    mean, scores = cider_d([hypothesis, "nothing", "nix"], [references, ["q w e r"], ["z u i o"]])
    assert scores == pytest.approx([score, 0, 0], abs=1e-12) and mean == pytest.approx(score / 3)


def test_what_every_image_has_weighs_nothing():
    assert cider_d(["a b c d"], [["a b c d"]]) == (0, [0])
    assert cider_d(["on white", "on white"], [["on white"], ["on white"]])[0] == 0
    assert cider_d([], []) == (0, [])


@pytest.mark.parametrize(("hypotheses", "references"), [(["a"], []), (["a", "b"], [["a"], []]), ([], [["a"]])])
def test_each_image_has_a_hypothesis_and_references(hypotheses, references):
    with pytest.raises(ValueError, match="give one hypothesis and at least one reference"):
        cider_d(hypotheses, references)


texts = st.lists(st.sampled_from(["red", "blue", "circle", "star", "on", "above"]), min_size=1, max_size=8).map(
    " ".join
)
sets = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=4)), min_size=2, max_size=6)


@given(sets, st.randoms(use_true_random=False))
def test_the_order_of_images_and_references_does_not_matter(images, random):
    before = dict(zip(range(len(images)), cider_d(*zip(*images, strict=True))[1], strict=True))
    order = list(before)
    random.shuffle(order)
    shuffled = [(images[i][0], random.sample(images[i][1], len(images[i][1]))) for i in order]
    assert cider_d(*zip(*shuffled, strict=True))[1] == pytest.approx([before[i] for i in order], abs=1e-12)


@given(sets)
def test_scores_stay_between_0_and_10(images):
    assert all(0 <= score <= 10 + 1e-9 for score in cider_d(*zip(*images, strict=True))[1])


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man's dog doesn't sit on the t-shirt.", "a man 's dog does n't sit on the t-shirt"),
        (
            "It's a black/white cat (sleeping), isn't it?",
            "it 's a black/white cat -lrb- sleeping -rrb- is n't it",
        ),
        ("Two \"quoted\" words and 'single' ones", "two quoted words and single ones"),
        ("1,000 people at 3:30 p.m. for $5.50 or 50%", "1,000 people at 3:30 p.m. for $ 5.50 or 50 %"),
        ("Tom & Jerry @ the U.S. Open... really!", "tom & jerry @ the u.s. open really"),
        ("A 2-year-old boy; a girl - and a dog -- running", "a 2-year-old boy a girl and a dog running"),
        ("the dog´s ball and the cat’s toy “here”", "the dog ´ s ball and the cat 's toy here"),
        (
            "he'll can't won't gonna cannot they're I'd we've",
            "he 'll ca n't wo n't gon na can not they 're i 'd we 've",
        ),
        ("1/2 of a pizza, #1 dad, 5'10\" tall, e.g. this", "1/2 of a pizza # 1 dad 5 10 tall e.g. this"),
        ("St. Louis Mr. Smith No. 5 etc.", "st. louis mr. smith no. 5 etc."),
        ("A dog.The cat", "a dog.the cat"),
        (
            "the dogs' bowls / man/woman w/ no-one / 1980s 90's",
            "the dogs bowls / man/woman w / no-one / 1980s 90 's",
        ),
        ("a $20 bill and 20$ and €5 £3 ½ pizza", "a $ 20 bill and 20 $ and $ 5 # 3 1/2 pizza"),
        (
            "'tis ma'am d'oh y'all rock'n'roll 80's o'clock",
            "'t is ma'am d'oh y' all rock 'n' roll 80 's o'clock",
        ),
    ],
)
def test_words_are_those_of_the_penn_treebank(caption, expected):
    assert words(caption) == expected.split()


@given(st.text())
def test_any_text_splits_into_words_without_spaces(text):
    assert all(word and not any(c.isspace() for c in word) for word in words(text))
