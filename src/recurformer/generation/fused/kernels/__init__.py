"""Triton kernels of one decode step. Importing this package needs Triton.

For a single row (B = 1) a layer takes five kernels: `normed_product` (queries, keys, values), `attend`,
`residual_product` (attention outputs), `normed_product` (up) and `residual_product` (down). Each reads its weights or
pairs once and is bound by that. For more rows the products are the library's, with row-wise kernels between them.

Programmatic dependent launch (PDL) starts a kernel while the kernels before it still run. The kernel first loads
weights and old pairs into registers, because no kernel of the step writes those. Then it waits for its inputs.
*Before `await_kernel` a kernel reads nothing that a kernel of the same step writes, and writes nothing at all.*

Buffers:
- x, y, z: (B, D) float32.
- raw: (B, (H + 2 G) K), queries, keys and values as the product leaves them. With DEFER as many rows follow, whose keys
  and values belong to the slot before.
- partial and lse: attention over S parts of the memory, (B, S, H K) and log2-sum-exps (B, S, H), float32.

Statistics of norms, softmax and sums are float32.
"""

from recurformer.generation.fused.kernels.attention import attend, combine
from recurformer.generation.fused.kernels.heads import store_pairs
from recurformer.generation.fused.kernels.products import normed_product, residual_product
from recurformer.generation.fused.kernels.rows import activate, add_and_norm, embed, remember

__all__ = [
    "activate",
    "add_and_norm",
    "attend",
    "combine",
    "embed",
    "normed_product",
    "remember",
    "residual_product",
    "store_pairs",
]
