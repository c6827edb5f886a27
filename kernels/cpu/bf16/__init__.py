"""Optional. Buys bfloat16 matmuls on AMX tiles (newer Intel Xeons) and by VDPBF16PS (AMD since Zen 4), for attention
and weights' gradients (`python -m nanochameleon.bench kernels`). Skip on a first reading.
"""
