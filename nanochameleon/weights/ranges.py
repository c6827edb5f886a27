"""The numbers that a configuration may hold, by the dotted name of the field, on the command line and in every file."""

import math
from operator import attrgetter
from types import SimpleNamespace

from nanochameleon.errors import shown

MAX_NUMBER = 2**63 - 1  # the largest whole number of torch and numpy

ALLOWED = (  # (range in words, range as a test, fields); every entry of a tuple has to pass
    ("at least 0", lambda x: 0 <= x < math.inf, (
        "seed", "optim.warmup_steps", "optim.eps", "optim.weight_decay", "optim.min_lr_ratio", "tokenizers.n_merges",
        "tokenizers.warmup_steps", "tokenizers.optim.warmup_steps", "tokenizers.optim.eps",
        "tokenizers.optim.weight_decay", "tokenizers.optim.min_lr_ratio", "tokenizers.commitment_weight",
        "tokenizers.dead_code_threshold", "tokenizers.perceptual_weight", "tokenizers.disc_weight",
        "tokenizers.disc_start", "train.z_loss", "sample.temperature", "sample.image_temperature",
        "sample.guidance_scale", "sample.image_guidance_scale",
    )),
    ("at least 1", lambda x: 1 <= x < math.inf, (
        "vqgan.ch", "vqgan.ch_mult", "vqgan.n_res_blocks", "vqgan.z_channels", "vqgan.embed_dim", "vqgan.n_codes",
        "vqgan.n_groups", "model.vocab_size", "model.n_layers", "model.n_kv_heads", "model.multiple_of",
        "tokenizers.n_texts", "tokenizers.steps", "tokenizers.batch_size", "tokenizers.disc_channels",
        "data.n_documents", "train.steps", "train.batch_size", "train.log_every", "train.sample_every",
        "train.save_every", "train.keep_checkpoints", "sample.top_k", "sample.image_top_k", "sample.max_new_tokens",
        "evaluation.images", "evaluation.answers", "evaluation.reconstructions", "evaluation.alignment",
        "parallel.tensor_parallel", "parallel.micro_batch", "parallel.timeout",
    )),
    ("above 0", lambda x: 0 < x < math.inf, (
        "model.ffn_dim_multiplier", "optim.lr", "optim.grad_clip", "tokenizers.optim.lr",
        "tokenizers.optim.grad_clip", "train.sample_minutes", "sample.repetition_penalty",
    )),
    ("at least 0 and less than 1", lambda x: 0 <= x < 1, (
        "model.dropout", "optim.betas", "tokenizers.optim.betas", "tokenizers.ema_decay", "sample.min_p",
        "sample.image_min_p",
    )),
    ("from 1 to 8,192", lambda x: 1 <= x <= 2**13, ("vqgan.resolution",)),  # pixels: as large as images may be
    ("from 1 to 16,777,216", lambda x: 1 <= x <= 2**24, ("model.max_seq_len",)),  # positions that float32 tells apart
    ("above 0 and at most 1", lambda x: 0 < x <= 1, ("model.norm_eps", "sample.top_p", "sample.image_top_p")),
    ("above 0 and at most 1e12", lambda x: 0 < x <= 1e12, ("model.rope_theta",)),
    ("from 0 to 1", lambda x: 0 <= x <= 1, ("train.image_token_noise", "train.image_token_noise_end")),
)  # fmt: skip


def out_of_range(**sections: object) -> str | None:
    """Return a sentence about the first number that is out of range, or None if all are allowed.

    sections: the fields of a RunConfig to check.
    """
    cfg = SimpleNamespace(**sections)
    for words, allowed, names in ALLOWED:
        for name in (name for name in names if name.partition(".")[0] in sections):
            value = attrgetter(name)(cfg)
            for x in value if isinstance(value, tuple) else (value,):
                if x is not None and not allowed(x):
                    return f"{name} must be {words}, not {shown(x)}"
                if isinstance(x, int) and x > MAX_NUMBER:
                    return f"{name} must be at most {MAX_NUMBER}, not {shown(x)}"
    return None
