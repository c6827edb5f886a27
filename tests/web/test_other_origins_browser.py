"""A page of somebody else, in the same browser, can neither read from the server nor make it do anything."""

from urllib.parse import urlsplit

import httpx
import pytest
from browser import REBOUND
from serving import PATIENCE, served
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Route

BODY = '{"turns": [{"role": "user", "segments": [{"text": "please draw a red star"}]}]}'
PAGE = '<!doctype html><html lang="en"><title>other</title><main><h1>Other</h1></main></html>'


@pytest.fixture
def other(visit):
    """A page of another server of this machine, without any policy."""
    visit.forgive()
    with served(Starlette(routes=[Route("/", lambda _: HTMLResponse(PAGE))])) as address:
        yield visit(address)


@pytest.fixture(autouse=True)
def nothing_was_done(toy_address):
    """The server generates nothing for any of these pages."""
    before = generated(toy_address)
    yield
    assert generated(toy_address) == before


def generated(address: str) -> list[str]:
    return [
        line for line in httpx.get(f"{address}/metrics", timeout=PATIENCE).text.splitlines() if "_tokens_total" in line
    ]


def fetched(page, url: str, options: dict) -> str:
    """Return what the page could read, or "failed"."""
    return page.evaluate("([url, options]) => fetch(url, options).then(r => r.text(), () => 'failed')", [url, options])


@pytest.mark.parametrize("mode", ["cors", "no-cors"])
def test_other_page_reads_nothing(other, toy_address, mode):
    for path in ("/", "/api/settings", "/metrics", "/healthz", "/static/page.js", "/v1/models"):
        assert fetched(other, toy_address + path, {"mode": mode}) in ("failed", ""), path


@pytest.mark.parametrize("mode", ["cors", "no-cors"])
def test_other_page_posts_nothing(other, toy_address, mode):
    for path in ("/api/generate", "/v1/chat/completions", "/api/images", "/api/red-team"):
        for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded", "image/png"):
            options = {"method": "POST", "mode": mode, "body": BODY, "headers": {"content-type": kind}}
            assert fetched(other, toy_address + path, options) in ("failed", ""), (path, kind)


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded"])
def test_form_of_another_page_is_refused(other, toy_address, kind):
    with other.expect_response(f"{toy_address}/api/generate") as answer:
        other.evaluate(
            """([action, enctype, body]) => {
              const form = document.createElement("form");
              Object.assign(form, {method: "post", action, enctype});
              const field = document.createElement("input");
              [field.name, field.value] = [body.slice(0, -1) + ', "x": "', '"}'];
              form.append(field);
              document.body.append(form);
              form.submit();
            }""",
            [f"{toy_address}/api/generate", kind, BODY],
        )
    assert answer.value.status == 403


def test_other_page_embeds_nothing(other, toy_address):
    """Not even whether it would load can be seen."""
    for tag in ("img", "script", "link", "object", "video"):
        for path in ("/", "/static/page.js", "/static/style.css", "/api/settings"):
            happened = other.evaluate(
                """([tag, url]) => new Promise((resolve) => {
                  const element = document.createElement(tag);
                  for (const name of ["load", "loadeddata", "error"]) {
                    element.addEventListener(name, () => resolve(name));
                  }
                  if (tag === "link") [element.rel, element.href] = ["stylesheet", url];
                  else element[tag === "object" ? "data" : "src"] = url;
                  document.body.append(element);
                })""",
                [tag, toy_address + path],
            )
            assert happened == "error", (tag, path)


def test_other_page_frames_nothing(other, toy_address):
    """A click that somebody led there by a transparent frame would reach nothing."""
    other.evaluate(
        """url => new Promise((resolve) => {
          const frame = document.createElement("iframe");
          Object.assign(frame, {src: url, onload: resolve});
          document.body.append(frame);
        })""",
        toy_address,
    )
    [frame] = other.frames[1:]
    assert not frame.url.startswith(toy_address) and "composer" not in frame.content()


def test_opened_window_cannot_be_reached(other, toy_address):
    """A page that opens ours in a window gets no hold on it."""
    with other.expect_popup() as popup:
        other.evaluate("url => { window.opened = open(url) }", toy_address)
    popup.value.wait_for_load_state()
    assert popup.value.title() == "nanochameleon" and popup.value.evaluate("opener") is None
    assert other.evaluate("opened.closed")  # as far as the other page can see


def test_rebound_name_is_refused(visit, toy_address):
    """DNS rebinding: a name of somebody else's, which now leads to this machine, makes our server their origin."""
    visit.forgive()
    page = visit(f"http://{REBOUND}:{urlsplit(toy_address).port}/")
    assert page.evaluate("performance.getEntriesByType('navigation')[0].responseStatus") == 403
    for path in ("/api/settings", "/v1/models", "/static/page.js", "/healthz", "/metrics"):
        assert page.evaluate("path => fetch(path).then(r => r.status)", path) == 403, path
    options = {"method": "POST", "body": BODY, "headers": {"content-type": "application/json"}}
    assert page.evaluate("options => fetch('/api/generate', options).then(r => r.status)", options) == 403
