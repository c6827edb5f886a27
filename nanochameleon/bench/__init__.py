"""Optional. Buys proof of every claim about speed (`python -m nanochameleon.bench NAME`). Skip on a first reading.

Each bench runs ours next to the peers that are installed, in one process.
"""
