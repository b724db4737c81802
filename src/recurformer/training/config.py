"""Every choice a training run is made of, documented where it is declared; read from TOML, YAML and `--set a.b=c`."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import Field

from recurformer.config import LATER_SETTINGS, PRESETS, ModelConfig
from recurformer.data.windows import Packing
from recurformer.settings import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Settings,
    Text,
    field_types,
    setting,
    suggest,
)

if TYPE_CHECKING:
    from recurformer.data import TokenDataset

S = TypeVar("S")

Timeout = Annotated[float, Field(gt=0, le=31_536_000)]  # a year
Momentum = Annotated[float, Field(ge=0, lt=1)]

Precision = Literal["fp32", "bf16", "fp64"]
Logger = Literal["tensorboard", "wandb"]
Trained = Literal["all", "recurrent"]
Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """What is read, and in which order."""

    train: Text = setting(
        "data/train", "Training tokens: a folder made by `recurformer prepare`, or of raw `.npy` shards."
    )
    validation: str | None = setting("data/validation", "Held-out tokens, likewise; none: no evaluation.")
    window: Count = setting(128, "N, the positions of one sequence.")
    packing: Packing = setting(
        "concat",
        '"concat": windows over the concatenated documents; "documents": several documents in a window, '
        "no attention from one to another.",
    )
    seed: Seed = setting(0, "Seed of the order of the windows, drawn anew in each epoch.")
    vocab_size: Count | None = setting(None, "Of raw shards, which do not say it; none: as prepared.")
    dtype: Literal["uint16", "uint32"] | None = setting(None, "Of raw shards; none: the narrowest for vocab_size.")
    eos_id: Natural | None = setting(None, "Of raw shards: the token that ends a document; none: each file is one.")
    workers: Natural = setting(0, "Background processes that read ahead; 0 reads in the training process.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """AdamW. Weight decay is decoupled: each step multiplies the decayed weights by 1 - lr * weight_decay."""

    lr: Positive = setting(2e-3, "Peak learning rate.")
    beta1: Momentum = setting(0.9, "Decay of the running mean of gradients.")
    beta2: Momentum = setting(0.95, "Decay of the running mean of squared gradients.")
    eps: Positive = setting(1e-8, "Added to the root of the mean square.")
    weight_decay: NonNegative = setting(
        0.1,
        "Of the matrices inside the layers and of the output layer. Embedding, norms and biases are never decayed.",
    )
    grad_clip: Positive | None = setting(1.0, "Largest norm of the whole gradient; none: no clipping.")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Settings):
    """Linear warm-up from start_fraction * lr to lr, then a cosine down to final_fraction * lr at the last step."""

    steps: Count = setting(1000, "Optimizer steps of the whole run.")
    warmup_fraction: Fraction = setting(0.1, "Part of the steps spent warming up.")
    warmup_steps: Natural | None = setting(None, "Warm-up in steps, instead of the fraction.")
    start_fraction: Fraction = setting(0.1, "Learning rate of the first step, as a part of the peak.")
    final_fraction: Fraction = setting(0.1, "Learning rate of the last step, as a part of the peak.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup > self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must not exceed steps {self.steps}")

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return round(self.warmup_fraction * self.steps) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Settings):
    """Loss on held-out text while training."""

    every: Count = setting(100, "Steps between evaluations; there is always one at the start and one at the end.")
    batches: Count | None = setting(32, "Batches of an evaluation, always the first ones; none: all.")
    batch_size: Count | None = setting(None, "Sequences of an evaluation batch; none: those of a micro-batch.")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Settings):
    """The text drawn from the model at each evaluation."""

    tokens: Natural = setting(64, "New tokens of the sample; 0: no sample.")
    prompt: str = setting("", "Text that is continued; empty: the end-of-text token.")
    temperature: NonNegative = setting(0.8, "Of the sampling; 0: the most probable token.")
    seed: Seed = setting(0, "Seed of the sampling, which never touches the random state of the training.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings):
    """What is kept on disk."""

    every: Count | None = setting(None, "Steps between checkpoints; none: one with each evaluation.")
    keep_last: Count = setting(2, "Newest checkpoints kept, besides the one of the lowest validation loss.")


@dataclass(frozen=True, kw_only=True)
class LogConfig(Settings):
    """Where numbers go. `metrics.jsonl` is always written."""

    every: Count = setting(10, "Steps between records of the training loss.")
    loggers: tuple[Logger, ...] = setting((), 'Also log to "tensorboard", "wandb" (extra: recurformer[loggers]).')
    wandb_project: str = setting("recurformer", "Weights & Biases project.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """One training run. Step 0 is the state before any update; the learning rate of each update, the data and the
    weights are functions of this configuration alone.

    Raises:
        ValueError: for a value of the wrong type or outside its limits.
    """

    model: ModelConfig = setting(ModelConfig(), "The shape of the model.")
    data: DataConfig = setting(DataConfig(), "")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "")
    schedule: ScheduleConfig = setting(ScheduleConfig(), "")
    evaluation: EvaluationConfig = setting(EvaluationConfig(), "")
    sample: SampleConfig = setting(SampleConfig(), "")
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), "")
    log: LogConfig = setting(LogConfig(), "")

    batch_size: Count = setting(32, "Sequences of one optimizer step, over all micro-batches and processes.")
    micro_batch_size: Count | None = setting(
        None, "Sequences in memory at once, in each process; none: all of its share of the batch."
    )
    recurrent_micro_batch_size: Count | None = setting(
        None,
        "Sequences at once in the recurrent layers at the bottom of a hybrid, which need many and keep little; none: "
        "micro_batch_size.",
    )
    precision: Precision = setting(
        "fp32", '"fp32", "bf16" (autocast: weights stay float32) or "fp64" (for checking; CPU).'
    )
    scan: str = setting("auto", 'How recurrent layers are evaluated: "auto" or the name of a scan, as `model.scan`.')
    compile: bool | None = setting(
        None, "Fuse the element-wise steps of standard layers with torch.compile; none: on a GPU only."
    )
    recompute: bool = setting(
        False, "Standard layers keep only their inputs and are evaluated again in the backward: less memory, slower."
    )
    device: str = setting("auto", '"auto" (the GPU if there is one), "cpu", "cuda", "cuda:1", ...')
    parallel: Parallel = setting(
        "ddp",
        'How the processes that torchrun starts share a run: "ddp" (each has the whole model) or "fsdp" (weights, '
        "gradients and optimizer state are split over them).",
    )
    timeout: Timeout = setting(600.0, "Seconds after which a process gives up waiting for the others.")
    seed: Seed = setting(0, "Seed of the initial weights.")
    init_from: str | None = setting(
        None,
        "Model folder or run whose weights the run starts from. Model settings left out are taken from it; layers, "
        "scan and the like may differ, shapes may not.",
    )
    trained: Trained = setting(
        "all",
        'Parameters that learn: "all", or "recurrent": those of the recurrent layers; the others stay as they are.',
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}; it must not exceed batch_size {self.batch_size}"
            )
        wide = self.recurrent_micro_batch_size
        if wide is not None:
            if not (self.micro_batch_size or 1) <= wide <= self.batch_size:
                least = f"at least micro_batch_size {self.micro_batch_size} and " if self.micro_batch_size else ""
                raise ValueError(
                    f"recurrent_micro_batch_size is {wide}; it must be {least}at most batch_size {self.batch_size}"
                )
            if self.model.recurrent_depth == 0:
                raise ValueError(
                    "recurrent_micro_batch_size is for models with a recurrent first layer; drop it or set model.layers"
                )
        if self.trained == "recurrent" and "recurrent" not in self.model.layer_kinds:
            raise ValueError(
                "trained is 'recurrent', but the model has no recurrent layer; set model.layers or drop it"
            )

    def share(self, processes: int) -> TrainConfig:
        """The part of one of several processes: its sequences of each step, and micro-batches of no more than these.

        Raises:
            ValueError: where a step's sequences do not split evenly, or recurrent layers would take fewer at once than
                the others.
        """
        if self.batch_size % processes:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by {processes} processes; it counts the sequences of "
                "all, so change either"
            )
        mine, wide = self.batch_size // processes, self.recurrent_micro_batch_size
        if self.micro_batch_size is None and wide is not None and wide < mine:
            raise ValueError(
                f"recurrent_micro_batch_size is {wide}, less than the {mine} sequences that a process has of a step; "
                "raise it, or set micro_batch_size to at most as many"
            )
        return dataclasses.replace(
            self,
            batch_size=mine,
            micro_batch_size=self.micro_batch_size and min(self.micro_batch_size, mine),
            recurrent_micro_batch_size=wide and min(wide, mine),
        )

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints, with the default filled in."""
        return self.checkpoint.every or self.evaluation.every

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of plain values, ready for JSON; `from_dict` inverts it."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from nested dictionaries, as TOML, YAML and JSON files give them.

        The `model` table takes every `ModelConfig` field, and `preset`: a named shape that the other fields change.
        `model.vocab_size` left out becomes that of `data.train`. The text "none" stands for None where None is allowed.

        Raises:
            ValueError: for an unknown setting (with the nearest known one) and for a bad value, under its full name.
        """
        _refuse_unknown(values)
        values = dict(values)
        model = _model(values, values.pop("model", {}))
        return dataclasses.replace(_build(cls, values, ""), model=model)


# --- files and --set ------------------------------------------------------------------------------------------------


def load_config(file: str | Path | None = None, settings: Sequence[str] = ()) -> TrainConfig:
    """Read a configuration file and apply `--set`-style changes to it.

    Args:
        file: .toml, .yaml, .yml or .json; none: the defaults.
        settings: "a.b=value" each. The value is read as TOML ("1e-3", "true", "[1, 2]", a quoted string) and, where it
            is no TOML, as text.

    Raises:
        ValueError: for an unreadable file, a setting without "=", an unknown name or a bad value.
    """
    values = {} if file is None else read_file(Path(file))
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r} has no '='; write it as section.name=value")
        *sections, name = key.strip().split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ValueError(f"--set {text!r}: {section!r} is a single value, not a section")
        node[name] = _scalar(value)
    return TrainConfig.from_dict(values)


def read_file(file: Path) -> dict[str, Any]:
    """The nested dictionaries of a TOML, YAML or JSON file.

    Raises:
        ValueError: for another suffix, text that does not parse or a file that is no table of settings.
    """
    readers = {".toml": tomllib.loads, ".yaml": _yaml, ".yml": _yaml, ".json": json.loads}
    if file.suffix not in readers:
        raise ValueError(f"configuration {str(file)!r}: the name must end in {', '.join(readers)}")
    if not file.is_file():
        raise ValueError(f"configuration {str(file)!r}: there is no such file")
    try:
        values = readers[file.suffix](file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"configuration {str(file)!r} cannot be read: {error}") from None
    if values is None:  # an empty YAML file
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"configuration {str(file)!r} holds a {type(values).__name__}, not a table of settings")
    return values


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML's 1.1 rules take 1e-3 for text."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_YamlLoader)


def _scalar(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


# --- building, strictly ---------------------------------------------------------------------------------------------


def names(section: type = TrainConfig, prefix: str = "") -> Iterator[str]:
    """The full names of all settings, `model.preset` included."""
    for name, annotation in field_types(section).items():
        if dataclasses.is_dataclass(annotation):
            yield from names(annotation, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
        else:
            yield prefix + name
    if section is ModelConfig:
        yield prefix + "preset"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    known = list(names())
    sections = {name.rpartition(".")[0] for name in known}
    for key in flatten(values):
        if key in known:
            continue
        section, _, name = key.rpartition(".")
        if key in sections:
            raise ValueError(f"{key} is {flatten(values)[key]!r}; it is a section, so set {key}.NAME")
        # The right name in the wrong section, then a slip in this section, then anything that looks alike.
        same = [k for k in known if k.rpartition(".")[2] == name]
        siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
        if len(same) == 1:
            hint = f"; did you mean {same[0]!r}?"
        elif near := suggest(name, siblings):
            hint = near.replace("mean '", f"mean '{section}.") if section else near
        else:
            hint = suggest(key, known)
        raise ValueError(f"unknown setting {key!r}{hint}")


def _build(section: type[S], values: Mapping[str, Any], prefix: str) -> S:
    fields: dict[str, Any] = {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.')} is {values!r}; it is a section of settings")
    for name, value in values.items():
        annotation = field_types(section)[name]
        if dataclasses.is_dataclass(annotation):
            value = _build(annotation, value, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
        elif value == "none" and type(None) in get_args(annotation):
            value = None
        elif isinstance(value, list):  # what TOML, YAML and JSON give
            value = tuple(value)
        fields[name] = value
    try:
        return section(**fields)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _model(values: Mapping[str, Any], table: Any) -> ModelConfig:
    """The `model` table with preset, starting folder and the data's vocabulary filled in."""
    if not isinstance(table, Mapping):
        raise ValueError(f"model is {table!r}; it is a section of settings")
    table = dict(table)
    preset = table.pop("preset", None)
    source = values.get("init_from")
    whole = {f.name for f in dataclasses.fields(ModelConfig)} - LATER_SETTINGS
    if source not in (None, "none") and not whole <= set(table):
        from recurformer.store.folders import read_model_config

        if preset is not None:
            raise ValueError(f"model.preset is {preset!r}, but init_from {source!r} gives the shape; drop one of them")
        table = {**read_model_config(source).to_dict(), **table}
    elif preset is not None:
        if preset not in PRESETS:
            raise ValueError(
                f"model.preset is {preset!r}; choose one of {', '.join(PRESETS)}{suggest(str(preset), PRESETS)}"
            )
        # A preset's vocabulary is its paper's; the data decide unless the table itself says otherwise.
        table = {**{k: v for k, v in PRESETS[preset].items() if k != "vocab_size"}, **table}
    if "vocab_size" not in table:
        data = _build(DataConfig, values.get("data", {}), "data.")
        table["vocab_size"] = open_tokens(data, data.train).vocab_size
    return _build(ModelConfig, table, "model.")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def open_tokens(data: DataConfig, source: str) -> TokenDataset:
    """The tokens of `data.train` or `data.validation`."""
    from recurformer.data import TokenDataset

    return TokenDataset(source, vocab_size=data.vocab_size, dtype=data.dtype, eos_id=data.eos_id)


# --- documentation --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One setting as the documentation shows it."""

    name: str
    default: str
    doc: str


def reference(section: type = TrainConfig, prefix: str = "") -> Iterator[tuple[str, str, list[Entry]]]:
    """(section name, its sentence, its settings), the top level first: what `--help` and the docs print."""
    entries: list[Entry] = []
    below: list[tuple[str, str, list[Entry]]] = []
    if section is ModelConfig:
        entries.append(Entry("model.preset", "none", f"A named shape the other settings change: {', '.join(PRESETS)}."))
    for field in dataclasses.fields(section):
        annotation = field_types(section)[field.name]
        if dataclasses.is_dataclass(annotation):
            below += reference(annotation, f"{prefix}{field.name}.")  # pyright: ignore[reportArgumentType]
            continue
        default = "that of the data" if (prefix, field.name) == ("model.", "vocab_size") else _show(field.default)
        entries.append(Entry(prefix + field.name, default, field.metadata["doc"]))
    summary = "" if section is TrainConfig else " ".join((section.__doc__ or "").split("\n\n")[0].split())
    yield prefix.rstrip("."), summary, entries
    yield from below


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def markdown() -> str:
    """The text of `docs/configuration.md`."""
    lines = [
        "# Configuration of a training run",
        "",
        "<!-- Written by recurformer.training.config.markdown(); a test compares. -->",
        "",
        "Settings come from a TOML, YAML or JSON file (`recurformer train --config FILE`) and from `--set",
        "NAME=VALUE`, which wins. Sections are tables: `optimizer.lr` is `lr` under `[optimizer]`. `none` is no value.",
        "An unknown name and a value of the wrong type or outside its limits are errors.",
    ]
    for name, summary, entries in reference():
        lines += ["", f"## `[{name}]`" if name else "## Top level", ""]
        lines += [summary, ""] if summary else []
        lines += ["| setting | default | meaning |", "|---|---|---|"]
        lines += [f"| `{e.name}` | `{e.default}` | {e.doc} |" for e in entries]
    return "\n".join(line.rstrip() for line in lines) + "\n"
