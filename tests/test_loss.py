"""The fused loss: what it makes of the library's kernels, which stand-ins replace here, and when it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_all_close, assert_close, gradients, random_tokens, tiny
from torch import Tensor

from recurformer import LanguageModel, choose, loss, model
from recurformer.choose import choose_loss
from recurformer.loss import IGNORE


class Library(torch.autograd.Function):
    """liger-kernel's function as to its habits: gradients are made in the forward, only if x wants one, and multiplied
    in place in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        ctx.wanted = ctx.needs_input_grad[:2] if ctx.needs_input_grad[0] else (False, False)
        with torch.enable_grad():
            x, weight = (t.detach().requires_grad_() for t in (x, weight))
            total = F.cross_entropy(F.linear(x, weight, bias).float(), targets, ignore_index=IGNORE, reduction="sum")
            ctx.gradients = torch.autograd.grad(total, (x, weight))
        return total.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (
            *(g.mul_(gradients[0]) if want else None for g, want in zip(ctx.gradients, ctx.wanted, strict=True)),
            None,
            None,
        )


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Takes the fused loss on the CPU; shapes of the weights that the library was given."""
    calls: list[tuple[int, ...]] = []

    def library(weight: Tensor, x: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(tuple(weight.shape))
        return Library.apply(x, weight, targets, bias)  # pyright: ignore[reportReturnType]

    monkeypatch.setattr(loss, "liger_loss", lambda: library)
    monkeypatch.setattr(model, "choose_loss", lambda device, dtype: ("fused", "a test"))
    return calls


def fused_loss_of(language_model: LanguageModel, tokens: Tensor, targets: Tensor) -> Tensor:
    found = language_model(tokens, targets=targets, return_logits=False).loss
    assert found is not None
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"vocab_multiple": 64}, {"vocab_multiple": 64, "tie_embeddings": True}],
    ids=["exact", "padded", "padded-tied"],
)
def test_loss_and_gradients_are_the_plain_ones(options: dict[str, Any], fused: list[tuple[int, ...]]):
    language_model = tiny(**options)
    tokens, targets = random_tokens(3, 11), random_tokens(3, 11, seed=2)
    targets[0, :7] = IGNORE
    plain = language_model(tokens, targets=targets).loss
    found = fused_loss_of(language_model, tokens, targets)
    assert len(fused) == 1
    assert fused[0] == (language_model.config.padded_vocab_size, 32)  # a width of whole blocks
    assert found.dtype == torch.float32
    assert_close(found, plain)
    assert_all_close(gradients(language_model, 3 * found), gradients(language_model, 3 * plain))
    with torch.no_grad():
        assert_close(fused_loss_of(language_model, tokens, targets), plain)


@pytest.mark.usefixtures("fused")
def test_two_backward_passes_give_the_same():
    language_model, tokens, targets = tiny(), random_tokens(2, 5), random_tokens(2, 5, seed=2)
    found = fused_loss_of(language_model, tokens, targets)
    weight = language_model.head.weight
    first, second = (torch.autograd.grad(found, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    squared = fused_loss_of(language_model, tokens, targets).square()  # its gradient depends on the loss itself
    (again,) = torch.autograd.grad(squared, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("trained", ["head", "body"])
def test_frozen_parts(trained: str):
    language_model, tokens, targets = tiny(), random_tokens(2, 5), random_tokens(2, 5, seed=2)
    expected = gradients(language_model, language_model(tokens, targets=targets).loss)
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_(name.startswith("head.") == (trained == "head"))
    fused_loss_of(language_model, tokens, targets).backward()
    for name, parameter in language_model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert_close(parameter.grad, expected[name])
        else:
            assert parameter.grad is None


@pytest.mark.usefixtures("fused")
def test_no_target_at_all_gives_zero():
    language_model, tokens = tiny(), random_tokens(2, 5)
    found = fused_loss_of(language_model, tokens, torch.full_like(tokens, IGNORE))
    found.backward()
    assert found.item() == 0
    assert all(not p.grad.any() for p in language_model.parameters() if p.grad is not None)


def test_bfloat16_products_keep_a_float32_loss(fused: list[tuple[int, ...]]):
    language_model, tokens, targets = tiny(), random_tokens(2, 9), random_tokens(2, 9, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_loss_of(language_model, tokens, targets)
        plain = language_model(tokens, targets=targets).loss
    assert len(fused) == 1
    assert found.dtype == torch.float32
    assert_close(found, plain, 2e-2 * plain.item())


def test_where_the_fused_loss_runs(monkeypatch: pytest.MonkeyPatch):
    assert choose_loss(torch.device("cpu"))[0] == "chunked"
    monkeypatch.setattr(choose, "liger_version", lambda: None)
    name, why = choose_loss(torch.device("cuda"))
    assert (name, "recurformer[gpu]" in why) == ("chunked", True)
    monkeypatch.setattr(choose, "liger_version", lambda: "1.2.3")
    assert choose_loss(torch.device("cuda")) == (
        "fused", "liger-kernel 1.2.3: logits and their gradient in one pass, by blocks"
    )  # fmt: skip
    assert choose_loss(torch.device("cuda"), torch.float64)[0] == "chunked"
