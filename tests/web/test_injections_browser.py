"""Nothing that somebody writes, names, sends or saves becomes a part of the page: nothing runs, nothing is fetched."""

import json

import pytest
from playwright.sync_api import expect
from talk_page import images, message, say, wait_for_answer, words_of
from test_page_browser import DRAW, drop_files, open_saved, save, square

HOSTILE = [
    "<img src=x onerror=window.hacked=1>",
    "<script>window.hacked=1</script>",
    "<svg onload=window.hacked=1></svg><style>*{display:none}</style>",
    "[click](javascript:window.hacked=1) ![](http://evil.test/x.png)",
    "javascript:window.hacked=1",
    "<a href='javascript:window.hacked=1'>x</a><iframe srcdoc='<script>parent.hacked=1</script>'>",
    "{{constructor.constructor('window.hacked=1')()}} ${window.hacked=1}",
    "</textarea></template></title><base href=http://evil.test/><form action=http://evil.test>",
    "<s></s><eot><boi><eoi><pad> <reserved00001>",
]
TAGS = "img, script, svg, style, iframe, a, form, base, object, embed, meta, link:not([href^='/static/'])"
COUNT = """tags => Object.fromEntries(tags.split(", ").map((tag) => [tag, [...document.querySelectorAll(tag)]
  .filter((one) => tag !== "img" || !(one.hidden || one.src.startsWith("data:image/png"))).length]))"""


def check_unharmed(page, before: dict) -> None:
    """The page has no element more than those of its own, no script ran, and it still has its look."""
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("Object.getOwnPropertyNames(Object.prototype).length") == before["prototype"]
    assert page.evaluate(COUNT, TAGS) == before["tags"]


@pytest.fixture
def unharmed(visit):
    """Opens the page, and checks it at the end."""
    pages = []

    def open_page(address: str, **more):
        page = visit(address, **more)
        expect(message(page)).to_be_focused()
        before = {"prototype": page.evaluate("Object.getOwnPropertyNames(Object.prototype).length")}
        pages.append((page, before | {"tags": page.evaluate(COUNT, TAGS)}))
        return page

    yield open_page
    for page, before in pages:
        check_unharmed(page, before)


@pytest.mark.parametrize("words", HOSTILE, ids=range(len(HOSTILE)))
def test_in_prompts_and_answers(scripted_toy, unharmed, words):
    """They are shown as they are, in the conversation and in the token view."""
    page = unharmed(scripted_toy(words))
    page.get_by_role("button", name="Tokens").click()
    message(page).fill(words)
    page.keyboard.press("Enter")
    assert words_of(wait_for_answer(page)) == words
    assert page.locator(".turn.user .segment").inner_text() == words
    expect(page.locator("#tokens .text-token").first).to_be_visible()
    assert page.locator("#token-view .special-token").count() < 12  # no spelling of a special token is one


def test_in_names_of_files(toy_address, unharmed, visit):
    page = unharmed(toy_address)
    for words in HOSTILE:
        drop_files(page, page.locator("body"), [(words.replace("/", "\u2215") + ".png", "image/png", b"no image")])
        alert = page.locator("#composer-error")
        expect(alert).to_contain_text(words.replace("/", "\u2215")[:10])
    visit.expect("status of 400")
    open_saved(page, b"no JSON", name="<img src=x onerror=window.hacked=1>.json")
    expect(page.locator("#notice")).to_contain_text("not JSON")


def test_svg_is_no_image(toy_address, unharmed, visit):
    """SVG is a document, which can hold scripts."""
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" onload="window.hacked=1"><script>window.hacked=1</script></svg>'
    page = unharmed(toy_address)
    for name, kind in (("vector.svg", "image/svg+xml"), ("pixels.png", "image/png")):
        drop_files(page, page.locator("body"), [(name, kind, svg)])
        expect(page.locator("#composer-error")).to_contain_text(name)
        visit.expect("status of 400")


@pytest.fixture
def saved(toy_address, visit):
    """A conversation of two turns, as the page saves it."""
    page = visit(f"{toy_address}/#seed=3")
    expect(message(page)).to_be_focused()
    drop_files(page, page.locator("body"), [("square.png", "image/png", square())])
    expect(page.get_by_role("img", name="image in your message")).to_be_visible()
    say(page, DRAW)
    wait_for_answer(page)
    return json.loads(save(page))


URL = "http://evil.test/x.png"
DAMAGE = {  # what becomes of the saved conversation
    "a URL in place of codes": lambda c: c["turns"][0]["segments"].__setitem__(0, {"codes": URL}),
    "a URL next to the codes": lambda c: c["turns"][0]["segments"][0].__setitem__("url", URL),
    "a javascript URL": lambda c: c["turns"][0]["segments"][0].__setitem__("url", "javascript:window.hacked=1"),
    "codes out of range": lambda c: c["turns"][0]["segments"][0].__setitem__("codes", [10**9] * 64),
    "codes that are no numbers": lambda c: c["turns"][0]["segments"][0].__setitem__("codes", [URL] * 64),
    "more codes": lambda c: c["turns"][0]["segments"][0]["codes"].extend([1] * 10_000),
    "numbers without end": lambda c: c["turns"][1]["answers"][0].__setitem__("seed", 10**400),
    "an answer that is no object": lambda c: c["turns"][1]["answers"].__setitem__(0, 7),
    "no answers": lambda c: c["turns"][1].__setitem__("answers", None),
    "another choice": lambda c: c["turns"][1].__setitem__("chosen", 99),
    "roles": lambda c: c["turns"][0].__setitem__("role", "__proto__"),
    "turns that are words": lambda c: c.__setitem__("turns", HOSTILE[0]),
    "400 turns": lambda c: c.__setitem__("turns", c["turns"] * 200),
    "settings": lambda c: c.__setitem__("settings", {"temperature": HOSTILE[0], "samples": 1e9, "mode": "rm"}),
    "a hostile mode": lambda c: c["turns"][1]["answers"][0].__setitem__("mode", HOSTILE[0]),
    "a hostile error": lambda c: c["turns"][1]["answers"][0].update(state="failed", error=HOSTILE[0]),
    "hostile options": lambda c: c["turns"][1]["answers"][0]["asked"].__setitem__("options", {HOSTILE[0]: 1}),
    "a hostile model": lambda c: c.__setitem__("model", {"name": HOSTILE[0]}),
    "hostile words": lambda c: c["turns"][0]["segments"].extend({"text": words} for words in HOSTILE),
}


def test_in_saved_conversations(toy_address, unharmed, visit, saved):
    """Damaged in any way, a file is refused with a sentence or opened harmlessly, and the page still works."""
    page = unharmed(f"{toy_address}/#seed=3")
    for what, damage in DAMAGE.items():
        content = json.loads(json.dumps(saved))
        damage(content)
        open_saved(page, json.dumps(content).encode())
        expect(page.locator("#notice")).to_be_visible()
        notice = page.locator("#notice .sentence").inner_text()
        assert len(notice) < 400, what
        opened = notice.startswith("Opened")
        assert opened == (page.locator(".turn").count() > 0), (what, notice)
        if opened:
            page.get_by_role("button", name="New").click()
        page.get_by_role("button", name="Close").last.click()
    say(page, DRAW)
    assert len(images(wait_for_answer(page))) == 1


def test_prototypes_in_saved_conversations(toy_address, unharmed, saved):
    evil = '{"__proto__": {"hacked": 1, "url": "http://evil.test/"}, "constructor": {"prototype": {"hacked": 1}}, '
    content = json.dumps(saved)
    page = unharmed(toy_address)
    open_saved(page, content.replace("{", evil, 1).encode())
    expect(page.locator(".turn")).to_have_count(2)
    open_saved(page, content.replace('"settings": {', '"settings": ' + evil.rstrip(", ") + ", ").encode())
    assert page.evaluate("({}).hacked") is None


@pytest.mark.parametrize(
    "settings",
    [
        "temperature=<img src=x onerror=window.hacked=1>&seed=javascript:window.hacked=1",
        "__proto__=1&constructor=2&hasOwnProperty=3&toString=4",
        "seed=1e400&samples=99999999&max_new_tokens=-1&top_p=NaN&temperature=Infinity&mode=__proto__",
        "seed=%00%ff%u2028&=&&&=x&seed",
        "mode=" + "a" * 20_000,
    ],
)
def test_in_the_address(toy_address, unharmed, settings):
    """What is no setting is left out, and the model's own values stay."""
    page = unharmed(f"{toy_address}/#{settings}")
    say(page, DRAW)
    assert len(images(wait_for_answer(page))) == 1
    assert "hacked" not in page.url and "__proto__" not in page.url and len(page.url) < 200


def test_policy_lets_no_script_of_others_run(toy_address, visit):
    """Had a text become markup after all, the browser would refuse what it asks for."""
    visit.forgive()
    page = visit(toy_address)
    assert page.evaluate(TRIES) == [
        "outside",
        "image",
        "frame",
        "base",
        "inline",
        "attribute",
        "markup",
        "link",
        "style",
    ]
    assert page.evaluate("[window.hacked ?? null, document.baseURI.startsWith(location.origin)]") == [None, True]
    assert page.locator("body").is_visible()


# Everything that the policy should refuse: returns the names of what it did refuse.
TRIES = """async () => {
  const add = (tag, properties = {}, attributes = {}) => {
    const element = Object.assign(document.createElement(tag), properties);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    document.body.append(element);
    return element;
  };
  const evil = "http://evil.test/";
  const tries = {
    outside: () => fetch(evil),
    image: () => add("img", { src: evil }),
    frame: () => add("iframe", { src: evil }),
    base: () => add("base", { href: evil }),
    inline: () => add("script", {}, {}).append("window.hacked = 1"),
    attribute: () => add("button", {}, { onclick: "window.hacked = 1" }).click(),
    markup: () => document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hacked = 1'>"),
    link: () => add("a", {}, { href: "javascript:window.hacked = 1" }).click(),
    style: () => document.body.setAttribute("style", "display: none"),
  };
  const refused = [];
  for (const [name, attempt] of Object.entries(tries)) {
    const breach = new Promise((resolve) =>
      document.addEventListener("securitypolicyviolation", resolve, { once: true }));
    try {
      await attempt();
    } catch {} // some throw, too
    await breach;
    refused.push(name);
  }
  return refused;
}"""
