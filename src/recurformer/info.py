"""Facts of a model, and of the machine that would run it: the `info` command. A preset needs no torch on a CPU."""

from __future__ import annotations

import os
import platform
import re
import sys
import textwrap
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from recurformer.choose import SUBJECTS, choices
from recurformer.config import PRESETS, ModelConfig
from recurformer.hardware import Device
from recurformer.settings import shown, suggest
from recurformer.version import __version__

# Files that Linux has where a GPU may be: NVIDIA's driver, AMD's driver, and the GPU of a Windows host.
GPU_FILES = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


@dataclass(frozen=True)
class NamedDevice:
    """A device by the name of its type, where no torch is imported."""

    type: str

    def __str__(self) -> str:
        return self.type


def gpu_is_possible() -> bool:
    """Return False where this machine cannot have a GPU. Then nothing imports torch: the import takes a second."""
    return not sys.platform.startswith("linux") or any(Path(file).exists() for file in GPU_FILES)


def describe(target: str, layers: str | None = None) -> dict[str, Any]:
    """Return the facts of a model folder, a training run or a preset, ready for JSON.

    Args:
        target: a folder, or the name of a preset.
        layers: kind of the layers of a preset. None means recurrent.

    Raises:
        ValueError: for a name that is neither, and for `layers` with a folder, which has its own layers.
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
            f"{shown(target)} is neither a folder nor a preset; the presets are {', '.join(PRESETS)}"
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
    chosen = {str(device): choices(config, device) for device in devices()}
    for subject in SUBJECTS:
        facts[subject] = {device: found[subject]._asdict() for device, found in chosen.items()}
    return facts


@cache
def devices() -> list[Device]:
    """Return the kinds of device of this machine, the CPU first."""
    if not gpu_is_possible():
        return [NamedDevice("cpu")]
    import torch

    found: list[Device] = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def environment() -> dict[str, Any]:
    """Return versions, devices and installed extras, ready for JSON."""
    found = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores"}
    if gpu_is_possible():
        import torch

        found |= {f"cuda:{n}": torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}
    return {
        "versions": {
            "recurformer": __version__,
            "python": platform.python_version(),
            "torch": torch_version(),
        },
        "devices": found,
        "extras": extras(),
    }


def torch_version() -> str:
    """Return the version of the installed torch, from its metadata where there are any."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        import torch

        return torch.__version__


def extras() -> dict[str, dict[str, str | None]]:
    """Return the optional packages of each extra and their installed versions. None stands for a missing package."""
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
    """Print the facts that `describe` returned."""
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
    for subject in SUBJECTS:
        for device, choice in facts[subject].items():
            where = "" if choice["name"] == "none" else f" on {device}"
            _lines(subject, f"{choice['name']}{where}: {choice['why']}")


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
