"""Reading prompts into a cache: through the scan, in chunks whose memory is bounded, or token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from recurformer.cache import KVCache
from recurformer.config import ModelConfig
from recurformer.model import LanguageModel

CHUNK_TOKENS = 2**16  # of all rows together, that go through the layers at once
BIAS_ELEMENTS = 2**27  # of the bias that a standard layer adds to the scores of a chunk and what was before it
SHORTEST = 64  # positions of a chunk
STEP_ROWS = 4  # up to which recurrent layers read a short prompt fastest token by token
STEP_LENGTH = 256  # tokens of a short prompt: a scan of layers side by side takes a while to get going


def reads_by_steps(model: LanguageModel, step: str, rows: int, length: int) -> tuple[bool, str]:
    """Whether a prompt goes through the decode step token by token, and why, in words.

    A token of a recurrent layer needs a pass over most of the layer's weights wherever it is made. The step's passes
    are at the memory's bandwidth from the first on; those of the scan are shared by the rows of a batch and, layers
    being side by side, soon somewhat faster.

    Args:
        step: "plain" or "fused".
        rows, length: of the batch of prompts.
    """
    if step != "fused":
        return False, "the scan reads prompts; steps are as fast only where they are fused"
    if model.scan != "auto":
        return False, f"the scan {model.scan!r} was asked for"
    if "standard" in model.config.layer_kinds:
        return False, "standard layers take all tokens of a prompt at once"
    if rows > STEP_ROWS:
        return False, f"{rows} rows share a scan's passes over the weights; steps pay up to {STEP_ROWS}"
    if length > STEP_LENGTH:
        return False, f"a scan overtakes the steps within {STEP_LENGTH} of {length} tokens"
    return True, f"every token needs a pass over the weights, and {rows} rows share little of a scan's"


def chunk_length(config: ModelConfig, rows: int, past: int, new: int, requested: int | None) -> int:
    """Positions of the next chunk of a prompt.

    Args:
        past, new: slots filled, and positions left.
        requested: the caller's choice, as it is; None: what keeps memory bounded.
    """
    if requested is not None:
        return requested
    chunk = max(SHORTEST, CHUNK_TOKENS // rows)
    if past > 0 and "standard" in config.layer_kinds:
        chunk = min(chunk, max(SHORTEST, BIAS_ELEMENTS // (config.n_heads * (past + new))))
    return chunk


def read_prompt(
    model: LanguageModel, cache: KVCache, tokens: Tensor, valid: Tensor | None, chunk: int | None = None
) -> Tensor:
    """Append tokens (B, N) to a cache; what the output layer reads of each row's last real token, (B, D).

    Args:
        valid: (B, N) bool, False at pads; None: no pads.
        chunk: positions that go through the layers at once; None: as memory allows.
    """
    B, N = tokens.shape
    device = tokens.device
    rows, slots = torch.arange(B, device=device), torch.arange(N, device=device)
    last = slots[-1:] if valid is None else (slots * valid).argmax(1)
    found: Tensor | None = None
    start = 0
    while start < N:
        stop = min(N, start + chunk_length(model.config, B, cache.length, N - start, chunk))
        part = None if valid is None else valid[:, start:stop]
        x = model.hidden(tokens[:, start:stop], part, cache=cache)
        there = x[rows, (last - start).clamp(0, stop - start - 1)]
        here = (start <= last) & (last < stop)
        found = there if found is None else torch.where(here[:, None], there, found)
        start = stop
    assert found is not None
    return found
