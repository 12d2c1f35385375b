"""What may stand for the free variables and attributes of a pattern."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

__all__ = ["Hint", "Leaf", "attribute_options", "draw_leaf"]

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
_END = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Leaf:
    """A graph input, or a constant where there is content.

    Attributes:
        dtype: Its element type.
        shape: Its extents, numbers or names.
        content: What the constant holds.
    """

    dtype: ir.DataType
    shape: tuple[int | str, ...]
    content: np.ndarray[Any, Any] | None = None

    def __repr__(self) -> str:
        kind = "input" if self.content is None else "constant"
        few = self.content is not None and self.content.size <= 4
        shown = f" {self.content.tolist()}" if few and self.content is not None else ""
        return f"{kind} {self.dtype.name}{list(self.shape)}{shown}"


def _constant(content: Any, dtype: ir.DataType = FLOAT) -> Leaf:
    array = np.asarray(content).astype(dtype.numpy())
    return Leaf(dtype, array.shape, array)


def _weights(*extents: int) -> Leaf:
    rng = np.random.default_rng(extents)
    return _constant(
        rng.random(extents) + 0.5 if len(extents) < 2 else rng.standard_normal(extents)
    )


_INPUTS = [
    Leaf(FLOAT, shape)
    for shape in (
        ("N", "S", 8), ("N", 8), ("N", 2, "S", 4), (8,), ("N", "S"), ("N", 8, "S"), (),
        ("N", 4, "S", 8), ("N", 2, 4, "S"), (8, 8), (4, 8), ("N", "S", 1), (1, 8), (1,),
    )
]  # fmt: skip
_NUMBERS = [
    *(_constant(number) for number in (0.5, 1.0, 2.0, 1e-5, 0.0, -1.0)),
    *(_constant([number]) for number in (0.5, 1.0, 1e-5, 0.0)),
]
_WEIGHTS = [
    _weights(*extents)
    for extents in (
        (8,), (8, 8), (8, 4), (4, 8), (4,), (1, 8), (1, 1, 8), (8, 1), (2, 4, 4), (2, 1, 1),
        (4, 4, 1), (4, 4, 3), (4, 1, 3), (4, 4, 1, 1), (4, 4, 3, 3), (4, 1, 3, 3), (8, 8, 1),
    )
]  # fmt: skip
_VECTORS = [
    _constant(numbers, INT64)
    for numbers in (
        [-1], [1], [0], [2], [-2], [0, 1], [1, 2], [0, 0, 8], [0, 0, 2, 4], [-1, 8], [0, -1, 8],
        [0, 0, -1], [4], [8], [4, 4], [2, 2, 4], [1, 1], [1, 1, 1], [_END], [0, 0, 1, 0, 0, 1],
    )
]  # fmt: skip
_INTEGERS = [_constant(number, INT64) for number in (1, 0, -1, 2)]
_COUNTED = [Leaf(INT64, shape) for shape in (("N", "S"), ("N",), (), ("N", "S", 8))]
_CHOICES = [
    *(Leaf(BOOL, shape) for shape in (("N", "S", 8), ("N", 1, "S", "S"), ("N", "S"), (), (8,))),
    *(_constant(flag, BOOL) for flag in (True, False)),
]
_OTHERS = [
    Leaf(dtype, shape)
    for dtype in (ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.INT32)
    for shape in (("N", "S", 8), ("N", 8))
] + [
    _constant(np.arange(64).reshape(8, 8) - 32 * (dtype == ir.DataType.INT8), dtype)
    for dtype in (ir.DataType.INT8, ir.DataType.UINT8)
]
_OTHERS += [_constant(0, dtype) for dtype in (ir.DataType.INT8, ir.DataType.UINT8)]
_OTHERS += [
    _constant(number, dtype)
    for dtype in (ir.DataType.FLOAT16, ir.DataType.DOUBLE)
    for number in (0.5, np.full(8, 0.5))
]

_GROUPS = (
    (_INPUTS, 8), (_WEIGHTS, 6), (_NUMBERS, 4), (_VECTORS, 5), (_INTEGERS, 2), (_COUNTED, 2),
    (_CHOICES, 2), (_OTHERS, 1),
)  # fmt: skip


_STATES = Leaf(FLOAT, ("N", "S", 8))
_HEADS = Leaf(FLOAT, ("N", 2, "S", 4))
_IMAGE = Leaf(FLOAT, ("N", 4, "S", 8))
_ROW, _FOUR = _weights(8), _weights(4)
_STANDING = Leaf(FLOAT, ("N", 8, "S"))


def _axes(*numbers: int) -> Leaf:
    return _constant(numbers, INT64)


_TYPICAL: dict[str, tuple[tuple[Leaf, ...], ...]] = {
    "BatchNormalization": (
        (_IMAGE, _FOUR, _FOUR, _FOUR, _FOUR),
        (_STANDING, _ROW, _ROW, _ROW, _ROW),
        (Leaf(FLOAT, ("N", 8)), _ROW, _ROW, _ROW, _ROW),
    ),
    "Conv": (
        (_IMAGE, _weights(4, 4, 3, 3), _FOUR),
        (_IMAGE, _weights(4, 4, 1, 1), _FOUR),
        (_STANDING, _weights(8, 8, 1), _ROW),
    ),
    "ConvTranspose": (
        (_IMAGE, _weights(4, 4, 3, 3), _FOUR),
        (_STANDING, _weights(8, 8, 1), _ROW),
    ),
    "Gather": (
        (_weights(11, 8), Leaf(INT64, ("N", "S"))),
        (_STATES, _constant(0, INT64)),
    ),
    "Gemm": (
        (Leaf(FLOAT, ("N", 8)), _weights(8, 8), _ROW),
        (Leaf(FLOAT, ("N", 8)), _weights(8, 4), _FOUR),
    ),
    "InstanceNormalization": ((_IMAGE, _FOUR, _FOUR), (_STANDING, _ROW, _ROW)),
    "LayerNormalization": ((_STATES, _ROW, _ROW),),
    "MatMul": (
        (_STATES, _weights(8, 8)),
        (Leaf(FLOAT, ("N", 8)), _weights(8, 8)),
        (_HEADS, Leaf(FLOAT, ("N", 2, 4, "S"))),
    ),
    "Pad": (
        (_STATES, _axes(0, 0, 0, 0, 1, 0)),
        (_IMAGE, _axes(0, 0, 1, 1, 0, 0, 1, 1)),
    ),
    **{
        f"Reduce{kind}": ((_STATES, _axes(-1)), (_STATES, _axes(1)), (_HEADS, _axes(-1)))
        for kind in ("L1", "L2", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    },
    "Reshape": ((_STATES, _axes(0, 0, 2, 4)), (_HEADS, _axes(0, 2, -1)), (_STATES, _axes(-1, 8))),
    "Slice": ((_STATES, _axes(0), _axes(4), _axes(2)), (_HEADS, _axes(0), _axes(2), _axes(3))),
    "Split": ((_STATES, _axes(4, 4)),),
    "Squeeze": ((Leaf(FLOAT, ("N", "S", 1)), _axes(-1)), (_weights(1, 8), _axes(0))),
    "Expand": ((Leaf(FLOAT, ("N", "S", 1)), _axes(1, 1, 8)),),
    "Tile": ((_STATES, _axes(1, 1, 2)),),
    "Unsqueeze": ((_STATES, _axes(1)), (_STATES, _axes(-1))),
    "Clip": ((_STATES, _constant(0.0), _constant(1.0)),),
    **dict.fromkeys(
        ("Add", "Mul", "Sub", "Div"),
        ((_STATES, _ROW), (_STATES, _constant(0.5)), (_STATES, _STATES), (_ROW, _STATES)),
    ),
    "Pow": ((_STATES, _constant(2.0)), (_STATES, _constant(0.5))),
    "Where": ((Leaf(BOOL, ("N", "S", 8)), _STATES, _constant(0.5)),),
}
"""Operands that go together, by operator: chance would seldom bring them about."""


class Hint:
    """What the operands of one node may be; drawn when the first is asked for."""

    def __init__(self, op: str) -> None:
        self._known = _TYPICAL.get(op, ())
        self._taken: tuple[Leaf, ...] | None = None

    def draw(self, rng: random.Random, index: int, allowed: frozenset[str] | None) -> Leaf | None:
        """Draw what stands for the operand at a position; see `draw_leaf`."""
        if self._taken is None:
            known = self._known and rng.random() < 0.7
            self._taken = rng.choice(self._known) if known else ()
        if index < len(self._taken) and rng.random() < 0.9:
            leaf = self._taken[index]
            if allowed is None or _written(leaf.dtype) in allowed:
                return leaf
        return draw_leaf(rng, allowed)


def draw_leaf(rng: random.Random, allowed: frozenset[str] | None) -> Leaf | None:
    """Draw a leaf of one of the types, the usual ones oftener; None where no type is listed.

    Args:
        rng: Where chance comes from.
        allowed: Types as the standard writes them, `tensor(float)`; None allows all.
    """
    groups = []
    for leaves, weight in _GROUPS:
        fit = [leaf for leaf in leaves if allowed is None or _written(leaf.dtype) in allowed]
        if fit:
            groups.append((fit, weight))
    if not groups:
        return None
    (group,) = rng.choices([fit for fit, _ in groups], [weight for _, weight in groups])
    return rng.choices(group, [1 / (1 + 0.3 * place) for place in range(len(group))])[0]


def _written(dtype: ir.DataType) -> str:
    return f"tensor({dtype.name.lower()})"


_BY_NAME: dict[str, Sequence[Any]] = {
    "axis": (-1, 1, 0, 2),
    "axes": ([-1], [1], [0], [2], [-2], [1, 2]),
    "perm": [list(p) for rank in (3, 4, 2) for p in itertools.permutations(range(rank))],
    "to": [
        int(t) for t in (FLOAT, ir.DataType.FLOAT16, INT64, ir.DataType.DOUBLE, BOOL)
    ],
    "epsilon": (1e-5, 1e-6),
    "kernel_shape": ([1], [3], [1, 1], [3, 3]),
    "pads": ([1, 1], [0, 0], [1, 1, 1, 1], [0, 0, 0, 0]),
    "strides": ([1], [1, 1], [2], [2, 2]),
    "dilations": ([1], [1, 1], [2]),
    "group": (1, 2, 4),
    "alpha": (1.0, 0.5, 0.1),
    "beta": (1.0, 0.5, 0.0),
    "approximate": ("none", "tanh"),
    "num_outputs": (2,),
    "num_heads": (2,),
}  # fmt: skip
_BY_TYPE: dict[ir.AttributeType, Sequence[Any]] = {
    ir.AttributeType.INT: (1, 0, -1, 2),
    ir.AttributeType.INTS: ([1], [0], [-1], [1, 1], [0, 1]),
    ir.AttributeType.FLOAT: (1.0, 0.5, 0.0),
    ir.AttributeType.FLOATS: ([1.0], [1.0, 1.0]),
    ir.AttributeType.STRING: ("",),
    ir.AttributeType.TENSOR: tuple(
        ir.Tensor(np.array(content, kind))
        for content, kind in ((1.0, np.float32), ([1.0], np.float32), ([1], np.int64))
    ),
}


def attribute_options(
    schema: onnx.defs.OpSchema | None, name: str
) -> tuple[ir.AttributeType | None, list[Any]]:
    """Return the type of an attribute, where it is known, and values that it may have."""
    if schema is None or name not in schema.attributes:
        return None, list(_BY_NAME.get(name, _BY_TYPE[ir.AttributeType.INT]))
    formal = schema.attributes[name]
    kind = ir.AttributeType(int(formal.type.value))  # type: ignore[attr-defined]
    options = list(_BY_NAME.get(name, _BY_TYPE.get(kind, ())))
    if kind == ir.AttributeType.INT and isinstance(next(iter(options), 0), list):
        options = list(_BY_TYPE[kind])
    if formal.default_value.type:
        default = onnx.helper.get_attribute_value(formal.default_value)
        default = default.decode() if isinstance(default, bytes) else default
        options = [default, *(option for option in options if option != default)]
        if default in (0, 1) and kind == ir.AttributeType.INT and name not in _BY_NAME:
            options = [default, 1 - default]
    return kind, options
