"""The fused scan in Triton's interpreter: outputs and gradients of one layer and of a stack equal the definition's.

The same kernels run compiled in tests/test_cuda.py. Chunks and leaves are tiny here. A few positions then exercise
every kernel: pulls and pushes, several leaves, a last chunk that is not full.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import layer_of, random_tokens, relative_rms, tiny
from torch import Tensor

from recurformer import KVCache, LanguageModel, ModelConfig
from recurformer.attention import Layout
from recurformer.choose import choose_scan
from recurformer.layer import LayerMaths
from recurformer.scan.fused import scan as fused
from recurformer.scan.fused.engines import ENGINES
from recurformer.scan.fused.scan import fused_stack_scan
from recurformer.scan.reference import reference_scan
from recurformer.scan.wavefront import wavefront_scan

interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton, and a machine without a GPU, where its interpreter takes the place of the compiler",
)
CPU = torch.device("cpu")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield
    ENGINES.release()


def small(**options: Any) -> LanguageModel:
    return tiny(**{"d_model": 8, "n_layers": 1, "n_heads": 2, "d_mlp": 12, **options})


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Return a list that records the activation and the direction of each product that our kernel makes from now on."""
    from recurformer.scan.fused.products import Products

    calls: list[tuple[int, bool]] = []
    original = Products.multiply_tiled

    def multiply(
        self: Products,
        a: Tensor,
        weight: Tensor,
        out: Tensor,
        transposed: bool,
        activation: int = -1,
        *rest: Any,
        **named: Any,
    ) -> None:
        calls.append((activation, transposed))
        original(self, a, weight, out, transposed, activation, *rest, **named)

    monkeypatch.setattr(Products, "multiply_tiled", multiply)
    return calls


def compare(
    model: LanguageModel,
    length: int,
    limit: float,
    *,
    batch: int = 1,
    past: int = 0,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """Assert that outputs, pairs and gradients of a model's layers, as a stack, equal the definition's in float64.

    The relative error (RMS) of each tensor may be `limit`.
    """
    cache = None
    if past:
        cache = KVCache(model.config, batch)
        with torch.no_grad():
            model(random_tokens(batch, past, seed=5), cache=cache)
    layout = model.layout(length, mask, documents, cache)
    pairs = [None if cache is None else cache.past(l) for l in range(len(model.layers))]
    draw = torch.Generator().manual_seed(7)
    x, weight = (torch.randn(batch, length, model.config.d_model, generator=draw) for _ in range(2))

    def outcome(layers: list[LayerMaths], x: Tensor, layout: Layout, exact: bool) -> list[Tensor]:
        x = x.clone().requires_grad_()
        if exact:
            z, made = x, []
            for maths, p in zip(layers, pairs, strict=True):
                z, k, v = reference_scan(z, maths, layout, None if p is None else (p[0].double(), p[1].double()))
                made.append((k, v))
        else:
            z, made = fused_stack_scan(x, layers, layout, pairs if past else None, **options)
        (z * weight).sum().backward()
        assert x.grad is not None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return [t.detach().double() for t in (z, x.grad, *(t for pair in made for t in pair), *gradients)]

    found = outcome([layer_of(model, l).maths(dtype) for l in range(len(model.layers))], x, layout, False)
    model.double()
    exact_layout = model.layout(length, mask, documents, cache)
    expected = outcome([layer_of(model, l).maths() for l in range(len(model.layers))], x.double(), exact_layout, True)
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert relative_rms(one, other) <= limit, index


@interpreter
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"length": 9, "chunk": 4, "leaf": 2}),
        ({"position": "rope", "n_kv_heads": 1, "head_dim": 6}, {"length": 3, "batch": 2, "past": 2, "save": "minimal"}),
        (
            {"norm": "layer", "qk_norm": "full", "activation": "swiglu", "attention_bias": True, "mlp_bias": True,
             "n_heads": 3, "head_dim": 5, "position": "none"},
            {"length": 3},
        ),
    ],
    ids=["pulls and pushes", "rope, a past, shared heads", "full norm, swiglu, biases, odd width"],
)  # fmt: skip
def test_a_layer_equals_the_definition(interpreted: None, options: dict[str, Any], settings: dict[str, Any]) -> None:
    compare(small(**options), limit=1e-5, **{"chunk": 4, "leaf": 4, **settings})


@interpreter
def test_pads_and_documents_equal_the_definition(interpreted: None, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("poisoned_memory")
    mask = torch.tensor([[True, False, True, True, True, True], [True, True, True, True, False, True]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 3, 3, 3, 3, 3]])
    compare(small(), 6, 1e-5, batch=2, mask=mask, documents=documents, chunk=4, leaf=2)


@interpreter
def test_a_stack_of_layers_equals_one_after_the_other(interpreted: None) -> None:
    compare(small(n_layers=2), 5, 1e-5, chunk=2, leaf=2)


@interpreter
def test_gelu_and_its_slope_are_exact_and_gelu_at_infinity_too(interpreted: None) -> None:
    import triton
    import triton.language as tl

    from recurformer.scan.fused.kernels import common

    @triton.jit
    def both(u, gelu, slope, activated: tl.constexpr, activation_slope: tl.constexpr, N: tl.constexpr):
        n = tl.arange(0, N)
        value = tl.load(u + n)
        tl.store(gelu + n, activated(value, value, 0, tl.float32))
        tl.store(slope + n, activation_slope(value, 0))

    u = torch.cat([torch.linspace(-12, 12, 1019), torch.tensor([-3e38, 3e38, -torch.inf, torch.inf, torch.nan])])
    gelu, slope = torch.empty_like(u), torch.empty_like(u)
    launch: Any = both
    with np.errstate(over="ignore", invalid="ignore"):  # NumPy, which runs the interpreter, warns; a GPU does not
        launch[(1,)](u, gelu, slope, common.activated, common.activation_slope, len(u))
    exact = u[:-3].double().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    expected.sum().backward()
    assert exact.grad is not None
    assert (gelu[:-3] - expected.detach()).abs()[:-2].max() <= 1e-6
    assert (slope[:-3] - exact.grad).abs().max() <= 1e-6
    assert gelu[-5:-1].tolist() == [0.0, u[-4].item(), 0.0, torch.inf]
    assert gelu[-1].isnan()
    assert slope[-1].isnan()


@interpreter
@pytest.mark.parametrize(("at_once", "save"), [(1, "inner"), (2, "all")])
def test_queries_some_positions_at_a_time(
    interpreted: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, at_once: int, save: str
) -> None:
    """There are several chunks, the last one not full, with pads and with a past."""
    from recurformer.scan.fused import forward

    request.getfixturevalue("poisoned_memory")
    model, batch = small(n_kv_heads=1, attention_bias=True), 2
    row = batch * (8 + (2 + 2 * 1) * 4) * 4  # bytes of a position: D, and H + 2 G heads of 4, in float32
    monkeypatch.setattr(forward, "L2_BYTES", at_once * row)
    mask = torch.tensor([[True, False, True, True, True, True], [True, True, True, True, False, True]])
    compare(model, 6, 1e-5, batch=batch, mask=mask, chunk=4, leaf=2, save=save)
    (made,) = ENGINES.engines()
    assert made.forward.positions_at_once == made.forward.buffers.h_some.shape[1] == at_once
    compare(small(), 5, 1e-5, past=2, chunk=4, leaf=2, save=save)


@interpreter
@pytest.mark.parametrize("save", ["minimal", "pairs", "inner", "all"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_every_amount_kept_for_the_backward_gives_the_gradients(interpreted: None, activation: str, save: str) -> None:
    several = {"n_layers": 2, "position": "rope"} if activation == "gelu" else {"attention_bias": True}
    compare(small(activation=activation, mlp_bias=True, **several), 3, 1e-5, chunk=2, leaf=2, save=save)


@interpreter
def test_keeping_more_changes_no_bit(interpreted: None, request: pytest.FixtureRequest) -> None:
    """Gradients are equal whether the products with Q, K and V are kept or made again, with pads and documents."""
    request.getfixturevalue("poisoned_memory")
    model = small(n_layers=2, n_kv_heads=1, norm="layer", attention_bias=True, mlp_bias=True)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    layout = model.layout(3, mask, torch.tensor([[0, 0, 0], [1, 2, 2]]))
    x = torch.randn(2, 3, model.config.d_model, requires_grad=True)

    def gradients(save: str) -> list[Tensor]:
        maths = [layer_of(model, l).maths() for l in range(2)]
        z, _ = fused_stack_scan(x, maths, layout, chunk=2, leaf=2, save=save)
        return [z[mask], *torch.autograd.grad((z * z)[mask].sum(), [x, *model.layers.parameters()])]

    for kept, again in zip(gradients("all"), gradients("inner"), strict=True):
        assert kept.isfinite().all()
        assert torch.equal(kept, again)


@interpreter
def test_the_memory_of_the_device_bounds_how_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from recurformer.scan.fused.memory import affordable_save

    config = ModelConfig(d_model=64, n_heads=4, n_layers=3, layers="first:2", d_mlp=256)
    pairs, inner = 2 * 3 * 64, 2 * 256  # values a position, of the two recurrent layers
    for rows, expected in ((1.0, "inner"), (1.01 * (pairs + inner) / pairs, "minimal"), (1.001, "pairs")):
        assert affordable_save(config, int(rows * 2**34 / (pairs + inner)), CPU) == expected

    wide = ModelConfig(d_model=1408, n_heads=22, n_layers=1)
    every = (5 + 4) * 1408  # products with Q, K and V, pairs, the MLP's inner values
    assert affordable_save(wide, 2**34 // every, CPU) == "all"
    assert affordable_save(wide, 2**34 // every + 1, CPU) == "inner"


@interpreter
@pytest.mark.parametrize("norm", [{"qk_norm": "full", "norm": "layer"}, {"qk_norm": "head"}, {"n_kv_heads": 3}])
def test_heads_in_several_programs(interpreted: None, norm: dict[str, Any]) -> None:
    compare(small(n_heads=3, d_model=12, attention_bias=True, **norm), 3, 1e-5, chunk=4, leaf=4)


@interpreter
@pytest.mark.parametrize("d_mlp", [24, 160])  # 160: a program makes 128 + 64 columns
def test_half_precision_with_the_activation_inside_the_products(
    interpreted: None, request: pytest.FixtureRequest, d_mlp: int
) -> None:
    # float16, because the interpreter multiplies bfloat16 matrices wrongly.
    ours = watched(request.getfixturevalue("monkeypatch"))
    model = small(d_model=16, d_mlp=d_mlp, activation="gelu_tanh")
    for save in ("pairs", "inner"):
        compare(model.float(), 3, 1e-2, dtype=torch.float16, chunk=4, leaf=4, save=save)
    assert {kind for kind, _ in ours} == {-1, 1}  # without the activation, and with it
    assert {transposed for _, transposed in ours} == {True, False}


@interpreter
def test_half_precision_with_blocks_that_are_small(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks are taken where others would be too few; here they have 16 rows, for a batch of 17."""
    from recurformer.scan.fused import products

    monkeypatch.setattr(products, "THIN_ROWS", 1)
    monkeypatch.setattr(products, "BUSY", 1e9)
    monkeypatch.setattr(products, "SMALL_TILE", {**products.SMALL_TILE, "BM": 16})
    compare(small(d_model=16, d_mlp=24), 1, 1e-2, batch=17, dtype=torch.float16, chunk=2, leaf=2)
    (made,) = ENGINES.engines()
    tile = made.forward.products.tile(16, False)
    assert (tile["BM"], tile["BK"]) == (16, 128)


@interpreter
def test_half_precision_with_the_activation_behind_library_products(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens where rows are many and blocks of one size would not fill the GPU."""
    from recurformer.scan.fused import products

    monkeypatch.setattr(products, "THIN_ROWS", 0)
    monkeypatch.setattr(products, "FULL", 2.0)
    compare(small(mlp_bias=True), 5, 1e-2, dtype=torch.float16, chunk=4, leaf=4)
    (made,) = ENGINES.engines()
    assert not made.forward.products.fuses_activation


@interpreter
def test_the_backward_has_longer_leaves(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are twice as long as the forward's, as by default; there are two chunks of two of them."""
    monkeypatch.setattr(fused, "LEAF", 2)
    monkeypatch.setattr(fused, "LEAF_BACKWARD", 4)
    compare(small(), 11, 1e-5, chunk=8)
    (made,) = ENGINES.engines()
    assert (made.shape.leaf, made.shape.leaf_backward) == (2, 4)


@interpreter
def test_a_model_runs_it_and_fills_its_cache(interpreted: None) -> None:
    model = small(n_layers=2)
    tokens = random_tokens(1, 3)
    with torch.no_grad():
        expected = model(tokens, use_cache=True)
        model.scan = "wavefront"
        found = model(tokens, use_cache=True)
    assert relative_rms(found.logits, expected.logits) <= 1e-5
    for layer in range(2):
        for one, other in zip(found.cache.past(layer), expected.cache.past(layer), strict=True):
            assert relative_rms(one, other) <= 1e-5


@interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which runs the interpreter, warns of the NaN
@pytest.mark.parametrize("save", ["inner", "all"])
def test_one_call_does_not_change_the_results_of_another(interpreted: None, save: str) -> None:
    """A call under inference_mode and a call full of NaN leave later calls alone."""
    model = small(n_layers=2)
    layout = model.layout(2)

    def gradients(x: Tensor) -> list[Tensor]:
        z, _ = fused_stack_scan(x, [layer_of(model, l).maths() for l in range(2)], layout, chunk=2, leaf=2, save=save)
        return list(torch.autograd.grad(z.sum(), list(model.layers.parameters())))

    x = torch.randn(1, 2, 8)
    with torch.inference_mode():
        fused_stack_scan(x, [layer_of(model, l).maths() for l in range(2)], layout, chunk=2, leaf=2)
    with torch.no_grad():
        fused_stack_scan(x, [layer_of(model, l).maths() for l in range(2)], layout, chunk=2, leaf=2)
    clean = gradients(x)
    gradients(x * float("nan"))
    for before, after in zip(clean, gradients(x), strict=True):
        assert torch.equal(before, after)


@interpreter
def test_engines_are_dropped_when_they_hold_too_much_memory(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from recurformer.scan.fused import engines

    compare(small(), 3, 1e-5, chunk=2, leaf=2)
    (made,) = ENGINES.engines()
    before, workspace = made.bytes, made.workspace
    assert before == sum(
        t.numel() * t.element_size()
        for group in (
            vars(workspace.weights), vars(made.forward.buffers), vars(made.backward.buffers),
            made.backward.gradients.sums, {"": workspace.table},
        )
        for t in group.values()
    )  # fmt: skip
    compare(small(), 3, 1e-5, batch=2, chunk=2, leaf=2)
    assert ENGINES.engines() != [made]
    assert ENGINES.engines()[1].bytes > before
    monkeypatch.setattr(engines, "MEMORY_PART", 2**40)  # no memory for a second engine
    compare(small(), 3, 1e-5, batch=3, chunk=2, leaf=2)
    assert [engine.shape.B for engine in ENGINES.engines()] == [3]


@interpreter
def test_outputs_of_the_last_layer_do_not_keep_those_of_all_layers(interpreted: None) -> None:
    """Without a backward the outputs of other layers are freed. A backward needs them."""
    model, x = small(n_layers=2), torch.randn(1, 2, 8)
    maths, layout = [layer_of(model, l).maths() for l in range(2)], model.layout(2)
    for differentiable in (False, True):
        with torch.set_grad_enabled(differentiable):
            z, _ = fused_stack_scan(x, maths, layout, chunk=2, leaf=2)
        assert z.untyped_storage().nbytes() == x.nbytes * (2 if differentiable else 1)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_attention_kernels_compile_to_wide_loads() -> None:
    """They are compiled for an H100, without having one. 16-bit loads mean that Triton lost an address's alignment."""
    kernels = ["attend_leaf", "merge_keys", "leaf_gradient", "query_gradient"]
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script, *kernels], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    narrow = json.loads(done.stdout)
    assert set(narrow) == {*kernels, "merge_keys_pull"}
    assert set(narrow.values()) == {0}


# --- choice of the scan, and refusals --------------------------------------------------------------------------------


def test_without_triton_the_functions_import_and_the_error_names_what_runs() -> None:
    script = (
        "import sys; sys.modules['triton'] = None; import torch; from recurformer import LanguageModel, ModelConfig\n"
        "import recurformer.scan.fused.scan, recurformer.scan.fused.engines\n"
        "model = LanguageModel(ModelConfig(vocab_size=4, d_model=4, n_layers=1, n_heads=1)); model.scan = 'fused'\n"
        "model(torch.zeros(1, 2, dtype=torch.int64))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "triton is not installed; install it, or scan = 'tiled'" in done.stderr.splitlines()[-1]


def test_without_a_gpu_the_error_names_what_runs() -> None:
    model = tiny()
    model.scan = "fused"
    with pytest.raises(ValueError, match=r"can't run: .*scan = 'tiled'"):
        model(random_tokens(1, 4))


def test_a_wavefront_on_a_gpu_is_that_of_the_kernels_or_refused() -> None:
    with pytest.raises(ValueError, match=r"'wavefront', which can't run: .*scan = 'tiled'"):
        choose_scan("wavefront", ModelConfig(d_model=8, n_heads=1, head_dim=300), torch.device("cuda"))
    assert choose_scan("wavefront", ModelConfig(), CPU)[0] == "wavefront"


def test_arguments_are_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("recurformer.hardware.HAS_TRITON", True)
    model = small()
    maths, layout = layer_of(model, 0).maths(), model.layout(2)
    x = torch.randn(1, 2, 8)
    with pytest.raises(ValueError, match="chunk is 12; it must be a power of two"):
        fused_stack_scan(x, [maths], layout, chunk=12)
    with pytest.raises(ValueError, match="leaf is 3; it must be a power of two"):
        wavefront_scan(x, [maths], layout, leaf=3)
    with pytest.raises(ValueError, match="save is 'some'"):
        fused_stack_scan(x, [maths], layout, save="some")
    with pytest.raises(ValueError, match=r"compute dtype is torch\.float64"):
        fused_stack_scan(x.double(), [layer_of(model.double(), 0).maths()], layout)
    with pytest.raises(ValueError, match="head width is 200; in float32 it must be 1 to 128"):
        choose_scan("fused", ModelConfig(d_model=8, n_heads=1, head_dim=200), CPU, dtype=torch.float32)
    wide = ModelConfig(d_model=8, n_heads=1, head_dim=300)
    with pytest.raises(ValueError, match="head width is 300; it must be 1 to 256"):
        choose_scan("fused", wide, CPU)


def test_layers_that_are_more_than_layers_stay_by_themselves() -> None:
    model = tiny(n_layers=4)
    assert model.groups(range(4), together=True) == [[0, 1, 2, 3]]
    assert model.groups(range(4), together=False) == [[0], [1], [2], [3]]
    assert tiny(n_layers=4, layers=("recurrent", "standard", "recurrent", "recurrent")).groups(
        range(4), together=True
    ) == [
        [0],
        [1],
        [2, 3],
    ]
    layer_of(model, 1).register_forward_hook(lambda *_: None)
    assert model.groups(range(4), together=True) == [[0], [1], [2, 3]]


def test_the_choice_follows_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, config = torch.device("cuda"), ModelConfig()
    monkeypatch.setattr("recurformer.hardware.HAS_TRITON", True)

    def chosen(config: ModelConfig, **shape: int) -> str:
        return choose_scan("auto", config, gpu, **shape)[0]  # pyright: ignore[reportArgumentType]

    assert chosen(config, batch_size=512, length=512) == "fused"
    assert chosen(config, batch_size=64, length=512) == "wavefront"
    deep = ModelConfig(n_layers=24)
    assert chosen(deep, batch_size=8, length=512) == "wavefront"
    assert (
        chosen(deep, batch_size=8, length=64) == "fused"
    )  # a wavefront takes 27 steps of all layers for the work of 4
    assert chosen(config, batch_size=8, length=64) == "wavefront"
    assert chosen(ModelConfig(layers="first:1"), batch_size=64, length=512) == "fused"
    assert chosen(config, batch_size=1, length=1) == "tiled"
    for length in (9, 16, 17):  # the model has no recurrent layer
        assert chosen(ModelConfig(layers="standard"), batch_size=8, length=length) == "fused"
    name, why = choose_scan("auto", config, gpu, dtype=torch.float64)
    assert name == "tiled"
    assert "float64" in why
    assert "side by side up to a batch of 128" in choose_scan("auto", config, gpu)[1]
    assert "side by side" not in choose_scan("auto", config, gpu, together=False)[1]


@pytest.mark.parametrize(
    ("options", "call", "expected"),
    [
        ({}, {}, "wavefront"),  # batch and length unknown, as in `recurformer info`
        ({}, {"batch_size": 16, "length": 256}, "wavefront"),
        ({}, {"batch_size": 16, "length": 64}, "tiled"),
        ({}, {"batch_size": 1, "length": 1}, "tiled"),
        ({}, {"batch_size": 512, "length": 256}, "tiled"),
        ({"layers": "first:1"}, {"batch_size": 16, "length": 256}, "tiled"),
        ({"layers": ("recurrent", "standard") * 2}, {"batch_size": 16, "length": 256}, "tiled"),
        ({"layers": ("standard", "recurrent", "recurrent", "standard")}, {"length": 256}, "wavefront"),
        ({"d_model": 1024}, {"batch_size": 1, "length": 256}, "tiled"),
        ({}, {"batch_size": 2, "length": 256, "past": 256}, "wavefront"),
        ({}, {"batch_size": 2, "length": 256, "past": 257}, "tiled"),
        ({}, {"batch_size": 1, "length": 4096}, "wavefront"),
        ({}, {"batch_size": 1, "length": 4097}, "tiled"),
        ({}, {"batch_size": 102, "length": 1024}, "wavefront"),  # 4 layers with 640 values a position, 4 bytes each
        ({}, {"batch_size": 103, "length": 1024}, "tiled"),
        ({}, {"batch_size": 52, "length": 1024, "dtype": torch.float64}, "tiled"),
        ({}, {"batch_size": 16, "length": 256, "together": False}, "tiled"),
    ],
    ids=lambda value: "-".join(str(part) for part in value.values()) if isinstance(value, dict) else value,
)
def test_on_a_cpu_layers_stand_side_by_side_where_products_are_small(
    options: dict[str, Any], call: dict[str, Any], expected: str
) -> None:
    name, why = choose_scan("auto", ModelConfig(**options), CPU, **call)
    assert name == expected
    assert ("side by side" in why) == (name == "wavefront")
    assert ("up to a batch of" in why) == (name == "wavefront" and "batch_size" not in call)


def test_an_unknown_batch_is_told_the_limit() -> None:
    _, why = choose_scan("auto", ModelConfig(), CPU)
    limit = int(why.rsplit(" ", 1)[1])
    assert choose_scan("auto", ModelConfig(), CPU, batch_size=limit)[0] == "wavefront"
    assert choose_scan("auto", ModelConfig(), CPU, batch_size=limit + 1)[0] == "tiled"


def test_the_interpreter_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the interpreter would run the wavefront's kernels: slowly, and not in float64."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("recurformer.hardware.HAS_TRITON", True)
    assert choose_scan("auto", ModelConfig(), CPU, batch_size=2, length=256)[0] == "tiled"
    with pytest.raises(ValueError, match=r"'wavefront', which can't run: the compute dtype is torch\.float64"):
        choose_scan("wavefront", ModelConfig(), CPU, dtype=torch.float64)
    model = tiny(n_layers=2, dtype=torch.float64)
    assert model(random_tokens(1, 130)).logits.dtype == torch.float64


def test_a_model_tells_the_choice_its_past(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(*args: Any, **call: Any) -> tuple[str, str]:
        asked.append((call["batch_size"], call["length"], call["past"], call["together"]))
        return choose_scan(*args, **call)

    monkeypatch.setattr("recurformer.model.choose_scan", choose)
    model = tiny(n_layers=2)
    cache = model(random_tokens(2, 5), use_cache=True).cache
    model(random_tokens(2, 3), cache=cache)
    model.recompute = "all"
    model(random_tokens(2, 4))
    assert asked == [(2, 5, 0, True), (2, 3, 5, True), (2, 4, 0, False)]
