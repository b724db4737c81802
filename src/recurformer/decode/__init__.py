"""Decoding: static buffers, and the step from one token to the next."""
