"""Train the two tokenizers: BPE on texts, the VQGAN on images. Both are fixed before the transformer's training.

The VQGAN starts as a plain autoencoder. After `warmup_steps`, k-means on its latents makes the codebook, and from then
on it is trained through the codes. So no code starts dead, and the encoder knows what matters before it is quantized.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nanochameleon.config import RunConfig, TokenizerTraining, VQGANConfig
from nanochameleon.data import Mixture, RawImage, Source
from nanochameleon.errors import UserError
from nanochameleon.images.losses import (
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
)
from nanochameleon.images.quantizer import codebook_loss, commitment_loss
from nanochameleon.images.tokenizer import ImageTokenizer, to_pixels
from nanochameleon.images.vqgan import VQGAN, split_windows
from nanochameleon.optim import MAX_NONFINITE_STEPS, clip_gradients, learning_rate, make_optimizer
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training import checkpoint
from nanochameleon.training.restore import load_optimizer, optimizer_tensors
from nanochameleon.training.run import IMAGE_TOKENIZER, TEXT_TOKENIZER
from nanochameleon.vocab import Vocab
from nanochameleon.weights.tokenizer_json import load_text_tokenizer, save_text_tokenizer

START_IMAGES = 512  # images whose latents k-means reads
START_VECTORS = 8_192  # most latents that k-means reads
SAVE_EVERY = 500  # steps of the image tokenizer between checkpoints
EMA_FRACTION = 0.8  # of the steps in which the codebook moves; then it is fixed, so that the decoder can adapt to it


def train_text_tokenizer(cfg: TokenizerTraining, n_codes: int, docs: Mixture, folder: Path) -> TextTokenizer:
    """Train the BPE on captions and questions and write it into the run's folder, unless it is there."""
    path = folder / TEXT_TOKENIZER
    if not path.exists():
        vocab = Vocab.toy(n_codes, cfg.n_merges)
        save_text_tokenizer(TextTokenizer.train(docs.captions(cfg.n_texts), vocab), path)
    return load_text_tokenizer(path)


def in_training_order(source: Source, seed: int) -> Mixture:
    """The documents of a source in the order in which the image tokenizer is trained on them."""
    # The name decides the order of a finite source: with another one, an older run would not resume exactly.
    return Mixture({"pictures": (source, 1.0)}, seed)


def images(source: Source, start: int, n: int) -> np.ndarray:
    """Stack the images of documents start .. start+n-1 of a source of pairs: uint8 (n, R, R, 3)."""
    docs = (source.document(i) for i in range(start, start + n))
    return np.stack([s.pixels for doc in docs for s in doc if isinstance(s, RawImage)])


def step_seed(seed: int, step: int) -> int:
    """Mix the run's seed with the step into 32 bits; torch's CPU generator uses no more of its seed."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def start_codebook(vqgan: VQGAN, pixels: Tensor, generator: torch.Generator) -> None:
    """Initialise the codebook by k-means on the latents of these images; with a window, of their distinct windows."""
    if vqgan.cfg.window:
        windows = split_windows(pixels, vqgan.cfg.window)
        pixels = torch.unique(windows.flatten(1), dim=0).view(-1, *windows.shape[1:])
    with torch.no_grad():
        latents = torch.cat([vqgan.quant_conv(vqgan.encoder(part)) for part in pixels.split(64)])
    vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)  # (N, Z, h, w) -> (N h w, Z)
    chosen = torch.randperm(len(vectors), generator=generator)[:START_VECTORS].to(vectors.device)
    vqgan.quantize.init_kmeans(vectors[chosen], rounds=10, generator=generator)


def reconstruction_loss(x: Tensor, y: Tensor, perceptual: PerceptualLoss, cfg: TokenizerTraining) -> Tensor:
    """Absolute and squared error of the pixels, and the perceptual loss."""
    loss = F.l1_loss(y, x) + F.mse_loss(y, x)
    return loss + cfg.perceptual_weight * perceptual(x, y) if cfg.perceptual_weight else loss


class Adversary:
    """The patch discriminator, which the VQGAN has to fool from step `disc_start` on, and its optimizer."""

    def __init__(self, cfg: TokenizerTraining, device: torch.device):
        self.net = PatchDiscriminator(cfg.disc_channels, n_layers=2).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), cfg.optim.lr / 10, betas=(0.5, 0.9), weight_decay=0.0)

    def loss(self, x: Tensor, y: Tensor, so_far: Tensor, last_layer: Tensor) -> Tensor:
        """Train the discriminator for one step on (x, y); returns the VQGAN's weighted adversarial loss."""
        self.optimizer.zero_grad()
        disc_loss = hinge_discriminator_loss(self.net(x), self.net(y.detach()))
        disc_loss.backward()
        if disc_loss.isfinite():
            self.optimizer.step()
        gen_loss = generator_loss(self.net(y))
        return adaptive_weight(so_far, gen_loss, last_layer) * gen_loss


def tokenizer_loss(
    vqgan: VQGAN, x: Tensor, quantized: bool, losses: Callable[[Tensor, Tensor], Tensor], cfg: TokenizerTraining
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Returns loss, latents, codes (None before the warm-up ends) and reconstruction."""
    if not quantized:
        latents = vqgan.latents(x)
        drawn = vqgan.pixels(latents)
        return losses(x, drawn), latents, None, drawn
    drawn, latents, vectors, codes = vqgan(x)
    loss = losses(x, drawn) + cfg.commitment_weight * commitment_loss(latents, vectors)
    if cfg.codebook == "loss":
        loss = loss + codebook_loss(latents, vectors)
    return loss, latents, codes, drawn


def train_image_tokenizer(
    cfg: RunConfig, source: Source, folder: Path, device: torch.device, stopped: Callable[[], bool]
) -> bool:
    """Train the VQGAN into folder/image_tokenizer from its newest checkpoint on. Returns whether it is finished.

    `stopped` is asked after every step; if it is true, the state is saved and False returned. A step whose loss or
    gradient is not finite is skipped. Raises UserError after MAX_NONFINITE_STEPS of them in a row.
    """
    t, directory = cfg.tokenizers, folder / IMAGE_TOKENIZER
    torch.manual_seed(cfg.seed)
    vqgan = VQGAN(cfg.vqgan).to(device, memory_format=torch.channels_last)  # convolutions read it without a copy
    vqgan.quantize.embedding.requires_grad_(t.codebook == "loss")
    optimizer, adversary = make_optimizer(vqgan, t.optim), Adversary(t, device) if t.disc_weight else None
    start = load_tokenizer(directory, vqgan, optimizer, adversary)
    generator, perceptual, nonfinite_streak = torch.Generator(), PerceptualLoss().to(device), 0
    shuffled = in_training_order(source, cfg.seed)
    bar = tqdm(range(start, t.steps), initial=start, total=t.steps, desc="image tokenizer", unit="step")
    for step in bar:
        # 1. The batch. Every draw depends on the step alone, so a resumed run draws the same.
        generator.manual_seed(step_seed(cfg.seed, step))
        x = to_pixels(images(shuffled, step * t.batch_size, t.batch_size)).to(device)  # (B, 3, R, R)

        # 2. At the end of the warm-up, the codebook from images that no step has read.
        if step == t.warmup_steps:
            unseen = images(shuffled, t.steps * t.batch_size, START_IMAGES)
            start_codebook(vqgan, to_pixels(unseen).to(device), generator)

        # 3. The loss, and a step of the discriminator.
        loss, latents, codes, drawn = tokenizer_loss(
            vqgan, x, step >= t.warmup_steps, lambda x, y: reconstruction_loss(x, y, perceptual, t), t
        )
        if adversary and step >= t.disc_start:
            loss = loss + t.disc_weight * adversary.loss(x, drawn, loss, vqgan.decoder.conv_out.weight)

        # 4. Backward and clip.
        optimizer.zero_grad()
        loss.backward()
        value, norm = float(loss.detach()), clip_gradients(vqgan.parameters(), t.optim.grad_clip)

        # 5. Update, if loss and gradient are finite.
        nonfinite_streak = 0 if math.isfinite(value) and math.isfinite(norm) else nonfinite_streak + 1
        if nonfinite_streak == MAX_NONFINITE_STEPS:
            lower = f"start again with --overwrite and less than --tokenizers.optim.lr {t.optim.lr}"
            raise UserError(f"{nonfinite_streak} steps in a row had no finite loss: {lower}")
        if not nonfinite_streak:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, t.steps, t.optim)
            optimizer.step()
            if codes is not None and t.codebook == "ema" and step < EMA_FRACTION * t.steps:
                vqgan.quantize.update_averages(latents.detach(), codes, t.ema_decay, t.dead_code_threshold, generator)

        # 6. Log and save.
        bar.set_postfix_str(f"loss {value:.4f}", refresh=False)
        done, stop = step + 1, stopped()
        if done % SAVE_EVERY == 0 or done == t.steps or stop:
            save_tokenizer(directory, done, vqgan, optimizer, adversary)
        if stop and done < t.steps:
            return False
    return True


def save_tokenizer(directory: Path, step: int, vqgan: VQGAN, optimizer, adversary: Adversary | None) -> None:
    moving = {"counts": vqgan.quantize.counts, "sums": vqgan.quantize.sums}
    tensors = {"model": vqgan.state_dict(), "optim": optimizer_tensors(optimizer, vqgan), "moving": moving}
    if adversary:
        tensors["adversary"] = adversary.net.state_dict()
        tensors["adversary_optim"] = optimizer_tensors(adversary.optimizer, adversary.net)
    checkpoint.save(directory, step, tensors, {"step": step})
    checkpoint.keep_last(directory, 1)


def load_tokenizer(directory: Path, vqgan: VQGAN, optimizer, adversary: Adversary | None) -> int:
    """Load the newest checkpoint, if there is one; returns the next step.

    Raises UserError where there are some and none is whole.
    """
    if not checkpoint.checkpoints(directory):
        return 0
    tensors, state = checkpoint.load(directory)
    with checkpoint.readable(directory):
        vqgan.load_state_dict(tensors["model"])
        load_optimizer(optimizer, vqgan, tensors["optim"])
        vqgan.quantize.counts.copy_(tensors["moving"]["counts"])
        vqgan.quantize.sums.copy_(tensors["moving"]["sums"])
        if adversary:
            adversary.net.load_state_dict(tensors["adversary"])
            load_optimizer(adversary.optimizer, adversary.net, tensors["adversary_optim"])
        return checkpoint.steps_done(state)


def open_image_tokenizer(folder: Path, cfg: VQGANConfig, device: torch.device) -> ImageTokenizer:
    """Load the newest whole checkpoint of the run's image tokenizer. Raises UserError if there is none."""
    directory = Path(folder) / IMAGE_TOKENIZER
    tensors, _ = checkpoint.load(directory, groups=["model"])
    with checkpoint.readable(directory):
        return ImageTokenizer(VQGAN.from_state(cfg, tensors["model"]).to(device))
