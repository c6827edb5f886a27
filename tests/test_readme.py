"""What README and the pages under docs promise is there: commands run, presets, targets and files exist."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochameleon.cli import parse, parse_run
from nanochameleon.evaluate import __main__ as evaluation
from nanochameleon.presets import PRESETS
from nanochameleon.web import __main__ as web

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "log.md")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line]
PYTHON = [line for line in LINES if re.match(r"(\.venv/bin/)?python \w+\.py ", line)]
TRAIN, SAMPLE = ([line for line in PYTHON if f"python {name}.py" in line] for name in ("train", "sample"))
EVALUATE = [line for line in LINES if re.match(r"(\.venv/bin/)?python -m nanochameleon\.evaluate ", line)]
WEB = [line for line in LINES if re.match(r"(\.venv/bin/)?python -m nanochameleon\.web ", line)]
CONVERT = [line for line in LINES if re.match(r"(\.venv/bin/)?python -m nanochameleon\.convert ", line)]
TINY = shlex.split("""
    --vqgan.ch 4 --vqgan.n-groups 4 --vqgan.z-channels 4 --vqgan.embed-dim 4 --vqgan.n-codes 16
    --model.dim 16 --model.n-layers 1 --model.n-heads 2 --model.multiple-of 8
    --tokenizers.n-merges 64 --tokenizers.n-texts 200 --tokenizers.steps 3 --tokenizers.warmup-steps 2
    --tokenizers.batch-size 2 --train.steps 2 --train.batch-size 2
    --evaluation.images 2 --evaluation.answers 2 --evaluation.reconstructions 2 --device cpu
""")
EVALUATION = {"results.json", "table.html", "header.json"}  # what an evaluation leaves, not a training
OVERRIDES = {"toy": TINY, "toy_long": TINY, "toy_rich": TINY}  # presets that need nothing from outside


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the README's training lines have been run, then those that convert."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "models", folder / "models")
    for line in TRAIN:
        run(line, folder, OVERRIDES[shlex.split(line)[2]])
    for line in CONVERT:
        run(line, folder, [])
    return folder


def run(line: str, folder: Path, more: list[str]) -> str:
    _, script, *words = shlex.split(line)
    command = [sys.executable, script if script == "-m" else str(ROOT / script), *words, *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f"{line}\n{done.stderr[-2_000:]}"
    return done.stdout


def test_there_are_commands_to_train_draw_and_answer():
    assert len(TRAIN) >= 1 and len(SAMPLE) >= 2 and any("image.png" in line for line in SAMPLE)
    assert CONVERT and any("--init-from" in line for line in TRAIN)


def test_training_ends_with_the_results_that_are_named(place):
    promised = set(re.findall(r"`(\w+\.(?:png|json|html))`", README)) - EVALUATION
    assert {"samples.png", "curves.png", "report.json", "report.html"} <= promised
    for line in TRAIN:
        words = shlex.split(line)
        folder = words[words.index("--out") + 1] if "--out" in words else f"runs/{words[2]}"
        assert promised <= {path.name for path in (place / folder).iterdir()}


@pytest.mark.parametrize("line", SAMPLE)
def test_the_sampling_lines_run_as_written(line, place):
    said = run(line, place, [])
    if "image.png" not in line and "--mode chat" not in line:
        assert (place / said.splitlines()[-1]).suffix == ".png" and (place / said.splitlines()[-1]).is_file()


def test_the_lines_that_evaluate_run_as_written(place):
    assert len(EVALUATE) >= 3
    for line in EVALUATE:
        assert run(line, place, [])
    (out,) = {words[words.index("--out") + 1] for words in map(shlex.split, EVALUATE) if "--out" in words}
    assert {path.name for path in (place / out).iterdir() if path.is_file()} > EVALUATION


def test_the_lines_that_open_a_page_name_their_model_or_study():
    said = [parse(web.Args, shlex.split(line)[3:]) for line in WEB]
    assert len(said) >= 3 and all((args.model is None) != (args.study is None) for args in said)


def test_the_lines_of_python_run_as_written(place):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in snippet.splitlines() if line]) == 5
    done = subprocess.run([sys.executable, "-c", snippet], cwd=place, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert (place / "circle.png").is_file()


def test_every_preset_is_in_the_table_and_takes_the_options_given_there():
    table = [
        line.split("|")[1].strip().strip("`") for line in README.splitlines() if line.startswith("| `python train.py")
    ]
    assert [shlex.split(line)[2] for line in table] == list(PRESETS)
    for line in table:
        assert parse_run(shlex.split(line)[2:]).name == shlex.split(line)[2]


def test_every_override_that_is_named_exists():
    """Of training such as `--train.steps 3000`, of sampling such as `--mode chat`, of evaluating: `--tasks list`."""
    options = [option.split() for option in re.findall(r"`(--[\w.-]+ \S+)`", README)]
    of_sampling = [option for option in options if option[0].removeprefix("--").replace("-", "_") in vars(sample.Args)]
    assert 0 < len(of_sampling) < len(options)
    for option in options:
        if option[0] in {"--study", "--red-team", "--allow-host"}:
            assert parse(web.Args, option) != parse(web.Args, [])
        elif option[0].removeprefix("--") in {"tasks"}:
            assert parse(evaluation.Args, ["models/toy", *option]) != parse(evaluation.Args, ["models/toy"])
        elif option in of_sampling:
            assert parse(sample.Args, ["runs/toy", *option]) != parse(sample.Args, ["runs/toy"])
        else:
            assert parse_run(["toy", *option]) != parse_run(["toy"])


def test_every_make_target_that_is_named_exists():
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_every_file_that_is_named_exists():
    named = re.findall(r"`((?:[\w.]+/)+\w+\.(?:py|txt|toml))`", README)
    named += [word for line in LINES for word in line.split() if word.endswith(".txt")]
    assert len(named) > 5
    assert [
        name for name in named if not any((ROOT / folder / name).exists() for folder in ("", "nanochameleon"))
    ] == []


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "docs" / "results").glob("*.md"))], ids=lambda page: page.name
)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
