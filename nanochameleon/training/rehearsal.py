"""How long a run will take on this machine: a few of its own steps, timed in a temporary folder before it begins.

The rehearsal is the run itself with few steps: the same functions, shapes and documents. It leaves nothing: its files
are deleted, torch's generator is restored, and all draws of the run come from the seed. Kernels are compiled by it.
"""

import io
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from warnings import catch_warnings

import torch
from torch.random import fork_rng

from nanochameleon.config import RunConfig
from nanochameleon.data.build import (
    CHUNK,
    InEpochs,
    amounts,
    mixture,
    open_loader,
    open_sources,
    tokenize,
    world,
    write_tokens,
)
from nanochameleon.data.sources.alignment import CATEGORIES
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training import checkpoint
from nanochameleon.training.flops import flops_per_token
from nanochameleon.training.init_from import InitFrom
from nanochameleon.training.run import DATA, IMAGE_TOKENIZER, Run
from nanochameleon.training.train_tokenizers import train_image_tokenizer, train_text_tokenizer
from nanochameleon.transformer import Chameleon

PLAIN, QUANTIZED = 3, 3  # steps of the image tokenizer that are timed, before and after the codebook starts
WARM = 4  # steps of the transformer before the clock starts
# steps of the transformer that are timed, of 10 one is logged: MANY, or as few as FEW once ENOUGH seconds are over
FEW, MANY, ENOUGH = 10, 30, 4.0
FEWEST = 100  # steps; a shorter run is over soon
LARGEST_STEP = 3e11  # FLOPs of a step of the transformer: some seconds
WORDS = 26  # tokens of text next to an image's codes, in prompts and answers of the report
REPORT_START, REPORT_ITEM = 1.5, 1.7e-3  # seconds: plots; the scene, the pixels and the judge of one image or answer


class Enough(Exception):
    """The rehearsal has taken its steps."""


class Stopwatch:
    """Takes the place of `stopped`, which loops call once a step: it notes the time and ends the loop after n steps.

    Up to `most` steps are taken while those after the first one take less than ENOUGH seconds.
    """

    def __init__(self, n: int, most: int = 0):
        self.n, self.most, self.times = n, most, []

    def __call__(self) -> bool:
        self.times.append(time.perf_counter())
        taken = len(self.times) - 1
        if taken >= self.n and (taken >= self.most or self.times[-1] - self.times[1] > ENOUGH):
            raise Enough
        return False


def step_seconds(loop: Callable[[Stopwatch], object], n: int, most: int = 0) -> list[float]:
    """Seconds of the steps of a loop, the first one left out, in which kernels are compiled."""
    stopwatch = Stopwatch(n, most)
    with suppress(Enough):
        loop(stopwatch)
    return [b - a for a, b in zip(stopwatch.times, stopwatch.times[1:], strict=False)]


@dataclass(frozen=True)
class Forecast:
    """Seconds that are left of each stage."""

    image_tokenizer: float
    tokens: float
    transformer: float
    report: float

    def sentence(self, due: float | None, samples: Path) -> str:
        """due: seconds from now until the first sheet of samples is due; None if only steps decide."""
        parts = {name.replace("_", " "): seconds for name, seconds in vars(self).items() if seconds >= 0.5}
        total = sum(parts.values())
        text = f"about {rounded(total)} on this machine: {', '.join(f'{k} {rounded(s)}' for k, s in parts.items())}"
        first = max(due or 0.0, self.image_tokenizer + self.tokens)
        if due is None or first >= total - self.report:
            return text
        return f"{text}; the first samples after about {rounded(first)}, in {samples}"


def rounded(seconds: float) -> str:
    """12.3 -> '12 s'; 130 -> '2 min'; 150 -> '2.5 min'; 9_000 -> '2.5 hours'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    value, unit = (seconds / 60, "min") if seconds < 90 * 60 else (seconds / 3_600, "hours")
    return f"{round(2 * value) / 2:g} {unit}" if value < 10 else f"{value:.0f} {unit}"


def worth(cfg: RunConfig, folder: Path, mesh: Mesh) -> bool:
    """Whether a rehearsal can tell: for one process on a CPU, in a drawn world, with many small steps left."""
    flops = flops_per_token(cfg.model, cfg.train.seq_len) * cfg.train.batch_size * cfg.train.seq_len
    alone = mesh.world_size == 1 and mesh.device.type == "cpu"
    return alone and bool(world(cfg.data)) and steps_left(folder, cfg.train.steps) >= FEWEST and flops <= LARGEST_STEP


def rehearse(cfg: RunConfig, init: InitFrom, folder: Path, device: torch.device, train: Callable) -> Forecast:
    """Time a few steps of each stage that is left. train(cfg, run, loader, folder, stopped) trains the transformer."""
    # no sheets of samples; and no more documents than a few steps read
    few = replace(
        cfg, data=replace(cfg.data, n_documents=CHUNK), train=replace(cfg.train, sample_every=None, sample_minutes=None)
    )
    captured = io.StringIO()  # progress bars and sizes, which the run prints itself
    with (
        TemporaryDirectory(ignore_cleanup_errors=True) as name,
        catch_warnings(),
        redirect_stdout(captured),
        redirect_stderr(captured),
        fork_rng(devices=[]),
    ):
        place = Path(name)
        if init.tokenizers:
            tokenizer, image_tokenizer_seconds = init.text(cfg), 0.0
        else:
            tokenizer = train_text_tokenizer(cfg.tokenizers, cfg.vqgan.n_codes, mixture(cfg, place), place)
            image_tokenizer_seconds = rehearse_image_tokenizer(cfg, place, folder, device)
        image_tokenizer = ImageTokenizer(VQGAN(cfg.vqgan).to(device))  # an untrained one takes as long
        tokens_seconds = rehearse_tokens(cfg, image_tokenizer, tokenizer, folder)
        write_tokens(few, image_tokenizer, tokenizer, place)
        loader = open_loader(few, image_tokenizer, tokenizer, place)
        with torch.device("meta"):
            run = Run(few, tokenizer.vocab, tokenizer, image_tokenizer, Chameleon(cfg.model))
        seconds = step_seconds(lambda stopwatch: train(few, run, loader, place, stopwatch), WARM + FEW, WARM + MANY)
        transformer_seconds = steps_left(folder, cfg.train.steps) * fmean(seconds[WARM:])
        return Forecast(image_tokenizer_seconds, tokens_seconds, transformer_seconds, rehearse_report(run))


def steps_left(folder: Path, steps: int) -> int:
    """Steps that the newest checkpoint in a folder leaves to take."""
    found = checkpoint.checkpoints(folder)
    return steps - int(checkpoint.STEP_FOLDER.fullmatch(found[0].name)[1]) if found else steps


def rehearse_image_tokenizer(cfg: RunConfig, place: Path, folder: Path, device: torch.device) -> float:
    t, left = cfg.tokenizers, steps_left(folder / IMAGE_TOKENIZER, cfg.tokenizers.steps)
    if not left:
        return 0.0
    few = replace(cfg, tokenizers=replace(t, steps=PLAIN + QUANTIZED + 9, warmup_steps=PLAIN + 1))
    pairs = open_sources(cfg, place)("pairs")
    seconds = step_seconds(
        lambda stopwatch: train_image_tokenizer(few, pairs, place, device, stopwatch), PLAIN + QUANTIZED + 1
    )
    plain, start, quantized = median(seconds[:PLAIN]), seconds[PLAIN], median(seconds[PLAIN + 1 :])
    plain_left = max(0, left - (t.steps - t.warmup_steps))
    return plain_left * plain + (left - plain_left) * quantized + (start if plain_left else 0.0)


def rehearse_tokens(
    cfg: RunConfig, image_tokenizer: ImageTokenizer, tokenizer: TextTokenizer, folder: Path
) -> float:  # fmt: skip
    """Time a chunk of each source that is not written yet, the second one: the first one fills caches."""
    total = 0.0
    for name, (n_tokens, n_documents) in amounts(cfg).items():
        if cfg.data.tokenize_on_the_fly or (folder / DATA / name).exists():
            continue
        docs = tokenize(InEpochs(open_sources(cfg, folder)(name), cfg.seed, name), image_tokenizer, tokenizer)
        list(islice(docs, CHUNK))
        start = time.perf_counter()
        length = sum(map(len, islice(docs, CHUNK)))
        seconds = time.perf_counter() - start
        total += seconds * (n_documents / CHUNK if n_documents else n_tokens / length)
    return total


@torch.inference_mode()
def rehearse_report(run: Run) -> float:
    """Time the model's forward pass, which is most of the report, and count what the report reads and writes."""
    n, codes, seq_len = run.cfg.evaluation, run.cfg.vqgan.codes_per_image, run.cfg.model.max_seq_len
    images = 2 * n.images + 3 * min(n.images, 100)  # drawn, and read before another one is drawn
    aligned = sum(name in CATEGORIES for name in run.cfg.mixture) * n.alignment
    n_items = images + 2 * n.answers + aligned + 200  # the last ones: documents whose bits are counted
    tokens = torch.zeros(2, seq_len, dtype=torch.int64)
    run.model.eval()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run.model(tokens)
        times.append(time.perf_counter() - start)
    return n_items * ((codes + WORDS) * min(times) / tokens.numel() + REPORT_ITEM) + REPORT_START
