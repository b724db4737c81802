"""The tiled scan agrees with the reference in float64: outputs, persistent pairs and every gradient."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LAYER_OPTIONS,
    assert_all_close,
    gradients,
    layer_of,
    loss_of,
    random_tokens,
    relative_rms,
    strong,
    tiny,
)
from torch import Tensor

from recurformer import KVCache, LanguageModel, ModelConfig
from recurformer.attention import Layout
from recurformer.experiments.bench.memory import peak_memory
from recurformer.layer import LayerMaths
from recurformer.model import Layer
from recurformer.scan.reference import reference_scan
from recurformer.scan.tiled.blocks import Attention, Leaf, LeafGradients
from recurformer.scan.tiled.scan import tiled_scan, tiled_stack_scan
from recurformer.scan.tiled.stack import StackedLayers
from recurformer.scan.wavefront import wavefront_scan

# --- one layer and one call of it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A layer, its inputs (B, N, D) and the gradient of its outputs, zero at pads."""

    layer: Layer
    layout: Layout
    x: Tensor
    gz: Tensor
    past: tuple[Tensor, Tensor] | None = None

    @property
    def real(self) -> Tensor:
        """(B, N) bool, False at pads."""
        valid = self.layout.valid
        return torch.ones(self.x.shape[:2]).bool() if valid is None else valid[:, self.layout.past :]


def case(
    B: int,
    N: int,
    *,
    std: float = 0.3,
    dtype: torch.dtype = torch.float64,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    past: int = 0,
    past_mask: Tensor | None = None,
    **options: Any,
) -> Case:
    """One layer with weights of deviation `std` and random inputs, after `past` positions in a cache."""
    model = tiny(dtype=dtype, n_layers=1, **options)
    strong(model, std)
    remembered = None
    if past:
        remembered = KVCache(model.config, B, dtype=dtype)
        with torch.no_grad():
            model(random_tokens(B, past), cache=remembered, attention_mask=past_mask)
    layout = model.layout(N, mask, documents, remembered)
    draw = torch.Generator().manual_seed(5)
    x, gz = torch.randn(2, B, N, model.config.d_model, generator=draw, dtype=torch.float64).to(dtype)
    made = Case(layer_of(model, 0), layout, x, gz, None if remembered is None else remembered.past(0))
    return replace(made, gz=gz * made.real[..., None])


def evaluate(scan: Callable, case: Case, **options: Any) -> dict[str, Tensor]:
    """Outputs, persistent pairs (at real positions) and the gradients of the inputs and every parameter."""
    names, parameters = zip(*case.layer.named_parameters(), strict=True)
    x = case.x.detach().requires_grad_()
    z, keys, values = scan(x, case.layer.maths(), case.layout, case.past, **options)
    assert torch.isfinite(z).all()
    grads = torch.autograd.grad(z, [x, *parameters], case.gz)
    pairs = {"keys": keys.transpose(1, 2)[case.real], "values": values.transpose(1, 2)[case.real]}
    found = {"z": z[case.real], **pairs, **dict(zip(["x", *names], grads, strict=True))}
    return {name: tensor.detach() for name, tensor in found.items()}


def tiled(case: Case, **options: Any) -> dict[str, Tensor]:
    return evaluate(tiled_scan, case, **options)


def reference(case: Case) -> dict[str, Tensor]:
    return evaluate(reference_scan, case)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Every tensor differs by at most `tolerance` times its own largest value.

    The gradient of a key bias is zero up to rounding, because the bias shifts all scores alike. The limit therefore
    allows 1e-13 of the largest gradient as rounding.
    """
    assert actual.keys() == expected.keys()
    loudest = max(expected[name].abs().max().item() for name in expected if name not in ("z", "keys", "values"))
    for name, wanted in expected.items():
        found = actual[name]
        assert found.shape == wanted.shape, name
        assert torch.isfinite(found).all(), name
        assert torch.isfinite(wanted).all(), name
        error = (found - wanted).abs().max().item()
        limit = tolerance * wanted.abs().max().item() + 1e-3 * tolerance * loudest
        assert error <= limit, f"{name} differs by {error:.3g}, more than {limit:.3g}"


# --- shapes ----------------------------------------------------------------------------------------------------------

SMALL = [(N, B, K) for N in (1, 2, 3, 5, 8) for B in (1, 3) for K in (8, 10, 60)]
LARGE = [(N, B, K) for N in (31, 64, 100, 129) for B, K in ((1, 8), (3, 10), (1, 60))]


@pytest.mark.parametrize(("N", "B", "K"), [*SMALL, *LARGE, (31, 3, 60)], ids=lambda size: str(size))
def test_lengths_batches_and_head_widths(N: int, B: int, K: int):
    one = case(B, N, d_model=20, n_heads=2, head_dim=K, d_mlp=24)
    assert_same(tiled(one), reference(one))


@pytest.mark.parametrize("qk_norm", ["head", "none"])
@pytest.mark.parametrize("K", [8, 24, 48, 60, 64, 80, 96, 128, 192])
def test_every_part_of_a_head_counts(K: int, qk_norm: Any):
    """Queries, keys and values are large in the last dimensions of a head only."""
    one = case(2, 11, n_heads=2, head_dim=K, position="none", qk_norm=qk_norm)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = one.layer.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            heads = weight.unflatten(0, (2, K))
            heads[:, :-3] *= 1e-3
            heads[:, -3:] *= 3
    expected = reference(one)
    assert_same(tiled(one), expected)
    assert_same(tiled(one, leaf=2), expected)
    # The outputs change without the last dimensions, so the comparison above depends on them.
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            one.layer.get_submodule(name).weight.unflatten(0, (2, K))[:, -3:] = 0  # pyright: ignore
    assert (reference(one)["z"] - expected["z"]).abs().max() > 0.1


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["minimal", "all"])
@pytest.mark.parametrize("options", LAYER_OPTIONS.values(), ids=LAYER_OPTIONS.keys())
def test_options(options: dict[str, Any], save: str):
    one = case(2, 37, **options)
    assert_same(tiled(one, leaf=4, save=save), reference(one))


# --- schedules -------------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, dict[str, Any]] = {
    f"chunk-{chunk}-leaf-{leaf}": {"chunk": chunk, "leaf": leaf}
    for chunk, leaves in {None: (1, 4, 16, 64), 1: (1,), 4: (1, 4), 16: (1, 4, 16), "auto": (1, 4, 16)}.items()
    for leaf in leaves
}
MASK = torch.ones(3, 37, dtype=torch.bool)
MASK[0, :9] = MASK[1, 20:] = MASK[2, [0, 3, 4, 17, 36]] = False
PAST_MASK = torch.tensor([[0] * 9 + [1] * 2, [1] * 11, [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0]])
DOCUMENTS = torch.stack([torch.arange(37) // 9, torch.arange(37) // 16, torch.zeros(37, dtype=torch.int64)])
SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded-grouped": {"mask": MASK, "n_kv_heads": 2},
    "documents-rope": {"documents": DOCUMENTS, "position": "rope"},
    "padded-documents": {"documents": DOCUMENTS, "mask": MASK},
    "past-grouped": {"past": 11, "n_kv_heads": 1},
    "padded-past-rope": {"past": 11, "past_mask": PAST_MASK, "mask": MASK, "position": "rope"},
}


@cache
def situation(name: str) -> tuple[Case, dict[str, Tensor]]:
    one = case(3, 37, **SITUATIONS[name])
    return one, reference(one)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("name", SITUATIONS)
def test_every_schedule_is_exact(name: str, schedule: dict[str, Any]):
    one, expected = situation(name)
    for save in ("minimal", "all"):
        assert_same(tiled(one, save=save, **schedule), expected)


def test_a_long_past_and_blocks_of_bounded_size(monkeypatch: pytest.MonkeyPatch):
    """Blocks of scores are cut at QUERY_BLOCK x KEY_BLOCK, and the place of the cut changes nothing."""
    one = case(2, 40, past=83, n_kv_heads=2)
    expected = reference(one)
    assert_same(tiled(one, leaf=4), expected)
    monkeypatch.setattr("recurformer.scan.tiled.blocks.QUERY_BLOCK", 7)
    monkeypatch.setattr("recurformer.scan.tiled.blocks.KEY_BLOCK", 10)
    monkeypatch.setattr("recurformer.scan.tiled.backward.POSITION_BLOCK", 8)
    for schedule in ({"chunk": None, "leaf": 1}, {"chunk": 16, "leaf": 4}, {"chunk": None, "leaf": 64}):
        assert_same(tiled(one, save="minimal", **schedule), expected)


def test_a_leaf_that_nobody_gave_is_no_longer_than_the_chunk():
    one, few = case(2, 21), stack(2, 21)
    assert_same(tiled(one, chunk=8), tiled(one, chunk=8, leaf=8), tolerance=0)
    found = evaluate_stack(wavefront_scan, few, chunk=8)
    assert_same(found, evaluate_stack(tiled_stack_scan, few, chunk=8, leaf=8), tolerance=0)
    assert_same(found, evaluate_stack(one_after_the_other, few))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 3}, "chunk is 3; it must be a power of two"),
        ({"chunk": 16, "leaf": 3}, "leaf is 3; it must be a power of two"),
        ({"chunk": 4, "leaf": 8}, "leaf 8 exceeds chunk 4"),
        ({"chunk": "large"}, "chunk is 'large'; give a power of two, None .pure tiling. or 'auto'"),
        ({"save": "some"}, "save is 'some'; choose 'auto', 'minimal' or 'all'"),
    ],
    ids=["chunk", "leaf", "leaf-in-chunk", "chunk-word", "save"],
)
def test_a_schedule_that_is_none_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tiled(case(1, 5), **options)


@pytest.mark.parametrize("schedule", [{"chunk": None, "leaf": 1}, {"chunk": 16, "leaf": 4}], ids=["pure", "chunks"])
def test_tiles_across_documents_are_skipped(schedule: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """A block in which no query sees a key gets no scores. In a long row of documents, most blocks are such."""
    blocks: list[tuple[slice, slice]] = []
    scores = Attention.scores

    def recorded(self: Attention, queries: slice, keys: slice, *args: Any, **options: Any) -> Tensor:
        blocks.append((queries, keys))
        return scores(self, queries, keys, *args, **options)

    monkeypatch.setattr(Attention, "scores", recorded)
    pushed = {}
    for name, length in (("packed", 8), ("one", 64)):
        one = case(2, 64, documents=(torch.arange(64) // length).expand(2, -1))
        blocks.clear()
        with torch.no_grad():
            tiled_scan(one.x, one.layer.maths(), one.layout, **schedule)
        pushed[name] = sum((q.stop - q.start) * (k.stop - k.start) for q, k in blocks)
        tiled(one, **schedule)
        for queries, keys in blocks:
            visible = one.layout.visible(queries, keys)
            assert visible is None or visible.any(), (queries, keys)
    assert 0 < pushed["packed"] < pushed["one"] / 3


# --- grouped heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [{"chunk": None, "leaf": 1}, {"chunk": 8, "leaf": 4}], ids=["pure", "chunks"])
def test_shared_heads_are_repeated_heads(schedule: dict[str, Any]):
    """2 key-value heads for 4 query heads equal 4 repeated ones, and their gradients are sums over the group."""
    grouped, full = (case(2, 21, n_kv_heads=G) for G in (2, 4))

    def repeated(name: str, weight: Tensor) -> Tensor:
        if not name.startswith(("k_proj", "v_proj")):
            return weight
        return weight.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)

    full.layer.load_state_dict({name: repeated(name, w) for name, w in grouped.layer.state_dict().items()})
    found, wanted = (tiled(one, **schedule) for one in (grouped, full))
    for name in ("k_proj.weight", "v_proj.weight"):
        wanted[name] = wanted[name].unflatten(0, (2, 2, 8)).sum(1).flatten(0, 1)
    for name in ("keys", "values"):
        assert torch.equal(wanted[name][:, 0], wanted[name][:, 1])
        wanted[name] = wanted[name][:, ::2]
    assert_same(found, wanted)


# --- inputs as they come ---------------------------------------------------------------------------------------------


def test_inputs_gradients_and_weights_may_have_any_strides():
    one = case(2, 21, n_kv_heads=2, activation="swiglu")
    expected = reference(one)

    def strided(t: Tensor) -> Tensor:
        turned = t.detach().transpose(0, -1).contiguous().transpose(0, -1)
        wide = torch.full((*turned.shape[:-1], 2 * turned.shape[-1]), float("nan"), dtype=t.dtype)[..., ::2]
        return wide.copy_(turned)

    for save in ("minimal", "all"):
        x = strided(one.x).requires_grad_()
        assert not x.is_contiguous()
        maths = one.layer.maths()
        weights = {
            name: strided(getattr(maths, name)).requires_grad_()
            for name in ("attention_norm", "q", "k", "v", "o", "q_norm", "k_norm", "mlp_norm", "up", "down", "gate")
        }
        z, _, _ = tiled_scan(x, replace(maths, **weights), one.layout, save=save, leaf=4)
        grads = torch.autograd.grad(z, [x, *weights.values()], strided(one.gz))
        module = {name: f"{name}_proj" for name in ("q", "k", "v", "o", "up", "down", "gate")}
        names = ["x", *(f"{module.get(name, name)}.weight" for name in weights)]
        found = {"z": z.detach().flatten(0, 1), **dict(zip(names, grads, strict=True))}
        assert_same(found, {name: expected[name] for name in found})


def test_expanded_inputs_and_gradients():
    """One row serves as the whole batch, for inputs and gradients: strides of 0."""
    one = case(1, 21)
    three = case(3, 21)
    outcomes = []
    for scan in (reference_scan, tiled_scan):
        row = one.x.detach().requires_grad_()
        z, _, _ = scan(row.expand(3, -1, -1), three.layer.maths(), three.layout)
        grads = torch.autograd.grad(z.sum(), [row, *three.layer.parameters()])
        outcomes.append({"z": z.detach(), **{str(n): grad for n, grad in enumerate(grads)}})
    assert_same(outcomes[1], outcomes[0])


@pytest.mark.parametrize("save", ["minimal", "all"])
def test_inputs_and_gradients_are_left_alone(save: str):
    one = case(2, 21, past=5)
    assert one.past is not None
    tensors = [one.x, one.gz, *one.past, *one.layer.parameters()]
    before = [t.detach().clone() for t in tensors]
    tiled(one, save=save, leaf=4)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, before, strict=True))


# --- several layers side by side -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """Several layers of one shape and a call of them, as `Case` for one layer."""

    layers: list[Layer]
    layout: Layout
    x: Tensor
    gz: Tensor
    past: list[tuple[Tensor, Tensor]] | None

    @property
    def real(self) -> Tensor:
        return Case(self.layers[0], self.layout, self.x, self.gz).real


def stack(
    B: int, N: int, *, L: int = 3, dtype: torch.dtype = torch.float64, mask: Tensor | None = None,
    documents: Tensor | None = None, past: int = 0, past_mask: Tensor | None = None, **options: Any,
) -> Stack:  # fmt: skip
    """L layers with strong weights and random inputs, after `past` positions in a cache."""
    model = tiny(dtype=dtype, n_layers=L, **options)
    remembered = None
    if past:
        remembered = KVCache(model.config, B, dtype=dtype)
        with torch.no_grad():
            model(random_tokens(B, past), cache=remembered, attention_mask=past_mask)
    layout = model.layout(N, mask, documents, remembered)
    x, gz = torch.randn(2, B, N, model.config.d_model, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    layers, memory = [layer_of(model, l) for l in range(L)], None
    if remembered is not None:
        memory = [remembered.past(l) for l in range(L)]
    made = Stack(layers, layout, x.to(dtype), gz.to(dtype), memory)
    return replace(made, gz=made.gz * made.real[..., None])


def one_after_the_other(
    x: Tensor, maths: list[LayerMaths], layout: Layout, past: list[tuple[Tensor, Tensor]] | None
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The results that `tiled_stack_scan` must have, layer by layer from the reference."""
    pairs = []
    for l, layer in enumerate(maths):
        x, keys, values = reference_scan(x, layer, layout, None if past is None else past[l])
        pairs.append((keys, values))
    return x, pairs


def evaluate_stack(scan: Callable, one: Stack, **options: Any) -> dict[str, Tensor]:
    """Outputs, persistent pairs of each layer and the gradients of the inputs and every parameter."""
    x = one.x.detach().requires_grad_()
    z, pairs = scan(x, [layer.maths() for layer in one.layers], one.layout, one.past, **options)
    parameters = {f"{l}.{name}": p for l, layer in enumerate(one.layers) for name, p in layer.named_parameters()}
    grads = torch.autograd.grad(z, [x, *parameters.values()], one.gz)
    found = {"z": z[one.real], "x": grads[0], **dict(zip(parameters, grads[1:], strict=True))}
    for l, (keys, values) in enumerate(pairs):
        # Persistent pairs are compared on their own scale, as gradients are.
        found |= {f"keys {l}": keys.transpose(1, 2)[one.real], f"values {l}": values.transpose(1, 2)[one.real]}
    return {name: tensor.detach() for name, tensor in found.items()}


def assert_stack_is_exact(one: Stack, **options: Any) -> None:
    expected = evaluate_stack(one_after_the_other, one)
    for save in ("minimal", "all"):
        assert_same(evaluate_stack(tiled_stack_scan, one, save=save, **options), expected)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("N", [1, 2, 3, 5, 8, 31, 64, 100, 129])
def test_a_stack_is_its_layers_one_after_the_other(N: int, B: int):
    assert_stack_is_exact(stack(B, N))


@pytest.mark.parametrize("options", LAYER_OPTIONS.values(), ids=LAYER_OPTIONS.keys())
def test_options_of_a_stack(options: dict[str, Any]):
    assert_stack_is_exact(stack(2, 21, L=2, **options), chunk=4, leaf=4)


@pytest.mark.parametrize(
    "schedule",
    [{}, {"chunk": 8, "leaf": 2}, {"chunk": 64, "leaf": 4}, {"chunk": None, "leaf": 4}, {"chunk": 1, "leaf": 1}],
    ids=["default", "leaves", "one-chunk", "pure", "pulls"],
)
@pytest.mark.parametrize("name", SITUATIONS)
def test_every_schedule_of_a_stack_is_exact(name: str, schedule: dict[str, Any]):
    assert_stack_is_exact(stack(3, 37, **SITUATIONS[name]), **schedule)


def test_blocks_of_a_stack_may_be_shorter_than_its_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recurformer.scan.tiled.backward.POSITION_BLOCK", 8)
    assert_stack_is_exact(stack(2, 40), chunk=16, leaf=4)


def test_a_stack_repeats_to_the_bit_whatever_fresh_memory_holds(request: pytest.FixtureRequest):
    one = stack(3, 37, dtype=torch.float32, n_kv_heads=2, activation="swiglu", mask=MASK, position="rope")
    modes = ("minimal", "all")
    clean, again = ([evaluate_stack(tiled_stack_scan, one, save=save) for save in modes] for _ in range(2))
    request.getfixturevalue("poisoned_memory")
    poisoned = [evaluate_stack(tiled_stack_scan, one, save=save) for save in modes]
    for first, second, third in zip(clean, again, poisoned, strict=True):
        for name in first:
            assert torch.isfinite(first[name]).all(), name
            assert torch.equal(first[name], second[name]), name
            assert torch.equal(first[name], third[name]), name


def test_layers_of_a_stack_may_be_frozen_one_by_one():
    one = stack(2, 37)
    expected = evaluate_stack(one_after_the_other, one)
    learning = {"0.q_proj.weight", "1.k_proj.weight", "2.attention_norm.weight", "2.down_proj.weight"}
    leaves = {}
    for l, layer in enumerate(one.layers):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(f"{l}.{name}" in learning)
            leaves[f"{l}.{name}"] = parameter
    z, _ = tiled_stack_scan(one.x, [layer.maths() for layer in one.layers], one.layout)
    z.backward(one.gz)
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == learning
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert_same(found, {name: expected[name] for name in found})
    assert all(grad.untyped_storage().nbytes() == grad.nbytes for grad in found.values())


def test_a_stack_under_bfloat16():
    """Fresh weights, as in training; matrices are in bf16, sums in float32."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=97, d_model=64, n_layers=2, n_heads=4))
    layout, layers = model.layout(65), [layer_of(model, l) for l in range(2)]
    x, gz = torch.randn(2, 2, 65, 64, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for dtype, scan in ((torch.float32, one_after_the_other), (torch.bfloat16, tiled_stack_scan)):
        inputs = x.clone().requires_grad_()
        z, _ = scan(inputs, [layer.maths(dtype) for layer in layers], layout, None)
        names, parameters = zip(*model.layers.named_parameters(), strict=True)
        grads = torch.autograd.grad(z, [inputs, *parameters], gz)
        assert all(grad.dtype == torch.float32 for grad in (z, *grads))
        outcomes.append({"z": z.detach(), "x": grads[0], **dict(zip(names, grads[1:], strict=True))})
    for name, expected in outcomes[0].items():
        assert relative_rms(outcomes[1][name], expected) <= 2e-2, name


def test_models_of_both_kinds_stack_what_stands_together():
    kinds = ("recurrent", "recurrent", "standard", "recurrent", "recurrent", "recurrent")
    model = tiny(dtype=torch.float64, n_layers=6, layers=kinds)
    tokens, outcomes = random_tokens(2, 37), []
    for model.scan in ("reference", "wavefront"):
        cache = KVCache(model.config, 2, dtype=torch.float64)
        with torch.no_grad():
            model(tokens[:, :5], cache=cache)
            continued = model(tokens[:, 5:], cache=cache).logits
        outcomes.append({"continued": continued, **gradients(model, loss_of(model, tokens))})
    assert_all_close(outcomes[1], outcomes[0])


def test_memory_of_a_stack_is_linear_in_the_length():
    """With save="minimal", the memory per layer is as small as that of a single layer."""

    def peak(N: int) -> float:
        one = stack(2, N, dtype=torch.float32, n_heads=2)
        return (
            peak_memory(lambda: evaluate_stack(tiled_stack_scan, one, save="minimal")) / one.x.nbytes / len(one.layers)
        )

    short, long = peak(256), peak(1024)
    assert 4 < long < 32
    assert long < 1.1 * short


@pytest.mark.parametrize("for_forward", [True, False], ids=["by-column", "by-row"])
@pytest.mark.parametrize("options", LAYER_OPTIONS.values(), ids=LAYER_OPTIONS.keys())
def test_stacked_equations_are_those_of_each_layer(options: dict[str, Any], for_forward: bool):
    """Every value of two of three layers, and every gradient of a weighted sum of the values."""
    model = tiny(dtype=torch.float64, n_layers=3, **options)
    config, rotation = model.config, model.layout(7).rotation
    layers, some = [layer_of(model, l) for l in range(3)], slice(1, 3)
    draw = torch.Generator().manual_seed(5)
    x, a = (
        torch.randn(2, 7, width, generator=draw, dtype=torch.float64, requires_grad=True)
        for width in (config.d_model, config.n_heads * config.head_width)
    )

    def stacked() -> list[Tensor]:
        stack = StackedLayers.of([layer.maths() for layer in layers], for_forward=for_forward)[some]
        h, y = stack.attention_input(x), stack.after_attention(x, a)
        return [
            h, stack.queries(h, rotation), *stack.pairs(h, rotation), stack.keys_before_norm(h), y,
            stack.after_mlp(y, *stack.mlp_inner(y)),
        ]  # fmt: skip

    def plain() -> list[Tensor]:
        values = []
        for layer, x_l, a_l in zip(layers[some], x.unsqueeze(1), a.unsqueeze(1), strict=True):
            maths = layer.maths()
            h = maths.attention_input(x_l)
            y = maths.after_attention(x_l, a_l.unflatten(-1, (config.n_heads, -1)).transpose(1, 2))
            raw_keys = F.linear(h, maths.k, maths.k_bias)
            values.append([h, maths.queries(h, rotation), *maths.pairs(h, rotation), raw_keys, y, maths.after_mlp(y)])
        return [torch.cat(each) for each in zip(*values, strict=True)]

    names, parameters = zip(*((n, p) for n, p in model.layers[some].named_parameters()), strict=True)  # pyright: ignore
    outcomes = []
    for values in (stacked(), plain()):
        draw.manual_seed(6)
        total = torch.stack([(v * torch.randn(v.shape, generator=draw, dtype=v.dtype)).sum() for v in values]).sum()
        grads = torch.autograd.grad(total, [x, a, *parameters])
        named = {str(n): value.detach() for n, value in enumerate(values)}
        outcomes.append({**named, **dict(zip(["x", "a", *names], grads, strict=True))})
    assert_same(*outcomes, tolerance=1e-12)


# --- the autograd contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["minimal", "all"])
@pytest.mark.parametrize(
    "wanted", ["x", *dict(case(1, 1, attention_bias=True, mlp_bias=True, activation="swiglu").layer.named_parameters())]
)
def test_any_single_tensor_can_be_the_only_one_to_learn(wanted: str, save: str):
    one = case(2, 9, attention_bias=True, mlp_bias=True, activation="swiglu")
    expected = wide_reference()[wanted]
    parameters = dict(one.layer.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name == wanted)
    x = one.x.detach().requires_grad_(wanted == "x")
    z, _, _ = tiled_scan(x, one.layer.maths(), one.layout, save=save, leaf=2)
    z.backward(one.gz)
    leaves = {"x": x, **parameters}
    grad = leaves[wanted].grad
    assert grad is not None
    assert_same({wanted: grad}, {wanted: expected})
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


@cache
def wide_reference() -> dict[str, Tensor]:
    return reference(case(2, 9, attention_bias=True, mlp_bias=True, activation="swiglu"))


def test_frozen_inputs_train_every_parameter():
    one = case(2, 21)
    expected = reference(one)
    z, keys, values = tiled_scan(one.x, one.layer.maths(), one.layout, leaf=4)
    assert not keys.requires_grad
    assert not values.requires_grad
    names, parameters = zip(*one.layer.named_parameters(), strict=True)
    grads = dict(zip(names, torch.autograd.grad(z, parameters, one.gz), strict=True))
    assert_same(grads, {name: expected[name] for name in grads})


def test_nothing_to_learn_records_nothing():
    one = case(2, 21)
    for parameter in one.layer.parameters():
        parameter.requires_grad_(False)
    z, _, _ = tiled_scan(one.x, one.layer.maths(), one.layout)
    assert not z.requires_grad
    assert z.grad_fn is None
    with torch.no_grad():
        assert torch.equal(z, tiled_scan(one.x.requires_grad_(), one.layer.maths(), one.layout)[0])


@pytest.mark.parametrize("save", ["minimal", "all"])
def test_gradients_are_returned_and_not_written(save: str):
    one = case(2, 9)
    assert all(p.grad is None for p in one.layer.parameters())
    tiled(one, save=save)
    assert all(p.grad is None for p in one.layer.parameters())
    expected = reference(one)
    for times in (1, 2, 3):  # backward() accumulates
        x = one.x.detach().requires_grad_()
        tiled_scan(x, one.layer.maths(), one.layout, save=save)[0].backward(one.gz)
        grads = {name: p.grad for name, p in one.layer.named_parameters() if p.grad is not None}
        assert_same(grads, {name: times * expected[name] for name in dict(one.layer.named_parameters())})


@pytest.mark.parametrize("save", ["minimal", "all"])
def test_a_kept_graph_gives_the_same_gradients_again(save: str):
    one = case(2, 21)
    x = one.x.detach().requires_grad_()
    z, _, _ = tiled_scan(x, one.layer.maths(), one.layout, save=save, leaf=4)
    inputs = [x, *one.layer.parameters()]
    first = torch.autograd.grad(z, inputs, one.gz, retain_graph=True)
    again = torch.autograd.grad(z, inputs, one.gz, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    doubled = torch.autograd.grad(z, inputs, 2 * one.gz)
    assert all(torch.allclose(2 * a, b, rtol=1e-10, atol=1e-12) for a, b in zip(first, doubled, strict=True))


def test_a_second_derivative_is_refused():
    one = case(1, 5)
    x = one.x.detach().requires_grad_()
    z, _, _ = tiled_scan(x, one.layer.maths(), one.layout)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(z, x, one.gz, create_graph=True)


def test_changing_what_the_backward_needs_is_noticed():
    one = case(1, 5)
    x = one.x.clone().requires_grad_()
    z, _, _ = tiled_scan(x, one.layer.maths(), one.layout)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward(one.gz)


def test_only_what_is_asked_for_comes_back_through_a_whole_model():
    """`autograd.grad` on the parameters of one layer, inside a model of recurrent and standard layers."""
    model = tiny(dtype=torch.float64, n_layers=3, layers=("recurrent", "standard", "recurrent"))
    tokens = random_tokens(2, 19)
    names = [name for name, _ in model.named_parameters() if name.startswith("layers.0.")]
    outcomes = []
    for scan in ("reference", "tiled"):
        model.scan = scan
        grads = torch.autograd.grad(loss_of(model, tokens), [model.get_parameter(name) for name in names])
        outcomes.append(dict(zip(names, grads, strict=True)))
    assert_same(outcomes[1], outcomes[0])


# --- finite differences, precision, repeatability --------------------------------------------------------------------


@pytest.mark.parametrize("save", ["minimal", "all"])
@pytest.mark.parametrize(
    ("schedule", "options", "past"),
    [
        ({"chunk": None, "leaf": 1}, {"n_kv_heads": 1}, 0),
        ({"chunk": 2, "leaf": 1}, {"position": "rope", "norm": "layer", "qk_norm": "full"}, 3),
        ({"chunk": 4, "leaf": 2}, {"activation": "swiglu", "attention_bias": True, "qk_norm": "none"}, 2),
    ],
    ids=["pure", "chunks-past", "leaves-past"],
)
def test_gradients_are_finite_differences(schedule: dict[str, Any], options: dict[str, Any], past: int, save: str):
    one = case(1, 6, std=0.5, vocab_size=97, d_model=4, n_heads=2, d_mlp=5, past=past, **options)

    def outputs(x: Tensor, *_: Tensor) -> Tensor:
        # The parameters are arguments because gradcheck changes them in place and must know of them.
        return tiled_scan(x, one.layer.maths(), one.layout, one.past, save=save, **schedule)[0]

    assert torch.autograd.gradcheck(outputs, (one.x.requires_grad_(), *one.layer.parameters()))


@pytest.mark.parametrize("schedule", [{"chunk": None, "leaf": 1}, {"chunk": 16, "leaf": 4}], ids=["pure", "chunks"])
def test_fresh_memory_and_repetition_change_no_bit(schedule: dict[str, Any], request: pytest.FixtureRequest):
    cases = [
        case(2, 37, dtype=torch.float32, n_kv_heads=2, activation="swiglu"),
        case(3, 37, dtype=torch.float32, mask=MASK, past=11, past_mask=PAST_MASK, position="rope"),
    ]
    modes = [{**schedule, "save": save} for save in ("minimal", "all")]
    clean = [tiled(one, **mode) for one in cases for mode in modes]
    again = [tiled(one, **mode) for one in cases for mode in modes]
    request.getfixturevalue("poisoned_memory")
    poisoned = [tiled(one, **mode) for one in cases for mode in modes]
    for first, second, third in zip(clean, again, poisoned, strict=True):
        for name in first:
            assert torch.isfinite(first[name]).all(), name
            assert torch.equal(first[name], second[name]), name
            assert torch.equal(first[name], third[name]), name


@pytest.mark.parametrize("save", ["minimal", "all"])
@pytest.mark.parametrize("options", [{}, {"position": "rope", "norm": "layer", "n_kv_heads": 2}], ids=["alibi", "rope"])
def test_bfloat16_under_autocast(options: dict[str, Any], save: str):
    """Fresh weights, as in training; matrices are in bf16, sums in float32."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=97, d_model=64, n_layers=1, n_heads=4, **options))
    layer, layout = layer_of(model, 0), model.layout(65)
    x = torch.randn(2, 65, 64, generator=torch.Generator().manual_seed(0))
    gz = torch.randn(2, 65, 64, generator=torch.Generator().manual_seed(1))

    def outcome(dtype: torch.dtype, scan: Callable, **how: Any) -> dict[str, Tensor]:
        names, parameters = zip(*layer.named_parameters(), strict=True)
        inputs = x.clone().requires_grad_()
        z, keys, values = scan(inputs, layer.maths(dtype), layout, **how)
        assert (z.dtype, keys.dtype, values.dtype) == (torch.float32, dtype, dtype)
        grads = torch.autograd.grad(z, [inputs, *parameters], gz)
        assert all(grad.dtype == torch.float32 for grad in grads)
        return {"z": z.detach(), "x": grads[0], **dict(zip(names, grads[1:], strict=True))}

    expected = outcome(torch.float32, reference_scan)
    for schedule in ({}, {"chunk": None, "leaf": 1}):
        found = outcome(torch.bfloat16, tiled_scan, save=save, **schedule)
        for name in expected:
            assert relative_rms(found[name], expected[name]) <= 2e-2, name


# --- threads and compilation ------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("limit", [2**22, 1], ids=["small", "large"])
def test_loops_of_small_products_keep_to_one_thread(limit: int, monkeypatch: pytest.MonkeyPatch):
    """Only the loops do, forward and backward, and only where products are small."""
    inside: dict[str, set[int]] = {"attend": set(), "add_query": set(), "merge": set()}
    for owner, name in ((Leaf, "attend"), (LeafGradients, "add_query"), (Attention, "merge")):
        original = getattr(owner, name)

        def counted(*args: Any, seen: set[int] = inside[name], work: Callable = original, **options: Any) -> Any:
            seen.add(torch.get_num_threads())
            return work(*args, **options)

        monkeypatch.setattr(owner, name, counted)
    monkeypatch.setattr("recurformer.scan.tiled.call.ONE_THREAD", limit)
    tiled(case(2, 37), leaf=4)
    loops = {1} if limit > 1 else {2}
    assert inside == {"attend": loops, "add_query": loops, "merge": {2}}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_threads_come_back_when_a_loop_fails(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise RuntimeError(f"with {torch.get_num_threads()} thread")

    one = case(2, 5)
    for owner, name in ((LeafGradients, "add_query"), (Leaf, "attend")):
        monkeypatch.setattr(owner, name, fail)
        with pytest.raises(RuntimeError, match="with 1 thread"):
            tiled(one)
        assert torch.get_num_threads() == 2


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # torch hides this warning of its own; our "error" filter would see it first
def test_a_compiled_model_calls_the_scan_as_it_is():
    """The scan runs without a warning, and not as a graph of thousands of operations."""
    model, tokens = tiny(scan="tiled", dtype=torch.float64, layers="first:1"), random_tokens(2, 40)
    expected = gradients(model, loss_of(model, tokens))
    found = gradients(model, loss_of(torch.compile(model, backend="eager"), tokens))  # pyright: ignore[reportArgumentType]
    assert_all_close(found, expected)


# --- memory ----------------------------------------------------------------------------------------------------------


def minimal_peak(N: int, **options: Any) -> float:
    """Peak bytes of a forward and backward pass with save="minimal", per byte of the layer's input."""
    model = tiny(n_layers=1, **options)
    layer, layout = layer_of(model, 0), model.layout(N)
    x = torch.randn(2, N, model.config.d_model).requires_grad_()
    gz = torch.randn_like(x)

    def work() -> None:
        z, _, _ = tiled_scan(x, layer.maths(), layout, save="minimal")
        torch.autograd.grad(z, [x, *layer.parameters()], gz)

    peak = peak_memory(work) / x.nbytes
    assert peak > 4  # outputs, gradients, queries and pairs exist; a smaller number is a broken measurement
    return peak


@pytest.mark.timeout(300)
def test_memory_is_linear_in_the_length_and_small():
    """The peak with save="minimal" is below 32 times the inputs, from 256 to 4096 positions."""
    peaks = {N: minimal_peak(N, n_heads=2) for N in (256, 1024, 4096)}
    assert max(peaks.values()) < 32
    assert peaks[4096] < 1.1 * peaks[1024] < 1.1 * 1.1 * peaks[256]


@pytest.mark.parametrize(
    "options",
    [{"n_heads": 8}, {"n_heads": 4}, {"d_model": 64, "n_heads": 16}, {"n_heads": 8, "n_kv_heads": 2},
     {"n_heads": 4, "activation": "swiglu"}],
    ids=["K4", "K8", "K4-D64", "K4-grouped", "K8-swiglu"],
)  # fmt: skip
def test_memory_is_small_for_narrow_heads_too(options: dict[str, Any]):
    assert minimal_peak(256, **options) < 32
    assert minimal_peak(1024, **options) < 32


def test_keeping_more_takes_more_memory_and_by_size_it_is_kept(monkeypatch: pytest.MonkeyPatch):
    one = case(2, 256, dtype=torch.float32)

    def peak(save: str) -> int:
        return peak_memory(lambda: tiled_scan(one.x.requires_grad_(), one.layer.maths(), one.layout, save=save))

    least, most = peak("minimal"), peak("all")
    assert most > least + 4 * one.x.nbytes
    assert peak("auto") == most
    monkeypatch.setattr("recurformer.scan.tiled.scan.KEEP_BYTES", 1)
    assert peak("auto") == least
    with torch.no_grad():
        assert peak("all") == peak("minimal") <= least


def test_outputs_of_the_last_layer_do_not_keep_those_of_all():
    """This holds where no backward follows. Otherwise the backward needs the outputs of all layers."""
    one = stack(2, 5, L=3, dtype=torch.float32)
    maths = [layer.maths() for layer in one.layers]

    def kept() -> int:
        return tiled_stack_scan(one.x, maths, one.layout)[0].untyped_storage().nbytes()

    assert kept() == 3 * one.x.nbytes
    with torch.no_grad():
        assert kept() == one.x.nbytes
    with torch.inference_mode():
        assert kept() == one.x.nbytes
    for layer in one.layers:
        layer.requires_grad_(False)
    maths = [layer.maths() for layer in one.layers]
    assert kept() == one.x.nbytes


# --- several processes -----------------------------------------------------------------------------------------------

RANK = """
import sys
import torch
from helpers import gradients, loss_of, random_tokens, tiny
from torch.nn.parallel import DistributedDataParallel

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
model = tiny(scan="tiled", dtype=torch.float64, layers="first:1", n_kv_heads=2)
parallel = DistributedDataParallel(model)
for step in range(2):  # the second accumulates
    tokens, targets = random_tokens(2, 21, seed=10 * step + rank), random_tokens(2, 21, seed=50 + 10 * step + rank)
    parallel(tokens, targets=targets).loss.backward()
torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/rank-{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_hold_the_mean_of_their_gradients(tmp_path: Path):
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(tests), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    model = tiny(scan="reference", dtype=torch.float64, layers="first:1", n_kv_heads=2)
    expected: dict[str, Tensor] = {}
    for step in range(2):
        for rank in range(2):
            tokens, targets = (random_tokens(2, 21, seed=base + 10 * step + rank) for base in (0, 50))
            for name, grad in gradients(model, loss_of(model, tokens, targets=targets)).items():
                expected[name] = expected.get(name, 0) + grad / 2
    found = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert_all_close(found[0], expected)
    assert all(torch.equal(found[0][name], found[1][name]) for name in expected)


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1), (2, 2), (3, 1)], ids=str)
def test_ragged_micro_batches_add_up_to_the_whole_batch(pieces: tuple[int, ...]):
    """Sums of token losses over micro-batches with different numbers of targets, divided once."""
    model, tokens, targets = tiny(scan="tiled", dtype=torch.float64), random_tokens(4, 21), random_tokens(4, 21, seed=2)
    for row, count in enumerate((5, 20, 1, 12)):
        targets[row, count:] = -100
    total = (targets != -100).sum().item()
    whole = gradients(model, loss_of(model, tokens, targets=targets))
    parts: dict[str, Tensor] = {}
    for piece, wanted in zip(tokens.split(pieces), targets.split(pieces), strict=True):
        share = (wanted != -100).sum().item() / total
        for name, grad in gradients(model, loss_of(model, piece, targets=wanted) * share).items():
            parts[name] = parts.get(name, 0) + grad
    assert_all_close(parts, whole)


def test_one_position_has_no_choice():
    """A softmax over one entry gives queries and keys a gradient of exactly zero, whatever the score is."""
    one = case(2, 1, attention_bias=True)
    found = tiled(one)
    for name, grad in found.items():
        assert grad.any() or name.startswith(("q_", "k_")), name
    assert not any(found[f"{name}.weight"].any() for name in ("q_proj", "k_proj", "q_norm", "k_norm"))
    assert F.cosine_similarity(found["x"], reference(one)["x"], dim=-1).min() > 1 - 1e-12
