"""Optional. Buys the matrix unit of newer Intel Xeons (`python -m nanochameleon.bench kernels`).
Skip on a first reading.
"""
