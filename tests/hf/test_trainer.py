"""Trainer of Hugging Face, accelerate, and other readers that call `load_state_dict` on a folder's weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny
from torch import Tensor, nn

import recurformer
from recurformer import LanguageModel, ModelConfig

transformers: Any = pytest.importorskip("transformers")
accelerate: Any = pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402
from transformers.trainer_utils import load_sharded_checkpoint  # noqa: E402

from recurformer.hf import RecurformerForCausalLM, load_tokenizer  # noqa: E402

V = 64
NEXT = [{"input_ids": row, "labels": row} for row in ((torch.arange(12) * 5 + i) % V for i in range(16))]  # id + 5
pytestmark = pytest.mark.filterwarnings("ignore")


def fresh(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    shape = {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "layers": "first:1", **options}
    return RecurformerForCausalLM.from_model(LanguageModel(ModelConfig(**shape)))


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config)


def trainer(model: Any, out: Path, steps: int, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant",
        report_to=[], use_cpu=True, disable_tqdm=True, seed=1, **{"save_strategy": "no", "logging_steps": 1, **options},
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=NEXT, eval_dataset=NEXT)


def difference(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


# --- weights come back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"vocab_multiple": 48}], ids=str)
def test_a_resumed_training_goes_on_from_the_weights(options: dict[str, Any], tmp_path: Path):
    whole = trainer(fresh(**options), tmp_path / "whole", 8)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer(fresh(**options), tmp_path / "part", 4, **saving).train()
    checkpoint = tmp_path / "part" / "checkpoint-4"
    part = trainer(fresh(1, **options), tmp_path / "part", 8, **saving)
    part.train(resume_from_checkpoint=str(checkpoint))
    assert difference(part.model, whole.model) == 0
    assert recurformer.load(checkpoint).config == part.model.model.config
    assert difference(recurformer.load(tmp_path / "part" / "checkpoint-8"), part.model.model) == 0


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path):
    saving = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    worst = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    made = trainer(fresh(), tmp_path, 8, **saving, **worst)
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-4")
    assert difference(made.model.model, recurformer.load(made.state.best_model_checkpoint)) == 0


@pytest.fixture(params=["theirs", "theirs in shards", "ours"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, nn.Module]:
    """A folder written by the Hugging Face class, or by `recurformer.save`, and its model."""
    model = fresh(5)
    if request.param == "ours":
        recurformer.save(model.model, tmp_path)
    else:
        model.save_pretrained(tmp_path, max_shard_size="60KB" if "shards" in request.param else "5GB")
    return tmp_path, model


def test_every_reader_finds_each_weight(folder: tuple[Path, nn.Module]):
    path, model = folder
    assert difference(recurformer.load(path), model) == 0
    assert difference(transformers.AutoModelForCausalLM.from_pretrained(path), model) == 0

    by_state_dict, by_accelerate = fresh(1), fresh(2)
    if (path / "model.safetensors").is_file():
        missing, unexpected = by_state_dict.load_state_dict(load_file(path / "model.safetensors"), strict=False)
        assert not missing
        assert not unexpected
    else:
        load_sharded_checkpoint(by_state_dict, path, strict=True)
    assert difference(by_state_dict, model) == 0
    accelerate.load_checkpoint_in_model(by_accelerate, str(path))
    assert difference(by_accelerate, model) == 0


def test_accelerate_dispatches_the_weights_of_a_folder(tmp_path: Path):
    model, dispatched = fresh(5), fresh(3)
    model.save_pretrained(tmp_path)
    accelerate.load_checkpoint_and_dispatch(dispatched, str(tmp_path), device_map={"": "cpu"})
    assert difference(dispatched, model) == 0


def test_accelerate_saves_and_loads_the_state(tmp_path: Path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(fresh())
    before = [p.detach().clone() for p in model.parameters()]
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_adapters_find_their_base_in_a_state_dict():
    peft: Any = pytest.importorskip("peft")
    model = fresh()
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    prefix = "base_model.model."
    given = {f"{prefix}{n.removeprefix(prefix + 'model.')}": v for n, v in made.state_dict().items()}
    missing, unexpected = made.load_state_dict(given, strict=False)
    assert not missing
    assert not unexpected


# --- the next token --------------------------------------------------------------------------------------------------


def accuracy(model: Any) -> float:
    rows = torch.stack([one["input_ids"] for one in NEXT])
    with torch.no_grad():
        return (model.eval()(input_ids=rows).logits.argmax(-1)[:, :-1] == rows[:, 1:]).float().mean().item()


@pytest.mark.parametrize("factor", [0.0, 0.1])
@pytest.mark.parametrize("make", [fresh, llama])
def test_label_smoothing_learns_the_next_token(make: Any, factor: float, tmp_path: Path):
    made = trainer(make(), tmp_path, 60, label_smoothing_factor=factor)
    made.train()
    assert accuracy(made.model) == 1
    assert made.evaluate()["eval_loss"] < (0.1 if factor == 0 else 1.0)


def test_label_smoothing_of_adapters_learns_the_next_token(tmp_path: Path):
    peft: Any = pytest.importorskip("peft")
    made = peft.get_peft_model(fresh(), peft.LoraConfig(r=16, target_modules="all-linear", modules_to_save=["head"]))
    smoothed = trainer(made, tmp_path, 80, label_smoothing_factor=0.1)
    smoothed.train()
    assert accuracy(made) > 0.9


def test_a_pipeline_takes_the_model(caplog: pytest.LogCaptureFixture):
    model = RecurformerForCausalLM.from_model(tiny(vocab_size=256))
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        made = transformers.pipeline("text-generation", model=model, tokenizer=load_tokenizer("bytes"))
        text = made("the cat", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    transformers.utils.logging.disable_propagation()
    assert "not supported" not in caplog.text
    assert text.startswith("the cat")


# --- noise on embeddings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [fresh, llama])
def test_noise_on_embeddings_changes_training_and_not_evaluation(make: Any, tmp_path: Path):
    losses = {}
    for alpha in (None, 50.0):
        made = trainer(make(), tmp_path / str(alpha), 3, neftune_noise_alpha=alpha)
        made.train()
        losses[alpha] = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        assert made.evaluate()["eval_loss"] == made.evaluate()["eval_loss"]  # no noise here
    assert abs(losses[50.0][0] - losses[None][0]) > 0.01


def test_the_hook_of_reentrant_checkpoints_fires():
    model = fresh().train()
    model.enable_input_require_grads()
    seen: list[bool] = []
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    model.requires_grad_(False)
    tokens = random_tokens(2, 5, vocabulary=V)
    loss = model(tokens, labels=tokens).loss
    assert seen == [True]
    assert isinstance(loss, Tensor)
    assert loss.requires_grad
