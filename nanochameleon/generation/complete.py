"""The library in one call: a prompt of text and images -> text and images.

run = open_model("runs/toy")
complete(run, "a red circle")[0].save("circle.png")
complete(run, "circle.png", "what shape is it?")    ->  ["a circle"]
"""

from dataclasses import replace

import PIL.Image
import torch

from nanochameleon.documents import Image, Text
from nanochameleon.errors import UserError
from nanochameleon.generation.events import stream
from nanochameleon.generation.prompts import MODALITY, Mode, prompt_tokens, read_segments, resolve_mode, stop_tokens
from nanochameleon.images.tokenizer import NO_DECODER
from nanochameleon.training.run import Run


def complete(run: Run, *prompt: str, mode: Mode | None = None, seed: int = 0) -> list[str | PIL.Image.Image]:
    """Return what the model generates after a prompt, in order: strings and images of resolution x resolution pixels.

    prompt: words and paths of image files, in any order. mode: what to ask for; None decides as sample.py does. Raises
    UserError for an unknown mode, an image that cannot be read, and a model without an image decoder.
    """
    if mode not in (None, *MODALITY):
        raise UserError(f"mode is one of {', '.join(MODALITY)}, not {mode!r}")
    mode, segments = resolve_mode(mode or "auto", read_segments(prompt, run.cfg.vqgan.resolution, "crop"), run.cfg)
    if MODALITY[mode] != "text" and not run.image_tokenizer.can_draw:
        raise UserError(NO_DECODER)
    image_len, stops = run.image_tokenizer.n_codes_per_image, stop_tokens(mode, run.vocab)
    tokens, params, modality = prompt_tokens(segments, run, mode), run.cfg.sample, MODALITY[mode]
    if mode == "draw":  # an image is an image, whatever the run's limit of tokens
        params = replace(params, max_new_tokens=image_len + 1)  # with <eoi>
    parts: list[str | PIL.Image.Image] = []
    for event in stream(run.model, tokens, run.tokenizer, image_len, params, modality, seed, stops=stops):
        if isinstance(event, Image):
            pixels = run.image_tokenizer.decode(torch.tensor([event.codes]))[0]  # uint8 (R, R, 3)
            parts.append(PIL.Image.fromarray(pixels))
        elif isinstance(event, Text) and parts and isinstance(parts[-1], str):
            parts[-1] += event.text
        elif isinstance(event, Text):
            parts.append(event.text)
    return parts
