"""How far rounding alone may move an output: the model run on slightly changed numbers.

A bound that looks at an output alone is too strict where large numbers cancel, or where a
comparison turns on the last bit. The model itself tells: its weights and inputs are changed by
relative amounts of the size of a rounding error, and what that does to an output is what another
order of the arithmetic may do to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lwc.core.errors import LwcError
from lwc.core.walk import is_default_domain, op_name
from lwc.verify.numeric.bounds import Bounds, OutputError, difference, distance, root_mean_square

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["ROUNDING", "Sensitivity", "perturbed"]

Array = np.ndarray[Any, Any]

ROUNDING = 2.0**-23
"""Relative change of each number: one unit in the last place of float32."""

_DRAWS = 4
_MARGIN = 16.0
"""A difference up to this many times the movement is rounding: draws are few, and an operator
rounds more than once."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

_EXACT = frozenset({
    "Abs", "Cast", "CastLike", "Ceil", "Compress", "Concat", "Constant", "ConstantOfShape",
    "DepthToSpace", "Dropout", "Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements",
    "GatherND", "Identity", "Max", "MaxPool", "Min", "Neg", "OneHot", "Pad", "Range", "ReduceMax",
    "ReduceMin", "Relu", "Reshape", "ReverseSequence", "Round", "ScatterElements", "ScatterND",
    "Sign", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Trilu",
    "Unsqueeze", "Where",
})  # fmt: skip
"""Operators that round nothing. Casts of masks above all: 1.0000001 in place of a one makes
(1 - mask) · lowest a huge number where it is zero."""


_WIDER = 16.0
_GROWTH = 4.0
"""What rounding moves, changes that are `_WIDER` times as large move at least `_GROWTH` times as
far. A comparison that flips moves as far under both."""

_WHOLE = 2.0**22
"""Whole numbers below this are results of counting, which nothing rounds."""

_SMALL = 256


@dataclass(frozen=True)
class Sensitivity:
    """How far small changes move each output.

    Attributes:
        movement: By output, the largest movement of each element over a few draws; infinite
            where an element became or ceased to be finite.
        wider: The same under larger changes; empty where they were not asked for.
        draws: By output, what the draws gave.
    """

    movement: Mapping[str, Array]
    wider: Mapping[str, Array]
    draws: Mapping[str, list[Array]]

    @classmethod
    def measure(
        cls,
        module: Module,
        feed: Mapping[str, Array],
        outputs: Mapping[str, Array],
        compiled: Callable[[Module], AbstractContextManager[Any]],
        *,
        size: float = ROUNDING,
        results: float = ROUNDING,
        twice: bool = True,
    ) -> Sensitivity:
        """Run `module` on changed numbers.

        Args:
            module: The model.
            feed: A feed.
            outputs: What the model gives on it.
            compiled: Makes what runs a module.
            size: Standard deviation of the relative changes of weights and inputs.
            results: That of what nodes compute; 2**-52 where they compute in float64.
            twice: Also under larger changes, which `judge` needs.
        """
        draws: dict[str, list[Array]] = {name: [] for name in outputs}

        def move(factor: float) -> dict[str, Array]:
            movement = {
                name: np.zeros(np.shape(array))
                for name, array in outputs.items()
                if np.asarray(array).dtype.kind in "biuf"
            }
            for draw in range(_DRAWS):
                rng = np.random.default_rng(draw)
                twin = perturbed(module, rng, factor * size, factor * results, whole_stay=twice)
                changed = {n: _shaken(a, rng, factor * size) for n, a in feed.items()}
                try:
                    with compiled(twin) as runner:
                        moved = runner.run(changed)
                except LwcError:
                    continue  # a change may make a shape or an index invalid: it tells nothing
                for name, before in movement.items():
                    found = moved.get(name)
                    if found is None or found.shape != before.shape:
                        movement[name] = np.full(before.shape, math.inf)
                        continue
                    draws[name].append(found)
                    movement[name] = np.maximum(before, distance(outputs[name], found))
            return movement

        return cls(move(1.0), move(_WIDER) if twice else {}, draws)

    def judge(
        self, error: OutputError, expected: Array, result: Array, bounds: Bounds
    ) -> OutputError:
        """Return the error with its excess over what rounding allows, if that is more.

        Where an element moves the further the larger the changes are, rounding may move it by a
        multiple of that. Where it jumps, it may be what a draw gave and nothing else.
        """
        movement, wider = self.movement.get(error.output), self.wider.get(error.output)
        if movement is None or wider is None or not movement.size:
            return error
        expected, result = np.asarray(expected), np.asarray(result)
        smooth = np.isfinite(wider) & (wider >= _GROWTH * movement)
        if expected.dtype.kind != "f":
            smooth = np.zeros(movement.shape, bool)
        spread = root_mean_square(movement[smooth])
        allowed = _MARGIN * (movement + spread)
        with np.errstate(invalid="ignore"):
            excused = smooth & (distance(expected, result) <= allowed)
        for draw in self.draws[error.output]:
            excused |= distance(draw, result) <= np.where(smooth, 0.0, _MARGIN * spread)
        forgiven = np.where(excused, expected, result)
        rest = difference(
            error.output, error.shapes, expected, forgiven.astype(result.dtype), bounds
        )
        return dataclasses.replace(rest, max_error=error.max_error)


def perturbed(
    module: Module,
    rng: np.random.Generator,
    size: float,
    results: float = ROUNDING,
    *,
    whole_stay: bool = True,
) -> Module:
    """Copy a module with every floating-point number in it changed by relative amounts.

    Each element of a weight is multiplied by 1 + `size`·n with n standard normal, and each result
    of a node of the main graph, as a whole, by 1 + `results`·n, as if it had been rounded. Whole
    numbers among the weights stay: no order of arithmetic rounds them, and a changed exponent of
    Pow (2.0000001 of a negative number) or limit (the lowest number, in masks) gives NaN and
    infinities, which would excuse any difference.
    """
    twin = module.clone()
    _shake_results(twin, rng, results, whole_stay)
    changed: dict[int, ir.TensorProtocol] = {}

    def change(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        found = changed.get(id(tensor))
        if found is None:
            array = tensor.numpy()
            found = ir.Tensor(_shaken(array, rng, size), name=tensor.name)
            changed[id(tensor)] = found
        return found

    for _, value in twin.initializers():
        if value.const_value is not None and value.const_value.dtype in _FLOATS:
            value.const_value = change(value.const_value)
    for node in twin.nodes():
        if node.op_type == "Constant" and is_default_domain(node):
            attribute = node.attributes.get("value")
            if attribute is not None and not attribute.is_ref():
                tensor = attribute.as_tensor()
                if tensor.dtype in _FLOATS:
                    node.attributes["value"] = ir.AttrTensor("value", change(tensor))
    return twin


def _shake_results(module: Module, rng: np.random.Generator, size: float, whole_stay: bool) -> None:
    """Multiply the results of the main graph's nodes by factors next to 1.

    In small graphs whole numbers stay: an extent or an index that was computed with.
    """
    from lwc.analysis.shapes import Shapes

    shapes, graph = Shapes.build(module), module.graph
    nodes = list(graph)
    for node in nodes:
        if op_name(node) in _EXACT:
            continue
        for value in node.outputs:
            dtype = shapes.dtype(value)
            if dtype not in _FLOATS or not value.uses():
                continue
            # x + x·c, since 1 + c rounds to 1 where the graph is written in float32.
            part = np.array(size * _coarser(dtype) * rng.standard_normal()).astype(dtype.numpy())
            users = list(value.uses())
            made = [ir.node("Mul", [value, module.add_initializer("rounding", part)])]
            if (
                whole_stay
                and len(nodes) <= _SMALL
                and dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
            ):
                limit = module.add_initializer("whole", np.array(_WHOLE, dtype.numpy()))
                floor, size_of = ir.node("Floor", [value]), ir.node("Abs", [value])
                whole = ir.node("Equal", [floor.outputs[0], value])
                small = ir.node("Less", [size_of.outputs[0], limit])
                both = ir.node("And", [whole.outputs[0], small.outputs[0]])
                rest = ir.node("Not", [both.outputs[0]])
                gate = ir.node("Cast", [rest.outputs[0]], {"to": int(dtype)})
                change = ir.node("Mul", [made[0].outputs[0], gate.outputs[0]])
                made += [floor, size_of, whole, small, both, rest, gate, change]
            made.append(ir.node("Add", [value, made[-1].outputs[0]]))
            for each in made:
                each.outputs[0].name = module.fresh_name("rounded")
            for user, index in users:
                user.replace_input_with(index, made[-1].outputs[0])
            graph.insert_after(node, made)


_COARSER = {
    ir.DataType.FLOAT16: 2.0**13,
    ir.DataType.BFLOAT16: 2.0**16,
    ir.DataType.DOUBLE: 2.0**-29,
}


def _coarser(dtype: ir.DataType | np.dtype[Any]) -> float:
    """Return how many times as large a rounding error is as in float32."""
    kind = dtype if isinstance(dtype, ir.DataType) else ir.DataType.from_numpy(dtype)
    return _COARSER.get(kind, 1.0)


def _shaken(array: Array, rng: np.random.Generator, size: float) -> Array:
    """Change the numbers of an array that are not whole."""
    moved = _changed(array, rng, size)
    if moved.dtype.kind == "f":
        np.copyto(moved, array, where=np.rint(array) == array)
    return moved


def _changed(array: Array, rng: np.random.Generator, size: float) -> Array:
    if np.asarray(array).dtype.kind != "f":
        return np.array(array)
    if array.dtype != np.float32:
        noise = 1.0 + size * _coarser(array.dtype) * rng.standard_normal(np.shape(array))
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(array * noise).astype(array.dtype)
    # Large weights mostly: x + x·c in place takes a fourth of the time.
    moved: Array = np.asarray(rng.standard_normal(np.shape(array), dtype=np.float32))
    moved *= np.float32(size)
    with np.errstate(invalid="ignore", over="ignore"):
        moved *= array
        moved += array
    np.copyto(moved, array, where=np.isinf(array))
    return moved
