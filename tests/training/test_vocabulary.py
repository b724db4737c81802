"""Training, evaluation and starting models agree on the tokenizer, or are refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import recurformer
from recurformer import LanguageModel, ModelConfig
from recurformer.cli import main
from recurformer.data import TokenDataset, prepare
from recurformer.data.tokenizer import JsonTokenizer, train_bpe
from recurformer.evaluation import evaluate, open_data
from recurformer.training import TrainConfig, train

TEXT = "the cat sat on the mat and the dog ran after it. " * 60
OTHER = "zwei sehr lange Katzen liefen um das kleine Haus herum. " * 60


@pytest.fixture(scope="module")
def words() -> tuple[JsonTokenizer, JsonTokenizer]:
    """Two tokenizers of 270 ids."""
    return train_bpe([TEXT], 270), train_bpe([OTHER], 270)


@pytest.fixture
def place(words: tuple[JsonTokenizer, JsonTokenizer], tmp_path: Path) -> Path:
    """The folders `right` and `wrong` with the same text, and a `model` with 300 rows and the first tokenizer."""
    (tmp_path / "text.txt").write_text(TEXT)
    for name, tokenizer in zip(("right", "wrong"), words, strict=True):
        prepare([tmp_path / "text.txt"], tmp_path / name, tokenizer, progress=False)
    config = ModelConfig(vocab_size=300, d_model=16, n_layers=1, n_heads=2)
    recurformer.save(LanguageModel(config), tmp_path / "model", words[0])
    return tmp_path


def config(values: Callable[..., dict], place: Path, data: str, validation: str | None, start: bool) -> TrainConfig:
    tables = values(schedule__steps=2, data__train=str(place / data), data__window=8)
    tables["data"]["validation"] = validation and str(place / validation)
    if start:
        tables |= {"init_from": str(place / "model"), "model": {}}
    return TrainConfig.from_dict(tables)


def test_a_model_with_more_rows_than_ids_trains_and_is_evaluated(values: Callable[..., dict], place: Path):
    result = train(config(values, place, "right", "right", start=True), place / "run", quiet=True)
    assert result.finished
    model = recurformer.load(place / "run")
    assert model.config.vocab_size == 300
    for data in (place / "right", place / "text.txt"):
        tokenizer = recurformer.load_tokenizer(place / "run")
        with open_data(data, tokenizer, 300, place / "run") as dataset:
            assert dataset.vocab_size == 270
            assert evaluate(model, dataset, window=8, batch_size=4).tokens == dataset.n_tokens - 1


@pytest.mark.parametrize(
    ("data", "validation", "start"), [("wrong", None, True), ("right", "wrong", True), ("right", "wrong", False)],
    ids=["start", "validation of a start", "validation"],
)  # fmt: skip
def test_training_refuses_another_tokenizer(
    data: str, validation: str | None, start: bool, values: Callable[..., dict], place: Path
):
    with pytest.raises(ValueError, match=r"/wrong was prepared with the tokenizer .* has another tokenizer .*: id 25"):
        train(config(values, place, data, validation, start), place / "run", quiet=True)
    assert not (place / "run").exists()


def test_a_finished_start_may_be_gone_when_the_run_is_resumed(values: Callable[..., dict], place: Path):
    asked = config(values, place, "right", None, start=True)
    train(asked, place / "run", stop_at=1, quiet=True)
    (place / "model").rename(place / "elsewhere")
    assert train(asked, place / "run", resume=True, quiet=True).finished


def test_evaluation_refuses_another_tokenizer(
    place: Path, words: tuple[JsonTokenizer, JsonTokenizer], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(place / "model"), "--data", str(place / "wrong")])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"--tokenizer {place / 'model'}" in message
    assert message.count("\n") == 1
    asked = open_data(place / "wrong", words[0], 300)
    with pytest.raises(ValueError, match="but the model has another tokenizer"), asked:
        pass
    assert TokenDataset(place / "wrong").vocab_size == 270  # as many ids as the right one
