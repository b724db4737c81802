"""PEFT's LoRA on the projections: what it computes is what its merged weights compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_all_close, assert_close, every_scan, gradients, logits_of, loss_of, random_tokens, tiny
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from recurformer.hf import RecurformerForCausalLM  # noqa: E402

# PEFT asks for gradient checkpointing under the name that it had before transformers 5.2x.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
TOKENS = random_tokens(2, 9)


def adapted(targets: list[str] = ALL, scan: str = "tiled", rank: int = 3, **options: Any) -> Any:
    """A model with LoRA whose A and B are both random."""
    model = tiny(scan=scan, layers="first:1", activation="swiglu", attention_bias=True, dtype=torch.float64)
    config = peft.LoraConfig(r=rank, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)
    made = peft.get_peft_model(RecurformerForCausalLM.from_model(model), config)
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return made


@every_scan
def test_the_adapter_counts_as_its_merged_weights_do(scan: str):
    model = adapted(scan=scan)
    before = tiny(scan=scan, layers="first:1", activation="swiglu", attention_bias=True, dtype=torch.float64)
    with_adapter = model(TOKENS).logits
    assert (with_adapter - logits_of(before, TOKENS)).abs().max() > 0.1
    with model.disable_adapter():
        assert_close(model(TOKENS).logits, logits_of(before, TOKENS))
    merged = model.merge_and_unload()
    assert all(isinstance(layer.q_proj, nn.Linear) for layer in merged.model.layers)
    assert_close(merged(TOKENS).logits, with_adapter)


def test_gradients_reach_the_adapter_alone():
    model = adapted(["q_proj", "v_proj"]).train()
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == 2 * 2 * 2
    # By the chain rule, from the gradient of the merged matrix: dA = s B^T dW, dB = s dW A^T.
    core, scaling = model.get_base_model().model, 6 / 3
    adapters = {(l, name): getattr(layer, name) for l, layer in enumerate(core.layers) for name in ("q_proj", "v_proj")}
    merged = tiny(scan="tiled", layers="first:1", activation="swiglu", attention_bias=True, dtype=torch.float64)
    with torch.no_grad():
        for (l, name), module in adapters.items():
            merged.get_submodule(f"layers.{l}.{name}").weight += module.get_delta_weight("default")
    targets = torch.cat([TOKENS[:, 1:], torch.full((2, 1), -100)], 1)
    expected = gradients(merged, loss_of(merged, TOKENS, targets=targets))
    found, wanted = {}, {}
    for (l, name), module in adapters.items():
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        dW = expected[f"layers.{l}.{name}.weight"]
        found |= {f"{l}.{name}.A": A.grad, f"{l}.{name}.B": B.grad}
        wanted |= {f"{l}.{name}.A": scaling * B.T @ dW, f"{l}.{name}.B": scaling * dW @ A.T}
    assert_all_close(found, wanted)


def test_generation_and_a_trained_output_layer():
    model = adapted(["q_proj"], modules_to_save=["head"])
    with torch.no_grad():
        model.get_base_model().model.head.modules_to_save["default"].weight.mul_(-1)
    merged_head = model.get_base_model().model.head.modules_to_save["default"].weight
    out = model.generate(input_ids=TOKENS, max_new_tokens=8, pad_token_id=0)
    merged = model.merge_and_unload()
    assert torch.equal(merged.model.head.weight, merged_head)
    assert torch.equal(out, merged.generate(TOKENS, max_new_tokens=8, pad_token_id=0))


def test_an_adapter_on_the_output_layer():
    model = adapted(["head"])
    with_adapter = model(TOKENS).logits
    assert_close(model.merge_and_unload()(TOKENS).logits, with_adapter)


def test_adapters_are_saved_and_loaded(tmp_path: Any):
    model = adapted()
    model.save_pretrained(tmp_path)
    base = RecurformerForCausalLM.from_model(
        tiny(scan="tiled", layers="first:1", activation="swiglu", attention_bias=True, dtype=torch.float64)
    )
    assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "special kind"),
        ({"lora_bias": True}, "special kind"),
        ({"lora_dropout": 0.1}, r"lora_dropout is 0\.1; it must be 0"),
    ],
)
def test_adapters_that_are_no_added_matrix_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        adapted(["q_proj"], **options).train()(TOKENS)


def test_other_kinds_of_adapters_are_refused():
    model = RecurformerForCausalLM.from_model(tiny())
    made = peft.get_peft_model(model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="wraps a projection in a way that has no matrix"):
        made(TOKENS)
    with pytest.raises(ValueError, match="the embedding is wrapped"):
        adapted(["embedding"])(TOKENS)


def test_a_bare_model_refuses_adapters_instead_of_ignoring_them():
    model = tiny()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(TypeError, match=r"recurformer\.hf takes adapters"):
        model(TOKENS)
