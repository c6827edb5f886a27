"""A prompt of words and images, in any order -> words and images.

    python sample.py runs/toy "a big red circle above a small blue star"          draws
    python sample.py runs/toy image.png "how many stars are there?"             answers
    python sample.py runs/toy image.png                                         says what is in it
    python sample.py runs/toy "a red star" --mode free --n 3                      goes on in words and images
    python sample.py runs/align "please draw a red star"                          a chat with an aligned model
    python sample.py runs/toy "a red star" --n 8 --guidance-scale 2 --seed 1      eight drawings, nearer to the prompt
    python sample.py chameleon-7b "a red star" --guidance-scale 3 --dtype bf16          a released model, in any layout

An argument that is a file, or ends as images do (.png, .jpg, ...), is an image; one that is a folder or a pipe is
refused. Drawn images are saved and, in terminals that can, shown; existing files are never overwritten, and nothing
that stops the printing stops the saving. Left out: chat over several turns.
"""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

if __name__ == "__main__" and (missing := [name for name in ("tyro", "torch", "regex") if not find_spec(name)]):
    print(f"error: {missing[0]} is missing: run make demo, or pip install -c constraints.txt -e .", file=sys.stderr)
    raise SystemExit(2)

import tyro

from nanochameleon.cli import check_kernels, parse
from nanochameleon.config import RunConfig, SamplingParams
from nanochameleon.errors import UserError, exit_on_user_error, say, shown
from nanochameleon.weights.ranges import MAX_NUMBER

PREVIEW = 32  # codes between two looks at an image that is being drawn
IMAGE_ENDINGS = (  # of formats that cannot be read, too: such a word is a mistake, and no words to draw
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".jxl", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif", ".avif", ".ico", ".svg", ".tga", ".psd", ".dng", ".cr2", ".nef",
)  # fmt: skip
MOST = 1_000_000  # samples


@dataclass(frozen=True)
class Args:
    """Draws, answers or goes on, by a trained run. None as a default below means: as the run's configuration says."""

    run: tyro.conf.Positional[Path]
    """Folder that train.py wrote, such as runs/toy, or a model in our, Hugging Face's or Meta's layout."""
    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """Words and image files, in any order."""
    mode: Literal["auto", "draw", "answer", "chat", "text", "free"] = "auto"
    """draw: one image. answer: end the turn, then words. chat: end the turn, then words and images. text: go on in
    words alone. free: go on in words and images. auto: chat with an aligned run; draw after words alone; answer where
    an image comes with words after it; else say what is in the image."""
    n: int = 1
    """Samples."""
    temperature: float | None = None
    """Of words and images; 0 takes the likeliest at each step."""
    top_p: float | None = None
    """Draw from the smallest set of ids that holds this probability."""
    top_k: int | None = None
    """Draw from this many ids at most."""
    guidance_scale: float | None = None
    """Of images: 1 is as the model says, more is nearer to the prompt."""
    image_guidance_scale: float | None = None
    """The same by the prompt's images alone; None means as --guidance where that is given."""
    repetition_penalty: float | None = None
    """Of words: above 1 turns away from ids that were there before."""
    max_new_tokens: int | None = None
    """Ids to write at most."""
    fit: Literal["crop", "pad"] = "crop"
    """How an image becomes a square: crop keeps the middle, as the images of training; pad keeps all of it, with a
    white border, as the paper does for prompts."""
    seed: int = 0
    """The same seed gives the same samples."""
    out: Path | None = None
    """Folder for images; None is RUN/out."""
    scale: int | None = None
    """Times that saved images are enlarged, without smoothing; None makes the side at least 256 pixels."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Type of the transformer's weights; auto is that of its files. int8 is made of that after loading, so the peak of
    memory is that of loading."""
    vqgan: Path | None = None
    """A file with the image decoder, for a model that came from transformers, which drops it: Meta's vqgan.ckpt or a
    vqgan_decoder.safetensors."""

    def check(self) -> None:
        """Raises UserError for a value out of range, naming the option."""
        for name, good, wish in (
            ("n", 1 <= self.n <= MOST, f"from 1 to {MOST:,}"),
            ("temperature", self.temperature is None or 0 <= self.temperature < math.inf, "0 or more"),
            ("top-p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top-k", self.top_k is None or 1 <= self.top_k <= MAX_NUMBER, f"from 1 to {MAX_NUMBER}"),
            ("guidance-scale", self.guidance_scale is None or 0 <= self.guidance_scale < math.inf, "0 or more"),
            (
                "image-guidance-scale",
                self.image_guidance_scale is None or 0 <= self.image_guidance_scale < math.inf,
                "0 or more",
            ),
            (
                "repetition-penalty",
                self.repetition_penalty is None or 0 < self.repetition_penalty < math.inf,
                "above 0",
            ),
            (
                "max-new-tokens",
                self.max_new_tokens is None or 1 <= self.max_new_tokens <= MAX_NUMBER,
                f"from 1 to {MAX_NUMBER}",
            ),
            ("seed", self.seed >= 0, "0 or more"),
            ("scale", self.scale is None or 1 <= self.scale <= 64, "1 to 64"),
        ):
            if not good:
                raise UserError(f"--{name} must be {wish}, not {shown(getattr(self, name.replace('-', '_')))}")

    def options(self, cfg: SamplingParams) -> SamplingParams:
        """The run's own settings, with those given here in their place."""
        by_image = self.guidance_scale if self.image_guidance_scale is None else self.image_guidance_scale
        given = dict(
            guidance_scale=self.guidance_scale, image_guidance_scale=by_image, max_new_tokens=self.max_new_tokens
        )
        given["repetition_penalty"] = self.repetition_penalty
        for name in ("temperature", "top_p", "top_k"):
            given |= {name: getattr(self, name), f"image_{name}": getattr(self, name)}
        return dataclasses.replace(cfg, **{name: value for name, value in given.items() if value is not None})


def is_image(argument: str) -> bool:
    path = os.path.expanduser(argument)
    return os.path.isfile(path) or path.lower().endswith(IMAGE_ENDINGS)


def image_path(argument: str) -> str | None:
    """The file that an argument names; None for words. Raises UserError for a folder, a pipe or a device."""
    path = os.path.expanduser(argument)
    if is_image(argument):
        return path
    if os.path.lexists(path):
        why = f"{argument} is there and is not an image file, but a folder, a pipe or the like"
        raise UserError(f"{why}: give an image file, or ' {argument}' with a space where the word is meant")
    return None


def read_segments(arguments: tuple[str, ...], resolution: int, fit: Literal["crop", "pad"]) -> list:
    """Arguments -> Text and RawImage segments. Raises UserError for one that names no image that can be read."""
    from nanochameleon.data import RawImage
    from nanochameleon.documents import Text
    from nanochameleon.images.tokenizer import load_square

    segments = []
    for argument in arguments:
        if path := image_path(argument):
            segments.append(RawImage(load_square(path, resolution, fit)))
        elif any("\ud800" <= letter <= "\udfff" for letter in argument):  # how Python shows bytes that are no UTF-8
            raise UserError(f"the prompt {argument!a} is not valid UTF-8")
        elif argument.strip():
            segments.append(Text(argument.strip()))
    return segments


def what_is_it(cfg: RunConfig) -> str | None:
    """The question that a run learnt to answer with the caption; None for a folder's, where captions just follow."""
    from nanochameleon.data.sources.emoji import WHAT
    from nanochameleon.data.sources.shapes import ASK_CAPTION

    return {"shapes": ASK_CAPTION, "shapes_rich": ASK_CAPTION, "emoji": WHAT}.get(cfg.data.source)


def decide(mode: str, segments: list, cfg: RunConfig) -> tuple[str, list]:
    """What `auto` means for these segments, and what to prompt with. Raises UserError where a segment is missing."""
    from nanochameleon.documents import Text

    words_last = bool(segments) and isinstance(segments[-1], Text)
    has_image = any(not isinstance(segment, Text) for segment in segments)
    if mode == "auto" and not segments:
        raise UserError("the prompt is empty: give words to draw, or an image and a question")
    if mode == "auto" and cfg.train.assistant_only_loss:
        mode = "chat"
    if mode == "auto":
        mode = "draw" if not has_image else "answer" if words_last or what_is_it(cfg) else "text"
    if mode == "answer" and not words_last:
        if not (has_image and what_is_it(cfg)):
            raise UserError("--mode answer needs a question as its last words")
        segments = [*segments, Text(what_is_it(cfg))]
    return mode, segments


def main(args: Args) -> list[list[str | Path]]:
    """Samples, prints and saves; returns each sample as its texts and the files of its images, in order."""
    args.check()
    from nanochameleon.generation.engine import generate, prompt_ids, stream
    from nanochameleon.generation.events import Reader
    from nanochameleon.generation.quantize import quantize_
    from nanochameleon.images.tokenizer import NO_DECODER
    from nanochameleon.training.run import pick_device
    from nanochameleon.weights.model_folder import open_model

    check_kernels(pick_device(args.device))
    run = open_model(args.run, args.device, "auto" if args.dtype == "int8" else args.dtype, args.vqgan)
    if args.dtype == "int8":
        quantize_(run.model)
    vocab, n_codes = run.vocab, run.image_tokenizer.n_codes_per_image
    mode, segments = decide(args.mode, read_segments(args.prompt, run.cfg.vqgan.resolution, args.fit), run.cfg)
    shelf, progress = Shelf(args, run.image_tokenizer), "sampling" if sys.stderr.isatty() else None
    if mode in ("draw", "free", "chat"):
        if not run.image_tokenizer.can_draw:
            raise UserError(NO_DECODER)
        shelf.check()
    prompt = prompt_ids(segments, run, {"draw": "draw", "answer": "answer", "chat": "answer"}.get(mode, "go on"))
    options = args.options(run.cfg.sample)
    if mode == "draw":
        if args.max_new_tokens is None:  # an image's length is no choice
            options = dataclasses.replace(options, max_new_tokens=n_codes + 1)
        elif args.max_new_tokens <= n_codes:
            raise UserError(
                f"--max-new-tokens must be at least {n_codes + 1} to draw an image, not {args.max_new_tokens}"
            )
        if args.n == 1 and shelf.shows:
            told = stream(run.model, prompt, run.tokenizer, n_codes, options, "image", args.seed, preview=PREVIEW)
            return [show(told, shelf)]
        rows = generate(run.model, [prompt] * args.n, vocab, n_codes, options, "image", args.seed, progress=progress)
        return [[shelf.put([vocab.token_to_code(token) for token in row[:-1]])] for row in rows]
    grammar_mode = "both" if mode in ("free", "chat") else "text"
    stops = (vocab.eos, vocab.eot) if mode in ("answer", "chat") else (vocab.eos,)
    what = options, grammar_mode, args.seed
    if args.n == 1:
        preview = PREVIEW if shelf.shows else None
        told = stream(run.model, prompt, run.tokenizer, n_codes, *what, 0, stops, preview)
        return [show(told, shelf)]
    rows = generate(run.model, [prompt] * args.n, vocab, n_codes, *what, stops, progress=progress)
    return [show(Reader(prompt, run.tokenizer).read(row, True), shelf) for row in rows]


def show(events, shelf: "Shelf") -> list[str | Path]:
    """Prints and saves one sample as it comes."""
    from nanochameleon.documents import Image, Text
    from nanochameleon.generation.events import PartialImage

    parts, line_open, held = [], False, ""
    for event in events:
        if isinstance(event, Text):
            text = held + event.text
            held = "\r" if text.endswith("\r") else ""  # until it is known whether the line ends here
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
                parts.append(shelf.put(event.codes))
            else:
                shelf.preview(event.codes)
    say(held, end="\n" if line_open else "")
    return parts


@dataclass(frozen=True)
class Shelf:
    """Where images go: onto the disk and into the terminal."""

    args: Args
    image_tokenizer: object  # ImageTokenizer

    @property
    def shows(self) -> str | None:
        """How the terminal shows images, None where it cannot."""
        from nanochameleon.images.terminal import terminal_mode

        return terminal_mode(os.environ, sys.stdout.isatty())

    def preview(self, codes) -> None:
        """Shows an unfinished image, with the first code where codes lack; what is printed next goes over it."""
        import torch

        from nanochameleon.images.terminal import as_terminal

        filled = [*codes, *[codes[0]] * (self.image_tokenizer.n_codes_per_image - len(codes))]
        shown = as_terminal(self.image_tokenizer.decode(torch.tensor([filled]))[0])
        sys.stdout.write(f"{shown}\n\x1b[{shown.count(chr(10)) + 1}F")
        sys.stdout.flush()

    @property
    def folder(self) -> Path:
        return self.args.out or self.args.run / "out"

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Raises UserError for an OSError within."""
        try:
            yield
        except OSError as error:
            why = f"cannot save an image in {self.folder}: {error.strerror}"
            raise UserError(f"{why}; choose another folder with --out") from None

    def check(self) -> None:
        """Raises UserError where no image could be saved, before it is drawn."""
        from nanochameleon.files import check_writable

        with self.saving():
            check_writable(self.folder)

    def put(self, codes) -> Path:
        """One image's codes -> the file it was saved in. Raises UserError where it cannot be written."""
        import torch

        from nanochameleon.files import write_new
        from nanochameleon.images.terminal import as_terminal, png

        image = self.image_tokenizer.decode(torch.tensor([list(codes)]))[0]
        scale = self.args.scale or math.ceil(256 / len(image))
        words = " ".join(word for word in self.args.prompt if not is_image(word)).lower()
        stem = re.sub(r"[^a-z0-9]+", "-", words)[:60].strip("-") or "image"
        with self.saving():
            path = write_new(self.folder, stem, ".png", png(image.repeat(scale, 0).repeat(scale, 1)))
        if how := self.shows:
            sys.stdout.write(as_terminal(image, how) + "\n")
        say(path)
        return path


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line; by default the program's own arguments."""
    exit_on_user_error(lambda: main(parse(Args, arguments, description=__doc__)))


if __name__ == "__main__":
    cli()
