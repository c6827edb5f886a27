"""How kernels run on a GPU: compiled with NVRTC, launched through CuPy; the headers that they share."""
