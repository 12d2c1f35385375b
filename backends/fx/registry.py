"""The table of operators: what computes each of them in PyTorch.

To add an operator, write a function in the file of its family under `ops/` and decorate it:

    @op("ThresholdedRelu")
    def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
        return torch.where(x > alpha, x, 0.0)

It takes the operator's inputs in order, None for one that is absent, and the attributes by the
names that ONNX gives them, with ONNX's defaults; an attribute that it does not name is refused when
a module is lowered. A parameter named like both an input and an attribute takes either, which
serves operators whose attribute became an input (`axes`). Of an attribute that is annotated as a
`Literal`, other values are refused too. It returns a tensor, or a tuple where
the node uses several outputs: how many is passed as `outputs`, if it takes that.

Defaults of 0 and 1 are written as integers, of floats too: torch.compile takes other floats that
are not in the call for variables, and starts again at each that decides a branch.

The options of `op` say what else it wants to be given; `host` adds the same operator on Python
integers, for the arithmetic of extents. Several functions of one operator are told apart by the
opset version they came with. A domain other than the standard one is written `domain::Op`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import onnx_ir as ir

from lwc.core.extensions import is_again, note_extension

__all__ = ["HOST", "Host", "Lowering", "Use", "direct", "find", "host", "known_operators", "op"]

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


@dataclass(frozen=True)
class Use:
    """A node as it is lowered: what an operator may ask of it.

    Attributes:
        node: The node.
        dtypes: Element type of each input, None where it is absent or not known.
        outputs: Number of outputs up to the last one that is named.
        opset: Version of the operator's domain.
    """

    node: ir.Node
    dtypes: tuple[ir.DataType | None, ...]
    outputs: int
    opset: int

    def dtype(self, index: int) -> ir.DataType | None:
        """Return the element type of an input."""
        return self.dtypes[index] if index < len(self.dtypes) else None

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return the value of an attribute."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value


@dataclass(frozen=True)
class Lowering:
    """How one operator, from one opset version on, is computed.

    Attributes:
        function: What is called.
        since: The first opset version it serves.
        values: Positions of inputs that it takes as Python numbers or lists of them.
        either: Positions of inputs that it takes so where they are at hand, else as tensors.
        types: Attributes that name an element type: given as a torch.dtype, or as a string
            where PyTorch has none.
        ignored: Attributes that change nothing here.
        zero: Attributes that may be there, but not set.
        many: It returns a tuple even for one output.
        wide: It is given int64 for the unsigned types that PyTorch does not compute with.
        exact: It is given integers where gradients made floats of them.
        extra: More keyword arguments, from the node.
        most: How many inputs it takes; None for any number.
        accepts: Its parameters by name, with their defaults.
        choices: The values that an attribute may have, of those that have few.
    """

    function: Callable[..., Any]
    since: int
    values: frozenset[int]
    either: frozenset[int]
    types: frozenset[str]
    ignored: frozenset[str]
    zero: frozenset[str]
    many: bool
    wide: bool
    exact: bool
    extra: Callable[[Use], Mapping[str, Any]] | None
    most: int | None
    accepts: Mapping[str, Any]
    choices: Mapping[str, tuple[Any, ...]]


_LOWERINGS: dict[str, list[Lowering]] = {}


def op(
    names: str,
    *,
    since: int = 1,
    values: Iterable[int] = (),
    either: Iterable[int] = (),
    types: str = "",
    ignored: str = "",
    zero: str = "",
    many: bool = False,
    wide: bool = False,
    exact: bool = False,
    extra: Callable[[Use], Mapping[str, Any]] | None = None,
) -> Callable[[AnyFunction], AnyFunction]:
    """Register a function for the operators named, with spaces between them.

    Args:
        names: `Op` or `domain::Op`.
        since: The opset version from which on it serves.
        values: Positions of the inputs it takes as Python numbers or lists of them.
        either: Positions of the inputs it takes so where they are at hand, else as tensors.
        types: Attributes that name an element type, with spaces between them.
        ignored: Attributes that change nothing, likewise.
        zero: Attributes that are refused unless they are 0 or empty, likewise.
        many: It returns a tuple even for one output.
        wide: It is given int64 for uint16, uint32 and uint64, and its result is turned back.
        exact: It is given integers where gradients made floats of them, which end there.
        extra: Gives more keyword arguments for a node.

    Raises:
        ValueError: Another function computes one of them since that version.
    """

    def register(function: AnyFunction) -> AnyFunction:
        if not note_extension(function).startswith("lwc."):
            from lwc.backends.fx import ops  # noqa: F401 (whose names are taken)
        lowering = Lowering(
            function,
            since,
            frozenset(values),
            frozenset(either),
            frozenset(types.split()),
            frozenset(ignored.split()),
            frozenset(zero.split()),
            many,
            wide,
            exact,
            extra,
            _most_inputs(function),
            _parameters(function),
            _choices(function),
        )
        for name in names.split():
            entries = _LOWERINGS.setdefault(name, [])
            known = next((each for each in entries if each.since == since), None)
            if known is not None and not is_again(known.function, function):
                raise ValueError(f"operator '{name}' is registered twice since version {since}")
            if known is not None:
                entries.remove(known)
            entries.append(lowering)
            entries.sort(key=lambda each: each.since)
        return function

    return register


def direct(
    table: Mapping[str, Callable[..., Any]], *, wide: bool = False, exact: bool = False
) -> None:
    """Register PyTorch's own functions for operators without attributes that they are."""
    for name, function in table.items():
        op(name, wide=wide, exact=exact)(function)


def _most_inputs(function: Callable[..., Any]) -> int | None:
    try:
        kinds = [each.kind for each in inspect.signature(function).parameters.values()]
    except ValueError:  # a function in C
        return None
    several = inspect.Parameter.VAR_POSITIONAL
    return None if several in kinds else sum(kind < several for kind in kinds)


def _parameters(function: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a function in C: it is given no attributes
        return {}
    return {name: each.default for name, each in parameters.items()}


def _choices(function: Callable[..., Any]) -> Mapping[str, tuple[Any, ...]]:
    if not inspect.isfunction(function):
        return {}
    hints = get_type_hints(function)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def find(name: str, opset: int) -> Lowering | None:
    """Return what computes an operator at an opset version, or None."""
    served = [each for each in _LOWERINGS.get(name, ()) if each.since <= opset]
    return served[-1] if served else None


def known_operators() -> frozenset[str]:
    """Return the operators that have a lowering, by `Op` or `domain::Op`."""
    return frozenset(_LOWERINGS)


@dataclass(frozen=True)
class Host:
    """An operator on Python integers: an int for a scalar, a list for a vector.

    Attributes:
        function: Takes inputs and attributes as those of `op` do.
        tensors: Positions of inputs that it takes as tensors.
        accepts: Its parameters by name, with their defaults.
    """

    function: Callable[..., Any]
    tensors: frozenset[int]
    accepts: Mapping[str, Any]


HOST: dict[str, Host] = {}
"""The operators that extents are computed with."""


def host(names: str, *, tensors: Iterable[int] = ()) -> Callable[[AnyFunction], AnyFunction]:
    """Register a function on Python integers for the operators named.

    Args:
        names: `Op`, with spaces between them.
        tensors: Positions of inputs that it takes as tensors.
    """

    def register(function: AnyFunction) -> AnyFunction:
        note_extension(function)
        for name in names.split():
            HOST[name] = Host(function, frozenset(tensors), _parameters(function))
        return function

    return register
