"""Optional. Buys fast generation on a CPU (`python -m nanochameleon.bench engine`): whole decode steps in compiled code.
Skip on a first reading.
"""
