"""The command that runs a kernel on the CPU: what it prints, and its exit codes."""

import re
import shutil
from pathlib import Path

import pytest

from nanochameleon.kernels import emulate

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing, so no CUDA kernel is run here")
SHIFT = """extern "C" __global__ void shift(float* x, int n) {
  int i = threadIdx.x + blockDim.x * threadIdx.y; x[i] = x[i + n]; }"""


@pytest.fixture
def shift(tmp_path) -> str:
    (tmp_path / "shift.cu").write_text(SHIFT)
    return str(tmp_path / "shift.cu")


def test_a_run_without_a_mistake_shows_what_each_tensor_holds(shift, capsys):
    assert emulate.main([shift, "shift", "--block", "8x2", "float32:4x4:range", "int:0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no mistake found in two orders of threads"
    assert lines[1] == "argument 0  float32 (4, 4), unchanged: 0 1 2 3 4 5 ..."
    assert "does not see: speed" in lines[2]


def test_a_mistake_is_named_and_ends_with_1(shift, capsys):
    assert emulate.main([shift, "shift", "--block", "32", "float32:32:range", "int:1"]) == 1
    assert re.search(r"thread \d+: (race|out of bounds): .*shift.cu:2", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["shift", "float32:4", "int:1"], "'float32:4' is not an argument"),
        (["shift", "float32:4:sevens", "int:1"], "'float32:4:sevens' is not an argument"),
        (["shift", "float32:0:ones", "int:1"], "'float32:0:ones' is not an argument"),
        (["shift", "float32:4:ones", "float:1"], "the call gives pf where the kernel takes pi"),
        (["shift", "float32:4:ones", "int:99999999999"], "'int:99999999999' is not an argument"),
        (["shaft", "float32:4:ones", "int:1"], "there is no kernel shaft"),
        (["shift", "float32:4:ones", "int:1", "--block", "2000"], "at most 1,024"),
        (["shift", "float32:4:ones", "int:1", "--grid", "two"], "invalid sizes value: 'two'"),
    ],
)
def test_a_call_that_makes_no_sense_is_a_sentence_and_ends_with_2(shift, arguments, sentence, capsys):
    try:
        code = emulate.main([shift, *arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and sentence in error and len(error.splitlines()) == 1


def test_a_file_that_is_missing_or_no_cuda_is_a_sentence(tmp_path, capsys):
    (tmp_path / "wrong.cu").write_text("this is no kernel\n")
    for name, sentence in {"none.cu": "No such file", "wrong.cu": "g++ refuses it: wrong.cu:1"}.items():
        assert emulate.main([str(tmp_path / name), "k"]) == 2
        assert sentence in capsys.readouterr().err


def test_without_a_compiler_it_says_so(shift, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert emulate.main([shift, "shift", "float32:4:ones", "int:0"]) == 2
    assert "g++ is missing: install it" in capsys.readouterr().err


def test_the_example_of_the_help_runs(capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    example = re.search(r"emulate (kernels.*?)\n\n", emulate.__doc__, re.DOTALL)[1].replace("\\", "").split()
    assert emulate.main(example) == 0
