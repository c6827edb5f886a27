"""Generation: from a prompt to text and images. Sampling, the grammar of what may come next, and a batched engine."""
