"""Image files to tokens and back: the quantizer, the VQGAN, its losses, and the tokenizer around them."""
