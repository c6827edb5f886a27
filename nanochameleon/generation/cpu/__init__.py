"""Optional. Buys fast generation on a CPU: whole decode steps in compiled code (`python -m nanochameleon.bench engine`).
Skip on a first reading.
"""
