"""Settings: frozen dataclasses whose fields carry their types, limits and documentation, all checked in one place.

    @dataclass(frozen=True, kw_only=True)
    class ReadingSettings(Settings):
        window: Count = setting(128, "Positions of one sequence.")
        order: Literal["random", "fixed"] = setting("random", "Order of the windows.")

Every group of options in the package is such a class: the shape of a model, a training run, a benchmark, sampling.
Command-line options, `--help` and the configuration reference are made from these fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable
from dataclasses import field
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

T = TypeVar("T")

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(min_length=1)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1)]

SHOWN = 200  # characters of a value that a message repeats


def setting(
    default: T,
    doc: str,
    *,
    option: str | None = "",
    metavar: str | None = None,
    repeated: bool = False,
    unset: str | None = None,
) -> T:
    """Return a dataclass field that carries its documentation and the look of its command-line option.

    Args:
        default: value of the field.
        doc: a noun phrase with the unit.
        option: declaration of the option, as "--length" or "--backward/--forward-only". "" makes it from the name of
            the field; None leaves the field out of the command line.
        metavar: stands for the value in `--help`. None: a word for the type.
        repeated: an option for each entry of a tuple. Otherwise one option takes the entries with commas between.
        unset: words for the default in `--help`. The option then has no default, and the field keeps its own.
    """
    metadata = {"doc": doc, "option": option, "metavar": metavar, "repeated": repeated, "unset": unset}
    return field(default=default, metadata=metadata)  # pyright: ignore[reportReturnType]


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'n_layers'?` for the nearest of `known`, "" when nothing is near."""
    word, names = word[:SHOWN], list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    near = near or [name for name in names if sorted(name) == sorted(word)]  # swapped letters, as in "rl" for "lr"
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """Return a value as a message repeats it: its representation, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


class Settings:
    """Base of a frozen dataclass of settings: checks the type and the limits of every field, however it was built.

    Raises:
        ValueError: naming the field, its value and what it accepts.
    """

    CHECKED_BY_ITSELF: ClassVar[tuple[str, ...]] = ()  # fields whose class has a check with a better message

    def __post_init__(self) -> None:
        for name, annotation in field_types(type(self)).items():
            if not dataclasses.is_dataclass(annotation) and name not in self.CHECKED_BY_ITSELF:
                object.__setattr__(self, name, check(name, getattr(self, name), annotation))


def check(name: str, value: Any, annotation: Any) -> Any:
    """Return `value` as a field of this annotation holds it (a whole number becomes a float where one is wanted).

    Raises:
        ValueError: when the annotation does not accept it.
    """
    if isinstance(value, list) and get_origin(annotation) is not list:  # TOML, YAML and JSON have no tuples
        value = tuple(value)
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError:
        raise ValueError(_complaint(name, value, annotation)) from None


def _complaint(name: str, value: Any, annotation: Any, verb: str = "is") -> str:
    """Return why the annotation does not accept the value, in words with the remedy."""
    entry = entry_type(annotation)
    if entry is not None and value == ():
        return f"{name} is empty; give at least one"
    if entry is not None and isinstance(value, tuple):
        for one in value:
            try:
                _adapter(entry).validate_python(one)
            except ValidationError:
                return _complaint(name, one, entry, "holds")
    choices = choices_of(annotation)
    if not choices:
        return f"{name} {verb} {shown(value)}; {'each' if verb == 'holds' else 'it'} must be {accepted(annotation)}"
    words = [choice for choice in choices if isinstance(choice, str)]
    return f"{name} {verb} {shown(value)}; choose one of {', '.join(map(repr, choices))}{suggest(str(value), words)}"


@cache
def field_types(section: type) -> dict[str, Any]:
    """Return the annotation of every field of a settings class."""
    hints = get_type_hints(section, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(section)}


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(strict=True))


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """Return the values of a Literal, None included where it is allowed; () for every other annotation."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        if len(parts) == 1 and get_origin(parts[0]) is Literal:
            return (*get_args(parts[0]), None)
    return ()


def entry_type(annotation: Any) -> Any:
    """Return the annotation of the entries of a tuple of any length; None for every other annotation."""
    base: Any = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    arguments: tuple[Any, ...] = get_args(base) if get_origin(base) is tuple else ()
    return arguments[0] if len(arguments) == 2 and arguments[1] is Ellipsis else None


def accepted(annotation: Any) -> str:
    """Return what an annotation accepts, in words: "a whole number of at least 1"."""
    if annotation is type(None):
        return "none"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(accepted(part) for part in get_args(annotation))
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation)))
    if get_origin(annotation) is tuple:  # (X, ...)
        return f"a list, each entry {accepted(get_args(annotation)[0])}"
    base, *extras = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    limits = [limit for extra in extras for limit in getattr(extra, "metadata", [extra])]
    if get_origin(base) is dict:
        return "a table of named values"
    if base is bool:
        return "true or false"
    if base is str:
        return "text that is not empty" if any(isinstance(limit, MinLen) for limit in limits) else "text"
    if base is int or base is float:
        return _number(base, limits)
    if get_origin(base) is tuple:
        return accepted(base)
    return getattr(base, "__name__", str(base))


def _number(base: type, limits: list[Any]) -> str:
    finite = any(getattr(limit, "allow_inf_nan", None) is False for limit in limits)
    words = "a whole number" if base is int else "a finite number" if finite else "a number"
    kinds = ((Ge, "ge", "of at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "less than"))
    bounds = [f"{word} {getattr(l, key):,}" for kind, key, word in kinds for l in limits if isinstance(l, kind)]
    return " ".join([words, " and ".join(bounds)]).strip()
