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

SHOWN = 200  # characters of a value that a message repeats


def setting(default: T, doc: str) -> T:
    """Return a dataclass field that carries its documentation."""
    return field(default=default, metadata={"doc": doc})  # pyright: ignore[reportReturnType]


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'n_layers'?` for the nearest of `known`, "" when nothing is near."""
    near = difflib.get_close_matches(word[:SHOWN], list(known), n=1, cutoff=0.6)
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
        choices = _choices(annotation)
        if choices:
            listed = ", ".join(map(repr, choices))
            words = [choice for choice in choices if isinstance(choice, str)]
            message = f"{name} is {shown(value)}; choose one of {listed}{suggest(str(value), words)}"
        else:
            message = f"{name} is {shown(value)}; it must be {accepted(annotation)}"
        raise ValueError(message) from None


@cache
def field_types(section: type) -> dict[str, Any]:
    """Return the annotation of every field of a settings class."""
    hints = get_type_hints(section, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(section)}


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(strict=True))


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, None included where it is allowed; () for every other annotation."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        if len(parts) == 1 and get_origin(parts[0]) is Literal:
            return (*get_args(parts[0]), None)
    return ()


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
