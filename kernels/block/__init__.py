"""The other operations of a transformer block: RMSNorm, SwiGLU, linear layers that share an input, dropout."""
