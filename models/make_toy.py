"""Make models/toy again: train, align, store in our own layout with int8 weights, measure, write the model card.

    python models/make_toy.py                                    trains first, about an hour on two CPU cores
    python models/make_toy.py --toy runs/toy --align runs/align  takes runs that exist

The folder that is there is replaced when the new one is whole.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanochameleon.bench.rows import device_name
from nanochameleon.cli import parse
from nanochameleon.convert import Args as ConvertArgs
from nanochameleon.convert import convert, write_json
from nanochameleon.data.build import world
from nanochameleon.errors import exit_on_user_error, say
from nanochameleon.evaluate.held_out import unseen
from nanochameleon.evaluate.likelihood import bits
from nanochameleon.evaluate.report import shapes_report
from nanochameleon.files import commit, read_json
from nanochameleon.training.run import CONFIG, read_config
from nanochameleon.weights.model_folder import open_model

HERE = Path(__file__).parent
TRAIN = "python train.py toy --model.n-layers=6 --train.steps=6000"
ALIGN = "python train.py align --train.steps=3000 --train.image-token-noise=0.75 --train.sample-every=1000"
FIGURES = (  # row of the card, place in report.json
    ("images of the tokenizer, read by the oracle", "tokenizer.oracle_on_reconstructions"),
    ("images from words, every fact right: compositions seen in training", "text_to_image.seen.all_facts"),
    ("the same, compositions never seen together", "text_to_image.held_out.all_facts"),
    ("the second image of a document", "interleaved.all_facts"),
    ("caption facts right on unseen scenes", "captions.facts"),
    ("questions about unseen scenes", "questions.accuracy"),
    ("the same, from the question's words alone", "questions.question_only"),
    ("bits per image code", "bits_per_code"),
    ("bits per byte of text", "bits_per_byte"),
    ("alignment: questions about words", "alignment.align_text"),
    ("alignment: the drawing language", "alignment.align_code"),
    ("alignment: two questions about an image", "alignment.align_visual_chat"),
    ("alignment: an image on request", "alignment.align_image_generation"),
    ("alignment: two captions copied and both drawn", "alignment.align_interleaved"),
    ("alignment: harm refused", "alignment.align_safety"),
)


@dataclass(frozen=True)
class Args:
    """Make models/toy again."""

    toy: Path = Path("runs/toy")
    """The run that is aligned; it is trained where it has no report."""
    align: Path = Path("runs/align")
    """The aligned run; it is trained where it has no report."""
    dst: Path = HERE / "toy"
    """The folder to make."""
    trained_at: str = field(default_factory=commit)
    """The commit at which the runs were trained."""


def make(args: Args) -> Path:
    for folder, command, start in ((args.toy, TRAIN, []), (args.align, ALIGN, [f"--init-from={args.toy}"])):
        if not (folder / "report.json").is_file():
            subprocess.run([sys.executable, *command.split()[1:], *start, f"--out={folder}"], check=True)
    new = args.dst.with_name(f"{args.dst.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    convert(ConvertArgs(args.align, new, "nano", dtype="int8"))
    # Words alone are drawn: in a chat this model draws captions that name size and background, and is unsure of others.
    content = read_json(new / CONFIG)
    content["usage"]["chats"] = False
    write_json(new / CONFIG, content)
    reports = [read_json(args.toy / "report.json"), read_json(args.align / "report.json"), measured(new, args.align)]
    (new / "MODEL_CARD.md").write_text(card(new, reports, args), encoding="utf-8")
    shutil.rmtree(args.dst, ignore_errors=True)
    os.rename(new, args.dst)
    return args.dst


def measured(folder: Path, run: Path) -> dict:
    """Measure the int8 model by the functions of the report."""
    # the run's configuration, which says what it was trained on
    model = dataclasses.replace(open_model(folder, "cpu"), cfg=read_config(run))
    figures, _, _ = shapes_report(model, world(model.cfg.data))
    return json.loads(json.dumps(figures | bits(model, unseen(model, run, 200))))


def look_up(report: dict, place: str) -> str:
    for name in place.split("."):
        report = (report or {}).get(name)
    return "-" if report is None else f"{report:.3f}"


def card(folder: Path, reports: list[dict], args: Args) -> str:
    rows = [f"| {what} | {' | '.join(look_up(report, place) for report in reports)} |" for what, place in FIGURES]
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    sums = [f"| {f.name} | {f.stat().st_size:,} | {hashlib.sha256(f.read_bytes()).hexdigest()} |" for f in files]
    where = f"{device_name(torch.device('cpu'))}, Python {platform.python_version()}, torch {torch.__version__}"
    text = (HERE / "card.md").read_text(encoding="utf-8")
    fills = dict(figures="\n".join(rows), files="\n".join(sums), machine=where, train=TRAIN, align=ALIGN)
    for name, value in (fills | {"trained_at": args.trained_at, "commit": commit()}).items():
        text = text.replace(f"{{{name}}}", value)
    return text


if __name__ == "__main__":
    exit_on_user_error(lambda: say(make(parse(Args, description=__doc__))))
