"""Optional. Buys several GPUs or machines (`torchrun train.py ...`): the mesh of ranks, sharded tensors, and how a
model is spread over them. Skip on a first reading.
"""
