"""Everything a training run needs around the model: objective, checkpoints, recovery, logs, signals, tokenizers."""
