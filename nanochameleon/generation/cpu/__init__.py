"""Optional. Buys fast generation on a CPU (`python -m nanochameleon.bench engine`): a whole decode step in compiled
code. Skip on a first reading.
"""
