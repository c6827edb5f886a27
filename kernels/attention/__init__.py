"""Attention: the plain reference, the ladder of loops that leads to the fast versions, and those for CPUs and GPUs."""
