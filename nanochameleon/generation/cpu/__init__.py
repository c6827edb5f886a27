"""Optional. Buys fast generation on a CPU: compiled decode steps (`python -m nanochameleon.bench engine`). Skip on a
first reading.
"""
