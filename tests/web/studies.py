"""Small studies with images, servers of them, and what a page sends."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
from serving import served
from starlette.testclient import TestClient

from nanochameleon.evaluate.people.make import build
from nanochameleon.evaluate.people.prompts import Prompt
from nanochameleon.images.terminal import png
from nanochameleon.web import judge
from nanochameleon.web.app import application

MODELS = ("secretive", "Hidden-7B")
WORDS = {"secretive": "a brief answer", "Hidden-7B": "a much longer answer"}  # by which these tests know the models


def make_study(folder: Path, n: int, **more) -> Path:
    """n prompts with an image each. Each answer is a text; that of the second model has an image, too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grey.png").write_bytes(png(np.full((8, 8, 3), 100, np.uint8)))
    image = {"image": str(folder / "grey.png")}
    prompts = [Prompt(f"prompt-{i}", f"Kind-{i % 2}", [{"text": f"prompt number {i}"}, image]) for i in range(n)]
    answers = {model: [[{"text": words}, *[image] * place] for _ in range(n)]
               for place, (model, words) in enumerate(WORDS.items())}  # fmt: skip
    build(folder / "study", prompts, answers, **more)
    return folder / "study"


@contextmanager
def opened(folder: Path, locked: float = 5.0):
    """Yield a client of a server of the study, and its site."""
    site = judge.open_site(folder, locked)
    with TestClient(application(site), base_url="http://127.0.0.1") as client:
        yield client, site


@contextmanager
def serving(folder: Path, locked: float = 5.0):
    """Yield the address and the site of a study."""
    site = judge.open_site(folder, locked)
    with served(application(site)) as address:
        yield address, site


def ask(client, annotator="ann"):
    answer = client.post("/api/study/next", json={"annotator": annotator})
    assert answer.status_code == 200, answer.text
    return answer.json()


def vote_of(screen, annotator="ann", place=0, seconds=1.0):
    """The body of a vote for the label at a place."""
    asked = screen["asked"]
    labels = asked["question"]["labels"]
    answer = labels[place % len(labels)]["name"]
    question = asked["question"]["name"]
    return {"annotator": annotator, "item": asked["item"], "question": question, "answer": answer, "seconds": seconds}


def cast(client, body):
    answer = client.post("/api/study/vote", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()
