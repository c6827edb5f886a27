"""What kernels on a CPU are built from: registers in Numba, 2^x, matmul tiles, threads, memory."""
