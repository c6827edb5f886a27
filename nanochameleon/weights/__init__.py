"""Optional. Buys models from other projects and for them (`python -m nanochameleon.convert`): tensor files, the three
layouts, a model by its path. Skip on a first reading.
"""
