"""Runs side by side: what is read, the table, the picture and the page."""

from __future__ import annotations

import html
import io
import json
import math
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from matplotlib.legend import Legend
from rich.console import Console

from recurformer.config import PRESETS, ModelConfig
from recurformer.report import (
    draw,
    group,
    load_runs,
    rows,
    short_names,
    short_tick,
    show,
    show_groups,
    smoothed,
    write_report,
)
from recurformer.units import short_number

NATS_PER_BIT = math.log(2)


def fake_run(
    folder: Path,
    losses: list[float],
    *,
    bytes_per_token: float = 1.0,
    data: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **model: Any,
) -> Path:
    """A run's folder as training writes it: an evaluation each 10 steps of 100 tokens and 2 seconds."""
    folder.mkdir(parents=True)
    config = {"model": ModelConfig(**model).to_dict(), "data": data or {"validation": "v"}, "batch_size": 4}
    config |= {} if optimizer is None else {"optimizer": optimizer}
    (folder / "config.json").write_text(json.dumps(config))
    records: list[dict[str, Any]] = [{"event": "start", "step": 0, "device": "cpu (test)", "versions": {"torch": "0"}}]
    for n, loss in enumerate(losses):
        clock = {"step": 10 * n, "tokens": 1000 * n, "seconds": 20.0 * n}
        if n:
            records.append({"event": "train", "loss": loss + 0.1, "tokens_per_second": 50.0, **clock})
        bits = loss / NATS_PER_BIT / bytes_per_token
        records.append({"event": "evaluation", "validation_loss": loss, "bits_per_byte": bits, **clock})
    records.append({"event": "sample", "step": 10, "prompt": "<b>", "text": " & so on"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def printed(folders: list[Path], width: int = 80) -> str:
    buffer = io.StringIO()
    show(load_runs(folders), Console(file=buffer, width=width))
    return buffer.getvalue()


def test_the_row_of_a_run(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "one", [5.5, 2.25, 2.5], layers="first:1")
    (run,) = load_runs([folder])
    headings, ((name, kind, layers, width, count, tokens, loss, speed, kv),) = rows([run])
    assert headings[6] == "val loss"
    assert (name, kind, layers, width) == ("one", "first:1", "4", "128")
    assert count == "787,840"  # 12 * 4 * 128^2 in matrices, 4 * (2 * 128 + 2 * 32) + 128 in norms
    assert (tokens, loss, speed, kv) == ("2,000", "2.2500", "50", "2,048")
    assert run.validation.loss == [5.5, 2.25, 2.5]
    assert run.validation.tokens == [0, 1000, 2000]
    assert run.training.seconds == [20.0, 40.0]


def test_the_table_fits_80_columns(tmp_path: Path) -> None:
    long = "a-run-with-a-name-that-is-longer-than-the-table-would-like"
    folders = [
        fake_run(tmp_path / long, [5.0, 2.0]),
        fake_run(tmp_path / "b", [5.0, 2.5], layers=("recurrent", "standard", "recurrent", "standard")),
        fake_run(tmp_path / "c", [5.0, 2.5], d_model=2048, n_heads=32, n_layers=12),
    ]
    text = printed(folders)
    assert max(map(len, text.splitlines())) <= 80
    assert "RSRS" in text
    assert "2.0000" in text
    assert "604M" in text
    for part in ("787,840", "98,304", "nats a token"):
        assert part in text


def test_what_a_reader_has_to_know_is_said(tmp_path: Path) -> None:
    text = printed([
        fake_run(tmp_path / "a", [5.0, 2.0, 2.2], data={"validation": "here"}),
        fake_run(tmp_path / "b", [5.0, 2.5], data={"validation": "there"}),
    ])  # fmt: skip
    joined = " ".join(text.split())
    assert "a: lowest at step 10; at step 20 it was 2.2000 nats a token." in joined
    assert "different validation data" in joined
    assert "different numbers of tokens" in joined
    assert "lowest at step" not in printed([tmp_path / "b"])


def test_other_tokenizers_are_compared_by_the_byte(tmp_path: Path) -> None:
    byte_level = fake_run(tmp_path / "bytes", [5.0, 1.5])
    words = fake_run(tmp_path / "words", [9.0, 4.0], bytes_per_token=4.0)
    headings, cells = rows(load_runs([byte_level, words]))
    assert headings[6] == "bits/byte"
    assert [row[6] for row in cells] == [f"{1.5 / NATS_PER_BIT:.4f}", f"{1.0 / NATS_PER_BIT:.4f}"]
    assert draw(load_runs([byte_level, words])).startswith(b"\x89PNG")


def test_a_run_without_results_yet(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "new", [])
    (cells,) = rows(load_runs([folder]))[1]
    assert cells[5:8] == ["-", "-", "-"]
    assert draw(load_runs([folder])).startswith(b"\x89PNG")
    assert "new" in printed([folder])


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", [5.0, 3.0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "evaluation", "step": 30, "tokens": 3000, "seconds": 60, "validation_loss": NaN}\n')
        file.write('{"event": "train", "step": 31, "tok')  # a kill in the middle of a line
    (run,) = load_runs([folder])
    assert run.validation.loss == [5.0, 3.0]
    assert rows([run])[1][0][6] == "3.0000"


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    folders = [fake_run(tmp_path / "a&b", [5.0, 2.0]), fake_run(tmp_path / "c", [5.0, 2.5], layers="standard")]
    curves, page = write_report(load_runs(folders), tmp_path / "out" / "deep")
    assert sorted(path.name for path in curves.parent.iterdir()) == ["curves.png", "report.html"]
    assert curves.read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="([^"]{30})', text) == ["data:image/png;base64,iVBORw0K"]
    assert not re.search(r"https?://", text)
    for part in ("a&amp;b", "<td>model.layers</td><td>recurrent</td><td>standard</td>", "2.0000",
                 '<span class="prompt">&lt;b&gt;</span> &amp; so on', "prefers-color-scheme: dark"):  # fmt: skip
        assert part in text
    assert "<td>batch_size</td>" not in text  # the same in both
    assert "[]" not in text
    assert "<td>cpu (test)</td>" in text  # the machine, as a table
    write_report(load_runs(folders), curves.parent, command=["recurformer", "compare", "a & b"])
    text = page.read_text(encoding="utf-8")
    assert "<code>recurformer compare &#x27;a &amp; b&#x27;</code>" in text
    assert datetime.now().astimezone().strftime("Made on %d %B %Y") in text
    write_report(load_runs(folders), curves.parent, samples={"c": [("Once", "own text")]})
    assert "own text" in page.read_text(encoding="utf-8")
    assert "so on" not in page.read_text(encoding="utf-8")


def test_names_are_short_and_unique(tmp_path: Path) -> None:
    assert short_names([("x", "a"), ("x", "b")]) == ["a", "b"]
    assert short_names([("x", "run"), ("y", "run")]) == ["x/run", "y/run"]
    folders = [fake_run(tmp_path / side / "run", [5.0, 2.0]) for side in ("left", "right")]
    assert [run.name for run in load_runs(folders)] == ["left/run", "right/run"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    good = fake_run(tmp_path / "good", [5.0, 2.0])
    (tmp_path / "empty").mkdir()
    for name, config, metrics in (
        ("foreign", "{}", "{}\n"),
        ("list", "[]", "{}\n"),
        ("damaged", "{", "{}\n"),
        ("records", (good / "config.json").read_text(), '{"event": "train", "step": 1}\n'),
        ("text", (good / "config.json").read_text(), "step loss\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "metrics.jsonl").write_text(metrics)
    for name in ("none", "empty", "foreign", "list", "damaged", "records", "text"):
        with pytest.raises(ValueError, match=name):
            load_runs([good, tmp_path / name])
    with pytest.raises(ValueError, match="given twice"):
        load_runs([good, good])
    with pytest.raises(ValueError, match="no run"):
        load_runs([])


def test_kinds_in_a_few_letters() -> None:
    kinds = {
        "recurrent": "recurrent", "standard": "standard", "first:0": "standard", "first:2": "first:2",
        "first:4": "recurrent", ("standard", "recurrent", "standard", "standard"): "SRSS",
    }  # fmt: skip
    assert {layers: ModelConfig(layers=layers).kind for layers in kinds} == kinds
    many = ("standard", "recurrent") * 6
    assert ModelConfig(n_layers=12, layers=many).kind == "6 of 12 R"


def test_parameters_are_counted_without_making_the_model() -> None:
    assert ModelConfig.preset("300m-6").num_parameters() == 12 * 6 * 2048**2 + 6 * 4 * 2048 + 2048
    for preset in PRESETS:
        config = ModelConfig.preset(preset)
        outside = 2 * config.padded_vocab_size * config.d_model
        assert config.num_parameters(embedding=True) == config.num_parameters() + outside


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12.4, "12"), (99_999, "99,999"), (123_456, "123k"), (1_234_567, "1.23M"), (302_041_088, "302M"),
     (6.5e9, "6.50B")],
)  # fmt: skip
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


def test_smoothing_has_no_pull_towards_zero() -> None:
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smoothed([]) == []
    assert smoothed([4.0, 2.0], weight=0.5) == pytest.approx([4.0, (0.5 * 0.5 * 4 + 0.5 * 2) / 0.75])


# --- compare --by ----------------------------------------------------------------------------------------------------


def grouped(folders: list[Path], *keys: str) -> str:
    out = io.StringIO()
    show_groups(load_runs(folders), keys, Console(file=out, width=80))
    return out.getvalue()


def test_a_row_for_each_group_is_its_best_run(tmp_path: Path) -> None:
    def optimizer(lr: float) -> dict[str, Any]:
        return {"lr": lr, "beta2": 0.95}

    folders = [
        fake_run(tmp_path / "r2", [5.0, 3.0], layers="recurrent", n_layers=2, optimizer=optimizer(1e-3)),
        fake_run(tmp_path / "r2b", [5.0, 2.5], layers="recurrent", n_layers=2, optimizer=optimizer(3.16e-3)),
        fake_run(tmp_path / "r10", [5.0, 2.0], layers="recurrent", n_layers=10, optimizer=optimizer(1e-3)),
        fake_run(tmp_path / "s10", [5.0, 2.25], layers="standard", n_layers=10, optimizer=optimizer(1e-3)),
        fake_run(tmp_path / "new", [], layers="standard", n_layers=10, optimizer=optimizer(1e-2)),
    ]
    groups = group(load_runs(folders), ["layers", "kind"])
    assert [(key, [run.name for run in runs]) for key, runs in groups.items()] == [
        ((2, "recurrent"), ["r2b", "r2"]), ((10, "recurrent"), ["r10"]), ((10, "standard"), ["s10", "new"]),
    ]  # fmt: skip
    text = grouped(folders, "layers", "kind")
    assert max(map(len, text.splitlines())) <= 80
    rows_ = [line.split() for line in text.splitlines()[2:5]]
    assert [row[:2] + row[5:] for row in rows_] == [
        ["2", "recurrent", "2.5000", "2", "r2b"], ["10", "recurrent", "2.0000", "1", "r10"],
        ["10", "standard", "2.2500", "2", "s10"],
    ]  # fmt: skip
    assert len(group(load_runs(folders), ["kind", "optimizer.lr"])) == 5 - 1  # r2 and r10 share both
    assert "0.00316" in grouped(folders, "lr")
    assert "-" in grouped(folders, "lr").splitlines()[4].split()  # 1e-2 has no loss yet


def test_what_cannot_be_grouped_is_refused(tmp_path: Path) -> None:
    folders = [fake_run(tmp_path / "a", [5.0, 2.0]), fake_run(tmp_path / "b", [9.0, 4.0], bytes_per_token=4.0)]
    with pytest.raises(ValueError, match=r"'layer' is no column and no setting.*did you mean 'layers'"):
        group(load_runs(folders), ["layer"])
    with pytest.raises(ValueError, match="different tokens"):
        grouped(folders, "kind")


# --- names are data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["$MODEL_$SEED", "$x", "_base", "[bold]b", "x[/b]", "[/]", "a\nb", "\x1b[31m", "caf\udce9", "名前", "\\$a$"]
)
def test_any_name_of_a_run_is_shown_as_it_is(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [fake_run(tmp_path / "plain", [5.0, 2.0]), fake_run(tmp_path / name, [5.0, 2.5])]
    runs = load_runs(folders)
    shown = "".join(c if c.isprintable() else "\ufffd" for c in name.split("/")[-1])
    assert runs[1].name == shown
    assert shown in printed(folders)
    assert shown in grouped(folders, "layers", "kind").replace("plain", shown)  # the better run of the group
    assert shown in grouped(folders[1:], "layers")
    seen: list[str] = []
    real = Legend.__init__

    def legend(self: Legend, parent: Any, handles: Any, labels: list[str], **options: Any) -> None:
        seen.extend(labels)
        real(self, parent, handles, labels, **options)
        drawn = [text.get_text() for text in self.get_texts()]
        assert not any(text._preprocess_math(text.get_text())[1] for text in self.get_texts())  # pyright: ignore
        assert len(drawn) == 2

    monkeypatch.setattr(Legend, "__init__", legend)
    _, page = write_report(runs, tmp_path / "out", title=f"Training run {name}", command=["recurformer", name])
    assert [text.replace("\u200b", "").replace("\\$", "$") for text in seen] == [
        "plain  2.000", f"{shown}  2.500",
    ]  # fmt: skip
    assert html.escape(shown) in page.read_text(encoding="utf-8")


def test_names_that_differ_only_in_what_cannot_be_printed_stay_apart() -> None:
    names = short_names([("runs", "a\x01"), ("runs", "a\x02")])
    assert len(set(names)) == 2


def test_ticks_in_short() -> None:
    assert [short_tick(x) for x in (0, 0.02, 250, 1500, 2e7, 3e9)] == ["0", "0.02", "250", "1.5k", "20M", "3B"]
