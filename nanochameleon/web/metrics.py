"""Counters, gauges and histograms, in Prometheus's text format 0.0.4.

    metrics.count("tokens_total", 64, modality="image"); metrics.observe("request_seconds", 0.2, route="/api/generate")
    GET /metrics  ->  nanochameleon_tokens_total{modality="image"} 64

Any thread may report. Labels have few values by design: a route is its pattern, never a path that a client chose.
"""

import threading
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PREFIX = "nanochameleon_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds
FAMILIES = {  # name: its type, labels and help
    "requests_total": ("counter", ("route", "status"), "Requests that were answered, by route and status."),
    "tokens_total": ("counter", ("modality",), "Tokens that were generated: text or image."),
    "requests_waiting": ("gauge", (), "Samples that wait for a slot."),
    "slots_in_use": ("gauge", (), "Slots of the batch that a sample holds."),
    "seconds_to_first_token": ("histogram", (), "Seconds from a sample's request to its first token."),
    "request_seconds": ("histogram", ("route",), "Seconds from a request to the end of its answer."),
}

Labels = tuple[str, ...]  # values, in the family's order


@dataclass
class Histogram:
    """Counts of observations by bucket; the last is what is above all of them."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0


class Metrics:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.series: dict[str, dict[Labels, float | Histogram]] = {name: {} for name in FAMILIES}
        for name in ("requests_waiting", "slots_in_use"):
            self.set(name, 0)

    def count(self, name: str, value: float = 1, **labels: object) -> None:
        """Add to a counter."""
        with self.lock:
            series, key = self.series[name], key_of(name, labels)
            series[key] = series.get(key, 0) + value

    def set(self, name: str, value: float, **labels: object) -> None:
        """Set a gauge."""
        with self.lock:
            self.series[name][key_of(name, labels)] = value

    def observe(self, name: str, seconds: float, **labels: object) -> None:
        """Add to a histogram."""
        with self.lock:
            histogram = self.series[name].setdefault(key_of(name, labels), Histogram())
            histogram.counts[bisect_left(BUCKETS, seconds)] += 1
            histogram.total += seconds

    def text(self) -> str:
        """Return all of it as GET /metrics shows it."""
        with self.lock:
            return "".join(f"{each}\n" for name in FAMILIES for each in self.lines(name))

    def lines(self, name: str) -> list[str]:
        kind, labels, help_text = FAMILIES[name]
        lines = [f"# HELP {PREFIX}{name} {help_text}", f"# TYPE {PREFIX}{name} {kind}"]
        for key, value in self.series[name].items():
            pairs = list(zip(labels, key, strict=True))
            lines += bucket_lines(name, pairs, value) if kind == "histogram" else [line(name, pairs, value)]
        return lines


def bucket_lines(name: str, pairs: list[tuple[str, object]], histogram: Histogram) -> list[str]:
    """A bucket counts everything up to its bound, so the last one counts all."""
    sums = list(accumulate(histogram.counts))
    bounds = zip([*BUCKETS, "+Inf"], sums, strict=True)
    buckets = [line(f"{name}_bucket", [*pairs, ("le", bound)], count) for bound, count in bounds]
    return [*buckets, line(f"{name}_sum", pairs, histogram.total), line(f"{name}_count", pairs, sums[-1])]


def key_of(name: str, labels: dict[str, object]) -> Labels:
    names = FAMILIES[name][1]
    if set(labels) != set(names):
        raise ValueError(f"{name} has the labels {names}, not {tuple(labels)}")
    return tuple(str(labels[each]) for each in names)


def line(name: str, pairs: list[tuple[str, object]], value: float) -> str:
    labels = ",".join(f'{label}="{escaped(str(text))}"' for label, text in pairs)
    return f"{PREFIX}{name}{f'{{{labels}}}' if labels else ''} {value}"


def escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


async def metrics(request: Request) -> Response:
    return Response(request.app.state.site.metrics.text(), headers={"content-type": CONTENT_TYPE})


ROUTES = [Route("/metrics", metrics)]
