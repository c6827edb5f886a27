"""Cross-entropy with z-loss, with and without the output layer: references and fast versions."""
