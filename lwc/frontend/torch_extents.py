"""What a traced program asks of the extents of its inputs.

`torch.export` follows one way through a module, that of the example inputs, and notes what must
hold of other extents for that way to be theirs too. PyTorch's exporter drops these conditions.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy

from lwc.core.diagnostics import Remark, RemarkKind, describe_origin
from lwc.core.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Axis",
    "Origin",
    "axes_of",
    "check_extents",
    "fixing_place",
    "names_of",
    "noting_origins",
    "requests",
    "shape_environment",
]

_TRIED = (*range(1, 13), 16, 24, 32, 48, 64, 100, 128, 1000, 1024, 4097, 1 << 17, 10**6 + 3)
"""Extents at which conditions are tried, beside some about the example's."""

_DRAWS = 64
"""Trials of a condition on several extents."""


@dataclass(frozen=True)
class Origin:
    """Who asked for a condition.

    Attributes:
        place: The node or line of the module, for a person; empty where it is not known.
        internal: Whether it was PyTorch's own code, and not the module's.
        checked: Whether the module itself refuses what does not satisfy it: the condition is one of
            `torch._check`, and no branch that was taken.
    """

    place: str = ""
    internal: bool = False
    checked: bool = False


_RANGE = Origin()

_BRANCH = "evaluate_expr"
"""How PyTorch's message of a condition begins that decided a branch."""


@dataclass(frozen=True)
class Axis:
    """A dimension of an input.

    Attributes:
        input: Name of the input.
        number: Which of its dimensions.
        request: What `dynamic_shapes` has for it, or None.
        extent: Its extent in the program: an int, or an expression of PyTorch's symbols.
        example: The extent it was traced at, or None.
    """

    input: str
    number: int
    request: Any
    extent: Any
    example: int | None

    @property
    def own_name(self) -> str | None:
        """The name the user gave it."""
        given = self.request
        return given if isinstance(given, str) else getattr(given, "__name__", None)

    @property
    def name(self) -> str:
        """What it is called."""
        return self.own_name or f"{self.input}_dim{self.number}"

    @property
    def may_be_fixed(self) -> bool:
        """Whether nobody asks that it be dynamic: `Dim.AUTO` leaves that to PyTorch."""
        kind = getattr(getattr(self.request, "type", None), "name", "")
        return self.request is None or kind == "AUTO"

    def __str__(self) -> str:
        return f"dimension {self.number} of '{self.input}'"


@contextlib.contextmanager
def noting_origins() -> Iterator[dict[Any, Origin]]:
    """Note the conditions on extents that PyTorch meets, and who asked for each.

    PyTorch itself forgets the places, and conditions that only narrow the range of an extent.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    original = ShapeEnv.guard_or_defer_runtime_assert
    found: dict[Any, Origin] = {}

    def noting(self: Any, condition: Any, message: str, *args: Any, **kwargs: Any) -> Any:
        if condition not in found and not self._suppress_guards_tls():
            found[condition] = _origin(checked=not message.startswith(_BRANCH))
        return original(self, condition, message, *args, **kwargs)

    ShapeEnv.guard_or_defer_runtime_assert = noting
    try:
        yield found
    finally:
        ShapeEnv.guard_or_defer_runtime_assert = original


def _origin(checked: bool) -> Origin:
    import torch
    import torch.fx.traceback

    library = os.path.join(os.path.dirname(torch.__file__), "")
    symbols = (torch.__file__, os.path.join(library, "fx", "experimental"))
    own, asking, place = os.path.dirname(__file__), None, ""
    frame: Any = sys._getframe(2)
    while frame is not None and os.path.dirname(frame.f_code.co_filename) != own:
        file = frame.f_code.co_filename
        if file not in (contextlib.__file__, functools.__file__):
            asking = asking or (None if file.startswith(symbols) else file)
            if not file.startswith((library, "<")):
                place = f"{os.path.basename(file)}:{frame.f_lineno}"
                break
        frame = frame.f_back
    node = torch.fx.traceback.get_current_meta().get("onnx")
    internal = (asking or "").startswith(library)
    return Origin(describe_origin(node) if node else place, internal, checked)


def fixing_place(origins: Mapping[Any, Origin]) -> str | None:
    """Return the one place that asks for a number as an extent, where there is one."""
    places = {
        origin.place
        for condition, origin in origins.items()
        if isinstance(condition, sympy.Eq) and len(condition.free_symbols) == 1 and origin.place
    }
    return places.pop() if len(places) == 1 else None


def requests(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> list[Any]:
    """Return what `dynamic_shapes` has for each input of the program, in order."""
    from torch.export.dynamic_shapes import _tree_map_with_path

    if not dynamic_shapes:
        return []
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    wanted = (
        dynamic_shapes
        if isinstance(dynamic_shapes, Mapping)
        else dict(zip(given, dynamic_shapes, strict=True))
    )
    found: list[Any] = []
    # The program has its inputs in the order of the call.
    for name in [*(name for name in given if name not in kwargs), *kwargs]:
        _tree_map_with_path(lambda _, __, each: found.append(each), given[name], wanted[name])
    return found


def axes_of(
    program: torch.export.ExportedProgram, asked: Sequence[Any], names: Sequence[str] | None
) -> list[Axis]:
    """Return the dimensions of the program's inputs.

    Args:
        program: The program.
        asked: See `requests`; empty where it is not known.
        names: What the inputs that are tensors are called, if not as in the program.
    """
    places = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs = [
        node
        for node, each in zip(places, program.graph_signature.input_specs, strict=True)
        if each.kind.name == "USER_INPUT"
    ]
    axes, called = [], iter(names or ())
    for node, given in zip(inputs, asked or [None] * len(inputs), strict=True):
        if not hasattr(node.meta.get("val"), "shape"):
            continue
        name = next(called, node.name)
        by_axis = dict(enumerate(given)) if isinstance(given, list | tuple) else given or {}
        rank = len(node.meta["val"].shape)
        for number in by_axis:
            if not 0 <= number < rank:
                raise InputError(
                    f"dynamic_shapes has a dimension {number} for '{name}', whose {rank} "
                    "dimensions are counted from 0"
                )
        for number, extent in enumerate(node.meta["val"].shape):
            known = isinstance(extent, int)
            axes.append(
                Axis(
                    name,
                    number,
                    by_axis.get(number),
                    extent if known else extent.node.expr,
                    extent if known else extent.node.hint,
                )
            )
    return axes


def names_of(axes: Iterable[Axis]) -> dict[str, str]:
    """Map PyTorch's symbols to the names the user gave, the first for each."""
    found: dict[str, str] = {}
    for axis in axes:
        symbols = getattr(axis.extent, "free_symbols", ())
        # A derived dimension, `2 * n`, brings the name of its root.
        root = getattr(axis.request, "root", axis.request)
        name = root if isinstance(root, str) else getattr(root, "__name__", None)
        if name and len(symbols) == 1 and (root is not axis.request or axis.extent in symbols):
            found.setdefault(str(*symbols), name)
    return found


@dataclass(frozen=True)
class _Condition:
    """What must hold of extents.

    Attributes:
        relation: Over symbols that are called as the dimensions are.
        origin: Who asks for it.
    """

    relation: Any
    origin: Origin

    def holds(self, extents: Mapping[Any, int]) -> bool:
        try:
            return bool(self.relation.xreplace({k: sympy.Integer(v) for k, v in extents.items()}))
        except (TypeError, ZeroDivisionError):  # undecided
            return False

    def __str__(self) -> str:
        text = str(self.relation)
        if isinstance(self.relation, sympy.core.relational.Relational):
            text = f"{self.relation.lhs} {self.relation.rel_op} {self.relation.rhs}"
        return f"{text} ({self.origin.place})" if self.origin.place else text


def check_extents(
    program: torch.export.ExportedProgram, axes: Sequence[Axis], origins: Mapping[Any, Origin]
) -> tuple[list[Remark], dict[str, int]]:
    """Tell for which extents the program is right.

    Args:
        program: The program.
        axes: The dimensions of its inputs.
        origins: See `noting_origins`; empty for a program that was captured elsewhere.

    Returns:
        What the user should know, and PyTorch's symbols that can have but one value.

    Raises:
        InputError: A dimension that was asked to be dynamic can have but one extent.
    """
    _check_names(axes)
    remarks = [
        _remark("note", f"{axis} is fixed at {axis.extent}: the module allows no other extent")
        for axis in axes
        if axis.request is not None and axis.may_be_fixed and isinstance(axis.extent, int)
    ]
    by_symbol: dict[Any, list[Axis]] = defaultdict(list)
    for axis in axes:
        if getattr(axis.extent, "is_Symbol", False):
            by_symbol[axis.extent].append(axis)
    called = names_of(axes)
    names = {
        each: sympy.Symbol(called.get(str(each), same[0].name), integer=True, positive=True)
        for each, same in by_symbol.items()
    }
    remarks += _related(axes, names)
    # Programs that were captured elsewhere are mostly specialized at 0 and 1.
    least = 1 if origins else 2
    values: dict[Any, set[int]] = {}
    for each, same in by_symbol.items():
        tried = _trials(same, least)
        values[names[each]] = values.get(names[each], tried) & tried
    conditions = sorted(
        _conditions(program, names, origins),
        key=lambda each: (
            each.origin is _RANGE,
            not each.origin.place,
            each.origin.internal,
            len(str(each.relation)),
        ),
    )
    fixed: dict[Any, int] = {}
    for name, tried in values.items():
        own = [each for each in conditions if each.relation.free_symbols == {name}]
        kept, allowed = _narrowing(name, tried, own)
        if kept and len(allowed) == 1:
            (fixed[name],) = allowed
            same = [a for each, all_of in by_symbol.items() if names[each] == name for a in all_of]
            remarks.append(_fixed(same, fixed[name], kept))
        else:
            remarks += _told(kept)
        values[name] = allowed or tried
    joint = [each for each in conditions if len(each.relation.free_symbols) > 1]
    remarks += _told(_joint(joint, values))
    return remarks, {str(each): fixed[name] for each, name in names.items() if name in fixed}


def _remark(kind: RemarkKind, message: str) -> Remark:
    return Remark(kind, "trace", message)


def _told(conditions: Mapping[_Condition, set[int]]) -> Iterator[Remark]:
    checked = [str(each) for each in conditions if each.origin.checked]
    taken = {each: forbidden for each, forbidden in conditions.items() if not each.origin.checked}
    # Modules ask whether there is more than one token or row, mostly to no effect on what one gets.
    beside = [str(each) for each, forbidden in taken.items() if forbidden == {1}]
    right = [str(each) for each, forbidden in taken.items() if forbidden != {1}]
    if right:
        yield _remark("warning", f"right only where {' and '.join(right)}")
    if beside:
        yield _remark("note", f"right where {' and '.join(beside)}, perhaps not at 1")
    if checked:
        yield _remark("note", f"the module itself asks for {' and '.join(checked)}")


def _check_names(axes: Sequence[Axis]) -> None:
    """Check that dimensions of one name have one extent, which torch.export does for a Dim."""
    first: dict[str, Axis] = {}
    for axis in axes:
        if axis.own_name:
            other = first.setdefault(axis.own_name, axis)
            if axis.example != other.example:
                raise InputError(
                    f"'{axis.own_name}' names {other}, whose example has {other.example}, and "
                    f"{axis}, whose example has {axis.example}",
                    remedy="give them two names",
                )


def _related(axes: Sequence[Axis], names: Mapping[Any, Any]) -> Iterator[Remark]:
    """Tell of dimensions with names of their own that depend on others."""
    for axis in axes:
        if axis.own_name and not isinstance(axis.extent, int) and not hasattr(axis.request, "root"):
            found = axis.extent.xreplace(names)
            if str(found) != axis.own_name:
                yield _remark(
                    "warning", f"right only where {axis.own_name} == {found}, as {axis} is called"
                )


def _trials(axes: Iterable[Axis], least: int) -> set[int]:
    """Return extents to try, within the ranges that the user gave."""
    tried = set(_TRIED)
    for axis in axes:
        if axis.example is not None:
            about = range(axis.example - 2, axis.example + 3)
            tried |= {*about, *(axis.example * factor for factor in (2, 3, 4, 8))}
    for axis in axes:
        low, high = getattr(axis.request, "min", None), getattr(axis.request, "max", None)
        least = max(least, low or 0)
        tried = {each for each in tried if each >= least and (high is None or each <= high)}
    return tried


def _conditions(
    program: torch.export.ExportedProgram, names: Mapping[Any, Any], origins: Mapping[Any, Origin]
) -> Iterator[_Condition]:
    """Yield what must hold of the extents of inputs."""
    shapes = shape_environment(program)
    if shapes is None:
        return
    noted = dict(origins) or dict(_asserted(program, shapes))
    # Ranges follow from the others, as far as these are known.
    for symbol, allowed in program.range_constraints.items():
        noted.setdefault(sympy.Ge(symbol, allowed.lower), _RANGE)
        noted.setdefault(sympy.Le(symbol, allowed.upper), _RANGE)
    for relation, origin in noted.items():
        named = shapes.replace(relation).xreplace(names)
        # Conditions on numbers that are read from tensors concern no extent of an input.
        if named.free_symbols and named.free_symbols <= set(names.values()):
            yield _Condition(named, origin)


def _asserted(program: torch.export.ExportedProgram, shapes: Any) -> Iterator[tuple[Any, Origin]]:
    """Yield the assertions of a program that was captured elsewhere."""
    for node in program.graph.nodes:
        if "_assert_scalar" in str(node.target) and hasattr(node.args[0], "meta"):
            held = getattr(node.args[0].meta.get("val"), "node", None)
            yield getattr(held, "expr", sympy.true), Origin()
    for guard in shapes.guards:
        yield guard.expr, Origin()
    for asserted in itertools.chain.from_iterable(shapes.deferred_runtime_asserts.values()):
        yield asserted.expr, Origin(checked=not asserted.msg.startswith(_BRANCH))


def _narrowing(
    name: Any, tried: set[int], conditions: Iterable[_Condition]
) -> tuple[dict[_Condition, set[int]], set[int]]:
    """Return the conditions that forbid extents, with these, and the extents that all allow.

    What PyTorch's own operators ask of an extent of 1 concerns strides and broadcasts, which
    ONNX's work out when they run: that alone is no condition.
    """
    kept: dict[_Condition, set[int]] = {}
    known, allowed = set[int](), set(tried)
    for each in conditions:
        forbidden = {extent for extent in tried if not each.holds({name: extent})}
        allowed -= forbidden
        if each.origin.internal and 1 in forbidden:
            forbidden.remove(1)
            known.add(1)
        if forbidden - known:
            kept[each] = forbidden
            known |= forbidden
    return kept, allowed


def _fixed(axes: Sequence[Axis], extent: int, conditions: Iterable[_Condition]) -> Remark:
    told = " and ".join(map(str, conditions))
    for axis in axes:
        if not axis.may_be_fixed:
            called = f" ('{axis.own_name}')" if axis.own_name else ""
            raise InputError(
                f"{axis}{called} is to be dynamic, but the traced program is right only at "
                f"{extent}, where {told}",
                remedy="drop it in dynamic_shapes, or change what asks for this extent",
            )
    return _remark("note", f"{axes[0]} is fixed at {extent}: right only where {told}")


def _joint(
    conditions: Iterable[_Condition], values: Mapping[Any, set[int]]
) -> dict[_Condition, set[int]]:
    """Return the conditions on several extents that do not always hold, with nothing beside."""
    chance = random.Random(0)
    choices = {name: sorted(tried) or [1] for name, tried in values.items()}
    draws = [{name: chance.choice(tried) for name, tried in choices.items()} for _ in range(_DRAWS)]
    kept: dict[_Condition, set[int]] = {}
    known = set[int]()
    for each in conditions:
        names = each.relation.free_symbols
        forbidden = {
            index
            for index, draw in enumerate(draws)
            if not (each.origin.internal and any(draw[name] == 1 for name in names))
            and not each.holds({name: draw[name] for name in names})
        }
        if forbidden - known:
            kept[each] = set()
            known |= forbidden
    return kept


def shape_environment(program: torch.export.ExportedProgram) -> Any:
    """Return what PyTorch knows of the symbols of a program, or None if it has none."""
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return mode.shape_env
    return None
