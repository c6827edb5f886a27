"""Write report.json and report.html from figures that were measured elsewhere (report.py).

report.html is one page that needs nothing else: images are inside it, it has no scripts and no links, every text is
escaped, and its content security policy forbids everything else.
"""

import base64
import html
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanochameleon.files import write_file
from nanochameleon.images.terminal import enlarge, png


def write_report(
    run_dir: Path,
    report: Mapping,
    conversations: Sequence[Mapping] = (),
    commands: Sequence[str] = (),
    title: str = "nanochameleon",
) -> Path:
    """Write report.json and report.html, which includes samples.png and curves.png. Returns the page's path.

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
    """Turn numbers of numpy and torch into plain ones, and NaN and infinity into null, which JSON can hold."""
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
    """Format a figure with the unit that its name implies.

    (("seconds", "total"), 75.2) -> '1:15'; (("accuracy",), 0.9) -> '90.0%'
    """
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
    """Return one heading per nested dict and one row per figure."""
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
