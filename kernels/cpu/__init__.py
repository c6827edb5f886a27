"""What CPU kernels are built from: SIMD registers in Numba, 2^x, matmul tiles, threads, malloc."""
