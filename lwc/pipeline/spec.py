"""Passes as text and back: `parse(to_text(passes)) == passes`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lwc.core.errors import LwcError, Terminated, UsageError, one_line
from lwc.pipeline.grammar import Argument, PassSpec, Place, Scalar, parse_specs, print_specs
from lwc.pipeline.options import (
    Option,
    did_you_mean,
    format_value,
    free_value_type,
    options_of,
    parse_value,
    type_name,
)
from lwc.pipeline.pass_class import check_pass_class
from lwc.pipeline.passes import Pass
from lwc.pipeline.registry import Registry, default_registry

__all__ = ["build_pass", "parse", "resolve", "to_pass_spec", "to_spec", "to_text"]


def parse(text: str, registry: Registry | None = None) -> tuple[Pass, ...]:
    """Build the passes that a pipeline text names.

    Raises:
        UsageError: The text is malformed, or a pass, option or value in it is unknown.
    """
    return tuple(build_pass(spec, registry) for spec in parse_specs(text))


def resolve(
    passes: str | Pass | Iterable[str | Pass], registry: Registry | None = None
) -> tuple[Pass, ...]:
    """Build passes from what `lwc.optimize` takes: a text, a pass, or a sequence of both.

    Raises:
        UsageError: It is something else, a text that is malformed, or a pass that is.
    """
    if isinstance(passes, str):
        return parse(passes, registry)
    if isinstance(passes, Pass):
        check_pass_class(type(passes))
        return (passes,)
    if not isinstance(passes, Iterable):
        raise UsageError(f"a pipeline is a string, a Pass or a list, not {passes!r}")
    found: list[Pass] = []
    for item in passes:
        if isinstance(item, type) and issubclass(item, Pass):
            raise UsageError(
                f"{item.__qualname__} is a class, not a pass", remedy=f"give {item.__qualname__}()"
            )
        if not isinstance(item, str | Pass):
            raise UsageError(f"a pass is a string or a Pass object, not {type(item).__name__}")
        found.extend(resolve(item, registry))
    return tuple(found)


def build_pass(spec: PassSpec, registry: Registry | None = None) -> Pass:
    """Look up one written pass and give it its options.

    Raises:
        UsageError: The pass or an option is unknown, given twice, missing or of a wrong type.
    """
    cls = (registry or default_registry()).load(spec.name, spec.place)
    fields = {option.field: option for option in options_of(cls)}
    named = {option.name: option for option in fields.values() if option.field != cls.free_options}
    values: dict[str, Any] = {}
    free: dict[str, Any] = {}
    for index, argument in enumerate(spec.arguments):
        option = _option_of(argument, index, cls, named)
        if option is None:
            assert argument.name is not None
            assert cls.free_options is not None
            if argument.name.text in free:
                raise argument.place.error(f"'{argument.name.text}' is given twice")
            hint = free_value_type(fields[cls.free_options].type)
            free[argument.name.text] = _value(hint, argument, argument.name.text)
            continue
        if option.field in values:
            raise argument.place.error(f"option '{option.name}' is given twice")
        values[option.field] = _value(option.type, argument, option.name)
    if free:
        assert cls.free_options is not None
        values[cls.free_options] = tuple(free.items())
    for option in named.values():
        if option.required and option.field not in values:
            raise spec.place.error(
                f"pass '{cls.name}' needs option '{option.name}' ({type_name(option.type)})"
            )
    return _construct(cls, values, spec.place)


def to_pass_spec(pass_: Pass) -> PassSpec:
    """Write one pass with the options that differ from their defaults.

    Raises:
        UsageError: A field holds a value that its type does not allow.
    """
    cls = type(pass_)
    arguments: list[Argument] = []
    for option in options_of(cls):
        value = getattr(pass_, option.field)
        if not option.required and value == option.default:
            continue
        try:
            if option.field == cls.free_options:
                hint = free_value_type(option.type)
                arguments.extend(
                    Argument(_free_name(name, cls), format_value(hint, item))
                    for name, item in value
                )
                continue
            written = format_value(option.type, value)
        except ValueError as error:
            raise UsageError(f"pass '{cls.name}', option '{option.name}': {error}") from error
        if option.field == cls.positional and written:
            arguments.insert(0, Argument(None, written))
        else:
            arguments.append(Argument(Scalar(option.name), written))
    return PassSpec(cls.name, tuple(arguments))


def to_spec(pass_: Pass) -> str:
    """Print one pass; see `to_pass_spec`."""
    return to_text([pass_])


def to_text(passes: Sequence[Pass]) -> str:
    """Print a pipeline that `parse` reads back to equal passes."""
    return print_specs(to_pass_spec(pass_) for pass_ in passes)


def _option_of(
    argument: Argument, index: int, cls: type[Pass], named: dict[str, Option]
) -> Option | None:
    """Find the option an argument means; None for a free one."""
    if argument.name is None:
        positional = next((o for o in named.values() if o.field == cls.positional), None)
        if positional is None:
            raise argument.place.error(
                f"pass '{cls.name}' takes options as name=value", _known(argument.values[0], named)
            )
        if index > 0:
            raise argument.place.error(
                f"the value of '{positional.name}' comes first, or write {positional.name}=…"
            )
        return positional
    name = argument.name.text
    if name in named and not argument.name.quoted:
        return named[name]
    if cls.free_options is not None:
        return None
    raise argument.place.error(
        f"pass '{cls.name}' has no option '{name}'", _known(argument.name, named)
    )


def _known(word: Scalar, named: dict[str, Option]) -> str:
    if not named:
        return "it has no options"
    return did_you_mean(word.text, named) or f"it has: {', '.join(named)}"


def _value(hint: Any, argument: Argument, name: str) -> Any:
    try:
        return parse_value(hint, argument.values)
    except ValueError as error:
        place = argument.values[0].place if argument.values else argument.place
        raise place.error(f"option '{name}': {error}") from error


def _free_name(name: str, cls: type[Pass]) -> Scalar:
    """Write a free option's name; one that is also a declared option stands in quotes."""
    declared = any(o.name == name for o in options_of(cls) if o.field != cls.free_options)
    return Scalar(name, quoted=declared)


def _construct(cls: type[Pass], values: dict[str, Any], place: Place) -> Pass:
    try:
        return cls(**values)
    except LwcError as error:
        raise place.error(f"pass '{cls.name}': {error.message}", error.remedy) from error
    except (ValueError, TypeError) as error:
        raise place.error(f"pass '{cls.name}': {' '.join(str(error).split())}") from error
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        raise place.error(
            f"pass '{cls.name}' cannot be made with these options: {one_line(error)}"
        ) from error
