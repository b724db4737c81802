"""The tiled scan on NVIDIA GPUs: Triton kernels, library products, and the whole position loop in CUDA graphs."""
