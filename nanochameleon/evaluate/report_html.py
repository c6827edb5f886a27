"""What a run leaves to look at: samples.png, report.json and report.html.

report.html is one page that needs nothing else: images inside it, no scripts, no links, every text escaped, and a
content policy that forbids the rest. It measures nothing (evaluate/) and draws no curves (curves.py).
"""

import base64
import html
import json
import math
import textwrap
from collections.abc import Container, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nanochameleon.files import write_file
from nanochameleon.images.terminal import enlarge, png

# ---------------------------------------------------------------------------------------------------------------------
# samples.png

PAPER, INK, RIGHT, WRONG = "#ffffff", "#222222", "#2e8b57", "#c0392b"
GAP, LINE, FONT_SIZE = 16, 18, 14  # pixels
NARROWEST = 128  # pixels of a cell, so that a small image still has room for words


def samples_sheet(
    items: Sequence[tuple[str, np.ndarray, bool | None]], path: Path, scale: int | None = None, width: int = 1000
) -> None:
    """Writes a grid of (caption, uint8 (R, R, 3), was it right? or None) as one PNG about `width` pixels wide.

    Images are enlarged `scale` times (by default to at least 128 pixels) without smoothing, captions wrapped below;
    a green tick or a red cross tells right from wrong where that is known. Letters that the font lacks, as those of
    Chinese, are written as their code points, since a box for each would look like a fault of the model.
    """
    font, letters = _font()
    images = [enlarge(image, scale or max(1, math.ceil(NARROWEST / image.shape[1]))) for _, image, _ in items]
    cell = max([NARROWEST, *(image.width for image in images)])
    captions = [_wrap(_drawable(caption, letters), font, cell - 18 * (ok is not None)) for caption, _, ok in items]
    columns = max(1, min(len(items), (width - GAP) // (cell + GAP)))
    rows = [range(start, min(start + columns, len(items))) for start in range(0, len(items), columns)]
    heights = [max(images[i].height + 6 + LINE * len(captions[i]) for i in row) + GAP for row in rows]
    sheet = Image.new("RGB", (GAP + columns * (cell + GAP), GAP + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = GAP + sum(heights[:number])
        for column, i in enumerate(row):
            left = GAP + column * (cell + GAP)
            _draw_item(sheet, draw, (left, top), images[i], captions[i], items[i][2], font)
    write_file(Path(path), png(sheet))


@cache
def _font() -> tuple[ImageFont.FreeTypeFont, Container[int]]:
    """The font that matplotlib brings, for most alphabets; and the code points that it has."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    path = str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    return ImageFont.truetype(path, FONT_SIZE), FT2Font(path).get_charmap().keys()


def _drawable(text: str, letters: Container[int]) -> str:
    """The text with an escape, such as \\u4e2d, for each letter that `letters` lacks."""
    return "".join(c if ord(c) in letters or c.isspace() else c.encode("unicode_escape").decode() for c in text)


def _draw_item(sheet, draw, corner, image, lines, ok, font) -> None:
    left, top = corner
    sheet.paste(image, corner)
    draw.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline="#cccccc")
    below = top + image.height + 6
    if ok is not None:
        _draw_mark(draw, left, below + 2, ok)
    for number, line in enumerate(lines):
        draw.text((left + 18 * (ok is not None), below + number * LINE), line, INK, font)


def _draw_mark(draw, x: int, y: int, ok: bool) -> None:
    """A tick or a cross, drawn: the font has neither."""
    if ok:
        draw.line((x + 1, y + 6, x + 5, y + 11, x + 12, y + 1), RIGHT, 3, joint="curve")
    else:
        draw.line((x + 2, y + 2, x + 11, y + 11), WRONG, 3)
        draw.line((x + 2, y + 11, x + 11, y + 2), WRONG, 3)


def _wrap(text: str, font, width: int) -> list[str]:
    """Greedy lines that fit in `width` pixels; a word that is too long is cut."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# report.json and report.html


def write_report(
    run_dir: Path,
    report: Mapping,
    conversations: Sequence[Mapping] = (),
    commands: Sequence[str] = (),
    title: str = "nanochameleon",
) -> Path:
    """Writes run_dir/report.json and report.html, with its samples.png and curves.png inside; returns the page's path.

    report: figures in nested dicts, fractions as 0..1, times in seconds. conversations: dicts with "question",
    "answer", and, where known, "truth" and "image" (uint8 (R, R, 3)). commands: lines to try next.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    data = _jsonable(report)
    write_file(run_dir / "report.json", (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())
    sections = [
        _section("Drawn from words", _figure(run_dir / "samples.png", "images drawn by the model, prompts below")),
        _section("Asked about images", "".join(_conversation(item) for item in conversations)),
        _section("Figures", _table(data)),
        _section("Training", _figure(run_dir / "curves.png", "loss by modality, output norm, log Z, gradient norm")),
        _section("Try next", f"<pre>{html.escape(chr(10).join(commands))}</pre>" if commands else ""),
    ]
    page = PAGE.format(title=html.escape(title), style=STYLE, body="\n".join(filter(None, sections)))
    write_file(run_dir / "report.html", page.encode(errors="replace"))
    return run_dir / "report.html"


def _jsonable(value):
    """Numbers of numpy and torch as plain ones; what is not finite as null, which any reader of JSON takes."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flatten(report: Mapping, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    """{"a": {"b": 1}, "c": 2} -> [(("a", "b"), 1), (("c",), 2)]."""
    rows = []
    for key, value in report.items():
        rows += flatten(value, (*path, key)) if isinstance(value, Mapping) else [((*path, key), value)]
    return rows


def show(path: tuple[str, ...], value: object) -> str:
    """A figure for people, unit by its name: ("seconds", "total"), 75.2 -> '1:15'; ("accuracy",), 0.9 -> '90.0%'."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if any(key.endswith("seconds") for key in path):
        return f"{value:.1f} s" if value < 10 else f"{int(value + 0.5) // 60}:{int(value + 0.5) % 60:02d}"
    if path[-1].endswith("gib"):
        return f"{value:.2f} GiB"
    if any(key.startswith("bits") for key in path):
        return f"{value:.3f}"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1%}" if 0 <= value <= 1 else f"{value:.3g}"


def _words(key: str) -> str:
    return key.replace("_gib", "").replace("_", " ")


def _table(report: Mapping) -> str:
    """Figures in groups: one heading a nested dict, one row a figure."""
    alone = {key: value for key, value in report.items() if not isinstance(value, Mapping)}
    groups = [(key, value) for key, value in report.items() if isinstance(value, Mapping)] + [("", alone)]
    lines = []
    for heading, group in groups:
        name = _words(heading).capitalize() + (" (min:s)" if heading == "seconds" else "")
        lines.append(f'<tbody><tr><th colspan="2">{html.escape(name or "And")}</th></tr>' if group else "<tbody>")
        for path, value in flatten(group):
            label = html.escape(" · ".join(_words(key) for key in path))
            figure = html.escape(show((heading, *path), value))
            lines.append(f"<tr><td>{label}</td><td>{figure}</td></tr>")
        lines.append("</tbody>")
    return f"<table>{''.join(lines)}</table>"


def _image(data: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _figure(path: Path, alt: str) -> str:
    return f"<figure>{_image(path.read_bytes(), alt)}</figure>" if path.exists() else ""


def _conversation(item: Mapping) -> str:
    image = item.get("image")
    shown = "" if image is None else _image(png(enlarge(image, math.ceil(96 / len(image)))), "the image asked about")
    truth = item.get("truth")
    note = "" if truth is None else f'<p class="truth">truth: {html.escape(str(truth))}</p>'
    question, answer = (html.escape(str(item.get(key, ""))) for key in ("question", "answer"))
    return f'<div class="talk">{shown}<div><p class="asks">{question}</p><p>{answer}</p>{note}</div></div>'


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>{body}</section>" if body else ""


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""

STYLE = textwrap.dedent("""
    :root { color-scheme: light dark; --ink: #1d1d1f; --soft: #6b6b70; --paper: #fcfcfa;
      --rule: #dddcd6; --tint: #f2f1ec }
    @media (prefers-color-scheme: dark) {
      :root { --ink: #e8e6e1; --soft: #9d9b95; --paper: #18181a; --rule: #38383b; --tint: #232326 } }
    body { max-width: 62rem; margin: 3rem auto; padding: 0 1.25rem; color: var(--ink); background: var(--paper);
      font: 16px/1.55 Charter, Georgia, "DejaVu Serif", serif }
    h1 { font-size: 2rem; margin: 0 0 2rem; font-weight: 600 }
    h2 { font-size: 1.15rem; margin: 2.75rem 0 1rem; padding-top: .75rem; border-top: 1px solid var(--rule) }
    figure { margin: 0; padding: .75rem; background: #fff; border: 1px solid var(--rule); border-radius: 6px }
    figure img { display: block; width: 100%; height: auto }
    table { border-collapse: collapse; width: 100%; max-width: 34rem }
    th { text-align: left; padding: 1rem 0 .25rem; font-weight: 600 }
    td { padding: .2rem 0; border-bottom: 1px solid var(--rule) }
    td + td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding-left: 1rem }
    .talk { display: inline-flex; gap: .9rem; width: 19rem; margin: 0 .8rem 1rem 0; vertical-align: top }
    .talk img { width: 96px; height: 96px; image-rendering: pixelated; border: 1px solid var(--rule) }
    .talk p { margin: 0 0 .2rem }
    .asks, .truth { color: var(--soft); font-size: .9rem }
    .asks { font-style: italic }
    pre { padding: .9rem 1.1rem; background: var(--tint); border-radius: 6px; overflow-x: auto;
      font: 14px/1.6 ui-monospace, "DejaVu Sans Mono", monospace }
""").strip()
