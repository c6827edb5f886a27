"""Measurements beside torch, torch.compile and peers, in one process: `python -m nanochameleon.bench NAME`."""
