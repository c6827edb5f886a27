"""The older names of a configuration's fields: read in config.json of older runs, and suggested on the command line."""

RENAMED = {  # class -> older name -> today's
    "OptimConfig": {"warmup": "warmup_steps", "final": "min_lr_ratio", "clip": "grad_clip"},
    "TokenizerTraining": {
        "beta": "commitment_weight",
        "dead_below": "dead_code_threshold",
        "perceptual": "perceptual_weight",
        "adversarial": "disc_weight",
        "adversarial_from": "disc_start",
        "discriminator_ch": "disc_channels",
    },
    "DataConfig": {"live": "tokenize_on_the_fly"},
    "StageConfig": {"share": "fraction"},
    "TrainConfig": {
        "pictures": "image_loss",
        "answers_only": "assistant_only_loss",
        "code_noise": "image_token_noise",
        "keep": "keep_checkpoints",
    },
    "ParallelConfig": {"mode": "data_parallel", "tensor": "tensor_parallel", "recompute": "activation_checkpointing"},
    "SamplingParams": {
        "guidance": "guidance_scale",
        "guidance_image": "image_guidance_scale",
        "max_new": "max_new_tokens",
    },
    "EvalConfig": {"pictures": "images"},
    # a checkpoint's state.json, and a line of metrics.jsonl
    "Progress": {"passed": "skipped_batches", "left_out": "skipped_updates", "failed": "nonfinite_streak"},
    "metrics": {"left_out": "skipped_updates", "ids": "tokens_with_padding"},
}


def with_new_names(kind: str, content: dict) -> dict:
    """The fields of one class, as config.json has them, under today's names and with today's values."""
    names = RENAMED.get(kind, {})
    content = {names.get(name, name): value for name, value in content.items()}
    if kind == "ParallelConfig" and isinstance(content.get("compile"), bool):  # before it could be "auto"
        content["compile"] = "on" if content["compile"] else "off"
    return content
