"""Cache policies as text: `full`, `window{512 sink=4}`, `h2o{heavy=128 recent=128}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields

from lwc.core.errors import UsageError
from lwc.generate.policies import CachePolicy, FullCache, HeavyHitters, WindowCache
from lwc.pipeline.grammar import Argument, Scalar, parse_specs
from lwc.pipeline.options import did_you_mean, parse_value

__all__ = ["POLICIES", "parse_policy"]

POLICIES: Mapping[str, type[CachePolicy]] = {
    "full": FullCache,
    "window": WindowCache,
    "h2o": HeavyHitters,
}


def parse_policy(text: str) -> CachePolicy:
    """Read a policy: its name, and its options in braces, separated by spaces.

    Options are numbers; a bare one is the first option.

    Raises:
        UsageError: The text is something else; it shows the place.
    """
    specs = parse_specs(text)
    if len(specs) != 1:
        raise UsageError(f"one cache policy is wanted, not '{text}'", remedy=_KNOWN)
    (spec,) = specs
    kind = POLICIES.get(spec.name)
    if kind is None:
        raise spec.place.error(
            f"unknown cache policy '{spec.name}'", did_you_mean(spec.name, POLICIES) or _KNOWN
        )
    options = {field.name: field.default for field in fields(kind)}
    values: dict[str, int] = {}
    for argument in spec.arguments:
        name = _name(argument, list(options))
        if name in values:
            raise argument.place.error(f"option '{name}' is given twice")
        try:
            values[name] = parse_value(int, argument.values)
        except ValueError as error:
            raise argument.place.error(f"option '{name}': {error}") from None
    missing = [name for name, each in options.items() if each is MISSING and name not in values]
    if missing:
        raise spec.place.error(f"'{spec.name}' needs a number for '{missing[0]}'")
    return kind(**values)


_KNOWN = f"policies are {', '.join(POLICIES)}"


def _name(argument: Argument, known: list[str]) -> str:
    word: Scalar | None = argument.name
    if word is None and known:
        return known[0]
    if word is None or word.text not in known:
        said = argument.values[0].text if word is None else word.text
        near = did_you_mean(said, known)
        raise argument.place.error(
            f"no option '{said}'", near or (f"options are {', '.join(known)}" if known else None)
        )
    return word.text
