"""The model around its layers: positions, names, initialisation, loss, precision, and what bad input gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU_SCANS,
    V,
    assert_all_close,
    assert_close,
    count_evaluations,
    every_scan,
    gradients,
    layer_of,
    logits_and_loss,
    logits_of,
    loss_of,
    random_tokens,
    relative_rms,
    tiny,
)
from torch import Tensor

from recurformer import LanguageModel, ModelConfig
from recurformer.attention import alibi_slopes
from recurformer.choose import SCAN_CHOICES, choose_scan

# --- ALiBi slopes ----------------------------------------------------------------------------------------------------

# Exponents e of the slopes 2^-e, printed from the two published formulas.
GEOMETRIC = {
    1: [8],
    2: [4, 8],
    3: [8 / 3, 16 / 3, 8],
    6: [4 / 3, 8 / 3, 4, 16 / 3, 20 / 3, 8],
    8: [1, 2, 3, 4, 5, 6, 7, 8],
    12: [2 / 3, 4 / 3, 2, 8 / 3, 10 / 3, 4, 14 / 3, 16 / 3, 6, 20 / 3, 22 / 3, 8],
    22: [h * 4 / 11 for h in range(1, 23)],
}
INTERLEAVED = {
    1: [8],
    2: [4, 8],
    3: [4, 8, 2],
    6: [2, 4, 6, 8, 1, 3],
    8: [1, 2, 3, 4, 5, 6, 7, 8],
    12: [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5],
    22: [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75],
}


@pytest.mark.parametrize("heads", GEOMETRIC)
@pytest.mark.parametrize(("scheme", "table"), [("geometric", GEOMETRIC), ("interleaved", INTERLEAVED)], ids=["g", "i"])
def test_alibi_slopes_are_the_published_tables(heads: int, scheme: str, table: dict[int, list[float]]):
    slopes = alibi_slopes(heads, scheme)
    assert slopes.dtype == torch.float64
    assert_close(slopes, torch.tensor([2.0**-e for e in table[heads]], dtype=torch.float64), 1e-15)


def test_a_few_slopes_as_decimals():
    assert alibi_slopes(8).tolist() == [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    assert alibi_slopes(22)[0].item() == pytest.approx(0.777203, abs=1e-6)
    assert alibi_slopes(22)[10].item() == 0.0625
    assert alibi_slopes(22, "interleaved")[16].item() == pytest.approx(0.840896, abs=1e-6)


# --- names and initialisation ----------------------------------------------------------------------------------------


def test_state_dict_names_are_frozen():
    options: dict[str, Any] = {"layers": "first:1", "activation": "swiglu", "attention_bias": True, "mlp_bias": True}
    names = list(tiny(**options).state_dict())
    layer = [
        "attention_norm.weight", "q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight",
        "v_proj.bias", "o_proj.weight", "o_proj.bias", "q_norm.weight", "k_norm.weight", "mlp_norm.weight",
        "up_proj.weight", "up_proj.bias", "gate_proj.weight", "gate_proj.bias", "down_proj.weight", "down_proj.bias",
    ]  # fmt: skip
    layers = [f"layers.{l}.{name}" for l in range(2) for name in layer]
    assert names == ["embedding.weight", *layers, "norm.weight", "head.weight"]


def test_state_dict_names_of_the_smallest_model():
    assert list(tiny(n_layers=1, qk_norm="none", tie_embeddings=True).state_dict()) == [
        "embedding.weight", "layers.0.attention_norm.weight", "layers.0.q_proj.weight", "layers.0.k_proj.weight",
        "layers.0.v_proj.weight", "layers.0.o_proj.weight", "layers.0.mlp_norm.weight", "layers.0.up_proj.weight",
        "layers.0.down_proj.weight", "norm.weight",
    ]  # fmt: skip


def test_both_kinds_of_layer_have_the_same_parameters():
    recurrent, standard = (tiny(layers=kind).state_dict() for kind in ("recurrent", "standard"))
    assert {name: w.shape for name, w in recurrent.items()} == {name: w.shape for name, w in standard.items()}


@pytest.mark.parametrize("embedding_std", [None, 0.5])
@pytest.mark.parametrize("init", ["fan_in", "official"])
def test_fresh_parameters_follow_the_table(init: Any, embedding_std: float | None):
    torch.manual_seed(0)
    D, HK, F_ = 192, 4 * 96, 640
    model = LanguageModel(
        ModelConfig(
            vocab_size=512, d_model=D, n_layers=3, n_heads=4, head_dim=96, d_mlp=F_, activation="swiglu", init=init,
            attention_bias=True, mlp_bias=True, embedding_std=embedding_std,
        )
    )  # fmt: skip
    expected = {"embedding": embedding_std or D**-0.5, "head": D**-0.5}
    for l in range(3):
        expected.update({f"layers.{l}.{name}_proj": D**-0.5 for name in ("q", "k", "v", "up", "gate")})
        expected[f"layers.{l}.o_proj"] = HK**-0.5 if init == "fan_in" else (2 * D * (l + 1)) ** -0.5
        expected[f"layers.{l}.down_proj"] = F_**-0.5 if init == "fan_in" else (2 * F_ * (l + 1)) ** -0.5
    # A normal cut at 3 sigma has this much of its deviation left.
    kept = (
        1.0 if init == "fan_in" else math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / 2**0.5))
    )
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight").removesuffix(".bias")
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            std = expected.pop(module)
            assert weight.std().item() == pytest.approx(std * kept, rel=0.015), name
            assert abs(weight.mean().item()) < 4 * std / weight.numel() ** 0.5, name
            largest = weight.abs().max().item() / std
            assert largest <= 3.0 + 1e-6 if init == "official" else largest > 3.5, name
    assert not expected


def test_the_same_seed_draws_the_same_model():
    config = ModelConfig(d_model=16, n_heads=2, n_layers=1)
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(LanguageModel(config).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["head.weight"], models[2]["head.weight"])


def test_a_model_on_the_meta_device_takes_no_memory_and_can_be_filled():
    source = tiny()
    with torch.device("meta"):
        model = LanguageModel(source.config)
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())
    model.load_state_dict(source.state_dict(), assign=True)
    model.scan = source.scan
    tokens = random_tokens(1, 5)
    assert torch.equal(logits_of(model, tokens), logits_of(source, tokens))
    empty = LanguageModel(source.config).to_empty(device="cpu")
    empty.init_weights()
    assert torch.isfinite(logits_of(empty, tokens)).all()


# --- attention -------------------------------------------------------------------------------------------------------


@every_scan
@pytest.mark.parametrize("layers", ["recurrent", "standard"])
@pytest.mark.parametrize("qk_norm", ["head", "none"])
def test_grouped_heads_are_duplicated_heads(layers: str, qk_norm: str, scan: str):
    """4 query heads on 2 key-value heads are 4 on [0, 0, 1, 1], and the gradient is the sum over the group."""
    grouped = tiny(scan=scan, dtype=torch.float64, layers=layers, qk_norm=qk_norm, n_kv_heads=2)
    full = tiny(scan=scan, dtype=torch.float64, layers=layers, qk_norm=qk_norm)

    def duplicated(name: str, weight: Tensor) -> Tensor:
        if "k_proj" not in name and "v_proj" not in name:
            return weight
        return weight.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)

    full.load_state_dict({name: duplicated(name, weight) for name, weight in grouped.state_dict().items()})
    tokens = random_tokens(2, 9)
    logits, loss = logits_and_loss(grouped, tokens)
    expected_logits, expected_loss = logits_and_loss(full, tokens)
    assert_close(logits, expected_logits)
    summed = {
        name: grad.unflatten(0, (2, 2, 8)).sum(1).flatten(0, 1) if "k_proj" in name or "v_proj" in name else grad
        for name, grad in gradients(full, expected_loss).items()
    }
    assert_all_close(gradients(grouped, loss), summed)


@every_scan
@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17])
@pytest.mark.parametrize("layers", ["recurrent", "first:1"])
def test_every_scan_agrees_with_the_reference(length: int, layers: str, scan: str):
    model, tokens = tiny(dtype=torch.float64, layers=layers, n_kv_heads=2), random_tokens(2, length)
    expected_logits, expected_loss = logits_and_loss(model, tokens)
    expected = gradients(model, expected_loss)
    model.scan = scan
    logits, loss = logits_and_loss(model, tokens)
    assert_close(logits, expected_logits)
    assert_all_close(gradients(model, loss), expected)


@every_scan
def test_one_token_gives_queries_and_keys_no_gradient(scan: str):
    model = tiny(scan=scan)
    grads = gradients(model, loss_of(model, random_tokens(1, 1)))
    for name, grad in grads.items():
        assert torch.isfinite(grad).all()
        assert bool(grad.any()) is not any(part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm")), name


@every_scan
def test_calls_repeat_bit_for_bit(scan: str):
    model, tokens = tiny(scan=scan, layers="first:1"), random_tokens(2, 21)
    outcomes = []
    for _ in range(2):
        logits, loss = logits_and_loss(model, tokens)
        outcomes.append({"logits": logits, "loss": loss, **gradients(model, loss)})
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])


@every_scan
def test_gradients_accumulate_and_frozen_parameters_get_none(scan: str):
    model, tokens = tiny(scan=scan, dtype=torch.float64), random_tokens(2, 9)
    expected = gradients(model, loss_of(model, tokens))
    for _ in range(2):
        loss_of(model, tokens).backward()
    accumulated = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_all_close(accumulated, {name: 2 * grad for name, grad in expected.items()})

    model.zero_grad()
    frozen = ("embedding", "q_proj", "k_norm", "down_proj", "layers.1.attention_norm")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    loss_of(model, tokens).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert_close(parameter.grad, expected[name])
        else:
            assert parameter.grad is None


# --- loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_real_targets_in_nats():
    model, tokens = tiny(dtype=torch.float64), random_tokens(2, 7)
    targets = random_tokens(2, 7, seed=2)
    targets[0, :3] = targets[1, 6] = -100
    logits, loss = logits_and_loss(model, tokens, targets=targets)
    total, count = 0.0, 0
    for row in range(2):
        for i in range(7):
            if targets[row, i] != -100:
                scores = logits[row, i]
                total += (scores.exp().sum().log() - scores[targets[row, i]]).item()
                count += 1
    assert count == 10
    assert loss.item() == pytest.approx(total / count, rel=1e-12)
    assert loss.dtype == torch.float64


@every_scan
@pytest.mark.parametrize("rows", [None, 1, 4, 5, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_without_logits_is_the_same(rows: int | None, tied: bool, scan: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny(scan=scan, dtype=torch.float64, vocab_multiple=64, tie_embeddings=tied)
    tokens, targets = random_tokens(2, 7), random_tokens(2, 7, seed=2)
    targets[0, :3] = -100
    expected = loss_of(model, tokens, targets=targets)
    if rows is not None:  # the loss works through this many positions at once
        monkeypatch.setattr("recurformer.loss.LOGITS_AT_ONCE", rows * 128)
    out = model(tokens, targets=targets, return_logits=False)
    assert out.logits is None
    assert out.loss is not None
    assert_close(out.loss, expected, 1e-12)
    assert_all_close(gradients(model, out.loss), gradients(model, expected), 1e-12)
    with torch.no_grad():
        unrecorded = model(tokens, targets=targets, return_logits=False).loss
    assert unrecorded is not None
    assert_close(unrecorded, expected.detach(), 1e-12)


@every_scan
@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("at_once", [2**25, 97])
def test_nothing_to_predict_is_a_loss_of_zero_without_gradient(
    return_logits: bool, at_once: int, scan: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("recurformer.loss.LOGITS_AT_ONCE", at_once)
    model = tiny(scan=scan, layers="first:1")
    for shape in ((2, 5), (1, 1)):
        out = model(random_tokens(*shape), targets=torch.full(shape, -100), return_logits=return_logits)
        assert isinstance(out.loss, Tensor)
        assert out.loss.item() == 0
        assert not any(grad.any() for grad in gradients(model, out.loss).values())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_the_dtypes_of_loss_and_logits(dtype: torch.dtype, expected: torch.dtype):
    logits, loss = logits_and_loss(tiny(dtype=dtype), random_tokens(1, 4))
    assert (logits.dtype, loss.dtype, loss.shape) == (dtype, expected, ())


def test_padded_vocabulary_rows_never_count():
    """97 ids padded to 128 rows give the logits and the loss of 97 rows, and no gradient in the padding."""
    padded, plain = tiny(vocab_multiple=128), tiny()
    names = plain.state_dict().keys()
    plain.load_state_dict({name: padded.state_dict()[name][: plain.state_dict()[name].shape[0]] for name in names})
    tokens = random_tokens(2, 6)
    logits, loss = logits_and_loss(padded, tokens)
    expected_logits, expected_loss = logits_and_loss(plain, tokens)
    assert logits.shape == (2, 6, V)
    assert_close(logits, expected_logits)
    assert_close(loss, expected_loss)
    grads = gradients(padded, loss)
    assert not grads["head.weight"][V:].any()
    assert not grads["embedding.weight"][V:].any()


# --- precision -------------------------------------------------------------------------------------------------------


@every_scan
@pytest.mark.parametrize("layers", ["recurrent", "standard"])
@pytest.mark.parametrize(
    "options", [{}, {"position": "rope", "norm": "layer", "qk_norm": "full"}], ids=["alibi", "rope"]
)
@pytest.mark.parametrize("mode", ["autocast", "pure"])
def test_bfloat16_is_close_to_float32(mode: str, options: dict[str, Any], layers: str, scan: str):
    """Fresh weights, as in training: matrices in bf16, residual stream, norms, softmax and loss in float32."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=V, d_model=64, n_layers=3, n_heads=4, layers=layers, **options))
    model.scan = scan
    if mode == "pure":  # round the weights first: what is measured is the arithmetic
        model = model.bfloat16().float()
    tokens = random_tokens(2, 33)
    logits, loss = logits_and_loss(model, tokens)
    expected = gradients(model, loss)
    if mode == "pure":
        lower_logits, lower_loss = logits_and_loss(model.bfloat16(), tokens)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            lower_logits, lower_loss = logits_and_loss(model, tokens)
    assert lower_logits.dtype == torch.bfloat16
    assert lower_loss.dtype == torch.float32
    assert relative_rms(lower_logits, logits) < 2e-2
    assert abs(lower_loss.item() - loss.item()) < 2e-2 * loss.item()
    for name, grad in gradients(model, lower_loss).items():
        assert grad.dtype == (torch.bfloat16 if mode == "pure" else torch.float32)
        assert relative_rms(grad, expected[name]) < 4e-2, name


def test_float64_is_never_lowered_by_autocast():
    model, tokens = tiny(dtype=torch.float64), random_tokens(1, 5)
    expected = logits_of(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits_of(model, tokens), expected)


def test_the_residual_stream_of_a_bfloat16_model_is_float32():
    model = tiny(dtype=torch.bfloat16)
    layer, layout = layer_of(model, 0), model.layout(4)
    assert layer(torch.randn(1, 4, 32), layout).dtype == torch.float32


# --- which scan ------------------------------------------------------------------------------------------------------


def test_scans_are_chosen_by_name():
    model = tiny()
    for name in SCAN_CHOICES:
        model.scan = name
        assert model.scan == name
    with pytest.raises(ValueError, match="scan is 'fast'; choose one of 'auto', 'reference'"):
        model.scan = "fast"


def test_the_choice_is_explained():
    for name in ("auto", *CPU_SCANS):
        chosen, why = choose_scan(name, ModelConfig(), torch.device("cpu"))
        assert chosen in CPU_SCANS
        assert why


# --- what bad input gets ---------------------------------------------------------------------------------------------

TOKENS = random_tokens(2, 5)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.zeros(0, 5).long(), {}, r"tokens have shape \(0, 5\); at least one row and one position"),
        (torch.zeros(2, 0).long(), {}, r"tokens have shape \(2, 0\)"),
        (TOKENS[0], {}, r"shape \(B, N\), not torch.int64 of \(5,\)"),
        (TOKENS.float(), {}, "integer ids of shape .* not torch.float32"),
        (TOKENS.bool(), {}, "not torch.bool"),
        (TOKENS.index_fill(1, torch.tensor([3]), V), {}, r"token id 97 is outside the vocabulary of 97 \(0 to 96\)"),
        (TOKENS.index_fill(1, torch.tensor([3]), -1), {}, "token id -1 is outside the vocabulary"),
        (TOKENS, {"targets": TOKENS[:, :4]}, r"targets must be integers of the tokens' shape \(2, 5\)"),
        (TOKENS, {"targets": TOKENS.float()}, r"targets must be integers .* not torch.float32"),
        (TOKENS, {"targets": torch.full((2, 5), V)}, "target 97 is outside the vocabulary of 97; -100 means ignore"),
        (TOKENS, {"targets": torch.full((2, 5), -1)}, "target -1 is outside the vocabulary"),
        (TOKENS, {"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\); it must be \(2, 5\)"),
        (TOKENS, {"attention_mask": torch.ones(5)}, r"attention_mask has shape \(5,\)"),
        (TOKENS, {"attention_mask": torch.full((2, 5), 0.5)}, "attention_mask holds values other than 0 and 1"),
        (TOKENS, {"attention_mask": torch.full((2, 5), 2)}, "attention_mask holds values other than 0 and 1"),
        (TOKENS, {"document_ids": TOKENS[:1]}, "document_ids must be integers of the tokens' shape"),
        (TOKENS, {"document_ids": torch.tensor([[0, 0, 1, 1, 0]] * 2)}, "document_ids decrease along a row"),
        (TOKENS, {"return_logits": False}, "return_logits=False without targets would compute nothing"),
        (TOKENS, {"targets": TOKENS.to("meta")}, "targets are on meta, the model on cpu"),
        (TOKENS.to("meta"), {}, "tokens are on meta, the model on cpu"),
    ],
    ids=[
        "no-rows", "no-positions", "one-dimension", "float", "bool", "id-too-large", "id-negative", "target-shape",
        "target-dtype", "target-too-large", "target-negative", "mask-shape", "mask-dimension", "mask-half", "mask-two",
        "document-shape", "document-order", "nothing-to-compute", "targets-elsewhere", "tokens-elsewhere",
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_the_value_and_the_limit(tokens: Tensor, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tiny()(tokens, **options)


def test_checks_of_values_can_be_switched_off():
    model, tokens = tiny(), random_tokens(2, 5)
    documents = torch.tensor([[0, 0, 1, 1, 0]] * 2)
    with pytest.raises(ValueError, match="decrease"):
        model(tokens, document_ids=documents, validate=True)
    assert torch.isfinite(logits_of(model, tokens, document_ids=documents, validate=False)).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_any_integer_type_will_do(dtype: torch.dtype):
    model, tokens = tiny(), random_tokens(2, 5)
    logits, loss = logits_and_loss(model, tokens.to(dtype), targets=tokens.to(dtype))
    assert torch.equal(logits, logits_of(model, tokens))
    assert torch.equal(loss, loss_of(model, tokens, targets=tokens))


def test_a_fresh_model_is_as_uncertain_as_its_vocabulary():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=V, d_model=64, n_layers=2, n_heads=4, norm_eps=1e-6))
    tokens = random_tokens(4, 16)
    _, loss = logits_and_loss(model, tokens)
    assert loss.item() == pytest.approx(math.log(V), abs=0.7)
    assert_close(loss, F.cross_entropy(logits_of(model, tokens).flatten(0, 1), random_tokens(4, 16, seed=2).flatten()))


@every_scan
@pytest.mark.parametrize("masked", [False, True])
def test_recomputing_layers_changes_no_gradient(scan: str, masked: bool, monkeypatch: pytest.MonkeyPatch):
    model, tokens = tiny(scan=scan, layers="first:1", dtype=torch.float64), random_tokens(2, 9)
    options = {"attention_mask": torch.arange(9)[None].expand(2, -1) > 2} if masked else {}
    plain = gradients(model, loss_of(model, tokens, **options))
    calls = count_evaluations(model, monkeypatch)
    model.recompute = "all"
    again = gradients(model, loss_of(model, tokens, **options))
    assert calls == [0, 1, 1, 0]
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    with torch.no_grad():
        model(tokens)
    model(tokens, use_cache=True)
    assert calls == [0, 1, 1, 0, 0, 1, 0, 1]


# --- in two parts ----------------------------------------------------------------------------------------------------


@every_scan
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_forward_pass_continues_after_any_layer(depth: int, masked: bool, scan: str):
    model = tiny(scan=scan, n_layers=3, layers="first:2", dtype=torch.float64)
    tokens = random_tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = not masked
    documents = torch.arange(9).div(4, rounding_mode="floor").expand(2, 9)
    options: dict[str, Any] = {"attention_mask": mask, "document_ids": documents}
    whole = model(tokens, targets=tokens, **options)
    parts: dict[str, Any] = {"valid": None if mask.all() else mask, "documents": documents}
    x = model.run_layers(model.embed(tokens, parts["valid"]), 0, depth, **parts)
    x = model.finish(model.run_layers(x, depth, **parts))
    logits, loss = model.logits(x), model.loss(x, tokens)
    assert_close(logits[mask], whole.logits[mask])
    assert_close(loss, whole.loss)
    assert_all_close(gradients(model, loss), gradients(model, whole.loss))
    if scan != "wavefront" or depth != 1:  # which parts its stack
        assert torch.equal(logits, whole.logits)


def test_parts_that_do_not_fit_are_refused():
    model, tokens = tiny(n_layers=2), random_tokens(2, 9)
    x = model.embed(tokens)
    for first, stop in ((0, 3), (-1, 2), (2, 1)):
        with pytest.raises(
            ValueError, match=f"layers {first} to {stop} were asked for; 0 <= first <= stop <= 2 must hold"
        ):
            model.run_layers(x, first, stop)
    with pytest.raises(ValueError, match=r"x has shape \(2, 9, 31\); it must be \(B, N, 32\)"):
        model.run_layers(x[..., 1:])
    with pytest.raises(ValueError, match="a cache needs all layers, not 1 to 2"):
        model.run_layers(x, 1, cache=model.new_cache(2))
    with pytest.raises(ValueError, match="recompute is 'some'; choose one of 'none', 'standard', 'all'"):
        model.recompute = "some"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.int32])
def test_ids_of_every_integer_type_are_the_same_ids(dtype: torch.dtype) -> None:
    """Shards of tokens hold uint16 and uint32, of which PyTorch knows little."""
    model, ids = tiny().eval(), torch.arange(10).reshape(2, 5)
    documents, mask = torch.tensor([[0, 0, 1, 1, 1]] * 2), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = model(ids, ids, document_ids=documents)
    found = model(ids.to(dtype), ids.to(dtype), document_ids=documents.to(dtype))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(
        model(ids.to(dtype), attention_mask=mask.to(dtype)).logits, model(ids, attention_mask=mask).logits
    )
    assert torch.equal(
        model.generate(ids.to(dtype), 2, temperature=0.0, attention_mask=mask.to(dtype)),
        model.generate(ids, 2, temperature=0.0, attention_mask=mask),
    )
    with pytest.raises(ValueError, match="token id 100 is outside the vocabulary of 97"):
        model((ids + 91).to(dtype))
