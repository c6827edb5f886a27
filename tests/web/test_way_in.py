"""How a person gets to the page in a real browser: by a link on any site; and by a token, where one is set."""

import browser
from serving import served
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Route
from tiny_site import tiny_site

from nanochameleon.web.app import application
from nanochameleon.web.head import Access

TOKEN = "a-token-of-23-characters"


def test_a_link_on_another_site_leads_to_the_page(visit):
    page = (
        '<!doctype html><html lang="en"><title>other</title><link rel="icon" href="data:,"><a href="{}">Open</a></html>'
    )
    routes = [Route("/", lambda request: HTMLResponse(page.format(request.query_params["to"])))]
    with served(application(tiny_site())) as address, served(Starlette(routes=routes)) as other:
        visit.forgive()  # the link leads to another server
        opened = visit(f"{other.replace('127.0.0.1', browser.REBOUND)}/?to={address}")
        opened.get_by_role("link").click()
        opened.wait_for_url(f"{address}/")
        assert opened.title() == "nanochameleon"


def test_a_browser_gets_in_by_the_token_once_and_keeps_no_trace_of_it(visit):
    with served(application(tiny_site(), Access(token=TOKEN))) as address:
        page = visit(f"{address}/?token={TOKEN}")
        assert page.url == f"{address}/" and page.title() == "nanochameleon"
        assert page.evaluate("document.cookie") == ""  # no script sees it
        assert page.evaluate("fetch('/api/settings').then(answer => answer.status)") == 200
        page.reload()
        assert page.title() == "nanochameleon"
        visit.forgive()
        stranger = visit(f"{address}/")
        assert "the token is missing" in stranger.text_content("body")
