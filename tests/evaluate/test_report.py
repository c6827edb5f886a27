"""The report: no caption is ever markup, figures have their units, and images are shown pixel for pixel."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanochameleon.evaluate.report_html import flatten, show, write_report
from nanochameleon.evaluate.samples import write_sheet

REPORT = {
    "seconds": {"total": 583.2, "tokenizer": 4.21},
    "peak_memory_gib": 1.234,
    "tokenizer": {"codebook_used": np.float32(0.5)},
    "text_to_image": {"seen": {"all_facts": 0.714, "by_fact": {"shape": 1.0}}},
    "bits_per_byte": 0.31,
    "tokens_per_second": 16_234.2,
    "broken": float("nan"),
}
RED = np.full((4, 4, 3), (255, 0, 0), np.uint8)


class Page(HTMLParser):
    """Tags with their attributes, and the texts between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


# ---------------------------------------------------------------------------------------------------------------------
# report


def test_the_page_needs_nothing_else_and_escapes_all_it_is_given(tmp_path):
    evil = """<script>alert("x")</script>&amp;'"><img src=http://e.vil onerror=x>"""
    write_sheet([(evil, RED, True)], tmp_path / "samples.png")
    Image.fromarray(RED).save(tmp_path / "curves.png")
    talk = {"question": evil, "answer": evil, "truth": evil, "image": RED}
    page = Page(write_report(tmp_path, {evil: {evil: evil}}, [talk], [evil], evil).read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert not {name for _, attributes in page.tags for name in attributes} & {"href", "onerror", "onload", "srcset"}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 3
    for source in sources:
        assert source.startswith("data:image/png;base64,")
        Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).load()
    assert page.texts.count(evil) >= 6  # title, heading, question, answer, command, ...: shown as it was typed


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_any_answer_is_shown_letter_for_letter(tmp_path_factory, answer):
    path = write_report(tmp_path_factory.mktemp("run"), {}, [{"question": "?", "answer": f"[{answer}]"}])
    assert f"[{answer}]" in Page(path.read_text(encoding="utf-8")).texts


def test_report_json_is_the_report_in_strict_json(tmp_path):
    write_report(tmp_path, REPORT)
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert read == {**REPORT, "broken": None, "tokenizer": {"codebook_used": 0.5}}


def test_the_page_shows_each_figure_with_its_unit(tmp_path):
    texts = Page(write_report(tmp_path, REPORT).read_text()).texts
    shown = {"total": "9:43", "tokenizer": "4.2 s", "peak memory": "1.23 GiB", "seen · all facts": "71.4%",
             "seen · by fact · shape": "100.0%", "bits per byte": "0.310", "tokens per second": "16,234",
             "codebook used": "50.0%", "broken": "–"}  # fmt: skip
    for label, figure in shown.items():
        assert texts[texts.index(label) + 1] == figure


@given(st.floats(10, 100_000))
def test_times_read_back_to_the_nearest_second(seconds):
    minutes, rest = show(("seconds", "total"), seconds).split(":")
    assert abs(int(minutes) * 60 + int(rest) - seconds) <= 0.5 and len(rest) == 2


def test_flatten_names_every_leaf_once():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == [(("a", "b"), 1), (("a", "c", "d"), 2), (("e",), 3)]


# ---------------------------------------------------------------------------------------------------------------------
# samples.png


@settings(max_examples=20)
@given(st.integers(0, 9), st.sampled_from([1, 8, 32, 200]), st.text(max_size=60))
def test_every_image_is_in_the_sheet_pixel_for_pixel(tmp_path_factory, n, side, caption):
    """Each image has a colour of its own; it covers exactly its enlarged area and none is lost or covered."""
    path = tmp_path_factory.mktemp("sheet") / "samples.png"
    colours = [(200, 10 * i + 5, 77) for i in range(n)]
    items = [(caption, np.full((side, side, 3), colour, np.uint8), [None, True, False][i % 3])
             for i, colour in enumerate(colours)]  # fmt: skip
    write_sheet(items, path)
    sheet = np.asarray(Image.open(path))
    shown = side * -(-128 // side)
    corners = []
    for colour in colours:
        rows, columns = np.nonzero((sheet == colour).all(-1))
        assert len(rows) == shown**2 == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        corners.append((rows[0], columns[0]))
    assert corners == sorted(corners)
    assert sheet.shape[1] <= max(1_000, shown + 32)


def test_right_and_wrong_are_marked_and_unknown_is_not(tmp_path):
    counts = {}
    for ok in (True, False, None):
        write_sheet([("", np.zeros((8, 8, 3), np.uint8), ok)], tmp_path / "sheet.png")
        sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
        green, red = sheet[..., 1] - sheet[..., 0] > 60, sheet[..., 0] - sheet[..., 1] > 60
        counts[ok] = (green.sum() > 10, red.sum() > 10)
    assert counts == {True: (True, False), False: (False, True), None: (False, False)}


def test_a_long_prompt_wraps_inside_its_cell_and_all_of_it_is_drawn(tmp_path):
    heights = []
    for words in (1, 10, 40):
        write_sheet([("wide words " * words + "x" * 60, RED, None)], tmp_path / "sheet.png")
        sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
        assert (sheet[:, -12:] == 255).all() and (sheet[-8:] == 255).all()
        heights.append(len(sheet))
    assert heights[0] < heights[1] < heights[2]


def ink(tmp_path, caption: str) -> bytes:
    """Return the pixels of a caption."""
    write_sheet([(caption, RED, None)], tmp_path / "sheet.png")
    return np.asarray(Image.open(tmp_path / "sheet.png"))[160:].tobytes()


def test_letters_of_many_alphabets_are_drawn_and_others_are_spelled_out(tmp_path):
    """A font's box, which is the same for all letters that it lacks, is never seen."""
    words = ["красный", "красным", "κόκκινο", "կարմիր", "אדום", "אדומ", "أحمر", "قرمز", "مي\u200cخواهم", "đỏ"]
    assert len({ink(tmp_path, word) for word in words}) == len(words)
    spellings = {"红": r"\u7ea2", "a 🔴": r"a \U0001f534", "लाल": r"\u0932\u093e\u0932", "\x1b[2J": r"\x1b[2J"}
    for unknown, spelled in spellings.items():
        assert ink(tmp_path, unknown) == ink(tmp_path, spelled)
    assert ink(tmp_path, "a\u3000b\u00a0c") == ink(tmp_path, "a b c")
