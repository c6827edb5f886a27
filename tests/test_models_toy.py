"""The model in models/toy: small, whole, as its card says, and it draws what a reader asks for first."""

import hashlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanochameleon.data.sources.scenes import World
from nanochameleon.evaluate.oracle import read
from nanochameleon.training.run import Run
from nanochameleon.weights.model_folder import open_model

ROOT = Path(__file__).parents[1]
TOY = ROOT / "models" / "toy"
CARD = (TOY / "MODEL_CARD.md").read_text()
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402


@pytest.fixture(scope="module")
def toy() -> Run:
    return open_model(TOY, "cpu")


def test_it_is_small_and_holds_what_its_card_lists():
    files = {path.name: path for path in TOY.iterdir() if path.is_file()}
    listed = dict(re.findall(r"\| (\S+) \| [\d,]+ \| ([0-9a-f]{64}) \|", CARD))
    assert files.keys() == listed.keys() | {"MODEL_CARD.md"} and len(listed) == 4
    assert sum(path.stat().st_size for path in files.values()) <= 4_000_000
    assert all(hashlib.sha256(files[name].read_bytes()).hexdigest() == digest for name, digest in listed.items())


def test_it_is_sampled_as_it_was_trained(toy):
    assert (toy.cfg.sample.guidance_scale, toy.cfg.sample.image_temperature) == (1.0, 0.5)
    assert toy.cfg.data.source == "shapes" and not toy.cfg.train.assistant_only_loss


def lines(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    return [
        line for line in re.findall(r"^python (sample\.py models/toy .*)$", text, re.MULTILINE) if ".png" not in line
    ]


@pytest.mark.parametrize("page", ["models/toy/MODEL_CARD.md", "docs/weights.md"])
def test_the_lines_of_the_pages_work_and_the_first_draws_a_red_circle(page, tmp_path, capsys):
    for line in lines(page):
        sample.cli([*shlex.split(line)[1:], "--out", str(tmp_path), "--scale", "1", "--device", "cpu"])
    said = capsys.readouterr().out
    (drawn,) = tmp_path.glob("a-red-circle-1.png")
    (thing,) = read(np.asarray(Image.open(drawn).convert("RGB")), World()).things
    assert (thing.colour, thing.shape) == ("red", "circle")
    assert "star red" in said or "please-draw-three-small-green-squares-on-black-1.png" in said
