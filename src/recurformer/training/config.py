"""The settings of a training run, each documented where it is declared, and their strict reading from dictionaries."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import Field

from recurformer.config import LATER_SETTINGS, PRESETS, ModelConfig
from recurformer.data import TokenDataset
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
    check,
    field_types,
    setting,
    shown,
    suggest,
)
from recurformer.store.folders import load_config

if TYPE_CHECKING:
    from recurformer.data import TokenDataset

S = TypeVar("S")

Timeout = Annotated[float, Field(gt=0, le=31_536_000)]  # a year
Steps = Annotated[int, Field(ge=1, le=10**12)]
Momentum = Annotated[float, Field(ge=0, lt=1)]

Precision = Literal["fp32", "bf16", "fp64"]
Logger = Literal["tensorboard", "wandb"]
Trained = Literal["all", "recurrent"]
Parallel = Literal["ddp", "fsdp"]
Scan = Literal["auto", "reference", "tiled", "fused", "wavefront"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """The tokens of a run, and the order in which it reads them."""

    train: Text = setting(
        "data/train", "Training tokens: a folder made by `recurformer prepare`, or of raw `.npy` shards."
    )
    validation: str | None = setting(
        "data/validation", "Held-out tokens, in a folder of either kind; none: no evaluation."
    )
    window: Count = setting(128, "N, positions of one sequence.")
    packing: Packing = setting(
        "concat",
        '"concat": windows over the concatenated documents; "documents": several documents in a window, '
        "and no attention between documents.",
    )
    seed: Seed = setting(0, "Seed of the order of the windows. Each epoch has an order of its own.")
    vocab_size: Count | None = setting(
        None, "Vocabulary size of raw `.npy` shards, which do not store one. Leave empty for prepared data."
    )
    dtype: Literal["uint16", "uint32"] | None = setting(
        None, "Type of the integers in raw shards; none: the narrowest that holds vocab_size."
    )
    eos_id: Natural | None = setting(
        None, "Token that ends each document in raw shards; none: each file is one document."
    )
    workers: Natural = setting(0, "Background threads that read ahead; 0: the training loop reads.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """AdamW. Weight decay is decoupled: each step multiplies the decayed weights by 1 - lr * weight_decay."""

    lr: Positive = setting(2e-3, "Peak learning rate.")
    beta1: Momentum = setting(0.9, "Decay of the running mean of gradients.")
    beta2: Momentum = setting(0.95, "Decay of the running mean of squared gradients.")
    eps: Positive = setting(1e-8, "Added to the root of the mean square.")
    weight_decay: NonNegative = setting(
        0.1,
        "Decay of the matrices inside the layers and of the output layer. Embedding, norms and biases never decay.",
    )
    grad_clip: Positive | None = setting(1.0, "Largest norm of the whole gradient; none: no clipping.")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Settings):
    """Linear warm-up from start_fraction * lr to lr, then a cosine down to final_fraction * lr at the last step."""

    steps: Steps = setting(1000, "Optimizer steps of the whole run.")
    warmup_fraction: Fraction = setting(0.1, "Part of the steps in which the learning rate rises.")
    warmup_steps: Natural | None = setting(
        None, "Steps of warm-up, instead of warmup_fraction; none: warmup_fraction decides."
    )
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

    every: Count = setting(100, "Steps between evaluations. Two more come at the start and at the end.")
    batches: Count | None = setting(32, "Batches of an evaluation, always the first ones of the data; none: all.")
    batch_size: Count | None = setting(None, "Sequences of an evaluation batch; none: as many as a micro-batch.")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Settings):
    """The text drawn from the model at each evaluation."""

    tokens: Natural = setting(64, "New tokens of the sample; 0: no sample.")
    prompt: str = setting("", "Text to continue; empty: the end-of-text token.")
    temperature: NonNegative = setting(0.8, "Temperature of the sampling; 0: the most probable token.")
    seed: Seed = setting(0, "Seed of the sampling. Samples never change the random state of the training.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings):
    """Which checkpoints stay on disk."""

    every: Count | None = setting(None, "Steps between checkpoints; none: one at each evaluation.")
    keep_last: Count = setting(
        2, "Number of newest checkpoints to keep. The one of the lowest validation loss stays, too."
    )


@dataclass(frozen=True, kw_only=True)
class LogConfig(Settings):
    """Where numbers are recorded. `metrics.jsonl` is always written."""

    every: Count = setting(10, "Steps between records of the training loss.")
    loggers: tuple[Logger, ...] = setting((), 'Further loggers: "tensorboard", "wandb" (extra: recurformer[loggers]).')
    wandb_project: str = setting("recurformer", "Project in Weights & Biases.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Every setting of one training run. Step 0 is the state before any update.

    The initial weights, the data of each step and its learning rate depend on this configuration alone.

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
        None, "Sequences in memory at once, in each process; none: the process's whole share of the batch."
    )
    recurrent_micro_batch_size: Count | None = setting(
        None,
        "Sequences at once in the recurrent layers at the bottom of a hybrid; none: micro_batch_size. These layers are "
        "fast with many sequences, and keep little memory.",
    )
    precision: Precision = setting(
        "fp32", '"fp32", "bf16" (autocast: weights stay float32) or "fp64" (for exact checks, on a CPU).'
    )
    scan: Scan = setting(
        "auto", 'Scan that evaluates recurrent layers: "auto", "reference", "tiled", "fused" or "wavefront".'
    )
    compile: bool | None = setting(
        None, "Whether torch.compile fuses the element-wise steps of standard layers; none: on a GPU only."
    )
    recompute: bool = setting(
        False, "Whether standard layers keep only their inputs, and run again in the backward: less memory, slower."
    )
    device: str = setting("auto", 'Device: "auto" (the GPU if there is one), "cpu", "cuda", "cuda:1", ...')
    parallel: Parallel = setting(
        "ddp",
        'How the processes that torchrun starts share a run: "ddp" (each holds the whole model) or "fsdp" (each holds '
        "a part of weights, gradients and optimizer state).",
    )
    timeout: Timeout = setting(600.0, "Seconds that a process waits for the others before it gives up.")
    seed: Seed = setting(0, "Seed of the initial weights.")
    init_from: str | None = setting(
        None,
        "Model folder or run that gives the initial weights, and every model setting that is left out. Settings such "
        "as layers may differ from the folder's; shapes may not.",
    )
    trained: Trained = setting(
        "all",
        'Parameters that learn: "all", or "recurrent" (those of recurrent layers; all others stay as they are).',
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
        """Return the configuration of one of several processes: its sequences of a step, and micro-batches to match.

        Raises:
            ValueError: when a step's sequences do not split evenly, or recurrent layers would take fewer sequences at
                once than standard ones.
        """
        if self.batch_size % processes:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by {processes} processes, which share its sequences; "
                "change either"
            )
        mine, wide = self.batch_size // processes, self.recurrent_micro_batch_size
        if self.micro_batch_size is None and wide is not None and wide < mine:
            raise ValueError(
                f"recurrent_micro_batch_size is {wide}, less than the {mine} sequences that a process has of a step; "
                f"raise it, or set micro_batch_size to at most {wide}"
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
        """Return nested dictionaries of plain values, ready for JSON. `from_dict` inverts it."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], data_may_be_missing: bool = False) -> TrainConfig:
        """Build a configuration from nested dictionaries, as TOML, YAML and JSON files give them.

        The `model` table takes every `ModelConfig` field, and `preset`: a named shape that the other fields change.
        `model.vocab_size` defaults to the vocabulary of `data.train`. The text "none" means None where None is allowed.

        Args:
            data_may_be_missing: without data, `model.vocab_size` defaults to that of the preset or of `ModelConfig`.

        Raises:
            ValueError: for an unknown setting (naming the nearest known one) and for a bad value, under its full name.
        """
        _refuse_unknown(values)
        others = _build(cls, {name: values[name] for name in values if name != "model"}, "")
        return dataclasses.replace(
            others, model=_build(ModelConfig, _model_table(values, others, data_may_be_missing), "model.")
        )


# --- from dictionaries, strictly --------------------------------------------------------------------------------------


def names(section: type = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Yield the full names of all settings, `model.preset` included."""
    for name, annotation in field_types(section).items():
        if dataclasses.is_dataclass(annotation):
            yield from names(annotation, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
        else:
            yield prefix + name
    if section is ModelConfig:
        yield prefix + "preset"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"a": {"b": 1}} as {"a.b": 1}. An empty dictionary is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a name that is no setting, and for a section that is written as a value."""
    known = list(names())
    sections = {name.rpartition(".")[0] for name in known} - {""}
    _refuse_dotted(values, known)
    for key, value in flatten(values).items():
        if key in sections and value != {}:
            raise ValueError(f"{key} is {shown(value)}; it is a section, so set {key}.NAME")
        if key not in known and key not in sections:
            raise ValueError(f"unknown setting {shown(key)}{_nearest(key, known)}")


def _refuse_dotted(values: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise ValueError for {"optimizer.lr": 1}, which is one name and not a name in a section."""
    for key, value in values.items():
        if isinstance(key, str) and "." in key and key in known:
            section, _, name = key.rpartition(".")
            raise ValueError(f"{key!r} is written as one name; write {name} in the table {section}")
        if isinstance(value, Mapping):
            _refuse_dotted(value, known)


def _nearest(key: str, known: Sequence[str]) -> str:
    """Return a hint at the setting that was meant, "" when nothing is near."""
    section, _, name = key.rpartition(".")
    places = {k: k.rpartition(".") for k in known}  # full name -> section, ".", name
    same = [k for k, (_, _, last) in places.items() if last == name]
    if len(same) == 1:  # the right name in the wrong section
        return f"; did you mean {same[0]!r}?"
    if near := suggest(name, [last for place, _, last in places.values() if place == section]):
        return near.replace("mean '", f"mean '{section}.") if section else near
    # Two names of one section look alike because of the section: their last parts must be alike, too.
    alike = [k for k in difflib.get_close_matches(key, known) if _are_alike(name, places[k][2])]
    found = difflib.get_close_matches(name, [last for _, _, last in places.values()], n=1, cutoff=0.7)
    alike += [k for k, (_, _, last) in places.items() if last in found]
    return f"; did you mean {alike[0]!r}?" if alike else ""


def _are_alike(a: str, b: str) -> bool:
    return sorted(a) == sorted(b) or difflib.SequenceMatcher(None, a, b).ratio() > 0.6


def _build(section: type[S], values: Any, prefix: str) -> S:
    """Build a section and all sections below it; a message names the setting in full."""
    fields: dict[str, Any] = {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.')} is {shown(values)}; it is a section of settings")
    for name, value in values.items():
        annotation = field_types(section)[name]
        if dataclasses.is_dataclass(annotation):
            value = _build(annotation, value, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
        elif value == "none" and type(None) in get_args(annotation):
            value = None
        elif isinstance(value, str) and get_origin(annotation) is tuple:  # log.loggers=wandb
            value = tuple(word.strip() for word in value.split(",") if word.strip())
        fields[name] = value
    try:
        return section(**fields)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _model_table(values: Mapping[str, Any], others: TrainConfig, data_may_be_missing: bool) -> dict[str, Any]:
    """Return the `model` table with what `preset`, `init_from` and the training data add to it."""
    table = values.get("model", {})
    if not isinstance(table, Mapping):
        raise ValueError(f"model is {shown(table)}; it is a section of settings")
    table = dict(table)
    preset = table.pop("preset", None)
    if preset is not None:
        preset = check("model.preset", preset, Literal[tuple(PRESETS)])  # pyright: ignore[reportInvalidTypeForm]
    if others.init_from is not None and not _is_whole(table):
        if preset is not None:
            raise ValueError(
                f"model.preset is {preset!r}, but init_from {others.init_from!r} gives the shape; drop one of them"
            )
        table = {**load_config(others.init_from).to_dict(), **table}
    elif preset is not None:
        # A preset's vocabulary is its paper's. The data decide, unless the table says otherwise.
        table = {**{name: value for name, value in PRESETS[preset].items() if name != "vocab_size"}, **table}
    if "vocab_size" not in table and data_may_be_missing and not Path(others.data.train).exists():
        table["vocab_size"] = PRESETS.get(preset or "", {}).get("vocab_size", ModelConfig.vocab_size)
    if "vocab_size" not in table:
        table["vocab_size"] = open_tokens(others.data, "train").vocab_size
    return table


def _is_whole(table: Mapping[str, Any]) -> bool:
    """Return whether a table has every model setting, as a run's config.json does. A run that is resumed therefore
    does without the folder that it began from."""
    return {f.name for f in dataclasses.fields(ModelConfig)} - LATER_SETTINGS <= set(table)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def open_tokens(data: DataConfig, which: Literal["train", "validation"]) -> TokenDataset:
    """Open the tokens of `data.train` or `data.validation`.

    Raises:
        ValueError: for data that are missing, damaged or no tokens; the message names the setting.
    """

    source = getattr(data, which)
    assert source is not None
    if Path(source).is_file() and Path(source).suffix != ".npy":
        raise ValueError(
            f"data.{which} is {source!r}, a file of text or of something else; it must be a folder of tokens. Make "
            f"one: recurformer prepare {source} --out DIR, then --set data.{which}=DIR"
        )
    return TokenDataset(source, vocab_size=data.vocab_size, dtype=data.dtype, eos_id=data.eos_id)
