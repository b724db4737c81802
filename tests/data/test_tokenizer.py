"""Tokenizers: ids, round trips through text, files and pickles, and text that arrives token by token."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from recurformer.data.tokenizer import MARKER, BytesTokenizer, Tokenizer, load_tokenizer, train_bpe

SHARED = Path(os.environ.get("RECURFORMER_TEST_DATA", Path(__file__).parents[3] / "shared"))
TEXT = "Grüße, naïve “world”…\n\n  二つの 🦊 tokens.\n"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([TEXT * 3, "The quick brown fox jumps over the lazy dog. " * 20], 300)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "tiny.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox", "jumps over the lazy dog"] * 20),
        model_writer=model, vocab_size=31, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def real(name: str) -> Tokenizer:
    path = SHARED / "tokenizers" / name
    if not path.exists():
        pytest.skip(f"{path} is not here; set RECURFORMER_TEST_DATA to a folder that holds tokenizers/{name}")
    return load_tokenizer(path)


def same(left: Tokenizer, right: Tokenizer) -> None:
    assert type(left) is type(right)
    assert (left.vocab_size, left.eos_id, left.pad_id) == (right.vocab_size, right.eos_id, right.pad_id)
    assert left.encode(TEXT) == right.encode(TEXT)


def test_bytes_are_utf8():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (256, 0, None)
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.encode_array("aé").tolist() == [97, 195, 169]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_decoding_never_fails(bpe: Tokenizer, pieces: Tokenizer):
    assert load_tokenizer("bytes").decode([97, 255, 98, 300, -1]) == "a\ufffdb\ufffd\ufffd"
    for tokenizer in (bpe, pieces):
        ids = tokenizer.encode("the fox")
        assert tokenizer.decode([*ids, tokenizer.vocab_size]) == "the fox\ufffd"


@pytest.mark.parametrize("kind", ["bytes", "tokenizers", "sentencepiece"])
def test_saved_and_pickled_tokenizers_come_back_equal(kind: str, bpe: Tokenizer, pieces: Tokenizer, tmp_path: Path):
    tokenizer = {"bytes": BytesTokenizer(), "tokenizers": bpe, "sentencepiece": pieces}[kind]
    tokenizer.save(tmp_path / "saved")
    tokenizer.save(tmp_path / "saved")  # over itself
    same(load_tokenizer(tmp_path / "saved"), tokenizer)
    same(pickle.loads(pickle.dumps(tokenizer)), tokenizer)
    assert json.loads((tmp_path / "saved" / MARKER).read_text())["kind"] == kind
    files = {"bytes": set(), "tokenizers": {"tokenizer.json"}, "sentencepiece": {"spiece.model"}}[kind]
    assert {path.name for path in (tmp_path / "saved").iterdir()} == files | {MARKER}


def test_trained_bpe_is_lossless_and_deterministic(bpe: Tokenizer):
    assert bpe.vocab_size == 300
    assert bpe.eos_id == 0
    assert bpe.decode(bpe.encode(TEXT)) == TEXT
    assert len(bpe.encode("The quick brown fox")) < len("The quick brown fox")
    again = train_bpe([TEXT * 3, "The quick brown fox jumps over the lazy dog. " * 20], 300)
    assert again.contents() == bpe.contents()
    with pytest.raises(ValueError, match="vocabulary of 256 is too small; it needs 257"):
        train_bpe([TEXT], 256)


def test_text_that_spells_a_special_token_stays_text(bpe: Tokenizer):
    ids = bpe.encode("a<|endoftext|>b")
    assert bpe.eos_id not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"


def word_level(added: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(added)
    return tokenizer


@pytest.mark.parametrize(
    ("added", "eos", "pad"),
    [(["</s>", "<pad>"], 3, 4), (["<|endoftext|>"], 3, None), (["<eos>"], 3, None), (["<other>"], None, None)],
)
def test_end_and_padding_are_found_by_name(added: list[str], eos: int | None, pad: int | None, tmp_path: Path):
    word_level(added).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.eos_id, tokenizer.pad_id) == (eos, pad)
    same(load_tokenizer(tmp_path), tokenizer)


def test_files_beside_it_name_the_end_first(tmp_path: Path):
    word_level(["</s>", "<stop>"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<stop>"}, "pad_token": "</s>"})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (4, 3)
    tokenizer.save(tmp_path / "saved")  # without tokenizer_config.json
    same(load_tokenizer(tmp_path / "saved"), tokenizer)


def test_truncation_padding_and_specials_of_the_file_are_off(tmp_path: Path):
    library = word_level(["</s>"])
    library.enable_truncation(2)
    library.enable_padding(length=8, pad_id=3)
    library.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a b a") == [0, 1, 0]


def test_sentencepiece_ids(pieces: Tokenizer):
    assert (pieces.vocab_size, pieces.eos_id, pieces.pad_id) == (31, 1, 0)
    assert pieces.decode(pieces.encode("the lazy fox")) == "the lazy fox"


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("tokenizer.json", "{}", "not a tokenizer.json that the tokenizers library can read"),
        ("tokenizer.json", "\xff", "tokenizer.json"),
        ("x.model", "garbage", "not a SentencePiece model"),
        ("x.model", "", "not a SentencePiece model"),
        ("x.txt", "words", "is neither a .json nor a .model file"),
    ],
)
def test_foreign_files_are_refused(name: str, contents: str, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(contents.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / name)


def test_damaged_folders_are_refused(pieces: Tokenizer, tmp_path: Path):
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no"):
        load_tokenizer(tmp_path)
    pieces.save(tmp_path)
    (tmp_path / "spiece.model").unlink()
    with pytest.raises(ValueError, match=r"spiece.model is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / MARKER).write_text('{"kind": "morse", "eos_id": null, "pad_id": null}')
    with pytest.raises(ValueError, match="the kind 'morse'; known are bytes, tokenizers, sentencepiece"):
        load_tokenizer(tmp_path)
    (tmp_path / MARKER).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_tokenizer(tmp_path)


def test_a_missing_library_is_named(pieces: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pieces.save(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"needs the sentencepiece library; pip install 'recurformer\[data\]'"):
        load_tokenizer(tmp_path)


# --- ends that a text spells ------------------------------------------------------------------------------------------


def test_a_nul_is_refused_by_bytes():
    for encode in (BytesTokenizer().encode, BytesTokenizer().encode_array):
        with pytest.raises(ValueError, match=r"character 2 of the text is NUL \(U\+0000\), which ends a document"):
            encode("ab\0c")
    assert BytesTokenizer().decode([97, 0]) == "a\0"


@pytest.mark.parametrize("text", ["a </s> b", "</s>", "</s></s>", "x</s>"])
def test_a_word_that_spells_the_end_stays_text(text: str, tmp_path: Path):
    """T5's vocabulary holds "</s>" as an ordinary piece, too."""
    unigram = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -1.0), ("s", -2.0)], unk_id=0)
    )
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    unigram.add_special_tokens(["</s>"])
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["</s>"])
    for number, library in enumerate((unigram, words)):
        library.encode_special_tokens = True
        library.save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
        assert tokenizer.eos_id == 1
        if number == 0 or text in ("a </s> b", "</s>"):
            assert 1 in library.encode(text).ids
        ids = tokenizer.encode(text)
        assert 1 not in ids
        tokenizer.save(tmp_path / f"saved {number}")
        again = load_tokenizer(tmp_path / f"saved {number}")
        assert again.encode(text) == pickle.loads(pickle.dumps(tokenizer)).encode(text) == ids
        assert again.contents() == tokenizer.contents()
        written = tokenizers.Tokenizer.from_file(str(tmp_path / f"saved {number}" / "tokenizer.json"))
        written.encode_special_tokens = True
        assert written.encode(text).ids == ids


def test_an_end_of_one_character_is_refused(tmp_path: Path):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "$": 1, "a": 2}, unk_token="?"))  # pyright: ignore[reportCallIssue]
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.add_special_tokens(["$"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "$"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a b") == [2, 0]
    with pytest.raises(ValueError, match=r"character 2 of the text begins '\$', which the tokenizer takes for its end"):
        tokenizer.encode("a $ b")


# --- files that others wrote ------------------------------------------------------------------------------------------


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


ORDINARY = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}}, "fails on ordinary text.*UNK"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}}, "fails on ordinary text.*unk_id"),
        ({"model": {"type": "BPE", "unk_token": "?", "vocab": {"a": 0}, "merges": []}}, "fails on ordinary text.*Unk"),
        ({"pre_tokenizer": split("(a+)+$")}, "fails on ordinary text.*retry-limit"),
        ({"pre_tokenizer": split(r"(x+x+)+\1y")}, "fails on ordinary text.*retry-limit"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////"}}, "not a tokenizer.json"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAGFiY2Q="}}, "fails on ordinary text"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "fails on ordinary text"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 100, "stop": 1000}}, "fails on ordinary text"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_fails_is_found_when_it_is_opened(
    changes: dict, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "tokenizer.json").write_text(json.dumps(ORDINARY | changes))
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as found:
        load_tokenizer(tmp_path)
    assert time.monotonic() - began < 5
    assert capfd.readouterr() == ("", "")  # the library's panic does not show
    assert len(str(found.value)) < 600


def test_a_panic_while_encoding_is_an_error(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(ORDINARY | {"pre_tokenizer": split("(z+)+$")}))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode this text \(Onig: Regex search error"):
        tokenizer.encode("z" * 60 + "!")


def test_text_that_is_no_unicode_is_one_sentence(bpe: Tokenizer, pieces: Tokenizer):
    for tokenizer in (BytesTokenizer(), bpe, pieces):
        with pytest.raises(ValueError, match=r"character 3 of the text is half a surrogate pair.* UTF-8 locale"):
            tokenizer.encode("caf\udce9")


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ('{"kind": "tokenizers", "eos_id": "0", "pad_id": null}', "eos_id is '0'; it must be a whole number"),
        ('{"kind": "tokenizers", "eos_id": 9, "pad_id": null}', "eos_id is 9; the vocabulary has the ids 0 to 1"),
        ('{"kind": "tokenizers", "eos_id": null, "pad_id": -1}', "pad_id is -1"),
        ('{"kind": ["tokenizers"], "eos_id": null, "pad_id": null}', "names the kind"),
        ("[" * 100_000, "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"kind": "m" * 10_000, "eos_id": None, "pad_id": None}), "names the kind 'mmm"),
    ],
)
def test_markers_with_strange_values_are_refused(marker: str, message: str, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(ORDINARY))
    (tmp_path / MARKER).write_text(marker)
    with pytest.raises(ValueError, match=message) as found:
        load_tokenizer(tmp_path)
    assert len(str(found.value)) < 600


def test_what_is_switched_off_is_off_in_the_saved_file(tmp_path: Path):
    library = word_level(["</s>"])
    library.enable_truncation(2)
    library.enable_padding(length=8, pad_id=3)
    library.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    library.save(str(tmp_path / "tokenizer.json"))
    load_tokenizer(tmp_path).save(tmp_path / "saved")
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json")).encode("a b a").ids == [0, 1, 0]


def test_a_file_without_switches_is_kept_byte_for_byte(bpe: Tokenizer, tmp_path: Path):
    library = tokenizers.Tokenizer.from_str(bpe.contents().decode())
    library.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)  # as GPT-2's; it adds nothing
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).contents() == (tmp_path / "tokenizer.json").read_bytes()


# --- streams ----------------------------------------------------------------------------------------------------------


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.feed(token) for token in ids), stream.finish()]


@given(st.lists(st.integers(0, 255), max_size=40))
def test_streamed_bytes_equal_decoded_bytes_even_when_broken(ids: list[int]):
    assert "".join(streamed(BytesTokenizer(), ids)) == BytesTokenizer().decode(ids)


def test_streams_show_whole_characters_as_soon_as_they_are_complete(bpe: Tokenizer, pieces: Tokenizer):
    assert streamed(BytesTokenizer(), list("é🦊a".encode())) == ["", "é", "", "", "", "🦊", "a", ""]
    assert streamed(BytesTokenizer(), [0xF0, 0x9F, 300, 97]) == ["", "", "\ufffd\ufffd", "a", ""]
    for tokenizer, text in ((bpe, TEXT), (pieces, "the quick dog jumps")):
        parts = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(parts) == text
        assert not any("\ufffd" in part for part in parts)
        assert parts[-1] == ""


def test_a_stream_gives_up_on_what_is_no_text(bpe: Tokenizer):
    half = bpe.encode("é")[:1]
    parts = streamed(bpe, half * 20)
    assert parts[-1] != "".join(parts)  # something was shown before the end
    assert streamed(bpe, half)[-1] == "\ufffd"


# --- the real ones ----------------------------------------------------------------------------------------------------


def test_gpt2():
    tokenizer = real("gpt2/tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert "".join(streamed(tokenizer, tokenizer.encode(TEXT))) == TEXT


@pytest.mark.parametrize(("name", "vocab_size"), [("t5/spiece.model", 32000), ("t5/tokenizer.json", 32100)])
def test_t5(name: str, vocab_size: int, tmp_path: Path):
    tokenizer = real(name)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (vocab_size, 1, 0)
    assert tokenizer.encode("Hello world") == [8774, 296]
    assert "".join(streamed(tokenizer, [8774, 296])) == "Hello world"
    tokenizer.save(tmp_path)
    same(load_tokenizer(tmp_path), tokenizer)
