"""Two evaluations over the same items, compared item by item."""

import json
from pathlib import Path

import pytest
from made_up_tasks import header

from nanochameleon.errors import UserError
from nanochameleon.evaluate.compare import cli, compare_metric, compare_task
from nanochameleon.evaluate.header import HEADER
from nanochameleon.evaluate.log import ITEMS, PROBLEM, to_bytes
from nanochameleon.evaluate.statistics import mcnemar
from nanochameleon.evaluate.task import Line


def lines(*accs: float, first: int = 0, content: dict | None = None, **more) -> list[Line]:
    return [
        Line(f"i{n}", "", content or {"n": n}, {}, None, {"acc": float(acc)} | more)
        for n, acc in enumerate(accs, first)
    ]


def logged(out: Path, **tasks: list[Line]) -> Path:
    out.mkdir()
    (out / HEADER).write_text(json.dumps(header(out.name)))
    for name, of_task in tasks.items():
        (out / name).mkdir(parents=True)
        (out / name / ITEMS).write_bytes(to_bytes(of_task))
    return out


def test_items_are_paired_by_their_id_in_any_order():
    a, b = lines(1, 1, 0, 0, 1), lines(1, 0, 1, 1, 1)
    [row] = compare_task("x", a, b[::-1])
    assert (row["n"], row["a"], row["b"], row["b - a"]) == ("5", "60.0%", "80.0%", "20.0%")
    assert (row["better in a"], row["better in b"]) == ("1", "2")
    assert float(row["McNemar's p"]) == mcnemar(1, 2) == 1


def test_a_difference_on_many_items_is_sure_and_none_is_not():
    a, b = [1.0] * 50 + [0.0] * 50, [1.0] * 50 + [0.0] * 30 + [1.0] * 20
    better = compare_metric(a, b)
    assert better["b - a"] == "20.0%" and float(better["McNemar's p"]) == pytest.approx(2 * 0.5**20, rel=0.05)
    low, high = (float(end.strip("%")) for end in better["95% interval"].split(" to "))
    assert 10 < low < 20 < high < 30
    same = compare_metric(a, a)
    assert (same["95% interval"], same["McNemar's p"]) == ("0.0% to 0.0%", "1")


def test_a_metric_that_is_no_share_has_an_interval_and_no_p():
    row = compare_metric([0.3, 0.9, 1.0], [0.6, 0.9, 1.0])  # VQA's accuracy: in percent, as in its table
    assert row["McNemar's p"] == "" and (row["a"], row["b - a"]) == ("73.3%", "10.0%")
    row = compare_metric([0.5, 0.7, 1.5], [0.6, 0.8, 1.4])
    assert row["McNemar's p"] == "" and row["b - a"] == "0.033"


def test_items_that_only_one_run_has_or_could_ask_are_counted_and_left_out():
    a, b = lines(1, 1, 1, 0), lines(1, 0, 1, 0, 1, first=1)
    b[1] = Line("i2", "", {"n": 2}, {PROBLEM: "i2.png is missing"}, None, {})
    [row] = compare_task("x", a, b)
    assert (row["n"], row["only in a"], row["only in b"]) == ("2", "2", "2")


def test_other_contents_under_the_same_id_are_refused_by_name():
    a, b = lines(*[1] * 8), lines(*[1] * 8, content={"question": "another"})
    with pytest.raises(UserError, match="x: items i0, i1, i2, i3, i4 and 3 more are not the same in a and b: evaluate"):
        compare_task("x", a, b)


def test_no_common_item_is_refused():
    with pytest.raises(UserError, match="x: no item was asked in both"):
        compare_task("x", lines(1), lines(1, first=1))


def test_the_command_prints_markdown(tmp_path, capsys):
    a = logged(tmp_path / "a", boolq=lines(1, 0, f1=0.5), piqa=lines(1), only_a=lines(1))
    b = logged(tmp_path / "b", boolq=lines(1, 1, f1=0.25), piqa=lines(0))
    cli([str(a), str(b)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"- a: {a}: models/a, 1,234 parameters, float32 on cpu; seed 3, shots of the task"
    assert said[1].startswith(f"- b: {b}: models/b, ") and said[2] == ""
    assert [row.split(" | ")[:2] for row in said[5:]] == [["| boolq", "acc"], ["| boolq", "f1"], ["| piqa", "acc"]]
    assert len({row.count("|") for row in said[3:]}) == 1
    cli([str(a), str(b), "--tasks", "piqa"])
    assert "boolq" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["a", "empty"], "empty holds no evaluation: give the --out of one"),
        (["a", "missing"], "missing holds no evaluation"),
        (["a", "b", "--tasks", "boolq"], "b has no boolq: it has piqa"),
        (["a", "b"], "have no task in common: .*a has boolq"),
    ],
)
def test_folders_that_cannot_be_compared_are_refused(tmp_path, monkeypatch, names, sentence):
    monkeypatch.chdir(tmp_path)
    logged(tmp_path / "a", boolq=lines(1))
    logged(tmp_path / "b", piqa=lines(1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=sentence):
        cli(names)


def test_without_a_common_metric_there_is_one_sentence(tmp_path):
    """The task of one run has maj@1 and that of the other maj@8; and some tasks have no metrics at all."""
    none, other = ([Line("i0", "", {"n": 0}, {}, None, metrics)] for metrics in ({}, {"maj@8": 1.0}))
    a = logged(tmp_path / "a", gsm8k=lines(1), test=none)
    b = logged(tmp_path / "b", gsm8k=other, test=none)
    with pytest.raises(UserError, match="gsm8k, test: a and b have no metric in common, as after different --samples"):
        cli([str(a), str(b)])


def test_a_damaged_log_is_named(tmp_path):
    a, b = (logged(tmp_path / name, boolq=lines(1)) for name in "ab")
    with open(b / "boolq" / ITEMS, "ab") as file:
        file.write(b"{\n")
    with pytest.raises(UserError, match="jsonl:2 is not JSON"):
        cli([str(a), str(b)])
    (b / "boolq" / ITEMS).write_bytes((a / "boolq" / ITEMS).read_bytes().replace(b"hashes", b"hushes"))
    with pytest.raises(UserError, match="jsonl:1 is not a line of an evaluation"):
        cli([str(a), str(b)])
