"""Optional. Buys the paper's text benchmarks: files in two shapes, candidate scoring, MMLU, written answers."""
