"""The exact tiling in PyTorch operations, on any device, with a hand-written backward."""
