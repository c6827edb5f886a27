"""Training of the two tokenizers: done once, exact when resumed, and of use."""

import itertools
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import SHAPES_VQGAN, training_config

from nanochameleon.data import RawImage
from nanochameleon.data.build import mixture
from nanochameleon.data.sources.scenes import World, draw, scenes
from nanochameleon.data.sources.shapes import ShapesSource
from nanochameleon.errors import UserError
from nanochameleon.images.losses import PerceptualLoss
from nanochameleon.images.quantizer import nearest_code
from nanochameleon.images.tokenizer import to_pixels
from nanochameleon.images.vqgan import VQGAN, split_windows
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training import checkpoint, train_tokenizers
from nanochameleon.training.run import IMAGE_TOKENIZER
from nanochameleon.training.train_tokenizers import (
    Adversary,
    images,
    in_training_order,
    open_image_tokenizer,
    reconstruction_loss,
    start_codebook,
    step_seed,
    tokenizer_loss,
    train_image_tokenizer,
    train_text_tokenizer,
)

CPU = torch.device("cpu")
SOURCE = ShapesSource(World(), "pairs", 0)


def some_images(n: int) -> torch.Tensor:
    return to_pixels(np.stack([draw(scene, World()) for scene in scenes(World(), 1, n)]))


def training(**changes):
    """tests/tiny.py's tokenizer training with changes."""
    return replace(training_config(None).tokenizers, **changes)


# --- text ------------------------------------------------------------------------------------------------------------


def test_the_text_tokenizer_is_trained_once_and_read_afterwards(tmp_path, monkeypatch):
    cfg = training_config(tmp_path)
    docs = mixture(cfg, tmp_path)
    trained = train_text_tokenizer(cfg.tokenizers, cfg.vqgan.n_codes, docs, tmp_path)
    assert len(trained.merges) == 64 and trained.vocab.size == cfg.model.vocab_size
    assert len(trained.encode("a big red circle above a small blue star")) < 20  # it has seen such words
    monkeypatch.setattr(TextTokenizer, "train", None)
    assert train_text_tokenizer(cfg.tokenizers, cfg.vqgan.n_codes, docs, tmp_path).merges == trained.merges


@given(*[st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 10**6))] * 2)
def test_no_two_seeds_or_steps_share_their_draws(one, other):
    drawn = [
        torch.rand(1, generator=torch.Generator().manual_seed(step_seed(*key))).item() for key in (one, other, one)
    ]
    assert drawn[0] == drawn[2] and (drawn[0] == drawn[1]) == (one == other)


def test_seeds_far_apart_do_not_share_their_draws():
    assert step_seed(0, 5) != step_seed(2**27, 5)  # equal modulo 2^32 once multiplied by 800 steps


# --- the image tokenizer as a whole ----------------------------------------------------------------------------------


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(train_tokenizers, "START_IMAGES", 16)


VARIANTS = {
    "moving averages, adversary": training(),
    "codebook loss": training(codebook="loss", disc_weight=0.0),
    "window": training(disc_weight=0.0),
}


def variant(kind: str, folder):
    window = 16 if kind == "window" else None
    return training_config(folder, vqgan=replace(SHAPES_VQGAN, window=window), tokenizers=VARIANTS[kind])


@pytest.mark.parametrize("kind", VARIANTS)
def test_stopped_after_every_step_it_ends_with_the_same_bits(kind, tmp_path, few_images):
    whole, pieces = variant(kind, tmp_path / "whole"), variant(kind, tmp_path / "pieces")
    assert train_image_tokenizer(whole, SOURCE, whole.folder, CPU, lambda: False)
    for step in range(1, 6):
        assert not train_image_tokenizer(pieces, SOURCE, pieces.folder, CPU, lambda: True)
        assert checkpoint.newest(pieces.folder / IMAGE_TOKENIZER).name == f"step-{step:06d}"
    assert train_image_tokenizer(pieces, SOURCE, pieces.folder, CPU, lambda: True)  # the last step has nothing to stop
    tensors, expected = (checkpoint.load(cfg.folder / IMAGE_TOKENIZER)[0] for cfg in (pieces, whole))
    assert set(tensors) == set(expected) and {"model", "optim", "moving"} <= set(tensors)
    for group, content in expected.items():
        assert set(tensors[group]) == set(content) and len(content) > 0
        assert [name for name in content if not torch.equal(tensors[group][name], content[name])] == []


def test_a_kill_costs_the_steps_since_the_last_save_alone(tmp_path, few_images, monkeypatch):
    monkeypatch.setattr(train_tokenizers, "SAVE_EVERY", 2)
    cfg, steps = variant("window", tmp_path), itertools.count(1)

    def killed():
        if next(steps) == 5:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        train_image_tokenizer(cfg, SOURCE, tmp_path, CPU, killed)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / IMAGE_TOKENIZER)] == ["step-000004"]


def test_a_loss_that_is_not_finite_changes_nothing_and_many_in_a_row_end_it(tmp_path, few_images, monkeypatch):
    real, calls, broken = train_tokenizers.tokenizer_loss, itertools.count(1), {1, 4, 5}

    def loss(*args):
        value, *rest = real(*args)
        return (value * math.nan if next(calls) in broken else value, *rest)

    monkeypatch.setattr(train_tokenizers, "tokenizer_loss", loss)
    monkeypatch.setattr(train_tokenizers, "MAX_NONFINITE_STEPS", 3)
    cfg = variant("window", tmp_path / "a")
    assert train_image_tokenizer(cfg, SOURCE, cfg.folder, CPU, lambda: False)
    weights = checkpoint.load(cfg.folder / IMAGE_TOKENIZER)[0]["model"]
    assert all(weight.isfinite().all() for weight in weights.values())
    broken |= {8, 9, 10}
    with pytest.raises(UserError, match=r"3 steps in a row .* than --tokenizers\.optim\.lr 0\.003"):
        train_image_tokenizer(cfg, SOURCE, tmp_path / "b", CPU, lambda: False)


def test_a_finished_one_is_left_alone(tmp_path, few_images, monkeypatch):
    cfg = variant("codebook loss", tmp_path)
    train_image_tokenizer(cfg, SOURCE, tmp_path, CPU, lambda: False)
    monkeypatch.setattr(train_tokenizers, "tokenizer_loss", None)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train_image_tokenizer(cfg, SOURCE, tmp_path, CPU, lambda: True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_moving_averages_are_frozen_at_the_end_so_that_the_decoder_can_adapt(tmp_path, few_images):
    cfg, stops = variant("window", tmp_path), itertools.chain([False] * 4, [True], itertools.repeat(False))
    books = []
    for _ in range(2):  # stopped after step 5 of 6; the codebook is frozen from 0.8 of the steps on
        train_image_tokenizer(cfg, SOURCE, tmp_path, CPU, lambda: next(stops))
        books.append(checkpoint.load(tmp_path / IMAGE_TOKENIZER)[0]["model"])
    assert torch.equal(*(book["quantize.embedding.weight"] for book in books))
    assert not torch.equal(*(book["decoder.conv_out.weight"] for book in books))


class Quarters:
    """Images of four squares, each in one of six colours: learnt in a hundred steps."""

    size = None
    palette = np.array(
        [(222, 40, 40), (30, 160, 60), (45, 80, 225), (250, 215, 40), (255, 255, 255), (16, 16, 20)], "u1"
    )

    def __init__(self, seed: int):
        self.seed = seed

    def document(self, index: int) -> list[RawImage]:
        squares = self.palette[np.random.default_rng((self.seed, index)).integers(0, 6, (2, 2))]
        return [RawImage(squares.repeat(8, 0).repeat(8, 1))]


def test_it_learns_to_draw_images_it_has_not_seen(tmp_path, few_images):
    optim = replace(training().optim, warmup_steps=5, lr=1e-2)
    vqgan = replace(SHAPES_VQGAN, resolution=16, ch=8, ch_mult=(1, 1, 1), n_codes=32, z_channels=8, embed_dim=8)
    tokenizers = training(steps=120, warmup_steps=40, batch_size=8, disc_weight=0.0, optim=optim)
    cfg = training_config(tmp_path, vqgan=vqgan, tokenizers=tokenizers)
    train_image_tokenizer(cfg, Quarters(0), tmp_path, CPU, lambda: False)
    image_tokenizer, clean = open_image_tokenizer(tmp_path, cfg.vqgan, CPU), images(Quarters(1), 0, 64)
    codes = image_tokenizer.encode(clean)
    error = np.abs(clean.astype(float) - image_tokenizer.decode(codes)).mean()
    assert error < 0.6 * np.abs(clean - clean.mean(0)).mean()  # that of the mean image
    assert len(torch.unique(codes)) >= 16


# --- its parts -------------------------------------------------------------------------------------------------------


def test_a_finite_source_keeps_the_order_of_older_runs():
    class Five:
        size = 5

        def document(self, i: int) -> int:
            return i

    order = in_training_order(Five(), 3)
    expected = np.random.default_rng((3, 0, zlib.crc32(b"pictures"))).permutation(5)
    assert [order.document(i) for i in range(5)] == expected.tolist()


def test_images_are_those_of_the_documents_in_their_order():
    shuffled = in_training_order(SOURCE, 3)
    shown = images(shuffled, 5, 4)
    assert shown.shape == (4, 32, 32, 3) and shown.dtype == np.uint8
    for i, image in enumerate(shown):
        assert np.array_equal(image, next(s.pixels for s in shuffled.document(5 + i) if isinstance(s, RawImage)))


@pytest.mark.parametrize("window", [None, 8])
def test_the_codebook_starts_on_latents_and_has_one_for_each_different_window(window):
    torch.manual_seed(0)
    vqgan = VQGAN(replace(SHAPES_VQGAN, window=window, n_codes=64))
    x = some_images(8)
    start_codebook(vqgan, x, torch.Generator().manual_seed(0))
    latents = vqgan.latents(x).permute(0, 2, 3, 1).flatten(0, 2).detach()
    book = vqgan.quantize.embedding.weight.detach()
    nearest = (latents - book[nearest_code(latents, book)]).square().sum(1)
    spread = (latents - latents.mean(0)).square().sum(1).mean()
    assert nearest.mean() < 0.1 * spread
    different = len(torch.unique(split_windows(x, 8).flatten(1), dim=0))
    if window:  # fewer different windows than codes: each has its own
        assert different <= 64 and nearest.max() < 1e-4 * spread
    assert torch.equal(vqgan.quantize.sums, book) and (vqgan.quantize.counts == 1).all()


def test_the_reconstruction_loss_is_the_pixels_error_and_that_of_the_edges():
    x, y = some_images(2), some_images(4)[2:]
    perceptual = PerceptualLoss()
    error = (x - y).abs().mean() + (x - y).square().mean()
    plain = reconstruction_loss(x, y, perceptual, training(perceptual_weight=0.0))
    torch.testing.assert_close(plain, error)
    torch.testing.assert_close(
        reconstruction_loss(x, y, perceptual, training(perceptual_weight=0.5)), error + 0.5 * perceptual(x, y)
    )
    assert reconstruction_loss(x, x, perceptual, training(perceptual_weight=0.5)) == 0


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_the_commitment_loss_has_beta_and_the_codebook_loss_has_not(codebook):
    """Both have the same value, the mean squared distance of a latent to its code; only where they pull differs."""
    torch.manual_seed(0)
    vqgan, x = VQGAN(SHAPES_VQGAN), some_images(2)
    t = training(codebook=codebook, commitment_weight=0.125)
    loss, latents, codes, drawn = tokenizer_loss(vqgan, x, True, lambda x, y: (x - y).abs().mean(), t)
    distance = (latents - vqgan.quantize.lookup(codes, 4)).square().mean()
    torch.testing.assert_close(loss, (x - drawn).abs().mean() + (0.125 + (codebook == "loss")) * distance)
    pulled = torch.autograd.grad(loss, vqgan.quantize.embedding.weight, allow_unused=True)[0]
    assert (pulled is None or not pulled.any()) == (codebook == "ema")


def test_before_the_warm_up_ends_nothing_is_quantized():
    torch.manual_seed(0)
    vqgan, x = VQGAN(SHAPES_VQGAN), some_images(2)
    loss, latents, codes, drawn = tokenizer_loss(vqgan, x, False, lambda x, y: (x - y).abs().mean(), training())
    assert codes is None and torch.equal(drawn, vqgan.pixels(latents)) and torch.equal(loss, (x - drawn).abs().mean())


def test_the_adversary_trains_itself_alone_and_pulls_the_decoder_as_hard_as_the_pixels_do():
    torch.manual_seed(0)
    adversary, x = Adversary(training(), CPU), some_images(4)
    last = torch.nn.Parameter(torch.full((1,), 0.5))
    before = [p.detach().clone() for p in adversary.net.parameters()]
    real_over_fake = adversary.net(x).mean() - adversary.net(0.5 * x).mean()
    for _ in range(20):
        y = last * x
        loss = adversary.loss(x, y, (x - y).abs().mean(), last)
    assert last.grad is None and not any(
        torch.equal(a, b) for a, b in zip(before, adversary.net.parameters(), strict=True)
    )
    assert adversary.net(x).mean() - adversary.net(0.5 * x).mean() > real_over_fake
    (pull,), (pixels_pull,) = torch.autograd.grad(loss, last), torch.autograd.grad((x - last * x).abs().mean(), last)
    assert pull.abs().item() == pytest.approx(pixels_pull.abs().item(), rel=0.05)
