"""`recurformer demo`: train three small models of one size and compare them.

The first is a Recurrent Transformer, and the second has only its first layer recurrent. The third is a Transformer of
the same number of matrix parameters and twice the layers. All see the same tokens in the same order under the same
schedule, and their results are printed unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from recurformer.data import TokenDataset, prepare
from recurformer.report import load_runs, show, write_report
from recurformer.text import complete, open_model
from recurformer.training import train
from recurformer.training.config import TrainConfig
from recurformer.training.config_file import read_train_config

STEPS = 240  # decides the duration of the demo
WINDOW, BATCH_SIZE = 64, 32  # many small steps: at this length they teach more than fewer of long windows
EVALUATIONS = 8  # in addition to the one before the first step, each over the whole validation text

# The nano preset, all of it or only the first layer recurrent; and its twin: 12 * 4 * 128^2 = 8 * (4 * 96^2 + 2 * 96 *
# 320) matrix parameters.
MODELS: dict[str, dict[str, Any]] = {
    "recurrent": {"preset": "nano", "layers": "recurrent"},
    "first-1": {"preset": "nano", "layers": "first:1"},
    "transformer": {"d_model": 96, "n_heads": 4, "n_layers": 8, "d_mlp": 320, "layers": "standard"},
}
PROMPTS = ("The colour of the light ", "Mr. Darcy ")


def settings_of(model: dict[str, Any], data: Path, steps: int) -> list[str]:
    """Return the training settings of one model, as `--set` takes them."""
    common = {
        "data.train": data / "train",
        "data.validation": data / "validation",
        "data.window": WINDOW,
        "batch_size": BATCH_SIZE,
        "schedule.steps": steps,
        "optimizer.lr": 4e-3,
        "evaluation.every": max(1, steps // EVALUATIONS),
        "evaluation.batches": "none",
        "evaluation.batch_size": 8 * BATCH_SIZE,
        "sample.tokens": 0,
        "log.every": max(1, steps // 20),
    }
    return [f"{name}={value}" for name, value in common.items()] + [f"model.{k}={v}" for k, v in model.items()]


def quickstart(name: str) -> str:
    """Return the path of a file inside the package: "train.jsonl", "validation.jsonl" or "LICENCE.md"."""
    return str(resources.files("recurformer") / "quickstart" / name)


def prepare_text(out: Path) -> None:
    """Write the package's text as tokens, its bytes, unless they are there already."""

    for name in ("train", "validation"):
        try:
            TokenDataset(out / name)
        except ValueError:
            prepare([quickstart(f"{name}.jsonl")], out / name, "bytes", overwrite=True, progress=False)


def train_all(out: Path, steps: int, settings: Sequence[str], say: Callable[[str], None]) -> list[Path]:
    """Train each model into its folder, or continue it, and return the folders. Finished runs are left alone.

    Raises:
        ValueError: when a folder holds a run with other settings.
    """

    folders: list[Path] = []
    for name, model in MODELS.items():
        folder = out / name
        config: TrainConfig = read_train_config(None, [*settings_of(model, out / "data", steps), *settings])
        say(f"\n{name}: {_shape(config)}")
        try:
            result = train(config, folder, resume=True)
        except ValueError as error:
            raise ValueError(f"{error} (or give the demo another --out, or delete {folder})") from error
        if not result.finished:
            say("Interrupted; the same command continues.")
            raise KeyboardInterrupt
        folders.append(folder)
    return folders


def _shape(config: TrainConfig) -> str:
    model = config.model
    matrices = model.n_layers * (
        model.d_model * model.head_width * (2 * model.n_heads + 2 * model.kv_heads)
        + (3 if model.activation == "swiglu" else 2) * model.d_model * model.mlp_width
    )
    inside = model.num_parameters()
    outside = model.num_parameters(embedding=True) - inside
    return (
        f"{model.n_layers} layers ({model.kind}) of width {model.d_model}\n"
        f"  {matrices:,} parameters in the layers' matrices, {inside - matrices:,} in norms,\n"
        f"  {outside:,} in embedding and output layer"
    )


def sample_all(folders: Sequence[Path], seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Return the name of each run -> pairs of a prompt and its continuation by that model."""

    texts: dict[str, list[tuple[str, str]]] = {}
    for folder in folders:
        model, tokenizer, _ = open_model(folder)
        assert tokenizer is not None  # the bytes of `prepare_text`
        made = complete(model, tokenizer, PROMPTS, 150, temperature=0.7, top_p=0.95, seed=seed)
        texts[folder.name] = [(completion.prompt, completion.text) for completion in made]
    return texts


def run_demo(out: Path, steps: int = STEPS, settings: Sequence[str] = (), command: Sequence[str] = ()) -> None:
    """Train, compare and sample three small models; keep what is finished in `out`, continue what was interrupted.

    Args:
        out: folder of the data, the runs, the curves and the page.
        steps: optimizer steps of each model.
        settings: training settings of all models, NAME=VALUE each.
        command: words of the command, for the page.
    """
    from rich.console import Console

    def say(text: str) -> None:
        print(text, flush=True)

    began = time.perf_counter()
    say("Text: novels by Jane Austen, State of the Union addresses, Newton's Opticks (public domain), as bytes.")
    say(f"Three models of one size, {steps} steps each: the same tokens in the same order, the same schedule.")
    prepare_text(out / "data")
    folders = train_all(out, steps, settings, say)
    runs = load_runs(folders)
    say("")
    show(runs, Console())
    say("One seed and a short run: a demonstration, not a measurement of the architecture.")
    samples = sample_all(folders)
    for name, texts in samples.items():
        for prompt, text in texts:
            say(f"\n{name}: {prompt}{text}")
    curves, page = write_report(runs, out, "Three models of one size", samples, command)
    say(f"\n{time.perf_counter() - began:.0f} seconds. Curves: {curves}. Page with everything: {page}")
