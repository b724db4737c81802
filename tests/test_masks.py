"""Padding and packed documents: what is hidden has no influence at all, and what is left is as if it stood alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    V,
    assert_all_close,
    assert_close,
    every_scan,
    gradients,
    layer_of,
    logits_and_loss,
    logits_of,
    loss_of,
    random_tokens,
    tiny,
)
from torch import Tensor

from recurformer import LanguageModel

OPTIONS: dict[str, dict[str, Any]] = {
    "alibi": {},
    "rope": {"position": "rope", "n_kv_heads": 2, "qk_norm": "full"},
    "no-positions": {"position": "none"},
    "standard": {"layers": "standard", "position": "rope"},
    "hybrid": {"layers": "first:1", "norm": "layer"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())

MASKS: dict[str, list[list[int]]] = {
    "left": [[0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9],
    "right": [[1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0], [1] * 9],
    "interior": [[1, 0, 1, 0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1, 0, 1, 0], [1] * 9],
}
every_mask = pytest.mark.parametrize("mask", [torch.tensor(mask) for mask in MASKS.values()], ids=MASKS.keys())


# --- padding ---------------------------------------------------------------------------------------------------------


@every_scan
@every_option
@every_mask
def test_padded_rows_equal_each_row_alone(mask: Tensor, options: dict[str, Any], scan: str):
    model, tokens = tiny(scan=scan, dtype=torch.float64, **options), random_tokens(3, 9)
    with torch.no_grad():
        logits = logits_of(model, tokens, attention_mask=mask)
        for row, real in enumerate(mask.bool()):
            assert_close(logits[row, real], logits_of(model, tokens[row, real][None])[0])
    assert torch.isfinite(logits).all()


@every_scan
@every_mask
def test_padded_losses_and_gradients_are_those_of_the_rows_alone(mask: Tensor, scan: str):
    model, tokens = tiny(scan=scan, dtype=torch.float64, layers="first:1"), random_tokens(3, 9)
    real = mask.bool()
    targets = random_tokens(3, 9, seed=2).masked_fill(~real, -100)
    loss = loss_of(model, tokens, targets=targets, attention_mask=mask)
    alone = sum(
        loss_of(model, tokens[row, real[row]][None], targets=targets[row, real[row]][None]) * real[row].sum()
        for row in range(3)
    )
    expected = alone / real.sum()
    assert isinstance(expected, Tensor)
    assert_close(loss, expected)
    assert_all_close(gradients(model, loss), gradients(model, expected))


@every_scan
@every_option
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8], ids=str)
def test_a_mask_of_ones_is_no_mask_bit_for_bit(dtype: torch.dtype, options: dict[str, Any], scan: str):
    model, tokens = tiny(scan=scan, **options), random_tokens(2, 9)
    masked = logits_of(model, tokens, attention_mask=torch.ones(2, 9, dtype=dtype))
    assert torch.equal(masked, logits_of(model, tokens))


@every_scan
@every_mask
def test_what_stands_under_a_pad_changes_no_bit(mask: Tensor, scan: str):
    model, tokens = tiny(scan=scan, layers="first:1"), random_tokens(3, 9, vocabulary=90)
    real = mask.bool()
    outcomes = []
    for pad in (0, 96, -1, V + 5):  # ids at pads may be anything
        padded = tokens.masked_fill(~real, pad)
        targets = tokens.masked_fill(~real, -100)
        logits, loss = logits_and_loss(model, padded, targets=targets, attention_mask=mask)
        outcomes.append((logits[real], gradients(model, loss)))
    for logits, grads in outcomes[1:]:
        assert torch.equal(logits, outcomes[0][0])
        assert all(torch.equal(grads[name], outcomes[0][1][name]) for name in grads)
    assert torch.equal(outcomes[0][1]["embedding.weight"][96], torch.zeros(32))


@every_scan
@every_option
def test_nan_in_the_pad_embedding_reaches_nothing(options: dict[str, Any], scan: str):
    model, tokens = tiny(scan=scan, **options), 1 + random_tokens(3, 9, vocabulary=90)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1, 1], [0] * 9, [1] * 9])
    real = mask.bool()
    expected = logits_of(model, tokens, attention_mask=mask)
    with torch.no_grad():
        model.embedding.weight[[0, 96]] = float("nan")
    for pad in (0, 96):
        padded = tokens.masked_fill(~real, pad)
        targets = tokens.masked_fill(~real, -100)
        logits, loss = logits_and_loss(model, padded, targets=targets, attention_mask=mask)
        assert torch.equal(logits[real], expected[real])
        assert torch.isfinite(logits).all()
        grads = gradients(model, loss)
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        assert not grads["embedding.weight"][pad].any()


@every_scan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [OPTIONS["alibi"], OPTIONS["rope"], OPTIONS["standard"]], ids=["alibi", "rope", "standard"]
)
def test_a_row_of_nothing_but_pads_disturbs_nobody(options: dict[str, Any], dtype: torch.dtype, scan: str):
    model, tokens = tiny(scan=scan, dtype=dtype, **options), random_tokens(2, 7)
    mask = torch.tensor([[0] * 7, [0, 0, 0, 1, 1, 1, 1]])
    targets = random_tokens(2, 7, seed=2).masked_fill(mask == 0, -100)
    logits, loss = logits_and_loss(model, tokens, targets=targets, attention_mask=mask)
    assert torch.isfinite(logits).all()
    grads = gradients(model, loss)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    other = logits_of(model, tokens[1:], attention_mask=mask[1:])
    assert_close(logits[1, 3:].float(), other[0, 3:].float(), 1e-5 if dtype == torch.float32 else 2e-2)
    nothing = loss_of(model, tokens[:1], targets=targets[:1], attention_mask=mask[:1])
    assert nothing == 0
    assert not any(grad.any() for grad in gradients(model, nothing).values())


@every_scan
@every_option
def test_gradients_at_slack_slots_are_exactly_zero(options: dict[str, Any], scan: str, request: pytest.FixtureRequest):
    """10 real tokens in rows of 16, in fresh memory full of NaN."""
    model = tiny(scan=scan, **options)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, 10:] = False
    request.getfixturevalue("poisoned_memory")
    for index in range(2):
        layer, layout = layer_of(model, index), model.layout(16, mask)
        x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        z = layer(x, layout, scan)
        grads = torch.autograd.grad(z[mask].square().sum(), [x, *layer.parameters()])
        assert not grads[0][~mask].any()
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert grads[0][mask].abs().amax(-1).min() > 0


# --- packed documents ------------------------------------------------------------------------------------------------


def packed(*lengths: int, rows: int = 2) -> Tensor:
    """document_ids (rows, N) of documents of the given lengths."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(rows, -1)


@every_scan
@every_option
@pytest.mark.parametrize("border", [3, 7, 8, 33])
def test_a_document_sees_nothing_of_the_one_before(border: int, options: dict[str, Any], scan: str):
    model, tokens = tiny(scan=scan, **options), random_tokens(1, border + 9)
    documents = packed(border, 9, rows=1)
    changed = tokens.clone()
    changed[0, border - 1] = (changed[0, border - 1] + 1) % V
    changed[0, 0] = (changed[0, 0] + 1) % V
    with torch.no_grad():
        one, other = (logits_of(model, t, document_ids=documents) for t in (tokens, changed))
        assert torch.equal(one[:, border:], other[:, border:])
        assert not torch.equal(one[:, border - 1], other[:, border - 1])
        free, free_changed = (logits_of(model, t) for t in (tokens, changed))
    assert not torch.equal(free[:, border:], free_changed[:, border:])


@every_scan
@every_option
@pytest.mark.parametrize("lengths", [(3, 6), (8, 1, 5), (1, 1, 7, 4)], ids=str)
def test_packed_documents_equal_each_alone(lengths: tuple[int, ...], options: dict[str, Any], scan: str):
    model, tokens = tiny(scan=scan, dtype=torch.float64, **options), random_tokens(2, sum(lengths))
    with torch.no_grad():
        logits = logits_of(model, tokens, document_ids=packed(*lengths))
        for piece, document in zip(logits.split(lengths, 1), tokens.split(lengths, 1), strict=True):
            assert_close(piece, logits_of(model, document), 1e-12)


@every_scan
def test_packed_gradients_are_the_sum_over_the_documents(scan: str):
    model, tokens = tiny(scan=scan, dtype=torch.float64, layers="first:1"), random_tokens(2, 12)
    targets = random_tokens(2, 12, seed=2)
    together = gradients(model, loss_of(model, tokens, targets=targets, document_ids=packed(7, 5)) * 24)
    pieces = zip(tokens.split((7, 5), 1), targets.split((7, 5), 1), strict=True)
    alone = [gradients(model, loss_of(model, t, targets=w) * w.numel()) for t, w in pieces]
    assert_all_close(together, {name: alone[0][name] + alone[1][name] for name in together})


@every_scan
def test_the_loss_of_one_document_has_no_gradient_in_another(scan: str):
    model = tiny(scan=scan, layers="first:1")
    tokens = torch.cat([random_tokens(1, 7, vocabulary=40), 50 + random_tokens(1, 6, vocabulary=40)], dim=1)
    targets = random_tokens(1, 13, seed=2)
    targets[:, :7] = -100
    grads = gradients(model, loss_of(model, tokens, targets=targets, document_ids=packed(7, 6, rows=1)))
    assert not grads["embedding.weight"][:50].any()
    assert grads["embedding.weight"][50:].any()


@every_scan
def test_documents_may_differ_from_row_to_row_and_their_ids_may_skip(scan: str):
    model, tokens = tiny(scan=scan, dtype=torch.float64, position="rope"), random_tokens(3, 8)
    documents = torch.tensor([[5, 5, 5, 9, 9, 9, 9, 9], [0] * 8, [-3, 0, 2, 2, 2, 70, 70, 70]])
    with torch.no_grad():
        logits = logits_of(model, tokens, document_ids=documents)
        for row in range(3):
            for document in documents[row].unique():
                inside = documents[row] == document
                assert_close(logits[row, inside], logits_of(model, tokens[row, inside][None])[0])


@every_scan
@every_option
def test_documents_with_pads(options: dict[str, Any], scan: str):
    model, tokens = tiny(scan=scan, dtype=torch.float64, **options), random_tokens(2, 12)
    documents = packed(5, 4, 3)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        logits = logits_of(model, tokens, document_ids=documents, attention_mask=mask)
        assert torch.isfinite(logits).all()
        for row in range(2):
            for document in range(3):
                inside = (documents[row] == document) & mask[row].bool()
                if inside.any():
                    assert_close(logits[row, inside], logits_of(model, tokens[row, inside][None])[0])


@every_scan
def test_one_document_is_no_document_ids(scan: str):
    model, tokens = tiny(scan=scan), random_tokens(2, 9)
    assert_close(logits_of(model, tokens, document_ids=torch.full_like(tokens, 4)), logits_of(model, tokens))


# --- fresh memory ----------------------------------------------------------------------------------------------------


@every_scan
@every_option
def test_results_do_not_depend_on_what_fresh_memory_contained(
    options: dict[str, Any], scan: str, request: pytest.FixtureRequest
):
    model, tokens = tiny(scan=scan, **options), random_tokens(2, 13)

    def everything(model: LanguageModel) -> dict[str, Tensor]:
        mask = torch.ones(2, 13).tril(8)
        loss = loss_of(model, tokens, attention_mask=mask) + loss_of(model, tokens, document_ids=packed(4, 9))
        with torch.no_grad():
            cache = model(tokens[:, :6], use_cache=True).cache
            steps = [logits_of(model, t, cache=cache) for t in tokens[:, 6:].split([1, 1, 5], 1)]
        return {"steps": torch.cat(steps, 1), "loss": loss, **gradients(model, loss)}

    clean = everything(model)
    request.getfixturevalue("poisoned_memory")
    poisoned = everything(model)
    assert all(torch.equal(clean[name], poisoned[name]) for name in clean)
