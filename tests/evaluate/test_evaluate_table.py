"""The tables of an evaluation: rows, Markdown, the terminal, and the page."""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_tasks import header, line, sums

from nanochameleon.evaluate.log import PROBLEM
from nanochameleon.evaluate.results import task_result, write_results
from nanochameleon.evaluate.table import COLUMNS, aligned, duration, filled, markdown, number, rows_of, summary
from nanochameleon.evaluate.table_html import axis, page, round_up
from nanochameleon.evaluate.task import Figure

HEADER = header("<toy>")


def content(*figures: Figure, **changes) -> dict:
    """What results.json holds for one task."""
    result = {"title": "Sums", "items": 20, "answered": 20, "left_out": 0, "problems": [], "truncated": 0, "seconds": 1}
    return {"header": HEADER, "tasks": {"sums": result | {"figures": [asdict(f) for f in figures]} | changes}}


ACC = Figure("acc", 0.625, 20, low=0.4, high=0.8, how="Wilson", chance=0.25)
CIDER = Figure(
    "CIDEr-D", 0.718, 9, "images", 0.57, 0.863, "bootstrap over images", scale=1, baseline=0.1, note="2 shots"
)


# ---------------------------------------------------------------------------------------------------------------------
# The result of a task


def test_items_that_could_not_be_asked_are_counted_and_not_scored():
    broken = replace(line("c"), output={PROBLEM: "c.png is broken"})
    lines = [line("a", acc=1), replace(line("b", acc=0), truncated=True), broken]
    result = task_result(sums(), lines, 3, 1.26)
    assert (result["items"], result["left_out"], result["truncated"], result["seconds"]) == (3, 1, 1, 1.3)
    assert result["problems"] == [{"id": "c", "problem": "c.png is broken"}]
    assert [(figure["name"], figure["value"], figure["n"]) for figure in result["figures"]] == [("acc", 0.5, 2)]


def test_a_task_of_which_no_item_could_be_asked_has_no_figure_and_says_so():
    lines = [replace(line(i), output={PROBLEM: "no image"}) for i in range(12)]
    result = task_result(replace(sums(), figures=lambda lines: 1 / 0), lines, 12, 0)
    assert result["figures"] == [] and len(result["problems"]) == 10
    [row] = rows_of({"tasks": {"sums": result}})
    assert row["note"] == "no item could be asked" and row["left out"] == "12"
    assert "and 2 more items" in markdown({"header": HEADER, "tasks": {"sums": result}})


def test_results_of_other_tasks_are_kept(tmp_path):
    first = task_result(sums(), [line("a", acc=1)], 1, 0)
    write_results(tmp_path, HEADER, {"first": first})
    write_results(tmp_path, HEADER, {"second": first})
    again = write_results(tmp_path, HEADER, {"first": first | {"title": "new"}})
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(again))
    assert {name: result["title"] for name, result in again["tasks"].items()} == {
        "first": "new",
        "second": first["title"],
    }
    assert "| second |" in (tmp_path / "table.md").read_text() and "second" in (tmp_path / "table.html").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Rows and Markdown


@pytest.mark.parametrize(
    ("value", "scale", "text"),
    [
        (0.625, 100, "62.5%"), (0, 100, "0.0%"), (1, 100, "100.0%"), (0.00095, 100, "0.095%"), (-0.123, 100, "-12.3%"),
        (0.718, 1, "0.718"), (None, 100, ""), (12.3456, 1, "12.346"), (1733.39, 1, "1,733.4"),
    ],
)  # fmt: skip
def test_a_figure_is_printed_by_its_scale(value, scale, text):
    assert number(value, scale) == text


def test_a_row_has_the_interval_chance_baseline_ceiling_and_what_was_left_out():
    [acc, cider] = rows_of(content(ACC, replace(CIDER, ceiling=2.0), left_out=2, truncated=3))
    assert acc == {
        "task": "sums", "figure": "acc", "value": "62.5%", "95% interval": "40.0% to 80.0%", "n": "20 items",
        "chance": "25.0%", "baseline": "", "ceiling": "", "left out": "2", "truncated": "3", "note": "",
    }  # fmt: skip
    assert [cider[name] for name in ("n", "baseline", "ceiling", "note")] == ["9 images", "0.100", "2.000", "2 shots"]
    assert filled([acc]) == [name for name in COLUMNS if acc[name]]


def test_one_item_is_not_called_items():
    assert rows_of(content(replace(ACC, n=1)))[0]["n"] == "1 item"


def test_a_task_that_was_stopped_says_so():
    assert rows_of(content(ACC, answered=8))[0]["note"] == "only 8 of 20 items were asked so far"


def test_markdown_keeps_its_columns_whatever_a_name_holds():
    odd = replace(ACC, name="acc | a\nb", note="<script>`*_[x](y)")
    text = markdown(content(odd, CIDER))
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len(rows) == 4 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {
        len(filled(rows_of(content(odd, CIDER)))) + 1
    }
    assert r"acc \| a b" in text and r"\<script\>\`\*\_\[x\](y)" in text


def test_markdown_says_what_the_figures_depend_on():
    text = markdown(content(ACC))
    for fact in (
        "float32 on cpu",
        "commit abc with uncommitted changes",
        "seed 3, shots of the task",
        "1:15 min",
        "torch 2.13",
    ):
        assert fact in text


def test_the_terminal_shows_the_first_figures_of_a_task():
    text = summary(content(*[replace(ACC, name=f"acc, {i}") for i in range(9)]))
    assert len(text.splitlines()) == 7 and text.splitlines()[-1].strip() == "and 3 more"
    assert aligned([("a", "b", "1"), ("long", "", "22")]) == "a     b   1\nlong     22"


def test_the_terminal_says_that_no_item_could_be_asked():
    assert summary(content(left_out=20)).split(maxsplit=1)[1] == "no item could be asked"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (90, "1:30 min"), (3599.6, "1:00 h"), (7380, "2:03 h")],
)
def test_a_duration_has_the_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text


# ---------------------------------------------------------------------------------------------------------------------
# The page


class Page(HTMLParser):
    """All tags with their attributes, and the text outside of <style>."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.inside = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


@given(st.text(max_size=30))
def test_no_text_of_a_model_or_a_file_becomes_a_tag(text):
    plain, odd = (
        Page(
            page(
                content(
                    replace(ACC, name=name, note=name), title=name, left_out=1, problems=[{"id": name, "problem": name}]
                )
            )
        )
        for name in ("name", f"<script>{text}</script><img src=x onerror=y>&amp;\"'")
    )
    assert [tag for tag, _ in odd.tags] == [tag for tag, _ in plain.tags]


def test_the_page_needs_nothing_else_and_has_no_script():
    found = Page(page(content(ACC, CIDER)))
    assert not {"script", "link", "img", "iframe", "object", "a"} & {tag for tag, _ in found.tags}
    [policy] = [attrs["content"] for attrs in found.all("meta") if attrs.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    assert "url(" not in page(content(ACC)) and "prefers-color-scheme: dark" in page(content(ACC))


def test_the_plot_has_a_dot_an_interval_and_a_tick_where_guessing_is():
    found = Page(page(content(ACC)))
    assert [each["cx"] for each in found.all("circle")] == ["62.50%"]
    lines = {each["class"]: each for each in found.all("line")}
    assert (lines["bar"]["x1"], lines["bar"]["x2"]) == ("40.00%", "80.00%")
    assert lines["chance"]["x1"] == "25.00%"
    [svg] = found.all("svg")
    assert svg["role"] == "img" and svg["aria-label"] == "95% intervals: sums · acc 62.5%, 40.0% to 80.0%"


def test_shares_and_other_figures_have_axes_of_their_own():
    found = Page(page(content(ACC, CIDER, replace(ACC, name="no interval", low=None, high=None))))
    assert len(found.all("svg")) == 2 and len(found.all("circle")) == 2
    assert "svg" not in dict(Page(page(content(replace(ACC, low=None)))).tags)


def test_the_plot_is_well_formed():
    """A browser forgives; a strict parser does not. Attributes without quotes are HTML's own."""
    for svg in re.findall(r"<svg.*?</svg>", page(content(ACC, CIDER)), re.DOTALL):
        ET.fromstring(re.sub(r"=([\w.-]+)", r'="\1"', re.sub(r'"[^"]*"', '"x"', svg)))


def test_the_table_on_the_page_says_what_the_plot_shows():
    words = " ".join(Page(page(content(ACC, left_out=2, truncated=1))).words)
    for text in ("62.5%", "40.0% to 80.0%", "25.0%", "20 items, 2 left out, 1 truncated"):
        assert text in words


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.sampled_from([1.0, 100.0]))
def test_all_that_is_drawn_is_on_the_axis(numbers, scale):
    figures = [("x", {"low": x, "high": x, "value": x, "chance": None}) for x in numbers]
    low, high = axis(figures, scale)
    assert low <= min(numbers) and max(numbers) <= high and low <= 0 < high
    assert scale == 1 or high >= 1


@pytest.mark.parametrize(("value", "end"), [(0.863, 1), (1, 1), (23, 40), (0.011, 0.02), (8.1, 10), (0, 0), (-3, 0)])
def test_an_axis_ends_at_a_round_number(value, end):
    assert round_up(value) == pytest.approx(end)


def test_a_heading_says_how_many_shots_were_asked_for_instead_of_those_in_the_title():
    found = content(ACC)
    assert "--shots" not in page(found)
    header = found["header"] | {"options": found["header"]["options"] | {"shots": 2}}
    assert "20 items, --shots 2" in page(found | {"header": header})


def test_long_words_wrap_wherever_the_page_has_text_from_outside():
    """A narrow screen must not scroll sideways for the name of a file; the table scrolls by itself."""
    text = page(content(ACC, left_out=1, problems=[{"id": "1", "problem": "image " + "x" * 99}]))
    wrapping = re.search(r"([a-z0-9, ]+) { overflow-wrap: anywhere }", text)[1]
    assert {"h1", "li"} <= {each.strip() for each in wrapping.split(",")} and "dd { margin: 0; overflow-wrap" in text
    assert ".figures tbody th div { max-width: min(100%, 100vw - 3rem) }" in text
