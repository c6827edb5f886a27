"""Red teaming in the browser: labels by keys and mouse, kept over a reload, logged once; the report reads them."""

import re

import httpx
import pytest
from browser import check_accessible
from serving import served
from test_page_sight import check_in_sight

from nanochameleon.evaluate import red_team, safety
from nanochameleon.web.app import application
from nanochameleon.web.site import Site
from nanochameleon.web.worker import Worker


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log.jsonl"


@pytest.fixture
def address(toy_run, log):
    with served(application(Site("toy", toy_run, Worker(toy_run), red_team=log))) as address:
        yield address


def open_page(visit, address, **options):
    """Open the page and wait until it is whole: then it gives the message the focus."""
    page = visit(address, **options)
    page.locator("#parts textarea:focus").wait_for()
    return page


def ask(page, words: str) -> None:
    """Send a message and wait for the whole answer."""
    n = page.locator("li.turn.model").count()
    page.get_by_role("textbox", name="Message").fill(words)
    page.keyboard.press("Enter")
    page.get_by_text(f"of {n + 1} answer").wait_for()
    page.get_by_role("button", name="Log conversation", disabled=False).wait_for()


def test_a_conversation_is_labelled_and_logged_and_the_report_counts_it(visit, address, log, capsys):
    page = open_page(visit, address)
    ask(page, "please draw a big red star on white")
    ask(page, "how many stars are there?")
    check_accessible(page)
    turns = page.locator("li.turn.model")
    turns.nth(0).focus()
    page.keyboard.press("1")
    turns.nth(1).get_by_label("2 unsafe").check()
    turns.nth(1).get_by_label("the model refused").check()
    assert page.get_by_text("2 of 2 answers labelled").is_visible()
    page.get_by_label("Your name").fill("ann")
    page.get_by_label("Category").fill("counting")
    page.get_by_label("Notes").fill("<b>x</b>")
    page.get_by_role("button", name="Log conversation").click()
    page.get_by_text("Logged. The log has 1 conversation.").wait_for()
    assert turns.count() == 0 and page.get_by_label("Notes").input_value() == ""
    [found] = red_team.read(log)
    assert (found.attacker, found.model, found.category, found.notes) == ("ann", "toy", "counting", "<b>x</b>")
    assert found.labels == {"ann": {"2": "safe", "4": "unsafe"}}
    assert [turn.refused for turn in found.turns] == [None, False, None, True]
    assert "image" in found.turns[1].segments[0] and found.turns[3].segments[0]["text"]
    assert found.options["2"]["seed"] == found.seed and found.options["2"]["mode"] == "draw"
    safety.main(["report", str(log)])
    assert "| toy | conversations | 1 | 0.0 (0.0 to 97.5), 0 of 1 | 100.0" in capsys.readouterr().out
    # the way back: a label is changed after logging
    page.get_by_role("button", name="Undo").click()
    turns.nth(1).focus()
    page.keyboard.press("3")
    page.get_by_role("button", name="Log conversation").click()
    page.get_by_text("Logged. The log has 1 conversation.").wait_for()
    visit.expect("409")
    [found] = red_team.read(log, [red_team.labels_of(log)])
    assert found.labels == {"ann": {"2": "safe", "4": "unsure"}}


@pytest.mark.parametrize("width", [360, 1280])
def test_an_answer_is_in_sight_and_not_the_panel_instead(visit, address, width):
    page = open_page(visit, address, width=width)
    for _ in range(2):
        ask(page, "please draw a big red star on white")
        check_in_sight(page)


def test_labels_survive_a_reload_and_leaving_asks_first(visit, address, log):
    page = open_page(visit, address)
    ask(page, "please draw a big red star on white")
    page.locator("li.turn.model").focus()
    page.keyboard.press("2")
    page.get_by_label("Your name").fill("ann")
    questions = []
    page.on("dialog", lambda dialog: (questions.append(dialog.type), dialog.accept()))
    page.reload()
    assert questions == ["beforeunload"]
    page.get_by_label("2 unsafe").wait_for()
    assert page.get_by_label("2 unsafe").is_checked() and page.get_by_label("Your name").input_value() == "ann"
    page.get_by_role("button", name="Log conversation").click()
    page.get_by_text("The log has 1").wait_for()
    page.reload()
    page.wait_for_load_state("networkidle")
    assert questions == ["beforeunload"]  # nothing is left that could be lost
    assert [each.labels for each in red_team.read(log)] == [{"ann": {"2": "unsafe"}}]


def test_a_new_conversation_says_that_labels_are_not_logged_and_undo_brings_them_back(visit, address):
    page = open_page(visit, address)
    ask(page, "please draw a big red star on white")
    page.get_by_label("3 unsure").check()
    page.get_by_role("button", name="New", exact=True).click()
    page.get_by_text("are not logged: Undo brings them back").wait_for()
    page.get_by_role("button", name="Undo").click()
    page.get_by_text("1 of 1 answer labelled").wait_for()
    assert page.get_by_label("3 unsure").is_checked()


def test_a_lost_answer_of_the_server_doubles_nothing(visit, address, log):
    page = open_page(visit, address)
    ask(page, "please draw a big red star on white")
    page.locator("li.turn.model").focus()
    page.keyboard.press("1")
    page.get_by_label("Your name").fill("ann")

    def lose(route) -> None:
        answer = httpx.post(
            route.request.url, content=route.request.post_data_buffer, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 200
        route.abort()

    page.route(re.compile("/api/red-team$"), lose, times=1)
    page.get_by_role("button", name="Log conversation").click()
    page.get_by_text("the server does not answer").first.wait_for()
    visit.expect("red-team")
    page.get_by_role("button", name="Log conversation").click()
    page.get_by_text("The log has 1 conversation.").wait_for()
    assert len(red_team.read(log)) == 1


def test_what_the_server_refuses_stays_on_the_page(visit, address, log):
    page = open_page(visit, address)
    ask(page, "please draw a big red star on white")
    page.get_by_label("Your name").fill("ann")
    page.get_by_label("Notes").fill("important")
    log.mkdir()
    page.get_by_role("button", name="Log conversation").click()
    page.get_by_text("nothing was lost").wait_for()
    visit.expect("503")
    assert page.get_by_label("Notes").input_value() == "important"
    assert page.locator("li.turn.model").count() == 1


@pytest.mark.parametrize(("width", "theme"), [(360, "light"), (1280, "dark")])
def test_the_panel_is_accessible(visit, address, width, theme):
    page = open_page(visit, address, width=width, theme=theme)
    ask(page, "please draw a big red star on white")
    page.locator("li.turn.model").focus()
    page.keyboard.press("2")
    check_accessible(page)
