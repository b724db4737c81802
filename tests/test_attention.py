"""Attention of standard layers: FlexAttention's inputs mean what `Layout` means, and compiling changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_all_close, assert_close, gradients, logits_of, loss_of, random_tokens, tiny
from torch import Tensor

from recurformer import LanguageModel, attention
from recurformer.attention import Layout, biased_scores, flex_applies, visible_blocks
from recurformer.choose import choose_attention
from recurformer.hardware import FLEX_BLOCK as BLOCK
from recurformer.model import Layer

NOTHING: dict[str, Tensor] = {}


def masks(kind: str, length: int) -> dict[str, Tensor]:
    """Pads (one row has nothing else) and documents (borders at block edges too) of three rows."""
    draw = torch.Generator().manual_seed(3)
    found = {}
    if kind in ("pads", "both"):
        found["attention_mask"] = torch.rand(3, length, generator=draw) > 0.3
        found["attention_mask"][1] = False
        found["attention_mask"][2, :BLOCK] = True
    if kind in ("documents", "both"):
        begins = torch.rand(3, length, generator=draw) < 0.02
        begins[0] = torch.arange(length) % BLOCK == 0
        begins[1] = False
        found["document_ids"] = begins.cumsum(1)
    return found


every_mask = pytest.mark.parametrize("kind", ["plain", "pads", "documents", "both"])


def layout_of(kind: str, length: int) -> Layout:
    given = masks(kind, length)
    return tiny().layout(length, given.get("attention_mask"), given.get("document_ids"))


@every_mask
@pytest.mark.parametrize("length", [BLOCK, 200, 3 * BLOCK + 1])
def test_blocks_are_the_visible_pairs(kind: str, length: int):
    """Block by block: all of it, nothing of it, or what the function of the indices says."""
    layout = layout_of(kind, length)
    blocks = visible_blocks(layout)
    rows = 1 if kind == "plain" else 3
    visible = layout.visible(slice(0, length), slice(0, length))
    assert visible is not None
    n = -(-length // BLOCK)
    state = torch.zeros(rows, n, n)  # 0 nothing, 1 in between, 2 all
    for value, counts, numbers in (
        (1, blocks.kv_num_blocks, blocks.kv_indices), (2, blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):  # fmt: skip
        for row in range(rows):
            for q in range(n):
                assert counts is not None
                assert numbers is not None
                listed = numbers[row, 0, q, : int(counts[row, 0, q])]
                assert (state[row, q, listed] == 0).all()  # no block is listed twice
                state[row, q, listed] = value
    b, q, k = torch.arange(rows)[:, None, None], torch.arange(length)[:, None], torch.arange(length)
    expanded = state.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :length, :length]
    by_function = blocks.mask_mod(b, torch.tensor(0), q, k).expand(rows, length, length)
    assert torch.equal(torch.where(expanded == 1, by_function, expanded == 2), visible[:, 0].expand(rows, -1, -1))
    if kind in ("plain", "documents"):
        assert (state == 2).any() or n == 1  # most blocks need no function
    if kind == "documents":
        assert (state[0] == torch.eye(n)).all()  # row 0 has one document a block: nothing else is visited


@every_mask
def test_scores_are_biased_as_the_layout_says(kind: str):
    layout, N, H = layout_of(kind, 50), 50, 4
    rows = 1 if kind == "plain" else 3
    scores = biased_scores(layout)
    assert scores is not None
    b, h = torch.arange(rows)[:, None, None, None], torch.arange(H)[:, None, None]
    found = scores(torch.zeros(rows, H, N, N), b, h, torch.arange(N)[:, None], torch.arange(N))
    bias, visible = layout.full_bias, layout.visible(slice(0, N), slice(0, N))
    assert bias is not None
    assert visible is not None
    assert_close(found[visible.expand(rows, H, N, N)], bias[visible.expand(rows, H, N, N)], 1e-6)
    assert biased_scores(tiny(position="none").layout(5)) is None


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """torch.compile that traces but makes no kernels; what it was asked to compile."""
    asked: list[Any] = []

    def compile_eagerly(function: Any, original: Any = torch.compile) -> Any:
        asked.append(function)
        return original(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    attention.compiled.cache_clear()
    torch._dynamo.reset()
    yield asked
    attention.compiled.cache_clear()
    torch._dynamo.reset()


def compile_layers(language_model: LanguageModel) -> LanguageModel:
    for layer in language_model.layers:
        assert isinstance(layer, Layer)
        layer.compiled = True
    return language_model


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


SHAPES = {
    "alibi": {},
    "gqa": {"n_kv_heads": 2},
    "official": {"norm": "layer", "qk_norm": "full", "residual_scale": "none"},
    "rope": {"position": "rope"},
}


@every_mask
@pytest.mark.usefixtures("eager_compiler")
@pytest.mark.parametrize("shape", ["alibi", "gqa", "rope"])
def test_flex_attention_gives_what_sdpa_gives(shape: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    given, N = masks(kind, 150), 150
    standard = tiny(layers="standard", head_dim=16, **SHAPES[shape])
    tokens = random_tokens(3, N)
    with torch.no_grad():
        expected = logits_of(standard, tokens, **given)
        monkeypatch.setattr(attention, "flex_applies", lambda q, layout: True)
        found = logits_of(standard, tokens, **given)
    real = given.get("attention_mask", torch.ones(3, N, dtype=torch.bool))
    assert found.isfinite().all()
    assert_close(found[real], expected[real], 1e-4)  # logits of about 10


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch hides its own; "error" finds it first
@pytest.mark.parametrize("shape", ["alibi", "official", "rope"])
def test_compiled_layers_give_the_same_and_share_their_graphs(shape: str, eager_compiler: list[Any]):
    tokens = random_tokens(2, 20)
    plain = tiny(layers="first:1", n_layers=4, **SHAPES[shape])
    fused = compile_layers(tiny(layers="first:1", n_layers=4, **SHAPES[shape]))
    torch._dynamo.utils.counters.clear()  # those of other tests
    before = graphs()
    expected, found = loss_of(plain, tokens), loss_of(fused, tokens)
    assert_close(found, expected, 1e-5)
    for name, gradient in gradients(fused, found).items():
        assert_close(gradient, gradients(plain, loss_of(plain, tokens))[name], 1e-5)
    assert graphs() - before == 2  # three standard layers, one graph before attention and one after it
    assert [function.__name__ for function in eager_compiler] == ["projections", "outputs"]
    assert not torch._dynamo.utils.counters["graph_break"]


def test_decoding_compiles_nothing(eager_compiler: list[Any]):
    fused = compile_layers(tiny(layers="standard"))
    fused.generate(random_tokens(2, 5), 3, seed=1)
    assert eager_compiler == []


@pytest.mark.usefixtures("eager_compiler")
def test_a_bounded_number_of_compilations_over_lengths():
    fused = compile_layers(tiny(layers="standard"))
    before = graphs()
    with torch.no_grad():
        for length in range(2, 40):
            logits_of(fused, random_tokens(2, length))
    assert graphs() - before <= 4  # one shape, then any


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_recurrent_layers_stay_out_of_a_compiled_model():
    tokens = random_tokens(2, 9)
    hybrid = tiny(scan="tiled", layers="first:1")
    expected = loss_of(hybrid, tokens)
    torch._dynamo.reset()
    found = loss_of(torch.compile(hybrid, backend="eager"), tokens)  # pyright: ignore[reportArgumentType]
    assert_close(found, expected)
    assert_close(gradients(hybrid, found)["embedding.weight"], gradients(hybrid, expected)["embedding.weight"])
    torch._dynamo.reset()


def test_recomputed_layers_keep_their_input_alone():
    tokens = random_tokens(2, 30)
    kept = {}
    for recompute in (False, True):
        standard = tiny(layers="standard", position="none")
        standard.recompute = "standard" if recompute else "none"
        saved: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[1],
            lambda t: t,
        ):
            loss = loss_of(standard, tokens)
        kept[recompute] = (sum(saved.values()), gradients(standard, loss))
    assert kept[True][0] < 0.7 * kept[False][0]
    for name, gradient in kept[True][1].items():
        assert torch.equal(gradient, kept[False][1][name]), name


def test_where_flex_attention_runs():
    q = torch.empty(1, 4, 200, 16, device="meta")
    assert not flex_applies(q, layout_of("plain", 200))  # not a GPU
    config = tiny(head_dim=8).config
    assert choose_attention(config, torch.device("cpu"))[0] == "sdpa"
    if attention.compiler_present():
        name, why = choose_attention(config, torch.device("cuda"))
        assert (name, "not 8" in why) == ("sdpa", True)
        assert choose_attention(tiny(head_dim=16).config, torch.device("cuda"))[0] == "flex"


# --- blocks of queries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["alibi", "rope", "none"])
@pytest.mark.parametrize("kind", ["plain", "pads", "documents", "cache"])
@pytest.mark.parametrize("elements", [1, 300, 1000])
def test_blocks_of_queries_change_nothing(
    kind: str, position: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid = tiny(layers="first:1", position=position, n_kv_heads=2, scan="tiled", dtype=torch.float64)
    tokens = random_tokens(3, 23)
    options: dict[str, Any] = {}
    if kind == "pads":
        options["attention_mask"] = torch.arange(23)[None] >= torch.tensor([0, 5, 22])[:, None]
    elif kind == "documents":
        options["document_ids"] = torch.arange(23).div(6, rounding_mode="floor").expand(3, -1)
    real = options.get("attention_mask", torch.ones(3, 23, dtype=torch.bool))

    def logits() -> Tensor:
        given = dict(options)
        if kind == "cache":
            given["cache"] = hybrid(random_tokens(3, 9, seed=3), use_cache=True).cache
        return logits_of(hybrid, tokens, **given)[real]

    whole = logits()
    monkeypatch.setattr(attention, "BIAS_ELEMENTS", elements)
    blockwise = logits()
    assert_close(blockwise, whole, 1e-12)
    by_blocks, expected = (gradients(hybrid, made.square().mean()) for made in (blockwise, whole))
    assert_all_close(by_blocks, expected, 1e-12)
    with torch.no_grad():
        assert_close(logits(), whole, 1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layers", ["standard", "first:1"])
def test_a_long_call_makes_a_bias_of_bounded_size(layers: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    N = 300
    monkeypatch.setattr(attention, "BIAS_ELEMENTS", 16 * 4 * N)  # 16 queries
    model, sizes, original = tiny(layers=layers, scan="tiled"), [], Layout.bias

    def watched(layout: Layout, queries: slice, keys: slice) -> Tensor | None:
        bias = original(layout, queries, keys)
        if bias is not None:
            sizes.append((bias.numel(), keys.stop))
        return bias

    monkeypatch.setattr(Layout, "bias", watched)
    tokens = random_tokens(1, N)
    with torch.set_grad_enabled(training):
        loss = loss_of(model, tokens)
    if training:
        loss.backward()
    assert max(size for size, _ in sizes) <= 16 * 4 * N
    assert {stop for _, stop in sizes} >= {16, 32, N}  # keys up to the block's last query only


def test_short_calls_make_one_bias_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, original = tiny(layers="standard", n_layers=3), [], Layout.bias
    monkeypatch.setattr(Layout, "bias", lambda *args: (calls.append(args), original(*args))[1])
    model(random_tokens(2, 64))
    assert len(calls) == 1
