"""The rest of a transformer block: RMSNorm, SwiGLU, joined linear layers, dropout."""
