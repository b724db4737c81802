"""The tiled scan: the paper's exact tiling in PyTorch operations, on any device.

Read `scan.py` (the entry), `forward.py` and `backward.py` (the two passes), `blocks.py` (attention between blocks of
positions), `stack.py` (the equations of several layers at once) and `derivatives.py` (derivatives of their parts).
"""
