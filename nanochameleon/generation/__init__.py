"""From a prompt to text and images: sampling, the grammar of what may come next, and a batched engine."""
