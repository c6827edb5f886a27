"""What both ladders of kernels share: a wrong rung ends the climb with a sentence; the table says what a step buys."""

import pytest
import torch

from nanochameleon.kernels import ladder
from nanochameleon.kernels.ladder import Ladder, Limit, Rung, WrongRung


def square(x):
    return (x * x,)


def doubled_in_place(x):
    return (x.mul_(x),)


def tiny(*functions) -> Ladder:
    problems = (torch.arange(-3.0, 4.0),), (torch.ones(2, 3),)
    rungs = [Rung(function.__name__, "one sentence", function, "") for function in functions]
    limit = Limit("nothing at all", lambda x: lambda: x, work=2.0)
    return Ladder("Squares", rungs, square, ("square",), lambda x: (1.0,), lambda: problems, lambda: problems[0], limit)


def test_right_rungs_pass_and_may_overwrite_their_inputs():
    assert ladder.check(tiny(square, doubled_in_place, square)) == 0


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda x: (x * x + 1e-3,), "off by 0.001"),
        (lambda x: (x * x / (x != 3),), "not finite"),
        (lambda x: (x / 0 * 0,), "not finite"),
        (lambda x: ((x * x)[:1],), "wrong shape"),
    ],
)
def test_a_wrong_rung_is_named_with_its_problem(wrong, sentence):
    wrong.__name__ = "cube"
    with pytest.raises(WrongRung, match=f"^rung 'cube': square of (7|2 x 3) .*{sentence}"):
        ladder.check(tiny(square, wrong))


def test_rounding_is_allowed_as_far_as_torch_rounds():
    """Twice torch's own error and a floor of a few units: no more."""
    exact, eps = torch.ones(2, dtype=torch.float64), torch.finfo(torch.float32).eps
    naive = exact.float() + 4 * eps
    assert ladder.excess("x", exact.float() + 8 * eps, naive, exact, 1.0) <= 1
    with pytest.raises(WrongRung):
        ladder.excess("x", exact.float() + 16 * eps, naive, exact, 1.0)


def test_the_table_says_share_and_step():
    lines = ladder.table(tiny(square, doubled_in_place), [4e-3, 1e-3], 0.5e-3).splitlines()
    assert lines[1].split()[:5] == ["1.", "square", "4", "12%", "-"]
    assert lines[2].split()[:6] == ["2.", "doubled_in_place", "1", "50%", "4.00", "x"]


def test_each_rung_is_timed_on_inputs_of_its_own():
    x = torch.full((3,), 2.0)
    times, limit = ladder.measure(tiny(square, doubled_in_place), (x,))
    assert len(times) == 2 and min(times) > 0 and limit >= 0 and (x == 2).all()


def run(found, *options: str) -> int:
    return ladder.main("purpose", lambda: [found], lambda load, device: [found], options)


def test_the_command_prints_the_table(capsys):
    assert run(tiny(square, doubled_in_place)) == 0
    out = capsys.readouterr().out
    assert "Squares of 7, CPU time of one thread" in out and "2. doubled_in_place" in out


@pytest.mark.parametrize("options", [(), ("--cuda",)])
def test_a_wrong_rung_ends_the_command_with_one_sentence(capsys, monkeypatch, options):
    monkeypatch.setattr(ladder, "why_no_gpu", lambda: "there is no GPU")
    assert run(tiny(square, lambda x: (x,)), *options) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: rung '<lambda>': square of 7 is off by 12, where 2.4e-07 is allowed"
    ]


def test_without_a_gpu_nothing_is_timed_and_the_output_says_so(capsys, monkeypatch):
    monkeypatch.setattr(ladder, "why_no_gpu", lambda: "there is no GPU")
    monkeypatch.setattr(ladder, "measure", None)
    assert run(tiny(square), "--cuda") == 0
    assert "since there is no GPU" in (out := capsys.readouterr().out) and "not its speed" in out


def test_wrong_options_are_plain(capsys):
    with pytest.raises(SystemExit) as stop:
        run(tiny(square), "--gpu")
    assert stop.value.code == 2 and "unrecognized arguments: --gpu" in capsys.readouterr().err


def test_the_source_of_a_cuda_rung_is_the_part_between_two_rules(tmp_path):
    (path := tmp_path / "k.cu").write_text(
        f'head\n{ladder.RULE}\n// 1. one\nextern "C" __global__ void one(int n) {{}}\n{ladder.RULE}\n// 2. two\n'
        "extern \"C\" __global__ void two(int n) {}\n"
    )  # fmt: skip
    assert ladder.cuda_source(path, "one").startswith("// 1. one") and "two" not in ladder.cuda_source(path, "one")


def test_a_kernel_on_a_gpu_is_called_with_addresses(monkeypatch):
    """As cupy.RawKernel, with more shared memory where a kernel asks for it."""
    calls = []

    class Kernel:
        max_dynamic_shared_size_bytes = 48 * 1024

        def __call__(self, grid, block, arguments, shared_mem):
            calls.append((grid, block, [int(x) for x in arguments], shared_mem, self.max_dynamic_shared_size_bytes))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        ladder.launch, "load_kernel", lambda file, name, device: calls.append((file, name, device)) or Kernel()
    )
    x = torch.zeros(2)
    kernel = ladder.gpu_kernel(ladder.launch.KERNELS / "zloss" / "steps.cu", "zloss_warps")
    kernel((2,), (64,), (x, ladder.np.int32(5)), shared_mem=64 * 1024)
    kernel((2,), (64,), (x, ladder.np.int32(5)))
    assert calls[0] == ("zloss/steps", "zloss_warps", 3)
    assert calls[1] == ((2,), (64,), [x.data_ptr(), 5], 64 * 1024, 64 * 1024) and calls[2][3] == 0
