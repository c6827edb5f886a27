"""Optional. Buys data at scale: files of any size become token shards once, on any number of processes
(`python -m nanochameleon.data.prepare`). Skip on a first reading.
"""
