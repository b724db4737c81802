"""How much a layer's output at one position depends on its input at another: Jacobian norms over distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurformer.checks import check_inputs
from recurformer.choose import choose_scan
from recurformer.model import LanguageModel


@dataclass(frozen=True)
class PositionGradients:
    """Gains |d z_j / d x_i| / sqrt(D) in the Frobenius norm; 1 is what the identity has."""

    queries: tuple[int, ...]  # the positions j
    gains: Tensor  # (len(queries), N): root mean square over the rows of the batch; 0 for i > j

    def over_distance(self, query: int = -1) -> Tensor:
        """Gains of one query by distance: entry d is the gain from i = j - d, (j + 1,).

        Args:
            query: index into `queries`.
        """
        j = self.queries[query]
        return self.gains[query, : j + 1].flip(0)


def jacobian_gains(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    queries: Sequence[int],
    *,
    probes: int | None = 8,
    seed: int = 0,
) -> PositionGradients:
    """Gains of any map of sequences.

    Args:
        function: (B, N, D) to (B, N, D'), rows independent of each other.
        x: (B, N, D), where the Jacobian is taken.
        queries: positions j of the output, from 0.
        probes: random directions, of +1 and -1, by which each Frobenius norm is estimated without bias in the square;
            None: every direction, exact.
        seed: of the directions.
    """
    N = x.shape[1]
    if probes is not None and probes < 1:
        raise ValueError(f"probes is {probes}; it must be at least 1, or None for all directions")
    for j in queries:
        if not 0 <= j < N:
            raise ValueError(f"query {j} is no position of {N}; positions count from 0")
    x = x.detach().requires_grad_()
    z = function(x)
    width = z.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    gains = []
    for j in queries:
        if probes is None:
            directions = torch.eye(width, dtype=z.dtype, device=z.device)
        else:
            signs = torch.randint(0, 2, (probes, width), generator=generator)
            directions = (2 * signs - 1).to(z)
        total = torch.zeros(N, dtype=torch.float64, device=x.device)
        for u in directions:
            (grad,) = torch.autograd.grad((z[:, j] * u).sum(), x, retain_graph=True)
            total += grad.double().square().sum(-1).mean(0)
        # The squares of all `width` directions sum to the squared norm; random ones stand for `width / width`.
        gains.append((total / (len(directions) if probes is not None else 1) / width).sqrt())
    return PositionGradients(tuple(queries), torch.stack(gains))


def position_gradients(
    model: LanguageModel,
    tokens: Tensor,
    queries: Sequence[int] | None = None,
    *,
    probes: int | None = 8,
    seed: int = 0,
) -> PositionGradients:
    """Gains from the embedded tokens x_i to the last layer's output z_j, before the final norm (paper section 4).

    Args:
        model: of recurrent and standard layers in any mix; left as it is.
        tokens: (B, N), where the Jacobian is taken; gains are root mean squares over the rows.
        queries: positions j; None: the last one.
        probes, seed: as in `jacobian_gains`.

    Returns:
        PositionGradients: `.over_distance()` gives the gain at distance 0, 1, ...

    Raises:
        ValueError: for tokens or positions that do not fit.
    """
    check_inputs(model.config, tokens, device=model.embedding.weight.device)
    B, N = tokens.shape
    layout = model.layout(N)
    scan, _ = choose_scan(model.scan, model.config, tokens.device, batch_size=B, length=N, together=False)

    def layers(x: Tensor) -> Tensor:
        for index, layer in enumerate(model.layers):
            x = layer(x, layout, scan, None, index)
        return x

    x = model.embedding.weight.detach()[tokens.long()]
    with torch.enable_grad():
        return jacobian_gains(layers, x, [N - 1] if queries is None else queries, probes=probes, seed=seed)
