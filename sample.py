"""A prompt of words and images in any order -> text and images, streamed.

    python sample.py runs/toy "a big red circle above a small blue star"          draws an image
    python sample.py runs/toy image.png "how many stars are there?"               answers a question
    python sample.py runs/toy image.png                                           says what is in the image
    python sample.py runs/toy "a red star" --mode free --n 3                      continues with text and images
    python sample.py runs/align "please draw a red star"                          chats, with an aligned model
    python sample.py runs/toy "a red star" --n 8 --guidance-scale 2 --seed 1      draws eight, closer to the prompt
    python sample.py chameleon-7b "a red star" --guidance-scale 3 --dtype bf16    a released model, in any layout

An argument that is a file, or ends as images do (.png, .jpg, ...), is an image; a folder or a pipe is refused.
Images are saved and, in terminals that can, shown. Existing files are never overwritten. If stdout is closed early,
images are still saved. Left out: chat over several turns.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __name__ == "__main__" and (missing := [name for name in ("tyro", "torch", "regex") if not find_spec(name)]):
    print(f"error: {missing[0]} is missing: run make demo, or pip install -c constraints.txt -e .", file=sys.stderr)
    raise SystemExit(2)

import tyro

from nanochameleon.cli import check_kernels, parse
from nanochameleon.config import SamplingParams
from nanochameleon.errors import UserError, exit_on_user_error, say, shown
from nanochameleon.weights.ranges import out_of_range

if TYPE_CHECKING:  # torch is imported after the arguments are parsed, so that mistakes in them are found at once
    from nanochameleon.generation.events import Event
    from nanochameleon.images.output import ImageOutput

PREVIEW = 32  # codes between two previews of an image that is being generated
BATCH = 256  # samples at once, at most
MAX_SAMPLES = 1_000_000


@dataclass(frozen=True)
class Args:
    """Generate text and images with a trained run. None means the run's own value, unless an option says otherwise."""

    run: tyro.conf.Positional[Path]
    """Folder that train.py wrote, such as runs/toy, or a model in our, Hugging Face's or Meta's layout."""
    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """Words and image files, in any order."""
    mode: Literal["auto", "draw", "answer", "chat", "text", "free"] = "auto"
    """draw: one image. answer: end the turn, then text. chat: end the turn, then text and images. text: continue with
    text only. free: continue with text and images. auto: chat with an aligned run; otherwise draw after words alone,
    answer where words follow an image, and say what is in an image that comes last."""
    n: int = 1
    """Number of samples."""
    temperature: float | None = None
    """Temperature of text and images; 0 takes the likeliest token at each step."""
    top_p: float | None = None
    """Sample from the smallest set of tokens that holds this probability."""
    top_k: int | None = None
    """Sample from at most this many tokens."""
    guidance_scale: float | None = None
    """Guidance of images by the prompt: 1 is off, more keeps closer to the prompt."""
    image_guidance_scale: float | None = None
    """Guidance of images by the prompt's images alone; None is the same as --guidance-scale where that is given."""
    repetition_penalty: float | None = None
    """For text: above 1, tokens that the context holds already become less likely."""
    max_new_tokens: int | None = None
    """The most tokens to generate."""
    fit: Literal["crop", "pad"] = "crop"
    """How an image becomes a square: crop keeps the middle, as for training images; pad keeps all of it and adds a
    white border, as the paper does for prompts."""
    seed: int = 0
    """The same seed gives the same samples."""
    out: Path | None = None
    """Folder for images; None is RUN/out."""
    scale: int | None = None
    """Factor by which saved images are enlarged, without smoothing; None makes the side at least 256 pixels."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Type of the transformer's weights; auto keeps that of its files. int8 is made after loading, so it does not lower
    the peak memory."""
    vqgan: Path | None = None
    """A file with the image decoder, for a model from transformers, which drops it: Meta's vqgan.ckpt or a
    vqgan_decoder.safetensors."""

    def check(self) -> None:
        """Raise UserError for a value out of range, naming the option."""
        for name, good, requested in (
            ("n", 1 <= self.n <= MAX_SAMPLES, f"from 1 to {MAX_SAMPLES:,}"),
            ("seed", self.seed >= 0, "0 or more"),
            ("scale", self.scale is None or 1 <= self.scale <= 64, "1 to 64"),
        ):
            if not good:
                raise UserError(f"--{name} must be {requested}, not {shown(getattr(self, name))}")
        if wrong := out_of_range(sample=self.params(SamplingParams())):
            name, rest = wrong.removeprefix("sample.").split(" ", 1)
            raise UserError(f"--{name.replace('_', '-')} {rest}")

    def params(self, of_run: SamplingParams) -> SamplingParams:
        """The run's own parameters, replaced by those given here."""
        given = {name: getattr(self, name) for name in ("guidance_scale", "max_new_tokens", "repetition_penalty")}
        by_image = self.image_guidance_scale
        given["image_guidance_scale"] = self.guidance_scale if by_image is None else by_image
        for name in ("temperature", "top_p", "top_k"):
            given |= {name: getattr(self, name), f"image_{name}": getattr(self, name)}
        return dataclasses.replace(of_run, **{name: value for name, value in given.items() if value is not None})


def main(args: Args) -> list[list[str | Path]]:
    """Generate, print and save samples; returns each sample's texts and image files, in order."""
    args.check()
    from nanochameleon.generation.engine import generate
    from nanochameleon.generation.events import Detokenizer, stream
    from nanochameleon.generation.fastest import kernels_for_one_call
    from nanochameleon.generation.prompts import (
        MODALITY,
        is_image,
        prompt_tokens,
        read_segments,
        resolve_mode,
        stop_tokens,
    )
    from nanochameleon.generation.quantize import quantize_
    from nanochameleon.images.output import ImageOutput
    from nanochameleon.images.tokenizer import NO_DECODER
    from nanochameleon.kernels.dispatch import use_kernels
    from nanochameleon.training.run import pick_device
    from nanochameleon.weights.model_folder import open_model

    # 1. The model
    check_kernels(device := pick_device(args.device))
    run = open_model(args.run, args.device, "auto" if args.dtype == "int8" else args.dtype, args.vqgan)
    # The weights' dtype is known only now. All generation calls rms_norm in it, except the compiled engine for CPUs.
    check_kernels(device, run.model.tok_embeddings.weight.dtype, ops=("rms_norm",))
    if args.dtype == "int8":
        quantize_(run.model)
    # 2. The prompt
    mode, segments = resolve_mode(args.mode, read_segments(args.prompt, run.cfg.vqgan.resolution, args.fit), run.cfg)
    words = " ".join(word for word in args.prompt if not is_image(word)).lower()
    stem = re.sub(r"[^a-z0-9]+", "-", words)[:60].strip("-") or "image"
    output = ImageOutput(run.image_tokenizer, args.out or args.run / "out", stem, args.scale)
    if MODALITY[mode] != "text":
        if not run.image_tokenizer.can_draw:
            raise UserError(NO_DECODER)
        output.check()
    prompt, params = prompt_tokens(segments, run, mode), args.params(run.cfg.sample)
    image_len = run.image_tokenizer.n_codes_per_image
    if mode == "draw":
        if args.max_new_tokens is not None and args.max_new_tokens <= image_len:
            raise UserError(f"--max-new-tokens must be at least {image_len + 1} to draw, not {args.max_new_tokens}")
        params = dataclasses.replace(params, max_new_tokens=image_len + 1)  # with <eoi>
    # 3. The samples: one is streamed, several are one batch
    stops = stop_tokens(mode, run.vocab)
    steps = min(params.max_new_tokens, run.cfg.model.max_seq_len - len(prompt)) * -(-args.n // BATCH)
    with use_kernels(kernels_for_one_call(run.model, steps)[0]):
        if args.n == 1:
            preview = PREVIEW if output.terminal_mode else None
            how = image_len, params, MODALITY[mode], args.seed, 0, stops, preview
            return [show(stream(run.model, prompt, run.tokenizer, *how), output)]
        how = image_len, params, MODALITY[mode], args.seed, stops, BATCH
        progress = "sampling" if sys.stderr.isatty() else None
        samples = generate(run.model, [prompt] * args.n, run.vocab, *how, progress=progress)
    return [show(Detokenizer(prompt, run.tokenizer).add(tokens, True), output) for tokens in samples]


def show(events: "Iterator[Event]", output: "ImageOutput") -> list[str | Path]:
    """Print and save one sample as it comes."""
    from nanochameleon.documents import Image, Text
    from nanochameleon.generation.events import PartialImage

    parts, line_open, held = [], False, ""
    for event in events:
        if isinstance(event, Text):
            text = held + event.text
            held = "\r" if text.endswith("\r") else ""  # until the next piece shows whether it begins with \n
            say(text.removesuffix(held), end="")
            line_open = True
            if parts and isinstance(parts[-1], str):
                parts[-1] += event.text
            else:
                parts.append(event.text)
        elif isinstance(event, PartialImage | Image):
            say(held, end="\n" if line_open else "")
            line_open, held = False, ""
            if isinstance(event, Image):
                parts.append(output.save(event.codes))
            else:
                output.preview(event.codes)
    say(held, end="\n" if line_open else "")
    return parts


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line; by default the program's own arguments."""
    exit_on_user_error(lambda: main(parse(Args, arguments, description=__doc__)))


if __name__ == "__main__":
    cli()
