"""The loop: exact accumulation, exact resumption, refusals, signals, what is logged."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import recurformer
from recurformer import LanguageModel, attention
from recurformer.cli import cli
from recurformer.data import TokenDataset
from recurformer.files import WORK
from recurformer.store import checkpoints
from recurformer.store.checkpoints import newest_checkpoint
from recurformer.store.runs import read_metrics
from recurformer.training import NonFiniteError, TrainingError, loop, steps, train
from recurformer.training.distributed import OneProcess
from recurformer.training.optimizer import learning_rate, make_optimizer
from recurformer.training.steps import gradient_step


@dataclass
class Sequences:
    """What `gradient_step` needs of a batch."""

    tokens: Tensor
    targets: Tensor
    attention_mask: Tensor | None = None
    document_ids: Tensor | None = None


def watch_steps(monkeypatch: pytest.MonkeyPatch, seen: Callable[..., None]) -> None:
    """Call `seen(model, optimizer, batch)` after every gradient, before the update."""
    original = loop.gradient_step

    def watched(model, optimizer, batch, *rest):
        result = original(model, optimizer, batch, *rest)
        seen(model, optimizer, batch)
        return result

    monkeypatch.setattr(loop, "gradient_step", watched)


# --- the gradient of one step ---------------------------------------------------------------------------------------


def gradients(tiny, batch: Sequences, size: int, **changes) -> tuple[float, float, int, dict[str, Tensor]]:
    config = tiny(micro_batch_size=size, precision="fp64", optimizer__grad_clip=None, **changes)
    torch.manual_seed(0)
    model = LanguageModel(config.model).double()
    optimizer = make_optimizer(model, config.optimizer)
    loss, norm, targets = gradient_step(model, optimizer, batch, config, torch.device("cpu"), OneProcess())  # pyright: ignore[reportArgumentType]
    return loss, norm, targets, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("size", "wide"), [(1, None), (2, None), (3, None), (4, None), (1, 3), (2, 4), (2, 2), (4, 4)])
@pytest.mark.parametrize("kind", ["plain", "documents", "pads"])
def test_micro_batches_of_unequal_target_counts_add_up_exactly(tiny, size, wide, kind):
    torch.manual_seed(1)
    tokens = torch.randint(0, 256, (4, 21))
    targets = tokens.roll(-1, 1)
    for row, real in enumerate((5, 20, 0, 1)):  # the third sequence has none at all
        targets[row, real:] = -100
    given = {}
    if kind == "documents":
        given["document_ids"] = torch.arange(21).div(6, rounding_mode="floor").expand(4, 21)
    if kind == "pads":
        given["attention_mask"] = torch.arange(21) < torch.tensor([6, 21, 3, 9])[:, None]
    batch = Sequences(tokens, targets, **given)
    loss, norm, count, grads = gradients(tiny, batch, size, recurrent_micro_batch_size=wide)

    torch.manual_seed(0)
    model = LanguageModel(tiny().model).double()
    whole = model(tokens, targets=targets, **given).loss
    whole.backward()
    assert count == 26
    assert loss == pytest.approx(whole.item(), abs=1e-12)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    assert max((grads[name] - expected[name]).abs().max().item() for name in grads) < 1e-12
    assert norm == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in expected.values())), rel=1e-12)


@pytest.mark.parametrize(("size", "wide"), [(1, None), (4, None), (1, 3)])
def test_a_step_without_targets_has_no_gradient(tiny, size, wide):
    tokens = torch.zeros(4, 5, dtype=torch.int64)
    batch = Sequences(tokens, torch.full_like(tokens, -100))
    loss, norm, count, grads = gradients(tiny, batch, size, recurrent_micro_batch_size=wide)
    assert (loss, norm, count) == (0.0, 0.0, 0)
    assert grads
    assert all((g == 0).all() for g in grads.values())


def test_training_goes_on_after_a_batch_without_targets(tiny, tmp_path, monkeypatch, records):
    original, calls = loop.step_batches, iter(range(100))

    def batches(*arguments):
        for batch in original(*arguments):
            if next(calls) == 3:
                batch.targets.fill_(-100)
            yield batch

    monkeypatch.setattr(loop, "step_batches", batches)
    assert train(tiny(), tmp_path / "run", quiet=True).finished
    losses = [r["loss"] for r in records(tmp_path / "run", "train")]
    assert losses[3] == 0.0
    assert all(0 < loss < 7 for loss in losses[:3] + losses[4:])


@pytest.mark.parametrize("trained", ["all", "recurrent"])
@pytest.mark.parametrize("layers", ["first:1", "recurrent"])
def test_micro_batches_train_alike(tiny, tmp_path, weights, layers, trained):
    sizes = ((4, None), (3, None), (1, None), (2, 4), (1, 3))
    for size, wide in sizes:
        config = tiny(
            micro_batch_size=size, recurrent_micro_batch_size=wide, precision="fp64", schedule__steps=5,
            model__layers=layers, trained=trained,
        )  # fmt: skip
        train(config, tmp_path / f"{size}-{wide}", quiet=True)
    whole = weights(tmp_path / "4-None")
    for size, wide in sizes[1:]:
        other = weights(tmp_path / f"{size}-{wide}")
        assert max((whole[name] - other[name]).abs().max().item() for name in whole) < 1e-9


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 10])  # in warm-up and epoch 1; in the cosine and epoch 2
def test_resuming_continues_bit_for_bit(tiny, tmp_path, monkeypatch, records, weights, same_weights, stop):
    """Windows, losses, learning rate, weight decay, betas of every step, final weights, and metrics without a seam."""
    config = tiny(schedule__warmup_steps=6)
    steps: list[Any] = []

    def note(model, optimizer, batch):
        rates = [(g["lr"], g["weight_decay"], g["betas"], g["eps"]) for g in optimizer.param_groups]
        steps.append((batch.window_ids.tolist(), rates))

    watch_steps(monkeypatch, note)
    whole = train(config, tmp_path / "whole", quiet=True)
    straight, steps = steps, []
    part = train(config, tmp_path / "parts", stop_at=stop, quiet=True)
    assert (part.step, part.finished, part.signal) == (stop, False, None)
    resumed = train(config, tmp_path / "parts", resume=True, quiet=True)

    assert whole.finished
    assert resumed.finished
    assert steps == straight
    assert len({i for ids, _ in straight for i in ids}) == 30
    for step, (_, rates) in enumerate(straight):
        lr = learning_rate(step, config.optimizer.lr, config.schedule)
        assert rates == [(lr, 0.1, (0.9, 0.95), 1e-8), (lr, 0.0, (0.9, 0.95), 1e-8)]
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert resumed.validation_loss == whole.validation_loss
    for event in ("train", "evaluation"):
        assert records(tmp_path / "parts", event) == records(tmp_path / "whole", event)
    optimizer = [newest_checkpoint(tmp_path / run / "checkpoints").read()[1] for run in ("whole", "parts")]  # pyright: ignore[reportOptionalMemberAccess]
    assert same_weights(*optimizer)


def test_evaluating_sampling_and_saving_leave_the_training_alone(tiny, tmp_path, weights, same_weights, monkeypatch):
    monkeypatch.setattr(LanguageModel, "generate", lambda self, tokens, n, **_: tokens.repeat(1, 1 + n))
    train(tiny(schedule__steps=8, sample__tokens=4, evaluation__every=1), tmp_path / "often", quiet=True)
    train(tiny(schedule__steps=8, data__validation=None, checkpoint__every=8), tmp_path / "never", quiet=True)
    assert same_weights(weights(tmp_path / "often"), weights(tmp_path / "never"))


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tiny, tmp_path, weights, same_weights, capsys):
    config = tiny()
    train(config, tmp_path / "whole", quiet=True)
    train(config, tmp_path / "run", stop_at=10, quiet=True)
    newest = tmp_path / "run/checkpoints/step-00000010/model/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    capsys.readouterr()
    train(config, tmp_path / "run", resume=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "step-00000010 is truncated or damaged" in said
    assert "from checkpoint step-00000005" in said
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_full_disk_ends_the_run_and_it_resumes(tiny, tmp_path, monkeypatch, weights, same_weights):
    config, run = tiny(), tmp_path / "run"
    train(config, tmp_path / "whole", quiet=True)

    def full(tensors, path):
        if "00000010" in str(path):
            raise OSError(28, "No space left on device")
        return original(tensors, path)

    original = checkpoints.write_tensors
    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(TrainingError, match=r"step 10 could not be written.*No space left.*step-00000005 is intact"):
        train(config, run, quiet=True)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000005"]
    monkeypatch.undo()
    train(config, run, resume=True, quiet=True)
    assert same_weights(weights(tmp_path / "whole"), weights(run))


def test_a_finished_run_says_so(tiny, tmp_path, capsys):
    config = tiny(schedule__steps=2)
    first = train(config, tmp_path / "run", quiet=True)
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    again = train(config, tmp_path / "run", resume=True)
    assert "is finished: step 2 of 2" in capsys.readouterr().err
    assert again.finished
    assert again.validation_loss == first.validation_loss
    assert (tmp_path / "run/metrics.jsonl").read_text() == lines


def test_resume_without_a_checkpoint_starts(tiny, tmp_path, weights, same_weights):
    config = tiny(schedule__steps=4)
    train(config, tmp_path / "plain", quiet=True)
    train(config, tmp_path / "eager", resume=True, quiet=True)
    assert same_weights(weights(tmp_path / "plain"), weights(tmp_path / "eager"))


# --- refusals -------------------------------------------------------------------------------------------------------


def test_an_existing_run_is_not_overwritten(tiny, tmp_path):
    train(tiny(schedule__steps=1), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"is not empty; --resume continues a run"):
        train(tiny(), tmp_path / "run", quiet=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        train(tiny(), tmp_path / "file", quiet=True)


def test_a_changed_configuration_is_refused_unless_named(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(tiny(), run, stop_at=5, quiet=True)
    changed = tiny(optimizer__lr=0.5, schedule__steps=12, log__every=2, evaluation__every=4)
    with pytest.raises(
        ValueError,
        match=r"optimizer.lr: 0.002 -> 0.5; schedule.steps: 20 -> 12\. To change them: "
        r"--allow-change optimizer.lr --allow-change schedule.steps",
    ):
        train(changed, run, resume=True, quiet=True)
    rates: list[float] = []
    watch_steps(monkeypatch, lambda model, optimizer, batch: rates.append(optimizer.param_groups[0]["lr"]))
    result = train(changed, run, resume=True, allow_change=["optimizer.lr", "schedule.steps"], quiet=True)
    assert result.step == 12
    assert rates == [learning_rate(step, 0.5, changed.schedule) for step in range(5, 12)]
    resumed = [r for r in read_metrics(run) if r["event"] == "resume"]
    assert "optimizer.lr: 0.002 -> 0.5" in resumed[0]["changes"]
    assert json.loads((run / "config.json").read_text())["optimizer"]["lr"] == 0.5


def test_what_gives_weights_and_data_their_meaning_never_changes(tiny, tmp_path):
    run = tmp_path / "run"
    train(tiny(schedule__steps=2), run, quiet=True)
    for changes in ({"model__d_model": 32}, {"data__window": 8}, {"data__seed": 1}, {"seed": 1}):
        key = next(iter(changes)).replace("__", ".")
        with pytest.raises(ValueError, match=rf"cannot be resumed with {key}: .*Start a new run"):
            train(tiny(schedule__steps=2, **changes), run, resume=True, quiet=True)
        with pytest.raises(ValueError, match="cannot change within a run"):
            train(tiny(schedule__steps=2, **changes), run, resume=True, allow_change=[key], quiet=True)
    with pytest.raises(ValueError, match=r"'optimizer.rl' is no setting; did you mean 'optimizer.lr'"):
        train(tiny(schedule__steps=2), run, resume=True, allow_change=["optimizer.rl"], quiet=True)


def test_other_data_are_refused(tiny, tmp_path, corpus):
    train(tiny(schedule__steps=2), tmp_path / "run", quiet=True)
    other = tiny(schedule__steps=2, data__train=str(corpus / "validation"))
    with pytest.raises(ValueError, match="holds other tokens than the run was trained on"):
        train(other, tmp_path / "run", resume=True, quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__vocab_size": 200}, "vocabulary"),
        ({"data__window": 10_000}, "window"),
        ({"device": "tpu:0"}, "device is 'tpu:0'"),
        ({"data__train": "/nowhere", "model__vocab_size": 256}, "/nowhere"),
        ({"log__loggers": ["wandb"]}, r"log.loggers names 'wandb'.*pip install 'recurformer\[loggers\]'"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_folder_is_made(tiny, tmp_path, monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=message):
        train(tiny(**changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_one_process_a_run(tiny, tmp_path):
    from recurformer.training.run import lock

    with lock(tmp_path / "run"), pytest.raises(ValueError, match="another process is training"):
        train(tiny(), tmp_path / "run", quiet=True)


# --- stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tiny, tmp_path, monkeypatch, capfd, weights, same_weights, number):
    config, run = tiny(), tmp_path / "run"
    train(config, tmp_path / "whole", quiet=True)
    count = iter(range(100))
    before = signal.getsignal(number)
    watch_steps(monkeypatch, lambda *_: os.kill(os.getpid(), number) if next(count) == 6 else None)
    result = train(config, run)
    monkeypatch.undo()
    assert (result.step, result.finished, result.signal) == (7, False, number)
    assert f"{number.name}: saving after this step" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    train(config, run, resume=True, quiet=True)
    assert same_weights(weights(tmp_path / "whole"), weights(run))


def test_outside_the_main_thread_signals_are_left_alone(tiny, tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(tiny(schedule__steps=2), tmp_path / "run", quiet=True))
    )
    thread.start()
    thread.join()
    assert results[0].finished


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_stops_before_the_update(tiny, tmp_path, monkeypatch, what):
    run, config = tmp_path / "run", tiny()
    seen: list[Any] = []
    original = steps.clip_gradients

    def poison(parameters, largest):
        parameters = list(parameters)
        if len(seen) == 8:
            parameters[0].grad[0, 0] = math.inf
        return original(parameters, largest)

    def forward(self, *arguments, **options):
        output = original_forward(self, *arguments, **options)
        if what == "loss" and self.training and len(seen) == 8:
            output.loss = output.loss + math.nan  # pyright: ignore[reportOptionalOperand]
        return output

    original_forward = LanguageModel.forward
    if what == "loss":
        monkeypatch.setattr(LanguageModel, "forward", forward)
    else:
        monkeypatch.setattr(steps, "clip_gradients", poison)
    watch_steps(monkeypatch, lambda model, _, batch: seen.append((batch.window_ids.tolist(), model)))
    with pytest.raises(NonFiniteError) as error:
        train(config, run, quiet=True)
    windows, model = seen[8]
    assert f"step 9: loss {'nan' if what == 'loss' else ''}" in str(error.value)
    assert str(windows) in str(error.value)
    assert "step-00000005" in str(error.value)
    assert all(p.isfinite().all() for p in model.parameters())
    assert read_metrics(run)[-1]["step"] == 8
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000005"]


def test_a_validation_loss_that_is_not_finite_ends_the_run_too(tiny, tmp_path, monkeypatch):
    original = loop.evaluate_model

    def poisoned(model, *rest):
        result = original(model, *rest)
        return dataclasses.replace(result, loss=math.nan) if len(list(saved.glob("step-*"))) == 1 else result

    saved = tmp_path / "run/checkpoints"
    monkeypatch.setattr(loop, "evaluate_model", poisoned)
    with pytest.raises(NonFiniteError, match=r"loss at step 10 is nan; the last good checkpoint is .*00005"):
        train(tiny(), tmp_path / "run", quiet=True)
    assert [p.name for p in saved.iterdir()] == ["step-00000005"]


def test_a_terminal_gets_a_progress_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take any stream for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    train(tiny(schedule__steps=3), tmp_path / "run")
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "tokens/s" in shown
    assert "step 3/3" not in shown  # the lines are for other streams


# --- names, precision, starting weights -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch hides its own; "error" finds it first
@pytest.mark.parametrize("scan", ["reference", "tiled"])
def test_compiling_changes_no_name(scan, tiny, tmp_path, monkeypatch, weights, request):
    seen: list[str] = []

    def compile_eagerly(function, original=torch.compile):
        seen.append(function.__name__)
        return original(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    attention.compiled.cache_clear()
    request.addfinalizer(attention.compiled.cache_clear)
    options = {"schedule__steps": 4, "scan": scan}
    plain, compiled = tiny(**options), tiny(**options, compile=True)
    train(plain, tmp_path / "plain", quiet=True)
    train(compiled, tmp_path / "compiled", stop_at=2, quiet=True)
    train(plain, tmp_path / "compiled", resume=True, allow_change=["compile"], stop_at=3, quiet=True)
    train(compiled, tmp_path / "compiled", resume=True, allow_change=["compile"], quiet=True)
    assert seen == ["projections", "outputs"]  # of the standard layer, once, in every run that compiles
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert a.keys() == b.keys()
    assert not [name for name in b if "_orig_mod" in name]
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-5
    read = newest_checkpoint(tmp_path / "compiled" / "checkpoints")
    assert read is not None
    assert {k.partition("/")[2] for k in read.read()[1]} == a.keys()


def test_recomputing_standard_layers_changes_nothing(tiny, tmp_path, weights):
    options = {"schedule__steps": 3, "model__layers": "standard"}
    for recompute in (False, True):
        train(tiny(**options, recompute=recompute), tmp_path / str(recompute), quiet=True)
    a, b = (weights(tmp_path / name) for name in ("False", "True"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bf16_keeps_float32_weights(tiny, tmp_path, weights, records):
    train(tiny(precision="bf16", schedule__steps=6), tmp_path / "bf16", quiet=True)
    train(tiny(schedule__steps=6), tmp_path / "fp32", quiet=True)
    assert {w.dtype for w in weights(tmp_path / "bf16").values()} == {torch.float32}
    pairs = zip(*([r["loss"] for r in records(tmp_path / run, "train")] for run in ("bf16", "fp32")), strict=True)
    assert all(a != b and abs(a - b) < 0.05 for a, b in pairs)


def test_training_starts_from_given_weights(tiny, tmp_path, values, weights):
    shape = tiny().model
    recurformer.save(start := LanguageModel(shape), tmp_path / "start")
    table = values(init_from=str(tmp_path / "start"), model={"layers": "standard"}, optimizer__lr=1e-9)
    train(loop.TrainConfig.from_dict(table), tmp_path / "run", stop_at=1, quiet=True)
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["layers"] == "standard"
    a, b = start.state_dict(), weights(tmp_path / "run")
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-6
    with pytest.raises(ValueError, match=r"has .* of shape \(.*\), the model"):
        train(tiny(init_from=str(tmp_path / "start"), model__d_model=32), tmp_path / "other", quiet=True)
    # a start that failed is no run in the way
    train(tiny(schedule__steps=1), tmp_path / "other", quiet=True)


def test_the_recurrent_layers_alone_learn(tiny, tmp_path, values, weights):
    shape = dataclasses.replace(tiny().model, layers="standard")
    recurformer.save(start := LanguageModel(shape), tmp_path / "start")
    table = values(init_from=str(tmp_path / "start"), model={"layers": "first:1"}, trained="recurrent")
    config = loop.TrainConfig.from_dict(table)
    train(config, tmp_path / "run", stop_at=1, quiet=True)
    train(config, tmp_path / "run", resume=True, stop_at=2, quiet=True)
    a, b = start.state_dict(), weights(tmp_path / "run")
    assert all(torch.equal(a[name], b[name]) != name.startswith("layers.0.") for name in a)
    train(config, tmp_path / "straight", stop_at=2, quiet=True)
    assert all(torch.equal(b[name], weight) for name, weight in weights(tmp_path / "straight").items())
    with pytest.raises(ValueError, match="trained is 'recurrent', but the model has no recurrent layer"):
        tiny(trained="recurrent", model__layers="standard")
    with pytest.raises(ValueError, match="cannot be resumed with trained"):
        train(dataclasses.replace(config, trained="all"), tmp_path / "run", resume=True, quiet=True)


def test_a_run_from_before_a_setting_existed_goes_on(tiny, tmp_path):
    train(tiny(), tmp_path, stop_at=1, quiet=True)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["trained"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert train(tiny(), tmp_path, resume=True, stop_at=2, quiet=True).step == 2


def test_init_from_on_the_command_line(tiny, tmp_path):
    config = tiny()
    recurformer.save(LanguageModel(config.model), tmp_path / "start")
    out, data = str(tmp_path / "run"), [f"data.{n}={getattr(config.data, n)}" for n in ("train", "validation")]
    settings = [word for text in (*data, "sample.tokens=0") for word in ("--set", text)]
    result = CliRunner().invoke(
        cli, ["train", "--init-from", str(tmp_path / "start"), "--stop-at", "0", "--out", out, *settings]
    )
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "run/config.json").read_text())
    assert written["init_from"] == str(tmp_path / "start")
    assert written["model"]["d_model"] == config.model.d_model


def test_training_on_raw_shards(tiny, tmp_path, corpus, records):
    """Headless little-endian integers, which know neither their vocabulary nor their text."""
    for name in ("train", "validation"):
        (shard,) = TokenDataset(corpus / name).shards
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-0.npy").write_bytes(shard.path.read_bytes())
    train(tiny(schedule__steps=3), tmp_path / "prepared", quiet=True)
    raw = {"data__train": str(tmp_path / "train"), "data__validation": str(tmp_path / "validation"),
           "data__vocab_size": 256, "sample__tokens": 5}  # fmt: skip
    train(tiny(schedule__steps=3, **raw), tmp_path / "raw", quiet=True)
    assert records(tmp_path / "raw", "train") == records(tmp_path / "prepared", "train")
    assert records(tmp_path / "raw", "evaluation")[-1]["bits_per_byte"] is None
    assert not records(tmp_path / "raw", "sample")


# --- logging --------------------------------------------------------------------------------------------------------


def test_the_model_learns_and_the_metrics_say_so(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    result = train(tiny(schedule__steps=60, optimizer__lr=0.01, evaluation__every=20, log__every=7), run)
    metrics = read_metrics(run)
    start, *_ = metrics
    assert start["event"] == "start"
    assert start["versions"]["torch"] == torch.__version__
    training = [r for r in metrics if r["event"] == "train"]
    assert [r["step"] for r in training] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert [r["tokens"] for r in training] == [r["step"] * 64 for r in training]
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "seconds"} < training[0].keys()
    held_out = [r for r in metrics if r["event"] == "evaluation"]
    assert [r["step"] for r in held_out] == [0, 20, 40, 60]
    assert held_out[0]["validation_loss"] > 5 > 2.5 > held_out[-1]["validation_loss"] == result.validation_loss
    assert held_out[0]["bits_per_byte"] == pytest.approx(held_out[0]["validation_loss"] / math.log(2), rel=0.05)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 56/60" in shown.err
    assert "tokens/s" in shown.err
    assert "left" in shown.err


def test_a_metrics_line_cut_by_a_kill_is_dropped(tiny, tmp_path, records):
    config, run = tiny(schedule__steps=12), tmp_path / "run"
    train(config, run, stop_at=6, quiet=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 7, "loss": 1.0}\n{"event": "train", "st')
    train(config, run, resume=True, quiet=True)
    assert [r["step"] for r in records(run, "train")] == list(range(1, 13))
    assert records(run, "train")[6]["loss"] != 1.0


def test_samples_are_logged_and_follow_the_prompt(tiny, tmp_path, monkeypatch, records):
    asked = []

    def generate(self, tokens, max_new_tokens, *, temperature, seed, stream):
        asked.append((bytes(tokens[0].tolist()), max_new_tokens, temperature, seed, self.training))
        return torch.cat([tokens, torch.full((1, max_new_tokens), ord("x"))], 1)

    monkeypatch.setattr(LanguageModel, "generate", generate)
    config = tiny(schedule__steps=5, sample={"tokens": 3, "prompt": "fox", "temperature": 0.5, "seed": 4})
    train(config, tmp_path / "run", quiet=True)
    assert asked == [(b"fox", 3, 0.5, 4, False)] * 2
    assert records(tmp_path / "run", "sample") == [
        {"event": "sample", "step": step, "prompt": "fox", "text": "xxx"} for step in (0, 5)
    ]


def test_tensorboard(tiny, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    config = tiny(schedule__steps=6, log__loggers=["tensorboard"])
    train(config, tmp_path / "run", stop_at=3, quiet=True)
    train(config, tmp_path / "run", resume=True, quiet=True)
    events = accumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert {"train/lr", "train/grad_norm", "evaluation/validation_loss"} <= set(events.Tags()["scalars"])


def test_wandb_gets_every_number_and_one_run_id(tiny, tmp_path, monkeypatch):
    calls: list[Any] = []
    logged: list[int] = []
    run = types.SimpleNamespace(log=lambda numbers, step: logged.append(step), finish=lambda: None)
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    )
    config = tiny(schedule__steps=6, log__loggers=["wandb"], log__wandb_project="fox")
    train(config, tmp_path / "run", stop_at=3, quiet=True)
    train(config, tmp_path / "run", resume=True, quiet=True)
    assert [c["project"] for c in calls] == ["fox", "fox"]
    assert calls[0]["id"] == calls[1]["id"]
    assert set(logged) == set(range(7))


# --- the command ----------------------------------------------------------------------------------------------------


def command(values: dict[str, Any], run: Path, *options: str, config: bool = True) -> Any:
    file = run.with_suffix(".json")
    file.write_text(json.dumps(values))
    arguments = ["train", "--out", str(run), "--quiet", *options]
    return CliRunner().invoke(cli, arguments + (["--config", str(file)] if config else []), standalone_mode=False)


def test_the_command_trains_stops_and_resumes_with_the_runs_own_configuration(values, tmp_path):
    run = tmp_path / "run"
    first = command(values(), run, "--stop-at", "3", "--set", "schedule.steps=8")
    assert (first.exception, first.return_value) == (None, 0)
    second = command({}, run, "--resume", "--stop-at", "5", config=False)
    assert (second.exception, second.return_value) == (None, 0)
    refused = command({}, run, "--resume", "--set", "optimizer.lr=1", config=False)
    assert "optimizer.lr: 0.002 -> 1.0" in str(refused.exception)
    third = command({}, run, "--resume", "--set", "optimizer.lr=1", "--allow-change", "optimizer.lr", config=False)
    assert (third.exception, third.return_value) == (None, 0)
    assert [r["step"] for r in read_metrics(run) if r["event"] == "train"] == list(range(1, 9))
    assert (run / "plots" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_how_a_signal_ended_it(values, tmp_path, monkeypatch):
    watch_steps(monkeypatch, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert command(values(), tmp_path / "run").return_value == 143


def test_leftovers_of_killed_writers_go_at_the_next_start(tiny, tmp_path):
    train(tiny(schedule__steps=2), tmp_path / "run", quiet=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours = [f".config.json.{gone.pid}.tmp", f".metrics.jsonl.{gone.pid}.tmp"]  # of an earlier version
    mine = [".config.json.bak", ".notes.tmp"]
    for name in ours + mine:
        (tmp_path / "run" / name).touch()
    for name in (
        f".metrics.jsonl.0123abcd{WORK}",
        f"checkpoints/.step-00000004{WORK}",
        "checkpoints/.tmp-step-00000003",
    ):
        (tmp_path / "run" / name).mkdir()
    train(tiny(schedule__steps=3), tmp_path / "run", resume=True, allow_change=["schedule.steps"], quiet=True)
    assert {p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")} == {".lock", *mine}
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.name.startswith(".")] == []


def test_resuming_needs_a_run(values, tmp_path):
    """A name that was mistyped starts nothing; with --config the same command serves for every start."""
    missing = tmp_path / "typo"
    refused = command({}, missing, "--resume", "--set", "schedule.steps=5", config=False)
    assert "there is no run in" in str(refused.exception)
    assert not missing.exists()
    (tmp_path / "empty").mkdir()
    refused = command({}, tmp_path / "empty", "--resume", config=False)
    assert "has no config.json. Correct --out, or give --config" in str(refused.exception)
    refused = command({}, missing, "--resume", "--dry-run", config=False)
    assert "there is no run in" in str(refused.exception)
    started = command(values(schedule__steps=1), tmp_path / "run", "--resume")
    assert (started.exception, started.return_value) == (None, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--allow-change", "optimizer.lr"], "--allow-change optimizer.lr is for --resume"),
        (["--config", "other.toml"], "--config is given 2 times"),
        (["--init-from", "a", "--set", "init_from=b"], "--init-from 'a' and --set 'init_from=b' name two folders"),
        (["--dry-run", "--allow-change", "seed"], "--allow-change seed is for --resume"),
    ],
)
def test_options_that_contradict_each_other(options, said, values, tmp_path):
    refused = command(values(), tmp_path / "run", *options)
    assert said in str(refused.exception)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_another_folder(values, tmp_path, corpus, monkeypatch):
    """Relative paths of data hold from the folder in which the run was started, here one above the run."""
    shutil.copytree(corpus / "train", tmp_path / "data/train")
    shutil.copytree(corpus / "validation", tmp_path / "data/validation")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    data = {"train": "data/train", "validation": "data/validation", "window": 16}
    run = tmp_path / "runs/first"
    (tmp_path / "runs").mkdir()
    assert command(values(data=data, schedule__steps=4), run, "--stop-at", "2").return_value == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = command({}, run, "--resume", config=False)
    assert (again.exception, again.return_value) == (None, 0)
    found = CliRunner().invoke(cli, ["eval", str(run), "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["data"] == str(tmp_path / "data/validation")
    shutil.rmtree(tmp_path / "data")
    for arguments in (["eval", str(run)], ["train", "--resume", "--out", str(run), "--set", "seed=0"]):
        lost = CliRunner().invoke(cli, arguments)
        assert "which are neither in" in str(lost.exception)
        assert str(tmp_path / "elsewhere") in str(lost.exception)


def test_a_name_that_is_a_date(values, tmp_path, corpus, monkeypatch):
    """From the command line to the run's own configuration and back."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus / "train", tmp_path / "2024-05-01")
    table = values(schedule__steps=2)
    del table["data"]["train"], table["data"]["validation"]
    first = command(table, tmp_path / "run", "--set", "data.train=2024-05-01", "--set", "data.validation=none",
                    "--stop-at", "1")  # fmt: skip
    assert (first.exception, first.return_value) == (None, 0)
    second = command({}, tmp_path / "run", "--resume", config=False)
    assert (second.exception, second.return_value) == (None, 0)
