"""The precision of matmuls: decided by the processor, and measured where that does not decide."""

import itertools

import pytest
import torch

from nanochameleon.training import precision as module
from nanochameleon.training.precision import by_features, pick_precision

ZEN_4 = {"avx512_bf16": True, "sse4a": True, "amx_bf16": False}
PROCESSORS = {
    "AMX": ({"amx_bf16": True, "avx512_bf16": True, "sse4a": False}, True),
    "AMD with AVX512-BF16": (ZEN_4, True),
    "Intel with AVX512-BF16 alone": ({"avx512_bf16": True, "sse4a": False, "amx_bf16": False}, False),
    "AVX2": ({"avx2": True, "sse4a": False}, False),
    "ARM without bf16": ({"neon": True, "bf16": False}, False),
    "ARM with bf16": ({"neon": True, "bf16": True}, None),
    "an older torch": ({}, None),
}


@pytest.mark.parametrize("has, faster", PROCESSORS.values(), ids=PROCESSORS)
def test_a_processor_tells_whether_bf16_is_faster_or_leaves_it_open(has, faster):
    found, why = by_features(has)
    assert found is faster and (why == "") == (faster is None)


@pytest.mark.parametrize("version, expected", [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_is_known_by_its_compute_capability(version, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)
    monkeypatch.setattr(module, "matmul_flops", None)
    precision, why = pick_precision(64, torch.device("cuda"))
    assert precision == expected and ".".join(map(str, version)) in why


def test_no_clock_decides_where_the_processor_is_known(monkeypatch):
    monkeypatch.setattr(module, "matmul_flops", None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN_4, raising=False)
    for dim in (16, 192, 4_096):
        assert pick_precision(dim, torch.device("cpu")) == ("bf16", "this processor has AVX512-BF16")


@pytest.mark.parametrize("faster, expected", [(2.0, "bf16"), (1.2, "fp32")])
def test_elsewhere_the_best_of_several_measurements_in_turns_decides(faster, expected, monkeypatch):
    """However busy the machine is in most of them."""
    busy, types = itertools.cycle([0.1, 0.3, 1.0, 0.2, 0.7]), []

    def rate(dim, dtype, device):
        types.append(dtype)
        return (faster if dtype == torch.bfloat16 else 1.0) * next(busy)

    monkeypatch.setattr(module, "matmul_flops", rate)
    precision, why = pick_precision(64, torch.device("mps"))
    assert precision == expected and f"{faster:.1f} times" in why
    assert types[:4] == [torch.bfloat16, torch.float32] * 2
