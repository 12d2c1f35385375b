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
from lwc.verify.numeric.bounds import OutputError, difference, root_mean_square

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


@dataclass(frozen=True)
class Sensitivity:
    """How far small changes move each output.

    Attributes:
        movement: By output, the largest movement of each element over a few draws; infinite
            where an element became or ceased to be finite.
    """

    movement: Mapping[str, Array]

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
    ) -> Sensitivity:
        """Run `module` on changed numbers.

        Args:
            module: The model.
            feed: A feed.
            outputs: What the model gives on it.
            compiled: Makes what runs a module.
            size: Standard deviation of the relative changes of weights and inputs.
            results: That of what nodes compute; 2**-52 where they compute in float64.
        """
        movement = {
            name: np.zeros(np.shape(array))
            for name, array in outputs.items()
            if np.asarray(array).dtype.kind in "biuf"
        }
        for draw in range(_DRAWS):
            rng = np.random.default_rng(draw)
            try:
                with compiled(perturbed(module, rng, size, results)) as runner:
                    moved = runner.run({n: _changed(a, rng, size) for n, a in feed.items()})
            except LwcError:
                continue  # a change may make a shape or an index invalid: that draw tells nothing
            for name, before in movement.items():
                wanted = np.asarray(outputs[name])
                if np.shape(moved[name]) == before.shape:
                    error = _distance(wanted, np.asarray(moved[name]))
                    movement[name] = np.maximum(before, error)
                else:
                    movement[name] = np.full(before.shape, math.inf)
        return cls(movement)

    def judge(
        self, error: OutputError, expected: Array, result: Array, bounds: tuple[float, float]
    ) -> OutputError:
        """Return the error with its excess over what rounding allows, if that is more."""
        movement = self.movement.get(error.output)
        if movement is None or not movement.size:
            return error
        finite = movement[np.isfinite(movement)]
        spread = root_mean_square(finite)
        allowed = _MARGIN * (movement + spread)
        distance = _distance(np.asarray(expected), np.asarray(result))
        with np.errstate(invalid="ignore"):
            excused = distance <= allowed
        forgiven = np.where(excused, expected, result)
        rest = difference(
            error.output, error.shapes, expected, forgiven.astype(result.dtype), bounds
        )
        return dataclasses.replace(rest, max_error=error.max_error)


def perturbed(
    module: Module, rng: np.random.Generator, size: float, results: float = ROUNDING
) -> Module:
    """Copy a module with every floating-point number in it changed by relative amounts.

    Each element of a weight is multiplied by 1 + `size`·n with n standard normal, and each result
    of a node of the main graph, as a whole, by 1 + `results`·n, as if it had been rounded. Whole
    numbers among the weights stay: no order of arithmetic rounds them, and a changed exponent of
    Pow (2.0000001 of a negative number) or limit (the lowest number, in masks) gives NaN and
    infinities, which would excuse any difference.
    """
    twin = module.clone()
    _shake_results(twin, rng, results)
    changed: dict[int, ir.TensorProtocol] = {}

    def change(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        found = changed.get(id(tensor))
        if found is None:
            array = tensor.numpy()
            moved = _changed(array, rng, size)
            np.copyto(moved, array, where=np.rint(array) == array)
            found = ir.Tensor(moved, name=tensor.name)
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


def _shake_results(module: Module, rng: np.random.Generator, size: float) -> None:
    """Multiply the results of the main graph's nodes by factors next to 1."""
    from lwc.analysis.shapes import Shapes

    shapes, graph = Shapes.build(module), module.graph
    for node in list(graph):
        if op_name(node) in _EXACT:
            continue
        for value in node.outputs:
            dtype = shapes.dtype(value)
            if dtype not in _FLOATS or not value.uses():
                continue
            # x + x·c, since 1 + c rounds to 1 where the graph is written in float32.
            part = np.array(size * rng.standard_normal()).astype(dtype.numpy())
            users = list(value.uses())
            change = ir.node("Mul", [value, module.add_initializer("rounding", part)])
            moved = ir.node("Add", [value, change.outputs[0]])
            for made in (change, moved):
                made.outputs[0].name = module.fresh_name("rounded")
            for user, index in users:
                user.replace_input_with(index, moved.outputs[0])
            graph.insert_after(node, [change, moved])


def _changed(array: Array, rng: np.random.Generator, size: float) -> Array:
    if np.asarray(array).dtype.kind != "f":
        return np.array(array)
    if array.dtype != np.float32:
        noise = 1.0 + size * rng.standard_normal(np.shape(array))
        return np.asarray(array * noise).astype(array.dtype)
    # Large weights mostly: x + x·c in place takes a fourth of the time.
    moved: Array = np.asarray(rng.standard_normal(np.shape(array), dtype=np.float32))
    moved *= np.float32(size)
    with np.errstate(invalid="ignore", over="ignore"):
        moved *= array
        moved += array
    np.copyto(moved, array, where=np.isinf(array))
    return moved


def _distance(a: Array, b: Array) -> Array:
    """Return |a - b|; 0 where both are NaN or the same, infinite where one is not finite."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance: Array = np.asarray(np.abs(x - y))
    distance[(x == y) | (np.isnan(x) & np.isnan(y))] = 0.0
    distance[np.isnan(distance)] = math.inf
    # Neighbours above 2**53 are one number in float64.
    return np.maximum(distance, a != b) if a.dtype.kind in "iub" else distance
