"""Python objects, pipeline text and YAML say the same: each converts to the others and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from support import Idle

from lwc.core.errors import LwcError, UsageError
from lwc.pipeline.config import PipelineConfig, from_yaml, to_yaml
from lwc.pipeline.grammar import parse_specs, print_specs
from lwc.pipeline.options import format_value, options_of, parse_value
from lwc.pipeline.passes import Pass
from lwc.pipeline.registry import Registry, default_registry
from lwc.pipeline.spec import parse, to_text

WORDS = st.text(st.characters(codec="utf-8"), max_size=12)
NAMES = WORDS.filter(bool)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers() | st.sampled_from([16, 32, 64, 128]),
    float: st.floats(allow_nan=False) | st.sampled_from([4.0, 4.5]),
    str: WORDS
    | st.sampled_from(["none", "true", "null", "1", "-1", "1e5", "a,b", "=", "~", "80MB"]),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Generate values of any type that an option may have."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(values(member) for member in arguments))
    if origin is tuple and arguments[1] is not Ellipsis:
        return st.tuples(NAMES, values(arguments[1]))
    if origin is tuple and typing.get_origin(arguments[0]) is tuple:
        pairs = st.lists(values(arguments[0]), max_size=4, unique_by=lambda pair: pair[0])
        return pairs.map(tuple)
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=4).map(tuple)
    return st.none() if hint is type(None) else SCALARS[hint]


def instances(cls: type[Pass]) -> st.SearchStrategy[Pass]:
    """Generate passes of a class, options at random, many of them at their defaults."""

    def build(given: dict[str, Any]) -> Pass:
        try:
            return cls(**given)
        except (LwcError, ValueError):
            assume(False)
            raise

    required: dict[str, st.SearchStrategy[Any]] = {}
    optional: dict[str, st.SearchStrategy[Any]] = {}
    for option in options_of(cls):
        (required if option.required else optional)[option.field] = values(option.type)
    return st.fixed_dictionaries(required, optional=optional).map(build)


@dataclass(frozen=True)
class Everything(Idle):
    """Has an option of every kind."""

    name: ClassVar[str] = "everything"
    positional: ClassVar[str] = "label"
    free_options: ClassVar[str] = "dims"

    label: str
    must: tuple[str, ...]
    count: int = 3
    ratio: float = 0.5
    fast: bool = False
    bits: Literal[4, 8] = 4
    mode: Literal["slow", "none", "4"] = "slow"
    limit: int | None = 2
    note: str | None = None
    either: int | str = 1
    mixed: Literal["auto"] | float | bool = "auto"
    ops: tuple[str, ...] = ("MatMul",)
    sizes: tuple[int | str, ...] | None = None
    flags: tuple[bool, ...] = (True,)
    dims: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class PositionalList(Idle):
    """Takes a list first and text under free names."""

    name: ClassVar[str] = "positional-list"
    positional: ClassVar[str] = "first"
    free_options: ClassVar[str] = "rest"

    first: tuple[str, ...] = ()
    rest: tuple[tuple[str, str], ...] = ()


def _registry() -> Registry:
    registry = Registry()
    registry.add(Everything)
    registry.add(PositionalList)
    return registry


REGISTRY = _registry()


def check(passes: list[Pass], registry: Registry) -> None:
    text = to_text(passes)
    again = parse(text, registry)
    assert list(again) == passes
    assert [_types(pass_) for pass_ in again] == [_types(pass_) for pass_ in passes]
    assert to_text(again) == text
    config = PipelineConfig(passes=tuple(passes))
    assert from_yaml(to_yaml(config), registry) == config
    assert from_yaml(f"passes: {_in_yaml_quotes(text)}", registry) == config


def _types(pass_: Pass) -> list[Any]:
    return [repr(getattr(pass_, field.name)) for field in dataclasses.fields(pass_)]


def _in_yaml_quotes(text: str) -> str:
    escaped = "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in text)
    return f'"{escaped}"'


@settings(max_examples=300, deadline=None)
@given(st.lists(instances(Everything) | instances(PositionalList), max_size=3))
def test_synthetic_passes(passes: list[Pass]) -> None:
    check(passes, REGISTRY)


@pytest.mark.parametrize("name", [info.name for info in default_registry().infos()])
# Options that go together are rare where a pass has many.
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_every_registered_pass(name: str, data: st.DataObject) -> None:
    registry = default_registry()
    check([data.draw(instances(registry.load(name)))], registry)


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        PipelineConfig,
        bind=st.dictionaries(WORDS, st.integers()),
        require_match=st.dictionaries(WORDS, st.integers()),
        verify=st.sampled_from(["none", "structural", "numeric"]),
        seed=st.integers(0),
        threads=st.none() | st.integers(1),
        max_memory=st.none() | st.integers(0),
        grant=st.lists(WORDS).map(tuple),
    )
)
def test_settings(config: PipelineConfig) -> None:
    assert from_yaml(to_yaml(config)) == config


@settings(max_examples=300, deadline=None)
@given(data=st.data(), option=st.sampled_from(options_of(Everything)[:-1]))
def test_every_value_is_read_back(data: st.DataObject, option: Any) -> None:
    value = data.draw(values(option.type))
    again = parse_value(option.type, format_value(option.type, value))
    assert (type(again), again) == (type(value), value)


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("ab-1,{}= \"'\\\n"), max_size=24))
@example("1{\\}")
def test_any_text_is_read_or_refused_with_a_caret(text: str) -> None:
    try:
        specs = parse_specs(text)
    except UsageError as error:
        last_line = str(error).rpartition("\n")[2]
    else:
        assert parse_specs(print_specs(specs)) == specs
        return
    assert last_line.strip() == "^"
