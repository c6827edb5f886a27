"""python -m nanochameleon.evaluate draw MODEL --layout geneval --prompts evaluation_metadata.jsonl --out images

Draws images for the official scorers of text to image, in the folders that they read (layouts.py):

    draw MODEL --layout geneval --prompts evaluation_metadata.jsonl --out images
    draw MODEL --layout dpg --prompts dpg_bench/prompts --out images --guidance-scale 3
    draw MODEL --layout compbench --prompts color_val.txt --out images --samples 10
    draw summary results.jsonl                     the figures of a GenEval scorer's results, official or ours

If it is stopped or killed, run the same command again: it keeps the images that are there. An image depends on the
model, the seed, its prompt and the number of its sample, not on what else is drawn.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nanochameleon.cli import MAX_SEED, check_kernels, parse
from nanochameleon.config import SamplingParams
from nanochameleon.errors import UserError, exit_on_user_error, say, shown
from nanochameleon.evaluate.drawing.folder import open_folder
from nanochameleon.evaluate.drawing.layouts import Layout, Prompt, image_files, read_prompts
from nanochameleon.weights.ranges import out_of_range

if TYPE_CHECKING:  # torch is imported after the prompts are read, so that mistakes in them are found at once
    from nanochameleon.training.run import Run

PROGRAM = "python -m nanochameleon.evaluate draw"
MAX_SAMPLES = 10_000  # the four digits of geneval


@dataclass(frozen=True)
class Args:
    """Draw images in the folders that official scorers read."""

    model: tyro.conf.Positional[Path]
    """A run, or a model in our, Hugging Face's or Meta's layout."""
    layout: Layout
    """Whose folders: GenEval, DPG-Bench or T2I-CompBench."""
    prompts: Path
    """geneval: evaluation_metadata.jsonl. dpg: the folder of NAME.txt. compbench: a file with one prompt per line."""
    out: Path
    """Folder for the images. Next to it comes OUT.draw.json, which says how they were made."""
    samples: int = 4
    """Images of each prompt; with dpg they are one grid."""
    seed: int = 0
    """The same seed gives the same images."""
    limit: int | None = None
    """Only the first so many prompts. A later call may raise it."""
    guidance_scale: float | None = None
    """Guidance by the prompt: 1 is off, more keeps closer to the prompt; None is the model's own value."""
    temperature: float | None = None
    """Temperature of image tokens; None is the model's own value."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Type of the transformer's weights; auto keeps that of its files."""
    vqgan: Path | None = None
    """A file with the image decoder, for a model from transformers, which drops it: Meta's vqgan.ckpt or a
    vqgan_decoder.safetensors."""

    def check(self) -> None:
        """Raise UserError for a value out of range, naming the option."""
        for name, good, requested in (
            ("samples", 1 <= self.samples <= MAX_SAMPLES, f"from 1 to {MAX_SAMPLES:,}"),
            ("seed", 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
            ("limit", self.limit is None or self.limit >= 1, "at least 1"),
        ):
            if not good:
                raise UserError(f"--{name} must be {requested}, not {shown(getattr(self, name))}")
        if wrong := out_of_range(sample=self.params(SamplingParams(), 1)):
            name, rest = wrong.removeprefix("sample.").split(" ", 1)
            raise UserError(f"--{name.removeprefix('image_').replace('_', '-')} {rest}")

    def params(self, of_run: SamplingParams, image_len: int) -> SamplingParams:
        """The model's own parameters, replaced by those given here."""
        by_prompt, temperature = self.guidance_scale, self.temperature
        given = {"guidance_scale": by_prompt, "image_guidance_scale": by_prompt, "image_temperature": temperature}
        given = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(of_run, **given, max_new_tokens=image_len + 1)  # with <eoi>


def main(args: Args) -> None:
    args.check()
    prompts = read_prompts(args.layout, args.prompts)
    chosen = prompts[: args.limit]
    files = image_files(args.layout, chosen, args.samples)
    run = open_to_draw(args)
    from nanochameleon.evaluate.drawing.images import draw_missing, fits

    params = args.params(run.cfg.sample, run.image_tokenizer.n_codes_per_image)
    with open_folder(args.out, header(args, run, params, prompts)):
        left_out = [prompt for prompt in chosen if not fits(run, prompt.text)]
        wanted = [file for file in files if file.prompt not in left_out]
        draw_missing(run, wanted, args.out, args.seed, params)
    say(f"{args.out} holds {len(wanted):,} images; a drawn image has {run.cfg.vqgan.resolution} pixels a side")
    if left_out:
        context = f"the model's context of {run.model.cfg.max_seq_len} tokens"
        which = f"{len(left_out)} of {len(chosen)} prompts are too long for {context}, first {left_out[0].place}"
        raise UserError(f"{which}: shorten them; all others are drawn")


def open_to_draw(args: Args) -> "Run":
    from nanochameleon.generation.quantize import quantize_
    from nanochameleon.images.tokenizer import NO_DECODER
    from nanochameleon.training.run import pick_device
    from nanochameleon.weights.model_folder import open_model

    check_kernels(pick_device(args.device))
    run = open_model(args.model, args.device, "auto" if args.dtype == "int8" else args.dtype, args.vqgan)
    if not run.image_tokenizer.can_draw:
        raise UserError(NO_DECODER)
    if args.dtype == "int8":
        quantize_(run.model)
    return run


def header(args: Args, run: "Run", params: SamplingParams, prompts: Sequence[Prompt]) -> dict:
    """Return everything that decides what is drawn. The limit is no part of it."""
    from nanochameleon.evaluate.header import describe_model
    from nanochameleon.evaluate.task import digest

    names = [[prompt.name, prompt.text, prompt.line] for prompt in prompts]
    described = describe_model(run, args.model.resolve())
    del described["path"]  # the same model in another place draws the same images
    options = {"layout": args.layout, "prompts": digest(names), "samples": args.samples, "seed": args.seed}
    options |= {"dtype": described["dtype"], "device": described["device"], "params": dataclasses.asdict(params)}
    return {"model": args.model.resolve().name} | options | described


@dataclass(frozen=True)
class SummaryArgs:
    """Print the figures of a file of results, from GenEval's scorer or from the task shapes_geneval."""

    results: tyro.conf.Positional[Path]
    """results.jsonl, one judged image per line."""


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line, without the word draw."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["summary"]:
        exit_on_user_error(lambda: summary(parse(SummaryArgs, arguments[1:], prog=f"{PROGRAM} summary")))
    else:
        exit_on_user_error(lambda: main(parse(Args, arguments, description=__doc__, prog=PROGRAM)))


def summary(args: SummaryArgs) -> None:
    from nanochameleon.evaluate.drawing.summary import summarise, table

    say(table(summarise(args.results)))
