"""Attention: the plain reference, its first steps in loops, and the fast versions for CPUs and GPUs."""
