"""Runs the same .cu files on a CPU: g++ compiles them, threads are fibres."""
