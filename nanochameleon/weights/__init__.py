"""Optional. Buys models from other projects, and for them (`python -m nanochameleon.convert`). Skip on a first reading.

It holds tensor files, the three layouts, and how a model is opened by its path.
"""
