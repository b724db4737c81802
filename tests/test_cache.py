"""Continuing a cache is the same computation as one call: in any pieces, after roll-back, fork and reordering."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from helpers import V, assert_all_close, assert_close, every_scan, gradients, logits_of, loss_of, random_tokens, tiny
from torch import Tensor

from recurformer import KVCache, LanguageModel, ModelConfig
from recurformer.cache import FIRST_CAPACITY

POSITIONS: dict[str, dict[str, Any]] = {
    "alibi": {},
    "rope": {"position": "rope", "n_kv_heads": 2},
    "hybrid": {"layers": ("standard", "recurrent", "standard"), "n_layers": 3, "position": "rope"},
    "standard": {"layers": "standard", "n_kv_heads": 1},
}
every_position = pytest.mark.parametrize("options", POSITIONS.values(), ids=POSITIONS.keys())


def in_pieces(
    model: LanguageModel, tokens: Tensor, sizes: list[int], cache: KVCache | None = None
) -> tuple[Tensor, KVCache]:
    """Logits (B, N, V) and the cache of tokens (B, N) fed in pieces of the given sizes."""
    cache = new_cache(model, tokens.shape[0]) if cache is None else cache
    with torch.no_grad():
        logits = [logits_of(model, piece, cache=cache) for piece in tokens.split(sizes, dim=1)]
    return torch.cat(logits, dim=1), cache


def new_cache(model: LanguageModel, rows: int, max_length: int | None = None) -> KVCache:
    return KVCache(model.config, rows, max_length, dtype=model.embedding.weight.dtype)


def assert_same_cache(one: KVCache, other: KVCache, tolerance: float | None = None) -> None:
    assert one.length == other.length
    assert torch.equal(one.valid[:, : one.length], other.valid[:, : other.length])
    for layer in range(one.config.n_layers):
        for a, b in zip(one.past(layer), other.past(layer), strict=True):
            assert_close(a, b, tolerance)


# --- pieces ----------------------------------------------------------------------------------------------------------


@every_scan
@every_position
def test_one_token_a_step_equals_full_forwards_of_every_length(options: dict[str, Any], scan: str):
    model, tokens = tiny(scan=scan, dtype=torch.float64, **options), random_tokens(2, 64)
    steps, cache = in_pieces(model, tokens, [1] * 64)
    assert cache.length == 64
    with torch.no_grad():
        for length in (1, 2, 3, 7, 8, 9, 31, 64):
            assert_close(steps[:, :length], logits_of(model, tokens[:, :length]))


@every_scan
@every_position
def test_float32_steps_and_forwards_are_both_right_and_repeat_bit_for_bit(options: dict[str, Any], scan: str):
    model, tokens = tiny(scan=scan, **options), random_tokens(2, 31)
    with torch.no_grad():
        exact = logits_of(tiny(scan=scan, dtype=torch.float64, **options), tokens)
        assert_close(logits_of(model, tokens).double(), exact, 1e-5)
    steps, _ = in_pieces(model, tokens, [1] * 31)
    assert_close(steps.double(), exact, 1e-5)
    assert torch.equal(steps, in_pieces(model, tokens, [1] * 31)[0])


@every_scan
@every_position
def test_every_split_of_a_sequence_gives_the_same_logits_and_cache(options: dict[str, Any], scan: str):
    model, tokens = tiny(scan=scan, dtype=torch.float64, **options), random_tokens(2, 12)
    full, whole = in_pieces(model, tokens, [12])
    splits = [[first, 12 - first] for first in range(1, 12)] + [[5, 4, 3], [1, 10, 1], [1, 1, 10], [3, 8, 1]]
    for sizes in splits:
        logits, cache = in_pieces(model, tokens, sizes)
        assert_close(logits, full)
        assert_same_cache(cache, whole)


def test_decoding_sees_the_slopes(monkeypatch: pytest.MonkeyPatch):
    model, tokens = tiny(), random_tokens(1, 9)
    logits, _ = in_pieces(model, tokens, [8, 1])
    monkeypatch.setattr("recurformer.attention.alibi_slopes", lambda heads, *_, **__: torch.zeros(heads))
    flat, _ = in_pieces(model, tokens, [8, 1])
    assert (logits[:, -1] - flat[:, -1]).abs().max() > 1e-3


def test_a_call_returns_the_cache_it_was_given_and_appends_in_place():
    model, tokens = tiny(), random_tokens(1, 7)
    cache = new_cache(model, 1)
    out = model(tokens[:, :4], cache=cache)
    assert out.cache is cache
    assert cache.length == 4
    kept = cache.clone()
    model(tokens[:, 4:], cache=cache)
    assert (cache.length, kept.length) == (7, 4)
    _, expected = in_pieces(model, tokens[:, :4], [4])
    assert_same_cache(kept, expected)


def test_use_cache_starts_one_and_without_it_there_is_none():
    model, tokens = tiny(), random_tokens(2, 5)
    cache = model(tokens, use_cache=True).cache
    assert cache is not None
    assert (cache.length, cache.batch_size, cache.max_length) == (5, 2, None)
    assert model(tokens).cache is None
    _, expected = in_pieces(model, tokens, [5])
    assert_same_cache(cache, expected)


def test_use_cache_changes_no_logits():
    model, tokens = tiny(), random_tokens(2, 5)
    assert_close(logits_of(model, tokens, use_cache=True), logits_of(model, tokens))


# --- capacity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[FIRST_CAPACITY, 1], [FIRST_CAPACITY - 1, 2, 1], [5, 3 * FIRST_CAPACITY]])
def test_growth_keeps_what_was_stored(pieces: list[int]):
    model, tokens = tiny(dtype=torch.float64, n_layers=1), random_tokens(1, sum(pieces))
    full, _ = in_pieces(model, tokens, [sum(pieces)])
    logits, cache = in_pieces(model, tokens, pieces)
    assert_close(logits, full)
    assert cache.capacity >= cache.length


@every_scan
def test_a_fixed_capacity_can_be_filled_exactly(scan: str):
    model, tokens = tiny(scan=scan, dtype=torch.float64), random_tokens(2, 16)
    logits, cache = in_pieces(model, tokens, [10, 6], new_cache(model, 2, 16))
    assert cache.capacity == 16
    assert_close(logits, in_pieces(model, tokens, [16])[0])


def test_exceeding_a_fixed_capacity_is_refused_before_any_work():
    model, tokens = tiny(), random_tokens(1, 17)
    cache = new_cache(model, 1, 16)
    with pytest.raises(ValueError, match=r"0 cached \+ 17 new tokens exceed the cache's max_length 16"):
        model(tokens, cache=cache)
    assert cache.length == 0
    in_pieces(model, tokens[:, :10], [10], cache)
    kept = cache.clone()
    with pytest.raises(ValueError, match=r"10 cached \+ 7 new tokens exceed the cache's max_length 16"):
        model(tokens[:, 10:], cache=cache)
    assert_same_cache(cache, kept, 0.0)
    after, _ = in_pieces(model, tokens[:, 10:16], [6], cache)  # still usable
    assert_close(after, in_pieces(model, tokens[:, :16], [10, 6])[0][:, 10:])


# --- roll-back, fork, reordering -------------------------------------------------------------------------------------


@every_scan
@every_position
@pytest.mark.parametrize("kept", [0, 3, 8, 9, 11, 12])
def test_cropping_equals_a_fresh_run_on_what_was_kept(kept: int, options: dict[str, Any], scan: str):
    model, tokens, others = (
        tiny(scan=scan, dtype=torch.float64, **options),
        random_tokens(2, 12),
        random_tokens(2, 3, seed=5),
    )
    _, cache = in_pieces(model, tokens, [8, 4])
    cache.crop(kept)
    assert cache.length == kept
    logits, cache = in_pieces(model, others, [2, 1], cache)
    joined = torch.cat([tokens[:, :kept], others], dim=1)
    full, expected = in_pieces(model, joined, [kept + 3])
    assert_close(logits, full[:, kept:])
    assert_same_cache(cache, expected)


def test_cropping_forgets_the_mask_of_what_was_dropped():
    model, tokens = tiny(dtype=torch.float64), random_tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    cache = new_cache(model, 2)
    model(tokens, attention_mask=mask, cache=cache)
    cache.crop(4)
    assert_close(logits_of(model, tokens[:, 4:], cache=cache), logits_of(model, tokens)[:, 4:])


def test_cropping_keeps_the_mask_of_what_stays():
    model, tokens = tiny(dtype=torch.float64), random_tokens(1, 6)
    cache = new_cache(model, 1)
    model(tokens, attention_mask=torch.tensor([[0, 1, 1, 1, 0, 1]]), cache=cache)
    cache.crop(4)
    assert_close(logits_of(model, tokens[:, 4:], cache=cache), logits_of(model, tokens[:, 1:])[:, 3:])


@pytest.mark.parametrize("n", [-1, 6])
def test_cropping_outside_the_filled_slots_is_refused(n: int):
    model = tiny()
    _, cache = in_pieces(model, random_tokens(1, 5), [5])
    with pytest.raises(ValueError, match=f"can't crop to {n} slots; the cache holds 5"):
        cache.crop(n)


def test_a_fork_and_its_origin_are_independent():
    model, tokens = tiny(dtype=torch.float64), random_tokens(2, 9)
    _, cache = in_pieces(model, tokens[:, :5], [5])
    fork = cache.clone()
    one, _ = in_pieces(model, tokens[:, 5:], [4], cache)
    other, _ = in_pieces(model, random_tokens(2, 4, seed=9), [1, 3], fork)
    assert_close(one, in_pieces(model, tokens, [9])[0][:, 5:])
    joined = torch.cat([tokens[:, :5], random_tokens(2, 4, seed=9)], dim=1)
    assert_close(other, in_pieces(model, joined, [9])[0][:, 5:])


@pytest.mark.parametrize("rows", [[1, 0], [2, 2, 0, 1], [1]])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
def test_selected_rows_continue_as_themselves(rows: list[int], as_tensor: bool):
    model, tokens = tiny(dtype=torch.float64), random_tokens(3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    cache = new_cache(model, 3)
    model(tokens, attention_mask=mask, cache=cache)
    chosen = cache.select(torch.tensor(rows) if as_tensor else rows)
    assert (chosen.batch_size, chosen.length) == (len(rows), 5)
    more = random_tokens(len(rows), 3, seed=4)
    logits = logits_of(model, more, cache=chosen)
    for row, source in enumerate(rows):
        alone = torch.cat([tokens[source, mask[source].bool()], more[row]])[None]
        assert_close(logits[row], logits_of(model, alone)[0, -3:])
    assert cache.length == 5


@pytest.mark.parametrize("rows", [[], [0, 3], [-1], [[0]], [0.5]], ids=str)
def test_rows_that_are_not_there_are_refused(rows: Any):
    with pytest.raises(ValueError, match="rows"):
        KVCache(ModelConfig(), 3).select(rows)


# --- masks -----------------------------------------------------------------------------------------------------------


@every_scan
@pytest.mark.parametrize("shape", ["new", "all"])
def test_the_mask_of_a_continued_call_covers_the_new_tokens_or_all(shape: str, scan: str):
    model, tokens = tiny(scan=scan, dtype=torch.float64), random_tokens(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        full = logits_of(model, tokens, attention_mask=mask)
        cache, parts, end = new_cache(model, 2), [], 0
        for size in (5, 3, 1):
            start, end = end, end + size
            given = mask[:, start:end] if shape == "new" else mask[:, :end]
            parts.append(logits_of(model, tokens[:, start:end], attention_mask=given, cache=cache))
    real = mask.bool()
    assert_close(torch.cat(parts, dim=1)[real], full[real])


@every_scan
@every_position
def test_pads_of_the_prompt_stay_invisible_at_every_later_step(options: dict[str, Any], scan: str):
    model, tokens = tiny(scan=scan, dtype=torch.float64, **options), random_tokens(2, 15)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    cache = new_cache(model, 2)
    model(tokens[:, :7], attention_mask=mask, cache=cache)
    steps, _ = in_pieces(model, tokens[:, 7:], [1] * 8, cache)
    with torch.no_grad():
        assert_close(steps[:1], logits_of(model, tokens[:1, 4:])[:, 3:])
        assert_close(steps[1:], logits_of(model, tokens[1:])[:, 7:])


def test_a_mask_that_contradicts_the_cache_is_refused():
    model, tokens = tiny(), random_tokens(2, 5)
    cache = new_cache(model, 2)
    model(tokens[:, :3], attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), cache=cache)
    with pytest.raises(ValueError, match="first 3 columns disagree with what the cache remembers"):
        model(tokens[:, 3:], attention_mask=torch.ones(2, 5), cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\)"):
        model(tokens[:, 3:], attention_mask=torch.ones(2, 4), cache=cache)
    assert cache.length == 3


# --- training --------------------------------------------------------------------------------------------------------


@every_scan
@pytest.mark.parametrize("options", [{}, POSITIONS["hybrid"]], ids=["recurrent", "hybrid"])
def test_cached_pairs_are_constants_of_the_gradient(options: dict[str, Any], scan: str):
    """The gradient is the finite difference of the loss with the cache held fixed."""
    model, tokens = tiny(scan=scan, dtype=torch.float64, **options), random_tokens(2, 9)
    _, cache = in_pieces(model, tokens[:, :5], [5])
    grads = gradients(model, loss_of(model, tokens[:, 5:], cache=cache.clone()))
    generator = torch.Generator().manual_seed(3)
    directions = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
    expected = 0.0
    step = 1e-5
    with torch.no_grad():
        for sign in (1, -1):
            for name, parameter in model.named_parameters():
                parameter += sign * step * directions[name]
            expected += sign * loss_of(model, tokens[:, 5:], cache=cache.clone()).item() / (2 * step)
            for name, parameter in model.named_parameters():
                parameter -= sign * step * directions[name]
    found = sum((grads[name] * directions[name]).sum().item() for name in grads)
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(expected) > 1e-3


@every_scan
@pytest.mark.parametrize("options", [{}, POSITIONS["hybrid"]], ids=["recurrent", "hybrid"])
def test_two_calls_then_one_backward(options: dict[str, Any], scan: str):
    """Truncated backpropagation through time: later calls overwrite nothing that an earlier graph needs."""
    model, tokens = tiny(scan=scan, dtype=torch.float64, **options), random_tokens(2, 10)
    targets = random_tokens(2, 10, seed=2)
    cache, losses = new_cache(model, 2, 10), []
    for piece, wanted in zip(tokens.split([4, 3, 3], 1), targets.split([4, 3, 3], 1), strict=True):
        losses.append(loss_of(model, piece, targets=wanted, cache=cache))
    together = gradients(model, torch.stack(losses).sum())

    apart: dict[str, Tensor] = {}
    cache = new_cache(model, 2, 10)
    for piece, wanted in zip(tokens.split([4, 3, 3], 1), targets.split([4, 3, 3], 1), strict=True):
        part = gradients(model, loss_of(model, piece, targets=wanted, cache=cache))
        apart = {name: apart.get(name, 0) + grad for name, grad in part.items()}
    assert_all_close(together, apart, 1e-12)


def test_the_buffers_require_no_gradient():
    model = tiny()
    cache = model(random_tokens(1, 4), use_cache=True).cache
    assert cache is not None
    assert not any(t.requires_grad for t in (*cache.keys, *cache.values))


# --- dtypes and refusals ---------------------------------------------------------------------------------------------


@every_scan
def test_a_lower_precision_cache_serves_a_higher_precision_model(scan: str):
    model, tokens = tiny(scan=scan, layers="first:1"), random_tokens(2, 12)
    cache = KVCache(model.config, 2, dtype=torch.bfloat16)
    logits, _ = in_pieces(model, tokens, [7, 1, 4], cache)
    assert cache.keys[0].dtype == torch.bfloat16
    with torch.no_grad():
        full = logits_of(model, tokens)
    assert torch.isfinite(logits).all()
    assert 0 < (logits - full).norm() / full.norm() < 2e-2


def test_a_started_cache_has_the_compute_dtype():
    for model, dtype in ((tiny(), torch.float32), (tiny(dtype=torch.bfloat16), torch.bfloat16)):
        cache = model(random_tokens(1, 3), use_cache=True).cache
        assert cache is not None
        assert cache.keys[0].dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        cache = tiny()(random_tokens(1, 3), use_cache=True).cache
    assert cache is not None
    assert cache.values[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: KVCache(dataclasses.replace(c, n_kv_heads=2), 2), "another model .n_kv_heads 2 against None"),
        (lambda c: KVCache(c, 3), "cache has 3 rows, the tokens 2"),
        (lambda c: KVCache(c, 2, device="meta"), "cache is on meta, the model on cpu"),
        (lambda c: KVCache(c, 2, 4), r"0 cached \+ 5 new tokens exceed the cache's max_length 4"),
    ],
    ids=["model", "batch", "device", "length"],
)  # fmt: skip
def test_a_cache_that_does_not_fit_is_refused(make: Any, message: str):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        model(random_tokens(2, 5), cache=make(model.config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1, "max_length": 0}, "max_length is 0"),
        ({"batch_size": 1, "dtype": torch.int64}, "dtype is torch.int64"),
    ],
    ids=["batch", "length", "dtype"],
)
def test_a_cache_that_makes_no_sense_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        KVCache(ModelConfig(), **options)


def test_documents_and_a_cache_do_not_go_together():
    model, tokens = tiny(), random_tokens(1, 4)
    for options in ({"use_cache": True}, {"cache": new_cache(model, 1)}):
        with pytest.raises(ValueError, match="document_ids and a cache do not go together"):
            model(tokens, document_ids=torch.zeros_like(tokens), **options)


def test_what_a_cache_tells_of_itself():
    cache = KVCache(ModelConfig(n_kv_heads=2), 3, 10, dtype=torch.bfloat16)
    assert repr(cache) == "KVCache(length=0, batch_size=3, max_length=10)"
    assert cache.nbytes == 3 * 10 * cache.config.kv_bytes_per_token(2)


def test_random_orders_of_operations_agree_with_full_forwards():
    """Feed, crop, fork and reorder at random; the cache always stands for the tokens that it should."""
    model = tiny(dtype=torch.float64, n_layers=1, position="rope")
    generator = torch.Generator().manual_seed(0)
    rows = random_tokens(2, 3)
    _, cache = in_pieces(model, rows, [3])
    for operation in itertools.islice(itertools.cycle(["feed", "crop", "feed", "select", "feed", "clone"]), 24):
        size = int(torch.randint(1, 4, (), generator=generator))
        if operation == "feed":
            new = torch.randint(0, V, (rows.shape[0], size), generator=generator)
            rows = torch.cat([rows, new], dim=1)
            logits, cache = in_pieces(model, new, [size], cache)
            with torch.no_grad():
                assert_close(logits, logits_of(model, rows)[:, -size:])
        elif operation == "crop":
            kept = max(0, cache.length - size)
            cache.crop(kept)
            rows = rows[:, :kept]
        elif operation == "select":
            chosen = torch.randint(0, rows.shape[0], (2,), generator=generator)
            cache, rows = cache.select(chosen), rows[chosen]
        else:
            cache = cache.clone()


# --- inference mode --------------------------------------------------------------------------------------------------


@every_scan
@pytest.mark.parametrize("change", ["as it is", "clone", "select", "crop", "grown", "trained"])
def test_a_cache_made_in_inference_mode_is_continued_outside(change: str, scan: str):
    model = tiny(layers="first:1", scan=scan)
    first, rest = random_tokens(2, 70, seed=4), random_tokens(2, 60, seed=5)
    expected = model(torch.cat([first, rest], dim=1)).logits[:, 70:]
    with torch.inference_mode():
        cache = model(first, use_cache=True).cache
        if change == "crop":
            model(rest[:, :3], cache=cache)
    if change == "crop":
        cache.crop(70)
    elif change == "clone":
        cache = cache.clone()
    elif change == "select":
        cache = cache.select([0, 1])
    if change == "trained":
        found = model(rest, cache=cache).logits
        found.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    else:
        parts = (20, 60) if change == "grown" else (60,)  # 70 + 60 slots: beyond what a cache begins with
        with torch.no_grad():
            found = torch.cat(
                [model(part, cache=cache).logits for part in rest.tensor_split(parts, dim=1)[: len(parts)]], 1
            )
    assert_close(found, expected)
    with torch.inference_mode():  # and back
        model(rest[:, :1], cache=cache)


def test_a_cache_changed_in_inference_mode_is_continued_outside():
    model, tokens = tiny(), random_tokens(2, 9)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).cache
    with torch.inference_mode():
        changed = [cache.clone(), cache.select([0, 1])]
        changed[0].reserve(200)
    with torch.no_grad():
        expected = model(tokens, cache=cache).logits
        for one in changed:
            assert torch.equal(model(tokens, cache=one).logits, expected)


def test_a_cache_over_given_buffers_shares_them():
    model = tiny()
    cache = new_cache(model, 2)
    model(random_tokens(2, 5), cache=cache)
    shared = KVCache.over(
        model.config, cache.keys, cache.values, cache.valid, length=cache.length, padded=cache.padded, max_length=8
    )
    assert (shared.length, shared.capacity, shared.batch_size, shared.max_length) == (5, cache.capacity, 2, 8)
    model(random_tokens(2, 3), cache=shared)
    assert all(torch.equal(a, b) for a, b in zip(cache.keys, shared.keys, strict=True))
    assert (cache.length, shared.length) == (5, 8)
    with pytest.raises(ValueError, match="exceed the cache's max_length 8"):
        model(random_tokens(2, 1), cache=shared)
