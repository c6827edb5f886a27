"""The arithmetic of docs/scaling.md: counts against the model itself, and the page against the functions."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import model_configs

from nanochameleon.presets import chameleon_7b, chameleon_34b
from nanochameleon.training.flops import (
    Layout,
    flops_per_token,
    gpu_hours,
    memory,
    messages,
    micro_batches_of,
    parameters,
    peak_flops,
    step_seconds,
)
from nanochameleon.transformer import Chameleon

BIG = {"7B": chameleon_7b().model, "34B": chameleon_34b().model}
SPEEDS = {"flop_rate": 400e12, "between": 40e9, "within": 300e9}


@given(model_configs(), st.booleans())
@settings(max_examples=30)
def test_parameters_are_those_of_the_model(cfg, qk_norm):
    cfg = dataclasses.replace(cfg, qk_norm=qk_norm)
    with torch.device("meta"):
        model = Chameleon(cfg)
    size = parameters(cfg)
    assert size["total"] == sum(p.numel() for p in model.parameters())
    assert size["embedding"] == model.tok_embeddings.weight.numel() == size["output"]


def test_the_released_sizes():
    assert parameters(BIG["7B"])["total"] == 7_013_158_912 and parameters(BIG["34B"])["total"] == 34_293_522_432


@pytest.mark.parametrize("rate, peak_share", [(35_200, 0.31), (43_800, 0.385)])
def test_the_way_to_count_operations_is_that_of_the_published_comparison(rate, peak_share):
    """transformers' Chameleon of 1.4B on an H100, eager and compiled: ids a second, and what was given as MFU."""
    cfg = dataclasses.replace(BIG["7B"], dim=2_048, n_layers=22, n_heads=16)
    assert rate * flops_per_token(cfg, 4_096) / peak_flops("NVIDIA H100 80GB HBM3") == pytest.approx(
        peak_share, abs=0.002
    )


def test_attention_s_share_is_of_the_pairs_that_are_seen():
    cfg = BIG["7B"]
    pairs = 4_096 * 4_097 / 2
    per_row = 3 * 2 * 2 * cfg.n_layers * cfg.dim * pairs  # scores and values, forward once and backward twice
    attention = flops_per_token(cfg, 4_096) - flops_per_token(cfg, 0)
    assert attention * 4_096 == pytest.approx(per_row, rel=1e-3)


def test_more_gpus_need_less_memory_each_and_one_alone_sends_nothing():
    for cfg in BIG.values():
        sizes = [memory(cfg, Layout(n))["total"] for n in (8, 64, 512)]
        assert sizes == sorted(sizes, reverse=True)
    assert messages(BIG["7B"], Layout(1)) == {"sharding": 0.0, "tensor": 0.0}


def test_state_is_sixteen_bytes_a_weight_in_all():
    layout = Layout(64, tensor=8)
    assert memory(BIG["34B"], layout)["state"] * 64 == 16 * 34_293_522_432


def test_a_step_takes_the_longer_of_arithmetic_and_messages():
    layout = Layout(64)
    fast, slow = (step_seconds(BIG["7B"], layout, 400e12, between, 300e9) for between in (1e15, 1e9))
    assert fast["total"] == fast["arithmetic"] and slow["total"] == slow["sharding"] > slow["arithmetic"]
    assert micro_batches_of(layout) == 2**23 / 64 / 4_096
    hours = gpu_hours(BIG["7B"], layout, 9.2e12, **SPEEDS)
    assert hours == pytest.approx(9.2e12 / 2**23 * step_seconds(BIG["7B"], layout, **SPEEDS)["total"] * 64 / 3_600)


def test_the_page_says_what_the_functions_give():
    from nanochameleon.bench import scaling

    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert re.sub(r"\s+", " ", scaling.tables()) in re.sub(r"\s+", " ", page)
