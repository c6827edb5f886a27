"""Optional. Buys training on several GPUs or machines (`torchrun train.py ...`). Skip on a first reading.

mesh.py holds the ranks and their collectives, sharding.py helpers for sharded tensors. apply.py spreads a model, and
vocab_parallel.py is the loss of logits that are split over ranks.
"""
