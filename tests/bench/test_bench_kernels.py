"""Cases are checked before they are timed, peak memory is measured, and wrong options are refused."""

import dataclasses
import json

import pytest
import torch

from nanochameleon.bench import kernels
from nanochameleon.bench.__main__ import Args, main
from nanochameleon.bench.kernels import attention_case, check, linear_case, zloss_case
from nanochameleon.bench.limits import Limits
from nanochameleon.bench.measure import peak_bytes
from nanochameleon.bench.rows import rows_against_one
from nanochameleon.errors import UserError
from nanochameleon.kernels import linear_zloss_cross_entropy, use_kernels
from nanochameleon.kernels.zloss import linear

CPU = torch.device("cpu")
LIMITS = Limits({torch.float32: 1e11, torch.bfloat16: 2e11}, {2**20: 1e10}, {2**21: 1e10})
CASES = {
    "attention": lambda: attention_case(1, 90, 2, 16, torch.bfloat16, 1, CPU),
    "zloss": lambda: zloss_case(12, 33, torch.float32, CPU),
    "linear": lambda: linear_case(12, 33, 16, torch.float32, CPU),
}


def test_peak_memory_is_what_is_held_at_once():
    def run() -> torch.Tensor:
        first, second = torch.empty(2**18), torch.empty(2**18)  # a MiB each
        del first
        return torch.empty(2**18) + second.mean()  # two MiB next to the second

    before = torch.zeros(2**20)  # noqa: F841  not of the run
    assert 3 <= peak_bytes(run, CPU) / 2**20 < 3.1


def test_an_eighth_of_the_logits_is_held(monkeypatch):
    """Next to the gradients of hidden and weight, which are small here."""
    monkeypatch.setattr(linear, "MIN_ROWS", {"cpu": 1})
    hidden, weight, targets = torch.randn(200, 4), torch.randn(8_192, 4), torch.arange(200)
    with use_kernels("numba"):
        peak = peak_bytes(lambda: linear_zloss_cross_entropy(hidden, weight, targets, 1e-5, 1.0), CPU)
    assert peak / (200 * 8_192 * 4) < 1 / 8 + 2 * 4 / 200 + 0.01


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_gradient_is_not_timed(name):
    case = CASES[name]()
    check(case)
    wrong = {**case.variants, "wrong": lambda *inputs: 1.01 * case.variants["numba"](*inputs)}
    with pytest.raises(AssertionError, match="wrong is off"):
        check(dataclasses.replace(case, variants=wrong))


def broken(*inputs):
    raise RuntimeError("Triton is not here\nand a stack of calls")


def test_a_variant_that_fails_is_a_line_and_the_others_are_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: broken)
    found = iter([CASES["linear"](), CASES["zloss"]()])
    monkeypatch.setattr(kernels, "measure_limits", lambda device: LIMITS)
    rows = [row for row in kernels.bench(found, CPU, quick=False, op="zloss") if row.case != "limit"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all("compile" in x and x.endswith("RuntimeError: Triton is not here") for x in said)
    assert {row.ratio_to for row in rows} == {"reference"} and "compile" not in {row.variant for row in rows}
    assert {row.unit for row in rows} == {"ms", "MiB"}


def test_a_case_of_which_nothing_runs_has_no_rows(capsys):
    case = dataclasses.replace(CASES["linear"](), variants={"reference": broken, "numba": broken})
    assert kernels.measure(case, 2, CPU, LIMITS) == []
    assert capsys.readouterr().out.count("left out") == 2


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        main(Args("kernels", device="cuda"))


def test_rows_are_kept_when_a_later_case_fails(tmp_path, monkeypatch):
    def measure(args):
        yield from rows_against_one("kernels", "zloss 1 x 2", {"reference": 4.0}, "reference", "ms", CPU)
        raise RuntimeError("the next case")

    monkeypatch.setattr("nanochameleon.bench.__main__.measure", measure)
    with pytest.raises(RuntimeError, match="the next case"):
        main(Args("kernels", json=tmp_path / "rows.json"))
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 1


@pytest.mark.parametrize("device, expected", [("cpu", ["fp32", "bf16"]), ("cuda", ["bf16"])])
def test_a_step_is_measured_in_the_types_that_its_kernels_take(device, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "measure_limits", lambda device: Limits({}, {}, {}))
    monkeypatch.setattr(kernels, "step_rows", lambda precision, *rest: seen.append(precision) or [])
    list(kernels.bench(iter(()), torch.device(device), True, "step"))
    assert seen == expected
