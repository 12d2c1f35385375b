"""The text of a pipeline: `canonicalize,quantize-weights{bits=4 exclude=head,"a b"}`.

This file knows only the shape of the text. Which passes and options exist, and what type a value
must have, is known to `lwc.pipeline.spec`. The grammar in EBNF is in docs/pipeline_syntax.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from lwc.core.errors import UsageError

__all__ = [
    "Argument",
    "PassSpec",
    "Place",
    "Scalar",
    "is_safe",
    "parse_arguments",
    "parse_specs",
    "print_scalar",
    "print_specs",
]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_BARE = re.compile(r"""[^\s,{}="']+""")
_SAFE = re.compile(r"[A-Za-z0-9_.:/*+@-]+")
_SPACE = re.compile(r"\s*")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_UNESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", '"': '\\"'}


@dataclass(frozen=True)
class Place:
    """A place in a text, to point a caret at.

    Attributes:
        text: The whole text.
        position: Index of the place in it.
        file: The file the text was read from, or None.
    """

    text: str = ""
    position: int = 0
    file: str | None = None

    def error(self, message: str, remedy: str | None = None) -> UsageError:
        """Make the error that shows this place."""
        text = self.text or None
        return UsageError(message, text=text, position=self.position, remedy=remedy, file=self.file)


@dataclass(frozen=True)
class Scalar:
    """One value as written: `4`, `float16`, `"a b"`.

    Attributes:
        text: The characters, quotes and escapes resolved.
        quoted: Whether it stood in quotes: then it is a string and nothing else.
        place: Where it was written.
    """

    text: str
    quoted: bool = False
    place: Place = field(default=Place(), compare=False)


@dataclass(frozen=True)
class Argument:
    """One option as written: `name=value,value`, or values without a name.

    Attributes:
        name: The option's name, or None for a bare value.
        values: The values; none of them for an empty list.
        place: Where the option begins.
    """

    name: Scalar | None
    values: tuple[Scalar, ...]
    place: Place = field(default=Place(), compare=False)


@dataclass(frozen=True)
class PassSpec:
    """One pass as written: its name and arguments, not yet looked up."""

    name: str
    arguments: tuple[Argument, ...] = ()
    place: Place = field(default=Place(), compare=False)


def parse_specs(text: str) -> tuple[PassSpec, ...]:
    """Read a pipeline; an empty text is the empty pipeline.

    Raises:
        UsageError: The text does not follow the grammar; it shows the place.
    """
    return _Parser(text).pipeline()


def parse_arguments(text: str) -> tuple[Argument, ...]:
    """Read the options of a pass that stand alone, without its name and braces.

    Raises:
        UsageError: The text does not follow the grammar; it shows the place.
    """
    parser = _Parser(text)
    arguments = parser.listed("a space")
    if parser.at < len(text):
        raise parser.here().error("'}' closes nothing")
    return arguments


def print_specs(specs: Iterable[PassSpec]) -> str:
    """Print a pipeline so that `parse_specs` reads it back."""
    return ",".join(_print_spec(spec) for spec in specs)


def print_scalar(scalar: Scalar) -> str:
    """Print one value, in quotes where it must have them."""
    if not scalar.quoted and _BARE.fullmatch(scalar.text):
        return scalar.text
    return '"' + "".join(_UNESCAPES.get(char, char) for char in scalar.text) + '"'


def is_safe(text: str) -> bool:
    """Tell whether `text` needs no quotes."""
    return bool(_SAFE.fullmatch(text))


def _print_spec(spec: PassSpec) -> str:
    if not spec.arguments:
        return spec.name
    return f"{spec.name}{{{' '.join(_print_argument(a) for a in spec.arguments)}}}"


def _print_argument(argument: Argument) -> str:
    values = ",".join(print_scalar(value) for value in argument.values)
    return values if argument.name is None else f"{print_scalar(argument.name)}={values}"


class _Parser:
    """Recursive descent over one text; every method starts at `self.at` and moves it."""

    def __init__(self, text: str) -> None:
        self.place = Place(text)
        self.text = text
        self.at = 0

    def pipeline(self) -> tuple[PassSpec, ...]:
        self.skip_space()
        specs: list[PassSpec] = []
        while self.at < len(self.text):
            specs.append(self.pass_spec())
            self.skip_space()
            if self.at == len(self.text):
                break
            if self.peek() == "}":
                raise self.here().error("'}' closes nothing")
            if self.peek() != ",":
                raise self.here().error("expected ',' or the end of the pipeline")
            comma = self.here()
            self.at += 1
            self.skip_space()
            if self.at == len(self.text):
                raise comma.error("a pass must follow ','")
        return tuple(specs)

    def pass_spec(self) -> PassSpec:
        place = self.here()
        match = _NAME.match(self.text, self.at)
        if match is None:
            raise place.error("expected the name of a pass")
        self.at = match.end()
        arguments = self.arguments() if self.peek() == "{" else ()
        return PassSpec(match.group(), arguments, place)

    def arguments(self) -> tuple[Argument, ...]:
        brace = self.here()
        self.at += 1
        arguments = self.listed("a space or '}'")
        if self.at == len(self.text):
            raise brace.error("'{' is never closed")
        self.at += 1
        return arguments

    def listed(self, wanted: str) -> tuple[Argument, ...]:
        """Read arguments up to a brace or the end."""
        arguments: list[Argument] = []
        while True:
            spaced = self.skip_space()
            if self.at == len(self.text) or self.peek() == "}":
                return tuple(arguments)
            if arguments and not spaced:
                raise self.here().error(f"expected {wanted}")
            arguments.append(self.argument())

    def argument(self) -> Argument:
        place = self.here()
        first = self.scalar("an option")
        if self.peek() != "=":
            return Argument(None, (first, *self.more_values()), place)
        self.at += 1
        if self.at == len(self.text) or self.peek() in "}" or self.peek().isspace():
            return Argument(first, (), place)
        return Argument(first, (self.scalar("a value"), *self.more_values()), place)

    def more_values(self) -> list[Scalar]:
        values = []
        while self.peek() == ",":
            comma = self.here()
            self.at += 1
            if self.at == len(self.text) or self.peek() in "}," or self.peek().isspace():
                raise comma.error("a value must follow ','", "options are separated by spaces")
            values.append(self.scalar("a value"))
            if self.peek() == "=":
                raise comma.error("options are separated by spaces, not commas")
        if self.peek() == "=":
            raise self.here().error("'=' must be in quotes inside a value")
        return values

    def scalar(self, what: str) -> Scalar:
        place = self.here()
        if self.peek() in ("'", '"'):
            return Scalar(self.quoted(), True, place)
        match = _BARE.match(self.text, self.at)
        if match is None:
            raise place.error(f"expected {what}")
        self.at = match.end()
        return Scalar(match.group(), False, place)

    def quoted(self) -> str:
        start = self.here()
        quote = self.peek()
        self.at += 1
        chars: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            self.at += 1
            if char == quote:
                return "".join(chars)
            if char == "\\" and self.at < len(self.text):
                char = _ESCAPES.get(self.text[self.at], self.text[self.at])
                self.at += 1
            chars.append(char)
        raise start.error("the quoted string is never closed")

    def here(self) -> Place:
        return replace(self.place, position=self.at)

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def skip_space(self) -> bool:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        moved = match.end() > self.at
        self.at = match.end()
        return moved
