"""What the lessons share: figures with alt text, the library's source, and a world that is learnt in seconds.

show(fig, alt)           a figure with a description for those who cannot see it
show_source(f, ...)      the real source of functions and classes of the library
WORLD, PatchTokenizer    2 shapes, 3 colours, 1 background; an image is 16 codes, and no code is lossy
train(forms, steps)      a model of 400,000 parameters that has learnt this world
"""

import inspect
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image, Markdown, display
from PIL import Image as PillowImage

from nanochameleon.cli import complete
from nanochameleon.config import ModelConfig, OptimConfig, RunConfig, SamplingParams, TrainConfig, VQGANConfig
from nanochameleon.data import Loader, Mixture, OnTheFly, PackedDocuments
from nanochameleon.data.sources.scenes import SIZES, Scene, Thing, World, draw
from nanochameleon.data.sources.shapes import ShapesSource
from nanochameleon.optim import clip_gradients, learning_rate, make_optimizer
from nanochameleon.packing import IGNORE
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.curves import FAINT, IMAGE, OTHER, TEXT
from nanochameleon.training.image_targets import mask_targets
from nanochameleon.training.objective import Objective, Sums
from nanochameleon.training.run import Run
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------------------------------
# Figures and sources

plt.rcParams.update({
    "figure.figsize": (8, 3), "figure.dpi": 100, "figure.constrained_layout.use": True,
    "font.size": 11, "axes.titlesize": 11, "axes.labelsize": 11, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "legend.fontsize": 10, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "lines.linewidth": 1.8, "image.interpolation": "nearest",
    # colour alone never tells lines apart: each colour has its own line style
    "axes.prop_cycle": plt.cycler(color=[TEXT, IMAGE, OTHER, FAINT], linestyle=["-", "--", "-.", ":"]),
})  # fmt: skip


def show(fig: plt.Figure, alt: str) -> None:
    """Display a figure with alt text and close it. 256 colours keep the file small."""
    data = io.BytesIO()
    fig.savefig(data, format="png")
    plt.close(fig)
    image, data = PillowImage.open(data).convert("RGB").quantize(256), io.BytesIO()
    image.save(data, format="png", optimize=True)
    display(Image(data.getvalue(), alt=alt))


def show_source(*objects: Callable) -> None:
    """Display the source of functions and classes of the library, each with its file."""
    for each in objects:
        path = Path(inspect.getsourcefile(inspect.unwrap(each))).resolve().relative_to(ROOT).as_posix()
        source = inspect.cleandoc("\n" + inspect.getsource(each))
        display(Markdown(f"[{path}](../{path})\n```python\n{source}\n```"))


# ---------------------------------------------------------------------------------------------------------------------
# A small world

WORLD = World(side=2, n_shapes=2, n_colours=3, n_backgrounds=1, max_count=2)


class PatchTokenizer:
    """Images <-> codes without loss: the codebook holds every patch of 8 x 8 pixels that an image of the world shows.

    It takes the place of images.tokenizer.ImageTokenizer where there is no time to train one.
    """

    can_draw, device = True, torch.device("cpu")

    def __init__(self, world: World = WORLD, side: int = 8):
        self.side, self.grid = side, world.resolution // side  # pixels of a patch, patches of an image
        self.n_codes_per_image = self.grid**2
        things = [Thing(z, c, s) for z in SIZES for c in world.colours for s in world.shapes]
        alone = [Scene(b, (thing,), ((0, 0),)) for b in world.backgrounds for thing in things]
        patches = self.cut(np.stack([draw(scene, world) for scene in alone]))  # (N, n, side * side * 3)
        self.codebook = np.unique(patches.reshape(-1, patches.shape[-1]), axis=0)  # (K, side * side * 3)
        self.code_of = {patch.tobytes(): code for code, patch in enumerate(self.codebook)}

    def cut(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, R, R, 3) -> patches (B, n, side * side * 3) in raster order."""
        x = images.reshape(-1, self.grid, self.side, self.grid, self.side, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(len(images), self.n_codes_per_image, -1)

    def encode(self, images: np.ndarray, batch_size: int | None = None) -> torch.Tensor:
        return torch.tensor([[self.code_of[patch.tobytes()] for patch in image] for image in self.cut(images)])

    def decode(self, codes: torch.Tensor, batch_size: int | None = None) -> np.ndarray:
        x = self.codebook[codes.numpy()].reshape(-1, self.grid, self.grid, self.side, self.side, 3)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(codes), self.grid * self.side, self.grid * self.side, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Training in this world: lesson 5 builds this loop

N_MERGES = 120
MUON = OptimConfig("muon", 1.4e-2, eps=1e-8, weight_decay=0.0, warmup_steps=15, schedule="cosine", min_lr_ratio=0.02)


def small_config(steps: int, optim: OptimConfig = MUON, seed: int = 0) -> RunConfig:
    """A model of 96 x 3 layers, sequences of 256 tokens, 4 a step."""
    vqgan = VQGANConfig(resolution=WORLD.resolution, n_codes=len(PatchTokenizer().codebook))
    model = ModelConfig(dim=96, n_layers=3, n_heads=3, multiple_of=32, rope_theta=100.0)
    train = TrainConfig(steps=steps, batch_size=4, seq_len=256, image_loss="drawn", precision="fp32")
    sample = SamplingParams(
        repetition_penalty=1.0, image_temperature=0.5, guidance_scale=1.0, image_guidance_scale=1.0, max_new_tokens=256
    )
    cfg = RunConfig("small", vqgan, model, optim, train=train, sample=sample, seed=seed, device="cpu")
    return complete(replace(cfg, tokenizers=replace(cfg.tokenizers, n_merges=N_MERGES)))


def start(cfg: RunConfig, forms: dict[str, float]) -> tuple[Run, Loader]:
    """Return a run whose model has learnt nothing, and batches of documents of these forms (data.FORMS), by weight."""
    images, vocab = PatchTokenizer(), Vocab.toy(cfg.vqgan.n_codes, N_MERGES)
    corpus = Mixture({form: (ShapesSource(WORLD, form, 0), 1.0) for form in ("pairs", "questions")}, 0)
    words = TextTokenizer.train(corpus.captions(1_000), vocab, progress=False)
    t = cfg.train
    documents = {
        form: OnTheFly(ShapesSource(WORLD, form, cfg.seed), images, words, t.steps * t.batch_size * t.seq_len, None)
        for form in forms
    }
    packed = {form: PackedDocuments(form, documents[form], t.seq_len, cfg.seed) for form in forms}
    loader = Loader(packed, [(0, forms)], t.batch_size, t.seq_len, cfg.seed, vocab.pad)
    torch.manual_seed(cfg.seed)
    return Run(cfg, vocab, words, images, Chameleon(cfg.model).eval()), loader


def train_loop(run: Run, loader: Loader, watch: Callable[[int, Sums], None] = lambda step, sums: None) -> Run:
    """Train run.model; `watch` sees the number and the sums of each step. The same seed gives the same weights."""
    cfg, t, model = run.cfg, run.cfg.train, run.model
    objective, optimizer = Objective(model, run.vocab, t.precision), make_optimizer(model, cfg.optim)
    for step in range(t.steps):
        batch = mask_targets(loader.batch(step), t.image_loss, cfg.vqgan.codes_per_image, run.vocab)
        n_targets = int((batch.targets != IGNORE).sum())
        sums = objective(batch, None, t.z_loss, n_targets)
        optimizer.zero_grad()
        sums.next_token.loss.backward()
        clip_gradients(model.parameters(), cfg.optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, t.steps, cfg.optim)
        optimizer.step()
        watch(step, sums)
    return run


def train(
    forms: dict[str, float], steps: int, optim: OptimConfig = MUON, seed: int = 0,
    watch: Callable[[int, Sums], None] = lambda step, sums: None,
) -> Run:  # fmt: skip
    """Train on documents of these forms (data.FORMS), by weight; `watch` sees each step's sums."""
    return train_loop(*start(small_config(steps, optim, seed), forms), watch)
