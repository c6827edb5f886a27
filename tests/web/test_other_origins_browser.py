"""A page of somebody else, in the same browser, can neither read from the server nor make it do anything."""

import re
from urllib.parse import urlsplit

import httpx
import pytest
from browser import REBOUND
from serving import served
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

BODY = '{"turns": [{"role": "user", "segments": [{"text": "please draw a red star"}]}]}'
PAGE = '<!doctype html><html lang="en"><title>other</title><main><h1>Other</h1></main></html>'


@pytest.fixture
def other(visit):
    """A page of another server of this machine, without any policy: requests of its own are no problem."""
    icon = Route("/favicon.ico", lambda _: Response(status_code=204))
    with served(Starlette(routes=[Route("/", lambda _: HTMLResponse(PAGE)), icon])) as address:
        yield visit(address)


@pytest.fixture(autouse=True)
def nothing_was_done(toy_address):
    """The server generates nothing for any of these pages."""
    before = generated(toy_address)
    yield
    assert generated(toy_address) == before


def generated(address: str) -> list[str]:
    return [line for line in httpx.get(f"{address}/metrics").text.splitlines() if "_tokens_total" in line]


def try_fetch(page, url: str, options: dict) -> str:
    """ "read: ..." with what the page could read, or "failed"."""
    return page.evaluate(
        "([url, options]) => fetch(url, options).then(async r => `read: ${await r.text()}`, () => 'failed')",
        [url, options],
    )


@pytest.mark.parametrize("path", ["/", "/api/settings", "/metrics", "/healthz", "/static/page.js", "/v1/models"])
@pytest.mark.parametrize("mode", ["cors", "no-cors"])
def test_other_page_reads_nothing(visit, other, toy_address, path, mode):
    assert try_fetch(other, toy_address + path, {"mode": mode}) in ("failed", "read: ")
    visit.problems.clear()


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("mode", ["cors", "no-cors"])
@pytest.mark.parametrize("path", ["/api/generate", "/v1/chat/completions"])
def test_other_page_posts_nothing(visit, other, toy_address, path, kind, mode):
    options = {"method": "POST", "mode": mode, "body": BODY, "headers": {"content-type": kind}}
    assert try_fetch(other, toy_address + path, options) in ("failed", "read: ")
    visit.problems.clear()


def test_form_of_another_page_is_refused(visit, other, toy_address):
    with other.expect_response(f"{toy_address}/api/generate") as answer:
        other.evaluate(
            """([action, body]) => {
              const form = document.createElement("form");
              Object.assign(form, {method: "post", action, enctype: "text/plain"});
              const field = document.createElement("input");
              [field.name, field.value] = [body.slice(0, -1) + ', "x": "', '"}'];
              form.append(field);
              document.body.append(form);
              form.submit();
            }""",
            [f"{toy_address}/api/generate", BODY],
        )
    assert answer.value.status == 403
    visit.problems.clear()


@pytest.mark.parametrize("tag", ["img", "script", "link", "iframe", "object"])
@pytest.mark.parametrize("path", ["/", "/static/page.js", "/static/style.css", "/api/settings"])
def test_other_page_embeds_nothing(visit, other, toy_address, tag, path):
    """Neither "load" nor anything that it could measure or show."""
    happened = other.evaluate(
        """([tag, url]) => new Promise((resolve) => {
          const element = document.createElement(tag);
          for (const name of ["load", "error"]) element.addEventListener(name, () => resolve(name));
          if (tag === "link") [element.rel, element.href] = ["stylesheet", url];
          else element[tag === "object" ? "data" : "src"] = url;
          document.body.append(element);
        })""",
        [tag, toy_address + path],
    )
    if tag == "iframe":  # loads an error of the browser's in place of the page
        assert "nanochameleon" not in "".join(frame.content() for frame in other.frames[1:])
        assert other.evaluate("() => { try { return frames[0].document.title } catch { return 'no' } }") == "no"
    else:
        assert happened == "error"
    visit.problems.clear()


def test_opened_window_cannot_be_reached(visit, other, toy_address):
    """A page that opens ours in a window gets no hold on it."""
    with other.expect_popup() as popup:
        other.evaluate("url => { window.opened = open(url) }", toy_address)
    popup.value.wait_for_load_state()
    assert popup.value.evaluate("opener") is None
    assert (
        other.evaluate(
            "() => opened.closed || (() => { try { return opened.document.title } catch { return true } })()"
        )
        is True
    )
    visit.problems.clear()


def test_rebound_name_is_refused(visit, toy_address):
    """DNS rebinding: a name of somebody else's, which now leads to this machine, makes our server their origin."""
    address = f"http://{REBOUND}:{urlsplit(toy_address).port}"
    page = visit(f"{address}/")
    assert page.evaluate("performance.getEntriesByType('navigation')[0].responseStatus") == 403
    page.route(f"{address}/theirs", lambda route: route.fulfill(content_type="text/html", body=PAGE))
    page.goto(f"{address}/theirs")
    for path, options in (
        ("/api/settings", {}),
        ("/v1/models", {}),
        ("/api/generate", {"method": "POST", "body": BODY}),
    ):
        options |= {"headers": {"content-type": "application/json"}} if "body" in options else {}
        status = page.evaluate("([path, o]) => fetch(path, o).then(r => r.status)", [path, options])
        assert status == 403, path
    visit.expect(re.escape("status of 403"))
    visit.problems.clear()
