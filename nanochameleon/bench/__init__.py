"""Optional. Buys proof of every claim about speed (`python -m nanochameleon.bench NAME`): ours next to the peers
that are installed, in one run. Skip on a first reading.
"""
