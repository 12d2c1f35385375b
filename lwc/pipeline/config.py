"""Pipelines as YAML: passes with their options, and the settings of a run.

    passes:
      - canonicalize
      - quantize-weights: {bits: 4, exclude: [lm_head]}
    bind: {batch: 1}
    verify: numeric

Values are read as written, by the rules of the pipeline text: YAML's own guesses (`yes`, `1e-5`
as a string) play no part. Errors point at the place in the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from lwc.core.errors import InputError, UsageError
from lwc.pipeline.grammar import Argument, PassSpec, Place, Scalar, is_safe
from lwc.pipeline.options import did_you_mean, format_value, parse_value
from lwc.pipeline.passes import Pass, Verify, check_settings
from lwc.pipeline.registry import Registry
from lwc.pipeline.spec import build_pass, parse, to_pass_spec, to_spec

__all__ = ["PipelineConfig", "from_yaml", "read_config", "to_yaml"]


@dataclass(frozen=True)
class PipelineConfig:
    """A pipeline and the settings of a run.

    Attributes:
        passes: The passes.
        bind: Numbers for symbolic dimensions, by name; bound before the first pass.
        require_match: Least number of rewrites, by pass name.
        verify: How to check each pass.
        seed: Seed of everything random.
        threads: Threads of the backend, or None for its choice.
        max_memory: Bound in bytes on what one step of a pass may hold, or None.
        grant: Assumptions the user vouches for, by their first words, or `all`.
    """

    passes: tuple[Pass, ...] = ()
    bind: Mapping[str, int] = field(default_factory=dict)
    require_match: Mapping[str, int] = field(default_factory=dict)
    verify: Verify = "structural"
    seed: int = 0
    threads: int | None = None
    max_memory: int | None = None
    grant: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self.verify, self.seed, self.threads, self.max_memory)


def read_config(path: str, registry: Registry | None = None) -> PipelineConfig:
    """Read a YAML file.

    Raises:
        InputError: There is no such file, or it is no text.
        UsageError: See `from_yaml`.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read the configuration: {reason}", file=path) from error
    return from_yaml(text, registry, file=path)


def from_yaml(
    text: str, registry: Registry | None = None, *, file: str | None = None
) -> PipelineConfig:
    """Read a configuration.

    Raises:
        UsageError: The text is no YAML, or a key, pass, option or value in it is unknown.
    """
    place = Place(text, 0, file)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = dataclasses.replace(place, position=mark.index if mark else 0)
        raise where.error(f"not YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError:
        raise place.error("nests too deeply") from None
    if root is None:
        return PipelineConfig()
    values: dict[str, Any] = {}
    for key, node in _pairs(root, place):
        if key.text in values:
            raise key.place.error(f"'{key.text}' is given twice")
        values[key.text] = _read_setting(key, node, place, registry)
    return PipelineConfig(**{name.replace("-", "_"): value for name, value in values.items()})


def to_yaml(config: PipelineConfig) -> str:
    """Print a configuration that `from_yaml` reads back; settings at their defaults are left out.

    Raises:
        UsageError: A pass or a setting holds a value that cannot be written.
    """
    passes = [_pass_node(each) for each in config.passes]
    pairs: list[tuple[yaml.Node, yaml.Node]] = [
        (_scalar_node(Scalar("passes")), yaml.SequenceNode(_SEQ, passes, flow_style=not passes))
    ]
    for item in dataclasses.fields(PipelineConfig):
        value = getattr(config, item.name)
        if item.name == "passes" or value == getattr(PipelineConfig(), item.name):
            continue
        name = item.name.replace("_", "-")
        pairs.append((_scalar_node(Scalar(name)), _setting_node(name, value)))
    root = yaml.MappingNode(_MAP, pairs, flow_style=False)
    return str(yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True, width=1000))


_SEQ = "tag:yaml.org,2002:seq"
_MAP = "tag:yaml.org,2002:map"
_STR = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"

_RESOLVER: Any = yaml.resolver.Resolver()
"""Knows the tag a plain scalar gets; a node with that tag is printed without quotes."""

_COUNTS = ("bind", "require-match")
"""Settings that map names to integers."""

_VALUES: dict[str, Any] = {
    "verify": Verify,
    "seed": int,
    "threads": int | None,
    "max-memory": int | None,
    "grant": tuple[str, ...],
}
"""Settings that are written like options of a pass."""


def _read_setting(key: Scalar, node: Any, place: Place, registry: Registry | None) -> Any:
    if key.text == "passes":
        return _read_passes(node, place, registry)
    if key.text in _COUNTS:
        counts = {}
        for name, item in _pairs(node, place):
            if name.text in counts:
                raise name.place.error(f"'{name.text}' is given twice")
            counts[name.text] = _read_value(int, name.text, item, place)
        return counts
    if key.text in _VALUES:
        return _read_value(_VALUES[key.text], key.text, node, place)
    known = ("passes", *_COUNTS, *_VALUES)
    raise key.place.error(
        f"unknown setting '{key.text}'",
        did_you_mean(key.text, known) or f"there are: {', '.join(known)}",
    )


def _read_value(hint: Any, name: str, node: Any, place: Place) -> Any:
    try:
        return parse_value(hint, _scalars(node, place))
    except ValueError as error:
        raise _at(node, place).error(f"'{name}': {error}") from error


def _read_passes(node: Any, place: Place, registry: Registry | None) -> tuple[Pass, ...]:
    """Read one pipeline text, or a list of texts and `name: {option: value}`."""
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    passes: list[Pass] = []
    for item in items:
        if isinstance(item, yaml.ScalarNode):
            if item.tag != _NULL:
                passes.extend(parse(item.value, registry))
            continue
        pairs = _pairs(item, place)
        if len(pairs) != 1:
            raise _at(item, place).error("expected one pass here: `- name: {option: value}`")
        name, options = pairs[0]
        arguments = tuple(
            Argument(key, _scalars(value, place), key.place)
            for key, value in _pairs(options, place)
        )
        passes.append(build_pass(PassSpec(name.text, arguments, name.place), registry))
    return tuple(passes)


def _pairs(node: Any, place: Place) -> list[tuple[Scalar, Any]]:
    """Return the items of a mapping; an empty value is the empty mapping."""
    if isinstance(node, yaml.ScalarNode) and node.tag == _NULL:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise _at(node, place).error("expected a mapping (`name: value`)")
    return [(_scalar(key, place), value) for key, value in node.value]


def _scalars(node: Any, place: Place) -> tuple[Scalar, ...]:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return tuple(_scalar(item, place) for item in items)


def _scalar(node: Any, place: Place) -> Scalar:
    if not isinstance(node, yaml.ScalarNode):
        raise _at(node, place).error("expected a single value")
    text = "none" if node.tag == _NULL else node.value
    return Scalar(text, node.style is not None, _at(node, place))


def _at(node: Any, place: Place) -> Place:
    return dataclasses.replace(place, position=node.start_mark.index)


def _pass_node(pass_: Pass) -> yaml.Node:
    spec = to_pass_spec(pass_)
    if not spec.arguments:
        return _scalar_node(Scalar(spec.name))
    names = [argument.name for argument in spec.arguments]
    if any(name is not None and name.quoted for name in names):
        return _scalar_node(Scalar(to_spec(pass_), quoted=True))
    pairs = [
        (
            _scalar_node(argument.name or Scalar((type(pass_).positional or "").replace("_", "-"))),
            _values_node(argument.values),
        )
        for argument in spec.arguments
    ]
    options = yaml.MappingNode(_MAP, pairs, flow_style=True)
    pair = (_scalar_node(Scalar(spec.name)), options)
    return yaml.MappingNode(_MAP, [pair], flow_style=False)


def _setting_node(name: str, value: Any) -> yaml.Node:
    if isinstance(value, Mapping):
        pairs = [
            (_scalar_node(Scalar(key)), _value_node(int, key, item)) for key, item in value.items()
        ]
        return yaml.MappingNode(_MAP, pairs, flow_style=True)
    return _value_node(_VALUES[name], name, value)


def _value_node(hint: Any, name: str, value: Any) -> yaml.Node:
    try:
        return _values_node(format_value(hint, value))
    except ValueError as error:
        raise UsageError(f"'{name}': {error}") from error


def _values_node(values: tuple[Scalar, ...]) -> yaml.Node:
    if len(values) == 1:
        return _scalar_node(values[0])
    return yaml.SequenceNode(_SEQ, [_scalar_node(value) for value in values], flow_style=True)


def _scalar_node(scalar: Scalar) -> yaml.Node:
    """Make a node that is read back as `scalar`: in quotes exactly where it must be."""
    tag: str = _RESOLVER.resolve(yaml.ScalarNode, scalar.text, (True, False))
    if scalar.quoted or tag == _NULL or not is_safe(scalar.text):
        return yaml.ScalarNode(_STR, scalar.text, style='"')
    return yaml.ScalarNode(tag, scalar.text)
