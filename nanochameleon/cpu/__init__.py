"""A whole decode step in compiled code, for a CPU: threads, products, layers, the choice of the next id."""
