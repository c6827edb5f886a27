"""The log of a task: an evaluation that is killed and resumed ends with the bytes of one that ran through."""

import dataclasses
import errno
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_tasks import after, sums
from tiny import tiny_run

from nanochameleon.errors import UserError
from nanochameleon.evaluate.log import (
    ITEMS,
    SECONDS,
    Log,
    make_line,
    parse,
    read_lines,
    rescored,
    to_bytes,
    total_seconds,
)
from nanochameleon.evaluate.runner import ask, evaluate
from nanochameleon.evaluate.task import Answer, Item, Options, Task, digest

TESTS = Path(__file__).parents[1]


def in_company(**changes) -> Task:
    """Sums whose answers depend on the chunk that they are in, as rounding does."""
    task = sums(**changes)

    def answer(run, items, options):
        company = f"{items[0].id} to {items[-1].id}"
        return [
            dataclasses.replace(each, output=each.output | {"company": company})
            for each in task.answer(run, items, options)
        ]

    return dataclasses.replace(task, answer=answer)


def logged(folder: Path, task: Task, limit: int | None = None) -> bytes:
    """Run the task into a folder, without a model, and return the bytes of its log."""
    options = Options(limit=limit)
    items = task.read(options)
    ask(None, task, items, options, Log(folder, items, task.chunk))
    return (folder / ITEMS).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def test_a_line_has_all_that_a_table_needs(tmp_path):
    logged(tmp_path, sums(5, chunk=2))
    row = json.loads((tmp_path / ITEMS).read_text().splitlines()[2])
    assert row == {
        "id": "sum-2", "group": "even", "content": {"numbers": [2, 4], "target": 6},
        "output": {"text": "2 + 4 = 7", "draw": row["output"]["draw"]}, "extracted": "7", "metrics": {"acc": 0.0},
        "truncated": False, "hashes": {"content": digest(row["content"]), "prompt": digest([1, 4])},
    }  # fmt: skip
    assert list(row) == sorted(row)


texts = st.text() | st.sampled_from(["\ud800", "\u2028", "\x00", "\r", "</script>"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(texts, values, max_size=3), st.dictionaries(texts, values, max_size=3), texts)
def test_any_line_comes_back_from_its_bytes(content, output, name):
    task = sums(score=lambda content, output: ([content, output], {"acc": 1}))
    line = make_line(task, Item(name, content), Answer([1, 2], output))
    data = to_bytes([line])
    assert data.count(b"\n") == 1 and data.isascii()
    assert parse(data[:-1], "x") == line == rescored(task, line)


def test_what_is_scored_went_through_json():
    """Else a run and --rescore could give different scores: a tuple is not equal to a list."""
    task = sums(
        score=lambda content, output: (None, {"acc": content["numbers"] == [1, 2] and output["keys"] == {"1": 2}})
    )
    line = make_line(task, Item("a", {"numbers": (1, 2)}), Answer([], {"keys": {1: 2}}))
    assert line.metrics == {"acc": 1.0} == rescored(task, line).metrics


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_names_task_and_item(bad):
    with pytest.raises(UserError, match="sums: the answer to item 'sum-1' holds a number that is not finite"):
        make_line(sums(), Item("sum-1", {}), Answer([], {"log_prob": bad}))


# ---------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


def test_killed_in_the_middle_of_a_chunk_and_resumed_ends_with_the_same_bytes(tmp_path):
    """A real kill -9: the process ends itself when it is asked item 10, in the third chunk of four."""
    model, killed, through = tiny_run(tmp_path / "model"), tmp_path / "killed", tmp_path / "through"
    program = f"""
from pathlib import Path
from made_up_tasks import after, killed, sums
from nanochameleon.evaluate.runner import evaluate
from nanochameleon.evaluate.task import Options

evaluate(Path({str(model)!r}), [after(10, killed, sums(14))], Options(out=Path({str(killed)!r})), "cpu")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [line.id for line in read_lines(killed / "sums" / ITEMS)] == [f"sum-{i}" for i in range(8)]
    with open(killed / "sums" / ITEMS, "ab") as file:
        file.write(b'{"content": {"numb')  # what a kill in the middle of a write leaves

    resumed = evaluate(model, [sums(14)], Options(out=killed), "cpu")
    whole = evaluate(model, [sums(14)], Options(out=through), "cpu")
    assert (killed / "sums" / ITEMS).read_bytes() == (through / "sums" / ITEMS).read_bytes()
    assert resumed["tasks"]["sums"]["figures"] == whole["tasks"]["sums"]["figures"]
    assert [len(result["header"]["sessions"]) for result in (resumed, whole)] == [2, 1]


@given(st.integers(1, 12), st.integers(1, 5), st.floats(0, 1), st.floats(0, 1), st.sampled_from([b"", b"\0\0"]))
@settings(max_examples=30)
def test_cut_anywhere_and_resumed_ends_with_the_same_bytes(tmp_path_factory, n, chunk, items_left, seconds_left, tail):
    """Also where items and seconds were cut at different places, and where the disk left zeros."""
    task, folder = in_company(n=n, chunk=chunk), tmp_path_factory.mktemp("log")
    through, seconds = logged(folder, task), (folder / SECONDS).read_bytes()
    (folder / ITEMS).write_bytes(through[: round(items_left * len(through))] + tail)
    (folder / SECONDS).write_bytes(seconds[: round(seconds_left * len(seconds))])
    assert logged(folder, task) == through
    rows = [json.loads(row) for row in (folder / SECONDS).read_text().splitlines()]
    assert [row["start"] for row in rows] == sorted({row["start"] for row in rows})
    assert total_seconds(folder) >= 0


def test_a_log_that_is_whole_asks_nothing(tmp_path):
    through = logged(tmp_path, sums(6))
    assert logged(tmp_path, after(0, lambda: pytest.fail("asked again"), sums(6))) == through


def test_a_chunk_whose_seconds_were_lost_counts_once(tmp_path):
    """Killed between the two files, resumed, then cut back to before that."""
    through = logged(tmp_path, sums(12))
    seconds = (tmp_path / SECONDS).read_bytes().splitlines(keepends=True)
    (tmp_path / SECONDS).write_bytes(seconds[0] + seconds[2])
    (tmp_path / ITEMS).write_bytes(b"".join(through.splitlines(keepends=True)[:8]))
    logged(tmp_path, sums(12))
    assert [json.loads(row)["start"] for row in (tmp_path / SECONDS).read_text().splitlines()] == [0, 8]


@pytest.mark.parametrize("limit", [1, 4, 6, 8, 11])
def test_a_larger_limit_extends_the_log(tmp_path, limit):
    """Items 4 and 5 were in a chunk of two: they are asked again, in the company that they have in a whole run."""
    short = logged(tmp_path / "grown", in_company(n=11), limit)
    assert short.count(b"\n") == limit
    assert logged(tmp_path / "grown", in_company(n=11)) == logged(tmp_path / "through", in_company(n=11))


def test_a_full_disk_is_said_and_the_log_resumes(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(
            UserError, match=r"cannot write to .*items.jsonl \(No space left on device\): free some space"
        ):
            logged(tmp_path / "full", in_company())
    assert logged(tmp_path / "full", in_company()) == logged(tmp_path / "through", in_company())


# ---------------------------------------------------------------------------------------------------------------------
# Logs that are not resumed


def test_a_smaller_limit_is_refused(tmp_path):
    through = logged(tmp_path, sums(9))
    with pytest.raises(UserError, match=f"{ITEMS} has 9 items, of which this command wants 5: give the --limit"):
        logged(tmp_path, sums(9), 5)
    assert (tmp_path / ITEMS).read_bytes() == through


def changed(**changes) -> Task:
    def read(options: Options) -> list[Item]:
        items = sums(9).read(options)
        return [*items[:2], dataclasses.replace(items[2], **changes), *items[3:]]

    return sums(9, read=read)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (changed(id="sum-x"), "jsonl:3 has item 'sum-2', and the task's file has 'sum-x' there: choose another --out"),
        (changed(content={"numbers": [2, 2], "target": 4}), "jsonl:3 has item 'sum-2' with another content than"),
    ],
)
def test_a_log_of_another_file_is_refused(tmp_path, task, sentence):
    logged(tmp_path, sums(9), 8)
    with pytest.raises(UserError, match=sentence):
        logged(tmp_path, task)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (b"{", "jsonl:2 is not JSON"),
        (b"[]", "jsonl:2 is not a line of an evaluation"),
        (b'{"id": "sum-1"}', "jsonl:2 is not a line of an evaluation"),
        (b"\xff", "jsonl:2 is not UTF-8"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, row, sentence):
    lines = logged(tmp_path, sums(5)).splitlines()
    (tmp_path / ITEMS).write_bytes(b"\n".join([lines[0], row, *lines[2:], b""]))
    with pytest.raises(UserError, match=sentence):
        logged(tmp_path, sums(5))


def test_a_line_with_a_field_of_another_kind_is_named(tmp_path):
    row = json.loads(logged(tmp_path, sums(1)))
    (tmp_path / ITEMS).write_text(json.dumps(row | {"metrics": 1}) + "\n")
    with pytest.raises(UserError, match="jsonl:1 has 1 as 'metrics': it must be an object"):
        read_lines(tmp_path / ITEMS)
    (tmp_path / ITEMS).write_text(json.dumps(row | {"metrics": {"acc": "1"}}) + "\n")
    with pytest.raises(UserError, match="jsonl:1 has \"1\" as 'acc': it must be a whole number or a number"):
        read_lines(tmp_path / ITEMS)


def test_a_line_that_lacks_what_is_scored_is_named():
    line = make_line(sums(), sums(1).read(Options())[0], Answer([1], {"text": "0 + 0 = 0"}))
    with pytest.raises(UserError, match=r"sums: item 'sum-0' cannot be scored \(KeyError\('text'\)\)"):
        rescored(sums(), dataclasses.replace(line, output={"texts": []}))
