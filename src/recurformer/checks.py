"""Checks of the arguments of `LanguageModel.forward`, before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from recurformer.cache import KVCache
from recurformer.config import ModelConfig
from recurformer.loss import IGNORE


def check_inputs(
    config: ModelConfig,
    tokens: Tensor,
    *,
    device: torch.device,
    targets: Tensor | None = None,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    cache: KVCache | None = None,
    use_cache: bool = False,
    validate: bool | None = None,
) -> Tensor | None:
    """Return the mask of the new tokens, (B, N) bool; None when all are real.

    Args:
        config: of the model.
        tokens, targets, attention_mask, document_ids, cache, use_cache, validate: as `LanguageModel.forward`.
        device: of the model.

    Raises:
        ValueError: for arguments that the model cannot take, naming the value, the limit and the remedy.
    """
    check_shapes(tokens, targets, document_ids)
    B, N = tokens.shape
    tensors = {"tokens": tokens, "targets": targets, "document_ids": document_ids, "attention_mask": attention_mask}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} are on {tensor.device}, the model on {device}; move one of them")
    if document_ids is not None and (cache is not None or use_cache):
        raise ValueError(
            "document_ids and a cache do not go together; call without the cache, or one document at a time"
        )
    if cache is not None:
        cache.check(config, B, N, device)
    validate = device.type == "cpu" if validate is None else validate
    valid = None if attention_mask is None else new_mask(attention_mask, B, N, cache, validate)
    if validate:
        check_values(config.vocab_size, tokens if valid is None else tokens[valid], targets, document_ids)
    return valid


def widened(ids: Tensor) -> Tensor:
    """Return ids of a wide unsigned type, as shards of tokens hold them, as int64. Others stay as they are.

    PyTorch cannot compare, shift or look up with uint16, uint32 and uint64.
    """
    return ids.long() if ids.dtype in (torch.uint16, torch.uint32, torch.uint64) else ids


def check_shapes(tokens: Tensor, targets: Tensor | None, document_ids: Tensor | None) -> None:
    """Raise ValueError unless all are integers of one shape (B, N), neither of them zero."""
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


def new_mask(attention_mask: Tensor, B: int, N: int, cache: KVCache | None, validate: bool) -> Tensor | None:
    """Return the part of a mask that belongs to the new tokens, (B, N) bool; None when all are real.

    Raises:
        ValueError: for another shape, other values than 0 and 1, or a past that differs from the cache's.
    """
    P = 0 if cache is None else cache.length
    if tuple(attention_mask.shape) not in {(B, N), (B, P + N)}:
        expected = f"{(B, N)}" if P == 0 else f"{(B, N)} for the new tokens or {(B, P + N)} for all"
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {expected}")
    if validate and attention_mask.dtype != torch.bool and not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("attention_mask holds values other than 0 and 1; 1 marks a real token, 0 padding")
    valid = attention_mask.bool()
    if cache is not None and valid.shape[1] == P + N and P > 0:
        if not torch.equal(valid[:, :P], cache.valid[:, :P]):
            raise ValueError(
                f"attention_mask's first {P} columns disagree with what the cache remembers; "
                f"pass the mask of the {N} new tokens alone"
            )
        valid = valid[:, P:]
    return None if valid.all() else valid  # a mask of ones is no mask, bit for bit


def check_values(vocab_size: int, real: Tensor, targets: Tensor | None, document_ids: Tensor | None) -> None:
    """Raise ValueError for ids outside the vocabulary or document ids that decrease; `real` are ids without pads."""
    if real.numel() and (real.min() < 0 or real.max() >= vocab_size):
        worst = real.min() if real.min() < 0 else real.max()
        raise ValueError(f"token id {int(worst)} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})")
    if targets is not None:
        wrong = targets[(targets != IGNORE) & ((targets < 0) | (targets >= vocab_size))]
        if wrong.numel():
            raise ValueError(f"target {int(wrong[0])} is outside the vocabulary of {vocab_size}; -100 means ignore")
    if document_ids is not None and (document_ids.long().diff(dim=1) < 0).any():
        raise ValueError("document_ids decrease along a row; documents must be contiguous, with non-decreasing ids")
