"""Fixtures: a browser for the whole session, pages for a test; a server of models/toy, or of a study."""

from contextlib import ExitStack, contextmanager
from pathlib import Path

import browser
import pytest
from paced import Pace, paced_engine
from scripted import scripted_engine
from server_process import free_port
from serving import served
from studies import make_study, opened

TOY = Path(__file__).parents[2] / "models" / "toy"


@pytest.fixture(scope="session")
def chromium():
    with browser.launched() as started:
        yield started


@pytest.fixture
def visit(chromium):
    """Opens addresses in new pages; their problems fail the test."""
    started, loop = chromium
    with browser.running(loop):
        visits = browser.Visits(started)
        yield visits
        visits.close()


@pytest.fixture(scope="session")
def toy_run():
    from nanochameleon.weights.model_folder import open_model

    return open_model(TOY, "cpu", "auto", None)


def site_of(run, **more):
    """models/toy as a site. more: fields of Site."""
    from nanochameleon.web.site import Site
    from nanochameleon.web.worker import Worker

    return Site("toy", run, Worker(run), **more)


@contextmanager
def served_toy(run, port=0, **more):
    """Serve models/toy from this process."""
    from nanochameleon.web.app import application

    with served(application(site_of(run, **more)), port) as address:
        yield address


@pytest.fixture(scope="module")
def toy_site(toy_run):
    return site_of(toy_run)


@pytest.fixture(scope="module")
def toy_address(toy_site):
    """The address of a server of models/toy."""
    from nanochameleon.web.app import application

    with served(application(toy_site)) as address:
        yield address


@pytest.fixture(scope="module")
def api(toy_address):
    """OpenAI's own client of models/toy."""
    import openai

    with openai.OpenAI(base_url=f"{toy_address}/v1", api_key="none is needed", max_retries=0) as client:
        yield client


@pytest.fixture
def ask(api):
    """ask("words", n=2, ...) or ask([messages], ...): a completion."""

    def ask(messages, **more):
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return api.chat.completions.create(model="toy", messages=messages, **more)

    return ask


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("shared"), 3, duplicates=0.5, attention=1)


@pytest.fixture
def opened_study(study_folder):
    """A client and a site without votes."""
    with opened(study_folder) as (client, site):
        site.votes.db.execute("DELETE FROM votes")
        yield client, site


@pytest.fixture
def restarting_toy(toy_run):
    """Serves models/toy, once or again at the same port: with restarting_toy() as address."""
    port = free_port()
    return lambda: served_toy(toy_run, port)


@pytest.fixture
def paced_toy(toy_run, monkeypatch):
    """(address, pace) of a server of models/toy that the test slows down."""
    pace = Pace()
    monkeypatch.setattr("nanochameleon.web.batch.Engine", paced_engine(pace))
    with served_toy(toy_run) as address:
        yield address, pace
        pace.allow()


@pytest.fixture
def scripted_toy(toy_run, monkeypatch):
    """Serves models/toy that answers with given words: scripted_toy("hello") -> address."""
    with ExitStack() as stack:

        def serve(words: str) -> str:
            monkeypatch.setattr("nanochameleon.web.batch.Engine", scripted_engine(toy_run, words))
            return stack.enter_context(served_toy(toy_run))

        yield serve
