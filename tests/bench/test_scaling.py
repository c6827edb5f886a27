"""The arithmetic of docs/scaling.md is consistent, and the page holds the tables that the module prints."""

import re
from pathlib import Path

import pytest

from nanochameleon.bench import scaling
from nanochameleon.bench.scaling import Cluster, communication_bytes, gpu_hours, memory_bytes, step_seconds

BIG = {"7B": scaling.SEVEN, "34B": scaling.BIG}
SPEEDS = {"flops_rate": 400e12, "between": 40e9, "within": 300e9}


def test_more_gpus_need_less_memory_each_and_a_single_one_sends_nothing():
    for cfg in BIG.values():
        sizes = [memory_bytes(cfg, Cluster(n))["total"] for n in (8, 64, 512)]
        assert sizes == sorted(sizes, reverse=True)
    assert communication_bytes(BIG["7B"], Cluster(1)) == {"fsdp": 0.0, "tensor": 0.0}


def test_the_training_state_takes_sixteen_bytes_per_weight():
    cluster = Cluster(64, tp_size=8)
    assert memory_bytes(BIG["34B"], cluster)["state"] * 64 == 16 * 34_293_522_432


def test_a_step_takes_the_longer_of_arithmetic_and_communication_bytes():
    cluster = Cluster(64)
    fast, slow = (step_seconds(BIG["7B"], cluster, 400e12, between, 300e9) for between in (1e15, 1e9))
    assert fast["total"] == fast["compute"] and slow["total"] == slow["fsdp"] > slow["compute"]
    assert cluster.micro_batches == 2**23 / 64 / 4_096
    hours = gpu_hours(BIG["7B"], cluster, 9.2e12, **SPEEDS)
    assert hours == pytest.approx(9.2e12 / 2**23 * step_seconds(BIG["7B"], cluster, **SPEEDS)["total"] * 64 / 3_600)


def test_docs_scaling_holds_the_tables():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert re.sub(r"\s+", " ", scaling.tables()) in re.sub(r"\s+", " ", page)
