"""`recurformer.hf`: one model, seen from both sides."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    V,
    assert_all_close,
    assert_close,
    count_evaluations,
    gradients,
    logits_of,
    loss_of,
    random_tokens,
    strong,
    tiny,
)
from safetensors import safe_open
from torch import Tensor

import recurformer
from recurformer import KVCache, LanguageModel

transformers: Any = pytest.importorskip("transformers")


from recurformer.hf import RecurformerCache, RecurformerConfig, RecurformerForCausalLM, load_tokenizer  # noqa: E402
from recurformer.hf.model import CACHE  # noqa: E402

LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


@pytest.fixture(autouse=True)
def quiet():
    """No progress bars, and no network."""
    transformers.utils.logging.disable_progress_bar()


def wrapped(model: LanguageModel | None = None, **options: Any) -> Any:
    return RecurformerForCausalLM.from_model(tiny(**options) if model is None else model)


def same_tensors(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


# --- folders ---------------------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "recurrent": {},
    "hybrid, padded vocabulary": {"layers": "first:1", "vocab_multiple": 64},
    "tied": {"tie_embeddings": True, "layers": ("standard", "recurrent")},
    "every option": {
        "activation": "swiglu", "position": "rope", "norm": "layer", "qk_norm": "full", "residual_scale": "none",
        "attention_bias": True, "mlp_bias": True, "n_kv_heads": 2, "head_dim": 6, "d_mlp": 40, "init": "official",
    },
}  # fmt: skip
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@every_shape
def test_a_folder_of_ours_loads_there_and_back_bit_for_bit(shape: dict[str, Any], tmp_path: Path):
    model = tiny(scan="auto", **shape)
    recurformer.save(model, tmp_path / "ours")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert isinstance(theirs, RecurformerForCausalLM)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_tensors(theirs.model, model)
    assert theirs.model.config == model.config
    tokens = random_tokens(2, 9)
    assert torch.equal(theirs(tokens, use_cache=False).logits, logits_of(model, tokens))

    theirs.save_pretrained(tmp_path / "theirs")
    back = recurformer.load(tmp_path / "theirs")
    assert same_tensors(back, model)
    assert back.config == model.config
    ours, written = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("ours", "theirs"))
    assert {name: written[name] for name in ours} == ours


def test_shards_dtype_and_device_map(tmp_path: Path):
    pytest.importorskip("accelerate")
    model = tiny(layers="first:1")
    wrapped(model).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same_tensors(recurformer.load(tmp_path), model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
    (tmp_path / "model-00002-of-00010.safetensors").unlink(missing_ok=True)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="is missing; copy it again"):
        recurformer.load(tmp_path)


def test_the_stored_dtype_is_kept(tmp_path: Path):
    recurformer.save(tiny(dtype=torch.bfloat16), tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    loaded.save_pretrained(tmp_path / "again")
    assert same_tensors(recurformer.load(tmp_path / "again"), recurformer.load(tmp_path))


def test_loaded_weights_are_not_drawn_anew(tmp_path: Path):
    model = tiny()
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    recurformer.save(model, tmp_path)
    loaded = RecurformerForCausalLM.from_pretrained(tmp_path)
    assert all((p == 0.5).all() for p in loaded.parameters())


def test_a_weight_that_a_folder_lacks_is_reported_and_drawn_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from safetensors.torch import load_file, save_file

    model = tiny()
    recurformer.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layers.1.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.1.q_proj.weight"}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.model.get_parameter(name)) == (name != "layers.1.q_proj.weight")
    drawn = loaded.model.get_parameter("layers.1.q_proj.weight")
    assert 0.1 < drawn.std() < 0.25  # 1 / sqrt(32) = 0.18


def test_a_new_model_is_drawn_as_ours_is():
    config = RecurformerConfig(vocab_size=V, d_model=32, n_layers=2, n_heads=4, init="official")
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(3)
    assert same_tensors(theirs.model, LanguageModel(config.model_config()))


def test_tied_weights_are_saved_once(tmp_path: Path):
    model = wrapped(tie_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "head.weight" not in file.keys()  # noqa: SIM118
        assert len(file.keys()) == len(list(model.parameters()))


def test_the_configuration(tmp_path: Path):
    config = RecurformerConfig(vocab_size=V, d_model=32, n_layers=2, n_heads=4, layers="first:1", tie_embeddings=True)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    assert config.tie_word_embeddings is True
    assert RecurformerConfig(tie_word_embeddings=False).tie_embeddings is False
    assert RecurformerConfig().tie_embeddings is False
    config.save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.model_config() == config.model_config()
    changed = transformers.AutoConfig.from_pretrained(tmp_path, layers=["standard", "recurrent"])
    assert changed.model_config().layer_kinds == ("standard", "recurrent")
    with pytest.raises(ValueError, match="n_heads 5"):
        RecurformerConfig(d_model=32, n_heads=5)
    with pytest.raises(ValueError, match="format_version 99"):
        RecurformerConfig(format_version=99)


# --- calls -----------------------------------------------------------------------------------------------------------


def test_labels_are_shifted_and_padding_predicts_nothing():
    model = tiny(dtype=torch.float64)
    tokens, theirs = random_tokens(2, 7), wrapped(model)
    out = theirs(tokens, labels=tokens)
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    assert torch.equal(out.loss, loss_of(model, tokens, targets=targets))
    assert getattr(out, CACHE) is None

    labels = tokens.masked_fill(LEFT == 0, -100)
    padded = theirs(tokens, attention_mask=LEFT, labels=labels).loss
    alone = [theirs(t[None], labels=t[None]).loss * (len(t) - 1) for t in (tokens[0, 3:], tokens[1])]
    assert_close(padded, sum(alone, torch.zeros(())) / (3 + 6))
    assert_all_close(gradients(model, padded), gradients(model, sum(alone, torch.zeros(())) / 9))


def test_num_items_in_batch_divides_the_sum():
    theirs, tokens = wrapped(dtype=torch.float64), random_tokens(2, 7)
    mean = theirs(tokens, labels=tokens).loss
    assert_close(theirs(tokens, labels=tokens, num_items_in_batch=torch.tensor(24)).loss, mean * 12 / 24)


def test_logits_to_keep():
    theirs, tokens = wrapped(), random_tokens(2, 7)
    full = theirs(tokens).logits
    assert_close(theirs(tokens, logits_to_keep=1).logits, full[:, -1:])
    assert_close(theirs(tokens, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]])
    assert_close(theirs(tokens, labels=tokens, logits_to_keep=2).logits, full[:, -2:])
    assert torch.equal(theirs(tokens, return_dict=False)[0], full)


def test_packed_documents():
    model, tokens = tiny(), random_tokens(1, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5])
    assert torch.equal(
        wrapped(model)(tokens, document_ids=documents).logits, logits_of(model, tokens, document_ids=documents)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({CACHE: object()}, "RecurformerCache"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask has shape"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str):
    for labels in (None, random_tokens(1, 3)):
        with pytest.raises(ValueError, match=message):
            wrapped()(random_tokens(1, 3), labels=labels, **options)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_cache_is_continued_cropped_reordered_and_repeated():
    model = tiny(dtype=torch.float64)
    theirs, tokens = wrapped(model), random_tokens(2, 12)
    full = logits_of(model, tokens)
    cache = RecurformerCache()
    with torch.no_grad():
        first = theirs(tokens[:, :8], **{CACHE: cache})
        assert getattr(first, CACHE) is cache
        assert cache.get_seq_length() == 8
        theirs(tokens[:, 8:11].flip(1), **{CACHE: cache})
        cache.crop(-3)
        assert cache.get_seq_length() == 8
        last = theirs(tokens[:, 8:], use_cache=True, **{CACHE: cache}).logits
        assert_close(last, full[:, 8:])
        cache.crop(9)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert_close(theirs(tokens[:, 9:].flip(0), **{CACHE: cache}).logits, full[:, 9:].flip(0))
        cache.crop(9)
        cache.batch_select_indices(torch.tensor([0]))
        cache.batch_repeat_interleave(2)
        assert_close(theirs(tokens[1:, 9:].expand(2, -1), **{CACHE: cache}).logits, full[1:, 9:].expand(2, -1, -1))
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_cache_is_made_when_it_is_of_use():
    theirs, tokens = wrapped(), random_tokens(1, 4)
    assert getattr(theirs(tokens), CACHE).get_seq_length() == 4
    assert getattr(theirs(tokens, use_cache=False), CACHE) is None
    assert getattr(theirs(tokens, labels=tokens), CACHE) is None
    assert getattr(theirs.train()(tokens), CACHE) is None
    assert isinstance(getattr(theirs(tokens, use_cache=True), CACHE).kv, KVCache)


# --- generation ------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beam": {"num_beams": 3},
    "beam, several": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("layers", ["recurrent", "first:1"])
def test_generation_with_and_without_the_cache(layers: str, way: dict[str, Any]):
    theirs = wrapped(layers=layers)
    found: list[Any] = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = {"max_new_tokens": 12, "use_cache": use_cache, "pad_token_id": 0, "eos_token_id": 5, **way}
        found.append(
            theirs.generate(
                random_tokens(2, 7), attention_mask=LEFT, return_dict_in_generate=True, output_scores=True, **options
            )
        )
    assert torch.equal(found[0].sequences, found[1].sequences)
    if "num_beams" in way:
        assert_close(found[0].sequences_scores, found[1].sequences_scores)


def test_greedy_agrees_with_our_engine_and_with_full_passes_over_200_tokens():
    model, tokens = tiny(layers="first:1"), random_tokens(2, 7)
    theirs = wrapped(model).generate(tokens, attention_mask=LEFT, max_new_tokens=200, pad_token_id=0)
    assert torch.equal(theirs, model.generate(tokens, 200, attention_mask=LEFT, temperature=0.0))
    for row, start in ((0, 3), (1, 0)):
        with torch.no_grad():
            again = logits_of(model, theirs[row : row + 1, start:]).argmax(-1)[0]
        assert torch.equal(again[6 - start : -1], theirs[row, 7:])


@pytest.mark.parametrize("lengths", [(1, 4, 7)])
def test_left_padded_rows_continue_as_alone(lengths: tuple[int, ...]):
    theirs, longest = wrapped(), max(lengths)
    tokens = random_tokens(len(lengths), longest)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    together = theirs.generate(tokens, attention_mask=mask, max_new_tokens=16, pad_token_id=0)
    for row, n in enumerate(lengths):
        alone = theirs.generate(tokens[row : row + 1, longest - n :], max_new_tokens=16, pad_token_id=0)
        assert torch.equal(alone[0, n:], together[row, longest:])


def test_what_stands_at_pads_is_never_seen():
    theirs, tokens = wrapped(), random_tokens(2, 7)
    a, b = (tokens.masked_fill(LEFT == 0, pad) for pad in (0, 96))
    assert torch.equal(
        theirs(a, attention_mask=LEFT).logits[LEFT == 1], theirs(b, attention_mask=LEFT).logits[LEFT == 1]
    )
    labels = tokens.masked_fill(LEFT == 0, -100)
    grad = gradients(theirs.model, theirs(b, attention_mask=LEFT, labels=labels).loss)["embedding.weight"]
    assert not grad[96].any() or 96 in tokens[LEFT == 1]
    out = [theirs.generate(t, attention_mask=LEFT, max_new_tokens=9, pad_token_id=0)[:, 7:] for t in (a, b)]
    assert torch.equal(*out)


def test_masks_of_the_new_tokens_and_of_all_are_the_same():
    theirs, tokens = wrapped(), random_tokens(2, 9)
    found: list[Tensor] = []
    for mask in (torch.ones(2, 2, dtype=torch.long), torch.cat([LEFT, torch.ones(2, 2, dtype=torch.long)], 1)):
        cache = RecurformerCache()
        theirs(tokens[:, :7], attention_mask=LEFT, **{CACHE: cache})
        found.append(theirs(tokens[:, 7:], attention_mask=mask, **{CACHE: cache}).logits)
    assert torch.equal(*found)
    whole = torch.cat([LEFT, torch.ones(2, 2, dtype=torch.long)], 1)
    assert_close(found[0], theirs(tokens, attention_mask=whole).logits[:, 7:])


def test_a_second_turn_on_the_same_cache():
    theirs, tokens = wrapped(), random_tokens(1, 6)
    first = theirs.generate(tokens, max_new_tokens=5, return_dict_in_generate=True, pad_token_id=0)
    both = torch.cat([first.sequences, random_tokens(1, 3, seed=4)], 1)
    with_cache = theirs.generate(both, max_new_tokens=5, pad_token_id=0, **{CACHE: getattr(first, CACHE)})
    assert torch.equal(with_cache, theirs.generate(both, max_new_tokens=5, pad_token_id=0))


def test_speculation_crops_the_cache():
    theirs, tokens = wrapped(), random_tokens(1, 5).repeat(1, 3)
    options = {"max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": V - 1}
    assert torch.equal(
        theirs.generate(tokens, prompt_lookup_num_tokens=4, **options), theirs.generate(tokens, **options)
    )


def test_finished_rows_are_padded_and_generation_stops():
    theirs, tokens = wrapped(), random_tokens(2, 7)
    free = theirs.generate(tokens, max_new_tokens=12, pad_token_id=0)[:, 7:]
    end = int(free[0, 1])
    out = theirs.generate(tokens, max_new_tokens=12, pad_token_id=96, eos_token_id=[end, int(free[1, 4])])[:, 7:]
    assert out.shape[1] <= 5
    ends = [next(i for i, t in enumerate(row.tolist()) if t in (end, int(free[1, 4]))) for row in out]
    for row, i in enumerate(ends):
        assert torch.equal(out[row, : i + 1], free[row, : i + 1])
        assert (out[row, i + 1 :] == 96).all()


def test_padded_rows_of_the_vocabulary_are_never_sampled():
    theirs = wrapped(vocab_multiple=128)
    with torch.no_grad():
        theirs.model.head.weight[V:] = 100.0
    out = theirs.generate(random_tokens(50, 3), max_new_tokens=40, do_sample=True, temperature=5.0, pad_token_id=0)
    assert out.max() < V


def test_other_caches_are_refused_in_generation():
    with pytest.raises(ValueError, match="cache_implementation is 'static'"):
        wrapped().generate(random_tokens(1, 3), max_new_tokens=2, cache_implementation="static", pad_token_id=0)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # it has a new name since 5.2x
def test_gradient_checkpointing_changes_no_gradient(monkeypatch: pytest.MonkeyPatch):
    theirs, tokens = wrapped(dtype=torch.float64, layers="first:1").train(), random_tokens(2, 9)
    plain = gradients(theirs.model, theirs(tokens, labels=tokens).loss)
    theirs.gradient_checkpointing_enable()
    assert theirs.is_gradient_checkpointing
    calls = count_evaluations(theirs.model, monkeypatch)
    again = gradients(theirs.model, theirs(tokens, labels=tokens).loss)
    assert calls == [0, 1, 1, 0]
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    theirs.gradient_checkpointing_disable()
    theirs(tokens, labels=tokens)
    assert calls == [0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_is_resized(tied: bool, tmp_path: Path):
    theirs, tokens = wrapped(vocab_multiple=64, tie_embeddings=tied), random_tokens(2, 6)
    before = theirs(tokens).logits
    theirs.resize_token_embeddings(V + 3)
    assert theirs.model.embedding.weight.shape[0] == V + 3
    assert theirs.config.vocab_size == V + 3
    after = theirs(tokens + 3).logits  # the new ids are accepted
    assert after.shape[-1] == V + 3
    assert_close(theirs(tokens).logits[..., :V], before)
    theirs.save_pretrained(tmp_path)
    assert_close(logits_of(recurformer.load(tmp_path), tokens + 3), after)
    assert theirs.generate(tokens, max_new_tokens=3, pad_token_id=0).shape == (2, 9)
    theirs.resize_token_embeddings(V, pad_to_multiple_of=32)
    assert theirs(tokens).logits.shape[-1] == 128
    theirs.resize_token_embeddings(50)
    assert theirs(tokens % 50).logits.shape[-1] == 50


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[row], "labels": self.tokens[row]}


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_trainer_makes_two_steps_and_evaluates(tmp_path: Path):
    pytest.importorskip("accelerate")
    theirs, data = wrapped(), Rows(random_tokens(8, 9))
    reference = copy.deepcopy(theirs.model).train()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], use_cpu=True, seed=0,
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(theirs, arguments, train_dataset=data, eval_dataset=data)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    trainer.train()
    for step in range(2):
        tokens = data.tokens[4 * step : 4 * step + 4]
        targets = torch.cat([tokens[:, 1:], torch.full((4, 1), -100)], 1)
        for name, grad in gradients(reference, loss_of(reference, tokens, targets=targets)).items():
            reference.get_parameter(name).data -= 0.1 * grad
    for name, parameter in reference.named_parameters():
        assert_close(theirs.model.get_parameter(name).data, parameter.data)
    with torch.no_grad():
        expected = theirs(data.tokens, labels=data.tokens).loss
    assert abs(trainer.evaluate()["eval_loss"] - float(expected)) < 1e-5
    trainer.save_model(str(tmp_path / "saved"))
    assert same_tensors(recurformer.load(tmp_path / "saved"), theirs.model)


# --- around it -------------------------------------------------------------------------------------------------------


def test_the_core_never_imports_transformers_and_the_error_names_the_extra():
    code = (
        "import sys; import recurformer, recurformer.cli, recurformer.interop, recurformer.training; "
        "assert 'transformers' not in sys.modules; sys.modules['transformers'] = None\n"
        "try: import recurformer.hf\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "recurformer.hf needs the transformers library; pip install 'recurformer[hf]'"


def test_a_copy_is_independent():
    theirs, tokens = wrapped(), random_tokens(1, 5)
    twin = copy.deepcopy(theirs)
    before = theirs(tokens).logits
    strong(twin.model, 0.1)
    assert torch.equal(theirs(tokens).logits, before)
    assert not torch.equal(twin(tokens).logits, before)


# --- arguments that others pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings(beams: int):
    tokenizer = load_tokenizer("bytes")
    theirs, prompt = wrapped(vocab_size=256), tokenizer("abcdef", return_tensors="pt")
    options = {"max_new_tokens": 8, "pad_token_id": 0, "num_beams": beams, "tokenizer": tokenizer}
    free = theirs.generate(**prompt, **options)[0, 6:]
    stopped = theirs.generate(**prompt, **options, stop_strings=["no such text"])[0, 6:]
    assert torch.equal(stopped, free)
    if beams == 1:
        ids = next(i for i in range(2, 8) if all(32 <= int(t) < 127 for t in free[i - 1 : i]))
        text = tokenizer.decode(free[ids - 1 : ids])
        stopped = theirs.generate(**prompt, **options, stop_strings=[text])[0, 6:]
        first = next(i for i, t in enumerate(free.tolist()) if chr(t) == text)
        assert torch.equal(stopped, free[: first + 1])


def test_an_assistant_and_its_tokenizers_pass():
    theirs, assistant, tokens = wrapped(), wrapped(n_layers=1, seed=3), random_tokens(1, 7)
    options = {"max_new_tokens": 20, "pad_token_id": 0}
    assert torch.equal(
        theirs.generate(tokens, **options, assistant_model=assistant), theirs.generate(tokens, **options)
    )


def test_guidance_by_a_second_prompt_passes():
    theirs, tokens = wrapped(), random_tokens(1, 7)
    options = {"max_new_tokens": 5, "pad_token_id": 0}
    guided = theirs.generate(tokens, **options, guidance_scale=3.0, negative_prompt_ids=random_tokens(1, 7, seed=9))
    assert guided.shape == (1, 12)


def test_unknown_arguments_are_refused_by_name():
    theirs, tokens = wrapped(), random_tokens(1, 7)
    with pytest.raises(ValueError, match="takes no argument head_mask"):
        theirs(tokens, head_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        theirs(tokens, cu_seq_lens_q=torch.tensor([0, 3, 7]))
    with pytest.raises(ValueError, match="typo"):
        theirs.generate(tokens, max_new_tokens=2, pad_token_id=0, typo=3)
    with pytest.raises(ValueError, match=r"position_ids have shape \(1, 3\)"):
        theirs(tokens, position_ids=torch.arange(3)[None])
    assert torch.equal(theirs(tokens, tokenizer=None, output_router_logits=False).logits, theirs(tokens).logits)


def test_positions_that_start_again_are_documents():
    model, tokens = tiny(), random_tokens(2, 9)
    theirs = wrapped(model)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 0, 1]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 2, 2]])
    expected = logits_of(model, tokens, document_ids=documents)
    for mask in (None, torch.ones_like(tokens)):
        assert torch.equal(theirs(tokens, attention_mask=mask, position_ids=positions).logits, expected)
    plain = torch.arange(9)[None]
    assert torch.equal(theirs(tokens, position_ids=plain).logits, theirs(tokens).logits)
    alone = theirs(tokens[:1, 4:]).logits
    assert_close(theirs(tokens, position_ids=positions).logits[:1, 4:], alone)
    padded = torch.tensor([[1, 1, 0, 1, 2, 3, 0, 1, 2]])  # as beside two pads on the left
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    found = theirs(tokens[:1], attention_mask=mask, position_ids=padded).logits
    assert_close(found[:, 6:], theirs(tokens[:1, 6:]).logits)
    cache = RecurformerCache()
    theirs(tokens, **{CACHE: cache})
    with pytest.raises(ValueError, match="document_ids and a cache do not go together"):
        theirs(tokens, position_ids=positions, **{CACHE: cache})


def test_shifted_labels():
    theirs, tokens = wrapped(), random_tokens(2, 7)
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    assert torch.equal(theirs(tokens, shift_labels=targets).loss, theirs(tokens, labels=tokens).loss)


def test_the_decoder_below_the_output_layer():
    model, tokens = tiny(layers="first:1"), random_tokens(2, 7)
    theirs = wrapped(model)
    for decoder in (theirs.base_model, theirs.get_decoder()):
        out = decoder(input_ids=tokens, attention_mask=LEFT, use_cache=True)
        expected = logits_of(model, tokens, attention_mask=LEFT)
        assert torch.equal(model.logits(out.last_hidden_state), expected)
        assert getattr(out, CACHE).get_seq_length() == 7
        assert torch.equal(decoder(tokens, LEFT, return_dict=False)[0], out.last_hidden_state)
        assert decoder.config == model.config
        with pytest.raises(ValueError, match="output_hidden_states"):
            decoder(tokens, output_hidden_states=True)


@pytest.mark.parametrize("how", ["as it is", "deepcopy"])
def test_a_cache_from_inference_mode_is_continued(how: str):
    theirs, ids = wrapped(), random_tokens(1, 20)
    expected = theirs.generate(ids, max_new_tokens=6, pad_token_id=0)
    with torch.inference_mode():
        cache = getattr(theirs(ids[:, :12], use_cache=True), CACHE)
    cache = copy.deepcopy(cache) if how == "deepcopy" else cache
    assert torch.equal(theirs.generate(ids, max_new_tokens=6, pad_token_id=0, **{CACHE: cache}), expected)
    with torch.inference_mode():
        cache.reorder_cache(torch.tensor([0]))
        cache.batch_repeat_interleave(2)
    assert theirs(ids[:, :2].expand(2, -1), **{CACHE: cache}).logits.shape == (2, 2, V)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_ids_and_labels_of_unsigned_types(dtype: torch.dtype) -> None:
    """As shards of tokens hold them."""
    model, ids = RecurformerForCausalLM.from_model(tiny()).eval(), torch.arange(10).reshape(2, 5)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = model(input_ids=ids, labels=ids, attention_mask=mask)
    found = model(input_ids=ids.to(dtype), labels=ids.to(dtype), attention_mask=mask.to(dtype))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)
