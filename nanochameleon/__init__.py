"""nanochameleon: the smallest complete Chameleon (arXiv 2405.09818). Start at train.py or docs/architecture.md."""
