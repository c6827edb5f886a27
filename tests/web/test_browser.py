"""The browser of the other tests: what a page does wrong fails the test, and other tests are left alone."""

import asyncio
import os
import shutil
from urllib.parse import urlencode

import browser
import pytest
from serving import served
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

POLICY = {"content-security-policy": "default-src 'none'; script-src 'self'"}
PAGE = '<!doctype html><html lang="en"><title>a page</title><main><h1>A page</h1>{}</main></html>'


@pytest.fixture(scope="module")
def pages():
    """Answers /?body=HTML with a page that holds it, under a strict policy; /lax?body=HTML does so without one."""

    def strict(request):
        return HTMLResponse(PAGE.format(request.query_params.get("body", "")), headers=POLICY)

    def lax(request):
        return HTMLResponse(PAGE.format(request.query_params.get("body", "")))

    icon = Route("/favicon.ico", lambda _: Response(status_code=204))  # the browser asks for it, sooner or later
    with served(Starlette(routes=[Route("/", strict), Route("/lax", lax), icon])) as address:
        yield address


def ask(address, body, path="/"):
    return f"{address}{path}?{urlencode({'body': body})}"


def test_theme_and_width(visit, pages):
    page = visit(pages, width=360, theme="dark")
    assert page.evaluate("[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [360, True]
    assert visit(pages).evaluate("[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [1280, False]


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("/", "<script>x()</script>", "Content Security Policy"),
        ("/", "<p style='color: red'>", "Content Security Policy"),
        ("/", "<img src='http://example.com/x.png'>", "Content Security Policy"),
        ("/lax", "<img src='http://example.com/x.png'>", "another server: http://example.com/x.png"),
        ("/lax", "<img src='http://example.com/x.png'>", "failed: GET"),
        ("/lax", "<script>console.error('oh no')</script>", "console: oh no"),
        ("/lax", "<script>nothing.there</script>", "script: nothing is not defined"),
        ("/lax", "<script>Promise.reject(new Error('late'))</script>", "script: late"),
        ("/lax", "<img src='/missing.png'>", "404"),
    ],
)
def test_problem_of_a_page_is_found(visit, pages, path, body, problem):
    visit(ask(pages, body, path))
    visit.expect(problem)
    visit.forgive()


def test_problem_fails_the_test_at_its_end(chromium, pages):
    started, loop = chromium
    with browser.running(loop):
        visits = browser.Visits(started)
        visits(ask(pages, "<script>console.error('oh no')</script>", "/lax"))
        with pytest.raises(pytest.fail.Exception, match="oh no"):
            visits.close()


def test_page_may_outlive_its_server(visit):
    icon = Route("/favicon.ico", lambda _: Response(status_code=204))
    with served(Starlette(routes=[Route("/", lambda _: HTMLResponse(PAGE.format(""))), icon])) as address:
        page = visit(address)
    page.evaluate("fetch('/').catch(() => 0)")
    assert "ERR_CONNECTION_REFUSED" in "".join(visit.problems)  # but at the end the test does not fail


def test_axe_says_rule_and_element(visit, pages):
    browser.check_accessible(visit(ask(pages, "<button>Go</button>")))
    page = visit(ask(pages, "<button></button>"))
    assert [found.split(": ")[:2] for found in browser.violations(page)] == [["button-name", "button"]]
    assert page.evaluate("typeof axe") == "undefined"  # the page's own variables stay its own


def test_page_that_scrolls_sideways_fails(visit, pages):
    page = visit(ask(pages, "<pre>" + "wide" * 200 + "</pre>"), width=360)
    with pytest.raises(AssertionError, match="sideways"):
        browser.check_accessible(page)


def test_other_tests_may_run_loops(chromium):
    asyncio.run(asyncio.sleep(0))


def test_rebound_name_leads_here(visit, pages):
    page = visit(pages.replace("127.0.0.1", browser.REBOUND))
    assert page.title() == "a page"


@pytest.mark.parametrize("broken", [False, True])
def test_missing_browser_fails_with_a_sentence(monkeypatch, tmp_path, broken):
    if broken:
        (tmp_path / "chromium").write_text(f"#!{shutil.which('false')}\n")
        os.chmod(tmp_path / "chromium", 0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"), browser.launched():
        pass
