"""The decode step in Triton kernels: how its weights, blocks and launches are arranged, and the kernels themselves."""
