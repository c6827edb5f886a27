"""Measure how well documents are predicted: bits per image code and per byte of text."""

import math
from collections.abc import Sequence

import torch

from nanochameleon.kernels import use_kernels
from nanochameleon.losses import next_token_loss
from nanochameleon.packing import pack
from nanochameleon.training.image_targets import mask_targets
from nanochameleon.training.run import Run


@torch.inference_mode()
def bits(run: Run, documents: Sequence[Sequence[int]], batch_size: int = 16) -> dict[str, float | None]:
    """Return {"bits_per_code", "bits_per_byte"} of documents given as tokens. All but image codes counts as text.

    Left out are documents longer than the context, and tokens the run does not train on, such as prompts. A figure for
    which nothing is left is None.
    """
    seq_len, assistant_eot = run.cfg.model.max_seq_len, run.vocab.eot if run.cfg.train.assistant_only_loss else None
    kept = [list(map(int, document)) for document in documents if len(document) <= seq_len]
    packed = pack(kept, seq_len, run.vocab.pad, assistant_eot)
    packed = mask_targets(packed, run.cfg.train.image_loss, run.cfg.vqgan.codes_per_image, run.vocab)
    n_bytes = len(run.tokenizer.decode_bytes(packed.targets[run.vocab.is_text(packed.targets)].tolist()))
    image_sum = image_count = total = 0.0
    for start in range(0, len(packed.tokens), batch_size):
        batch = packed[start : start + batch_size].to(run.device)
        with use_kernels("auto"):  # in the weights' dtype, for which the kernels requested for training may not exist
            logits = run.model.logits(run.model(batch.tokens, batch.positions, batch.documents).flatten(0, 1))
            sums = next_token_loss(logits, batch.targets.flatten(), run.vocab)
        image_sum += float(sums.image_cross_entropy)
        image_count += float(sums.image_count)
        total += float(sums.cross_entropy)
    return {
        "bits_per_code": image_sum / image_count / math.log(2) if image_count else None,
        "bits_per_byte": (total - image_sum) / n_bytes / math.log(2) if n_bytes else None,
    }
