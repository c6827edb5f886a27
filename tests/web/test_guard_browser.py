"""What other sites can do to this server from a real browser: nothing that reaches a route. And how a token gets in."""

import browser
import pytest
from serving import served
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Route
from tiny_site import tiny_site

from nanochameleon.web.app import application
from nanochameleon.web.head import Access

TOKEN = "a-token-of-23-characters"
ATTACKS = """async target => {
    const outcome = async (path, options) => {
        try { return (await fetch(target + path, options)).type; } catch { return "refused"; }
    };
    const loaded = (kind, path) => new Promise(resolve => {
        const element = document.createElement(kind);
        element.onload = () => resolve("loaded");
        element.onerror = () => resolve("refused");
        element.src = target + path;
        document.body.append(element);
    });
    const post = (type, mode) => ({method: "POST", mode, headers: {"content-type": type}, body: '{"turns": []}'});
    return {
        read: await outcome("/api/settings"),
        blind: await outcome("/api/settings", {mode: "no-cors"}),
        form: await outcome("/api/generate", post("text/plain", "no-cors")),
        json: await outcome("/api/generate", post("application/json", "cors")),
        script: await loaded("script", "/static/page.js"),
        image: await loaded("img", "/static/page.js"),
    };
}"""
FORM = """target => {
    document.body.innerHTML = "<form method=post enctype=text/plain><input name=x></form>";
    document.forms[0].action = target + "/api/generate";
    document.forms[0].submit();
}"""
FRAME = """target => new Promise(seen => {
    const frame = document.createElement("iframe");
    frame.onload = seen;
    frame.src = target;
    document.body.append(frame);
})"""


async def evil(request) -> HTMLResponse:
    return HTMLResponse("<!doctype html><html lang=en><title>evil</title><link rel=icon href=data:,><body>")


@pytest.fixture(scope="module")
def evil_port():
    with served(Starlette(routes=[Route("/", evil)])) as address:
        yield address.rpartition(":")[2]


@pytest.fixture
def target():
    site = tiny_site()
    with served(application(site)) as address:
        yield address, site.metrics.series["requests_total"]


def reached(requests: dict) -> set[str]:
    """Return the routes that requests reached; "none" is what the guard refused, and an icon that nobody has."""
    return {route for route, _ in requests}


def forget(visit) -> None:
    """What a browser says of refused requests is no problem here."""
    for context in visit.contexts:
        context.close()
    visit.contexts.clear()
    visit.problems.clear()


@pytest.mark.parametrize("name", ["127.0.0.1", browser.REBOUND])
def test_the_page_of_another_site_reaches_no_route(visit, target, evil_port, name):
    """Of this machine by another port, which browsers call the same site; and of a foreign name."""
    address, requests = target
    page = visit(f"http://{name}:{evil_port}/")
    found = page.evaluate(ATTACKS, address)
    assert {how: found[how] for how in ("read", "json", "script", "image")} == dict.fromkeys(
        ("read", "json", "script", "image"), "refused"
    )
    assert set(requests) == {("none", "403")}
    page.evaluate(FORM, address)
    page.wait_for_url("**/api/generate")
    assert "another site" in page.text_content("body") and reached(requests) == {"none"}
    forget(visit)


def test_a_foreign_name_that_leads_here_sees_nothing(visit, target):
    address, requests = target
    page = visit(address.replace("127.0.0.1", browser.REBOUND))
    assert "does not answer to that name" in page.text_content("body")
    assert page.evaluate("fetch('/api/settings').then(answer => answer.status)") == 403
    assert reached(requests) == {"none"}
    forget(visit)


def test_a_link_on_another_site_leads_to_the_page_and_a_frame_does_not(visit, target, evil_port):
    address, requests = target
    page = visit(f"http://{browser.REBOUND}:{evil_port}/")
    page.evaluate("target => { location.href = target; }", f"{address}/")
    page.wait_for_url(f"{address}/")
    assert page.title() == "nanochameleon" and ("none", "403") not in requests
    page.goto(f"http://{browser.REBOUND}:{evil_port}/")
    page.evaluate(FRAME, f"{address}/")
    assert requests["none", "403"] == 1
    forget(visit)


def test_a_browser_gets_in_by_the_token_once_and_keeps_no_trace_of_it(visit):
    site = tiny_site()
    with served(application(site, Access(token=TOKEN))) as address:
        page = visit(f"{address}/?token={TOKEN}")
        assert page.url == f"{address}/" and page.title() == "nanochameleon"
        assert page.evaluate("document.cookie") == ""
        assert page.evaluate("fetch('/api/settings').then(answer => answer.status)") == 200
        page.reload()
        assert page.title() == "nanochameleon"
        stranger = visit(f"{address}/")
        assert "token is missing" in stranger.text_content("body")
        forget(visit)
