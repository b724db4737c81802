"""Initial values of the parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from recurformer.config import ModelConfig
from recurformer.modules import Norm


@torch.no_grad()
def draw_parameters(
    config: ModelConfig, embedding: nn.Embedding, layers: Iterable[nn.Module], norm: Norm, head: nn.Linear | None
) -> None:
    """Draw every parameter of a model anew, from torch's global generator.

    Norm weights are 1 and biases 0. Matrices are normal with these standard deviations, by `config.init`:

    | matrix                | "fan_in"   | "official" (cut at 3 sigma)                 |
    |-----------------------|------------|---------------------------------------------|
    | embedding             | 1/sqrt(D)  | 1/sqrt(D); in both `embedding_std` if given |
    | output                | 1/sqrt(D)  | 1/sqrt(D)                                   |
    | q, k, v, up, gate     | 1/sqrt(D)  | 1/sqrt(D)                                   |
    | o                     | 1/sqrt(HK) | 1/sqrt(2 D (l + 1)), l = 0 the first layer  |
    | down                  | 1/sqrt(F)  | 1/sqrt(2 F (l + 1))                         |

    Args:
        config: shape of the model.
        embedding, layers, norm: its modules, layers from first to last.
        head: its output layer; None where the embedding is it.
    """
    official, D, F = config.init == "official", config.d_model, config.mlp_width

    def draw(weight: Tensor, std: float) -> None:
        if official:
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
        else:
            nn.init.normal_(weight, std=std)

    draw(embedding.weight, D**-0.5 if config.embedding_std is None else config.embedding_std)
    for l, layer in enumerate(layers):
        for name, module in layer.named_children():
            if isinstance(module, Norm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if official and name in ("o_proj", "down_proj"):
                    std = (2 * (D if name == "o_proj" else F) * (l + 1)) ** -0.5
                draw(module.weight, std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    nn.init.ones_(norm.weight)
    if head is not None:
        draw(head.weight, D**-0.5)
