"""Perplexity: every token counts once, whatever the window's batch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import every_scan, tiny

import recurformer
from recurformer import LanguageModel, cli
from recurformer.data import TokenDataset, load_tokenizer, prepare
from recurformer.evaluation import (
    Evaluation,
    InterruptedEvaluationError,
    evaluate,
    locate,
    open_data,
    run_of,
    run_setting,
)

TEXTS = ["It was the best of times, it was the worst of times.", "é" * 9, "x", "Call me Ishmael. " * 3]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files, one document each."""
    folder = tmp_path_factory.mktemp("texts")
    for n, text in enumerate(TEXTS):
        (folder / f"{n}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def dataset(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """The same as tokens."""
    out = tmp_path_factory.mktemp("tokens") / "data"
    prepare([texts], out, progress=False)
    return TokenDataset(out)


def by_hand(model: LanguageModel, window: int) -> tuple[float, int]:
    """(sum of token losses, their number), document by document and window by window."""
    total, count = 0.0, 0
    for text in TEXTS:
        ids = [*text.encode(), 0]
        for begin in range(0, len(ids) - 1, window):
            piece = torch.tensor(ids[begin : begin + window + 1])
            logits = model(piece[None, :-1]).logits[0]
            total += F.cross_entropy(logits, piece[1:], reduction="sum").item()
            count += len(piece) - 1
    return total, count


@every_scan
@pytest.mark.parametrize("window", [1, 7, 64])
def test_equals_token_by_token(dataset: TokenDataset, scan: str, window: int) -> None:
    model = tiny(vocab_size=256, dtype=torch.float64, scan=scan)
    total, count = by_hand(model, window)
    found = evaluate(model, dataset, window=window, batch_size=3)
    assert found.tokens == count == sum(len(text.encode()) for text in TEXTS)
    assert found.loss == pytest.approx(total / count, abs=1e-10)
    assert found.bytes == count  # one byte a token, the end of a text in place of its first byte
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / count, abs=1e-10)
    assert found.perplexity == pytest.approx(math.exp(total / count))


def test_batch_size_changes_nothing(dataset: TokenDataset) -> None:
    model = tiny(vocab_size=256, dtype=torch.float64)
    results = [evaluate(model, dataset, window=8, batch_size=size) for size in (1, 2, 5, 100)]
    for result in results[1:]:
        assert result.tokens == results[0].tokens
        assert result.loss == pytest.approx(results[0].loss, abs=1e-12)


def test_a_part_of_the_data(dataset: TokenDataset) -> None:
    model = tiny(vocab_size=256)
    part = evaluate(model, dataset, window=8, batch_size=2, max_batches=3)
    assert part.tokens == 6 * 8
    assert part.bytes == pytest.approx(6 * 8)
    beyond = evaluate(model, dataset, window=8, batch_size=2, max_batches=10**6)
    assert beyond.tokens == sum(len(text.encode()) for text in TEXTS)


def test_modes_come_back_and_nothing_is_learned(dataset: TokenDataset) -> None:
    model = tiny(vocab_size=256).train()
    model.layers[1].eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    evaluate(model, dataset, window=8, batch_size=4)
    assert model.training
    assert model.layers[0].training
    assert not model.layers[1].training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_progress_goes_to_stderr(dataset: TokenDataset, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(tiny(vocab_size=256), dataset, window=64, batch_size=4, progress=True)
    assert capsys.readouterr().out == ""


def test_refusals(dataset: TokenDataset) -> None:
    with pytest.raises(ValueError, match=r"256 ids, the model's 97"):
        evaluate(tiny(), dataset, window=8, batch_size=4)
    model = tiny(vocab_size=256)
    for sizes in ((0, 4, None), (8, 0, None), (8, 4, 0)):
        with pytest.raises(ValueError, match="is 0; it must be at least 1"):
            evaluate(model, dataset, window=sizes[0], batch_size=sizes[1], max_batches=sizes[2])


def test_numbers_that_do_not_exist() -> None:
    unknown = Evaluation(loss=800.0, tokens=10, bytes=math.nan, seconds=1.0)
    assert unknown.perplexity == math.inf
    assert math.isnan(unknown.bits_per_byte)
    assert unknown.to_dict() == {
        "loss": 800.0, "perplexity": None, "bits_per_byte": None, "tokens": 10, "bytes": None, "seconds": 1.0,
    }  # fmt: skip


# --- data of a path --------------------------------------------------------------------------------------------------


def test_text_is_tokenized_on_the_fly(texts: Path, tmp_path: Path) -> None:
    prepare([texts / "0.txt"], tmp_path / "data", progress=False)
    tokenizer = load_tokenizer("bytes")
    with open_data(texts / "0.txt", tokenizer, 256) as from_text, open_data(tmp_path / "data", None, 256) as prepared:
        assert from_text.fingerprint == prepared.fingerprint
        assert from_text.read(0, 0, from_text.n_tokens).tolist() == [*TEXTS[0].encode(), 0]
        folder = from_text.folder
    assert folder is not None
    assert not folder.exists()


def test_raw_shards(tmp_path: Path) -> None:
    np.arange(20, dtype=np.uint16).tofile(tmp_path / "part.npy")
    for path in (tmp_path / "part.npy", tmp_path):
        with open_data(path, None, 97) as dataset:
            result = evaluate(tiny(), dataset, window=8, batch_size=4)
            assert result.tokens == 19
            assert math.isnan(result.bits_per_byte)


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "empty").mkdir()
    tokenizer = load_tokenizer("bytes")
    for path, known, message in (
        (tmp_path / "none", tokenizer, "do not exist"),
        (tmp_path / "a.txt", None, "has no tokenizer"),
        (tmp_path / "a.png", tokenizer, r"a\.png"),
        (tmp_path / "empty", tokenizer, "empty"),
    ):
        with pytest.raises(ValueError, match=message), open_data(path, known, 256):
            pass


def test_settings_of_the_run_around_a_checkpoint(tmp_path: Path) -> None:
    model = tmp_path / "run" / "checkpoints" / "step-00000001" / "model"
    model.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"data": {"window": 128}}')
    assert run_setting(model, "data", "window") == 128
    assert run_setting(tmp_path / "run", "data", "window") == 128
    assert run_setting(tmp_path / "run", "data", "other") is None
    assert run_setting(tmp_path, "data", "window") is None


def test_an_evaluation_ends_when_it_is_told_to(dataset: TokenDataset) -> None:
    """Before the next batch, with the model's modes as they were."""
    model, answers = tiny(vocab_size=dataset.vocab_size).train(), iter([False, False, True])
    with pytest.raises(InterruptedEvaluationError):
        evaluate(model, dataset, window=8, batch_size=1, interrupted=lambda: next(answers))
    assert next(answers, None) is None
    assert model.training


def test_a_relative_path_of_a_run_holds_from_folders_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = run_of(tmp_path / "runs" / "a" / "checkpoints")
    assert run is not None
    assert run == tmp_path / "runs" / "a"
    assert locate("data", run) == str(tmp_path / "data")
    (tmp_path / "elsewhere" / "data").mkdir()
    assert locate("data", run) == "data"  # this folder comes first
    assert locate("/nowhere", run) == "/nowhere"
    with pytest.raises(
        ValueError, match=r"names the data 'none', which are neither in .*elsewhere nor in a folder above"
    ):
        locate("none", run)


@pytest.mark.parametrize("broken", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("more", [(), ("--json",)], ids=["text", "json"])
def test_a_loss_that_is_no_number_is_an_error(
    broken: float, more: tuple[str, ...], texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer("bytes")
    model = tiny(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.head.weight[5] = broken
    recurformer.save(model, tmp_path / "model", tokenizer)
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", str(tmp_path / "model"), "--data", str(texts / "0.txt"), *more])
    shown = capsys.readouterr()
    assert (stop.value.code, shown.out) == (2, "")
    assert "its weights hold NaN or infinity" in shown.err
    assert len(shown.err.split("recurformer: error: ")) == 2
    assert len(shown.err.strip().splitlines()) == 1
