"""A site with the smallest model, in memory: random weights, images of 4 x 4 pixels and 4 codes."""

import tiny
import torch

from nanochameleon.config import VQGANConfig
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.run import Run
from nanochameleon.web.site import Site
from nanochameleon.web.worker import Worker


def tiny_run(
    tokenizer: TextTokenizer = tiny.TOKENIZER, can_draw: bool = True, cfg: VQGANConfig = tiny.TINY_VQGAN
) -> Run:
    torch.manual_seed(0)
    vqgan = VQGAN(cfg)
    if not can_draw:
        vqgan.decoder = None
    return Run(tiny.tiny_config(), tiny.VOCAB, tokenizer, ImageTokenizer(vqgan), tiny.tiny_model())


def tiny_site(**more) -> Site:
    """more: fields of Site, and `run`."""
    run = more.pop("run", None) or tiny_run()
    return Site("tiny", run, Worker(run, n_slots=4), **more)
