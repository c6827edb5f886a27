"""What a training run needs around the model: objective, checkpoints, logs, signals, the tokenizers' training."""
