"""Fixtures: a browser for the whole session, pages for a test; a server of models/toy, or of a study."""

from pathlib import Path

import browser
import pytest
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


@pytest.fixture(scope="module")
def toy_site(toy_run):
    from nanochameleon.web.site import Site
    from nanochameleon.web.worker import Worker

    return Site("toy", toy_run, Worker(toy_run))


@pytest.fixture(scope="module")
def toy_address(toy_site):
    """The address of a server of models/toy in this process."""
    from nanochameleon.web.app import application

    with served(application(toy_site)) as address:
        yield address


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("shared"), 3, duplicates=0.5, attention=1)


@pytest.fixture
def opened_study(study_folder):
    """A client and a site without votes."""
    with opened(study_folder) as (client, site):
        site.votes.db.execute("DELETE FROM votes")
        yield client, site
