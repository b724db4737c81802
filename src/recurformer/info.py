"""What a model is made of and what it would run on: the `info` command."""

from __future__ import annotations

import os
import platform
import re
import textwrap
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from recurformer.choose import CHOOSERS
from recurformer.config import PRESETS, ModelConfig
from recurformer.settings import suggest
from recurformer.version import __version__


def describe(target: str, layers: str | None = None) -> dict[str, Any]:
    """Facts of a model folder, a training run or a preset, ready for JSON.

    Args:
        target: a folder, or the name of a preset.
        layers: of a preset, the kind of its layers; None: recurrent.

    Raises:
        ValueError: for a name that is neither, and for `layers` with a folder, whose layers are what they are.
    """
    facts: dict[str, Any] = {"target": target}
    if Path(target).is_dir():
        from recurformer.store.folders import load_config, resolve

        if layers is not None:
            raise ValueError(f"--layers is {layers!r}, but {target} is a folder and has its own; drop one of them")
        folder = resolve(target)
        config = load_config(folder)
        facts["folder"] = str(folder)
    elif target in PRESETS:
        config = ModelConfig.preset(target, **({} if layers is None else {"layers": layers}))
    else:
        raise ValueError(
            f"{target!r} is neither a folder nor a preset; the presets are {', '.join(PRESETS)}"
            f"{suggest(target, PRESETS)}"
        )
    facts |= {
        "kind": config.kind,
        "layers": config.n_layers,
        "width": config.d_model,
        "heads": config.n_heads,
        "key_value_heads": config.kv_heads,
        "head_width": config.head_width,
        "mlp_width": config.mlp_width,
        "vocabulary": config.vocab_size,
        "parameters": config.num_parameters(),
        "parameters_with_embeddings": config.num_parameters(embedding=True),
        "kv_bytes_per_token_16_bit": config.kv_bytes_per_token(2),
        "kv_bytes_per_token_32_bit": config.kv_bytes_per_token(4),
    }
    for what, choose in CHOOSERS.items():
        facts[what] = {str(device): asdict(choose(config, device)) for device in devices()}
    return facts


def devices() -> list[torch.device]:
    """The kinds of device that are here, the CPU first."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def environment() -> dict[str, Any]:
    """Versions, devices and installed extras, ready for JSON."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "versions": {"recurformer": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "devices": {
            "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            **{f"cuda:{n}": name for n, name in enumerate(gpus)},
        },
        "extras": extras(),
    }


def extras() -> dict[str, dict[str, str | None]]:
    """The optional dependencies of each extra and their installed versions; None where one is missing."""
    found: dict[str, dict[str, str | None]] = {}
    try:
        requirements = metadata.requires("recurformer") or []
    except metadata.PackageNotFoundError:
        return found
    for requirement in requirements:
        name, extra = re.match(r"[\w.-]+", requirement), re.search(r"extra\s*==\s*['\"](\w+)['\"]", requirement)
        if name and extra and extra[1] != "dev":
            try:
                version = metadata.version(name[0])
            except metadata.PackageNotFoundError:
                version = None
            found.setdefault(extra[1], {})[name[0]] = version
    return found


def show_environment() -> None:
    """Print versions, devices and extras."""
    here = environment()
    _lines("versions", ", ".join(f"{name} {version}" for name, version in here["versions"].items()))
    for name, text in here["devices"].items():
        _lines(name, text)
    for extra, packages in here["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        present = [f"{name} {version}" for name, version in packages.items() if version is not None]
        text = ", ".join(present) + ("; " if present and missing else "")
        _lines(f"[{extra}]", text + (f"not installed: {', '.join(missing)}" if missing else ""))


def show(facts: dict[str, Any]) -> None:
    """Print what `describe` found."""
    _lines("model", facts.get("folder", f"preset {facts['target']}"))
    heads = f"{facts['heads']} heads of {facts['head_width']}"
    if facts["key_value_heads"] != facts["heads"]:
        heads += f" over {facts['key_value_heads']} key-value heads"
    _lines("layers", f"{facts['layers']}, {facts['kind']}; width {facts['width']}, {heads}, MLP {facts['mlp_width']}")
    _lines("vocabulary", f"{facts['vocabulary']:,}")
    _lines(
        "parameters",
        f"{facts['parameters']:,} without embedding and output layer, {facts['parameters_with_embeddings']:,} with",
    )
    half, full = facts["kv_bytes_per_token_16_bit"], facts["kv_bytes_per_token_32_bit"]
    _lines("KV cache", f"{half:,} bytes a token in 16 bits, {full:,} in 32")
    for what in CHOOSERS:
        for device, choice in facts[what].items():
            where = "" if choice["name"] == "none" else f" on {device}"
            _lines(what, f"{choice['name']}{where}: {choice['why']}")


def show_presets() -> None:
    """Print the table of presets."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    headings = ["preset", "layers", "width", "heads", "MLP", "vocab", "parameters", "KV B/token"]
    for n, heading in enumerate(headings):
        table.add_column(heading, justify="right" if n else "left", no_wrap=True)
    for name in PRESETS:
        c = ModelConfig.preset(name)
        numbers = (
            c.n_layers,
            c.d_model,
            c.n_heads,
            c.mlp_width,
            c.vocab_size,
            c.num_parameters(),
            c.kv_bytes_per_token(),
        )
        table.add_row(name, *(f"{number:,}" for number in numbers))
    Console().print(table)
    print("Parameters: without embedding and output layer.\nKV bytes: 16-bit keys and values of all layers.\n")


def _lines(name: str, text: str) -> None:
    print(textwrap.fill(f"{name:<14} {text}", 80, subsequent_indent=" " * 15, break_on_hyphens=False))
