"""Triton kernels of the fused scan: attention, norms, activations, and some matrix products.

They work on L stacked layers; one layer by itself is L = 1. Files by subject: `table` (addresses and sizes of a call),
`common` (waits, exponentials, activations, norms), `heads` (one row of heads), then the kernels that the engine
launches: `rows`, `attention` and `products` of the forward, `attention_gradients` and `gradients` of the backward.

Rows of activations are (position, batch). Tensors of a call are q, a and ga (L, N, B, H K), and pairs
(L, P + N, B, 2 G K) with keys first. The products with Q, K and V, (L, N, B, (H + 2 G) K), and the MLP's inner values,
(L, N, B, F or 2 F), exist where the forward keeps them. x and z are (B, N, D), float32. The slot of a pair holds its
temporary pair until the position is reached. Buffers of a chunk are (L, C, B, ...), and r names a position inside the
chunk. Norm statistics, softmax and sums are float32, offsets 64 bits.
"""

from recurformer.scan.fused.kernels.attention import attend_leaf, merge_keys
from recurformer.scan.fused.kernels.attention_gradients import leaf_gradient, merged_keys_gradient, query_gradient
from recurformer.scan.fused.kernels.gradients import (
    activation_gradient,
    attended_gradient,
    heads_gradient,
    input_gradient,
    output_gradient,
    pair_gradient,
)
from recurformer.scan.fused.kernels.products import activate_rows, product_thin, product_tiled
from recurformer.scan.fused.kernels.rows import (
    attended_rows,
    finished_rows,
    inputs_to_heads,
    keep_chunk,
    load_attended,
    norm_chunk,
    store_chunk_pairs,
)

__all__ = [
    "activate_rows",
    "activation_gradient",
    "attend_leaf",
    "attended_gradient",
    "attended_rows",
    "finished_rows",
    "heads_gradient",
    "input_gradient",
    "inputs_to_heads",
    "keep_chunk",
    "leaf_gradient",
    "load_attended",
    "merge_keys",
    "merged_keys_gradient",
    "norm_chunk",
    "output_gradient",
    "pair_gradient",
    "product_thin",
    "product_tiled",
    "query_gradient",
    "store_chunk_pairs",
]
