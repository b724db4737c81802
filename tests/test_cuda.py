"""Scans, decoding and training steps on an NVIDIA GPU give the answers of the definition in float64.

The definition runs on the CPU, and on the GPU where rows are many.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import relative_rms

from recurformer import LanguageModel, ModelConfig
from recurformer.choose import choose_loss
from recurformer.model import Layer
from recurformer.scan.algorithms import SCANS
from recurformer.scan.fused import scan as fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

OPTIONS = {
    "alibi": {},
    "rope-gqa": {"position": "rope", "n_kv_heads": 2},
    "official": {"norm": "layer", "qk_norm": "full", "residual_scale": "none"},
    "swiglu-hybrid": {"activation": "swiglu", "layers": "first:1"},
    "width-12": {"head_dim": 12, "n_heads": 3},
}


def loss_and_gradients(
    model: LanguageModel, tokens: torch.Tensor, bf16: bool = False, mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        out = model(tokens, targets=tokens.roll(-1, 1), attention_mask=mask)
    assert out.loss is not None
    out.loss.backward()
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach().double().cpu(), **found}


def rms(t: torch.Tensor) -> float:
    return t.square().mean().sqrt().item()


def check(scan: str, options: dict, B: int, length: int, bf16: bool, masked: bool, exact: str = "cpu") -> None:
    """Assert that outputs and every gradient of a scan on the GPU equal those of the definition in float64.

    Args:
        scan: of the model.
        options: of the model, which has 2 layers.
        B: sequences of random tokens.
        length: positions.
        bf16: whether the scan runs under autocast to bf16.
        masked: whether some tokens are pads.
        exact: device of the definition.
    """
    seeds = range(3) if bf16 else range(1)
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        torch.manual_seed(seed)
        model = LanguageModel(ModelConfig(**{"vocab_size": 97, "d_model": 48, "n_layers": 2, "n_heads": 4, **options}))
        tokens = torch.randint(0, 97, (B, length))
        mask = torch.rand(B, length) > 0.3 if masked else None
        model.scan = "reference"
        moved = None if mask is None else mask.to(exact)
        expected = loss_and_gradients(copy.deepcopy(model).double().to(exact), tokens.to(exact), mask=moved)
        on_gpu = None if mask is None else mask.cuda()
        as_defined = loss_and_gradients(model.cuda(), tokens.cuda(), bf16, on_gpu)
        model.scan = scan
        found = loss_and_gradients(model, tokens.cuda(), bf16, on_gpu)

        real = torch.ones(B, length, dtype=torch.bool) if mask is None else mask
        for outcome in (expected, as_defined, found):
            outcome["logits"] = outcome["logits"][real]
        # A gradient that vanishes (one position has one key) has no relative error: compare it with the largest one.
        floor = 1e-2 * max(rms(value) for name, value in expected.items() if name != "logits")
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.isfinite().all(), name
            scale = rms(expected[name]) + floor
            pair = rms(value - expected[name]) / scale, rms(as_defined[name] - expected[name]) / scale
            errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        # Over several seeds, because the error of one bf16 gradient differs by half between two seeds.
        error, own = (sum(e**2 for e in side) ** 0.5 / len(side) ** 0.5 for side in zip(*pairs, strict=True))
        # In bf16 the definition's own error may exceed 2e-2. The scan must then be as exact as that.
        limit = 1e-4 if not bf16 else max(2e-2, (1.1 if name == "logits" else 1.5) * own)
        assert error <= limit, f"{name} is off by {error:.2g}, the definition by {own:.2g}"


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "pads"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [1, 7, 100])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("scan", SCANS)
def test_outputs_and_gradients_match_the_definition(
    scan: str, options: dict, length: int, bf16: bool, masked: bool
) -> None:
    check(scan, options, 3, length, bf16, masked)


# --- many rows, as in training ----------------------------------------------------------------------------------------

WIDE: dict[str, Any] = {"d_model": 128, "n_heads": 2}  # heads of 64
MANY = {  # options, and whether there are pads
    "alibi": (WIDE, False),
    "official-pads": ({**WIDE, "norm": "layer", "qk_norm": "full", "residual_scale": "none"}, True),
    "swiglu-rope-gqa": (
        {**WIDE, "n_heads": 4, "activation": "swiglu", "position": "rope", "n_kv_heads": 2},
        False,
    ),
}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Set the part of the GPU from which products apply GELU, and have all steps recorded again."""
    from recurformer.scan.fused import products
    from recurformer.scan.fused.engines import release_engines

    def choose(part: float) -> None:
        release_engines()
        monkeypatch.setattr(products, "FULL", part)

    yield choose
    release_engines()


@pytest.mark.parametrize(("options", "masked"), MANY.values(), ids=MANY.keys())
@pytest.mark.parametrize("scan", ["fused", "wavefront"])
def test_library_products_of_many_rows_in_bf16(
    full: Callable[[float], None], scan: str, options: dict, masked: bool
) -> None:
    """The library's products follow kernels that start early, and GELU is a kernel by itself."""
    full(2.0)  # GELU is never fused
    check(scan, options, 40, 71, True, masked, exact="cuda")


@pytest.mark.parametrize("save", ["minimal", "pairs", "inner", "all"])
@pytest.mark.parametrize("scan", ["fused", "wavefront"])
def test_every_amount_kept_for_the_backward_gives_the_gradients(
    monkeypatch: pytest.MonkeyPatch, scan: str, save: str
) -> None:
    """The layers have biases, which kernels that start early read too."""
    monkeypatch.setattr(fused, "affordable_save", lambda *_: save)
    check(scan, {**WIDE, "attention_bias": True, "mlp_bias": True}, 40, 71, True, True, exact="cuda")


def test_blocks_of_three_quarters_of_a_power_of_two() -> None:
    """198 blocks of 128 columns would take two waves on 132 processors, and 132 blocks of 192 columns take one."""
    from recurformer.scan.fused.engines import ENGINES

    if torch.cuda.get_device_properties(0).multi_processor_count != 132:
        pytest.skip("for GPUs with 132 processors")
    ENGINES.release()
    check("fused", {**WIDE, "d_mlp": 12600, "mlp_bias": True}, 200, 20, True, False, exact="cuda")
    products = [engine.forward.products for engine in ENGINES.engines() if engine.shape.sizes.F == 12600]
    tiles = [one.tile(12600, True) for one in products]
    assert tiles
    assert all((tile["BN"], tile["BR"]) == (128, 64) for tile in tiles)


@pytest.mark.parametrize("width", [8, 10, 60, 96, 128, 256])
def test_head_widths(width: int) -> None:
    check("fused", {"head_dim": width, "n_heads": 2}, 3, 31, True, False)


def test_hundreds_of_steps_in_bf16() -> None:
    check("fused", WIDE, 2, 700, True, False, exact="cuda")


def test_more_numbers_than_32_bits_can_count() -> None:
    """The last of many sequences has the outputs and gradients that it has alone."""
    torch.manual_seed(0)
    B, N, D = 512, 1100, 1024
    assert B * N * 4 * D > 2**31  # the size of the MLP's inner values, which are kept
    layer = LanguageModel(ModelConfig(vocab_size=1, d_model=D, n_layers=1, n_heads=16)).cuda()
    x = torch.randn(B, N, D, device="cuda", requires_grad=True)
    outcome = []
    for some in (x, x.detach()[-1:].clone().requires_grad_()):
        with torch.autocast("cuda", torch.bfloat16):
            z = run_layers(layer, some)
        z[-1].square().sum().backward()
        assert some.grad is not None
        outcome.append((z[-1].detach().clone(), some.grad[-1].clone()))
        del z
    assert x.grad is not None
    assert not x.grad[:-1].any()
    for many, one in zip(*outcome, strict=True):
        assert relative_rms(many, one) <= 4e-2  # either may be off by 2e-2


def run_layers(model: LanguageModel, x: torch.Tensor) -> torch.Tensor:
    """Return the outputs of a model's only layer."""
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    return fused.fused_scan(x, layer.maths(torch.bfloat16), model.layout(x.shape[1]))[0]


def test_one_call_leaves_the_results_of_another_alone(request: pytest.FixtureRequest) -> None:
    """Graphs write to the engine's buffers. Tensors that a call returned stay as they are."""
    request.getfixturevalue("poisoned_memory")
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=97, n_layers=1, **WIDE)).cuda()
    weights = [p for name, p in model.named_parameters() if name.startswith("layers")]
    first, second = (torch.randn(40, 71, 128, device="cuda", requires_grad=True) for _ in range(2))

    z = run_layers(model, first)
    loss = z.square().sum()
    found = [z.detach(), *torch.autograd.grad(loss, [first, *weights], retain_graph=True)]
    copies = [t.clone() for t in found]
    run_layers(model, second).square().sum().backward()
    again = torch.autograd.grad(loss, [first, *weights])
    assert all(t.isfinite().all() for t in copies)
    assert all(torch.equal(one, other) for one, other in zip(found, copies, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(again, copies[1:], strict=True))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("scan", ["fused", "wavefront"])
def test_products_that_end_with_gelu_of_several_blocks_of_rows_in_bf16(
    full: Callable[[float], None], scan: str, activation: str
) -> None:
    """A chunk also has more rows than a norm weight's gradient has parts."""
    from recurformer.scan.fused.products import ACTIVATION_TILE
    from recurformer.scan.fused.workspace import PARTS
    from recurformer.scan.schedule import WAVEFRONT_CHUNK as CHUNK

    full(0.0)  # GELU is always fused
    B, length = 200, 37
    assert ACTIVATION_TILE["BM"] < B
    assert B * min(CHUNK, length) > PARTS
    check(scan, {**WIDE, "activation": activation}, B, length, True, False, exact="cuda")


@pytest.mark.parametrize("layers", ["recurrent", "standard", "first:1"])
def test_decoding_step_by_step_equals_the_full_forward(layers: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=97, d_model=48, n_layers=2, layers=layers)).cuda().eval()
    tokens = torch.randint(0, 97, (2, 40), device="cuda")
    with torch.no_grad():
        full, cache, steps = model(tokens).logits, None, []
        for position in range(tokens.shape[1]):
            out = model(tokens[:, position : position + 1], cache=cache, use_cache=True)
            cache = out.cache
            steps.append(out.logits)
    assert relative_rms(torch.cat(steps, 1), full) <= 1e-5


@pytest.mark.parametrize("scan", SCANS)
def test_two_runs_are_bit_identical(scan: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=97, d_model=48, n_layers=2)).cuda()
    model.scan = scan
    tokens = torch.randint(0, 97, (2, 50), device="cuda")
    first, second = (loss_and_gradients(model, tokens) for _ in range(2))
    for name, value in first.items():
        # PyTorch sums the embedding's gradient with atomics, outside of the scan.
        assert name == "embedding.weight" or torch.equal(value, second[name]), name


def test_generation_runs_and_repeats_with_its_seed() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=97, d_model=48, n_layers=2)).cuda()
    prompt = torch.randint(0, 97, (2, 5), device="cuda")
    first, second = (model.generate(prompt, 12, seed=3) for _ in range(2))
    assert first.shape == (2, 17)
    assert torch.equal(first, second)


# --- training: standard layers, the loss, one step -------------------------------------------------------------------


def compiles(test: Any) -> Any:
    """Ignore warnings of PyTorch's compiler itself, at its import and about FlexAttention."""
    for ignored in (
        "ignore:.*torch.jit.script_method:DeprecationWarning",
        "ignore:The .grad attribute:UserWarning",
        "ignore:TensorFloat32 tensor cores:UserWarning",
    ):
        test = pytest.mark.filterwarnings(ignored)(test)
    return test


STANDARD = {
    "alibi": {},
    "gqa": {"n_kv_heads": 2},
    "official": {"norm": "layer", "qk_norm": "full", "residual_scale": "none"},
    "rope": {"position": "rope"},
    "width-24": {"head_dim": 24},
    "width-80": {"head_dim": 80},
}


CASES = [  # each one is compiled, which takes seconds
    ("alibi", "plain", 300, True),
    ("alibi", "pads", 300, False),
    ("alibi", "documents", 128, True),
    ("gqa", "pads", 300, True),
    ("official", "plain", 300, False),
    ("rope", "documents", 300, True),
    ("width-24", "plain", 128, True),
    ("width-80", "documents", 300, True),
]


@compiles
@pytest.mark.parametrize(("options", "kind", "length", "bf16"), CASES)
def test_compiled_standard_layers_match_the_definition(options: str, kind: str, length: int, bf16: bool) -> None:
    """Outputs and gradients of FlexAttention and fused element-wise steps equal those of float64 on the CPU."""
    torch.manual_seed(0)
    config = ModelConfig(
        **{"vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4, "layers": "standard", **STANDARD[options]}
    )
    model = LanguageModel(config)
    tokens, given = torch.randint(0, 97, (3, length)), {}
    if kind == "pads":
        given["attention_mask"] = torch.rand(3, length) > 0.3
    if kind == "documents":
        given["document_ids"] = (torch.rand(3, length) < 0.03).cumsum(1)
    real = given.get("attention_mask", torch.ones(3, length, dtype=torch.bool))

    def outcome(of: LanguageModel, autocast: bool) -> dict[str, torch.Tensor]:
        device = of.embedding.weight.device
        of.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            moved = {name: tensor.to(device) for name, tensor in given.items()}
            out = of(tokens.to(device), targets=tokens.roll(-1, 1).masked_fill(~real, -100).to(device), **moved)
        out.loss.backward()
        found = {name: p.grad.double().cpu() for name, p in of.named_parameters() if p.grad is not None}
        return {"logits": out.logits.detach().double().cpu()[real], **found}

    expected = outcome(copy.deepcopy(model).double(), False)
    plain = outcome(model.cuda(), bf16)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.compiled = True
    found = outcome(model, bf16)
    floor = 1e-2 * max(rms(value) for name, value in expected.items() if name != "logits")
    for name, value in found.items():
        assert value.isfinite().all(), name
        scale = rms(expected[name]) + floor
        error, own = rms(value - expected[name]) / scale, rms(plain[name] - expected[name]) / scale
        limit = 1e-4 if not bf16 else 2e-2 if name == "logits" else max(2e-2, 1.5 * own)
        assert error <= limit, f"{name} is off by {error:.2g}, uncompiled by {own:.2g}"


@compiles
def test_a_standard_layer_makes_no_square_bias() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=97, d_model=64, n_layers=1, n_heads=4, layers="standard")).cuda()
    N = 4096
    with torch.autocast("cuda", torch.bfloat16):
        model(torch.zeros(1, N, dtype=torch.int64, device="cuda")[:, :256])  # kernels are compiled here
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.hidden(torch.randint(0, 97, (1, N), device="cuda"), None)
    assert torch.cuda.max_memory_allocated() - before < N * N  # a bias of 4 heads in 16 bits takes 8 N^2 bytes


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"vocab_multiple": 128}, {"vocab_multiple": 128, "tie_embeddings": True}])
def test_the_fused_loss_is_the_plain_one(options: dict, bf16: bool) -> None:
    if choose_loss(torch.device("cuda"))[0] != "fused":
        pytest.skip("needs liger-kernel")
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=1000, d_model=64, n_layers=1, n_heads=4, **options)).cuda()
    tokens, targets = torch.randint(0, 1000, (2, 4, 60), device="cuda")
    targets[0, :20] = -100
    outcomes = []
    for wanted, autocast in ((True, False), (True, bf16), (False, bf16)):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(tokens, targets=targets, return_logits=wanted).loss
        assert loss.dtype == torch.float32
        (3 * loss).backward()
        outcomes.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    exact, plain, fused = outcomes
    assert not fused["embedding.weight" if model.config.tie_embeddings else "head.weight"][1000:].any()
    for name, value in fused.items():
        limit = max(2e-2, 1.5 * relative_rms(plain[name], exact[name])) if bf16 else 1e-4
        assert relative_rms(value, exact[name]) <= limit, name


@pytest.mark.parametrize("wide", [None, 4])
def test_a_step_of_micro_batches_waits_for_the_gpu_once(wide: int | None) -> None:
    """liger-kernel is not counted: it reads some numbers in each micro-batch."""
    from recurformer.data.windows import Batch
    from recurformer.training.config import TrainConfig
    from recurformer.training.distributed import OneProcess
    from recurformer.training.optimizer import make_optimizer
    from recurformer.training.steps import gradient_step

    torch.manual_seed(0)
    config = TrainConfig(
        model=ModelConfig(vocab_size=97, d_model=64, n_layers=2, n_heads=4, layers="first:1"),
        batch_size=8, micro_batch_size=2, recurrent_micro_batch_size=wide, precision="bf16",
    )  # fmt: skip
    model = LanguageModel(config.model).cuda()
    optimizer = make_optimizer(model, config.optimizer)
    tokens = torch.randint(0, 97, (8, 40))
    batch = Batch(tokens=tokens, targets=tokens.roll(-1, 1), document_ids=None, window_ids=torch.arange(8))

    def step() -> tuple[float, float, int]:
        return gradient_step(model, optimizer, batch, config, torch.device("cuda"), OneProcess())

    assert step()[2] == 8 * 40  # every target of every micro-batch is counted
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # this call itself warns that it is a prototype
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [
        f"{warning.filename}:{warning.lineno} {warning.message}"
        for warning in seen
        if "called a synchronizing" in str(warning.message)
    ]
    assert len([wait for wait in waits if "liger_kernel" not in wait]) <= 1, waits
