"""What a case needs is what torch counts for the plain reference, and a limit is the slowest of what it needs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nanochameleon.bench import kernels, limits, train
from nanochameleon.bench.engine import Bench, random_model
from nanochameleon.bench.gpu_cases import decode_case, decode_inputs
from nanochameleon.bench.limits import Limits
from nanochameleon.bench.work import Work, attention_work, step_work, training_work, visible_pairs
from nanochameleon.config import ModelConfig
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import visible
from nanochameleon.transformer import Chameleon, KVCache
from nanochameleon.vocab import Vocab

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
CFG = ModelConfig(64, 32, 2, 4, n_kv_heads=2, multiple_of=8, max_seq_len=64)
LIMITS = Limits({FP32: 1e9, BF16: 2e9}, {2**20: 1e9}, {2**21: 2e9})


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def doc_ids(b: int, t: int, seed: int) -> torch.Tensor:
    """Documents of 1 to 4 tokens or so."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(b, t, generator=generator) < 0.4).long().cumsum(1)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 2), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_attention_needs_what_is_counted_query_by_query_on_the_keys_that_it_sees(b, t, h, e, seed, packed):
    """torch counts the whole square of a masked call, so each query is asked alone."""
    ids = doc_ids(b, t, seed) if packed else torch.zeros(b, t, dtype=torch.long)
    q, k, v = (torch.randn(b, h, t, e, requires_grad=True) for _ in range(3))
    seen = visible(ids, ids)

    def each_query() -> torch.Tensor:
        total = 0.0
        for i in range(b):
            for j in range(t):
                keys = seen[i, j]
                weights = (q[i, :, j : j + 1] @ k[i][:, keys].mT).softmax(-1)
                total = total + (weights @ v[i][:, keys]).sum()
        return total

    pairs = visible_pairs(b, t, Documents.of(ids) if packed else None)
    work = attention_work(h, e, b * t, pairs, FP32)
    assert pairs == seen.sum()
    assert work["f"].flops == counted(each_query)
    assert work["f+b"].flops == counted(lambda: each_query().backward())
    assert work["f"].flops + work["gradient of attention alone"].flops == work["f+b"].flops


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_output_layer_needs_the_matmuls_of_the_reference(dtype):
    case = kernels.linear_case(12, 33, 16, dtype, CPU)
    reference = case.variants["reference"]
    assert case.work["f"].flops == counted(lambda: reference(*case.inputs))
    assert case.work["f+b"].flops == counted(lambda: torch.autograd.grad(reference(*case.inputs), case.inputs))


@pytest.mark.parametrize(
    ("case", "tensors"),
    [
        (kernels.zloss_case(12, 33, BF16, CPU), 1),
        (kernels.linear_case(12, 33, 16, FP32, CPU), 2),
        (kernels.attention_case(2, 20, 2, 16, BF16, 1, CPU), 3),
    ],
)
def test_the_bytes_of_a_case_are_those_of_its_tensors(case, tensors):
    """Forward reads the inputs. Both passes write a gradient for each of them; attention also reads d out and writes
    out."""
    size = sum(x.nbytes for x in case.inputs[:tensors])
    more = case.inputs[0].nbytes if tensors == 3 else 0
    assert (case.work["f"].read, case.work["f"].written) == (size, more)
    assert (case.work["f+b"].read, case.work["f+b"].written) == (size + more, size + more)


def test_a_training_step_needs_the_matmuls_of_the_model():
    """torch does not count its own attention on a CPU, which the first test does."""
    model, (b, t) = Chameleon(CFG), (2, 8)
    counts = counted(lambda: model.logits(model(torch.randint(64, (b, t)))).sum().backward())
    assert training_work(CFG, b * t, 0, FP32).flops == counts
    attention = attention_work(CFG.n_heads, CFG.head_dim, b * t, 72, FP32)["f+b"].flops
    assert training_work(CFG, b * t, 72, FP32).flops == counts + CFG.n_layers * attention


def test_a_step_of_generation_needs_the_matmuls_and_reads_their_weights_and_the_cache():
    model, slots, length = Chameleon(CFG), 3, 10
    cache = KVCache.empty(CFG, slots, length, CPU, FP32)
    positions = torch.full((slots, 1), length - 1)
    view = cache.view(slice(0, slots), positions, length)
    with torch.no_grad():
        counts = counted(lambda: model.logits(model(torch.zeros(slots, 1, dtype=torch.long), positions, cache=view)))
    assert step_work(CFG, slots, 0, FP32).flops == counts
    work = step_work(CFG, slots, slots * length, FP32)
    attention = attention_work(CFG.n_heads, CFG.head_dim, slots, slots * length, FP32)["f"].flops
    assert work.flops == counts + CFG.n_layers * attention
    weights = sum(p.nbytes for name, p in model.named_parameters() if "norm" not in name)
    assert work.read == weights - model.tok_embeddings.weight.nbytes + cache.keys.nbytes + cache.values.nbytes


def test_the_gpu_s_decode_step_reads_its_cache():
    n, h, g, length, e = 2, 4, 2, 10, 16
    case = decode_case(n, h, g, length, e, CPU)
    keys, values = decode_inputs(n, h, g, length, e, CPU)[4:6]
    work = case.work["f"]
    assert work.read == keys.nbytes + values.nbytes
    assert work.flops == attention_work(h, e, n, n * length, BF16)["f"].flops


# ---------------------------------------------------------------------------------------------------------------------
# Limits and rows


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work(FP32, flops=3e9), 3.0),
        (Work(BF16, flops=3e9), 1.5),
        (Work(FP32, flops=1e9, read=5e9), 5.0),
        (Work(FP32, flops=1e9, read=5e9, written=9e9), 7.0),
    ],
)
def test_the_limit_is_the_slowest_of_matmuls_reading_and_both_ways(work, seconds):
    assert LIMITS.seconds(work) == seconds


def test_memory_is_as_fast_as_the_largest_tensor_that_was_measured_and_is_not_larger():
    speeds = {10: 5.0, 100: 3.0, 1_000: 1.0}
    assert [limits.at_size(speeds, size) for size in (0, 10, 99, 100, 5_000)] == [5, 5, 5, 3, 1]


def test_speeds_are_those_of_the_best_run_and_count_the_bytes_that_move(monkeypatch):
    taken = iter([2.0, 4.0] * 10 * limits.ROUNDS)
    monkeypatch.setattr(limits, "seconds_of", lambda job, device: next(taken))
    read, update = limits.memory_speeds((400, 800), CPU)
    assert read == {400: 200.0, 800: 400.0} and update == {800: 400.0, 1_600: 800.0}
    assert limits.matmul_flops(10, FP32, CPU) == 1_000.0


def test_each_row_of_time_has_its_share_and_memory_has_none():
    case = kernels.linear_case(12, 33, 16, FP32, CPU)
    rows = kernels.measure(case, 1, CPU, LIMITS)
    best = 1e3 * LIMITS.seconds(case.work["f+b"])
    assert {row.variant: row.of_limit for row in rows if row.unit == "ms"} == {
        row.variant: pytest.approx(best / row.value) for row in rows if row.unit == "ms"
    }
    assert {row.of_limit for row in rows if row.unit == "MiB"} == {None}


def test_a_variant_that_does_less_than_its_case_has_a_limit_of_its_own():
    case = kernels.attention_case(1, 20, 2, 16, BF16, 0, CPU)
    found = case.limits("f+b", ("numba", "gradient of attention alone"), LIMITS)
    assert found["gradient of attention alone"] == pytest.approx(found["numba"] * 4 / 6)
    assert case.limits("memory", ("numba",), LIMITS) == {}


def test_a_step_is_compared_with_the_matmuls_of_its_type_and_the_pairs_that_it_sees():
    case = train.Case("tiny", CFG, Vocab.toy(16, 16), 2, 12, ("fp32", "bf16"))
    times = {name: train.least_seconds(case, f"nano eager {name}", LIMITS) for name in ("fp32", "bf16", "bf16 packed")}
    assert times["fp32"] == 2 * times["bf16"] > 2 * times["bf16 packed"]
    assert train.least_seconds(case, "transformers eager weights", LIMITS) == times["bf16"]


def test_generation_is_compared_with_reading_the_weights_and_the_cache_of_a_mean_step():
    model = random_model(CFG, CPU, FP32)
    slow = Limits({FP32: 1e30}, {1: 1.0}, {1: 1.0})  # a byte a second
    bench = Bench("tiny", model, Vocab.toy(16, 16), "tokens/s", 1, 1.0, 3, False, 4, slow)
    each = [step_work(CFG, 2, cached, FP32).read for cached in (2 * 17, 2 * 18, 2 * 19)]
    assert bench.least_seconds(3, 2, 2 * 16) == sum(each)


def test_a_dtype_that_the_processor_emulates_has_the_limit_of_float32(monkeypatch):
    monkeypatch.setattr(limits, "matmul_flops", lambda n, dtype, device: {FP32: 9e10, BF16: 9e8}[dtype])
    monkeypatch.setattr(limits, "memory_speeds", lambda *_: ({1: 1.0}, {1: 1.0}))
    assert limits.measure_limits(CPU).flops == {FP32: 9e10, BF16: 9e10}


def test_a_job_that_takes_long_is_not_run_again_and_again(monkeypatch):
    clock, runs = [0.0], []

    def run(job, device):
        clock[0] += 10.0
        runs.append(job)
        return 10.0

    monkeypatch.setattr(limits, "seconds_of", run)
    monkeypatch.setattr(limits.time, "perf_counter", lambda: clock[0])
    assert limits.least_seconds(lambda: None, CPU) == 10.0 and len(runs) <= 2
