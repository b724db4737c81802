"""The command: every verb's help, what the verbs print, and bad input in one line."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import click
import pytest
import torch
from helpers import FIXTURES, commands_of, tiny
from rich.console import Console

import recurformer
from recurformer import LanguageModel, ModelConfig, cli
from recurformer.cli import common
from recurformer.cli.options import SettingsCommand, chosen
from recurformer.data import load_tokenizer, prepare
from recurformer.scan.algorithms import SCANS
from recurformer.settings import Count, Counts, Settings, choices_of, field_types, setting
from recurformer.training import read_train_config, train

TEXT = "The quick brown fox jumps over the lazy dog, naïve as it is. " * 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, its tokens in data/ and two runs on them, R and S."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    prepare([folder / "text.txt"], folder / "data", progress=False)
    for name, layers in (("R", "first:1"), ("S", "standard")):
        settings = {
            "data.train": folder / "data", "data.validation": folder / "data", "data.window": 16, "batch_size": 2,
            "model.d_model": 32, "model.n_layers": 2, "model.layers": layers, "schedule.steps": 2,
            "evaluation.every": 2, "log.every": 1, "sample.tokens": 0,
        }  # fmt: skip
        train(read_train_config(None, [f"{key}={value}" for key, value in settings.items()]), folder / name, quiet=True)
    return folder


class Outcome:
    """Exit code and output of one call of the command."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        self.code = stop.value.code
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> dict:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    """Run the command in this process."""
    return lambda *arguments: Outcome(capsys, *arguments)


# --- help ------------------------------------------------------------------------------------------------------------

COMMANDS = commands_of(cli.cli)
VERBS = [words[0] for words in COMMANDS if len(words) == 1]


def test_the_verbs_are_there() -> None:
    assert {"prepare", "train", "eval", "generate", "compare", "info"} <= set(VERBS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_documents_every_option(call, words: tuple[str, ...]) -> None:
    outcome = call(*words, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"Usage: recurformer {' '.join(words)}")
    command = COMMANDS[words]
    assert command.help
    for parameter in command.get_params(click.Context(command)):
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{words} {parameter.opts} has no help"
            assert parameter.opts[0] in outcome.out
            if isinstance(parameter.default, str | int | float) and not parameter.is_flag:
                assert f"default: {parameter.default}" in " ".join(outcome.out.split())


def test_version_and_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recurformer", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"recurformer, version {recurformer.__version__}\n"


LIGHT = {
    "import recurformer": "import recurformer",
    "import recurformer.cli": "import recurformer.cli",
    "--help": ("--help",),
    "--version": ("--version",),
    "bench --help": ("bench", "--help"),
    "compare": ("compare", "{run}", "--out", "{out}"),
    "info": ("info",),
    "info PRESET": ("info", "300m-6", "--layers", "first:1"),
}


@pytest.mark.parametrize("name", LIGHT)
def test_torch_is_not_imported(place: Path, tmp_path: Path, name: str) -> None:
    """In a process of its own: another test has imported torch in this one."""
    asked = LIGHT[name]
    if isinstance(asked, tuple):
        words = [word.format(run=place / "R", out=tmp_path) for word in asked]
        asked = (
            f"from recurformer.cli import main\ntry: main({words!r})\nexcept SystemExit as stop: assert stop.code == 0"
        )
    if name.startswith("info"):  # whatever this machine has
        asked = f"from recurformer import info\ninfo.GPU_FILES = ()\n{asked}"
    script = f"{asked}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def surface() -> str:
    """Every argument and option of every verb with its default, a line each."""
    lines: list[str] = []
    for words, command in sorted(COMMANDS.items(), key=lambda item: " ".join(item[0])):
        if isinstance(command, click.Group):
            continue
        rows: list[str] = []
        for parameter in command.get_params(click.Context(command)):
            if isinstance(parameter, click.Option) and "--help" not in parameter.opts:
                absent = parameter.default is None or "UNSET" in repr(parameter.default)
                default = "" if absent else f" = {parameter.default!r}"
                names = " ".join([*parameter.opts, *parameter.secondary_opts])
                rows.append(names + default + (" repeated" if parameter.multiple else ""))
            elif isinstance(parameter, click.Argument):
                rows.append(f"{parameter.human_readable_name} nargs {parameter.nargs} required {parameter.required}")
        lines += [f"[{' '.join(words)}]", *sorted(rows), ""]
    return "\n".join(lines)


def test_options_and_their_defaults_are_those_that_people_use() -> None:
    """Scripts rely on these names and defaults. A new option adds its line to the file; no line goes away."""
    assert surface() == (FIXTURES / "options.txt").read_text(encoding="utf-8")


# --- options from settings -------------------------------------------------------------------------------------------

MADE = [(words, place) for words, one in COMMANDS.items() if isinstance(one, SettingsCommand) for place in one.settings]


def settings_class(place: str) -> type[Settings]:
    module, name = place.split(":")
    return getattr(import_module(module), name)


@pytest.mark.parametrize(("words", "place"), MADE, ids=str)
def test_options_that_are_left_out_give_the_defaults_of_the_settings(words: tuple[str, ...], place: str) -> None:
    section, command = settings_class(place), COMMANDS[words]
    arguments = ["parity"] if words == ("tasks", "run") else []
    needed: dict[str, Any] = {"tasks": ("parity",)} if arguments else {}
    with command.make_context(words[-1], arguments) as context:
        options = {
            name: value for name, value in context.params.items() if name not in ("device", "recompute", *needed)
        }
        assert chosen(section, options, **needed) == section(**needed)


@dataclass(frozen=True, kw_only=True)
class Example(Settings):
    """Settings of every type that an option is made of."""

    lengths: Counts = setting((1, 2), "Lengths.", option="--length", metavar="N", repeated=True)
    sizes: tuple[int, ...] = setting((3, 4), "Sizes.")
    rates: tuple[float, ...] = setting((), "Rates.", unset="the usual")
    order: Literal["random", "fixed"] = setting("random", "Order of the windows.")
    shared: bool = setting(False, "One copy.")
    ahead: bool = setting(True, "Direction.", option="--ahead/--back")
    limit: Count | None = setting(None, "Limit.", unset="none")
    inner: int = setting(7, "Not on the command line.", option=None)


@click.command(
    "example", cls=SettingsCommand, context_settings={"show_default": True}, settings=[f"{__name__}:Example"]
)
def example(**options: Any) -> None:
    """Print the settings."""
    print(chosen(Example, options, inner=8))


def test_options_set_their_fields(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Example.__module__])

    def run(*arguments: str) -> str:
        example.main(list(arguments), standalone_mode=False)
        return capsys.readouterr().out.strip()

    assert run() == repr(Example(inner=8))
    given = ("--length", "5", "--length", "6", "--sizes", "7, 8,", "--rates", "0.5", "--order", "fixed", "--shared")
    assert run(*given, "--back", "--limit", "9") == repr(
        Example(lengths=(5, 6), sizes=(7, 8), rates=(0.5,), order="fixed", shared=True, ahead=False, limit=9, inner=8)
    )
    assert run("--sizes", "") == repr(Example(sizes=(), inner=8))  # an empty list is a list
    for arguments, message in (
        (("--sizes", "7,x"), "'7,x' is no list of whole numbers; write them as 64,128"),
        (("--rates", "x"), "'x' is no list of numbers"),
        (("--length", "x"), "'x' is not a valid integer"),
    ):
        with pytest.raises(click.BadParameter, match=message):
            run(*arguments)
    for arguments, message in (
        (("--length", "0"), "lengths holds 0; each must be a whole number of at least 1"),
        (("--order", "fix"), "order is 'fix'; choose one of 'random', 'fixed'; did you mean 'fixed'"),
        (("--limit", "0"), "limit is 0; it must be a whole number of at least 1 or none"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            run(*arguments)
    text = run("--help")
    for part in ("--length N", "Lengths; may be repeated.  [default: 1, 2]", "--sizes N,...", "[default: the usual]",
                 "--order random|fixed", "--shared / --no-shared", "--ahead / --back"):  # fmt: skip
        assert part in " ".join(text.split()).replace("repeated. [", "repeated.  ["), part
    assert "inner" not in text


def test_names_of_choices_are_those_of_the_package() -> None:
    from recurformer.choose import SCAN_CHOICES, STEP_CHOICES
    from recurformer.experiments.bench import common, decode, prefill, scan, traffic

    assert get_args(common.ScanName) == SCAN_CHOICES
    assert get_args(prefill.PromptScan) == (*SCAN_CHOICES, "engine")
    assert get_args(decode.StepName) == STEP_CHOICES
    assert (*SCANS, "standard", "peer") == scan.PATHS
    assert choices_of(field_types(traffic.MeasureSettings)["scan"]) == tuple(SCANS)


# --- eval ------------------------------------------------------------------------------------------------------------


def test_eval_of_a_run_and_of_a_text_agree(call, place: Path) -> None:
    of_run = call("eval", place / "R", "--json").json
    assert of_run["window"] == 16
    assert of_run["tokens"] == of_run["bytes"] == len(TEXT.encode())
    assert of_run["bits_per_byte"] == pytest.approx(of_run["loss"] / math.log(2))
    of_text = call("eval", place / "R", "--data", place / "text.txt", "--batch-size", 3, "--json").json
    assert of_text["loss"] == pytest.approx(of_run["loss"], abs=1e-5)
    recorded = json.loads((place / "R" / "metrics.jsonl").read_text().splitlines()[-1])
    assert recorded["validation_loss"] == pytest.approx(of_run["loss"], abs=1e-5)
    wider = call("eval", place / "R", "--window", 64, "--max-batches", 1, "--batch-size", 2, "--json").json
    assert (wider["tokens"], wider["window"]) == (128, 64)


def test_eval_prints_lines_for_people(call, place: Path) -> None:
    outcome = call("eval", place / "S" / "checkpoints" / "step-00000002", "--data", place / "data")
    assert outcome.code == 0
    names = [line.split("  ")[0] for line in outcome.out.splitlines()]
    assert names == ["model", "data", "loss", "perplexity", "bits per byte", "speed"]


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_streams_one_continuation(call, place: Path) -> None:
    arguments = ("generate", place / "R", "--prompt", "The naïve ", "--max-new-tokens", 12, "--seed", 3)
    outcome = call(*arguments)
    assert outcome.code == 0
    assert outcome.out.startswith("The naïve ")
    assert outcome.out.endswith("\n")
    assert outcome.out == call(*arguments).out
    assert outcome.out.rstrip("\n") == "".join(call(*arguments, "--json").json[part] for part in ("prompt", "text"))
    assert outcome.out != call(*arguments[:-1], 4).out


def test_generate_takes_prompts_of_different_lengths(call, place: Path) -> None:
    greedy = ("--max-new-tokens", 8, "--temperature", 0)
    prompts = ("T", "The quick brown", "")
    together = call("generate", place / "R", *greedy, "--json", *[a for p in prompts for a in ("--prompt", p)])
    rows = [json.loads(line) for line in together.out.splitlines()]
    assert [row["prompt"] for row in rows] == list(prompts)
    for row in rows:
        alone = call("generate", place / "R", *greedy, "--json", "--prompt", row["prompt"]).json
        assert alone == row
    text = call("generate", place / "R", *greedy, "--prompt", "T", "--samples", 2).out
    assert text.startswith("--- 1 ---\nT")
    assert "--- 2 ---\nT" in text


def always(text: str) -> LanguageModel:
    """A byte-level model that says these bytes after a newline, over and over."""
    model = LanguageModel(ModelConfig(d_model=256, n_layers=1, n_heads=1, layers="standard"))
    ring = b"\n" + text.encode()
    assert len(set(ring)) == len(ring)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.embedding.weight.copy_(torch.eye(256))
        for n, byte in enumerate(ring):
            model.head.weight[ring[(n + 1) % len(ring)], byte] = 1.0
    return model


def test_generate_shows_whole_characters_and_stops(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recurformer.save(always("a€b"), tmp_path / "model", load_tokenizer("bytes"))
    shown: list[str] = []
    real = print
    monkeypatch.setattr("builtins.print", lambda *a, **k: (shown.append("".join(a)), real(*a, **k)))
    run = ("generate", tmp_path / "model", "--prompt", "\n", "--temperature", 0, "--max-new-tokens")
    assert call(*run, 5).out == "\na€b\n"
    assert shown == ["\na", "€", "b", ""]
    assert call(*run, 3).out == "\na\ufffd\n"  # the limit cuts the character, and that is shown
    assert call(*run, 20, "--stop", "\\n").out == "\na€b\n"
    assert call(*run, 20, "--stop", "b").out == "\na€\n"
    assert call(*run, 20, "--stop", "€b").out == "\na\n"  # four bytes, each a token
    assert call(*run, 20, "--stop", "b\\na", "--stop", "nowhere").out == "\na€\n"
    assert call(*run, 5, "--stop", "b\\na").out == "\na€b\n"  # its beginning alone is text like any other
    assert call(*run, 0).out == "\n\n"
    ended = call(*run, 20, "--stop", "\\n", "--json").json
    assert ended == {"prompt": "\n", "text": "a€b", "tokens": 6, "ended": True}


# --- compare and info ------------------------------------------------------------------------------------------------


def test_compare_prints_and_writes(call, place: Path, tmp_path: Path) -> None:
    outcome = call("compare", place / "R", place / "S", "--out", tmp_path / "report")
    assert outcome.code == 0
    assert {"curves.png", "report.html"} == {path.name for path in (tmp_path / "report").iterdir()}
    assert str(tmp_path / "report" / "curves.png") in outcome.out
    assert "first:1" in outcome.out
    assert max(map(len, outcome.out.splitlines()[:6])) <= 80


def test_compare_by_columns(call, place: Path, tmp_path: Path) -> None:
    outcome = call("compare", place / "R", place / "S", "--by", "layers,kind", "--out", tmp_path / "report")
    assert outcome.code == 0
    assert outcome.out.split()[:4] == ["layers", "kind", "width", "params"]
    assert {"curves.png", "report.html"} == {path.name for path in (tmp_path / "report").iterdir()}
    assert max(map(len, outcome.out.splitlines()[:6])) <= 80


def test_info_of_presets_folders_and_here(call, place: Path) -> None:
    of_preset = call("info", "nano", "--layers", "first:1", "--json").json
    assert (of_preset["parameters"], of_preset["parameters_with_embeddings"]) == (787_840, 853_376)
    assert (of_preset["kv_bytes_per_token_16_bit"], of_preset["kind"]) == (2048, "first:1")
    assert of_preset["scan"]["cpu"]["name"] in SCANS
    assert of_preset["scan"]["cpu"]["why"]
    assert call("info", "nano", "--layers", "standard", "--json").json["scan"]["cpu"]["name"] == "none"
    assert (of_preset["attention"]["cpu"]["name"], of_preset["loss"]["cpu"]["name"]) == ("sdpa", "chunked")
    assert call("info", "nano", "--json").json["attention"]["cpu"]["name"] == "none"
    step = of_preset["decoding"]["cpu"]
    assert (step["name"], "not fused" in step["why"]) == ("plain", True)
    of_run = call("info", place / "R", "--json").json
    assert (of_run["width"], of_run["layers"]) == (32, 2)
    assert of_run["folder"].endswith("step-00000002/model")
    text = call("info", "300m-6").out
    assert "loss           chunked on cpu: " in text
    assert "decoding       plain on cpu: PyTorch operations; not fused: " in text
    assert "302,041,088 without embedding and output layer, 433,637,376 with" in text
    everything = call("info").out
    for part in ("nano", "300m-24", f"recurformer {recurformer.__version__}", f"torch {torch.__version__}", "[hf]"):
        assert part in everything
    assert max(map(len, everything.splitlines()[:12])) <= 80


# --- prompts from files, fields of text ------------------------------------------------------------------------------


def test_prompts_come_from_files_too(call, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"a": "The naïve ", "b": "The quick\nbrown\n\n", "c": "The quick\r\n", "d": ""}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    greedy = ("generate", place / "R", "--max-new-tokens", 4, "--temperature", 0, "--json")
    files = [word for name in texts for word in ("--prompt-file", tmp_path / name)]
    rows = [json.loads(line) for line in call(*greedy, "--prompt", "first", *files).out.splitlines()]
    assert [row["prompt"] for row in rows] == ["first", "The naïve ", "The quick\nbrown\n", "The quick", ""]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("über\n".encode())))
    assert call(*greedy, "--prompt-file", "-").json["prompt"] == "über"
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    refused = {"latin": "no UTF-8 text (byte 3)", "none": "can't be read: No such file", ".": "read: Is a directory"}
    for file, part in refused.items():
        outcome = call(*greedy, "--prompt-file", tmp_path / file)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert part in outcome.err


def test_eval_reads_the_field_that_holds_the_text(call, place: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": TEXT, "text": "x"}) + "\n", encoding="utf-8")
    (tmp_path / "text.csv").write_text(f'body,text\n"{TEXT}",x\n', encoding="utf-8")
    whole = call("eval", place / "R", "--data", place / "text.txt", "--json").json
    for name in ("text.jsonl", "text.csv"):
        found = call("eval", place / "R", "--data", tmp_path / name, "--text-field", "body", "--json").json
        assert (found["tokens"], found["loss"]) == (whole["tokens"], pytest.approx(whole["loss"]))
        assert call("eval", place / "R", "--data", tmp_path / name, "--json").json["tokens"] == 1
        outcome = call("eval", place / "R", "--data", tmp_path / name, "--text-field", "boddy")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert "boddy" in outcome.err


# --- progress --------------------------------------------------------------------------------------------------------


def test_a_log_gets_lines_of_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "QUIET_SECONDS", 0.05)

    def work(progress: Callable[[str, int, int], None]) -> str:
        for n in range(2):
            progress(f"task [{n}]", n, 2)
            time.sleep(0.3)
        return "done"

    assert common.with_progress(work) == "done"
    assert capsys.readouterr().err.splitlines() == ["task [0] (0 of 2 done)", "task [1] (1 of 2 done)"]
    monkeypatch.setattr(common, "QUIET_SECONDS", 60.0)
    assert common.with_progress(lambda progress: progress("quick", 0, 1)) is None
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.StringIO()
    monkeypatch.setattr("rich.console.Console", partial(Console, file=buffer, force_terminal=True, width=100))
    common.with_progress(lambda progress: progress("copa[bold] [/]", 3, 7))
    assert "copa[bold] [/]" in buffer.getvalue()
    assert "3/7" in buffer.getvalue()


# --- streams, interrupts, errors of libraries ------------------------------------------------------------------------


def shell(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `recurformer` is this package's command."""
    start = f'recurformer() {{ {shlex.quote(sys.executable)} -m recurformer "$@"; }}\n'
    return subprocess.run(
        ["bash", "-c", start + script], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("verb", ["info", "bench traffic", "--help", "tasks list"])
def test_a_reader_that_leaves_is_no_error(verb: str) -> None:
    """rich exits with 1 where nobody reads on; Python's own print raises."""
    for reader in ("true", "head -c 5"):
        done = shell(f"recurformer {verb} | {reader} >/dev/null; echo ${{PIPESTATUS[0]}}")
        assert (done.stdout, done.stderr) == ("0\n", ""), reader


def test_closed_streams_receive_nothing(place: Path, tmp_path: Path) -> None:
    for closed in ("2>&-", ">&-", "<&-", "<&- >&- 2>&-"):
        done = shell(f"recurformer compare {place / 'R'} --out {tmp_path / 'report'} {closed}")
        assert done.returncode == 0, closed
        assert "Traceback" not in done.stdout + done.stderr
    done = shell("recurformer info nothing 2>&-")
    assert (done.returncode, done.stdout) == (2, "")  # Python prints on stdout where stderr is closed
    script = (
        "import os, sys; from recurformer.cli.streams import prepare_streams; prepare_streams(); "
        f"file = open({str(tmp_path / 'lock')!r}, 'w'); assert file.fileno() > 2, file.fileno()"
    )
    assert subprocess.run(["bash", "-c", f'{sys.executable} -c "{script}" 2>&- >&-'], check=False).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    done = shell("recurformer info nano >/dev/full")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left" in done.stderr


def test_characters_that_a_terminal_lacks_become_escapes(place: Path, tmp_path: Path) -> None:
    recurformer.save(always("a€😀b"), tmp_path / "model", load_tokenizer("bytes"))
    run = f"recurformer generate {tmp_path / 'model'} --prompt $'\\n' --temperature 0 --max-new-tokens 9"
    for encoding in ("ascii", "iso8859-1"):
        done = shell(run, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stdout) == (0, "\na\\u20ac\\U0001f600b\n")
        assert done.stderr == (
            f"stdout has the encoding {encoding}: other characters are written as \\uXXXX; set PYTHONUTF8=1 for UTF-8\n"
        )
        assert json.loads(shell(f"{run} --json", PYTHONIOENCODING=encoding).stdout)["text"] == "a€😀b"
    done = shell(run, PYTHONIOENCODING="utf-8")
    assert (done.stdout, done.stderr) == ("\na€😀b\n", "")


def test_bytes_that_are_no_text_are_one_sentence(place: Path) -> None:
    for option in ("--prompt", "--stop"):
        done = shell(f"recurformer generate {place / 'R'} {option} $'caf\\xe9'")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert "codec" not in done.stderr
    done = shell("recurformer info $'caf\\xe9'")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert r"'caf\udce9' is neither" in done.stderr


@pytest.mark.parametrize("verb", ["eval", "generate", "train", "bench"])
def test_an_interrupt_while_starting_has_no_traceback(verb: str, tmp_path: Path) -> None:
    """The interrupt comes while torch is imported, which may turn it into another error."""
    words = {"bench": ["bench", "scan"], "train": ["train", "--out", "run"]}.get(verb, [verb, "nothing"])
    script = (
        "import os, signal, sys, types\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            try: os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(5)\n"
        "            except KeyboardInterrupt:\n"
        "                if TURNED: raise ImportError('half imported')\n"
        "                raise\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"from recurformer.cli import main\nmain({words!r})\n"
    )
    for turned in ("False", "True"):
        done = subprocess.run(
            [sys.executable, "-c", script.replace("TURNED", turned)], cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (130, "")
        assert done.stderr.strip() == "recurformer: interrupted"


class PanicException(BaseException):
    """The exception of a Rust library that gives up, which is no Exception."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("context"), "unexpected KeyError: 'context'; RECURFORMER_TRACEBACK=1 shows its origin"),
        (RuntimeError("first\nsecond"), "unexpected RuntimeError: first; RECURFORMER"),
        (PanicException("index out of bounds"), "PanicException: index out of bounds; RECURFORMER"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory (CUDA out of memory); lower"),
        (MemoryError(), "out of memory (MemoryError); lower"),
        (UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"), "correct the text"),
        (ValueError(""), "ValueError"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RecursionError("too deep"), "unexpected RecursionError: too deep"),
        (ValueError("x" * 10_000 + " remedy"), "x remedy"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_any_error_is_one_line(call, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("recurformer.info.describe", fails)
    monkeypatch.delenv("RECURFORMER_TRACEBACK")
    outcome = call("info", "nano")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith("recurformer: error: ")
    assert message in outcome.err
    assert len(outcome.err) < 1600
    monkeypatch.setenv("RECURFORMER_TRACEBACK", "1")
    if "unexpected" in message or isinstance(error, PanicException):
        with pytest.raises(type(error)):
            cli.main(["info", "nano"])
    else:
        assert call("info", "nano").code == 2


# --- bad input -------------------------------------------------------------------------------------------------------


def broken(place: Path, tmp_path: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    """Commands that must fail, and a part of what they must say."""
    recurformer.save(tiny(), tmp_path / "other", load_tokenizer("bytes"))  # a vocabulary of 97, a tokenizer of 256
    recurformer.save(tiny(vocab_size=256), tmp_path / "mute")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_bytes((tmp_path / "mute" / "config.json").read_bytes())
    (tmp_path / "cut" / "model.safetensors").write_bytes((tmp_path / "mute" / "model.safetensors").read_bytes()[:-9])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    (tmp_path / "file").write_text("")
    R, data = place / "R", place / "data"
    return {
        "no such run": (("eval", tmp_path / "none", "--data", data), "none is no folder"),
        "a file for a run": (("generate", tmp_path / "file"), "file is no folder"),
        "foreign model": (("eval", tmp_path / "foreign", "--data", data), "'llama'"),
        "truncated weights": (("generate", tmp_path / "cut"), "truncated"),
        "no such data": (("eval", R, "--data", tmp_path / "none"), "do not exist"),
        "foreign data": (("eval", R, "--data", tmp_path / "picture.png"), "picture.png"),
        "other vocabulary": (("eval", tmp_path / "other", "--data", data), "256 ids, the model's 97"),
        "no data named": (("eval", tmp_path / "mute"), "no validation data"),
        "text without tokenizer": (("eval", tmp_path / "mute", "--data", place / "text.txt"), "tokenizer"),
        "window 0": (("eval", R, "--window", 0), "--window"),
        "unknown scan": (("eval", R, "--scan", "magic"), "'magic'"),
        "unknown device": (("eval", R, "--device", "abacus"), "'abacus'"),
        "generate without tokenizer": (("generate", tmp_path / "mute"), "tokenizer"),
        "foreign tokenizer": (("generate", tmp_path / "other"), "256"),
        "temperature": (("generate", R, "--temperature", -1), "temperature is -1"),
        "top-p": (("generate", R, "--top-p", 1.5), "top_p is 1.5"),
        "empty stop": (("generate", R, "--stop", ""), "stop holds ''"),
        "no number": (("generate", R, "--seed", "x"), "--seed"),
        "no run": (("compare", tmp_path / "mute"), "mute is no training run"),
        "twice": (("compare", R, R), "twice"),
        "nothing to compare": (("compare",), "RUN"),
        "unwritable": (("compare", R, "--out", tmp_path / "file"), "file"),
        "unknown preset": (("info", "nanoo"), "did you mean 'nano'?"),
        "layers of a folder": (("info", R, "--layers", "standard"), "--layers"),
        "layers of nothing": (("info", "--layers", "standard"), "--layers"),
        "bad layers": (("info", "nano", "--layers", "first:9"), "first:9"),
        "train without data": (("train", "--out", tmp_path / "run", "--set", "data.train=nowhere"), "nowhere"),
        "unknown setting": (("train", "--out", tmp_path / "run", "--set", "optimizer.rl=1"), "optimizer.lr"),
        "prepare nothing": (("prepare", tmp_path / "none.txt", "--out", tmp_path / "d"), "none.txt"),
        "unknown verb": (("trains",), "trains"),
        "unknown option": (("info", "--what"), "--what"),
    }  # fmt: skip


def test_bad_input_is_one_line_and_code_2(call, place: Path, tmp_path: Path) -> None:
    for name, (arguments, part) in broken(place, tmp_path).items():
        outcome = call(*arguments)
        assert outcome.code == 2, f"{name}: exit code {outcome.code}"
        assert outcome.err.startswith("recurformer: error: "), f"{name}: {outcome.err!r}"
        assert outcome.err.count("\n") == 1, f"{name}: {outcome.err!r}"
        assert part in outcome.err, f"{name}: {part!r} is not in {outcome.err!r}"
        assert outcome.out == "", name
    assert not (tmp_path / "run").exists()


def test_no_traceback_from_the_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recurformer", "eval", "none"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "recurformer: error: none is no folder; give a model's, a checkpoint's or a training run's folder\n"
    )
