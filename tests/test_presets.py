"""The presets at scale are the paper's: sizes, stages, shares, rates."""

import pytest
import torch

from nanochameleon.config import RunConfig
from nanochameleon.data.sources.alignment import CATEGORIES
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.presets import BETTER, FIRST, PRESETS
from nanochameleon.weights.layouts import weight_shapes

AT_SCALE = ("125m", "1b", "chameleon_7b", "chameleon_34b")


def shares(cfg: RunConfig, stage: int) -> dict[str, float]:
    weights = dict(cfg.stages[stage].weights)
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


@pytest.mark.parametrize("name", AT_SCALE)
def test_stages_are_the_papers(name):
    """Section 2.2: 80% with 2.9 : 1.5 : 0.4, then 20% with these weights halved and the same share of images."""
    cfg = PRESETS[name]()
    assert [stage.fraction for stage in cfg.stages] == [0.8, 0.2] and cfg.data.source == "prepared"
    first, second = shares(cfg, 0), shares(cfg, 1)
    assert first == pytest.approx({"text": 2.9 / 4.8, "pairs": 1.5 / 4.8, "interleaved": 0.4 / 4.8})
    assert {each: second[each] for each in FIRST} == pytest.approx({each: first[each] / 2 for each in FIRST})
    for images in ("pairs", "interleaved"):
        assert second[images] + second[f"{images}_better"] == pytest.approx(first[images])
    assert set(second) == set(FIRST) | set(BETTER) and 0 < second["instructions"] < second["text_better"]


@pytest.mark.parametrize(
    ("name", "ids_a_step", "ids"),
    [
        ("chameleon_7b", 2**23, 9.2e12),
        ("chameleon_34b", 3 * 2**22, 9.2e12),
        ("125m", 2**19, 2.6e9),
        ("1b", 2**20, 29e9),
    ],
)
def test_as_many_ids_as_table_1_says(name, ids_a_step, ids):
    train, optim = PRESETS[name]().train, PRESETS[name]().optim
    assert train.batch_size * train.seq_len == ids_a_step and train.seq_len == 4_096
    assert train.steps * ids_a_step == pytest.approx(ids, rel=0.03)
    assert (optim.name, optim.betas, optim.eps, optim.weight_decay) == ("adamw", (0.9, 0.95), 1e-5, 0.1)
    assert (optim.grad_clip, optim.warmup_steps, optim.schedule, train.z_loss) == (1.0, 4_000, "exponential", 1e-5)
    assert optim.lr == 1e-4 or name in ("125m", "1b")


@pytest.mark.parametrize(("name", "parameters"), [("125m", 123.3e6), ("1b", 1.40e9)])
def test_the_small_ones_are_as_large_as_their_names(name, parameters):
    sizes = weight_shapes(PRESETS[name]().model)
    assert sum(x.numel() for x in sizes.values()) == pytest.approx(parameters, rel=0.005)


def test_alignment_has_the_papers_numbers_and_balances_six_categories():
    """Section 3.2 and Table 3."""
    paper, toy = PRESETS["chameleon_align"](), PRESETS["align"]()
    assert (paper.optim.lr, paper.optim.schedule, paper.optim.weight_decay) == (1e-5, "cosine", 0.1)
    assert (paper.train.batch_size, paper.train.seq_len, paper.model.dropout) == (128, 4_096, 0.05)
    assert paper.train.steps * 128 * 4_096 == pytest.approx(1.1e9, rel=0.03)
    for cfg in (paper, toy):
        assert cfg.train.assistant_only_loss and cfg.init_from is not None and cfg.train.z_loss == 1e-5
        assert cfg.model.dropout == 0.05 and cfg.optim.schedule == "cosine"
        assert set(cfg.mixture) == set(CATEGORIES) and max(cfg.mixture.values()) <= 2 * min(cfg.mixture.values())
    assert toy.optim.lr < PRESETS["toy"]().optim.lr


def test_names_are_the_presets_own():
    assert all(preset().name == name for name, preset in PRESETS.items())
    with torch.device("meta"):
        assert sum(p.numel() for p in VQGAN(PRESETS["125m"]().vqgan).parameters()) > 68e6  # the released one
