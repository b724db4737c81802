"""Decoding: one token of every row a step, in static buffers, as one CUDA graph where there is a GPU."""
