"""The image tokenizer's training and use, and the likelihood evaluation, on the fake device; runs in the child."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np

from fake_cuda.device import CUDA, fake_tensors
from fake_cuda.recorder import Recorder
from fake_cuda.training_step import VOCAB, WIDE, misplaced, on_device
from nanochameleon.config import TrainConfig, VQGANConfig
from nanochameleon.evaluate.likelihood import bits
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.presets import toy
from nanochameleon.training import train_tokenizers

SIDE = 32
VQGAN_CFG = VQGANConfig(resolution=SIDE, ch=32, ch_mult=(1, 2), n_res_blocks=1, z_channels=16, embed_dim=16, n_codes=64)


def train_image_tokenizer(optim: str, codebook: str) -> dict:
    """Two steps before the codebook and two with it, the last two with a discriminator."""
    cfg = toy()
    settings = dict(steps=4, warmup_steps=2, disc_start=2, disc_weight=0.1, batch_size=2, codebook=codebook)
    tokenizers = replace(cfg.tokenizers, optim=replace(cfg.tokenizers.optim, name=optim), **settings)
    cfg = replace(cfg, vqgan=VQGAN_CFG, tokenizers=tokenizers)
    optimizers, recorder = [], Recorder()

    def no_images(source, start: int, n: int) -> np.ndarray:
        recorder.phase = f"step {start // 2}"
        return np.zeros((min(n, 64), SIDE, SIDE, 3), np.uint8)

    def keep(*arguments) -> None:
        optimizers.append(arguments[3])

    with fake_tensors(), ExitStack() as stack, recorder:
        for name, stand_in in (("images", no_images), ("save_tokenizer", keep), ("in_training_order", lambda *_: None)):
            stack.enter_context(patch.object(train_tokenizers, name, stand_in))
        stack.enter_context(patch.object(train_tokenizers, "START_VECTORS", 64))
        done = train_tokenizers.train_image_tokenizer(cfg, None, Path("none"), CUDA, lambda: False)
    return {"done": done, "syncs": recorder.syncs, "mixed": recorder.mixed, "misplaced": misplaced(optimizers[0])}


def use_image_tokenizer() -> dict:
    with fake_tensors(), Recorder() as recorder:
        tokenizer = ImageTokenizer(VQGAN(VQGAN_CFG).to(CUDA))
        codes = tokenizer.encode(np.zeros((3, SIDE, SIDE, 3), np.uint8), 2)
        images = tokenizer.decode(codes, 2)
    return {"shapes": [list(codes.shape), list(images.shape)], "syncs": recorder.syncs, "mixed": recorder.mixed}


def likelihood() -> dict:
    cfg = replace(toy(), model=WIDE, train=TrainConfig(seq_len=4_096))
    tokenizer = SimpleNamespace(decode_bytes=lambda tokens: bytes(len(tokens)))
    documents = [[VOCAB.bos, *range(VOCAB.first_text, VOCAB.first_text + n)] for n in (300, 2_000, 4_000)]
    with fake_tensors(), Recorder(4_096) as recorder:
        run = SimpleNamespace(cfg=cfg, vocab=VOCAB, tokenizer=tokenizer, model=on_device(WIDE).eval(), device=CUDA)
        bits(run, documents, 2)
    return {"syncs": recorder.syncs, "mixed": recorder.mixed, "dense": recorder.dense}


def everything() -> dict:
    kinds = [("muon", "ema"), ("adamw", "loss")]
    found = {f"training, {optim}, {codebook}": train_image_tokenizer(optim, codebook) for optim, codebook in kinds}
    return found | {"use": use_image_tokenizer(), "likelihood": likelihood()}
