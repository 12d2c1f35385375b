"""Options of a pass: dataclass fields on one side, written values on the other."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lwc.core.errors import UsageError
from lwc.pipeline.grammar import Scalar

__all__ = [
    "Option",
    "did_you_mean",
    "format_value",
    "free_value_type",
    "options_of",
    "parse_value",
    "type_name",
]

_INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class Option:
    """One option of a pass class.

    Attributes:
        name: Its kebab-case name.
        field: The dataclass field.
        type: The field's type.
        default: The value when it is not given, or `dataclasses.MISSING` where it must be.
    """

    name: str
    field: str
    type: Any
    default: Any

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is dataclasses.MISSING


@functools.cache
def options_of(cls: type) -> tuple[Option, ...]:
    """List the options of a pass class, in the order of its fields.

    Raises:
        UsageError: A field has a type that cannot be written in a pipeline.
    """
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError) as error:
        raise UsageError(
            f"the options of {cls.__qualname__} have no readable type: {error}"
        ) from error
    found = []
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        option = Option(item.name.replace("_", "-"), item.name, hints[item.name], default)
        if item.name != getattr(cls, "free_options", None):
            type_name(option.type)
        found.append(option)
    return tuple(found)


def free_value_type(hint: Any) -> Any:
    """Return the value type of a field that takes free options: `tuple[tuple[str, T], ...]`.

    Raises:
        UsageError: The field has another type.
    """
    element = _element_type(hint)
    if typing.get_origin(element) is tuple and len(typing.get_args(element)) == 2:
        key, value = typing.get_args(element)
        if key is str and value is not Ellipsis:
            return value
    raise UsageError(f"free options need the type tuple[tuple[str, T], ...], not {hint}")


def parse_value(hint: Any, scalars: Sequence[Scalar]) -> Any:
    """Turn written values into a value of type `hint`.

    Raises:
        ValueError: They are no such value; the message says what was expected.
    """
    members = _members(hint)
    if type(None) in members and len(scalars) == 1 and _is_word(scalars[0], "none"):
        return None
    for member in members:
        element = _element_type(member)
        if element is not None:
            return tuple(_parse_scalar(_members(element), scalar, hint) for scalar in scalars)
    if len(scalars) != 1:
        got = "nothing" if not scalars else f"a list of {len(scalars)}"
        raise ValueError(f"expected {type_name(hint)}, got {got}")
    return _parse_scalar(members, scalars[0], hint)


def format_value(hint: Any, value: Any) -> tuple[Scalar, ...]:
    """Write a value of type `hint` so that `parse_value` gives it back.

    Raises:
        ValueError: `value` is no value of that type.
    """
    items = value if isinstance(value, tuple | list) else (value,)
    bare = tuple(_format_scalar(item) for item in items)
    quoted = tuple(dataclasses.replace(scalar, quoted=True) for scalar in bare)
    strings = tuple(
        quote if isinstance(item, str) else scalar
        for item, scalar, quote in zip(items, bare, quoted, strict=True)
    )
    for written in (bare, strings):
        try:
            if _same(parse_value(hint, written), value):
                return written
        except ValueError:
            continue
    raise ValueError(f"expected {type_name(hint)}, got {value!r}")


def type_name(hint: Any) -> str:
    """Name a type for a person: `int`, `4|8`, `list of str`, `float or none`.

    Raises:
        UsageError: No option can have that type.
    """
    if hint in (int, float, bool, str):
        return str(hint.__name__)
    if hint is type(None):
        return "none"
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(hint))
    element = _element_type(hint)
    if element is not None:
        return f"list of {type_name(element)}"
    members = _members(hint)
    lists = any(_element_type(member) is not None for member in members)
    if len(members) > 1 and not (lists and len(set(members) - {type(None)}) > 1):
        return " or ".join(type_name(member) for member in members)
    raise UsageError(f"an option of a pass cannot have the type {hint}")


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return `did you mean '...'?` with the nearest known word, if one is near."""
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1)
    near = near or [each for each in words if len(word) > 2 and each.startswith(word)]
    return f"did you mean '{near[0]}'?" if near else None


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _element_type(hint: Any) -> Any:
    """Return T of `tuple[T, ...]`, None for every other type."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    return None


def _is_word(scalar: Scalar, word: str) -> bool:
    return not scalar.quoted and scalar.text == word


def _parse_scalar(members: Sequence[Any], scalar: Scalar, hint: Any) -> Any:
    """Try the member types from the narrowest to the widest."""
    text = scalar.text
    literals = [member for member in members if typing.get_origin(member) is typing.Literal]
    for choice in itertools.chain.from_iterable(map(typing.get_args, literals)):
        if text == _format_scalar(choice).text and (isinstance(choice, str) or not scalar.quoted):
            return choice
    if not scalar.quoted:
        if bool in members and text in ("true", "false"):
            return text == "true"
        if int in members and _INTEGER.fullmatch(text):
            return int(text)
        if float in members:
            number = _float(text)
            if number is not None:
                return number
    if str in members:
        return text
    raise ValueError(f"expected {type_name(hint)}, got {text!r}")


def _float(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) or "_" in text else number


def _format_scalar(value: Any) -> Scalar:
    if value is None:
        return Scalar("none")
    if isinstance(value, bool):
        return Scalar("true" if value else "false")
    return Scalar(repr(value) if isinstance(value, float) else str(value))


def _same(parsed: Any, value: Any) -> bool:
    """Compare what was read back; an int may stand where a float is meant, nothing else."""
    if isinstance(value, tuple | list):
        return (
            isinstance(parsed, tuple)
            and len(parsed) == len(value)
            and all(_same(a, b) for a, b in zip(parsed, value, strict=True))
        )
    if isinstance(parsed, float) and type(value) is int:
        return parsed == value
    return type(parsed) is type(value) and bool(parsed == value)
