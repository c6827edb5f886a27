"""Optional. Buys tests of the .cu files without a GPU (tests/kernels/test_emulator.py). Skip on a first reading."""
