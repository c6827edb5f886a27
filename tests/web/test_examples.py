"""The examples of an empty page are messages that the model can read."""

from types import SimpleNamespace

from nanochameleon.web.conversation import AUTO_MODES
from nanochameleon.web.examples import examples


def test_examples_of_the_toy_are_words_it_knows(toy_run):
    unknown = toy_run.tokenizer.encode("please xylophone")
    assert len(unknown) > 4  # a word that training never showed falls into letters
    for example in examples(toy_run):
        assert example.get("mode", "auto") in AUTO_MODES
        for message in example["messages"]:
            tokens = toy_run.tokenizer.encode(message)
            assert len(tokens) < 2 * len(message.split()) + 4, (message, tokens)


def test_other_models_bring_no_examples(toy_run):
    other = SimpleNamespace(cfg=SimpleNamespace(data=SimpleNamespace(source="folder")))
    assert examples(other) is None
