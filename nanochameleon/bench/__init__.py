"""Speed beside the peers that are installed, in one run: `python -m nanochameleon.bench engine`."""
