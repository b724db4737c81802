"""Checks of what `LanguageModel.forward` is called with, before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from recurformer.cache import KVCache
from recurformer.config import ModelConfig
from recurformer.loss import IGNORE


def check_inputs(
    config: ModelConfig,
    device: torch.device,
    tokens: Tensor,
    targets: Tensor | None,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    cache: KVCache | None,
    use_cache: bool,
    return_logits: bool,
    validate: bool | None,
) -> Tensor | None:
    """Raise ValueError on what `LanguageModel.forward` can't take; return the new tokens' mask (None: all real)."""
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be integer ids of shape (B, N), not {tokens.dtype} of {tuple(tokens.shape)}")
    B, N = tokens.shape
    if B == 0 or N == 0:
        raise ValueError(f"tokens have shape {(B, N)}; at least one row and one position are needed")
    for name, tensor in {"targets": targets, "document_ids": document_ids}.items():
        if tensor is not None and (tensor.shape != tokens.shape or tensor.is_floating_point()):
            raise ValueError(
                f"{name} must be integers of the tokens' shape {(B, N)}, not {tensor.dtype} of {tuple(tensor.shape)}"
            )
    for name, tensor in {
        "tokens": tokens, "targets": targets, "document_ids": document_ids, "attention_mask": attention_mask,
    }.items():  # fmt: skip
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} are on {tensor.device}, the model on {device}; move one of them")
    if not return_logits and targets is None:
        raise ValueError("return_logits=False without targets would compute nothing; give targets")
    if document_ids is not None and (cache is not None or use_cache):
        raise ValueError(
            "document_ids and a cache do not go together; call without the cache, or one document at a time"
        )
    P = 0
    if cache is not None:
        cache.check(config, B, N, device)
        P = cache.length
    if validate is None:
        validate = device.type == "cpu"

    valid = attention_mask
    if attention_mask is not None:
        if tuple(attention_mask.shape) not in {(B, N), (B, P + N)}:
            expected = f"{(B, N)}" if P == 0 else f"{(B, N)} for the new tokens or {(B, P + N)} for all"
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {expected}")
        if (
            validate
            and attention_mask.dtype != torch.bool
            and not ((attention_mask == 0) | (attention_mask == 1)).all()
        ):
            raise ValueError("attention_mask holds values other than 0 and 1; 1 marks a real token, 0 padding")
        valid = attention_mask.bool()
        if cache is not None and valid.shape[1] == P + N and P > 0:
            if not torch.equal(valid[:, :P], cache.valid[:, :P]):
                raise ValueError(
                    f"attention_mask's first {P} columns disagree with what the cache remembers; "
                    f"pass the mask of the {N} new tokens alone"
                )
            valid = valid[:, P:]
        if valid.all():  # a mask of ones is no mask, bit for bit
            valid = None
    if validate:
        real = tokens if valid is None else tokens[valid]
        if real.numel() and (real.min() < 0 or real.max() >= config.vocab_size):
            worst = real.min() if real.min() < 0 else real.max()
            raise ValueError(
                f"token id {int(worst)} is outside the vocabulary of {config.vocab_size} (0 to {config.vocab_size - 1})"
            )
        if targets is not None:
            wrong = targets[(targets != IGNORE) & ((targets < 0) | (targets >= config.vocab_size))]
            if wrong.numel():
                raise ValueError(
                    f"target {int(wrong[0])} is outside the vocabulary of {config.vocab_size}; -100 means ignore"
                )
        if document_ids is not None and (document_ids.long().diff(dim=1) < 0).any():
            raise ValueError("document_ids decrease along a row; documents must be contiguous, with non-decreasing ids")
    return valid
