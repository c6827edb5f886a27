"""Parameters are counted like the model's own, and FLOPs like the published comparison's."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import model_configs

from nanochameleon.presets import chameleon_7b, chameleon_34b
from nanochameleon.training.flops import count_parameters, flops_per_token, peak_flops
from nanochameleon.transformer import Chameleon

BIG = {"7B": chameleon_7b().model, "34B": chameleon_34b().model}


@given(model_configs(), st.booleans())
@settings(max_examples=30)
def test_parameters_are_those_of_the_model(cfg, qk_norm):
    cfg = dataclasses.replace(cfg, qk_norm=qk_norm)
    with torch.device("meta"):
        model = Chameleon(cfg)
    size = count_parameters(cfg)
    assert size["total"] == sum(p.numel() for p in model.parameters())
    assert size["embedding"] == model.tok_embeddings.weight.numel() == size["output"]


def test_the_released_sizes():
    assert (
        count_parameters(BIG["7B"])["total"] == 7_013_158_912
        and count_parameters(BIG["34B"])["total"] == 34_293_522_432
    )


@pytest.mark.parametrize("rate, peak_share", [(35_200, 0.31), (43_800, 0.385)])
def test_flops_are_counted_as_in_the_published_comparison(rate, peak_share):
    """transformers' Chameleon of 1.4B on an H100, eager and compiled: tokens per second, and the published MFU."""
    cfg = dataclasses.replace(BIG["7B"], dim=2_048, n_layers=22, n_heads=16)
    assert rate * flops_per_token(cfg, 4_096) / peak_flops("NVIDIA H100 80GB HBM3") == pytest.approx(
        peak_share, abs=0.002
    )


def test_attention_counts_the_pairs_under_the_causal_mask():
    cfg = BIG["7B"]
    pairs = 4_096 * 4_097 / 2
    per_sequence = 3 * 2 * 2 * cfg.n_layers * cfg.dim * pairs  # scores and values, forward once and backward twice
    attention = flops_per_token(cfg, 4_096) - flops_per_token(cfg, 0)
    assert attention * 4_096 == pytest.approx(per_sequence, rel=1e-3)
