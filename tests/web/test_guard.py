"""What the guard refuses, each attack a test; and what every answer says to browsers."""

import re

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scopes import ask, run
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from tiny_site import tiny_site

from nanochameleon.web import limits
from nanochameleon.web.app import HANDLERS, application
from nanochameleon.web.guard import HEADERS, Guard
from nanochameleon.web.head import Access
from nanochameleon.web.metrics import Metrics
from nanochameleon.web.rates import Buckets, network

BASE = "http://127.0.0.1:8000"
TOKEN = "a-token-of-23-characters"
JSON = {"content-type": "application/json"}


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"bytes": len(await request.body())})


def echoing(access: Access | None = None, address: str = "10.0.0.1", base: str = BASE) -> TestClient:
    """A client at an address of an application that says how many bytes it got."""
    app = Starlette(routes=[Route("/", echo), Route("/post", echo, methods=["POST"])], exception_handlers=HANDLERS)
    return TestClient(
        Guard(app, Metrics(), access or Access()), base_url=base, client=(address, 50_000), follow_redirects=False
    )


def sentence(answer) -> str:
    return answer.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------------------------------
# Host


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LocalHost:8000", "[::1]:8000"])
def test_this_machine_has_three_names(host):
    assert echoing().get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000", "evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example:8000", "127.1:8000",
        "0.0.0.0:8000", "2130706433:8000", "localhost:8001", "localhost", "localhost.:8000", "localhost:08000",
        "user@localhost:8000", "localhost:8000@evil.example", "localhost:8000,evil.example", "localhost:8000/", " ", "",
        "127.0.0.1:8000:8000", "[::1%25lo]:8000", "[::ffff:127.0.0.1]:8000", "localhost:8000\\.evil.example",
    ],
)  # fmt: skip
def test_a_foreign_name_that_leads_here_is_refused(host):
    """DNS rebinding: the page of evil.example has its name resolve to 127.0.0.1, and becomes this server's origin."""
    answer = echoing().get("/", headers={"host": host})
    assert answer.status_code == 403 and "--allow-host" in sentence(answer)


def misspelled(right: list[str]) -> st.SearchStrategy[str]:
    """Right spellings with a character put in, left out or replaced."""
    printed = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=2)
    edit = lambda word, at, new, n: word[:at] + new + word[at + n :]  # noqa: E731
    return st.builds(edit, st.sampled_from(right), st.integers(0, 24), printed, st.integers(0, 2))


OWN = ["127.0.0.1:8000", "localhost:8000", "[::1]:8000"]


@given(misspelled(OWN))
def test_no_spelling_is_this_server_but_its_names(host):
    assert (echoing().get("/", headers={"host": host}).status_code == 200) == (host.lower() in OWN)


def test_a_name_that_was_allowed_is_right_with_and_without_the_port():
    access = Access(("chat.example",))
    for host, status in (
        ("chat.example", 200),
        ("Chat.Example:8000", 200),
        ("chat.example:81", 403),
        ("a.chat.example", 403),
    ):
        assert echoing(access).get("/", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("server", "host", "status"),
    [
        ("192.168.1.5", "192.168.1.5:8000", 200),
        ("192.168.1.5", "192.168.1.6:8000", 403),
        ("192.168.1.5", "192.168.1.5", 403),
        ("fd00::7", "[fd00::7]:8000", 200),
        ("evil.example", "evil.example:8000", 403),
    ],
)
def test_the_address_that_a_client_reached_is_a_name_of_this_server(server, host, status):
    """Of a server that listens at 0.0.0.0. The page of a name that leads here has its own name as Host."""
    assert ask(echoing().app, server=(server, 8000), headers=[(b"host", host.encode())])[0] == status


TWICE = ["host", "origin", "content-type", "content-length", "sec-fetch-site", "authorization"]


@pytest.mark.parametrize("name", TWICE)
def test_a_header_that_comes_twice_is_refused(name):
    """Two readers of it, such as a proxy and this server, could take different ones."""
    right = {"host": "localhost:8000", "origin": "http://localhost:8000", "content-type": "application/json"}
    right |= {"content-length": "0", "sec-fetch-site": "none", "authorization": f"Bearer {TOKEN}"}
    headers = [(key.encode(), value.encode()) for key, value in right.items()]
    post, access = {"method": "POST", "path": "/post"}, Access(token=TOKEN)
    assert ask(echoing(access).app, headers=headers, **post)[0] == 200
    twice = [*headers, (name.encode(), right[name].encode())]
    assert ask(echoing(access).app, headers=twice, **post)[0] == 400


# ---------------------------------------------------------------------------------------------------------------------
# Origin


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example", "null", "", "http://localhost:8001", "http://localhost", "ftp://localhost:8000", "file://",
        "localhost:8000", "//localhost:8000", "http://localhost:8000.evil.example", "http://localhost:8000/",
        "http://x@localhost:8000",
    ],
)  # fmt: skip
def test_the_page_of_another_site_cannot_post(origin):
    answer = echoing().post("/post", headers={"origin": origin} | JSON, content=b"{}")
    assert answer.status_code == 403 and "another site" in sentence(answer)


@pytest.mark.parametrize("origin", ["http://localhost:8000", "http://127.0.0.1:8000", "https://[::1]:8000"])
def test_the_own_page_can_post(origin):
    assert echoing().post("/post", headers={"origin": origin} | JSON, content=b"{}").json() == {"bytes": 2}


OWN_ORIGINS = [f"{scheme}://{host}" for scheme in ("http", "https") for host in OWN]


@given(misspelled(OWN_ORIGINS))
def test_no_spelling_is_an_origin_of_this_server_but_its_own(origin):
    status = echoing().post("/post", headers={"origin": origin} | JSON, content=b"{}").status_code
    assert (status == 200) == (origin in OWN_ORIGINS)


@pytest.mark.parametrize("site", ["cross-site", "same-site", "CROSS-SITE", "?"])
def test_a_browser_that_names_another_site_is_refused_but_for_a_link_to_the_page(site):
    link = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert echoing().get("/", headers=link).status_code == 200
    for changed in ({"sec-fetch-mode": "no-cors"}, {"sec-fetch-dest": "iframe"}, {"sec-fetch-dest": "script"}):
        assert echoing().get("/", headers=link | changed).status_code == 403
    assert echoing().get("/healthz", headers=link).status_code == 403
    assert echoing().post("/post", headers=link | JSON, content=b"{}").status_code == 403


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_a_browser_that_names_this_site_or_none_may_ask(site):
    assert echoing().get("/", headers={"sec-fetch-site": site}).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json"]
)
def test_no_form_of_another_site_can_post(kind):
    """Nor can a script there without a preflight: such requests have the first three content-types."""
    answer = echoing().post("/post", headers={"content-type": kind}, content=b"{}")
    assert answer.status_code == 415 and "application/json" in sentence(answer)


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "image/png", "application/octet-stream"]
)
def test_json_and_images_can_be_posted(kind):
    assert echoing().post("/post", headers={"content-type": kind}, content=b"{}").status_code == 200


def test_no_answer_lets_other_sites_read_it():
    """A preflight gets no permission, whoever asks."""
    for method, origin in (
        ("OPTIONS", "http://evil.example"),
        ("OPTIONS", "http://localhost:8000"),
        ("GET", "http://localhost:8000"),
    ):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        answer = echoing().request(method, "/post", headers=headers)
        assert answer.status_code in (403, 405)
        assert not [name for name in answer.headers if name.startswith("access-control")]


# ---------------------------------------------------------------------------------------------------------------------
# The token


def test_without_the_token_nothing_is_answered_but_the_health():
    paths = ["/", "/static/style.css", "/metrics", "/api/settings", "/nothing", "/healthz/", "/healthz%2f", "/Healthz"]
    with TestClient(application(tiny_site(), Access(token=TOKEN)), base_url=BASE) as client:
        for path in paths:
            answer = client.get(path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert "/?token=TOKEN" in sentence(answer)
        assert client.get("/healthz?x").json() == {"status": "ok"}


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_the_token_opens_as_a_bearer(scheme):
    assert echoing(Access(token=TOKEN)).get("/", headers={"authorization": f"{scheme} {TOKEN}"}).status_code == 200


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Bearer \u00e9", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x",
     f"Bearer {TOKEN.upper()}"],
)  # fmt: skip
def test_any_other_bearer_does_not(value):
    answer = echoing(Access(token=TOKEN)).get("/", headers={"authorization": value.encode("latin-1")})
    assert answer.status_code == 401 and TOKEN not in answer.text


def test_a_browser_gets_a_cookie_that_scripts_and_other_sites_do_not_and_that_is_not_the_token():
    client = echoing(Access(token=TOKEN))
    answer = client.get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and "Path=/" in cookie and TOKEN not in cookie
    assert client.get("/").status_code == 200
    assert client.post("/post", headers=JSON, content=b"{}").status_code == 200
    assert client.post("/post", headers=JSON | {"origin": "http://evil.example"}, content=b"{}").status_code == 403


def test_a_cookie_of_another_port_or_another_token_opens_nothing():
    wanted = re.match(r"([^=]+)=([^;]+)", echoing(Access(token=TOKEN)).get(f"/?token={TOKEN}").headers["set-cookie"])
    name, value = wanted.groups()
    for cookie in (
        f"{name}={value[:-1]}0",
        f"{name}={TOKEN}",
        f"{name}=",
        f"other={value}",
        f"{name}x={value}",
        value,
        "\u00e9=\u00e9",
    ):
        answer = echoing(Access(token=TOKEN)).get("/", headers={"cookie": cookie.encode("latin-1")})
        assert answer.status_code == 401
    assert echoing(Access(token=TOKEN)).get("/", headers={"cookie": f"a=b; {name}={value}"}).status_code == 200
    elsewhere = echoing(Access(token=TOKEN), base="http://127.0.0.1:8001")
    assert elsewhere.get("/", headers={"cookie": f"{name}={value}"}).status_code == 401


def test_the_address_gives_a_token_to_the_page_alone():
    client = echoing(Access(token=TOKEN))
    for path in (f"/post?token={TOKEN}", f"/static/x?token={TOKEN}"):
        assert client.get(path).status_code == 401
    assert client.get("/?token=wrong").status_code == 401 and not client.cookies


def test_tokens_cannot_be_guessed_fast():
    """After some wrong tokens even the right one waits: else an answer would say which it is."""
    client = echoing(Access(token=TOKEN))
    wrong, right = {"authorization": "Bearer wrong"}, {"authorization": f"Bearer {TOKEN}"}
    assert [client.get("/", headers=wrong).status_code for _ in range(limits.TOKEN_BURST)] == [401] * limits.TOKEN_BURST
    for answer in (client.get("/", headers=wrong), client.get("/", headers=right), client.get(f"/?token={TOKEN}")):
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    other = TestClient(client.app, base_url=BASE, client=("10.0.0.2", 50_000))
    assert other.get("/", headers=right).status_code == 200


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("pieces", [1, 64])
@pytest.mark.parametrize("known", [True, False])
def test_a_long_body_is_refused_with_and_without_its_length_and_a_body_of_the_limit_is_read(known, pieces):
    for extra, status in ((0, 200), (1, 413)):
        size = limits.BODY + extra
        length = {"content-length": str(size)} if known else {}
        chunk = bytes(-(-size // pieces))
        content = (chunk[: max(0, size - i * len(chunk))] for i in range(pieces))
        answer = echoing().post("/post", headers=JSON | length, content=content)
        assert answer.status_code == status
        assert answer.json() == {"bytes": size} if status == 200 else "16 MiB" in sentence(answer)


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "+5", " ", "1_0", "\u0661", "9" * 5_000])
def test_a_length_that_is_no_number_is_refused(length):
    headers = [*JSON.items(), ("content-length", length.encode("utf-8"))]
    assert echoing().post("/post", headers=headers, content=b"").status_code in (400, 413)


def test_bodies_in_memory_are_limited_together(monkeypatch):
    monkeypatch.setattr(limits, "BODIES", 1_000)
    client = echoing()
    assert client.post("/post", headers=JSON, content=bytes(1_001)).status_code == 503
    assert client.app.held == 0  # given back
    assert client.post("/post", headers=JSON, content=bytes(1_000)).status_code == 200


def test_a_body_that_does_not_come_is_not_awaited_for_ever(monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.05)
    headers = [(b"host", b"localhost:8000"), (b"content-type", b"application/json"), (b"content-length", b"2")]
    late = ask(echoing().app, anyio.sleep_forever, method="POST", path="/post", headers=headers)
    assert late[0] == 408 and b"did not come" in late[1]


@pytest.mark.parametrize(
    "more",
    [{"x": "y" * limits.HEAD}, {f"x{i}": "" for i in range(limits.HEADERS + 1)}, {"x" * limits.HEAD: ""}],
    ids=["long", "many", "long name"],
)
def test_a_long_head_is_refused(more):
    assert echoing().get("/", headers=more).status_code == 431


def test_a_long_address_is_refused():
    assert echoing().get("/?" + "x" * limits.HEAD).status_code == 431
    assert echoing().get("/" + "x" * limits.HEAD).status_code == 431


# ---------------------------------------------------------------------------------------------------------------------
# Addresses


@pytest.mark.parametrize("path", ["http://evil.example/", "*", "evil.example:443", ""])
def test_an_address_that_is_no_path_is_refused(path):
    """Proxies are asked so. A client of HTTP cannot be made to send it."""
    assert ask(echoing().app, path=path)[0] == 400


def test_websockets_are_refused():
    assert echoing().get("/", headers={"upgrade": "websocket", "connection": "upgrade"}).status_code == 400
    assert [message["type"] for message in run(echoing().app, {"type": "websocket"})] == ["websocket.close"]


BYTES = st.binary(max_size=30)
NAMES = st.sampled_from([b"cookie", b"origin", b"authorization", b"content-length", b"host", b"content-type"])


@given(
    st.lists(st.tuples(BYTES | NAMES, BYTES), max_size=4), BYTES, st.text(max_size=10), st.sampled_from([None, TOKEN])
)
def test_nothing_in_a_head_breaks_the_guard(headers, query, path, token):
    headers = [(b"host", b"localhost"), *headers]
    scope = {"headers": headers, "query_string": query, "path": path, "raw_path": None, "server": None, "client": None}
    assert ask(echoing(Access(token=token)).app, **scope)[0] < 500


# ---------------------------------------------------------------------------------------------------------------------
# Rates


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_gives_its_burst_and_then_its_rate():
    clock = Clock()
    buckets = Buckets(rate=2, burst=3, clock=clock)
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    clock.now += 0.5
    assert [buckets.take("a"), buckets.take("a")] == [0, 0.5] and buckets.take("b") == 0
    clock.now += 1e6
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]


@given(st.lists(st.tuples(st.floats(0, 2), st.booleans()), max_size=40))
def test_no_order_of_requests_gets_more_than_burst_and_rate(events):
    clock = Clock()
    buckets, served, start = Buckets(rate=3, burst=4, clock=clock), 0, clock.now
    for pause, asks in events:
        clock.now += pause
        served += asks and not buckets.take("a")
        assert served <= 4 + 3 * (clock.now - start) + 1e-6


def test_a_crowd_of_addresses_costs_no_memory_and_forgets_the_oldest():
    buckets = Buckets(rate=1, burst=1, most=10, clock=Clock())
    for i in range(1_000):
        buckets.take(f"10.0.{i // 250}.{i % 250}")
    assert len(buckets.levels) == 10 and buckets.take("10.0.3.249") > 0 and buckets.take("10.0.0.0") == 0


def test_a_machine_with_many_addresses_of_ipv6_has_one_bucket():
    assert network("2001:db8::1") == network("2001:db8::ffff:2") != network("2001:db8:0:1::1")
    assert network("::ffff:10.0.0.1") == network("10.0.0.1") == "10.0.0.1" and network("fe80::1%eth0") == network(
        "fe80::2"
    )
    assert network("") == "" and network("testclient") == "testclient"


def test_an_address_that_asks_too_often_is_sent_away_and_others_are_served(monkeypatch):
    monkeypatch.setattr(limits, "BURST", 3)
    monkeypatch.setattr(limits, "RATE", 0.01)
    client = echoing()
    answers = [client.get("/", headers={"x-forwarded-for": f"10.1.1.{i}"}) for i in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert (
        1 <= int(answers[-1].headers["retry-after"]) <= 100
        and answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    )
    assert TestClient(client.app, base_url=BASE, client=("10.0.0.9", 1)).get("/").status_code == 200


# ---------------------------------------------------------------------------------------------------------------------
# Every answer


def crash(request: Request) -> None:
    raise ZeroDivisionError("/home/secret/model.safetensors")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200), ("/nothing", 404), ("/static/../x", 404), ("/healthz", 200), ("/metrics", 200),
        ("/static/page.js", 200), ("/api/generate", 405), ("/crash", 500),
    ],
)  # fmt: skip
def test_every_answer_has_the_headers(path, status):
    app = application(tiny_site())
    app.router.routes.append(Route("/crash", crash))
    with TestClient(app, base_url=BASE, raise_server_exceptions=False) as client:
        for headers in ({}, {"host": "evil.example"}):
            answer = client.get(path, headers=headers)
            assert answer.status_code == (403 if headers else status)
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
            assert answer.headers["cache-control"] == ("no-cache" if answer.headers.get("etag") else "no-store")


def test_the_policy_allows_nothing_inline_and_nothing_from_elsewhere():
    policy = dict(part.strip().partition(" ")[::2] for part in HEADERS["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'" and policy["img-src"] == "'self' data: blob:"


def test_a_crash_is_500_in_our_form_and_says_no_detail_and_the_server_answers_again():
    app = application(tiny_site())
    app.router.routes.append(Route("/crash", crash))
    with TestClient(app, base_url=BASE, raise_server_exceptions=False) as client:
        answer = client.get("/crash")
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text and "ZeroDivision" not in answer.text
        assert client.get("/healthz").status_code == 200


def test_the_health_is_that_of_the_model():
    site = tiny_site()
    with TestClient(application(site), base_url=BASE) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        site.worker.stop()
        answer = client.get("/healthz")
    assert answer.status_code == 503 and sentence(answer) == site.worker.closed


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "POST"])
def test_a_method_that_an_address_does_not_take_is_405_in_our_form(method):
    answer = TestClient(application(tiny_site()), base_url=BASE).request(method, "/healthz", headers=JSON)
    assert answer.status_code == 405 and "method" in sentence(answer)
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_head_is_answered_as_get_is():
    client = TestClient(application(tiny_site()), base_url=BASE)
    get, head = client.get("/"), client.head("/")
    assert head.status_code == 200 and dict(head.headers) == dict(get.headers)


@pytest.mark.parametrize("path", ["/healthz/", "/api/generate/", "/..//etc/passwd", "/static/"])
def test_no_address_leads_elsewhere(path):
    answer = TestClient(application(tiny_site()), base_url=BASE, follow_redirects=False).get(path)
    assert answer.status_code == 404 and "location" not in answer.headers
