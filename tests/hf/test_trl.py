"""TRL's trainers take the model as they take a Llama of the same size."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from recurformer import LanguageModel, ModelConfig

transformers: Any = pytest.importorskip("transformers")
trl: Any = pytest.importorskip("trl")
datasets: Any = pytest.importorskip("datasets")

from recurformer.hf import RecurformerForCausalLM, load_tokenizer  # noqa: E402

TEXTS = ["the cat sat on the mat", "a dog", "the bird sang all day long", "we went home"] * 2
PAIRS = [{"prompt": text[:5], "completion": text[5:]} for text in TEXTS]
CHOICES = [{"prompt": text[:5], "chosen": text[5:], "rejected": "!!"} for text in TEXTS if len(text) > 5]


def ours(**options: Any) -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "d_model": 32, "n_layers": 2, "n_heads": 4, "layers": "first:1", **options}
    return RecurformerForCausalLM.from_model(LanguageModel(ModelConfig(**shape)))


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
    )


def trained(
    trainer: Any, config: Any, model: Any, rows: list[dict[str, str]], out: Path, **options: Any
) -> list[float]:
    """The losses of a few steps."""
    arguments = config(
        str(out), max_steps=4, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
        save_strategy="no", logging_steps=1, learning_rate=1e-3, seed=0, **options,
    )  # fmt: skip
    made = trainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=load_tokenizer("bytes")
    )
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


WAYS = {
    "plain": ([{"text": text} for text in TEXTS], {}),
    "packed": ([{"text": text} for text in TEXTS], {"packing": True, "max_length": 32}),
    "no padding": ([{"text": text} for text in TEXTS], {"padding_free": True, "max_length": None}),
    "prompt and completion": (PAIRS, {}),
    "recomputed": ([{"text": text} for text in TEXTS], {"gradient_checkpointing": True}),
    "label smoothing": ([{"text": text} for text in TEXTS], {"label_smoothing_factor": 0.1}),
    "neftune": ([{"text": text} for text in TEXTS], {"neftune_noise_alpha": 5.0}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [ours, llama])
def test_supervised_training(make: Any, way: str, tmp_path: Path):
    rows, options = WAYS[way]
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = trained(
        trl.SFTTrainer, trl.SFTConfig, model, rows, tmp_path, **{"gradient_checkpointing": False, **options}
    )
    assert len(losses) == 4
    assert all(2 < loss < 8 for loss in losses)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [ours, llama])
def test_preferences(make: Any, tmp_path: Path):
    make().save_pretrained(tmp_path / "model")  # the trainer reads it again as its reference
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = trained(trl.DPOTrainer, trl.DPOConfig, model, CHOICES, tmp_path / "run", gradient_checkpointing=False)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # both models are the same
    assert losses[-1] < losses[0]
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_of_a_fused_output_layer_is_the_models_own(tied: bool):
    model = ours(tie_embeddings=tied)
    tokens = torch.randint(256, (2, 12))
    labels = tokens.clone()
    labels[0, :4] = -100
    expected = model(tokens, labels=labels).loss
    importlib.import_module("trl.trainer.utils").add_fused_lm_head(model)
    fused = model(input_ids=tokens, labels=labels, fused_lm_head=True).loss
    assert fused.item() == pytest.approx(expected.item(), abs=1e-5)


def test_padding_of_the_vocabulary_is_refused_with_a_remedy():
    model = ours(vocab_size=250, vocab_multiple=64)
    tokens = torch.randint(250, (2, 12))
    with pytest.raises(ValueError, match=r"256 rows for 250 ids.*resize_token_embeddings\(250\)"):
        model.base_model(input_ids=tokens)
    expected = model(tokens).logits
    model.resize_token_embeddings(250)
    hidden = model.base_model(input_ids=tokens).last_hidden_state
    assert torch.allclose(hidden @ model.get_output_embeddings().weight.T, expected, atol=1e-5)
