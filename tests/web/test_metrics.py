"""Metrics: Prometheus's own parser reads back what was reported, whatever the labels are."""

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.routing import Route
from starlette.testclient import TestClient
from tiny_site import tiny_site

from nanochameleon.web.app import application
from nanochameleon.web.metrics import BUCKETS, FAMILIES, PREFIX, Metrics


def parsed(text: str) -> dict[tuple, float]:
    """{(name, labels): value}, of a text that is right to the last line."""
    assert text.endswith("\n")
    return {
        (each.name.removeprefix(PREFIX), tuple(sorted(each.labels.items()))): each.value
        for family in text_string_to_metric_families(text)
        for each in family.samples
    }


def test_every_family_has_its_help_and_type_before_anything_happened():
    families = {family.name: family for family in text_string_to_metric_families(Metrics().text())}
    for name, (kind, _, words) in FAMILIES.items():
        family = families[PREFIX + name.removesuffix("_total")]
        assert (family.type, family.documentation) == (kind, words)
    assert parsed(Metrics().text()) == {("requests_waiting", ()): 0, ("slots_in_use", ()): 0}


@given(st.text(), st.text(), st.integers(0, 2**53))
def test_a_label_comes_back_as_it_was(route, status, value):
    metrics = Metrics()
    metrics.count("requests_total", value, route=route, status=status)
    found = parsed(metrics.text())
    assert found["requests_total", (("route", route), ("status", status))] == value


def test_counters_add_and_gauges_are_set():
    metrics = Metrics()
    for n in (3, 4):
        metrics.count("tokens_total", n, modality="image")
        metrics.set("slots_in_use", n)
    metrics.count("tokens_total", modality="text")
    found = parsed(metrics.text())
    assert found["tokens_total", (("modality", "image"),)] == 7 and found["tokens_total", (("modality", "text"),)] == 1
    assert found["slots_in_use", ()] == 4


@given(st.lists(st.floats(0, 1e6) | st.sampled_from(BUCKETS), max_size=30))
def test_a_histogram_counts_what_is_at_most_each_bound(seconds):
    metrics = Metrics()
    for each in seconds:
        metrics.observe("seconds_to_first_token", each)
    found = parsed(metrics.text())
    for bound in [*BUCKETS, math.inf] * bool(seconds):
        label = ("le", "+Inf" if bound == math.inf else str(bound))
        assert found["seconds_to_first_token_bucket", (label,)] == sum(each <= bound for each in seconds)
    if seconds:
        assert found["seconds_to_first_token_count", ()] == len(seconds)
        assert found["seconds_to_first_token_sum", ()] == pytest.approx(sum(seconds))


def test_a_label_that_a_family_lacks_is_a_mistake():
    with pytest.raises(ValueError, match="has the labels"):
        Metrics().count("tokens_total", 1, who="ann")
    with pytest.raises(KeyError):
        Metrics().count("tokens")


def test_threads_lose_no_count():
    metrics = Metrics()

    def report() -> None:
        for _ in range(2_000):
            metrics.count("tokens_total", modality="text")

    threads = [threading.Thread(target=report) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert parsed(metrics.text())["tokens_total", (("modality", "text"),)] == 8_000


# ---------------------------------------------------------------------------------------------------------------------
# The route


def crash(request: Request) -> None:
    raise ZeroDivisionError


def test_requests_are_counted_by_the_pattern_of_their_route_and_by_status():
    app = application(tiny_site())
    app.router.routes.append(Route("/crash", crash))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        for path in ("/static/style.css", "/static/x", "/static/y", "/healthz", "/a", "/b/c", "/crash"):
            client.get(path)
        client.get("/healthz", headers={"host": "evil.example"})
        client.post("/healthz", json={})
        answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = parsed(answer.text)
    counted = {labels: value for (name, labels), value in found.items() if name == "requests_total"}
    assert {tuple(value for _, value in labels): n for labels, n in counted.items()} == {
        ("/static/{name}", "200"): 1, ("/static/{name}", "404"): 2, ("/healthz", "200"): 1, ("none", "404"): 2,
        ("/crash", "500"): 1, ("none", "403"): 1, ("/healthz", "405"): 1,
    }  # fmt: skip
    assert found["request_seconds_count", (("route", "/static/{name}"),)] == 3


def test_no_client_makes_new_labels():
    """Each label costs memory for ever, so none may hold what a client chose."""
    client = TestClient(application(tiny_site()), base_url="http://127.0.0.1")
    sizes = []
    for start in (0, 100):
        for i in range(start, start + 100):
            client.get(f"/static/{i}?{i}", headers={"host": "127.0.0.1", f"x-{i}": str(i)})
            client.request(f"M{i}", f"/{i}")
        sizes.append(len(parsed(client.get("/metrics").text)))
    assert sizes[0] == sizes[1] - 1 - len(BUCKETS) - 3  # those of /metrics itself, which was asked once more
