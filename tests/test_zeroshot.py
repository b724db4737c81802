"""Zero-shot scoring: sums by hand, truncation, ties, and agreement with lm-eval."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits_of, tiny

import recurformer
from recurformer import cli
from recurformer.data.tokenizer import BytesTokenizer, train_bpe
from recurformer.zeroshot import (
    TaskResult,
    encode_pair,
    evaluate_task,
    find_tasks,
    first_largest,
    read_items,
    score,
    show,
)

CHOICES = [
    {
        "id": 0,
        "context": "Question: What is green?\nAnswer:",
        "choices": [" grass", " a long red brick", " snow"],
        "label": 0,
    },
    {"id": 1, "context": "He turned on the tap so ", "choices": ["water came.", "it was late and dark."], "label": 1},
    {"id": 2, "context": "", "choices": [" yes", " no"], "label": 1},
    {"id": 3, "context": "Is it?", "choices": [" yes", " yes"], "label": 0},
]
CONTEXTS = [
    {"contexts": ["Ann met Bo since Ann", "Ann met Bo since Bo"], "continuation": " was kind.", "label": 1},
    {
        "contexts": ["The cup fits the box: the cup", "The cup fits the box: the box"],
        "continuation": " is big.",
        "label": 0,
    },
]
LONE = [{"context": "one two one", "continuation": " two"}, {"context": "a b c d", "continuation": " e"}]


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(one) + "\n" for one in items).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three tasks."""
    write(tmp_path / "choices.jsonl.gz", CHOICES)
    write(tmp_path / "contexts.jsonl", CONTEXTS)
    write(tmp_path / "lone.jsonl", LONE)
    return tmp_path


def log_probability(model: recurformer.LanguageModel, before: list[int], after: list[int]) -> float:
    """One continuation alone, over the whole sequence."""
    logits = logits_of(model, torch.tensor([before + after])).detach().log_softmax(-1)[0]
    return sum(float(logits[len(before) + i - 1, token]) for i, token in enumerate(after))


def test_scores_are_the_sums_over_the_continuation_whatever_the_batch():
    model, words = tiny(vocab_size=256, layers="first:1", dtype=torch.float64), BytesTokenizer()
    requests = [encode_pair(words, one["context"], choice) for one in CHOICES for choice in one["choices"]]
    expected = [log_probability(model, *request) for request in requests]
    for batch_size in (1, 3, 100):
        found = [s.log_probability for s in score(model, requests, 512, batch_size)]
        assert found == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("window", [1, 4, 12])
def test_long_contexts_lose_their_beginning(window: int):
    model = tiny(vocab_size=256, dtype=torch.float64)
    before, after = list(b"a rather long context"), list(b" end")
    found = score(model, [(before, after)], window, 8)[0].log_probability
    read, wanted = (before + after)[-window - 1 :], after[-window:]
    assert found == pytest.approx(log_probability(model, read[: -len(wanted)], wanted), abs=1e-10)


def test_greedy_continuations():
    model, before = tiny(vocab_size=256), list(b"one two")
    after = model.generate(torch.tensor([before]), 5, temperature=0.0)[0, len(before) :].tolist()
    other = [*after[:4], (after[4] + 1) % 256]
    assert [s.greedy for s in score(model, [(before, after), (before, other)], 99, 2)] == [True, False]


def test_a_task_by_hand(folder: Path):
    model, words = tiny(vocab_size=256), BytesTokenizer()
    result = evaluate_task(model, words, folder / "choices.jsonl.gz", window=99)
    right = per_character = 0
    for one in CHOICES:
        sums = [log_probability(model, *encode_pair(words, one["context"], c)) for c in one["choices"]]
        right += sums.index(max(sums)) == one["label"]
        sums = [s / len(c) for s, c in zip(sums, one["choices"], strict=True)]
        per_character += sums.index(max(sums)) == one["label"]
    assert (result.task, result.items) == ("choices", 4)
    assert (result.accuracy, result.accuracy_per_character) == (right / 4, per_character / 4)
    assert result.standard_error == pytest.approx(math.sqrt(right / 4 * (1 - right / 4) / 3))
    assert result.perplexity is None
    lone = evaluate_task(model, words, folder / "lone.jsonl", window=99)
    nats = [log_probability(model, *encode_pair(words, one["context"], one["continuation"])) for one in LONE]
    assert lone.perplexity == pytest.approx(math.exp(-sum(nats) / 2), rel=1e-5)
    assert lone.accuracy_per_character is None
    assert evaluate_task(model, words, folder / "choices.jsonl.gz", window=99, limit=2).items == 2


def test_ties_go_to_the_first():
    assert first_largest([-2.0, -1.0, -1.0]) == 1
    assert first_largest([-1.0, -1.0]) == 0


def test_the_border_between_context_and_continuation():
    words = BytesTokenizer()
    assert encode_pair(words, "so  ", "it") == (list(b"so"), list(b"  it"))
    assert encode_pair(words, "", " yes") == ([0], list(b" yes"))
    bpe = train_bpe(["the cat sat on the mat"] * 5, 300)
    before, after = encode_pair(bpe, "the cat", " sat")
    assert bpe.decode(before + after) == "the cat sat"


@pytest.mark.filterwarnings("ignore")  # lm-eval and what it imports
def test_lm_eval_agrees(folder: Path, monkeypatch: pytest.MonkeyPatch):
    lm_eval = pytest.importorskip("lm_eval")
    HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
    TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
    from recurformer import hf

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    with gzip.open(folder / "choices.jsonl.gz", "rb") as packed:
        (folder / "plain.jsonl").write_bytes(packed.read())
    common = {"dataset_path": "json", "test_split": "test", "target_delimiter": "", "num_fewshot": 0}
    configs = [
        {
            "task": "choices", "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_target": "label",
            "doc_to_choice": "choices", "dataset_kwargs": {"data_files": {"test": str(folder / "plain.jsonl")}},
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], **common,
        },
        {
            "task": "lone", "output_type": "loglikelihood", "doc_to_text": "{{context}}",
            "doc_to_target": "{{continuation}}", "dataset_kwargs": {"data_files": {"test": str(folder / "lone.jsonl")}},
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}], **common,
        },
    ]  # fmt: skip
    manager = TaskManager(include_defaults=False)  # else it reads thousands of files first
    for seed in range(3):
        model, words = tiny(vocab_size=256, layers="first:1", seed=seed), BytesTokenizer()
        theirs = HFLM(
            pretrained=hf.RecurformerForCausalLM.from_model(model), tokenizer=hf.load_tokenizer("bytes"),
            batch_size=3, max_length=24, device="cpu",
        )  # fmt: skip
        out = lm_eval.simple_evaluate(theirs, tasks=configs, task_manager=manager, bootstrap_iters=0)["results"]
        ours = evaluate_task(model, words, folder / "plain.jsonl", window=24)
        assert out["choices"]["acc,none"] == ours.accuracy
        assert out["choices"]["acc_norm,none"] == ours.accuracy_per_character
        ours = evaluate_task(model, words, folder / "lone.jsonl", window=24)
        assert out["lone"]["acc,none"] == ours.accuracy
        assert out["lone"]["perplexity,none"] == pytest.approx(ours.perplexity, rel=1e-5)


# --- files and command line ------------------------------------------------------------------------------------------


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]):
    recurformer.save(tiny(vocab_size=256), folder / "model", BytesTokenizer())
    with pytest.raises(SystemExit, match="0"):
        cli.main(["eval", str(folder / "model"), "--tasks", str(folder), "--json", "--window", "64"])
    values = json.loads(capsys.readouterr().out)
    assert [task["task"] for task in values["tasks"]] == ["choices", "contexts", "lone"]
    expected = evaluate_task(tiny(vocab_size=256, scan="auto"), BytesTokenizer(), folder / "contexts.jsonl", window=64)
    assert values["tasks"][1] == expected.to_dict()
    with pytest.raises(SystemExit, match="0"):
        cli.main(["eval", str(folder / "model"), "--tasks", str(folder / "lone.jsonl"), "--limit", "1"])
    assert "lone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "absent.jsonl"], "absent.jsonl is no task"),
        (["--tasks", "lone.jsonl", "--data", "x"], "run the two apart"),
        (["--limit", "3"], "there are no --tasks"),
        (["--tasks", "lone.jsonl", "--tasks", "."], "both named lone"),
    ],
)
def test_wrong_commands(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder)
    recurformer.save(tiny(vocab_size=256), folder / "model", BytesTokenizer())
    with pytest.raises(SystemExit, match="2"):
        cli.main(["eval", "model", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1, is not valid JSON"),
        ('{"context": "a"}', "continuation"),
        ('{"context": "a", "choices": [" b"], "label": 1}', "label is 1; it must be a whole number from 0 to 0"),
        ('{"context": "a", "choices": [" b", ""], "label": 1}', "is empty"),
        ('{"context": 3, "choices": [" b"], "label": 0}', "context is 3; it must be text"),
        (
            '{"context": "a", "choices": "[\' b\', \' c\']", "label": 0}',
            "choices is .* it must be a list of one or more texts",
        ),
        ('{"contexts": "ab", "continuation": " c", "label": 0}', "contexts is 'ab'; it must be a list"),
        ('{"context": "a", "choices": {"x": 1}, "label": 0}', "choices is {.*}; it must be a list"),
        ('{"context": "a", "choices": [" b", 3], "label": 0}', "choices is .*; it must be a list"),
        ('{"context": "a", "choices": [], "label": 0}', "choices is .*; it must be a list of one or more"),
        ('{"context": "a", "choices": [" b", " c"], "label": true}', "label is True; it must be a whole number"),
        ('{"context": "a", "choices": [" b", " c"]}', "label is None"),
        ('["a", "b"]', "is no JSON object"),
        ("[" * 100_000, "deep"),
        ("", "holds no items"),
    ],
)
def test_lines_that_are_no_items(line: str, message: str, tmp_path: Path):
    (tmp_path / "task.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_items(tmp_path / "task.jsonl")


def test_damaged_and_mixed_files(folder: Path):
    path = folder / "choices.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        read_items(path)
    write(folder / "mixed.jsonl", [CHOICES[0], LONE[0]])
    with pytest.raises(ValueError, match="mixes items"):
        read_items(folder / "mixed.jsonl")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="is no task"):
        find_tasks([folder / "empty"])
    with pytest.raises(ValueError, match="the tokenizer has 256 ids, the model 97"):
        evaluate_task(tiny(), BytesTokenizer(), folder / "lone.jsonl", window=9)


def test_files_as_people_have_them(tmp_path: Path):
    """A byte order mark, blank lines, other line ends, several gz members."""
    line = json.dumps({"context": "a", "choices": [" b", " c"], "label": 0}).encode() + b"\n"
    plain, packed = tmp_path / "t.jsonl", tmp_path / "t.jsonl.gz"
    for data in (
        line * 2, b"\xef\xbb\xbf" + line * 2, line * 2 + b"\n", line + b" \n\n" + line,
        line.replace(b"\n", b"\r\n") * 2, (line * 2).rstrip(b"\n"),
    ):  # fmt: skip
        plain.write_bytes(data)
        assert len(read_items(plain)) == 2
    packed.write_bytes(gzip.compress(line) * 2)
    assert len(read_items(packed)) == 2
    assert len(read_items(packed, limit=1)) == 1


def test_a_flipped_byte_in_a_packed_file(tmp_path: Path):
    line = json.dumps({"context": "a", "choices": [" b", " c"], "label": 0}).encode() + b"\n"
    packed = bytearray(gzip.compress(os.urandom(3000).hex().encode() + line * 50))
    packed[len(packed) // 2] ^= 0xFF
    (path := tmp_path / "t.jsonl.gz").write_bytes(bytes(packed))
    with pytest.raises(ValueError, match=r"t\.jsonl\.gz"):
        read_items(path)


def test_a_pipe_is_no_task(tmp_path: Path):
    os.mkfifo(tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match="is no"):
        read_items(tmp_path / "t.jsonl")


def test_one_item_gives_strict_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    recurformer.save(tiny(vocab_size=256), folder / "model", BytesTokenizer())
    for name, item in (("one", CHOICES[0]), ("lone", LONE[0])):
        write(folder / f"{name}.jsonl", [item])
        with pytest.raises(SystemExit, match="0"):
            cli.main(["eval", str(folder / "model"), "--tasks", str(folder / f"{name}.jsonl"), "--json"])
        text = capsys.readouterr().out
        (result,) = json.loads(text, parse_constant=lambda word: pytest.fail(word))["tasks"]
        assert result["standard_error"] is None
        assert result["items"] == 1


def test_names_of_tasks_are_no_markup(capsys: pytest.CaptureFixture[str]):
    result = TaskResult("[red]cats[/red]", 1, 0.5, 0.1, None, None)
    show([result])
    assert "[red]cats[/red]" in capsys.readouterr().out


def test_a_model_of_nan_scores_nothing(folder: Path):
    model = tiny(vocab_size=256)
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not numbers"):
        evaluate_task(model, BytesTokenizer(), folder / "choices.jsonl.gz", window=9)
