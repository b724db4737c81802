"""The tiled scan: the paper's exact tiling in PyTorch operations, on any device.

Read `scan.py` (the entry), `forward.py`, `backward.py`, and for the arithmetic `blocks.py` and `stack.py`.
"""
