"""The folders that three official scorers of text to image read. None of the scorers is part of this.

    prompts that the user brings -> read_prompts -> image_files: which image belongs where, under OUT

    geneval    evaluation_metadata.jsonl, a line {"tag", "include", "prompt", ...} for each prompt
               -> 00000/metadata.jsonl (that line), 00000/samples/0000.png, 0001.png ...
    dpg        a folder of NAME.txt -> NAME.png, four samples in one grid of 2 x 2
    compbench  PREFIX_val.txt, a prompt per line -> samples/PROMPT_000000.png, PROMPT_000001.png ...

GenEval: github.com/djghosh13/geneval. DPG-Bench: github.com/TencentQQGYLab/ELLA. T2I-CompBench:
github.com/Karine-Huang/T2I-CompBench. T2I-CompBench has the prompt as a file name, so names are checked: no prompt
leaves the folder.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.records import check_unicode, get, read_json_lines, read_text

Layout = Literal["geneval", "dpg", "compbench"]
MAX_NAME = 255  # bytes of a file name, on all common file systems


@dataclass(frozen=True)
class Prompt:
    place: str  # "file:3"
    text: str
    name: str  # of its folder (geneval), its image (dpg), or before the sample's number (compbench)
    line: str = ""  # the metadata of geneval


@dataclass(frozen=True)
class ImageFile:
    path: PurePosixPath  # under OUT
    prompt: Prompt
    samples: tuple[int, ...]  # what it shows: one sample, or a square of several


def read_prompts(layout: Layout, path: Path) -> list[Prompt]:
    """Read the prompts of a file (dpg: of a folder). Raises UserError with the place of what is wrong."""
    prompts = {"geneval": read_geneval, "dpg": read_dpg, "compbench": read_compbench}[layout](path)
    for prompt in prompts:
        check_text(prompt)
        check_name(f"{prompt.name}_000000.png" if layout == "compbench" else prompt.name, prompt)
    return prompts


def read_geneval(path: Path) -> list[Prompt]:
    prompts = []
    for number, (place, row) in enumerate(read_json_lines(path)):
        get(row, "tag", str, place)
        get(row, "include", list, place)
        line = json.dumps(row) + "\n"  # ASCII, as the official file has it
        prompts.append(Prompt(place, get(row, "prompt", str, place), f"{number:05}", line))
    return prompts


def read_dpg(folder: Path) -> list[Prompt]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder that holds NAME.txt for each prompt")
    paths = sorted(path for path in folder.glob("*.txt") if not path.name.startswith("."))
    if not paths:
        raise UserError(f"{folder} holds no .txt file: give the folder that holds NAME.txt for each prompt")
    return [Prompt(str(path), read_text(path).strip(), path.stem) for path in paths]


def read_compbench(path: Path) -> list[Prompt]:
    lines = read_text(path).split("\n")
    prompts: dict[str, Prompt] = {}
    for place, text in [(f"{path}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]:
        if "_" in text:
            raise UserError(f'{place} has "_" in its prompt: the scorer reads a prompt up to the first "_"; reword it')
        if text in prompts:
            raise UserError(f"{place} has the prompt of {prompts[text].place}, hence the same file names: remove one")
        prompts[text] = Prompt(place, text, text)
    return list(prompts.values())


def check_text(prompt: Prompt) -> None:
    if not prompt.text.strip():
        raise UserError(f"{prompt.place} has an empty prompt: write one, or remove it")
    check_unicode(prompt.text, prompt.place)


def check_name(name: str, prompt: Prompt) -> None:
    """Raise UserError for a file name that could leave the folder, or that cannot be written."""
    why = None
    if "/" in name or "\\" in name or name in (".", ".."):
        why = "holds a path separator"
    elif any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in name):
        why = "holds a control character"
    elif len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        why = f"has more than {MAX_NAME} bytes"
    if why:
        raise UserError(f"{prompt.place}: the file name {shown(name)!r} {why}: change the prompt, or remove it")


def image_files(layout: Layout, prompts: Sequence[Prompt], samples: int) -> list[ImageFile]:
    """Return all images of these prompts. Raises UserError for a number of samples that makes no grid of dpg."""
    if layout == "dpg":
        if math.isqrt(samples) ** 2 != samples:
            raise UserError(f"--samples must be 1, 4, 9 ... for the square grids of dpg, not {samples}")
        return [ImageFile(PurePosixPath(f"{p.name}.png"), p, tuple(range(samples))) for p in prompts]
    form = "{}/samples/{:04}.png" if layout == "geneval" else "samples/{}_{:06}.png"
    return [ImageFile(PurePosixPath(form.format(p.name, i)), p, (i,)) for p in prompts for i in range(samples)]
