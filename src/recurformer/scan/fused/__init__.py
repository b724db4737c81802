"""The tiled scan on NVIDIA GPUs: Triton kernels, library products, and the whole position loop in CUDA graphs.

From the outside in: `scan` (functions of tensors), `call` (one evaluation), `table` (its addresses and sizes in device
memory), `memory` (what it keeps), `shape`, `engines` (engines of the shapes met before), `engine` (graphs), `forward`
and `backward` (the order of all launches), `launches` (those that both passes share), `products`, `workspace` and
`weights` (buffers), `kernels`. The files before `engine` import no Triton.
"""
