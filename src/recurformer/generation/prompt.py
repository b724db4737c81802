"""Prompts: padding them to a batch, and reading them into a cache, in chunks of bounded memory or token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recurformer.cache import KVCache
from recurformer.config import ModelConfig
from recurformer.model import LanguageModel

CHUNK_TOKENS = 2**16  # tokens of all rows together that go through the layers at once on a GPU
CHUNK_ELEMENTS = 2**22  # inner values of the MLP for these tokens, elsewhere: about 0.13 GB of activations at once
SHORTEST = 64  # positions of a chunk at least
STEP_ROWS = 4  # rows up to which recurrent layers read a short prompt fastest token by token
STEP_LENGTH = 256  # tokens of a short prompt; for longer ones a wavefront scan is faster, which starts slowly


def reads_by_steps(model: LanguageModel, step: str, rows: int, length: int) -> tuple[bool, str]:
    """Return whether a prompt goes through the decode step token by token, and why, in words.

    Each token of a recurrent layer needs a pass over most of the layer's weights. The step's passes reach the memory's
    bandwidth from the first on. The passes of the scan serve all rows of a batch, and soon run somewhat faster, because
    several layers work at once.

    Args:
        model: its scan setting and its layers count.
        step: "plain" or "fused".
        rows: B * S.
        length: N, slots of the prompts.
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


def chunk_length(config: ModelConfig, device: torch.device, rows: int) -> int:
    """Return how many positions of a batch of prompts go through the layers at once, so that memory is bounded.

    The bias of standard layers does not count here: attention bounds it by itself.

    Args:
        config: of the model.
        device: of the model.
        rows: B.
    """
    tokens = CHUNK_TOKENS if device.type == "cuda" else CHUNK_ELEMENTS // config.mlp_width
    return max(SHORTEST, tokens // rows)


def read_prompt(
    model: LanguageModel, cache: KVCache, tokens: Tensor, valid: Tensor | None, chunk: int | None = None
) -> Tensor:
    """Append tokens (B, N) to a cache; return the input (B, D) of the output layer at each row's last real token.

    Args:
        model: reads the tokens.
        cache: grows by N slots.
        tokens: (B, N) ids.
        valid: (B, N) bool, False at pads; None: no pads.
        chunk: positions that go through the layers at once; None: as many as keep memory bounded.
    """
    B, N = tokens.shape
    device = tokens.device
    rows, slots = torch.arange(B, device=device), torch.arange(N, device=device)
    last = slots[-1:] if valid is None else (slots * valid).argmax(1)
    found: Tensor | None = None
    chunk = chunk_length(model.config, device, B) if chunk is None else chunk
    for start in range(0, N, chunk):
        stop = min(N, start + chunk)
        part = None if valid is None else valid[:, start:stop]
        options = {"attention_mask": part, "cache": cache, "return_logits": False, "return_hidden": True}
        x = model(tokens[:, start:stop], **options, validate=False).hidden  # a call: hooks fire
        there = x[rows, (last - start).clamp(0, stop - start - 1)]
        here = (start <= last) & (last < stop)
        found = there if found is None else torch.where(here[:, None], there, found)
    assert found is not None
    return found


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Return tokens (B, N) int64, left-padded, and their mask (B, N) bool, from lists of ids of any lengths.

    Raises:
        ValueError: when there is no prompt, or an empty one.
    """
    if not prompts:
        raise ValueError("there are no prompts; give at least one")
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, ids in enumerate(prompts):
        if not len(ids):
            raise ValueError(f"prompt {row} is empty; a prompt needs at least one token, such as the end-of-text id")
        tokens[row, longest - len(ids) :] = torch.as_tensor(ids)
        mask[row, longest - len(ids) :] = True
    return tokens, mask
