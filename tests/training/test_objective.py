"""What training minimises: the precision of its matmuls, and the output layer fused with the loss."""

import itertools

import pytest
import torch
from test_transformer import random_model

from nanochameleon.packing import Batch, pack
from nanochameleon.training import objective
from nanochameleon.training.objective import Objective, by_features, pick_precision
from nanochameleon.vocab import Vocab

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
    monkeypatch.setattr(objective, "matmul_flops", None)
    precision, why = pick_precision(64, torch.device("cuda"))
    assert precision == expected and ".".join(map(str, version)) in why


def test_no_clock_decides_where_the_processor_is_known(monkeypatch):
    monkeypatch.setattr(objective, "matmul_flops", None)
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

    monkeypatch.setattr(objective, "matmul_flops", rate)
    precision, why = pick_precision(64, torch.device("mps"))
    assert precision == expected and f"{faster:.1f} times" in why
    assert types[:4] == [torch.bfloat16, torch.float32] * 2


# ---------------------------------------------------------------------------------------------------------------------
# The fused output layer


def small_batch() -> tuple[Vocab, Batch]:
    vocab = Vocab.toy(6, 0)
    generator = torch.Generator().manual_seed(0)
    docs = [[vocab.boi, 4, 5, 6, 9, vocab.eoi, 20, 2], torch.randint(4, vocab.size, (9,), generator=generator).tolist()]
    return vocab, pack(docs, 10, vocab.pad)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_the_fused_output_layer_has_the_same_sums_and_gradients(precision, tolerance):
    model = random_model(0, vocab_size=Vocab.toy(6, 0).size).float()
    vocab, batch = small_batch()
    results = []
    for fused in ("on", "off"):
        model.zero_grad()
        sums = Objective(model, vocab, precision, fused_output=fused)(batch, None, 1e-2, 7.0)
        sums.next_token.loss.backward()
        results.append((list(sums.next_token), [p.grad.clone() for p in model.parameters()]))
    (ours, gradients), (expected, plain) = results
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    for x, y in zip(gradients, plain, strict=True):
        assert (x - y).norm() <= tolerance * y.norm() + 1e-7
    assert expected[5] > 0 and expected[6] > 0  # images


def test_the_fused_output_layer_is_for_large_vocabularies_without_tensor_parallelism():
    model, small, large = random_model(0), Vocab.toy(6, 0), Vocab()
    assert [Objective(model, vocab, "fp32").fused for vocab in (small, large)] == [False, True]
    assert [Objective(model, small, "fp32", fused_output=x).fused for x in ("auto", "on", "off")] == [
        False,
        True,
        False,
    ]
    assert not Objective(model, large, "fp32", fused_output="off").fused
    assert not Objective(model, large, "fp32", tp_group=object(), fused_output="on").fused


def test_without_a_gradient_there_is_no_fused_output_layer(monkeypatch):
    monkeypatch.setattr(objective, "fused_next_token_loss", None)
    model = random_model(0, vocab_size=Vocab.toy(6, 0).size)
    vocab, batch = small_batch()
    with torch.no_grad():
        fused, plain = (Objective(model, vocab, "fp32", fused_output=x)(batch, None) for x in ("on", "off"))
    assert torch.equal(fused.next_token.loss, plain.next_token.loss)
