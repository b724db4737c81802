"""`recurformer convert`: every kind of folder, there and back, whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FIXTURES, assert_close, logits_of, random_tokens, tiny

import recurformer
from recurformer import cli
from recurformer.data.tokenizer import BytesTokenizer, train_bpe
from recurformer.files import appearing
from recurformer.interop import conversion, convert, load_llama, load_official, save_official

LLAMA: dict[str, Any] = {"layers": "standard", "activation": "swiglu", "position": "rope", "qk_norm": "none"}
TOKENS = random_tokens(2, 15, vocabulary=90)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def saved(folder: Path, tokenizer: Any = None, **options: Any) -> recurformer.LanguageModel:
    model = tiny(**options)
    recurformer.save(model, folder, tokenizer)
    return model


def test_layers_change_and_weights_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = saved(tmp_path / "a", BytesTokenizer(), vocab_size=256, layers="standard", n_layers=3)
    assert run("convert", str(tmp_path / "a"), str(tmp_path / "new/b"), "--layers", "0,2", "--dtype", "bf16") == 0
    assert "3 layers (RSR), as recurformer" in capsys.readouterr().out
    other = recurformer.load(tmp_path / "new/b")
    assert other.config.layer_kinds == ("recurrent", "standard", "recurrent")
    assert all(torch.equal(p.bfloat16(), q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert recurformer.load_tokenizer(tmp_path / "new/b").vocab_size == 256
    assert convert(tmp_path / "a", tmp_path / "c", layers="first:1").layers == "first:1"


@pytest.mark.parametrize(
    "words", [BytesTokenizer(), train_bpe(["the cat sat on the mat"] * 3, 270)], ids=["bytes", "bpe"]
)
def test_to_hugging_face_and_back(words: Any, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = saved(tmp_path / "a", words, vocab_size=words.vocab_size, layers="first:1")
    convert(tmp_path / "a", tmp_path / "hf", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer(["the mat", "a cat sat"], padding=True, return_tensors="pt")
    assert ids["input_ids"][1].tolist() == words.encode("a cat sat")
    assert theirs.generation_config.eos_token_id == words.eos_id
    out = theirs.generate(**ids, max_new_tokens=6)
    expected = model.generate(
        ids["input_ids"], 6, temperature=0.0, attention_mask=ids["attention_mask"], eos_token_id=words.eos_id
    )
    assert torch.equal(out, expected)
    convert(tmp_path / "hf", tmp_path / "b")
    again = recurformer.load(tmp_path / "b")
    assert again.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert recurformer.load_tokenizer(tmp_path / "b").encode("a cat") == words.encode("a cat")


def test_to_llama_and_back(tmp_path: Path):
    model = saved(tmp_path / "a", BytesTokenizer(), vocab_size=256, **LLAMA)
    convert(tmp_path / "a", tmp_path / "llama", "llama")
    assert_close(logits_of(load_llama(tmp_path / "llama"), TOKENS), logits_of(model, TOKENS))
    back = convert(tmp_path / "llama", tmp_path / "b", layers="1")
    assert back.layer_kinds == ("standard", "recurrent")
    assert recurformer.load_tokenizer(tmp_path / "b").kind == "bytes"


@pytest.mark.parametrize("name", ["official-recurrent", "official-transformer"])
def test_from_official_and_back(name: str, tmp_path: Path):
    convert(FIXTURES / name, tmp_path / "a")
    model = recurformer.load(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "official", "official")
    again = load_official(tmp_path / "official")
    assert again.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert convert(FIXTURES / name / "model.pt", tmp_path / "b", tokenizer=None) == model.config


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": "full", "norm": "rms", "residual_scale": "depth", "vocab_multiple": 64},
        {"qk_norm": "none", "activation": "swiglu", "layers": "standard", "position": "rope", "n_kv_heads": 2},
        {"qk_norm": "none", "attention_bias": True, "mlp_bias": True, "tie_embeddings": True},
    ],
)
def test_models_of_ours_as_official_ones(options: dict[str, Any], tmp_path: Path):
    model = tiny(**options)
    save_official(model, tmp_path)
    assert_close(logits_of(load_official(tmp_path), TOKENS), logits_of(model, TOKENS))


@pytest.mark.parametrize(
    ("options", "to", "message"),
    [
        ({"layers": "first:1"}, "official", "layers is 'first:1'.*all of one kind"),
        ({}, "official", "qk_norm is 'head'"),
        ({"qk_norm": "none", "position": "rope"}, "official", "position is 'rope'"),
        ({"qk_norm": "none", "position": "none"}, "official", "position is 'none'"),
        ({"qk_norm": "none", "mlp_bias": True}, "official", "mlp_bias is True"),
        ({}, "llama", "layers is 'recurrent'"),
    ],
)
def test_what_a_target_cannot_express(options: dict[str, Any], to: Any, message: str, tmp_path: Path):
    saved(tmp_path / "a", **options)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a", tmp_path / "b", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_refusals_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved(tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text('{"model_type": "gemma"}')
    for words, message in (
        (("a", "full"), "not an empty folder"),
        (("missing", "b"), "is no folder"),
        (("gemma", "b"), "model_type is 'gemma'"),
        (("a", "b", "--layers", "5"), "the layers are 0 to 1"),
        (("a", "b", "--layers", "some"), "layers is 'some'"),
        (("a", "b", "--tokenizer", "bytes"), "the tokenizer has 256 ids, the model 97"),
    ):
        assert run("convert", *(str(tmp_path / word) if n < 2 else word for n, word in enumerate(words))) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "full", "gemma"]


# --- links, other processes, full disks ------------------------------------------------------------------------------


def test_links_out_of_the_source_are_refused(tmp_path: Path):
    (tmp_path / "secret").write_text("password")
    saved(tmp_path / "a", BytesTokenizer(), vocab_size=256)
    for target, message in (("../secret", "is a link to .*secret', outside of its folder; put a copy in its place"),
                            ("/dev/zero", "is a link to '/dev/zero', outside of its folder")):  # fmt: skip
        (tmp_path / "a" / "merges.txt").symlink_to(target)
        with pytest.raises(ValueError, match=f"merges.txt {message}"):
            convert(tmp_path / "a", tmp_path / "b")
        (tmp_path / "a" / "merges.txt").unlink()
    os.mkfifo(tmp_path / "a" / "vocab.json")
    with pytest.raises(ValueError, match=r"vocab\.json is no regular file"):
        convert(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "secret"]


def test_links_inside_the_source_and_of_the_hugging_face_cache_are_copied(tmp_path: Path):
    snapshot = tmp_path / "models--a" / "snapshots" / "0123"
    saved(snapshot, BytesTokenizer(), vocab_size=256)
    (blobs := tmp_path / "models--a" / "blobs").mkdir()
    for n, name in enumerate(sorted(path.name for path in snapshot.iterdir())):
        (snapshot / name).rename(blobs / str(n))
        (snapshot / name).symlink_to(f"../../blobs/{n}")
    (snapshot / "chat_template.jinja").symlink_to("recurformer_tokenizer.json")
    convert(snapshot, tmp_path / "b")
    assert recurformer.load_tokenizer(tmp_path / "b").kind == "bytes"
    for name in ("recurformer_tokenizer.json", "chat_template.jinja", "model.safetensors"):
        assert not (tmp_path / "b" / name).is_symlink()
        assert (tmp_path / "b" / name).stat().st_size > 0


def test_two_conversions_into_one_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved(tmp_path / "a")
    with appearing(tmp_path / "b"):
        assert run("convert", str(tmp_path / "a"), str(tmp_path / "b")) == 2
        assert "another process is writing" in (error := capsys.readouterr().err)
        assert "wait until it has ended" in error
    (tmp_path / "b").rmdir()
    (left := tmp_path / f".b.{os.getpid()}.tmp").mkdir()  # of a killed process that had the same number
    (left / "model.safetensors").touch()
    (tmp_path / ".b.recurformer-tmp" / "b").mkdir(parents=True)
    convert(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_destination_that_is_filled_meanwhile_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path / "a")

    def read(source: Path) -> Any:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "thesis").touch()
        return conversion_read(source)

    conversion_read = conversion.read
    monkeypatch.setattr(conversion, "read", read)
    with pytest.raises(ValueError, match="has appeared while it was being written, and is not empty; remove it or"):
        convert(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["thesis"]


@pytest.mark.parametrize("to", ["recurformer", "hf", "llama", "official"])
def test_a_full_disk_is_one_line(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved(tmp_path / "a", **LLAMA)
    (tmp_path / "out").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "a" / "model.safetensors").stat().st_size // 2, before[1]))
    try:
        code = run("convert", str(tmp_path / "a"), str(tmp_path / "out" / "b"), "--to", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    errors = capsys.readouterr().err
    assert code == 2
    assert errors.splitlines()[-1].startswith("recurformer: error: ")
    assert "File too large" in errors
    assert to == "hf" or errors.count("\n") == 1  # transformers shows a bar first
    assert list((tmp_path / "out").iterdir()) == []


def test_a_terminated_conversion_leaves_nothing(tmp_path: Path):
    saved(tmp_path / "a")
    code = (
        "import sys, time; from recurformer import cli, interop; from recurformer.interop import conversion; "
        "conversion.folders.save = lambda *_: (print(flush=True), time.sleep(60)); cli.main(sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, "convert", "a", "b"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 2
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_written_files_have_the_usual_permissions(tmp_path: Path):
    pytest.importorskip("transformers")
    saved(tmp_path / "a", BytesTokenizer(), vocab_size=256, **LLAMA)
    for to in ("recurformer", "hf", "llama"):
        convert(tmp_path / "a", tmp_path / to, to)  # pyright: ignore[reportArgumentType]
    before = os.umask(0)
    os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 12
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~before}
