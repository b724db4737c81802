"""The ids of data are ids of the model, and they mean the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from recurformer.data import TokenDataset, Tokenizer, prepare
from recurformer.data.tokenizer import BytesTokenizer, load_tokenizer, train_bpe
from recurformer.data.vocabulary import check_vocabulary

TEXT = "the cat sat on the mat and the dog. " * 50
OTHER = "zwei sehr lange Katzen liefen um das kleine Haus. " * 50


def prepared(folder: Path, tokenizer: Tokenizer) -> TokenDataset:
    folder.with_suffix(".txt").write_text(TEXT)
    prepare([folder.with_suffix(".txt")], folder, tokenizer, progress=False)
    return TokenDataset(folder)


def test_the_same_tokenizer_passes(tmp_path: Path):
    words = train_bpe([TEXT], 270)
    dataset = prepared(tmp_path / "data", words)
    check_vocabulary(dataset, 270)
    check_vocabulary(dataset, 270, words, tmp_path)
    check_vocabulary(dataset, 320, words, tmp_path)  # an embedding with more rows


def test_the_same_vocabulary_in_another_file_passes(tmp_path: Path):
    words = train_bpe([TEXT], 270)
    words.save(tmp_path / "model")
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(content, indent=1))
    check_vocabulary(prepared(tmp_path / "data", words), 270, load_tokenizer(tmp_path / "model"))


@pytest.mark.parametrize("other", [train_bpe([OTHER], 270), BytesTokenizer()], ids=["of equal size", "of another kind"])
def test_another_tokenizer_is_refused_and_both_are_named(other: Tokenizer, tmp_path: Path):
    dataset = prepared(tmp_path / "data", train_bpe([TEXT], 270))
    with pytest.raises(ValueError) as found:
        check_vocabulary(dataset, 300, other, tmp_path / "model")
    message = str(found.value)
    for part in (str(tmp_path / "data"), "(tokenizers, 270 ids, sha256 ", str(tmp_path / "model"), f"({other.kind}, ",
                 " in the first and ", f"--tokenizer {tmp_path / 'model'}"):  # fmt: skip
        assert part in message
    assert len(message) < 800


def test_more_ids_than_the_model_has_are_refused(tmp_path: Path):
    dataset = prepared(tmp_path / "data", BytesTokenizer())
    with pytest.raises(ValueError, match=r"data .*/data has 256 ids, the model's 255; .* --tokenizer there"):
        check_vocabulary(dataset, 255, None, "there")
    np.arange(20, dtype="<u2").tofile(tmp_path / "raw.npy")
    raw = TokenDataset(tmp_path / "raw.npy", vocab_size=100)
    check_vocabulary(raw, 100, BytesTokenizer())  # raw shards have no tokenizer
    with pytest.raises(ValueError, match=r"raw\.npy has 100 ids, the model's 99"):
        check_vocabulary(raw, 99)


def test_a_tokenizer_put_in_the_place_of_the_right_one_is_found(tmp_path: Path):
    """A run copies it into its checkpoints."""
    dataset = prepared(tmp_path / "data", train_bpe([TEXT], 270))
    train_bpe([OTHER], 270).save(tmp_path / "data" / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer holds another tokenizer than .*dataset\.json records"):
        dataset.tokenizer()
