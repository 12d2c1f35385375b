"""Random operators: the grammar of small steps that graphs are grown from.

Each step keeps numbers tame (no logarithm of a negative, no exponential of a large number), so
that a difference is a difference and not an overflow. Many steps do their work in a roundabout
way that undoes itself: that is where rewriting finds something to do.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lwc.core.dims import equal
from lwc.verify.generate.sketch import BOOL, FLOAT, INT64, Motif, Sketch, Step

__all__ = ["GRAMMAR"]

_UNARY = ("Relu", "Neg", "Abs", "Identity", "Tanh", "Sigmoid", "Erf", "Floor", "Round", "Sign")
_ARITHMETIC = ("Add", "Mul", "Sub", "Max", "Min")
_COMPARISONS = ("Greater", "Less", "Equal", "GreaterOrEqual", "LessOrEqual")
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd")
_END = 2**63 - 1


def unary(s: Sketch) -> ir.Value:
    return s.emit(s.choose(*_UNARY), s.pick())


def repeated_unary(s: Sketch) -> ir.Value:
    """f(f(x)), and pairs that look like it."""
    op = s.choose("Relu", "Neg", "Abs", "Ceil", "Sign", "Tanh", "Round")
    inner = s.emit(op, s.pick())
    other = s.choose("Neg", "Abs") if s.rarely() else op
    return s.emit(other, inner)


def binary(s: Sketch) -> ir.Value:
    x = s.pick()
    operands = [x, s.partner(x)]
    if s.flip():
        operands.reverse()
    return s.emit(s.choose(*_ARITHMETIC), *operands)


def with_constant(s: Sketch) -> ir.Value:
    """Arithmetic with a constant: a neutral element, a number beside it, a row, a column."""
    x = s.pick()
    operands = [x, s.constant_for(x)]
    op = s.choose("Add", "Mul", "Sub", "Pow", "Div")
    if op == "Pow":
        return s.emit("Pow", s.emit("Tanh", x), s.constant(s.choose(1.0, 2.0, 3.0)))
    if op == "Div":
        number = np.float32(s.choose(1.0, 2.0, -1.0, 4.0))
        return s.emit("Div", x, s.constant(np.full(s.choose((), (1,), (1, 1)), number)))
    if s.flip():
        operands.reverse()
    return s.emit(op, *operands)


def neutral_constant(s: Sketch) -> ir.Value:
    """An operation with its neutral element on either side, which may widen the value."""
    x = s.pick()
    op, number = s.choose(("Mul", 1.0), ("Add", 0.0), ("Sub", 0.0), ("Div", 1.0), ("Pow", 1.0))
    if op == "Pow":
        x = s.emit("Abs", x)
    rank = s.rank(x)
    if s.flip() and rank:
        # An extent of 1 that the constant may widen.
        x = s.reduce("ReduceMax", x, [s.integer(0, rank - 1)], keepdims=1)
    shape = [1] * s.choose(0, rank, rank + 1)
    if shape and s.flip():
        shape[-1] = 8 if not isinstance(s.shape(x)[-1], int) or s.shape(x)[-1] in (1, 8) else 1
    neutral = s.constant(np.full(shape, -number if s.rarely() else number, np.float32))
    if not s.broadcasts(s.shape(x), s.shape(neutral)):
        neutral = s.constant(np.float32(number))
    if op in ("Div", "Pow") or not s.flip():
        return s.emit(op, x, neutral)
    return s.emit(op, neutral, x)


def two_constants(s: Sketch) -> ir.Value:
    """x with one constant, then with another: candidates for merging."""
    op = s.choose("Mul", "Add")
    x = s.pick()
    inner = s.emit(op, x, s.constant_for(x))
    return s.emit(op, inner, s.constant_for(inner))


def ratio(s: Sketch) -> ir.Value:
    x = s.pick()
    floor = s.emit("Add", s.emit("Abs", s.partner(x)), s.constant(np.float32(1.0)))
    return s.emit("Div", x, floor)


def variadic(s: Sketch) -> ir.Value:
    x = s.pick()
    count = s.integer(1, 3)
    return s.emit(
        s.choose("Sum", "Max", "Min", "Mean"), x, *(s.partner(x) for _ in range(count - 1))
    )


def clip(s: Sketch) -> ir.Value:
    bounds = [
        None if s.flip() else s.constant(np.float32(-0.5)),
        None if s.flip() else s.constant(np.float32(0.5)),
    ]
    while bounds and bounds[-1] is None and s.flip():
        bounds.pop()
    return s.emit("Clip", s.pick(), *bounds)


def comparison(s: Sketch) -> ir.Value:
    """A choice by comparison, the comparison perhaps negated or joined with another."""
    x = s.pick()
    test = s.emit(s.choose(*_COMPARISONS[:2]), x, s.constant_for(x, FLOAT))
    if s.flip():
        test = s.emit("Not", test)
        if s.flip():
            test = s.emit("Not", test)
    if s.rarely():
        test = s.emit(s.choose("And", "Or", "Xor"), test, s.constant(np.array(s.flip())))
    return s.emit("Where", test, x, s.partner(x))


def constant_choice(s: Sketch) -> ir.Value:
    """Where with a constant condition or with equal branches, broadcast or not."""
    x = s.pick()
    shape = [1] * s.choose(0, 1, s.rank(x), s.rank(x) + 1)
    condition = s.constant(np.full(shape, s.flip()))
    other = x if s.rarely() else s.partner(x)
    return s.emit("Where", condition, *((x, other) if s.flip() else (other, x)))


def reduction(s: Sketch) -> ir.Value:
    x = s.pick(least=1)
    axes = [s.axis(x)]
    if s.rank(x) > 1 and s.rarely():
        axes = sorted({axis % s.rank(x) for axis in (axes[0], s.axis(x))})
    op = s.choose(*_REDUCTIONS)
    if op == "ReduceProd":
        x = s.emit("Tanh", x)
    return s.reduce(op, x, axes, keepdims=int(not s.flip()))


def reduction_of_ones(s: Sketch) -> ir.Value:
    """A reduction over an extent of 1, which changes nothing but the rank."""
    x = s.pick(least=1)
    axis = s.axis(x)
    rank = s.rank(x)
    wide = s.emit("Unsqueeze", x, s.ints(axis if axis >= 0 else axis + rank + 1))
    at = (axis if axis >= 0 else axis + rank + 1) % (rank + 1)
    axes = [at - rank - 1 if s.flip() else at]
    return s.reduce(s.choose(*_REDUCTIONS[:4]), wide, axes, keepdims=int(s.flip()))


def arg_max(s: Sketch) -> ir.Value:
    x = s.pick(least=1)
    found = s.emit("ArgMax", x, axis=s.axis(x), keepdims=int(s.flip()))
    return s.cast(found, FLOAT)


def softmax(s: Sketch) -> ir.Value:
    x = s.pick(least=1)
    return s.emit("Softmax", x, axis=s.axis(x))


def transpose(s: Sketch) -> ir.Value:
    x = s.pick(least=2)
    perm = s.permutation(s.rank(x))
    return s.emit("Transpose", x, perm=None if s.rarely() else perm)


def there_and_back(s: Sketch) -> ir.Value:
    """Two permutations with something between them, that cancel or nearly do."""
    x = s.pick(least=2)
    perm = s.permutation(s.rank(x))
    back = [perm.index(axis) for axis in range(len(perm))]
    moved = s.emit("Transpose", x, perm=perm)
    if s.flip():
        moved = s.emit("Neg", moved)
    return s.emit("Transpose", moved, perm=perm if s.rarely() else back)


def unsqueeze(s: Sketch) -> ir.Value:
    x = s.pick()
    if s.rank(x) > 4:
        return s.emit("Neg", x)
    return s.emit("Unsqueeze", x, s.ints(s.integer(-s.rank(x) - 1, s.rank(x))))


def unsqueeze_and_squeeze(s: Sketch) -> ir.Value:
    """One or two unsqueezes, and a squeeze of the same or of another axis."""
    x = s.pick()
    axis = s.integer(0, s.rank(x))
    wide = s.emit("Unsqueeze", x, s.ints(axis))
    if s.flip():
        second = s.integer(0, s.rank(wide))
        wide = s.emit("Unsqueeze", wide, s.ints(second))
    ones = [i for i, dim in enumerate(s.shape(wide)) if isinstance(dim, int) and dim == 1]
    dropped = s.choose(*ones)
    if s.flip():
        dropped -= s.rank(wide)
    return s.emit("Squeeze", wide, None if s.rarely() else s.ints(dropped))


def flatten(s: Sketch) -> ir.Value:
    x = s.pick(least=1)
    return s.emit("Flatten", x, axis=s.integer(0, s.rank(x)))


def split_last(s: Sketch) -> ir.Value:
    """The last axis taken apart and put together: views of views, with 0 and -1 in the target."""
    x = s.pick(least=1, where=lambda shape: shape[-1] == 8)
    copied = [0] * (s.rank(x) - 1)
    wide = s.reshape(x, *copied, s.choose(2, 4), -1)
    if s.flip():
        wide = s.emit(s.choose("Relu", "Neg"), wide)
    return s.reshape(wide, *copied, s.choose(8, -1))


def computed_reshape(s: Sketch) -> ir.Value:
    """A target computed from the extents of the value, as exporters write it."""
    x = s.pick(least=2, where=lambda shape: shape[-1] == 8)
    rank = s.rank(x)
    extents = s.extents(x)
    parts = [s.emit("Gather", extents, s.ints(axis)) for axis in range(rank - 1)]
    if s.flip():
        parts = [_unsqueezed(s, extents, axis) for axis in range(rank - 1)]
    split = s.emit("Concat", *parts, s.ints(2), s.ints(s.choose(4, -1)), axis=0)
    folded = s.emit("Reshape", x, split)
    if s.flip():
        folded = s.emit("Relu", folded)
    return s.emit("Reshape", folded, extents)


def _unsqueezed(s: Sketch, extents: ir.Value, axis: int) -> ir.Value:
    number = s.emit("Gather", extents, s.constant(np.array(axis, np.int64)))
    return s.emit("Unsqueeze", number, s.ints(0))


def swapped_reshape(s: Sketch) -> ir.Value:
    """A reshape to the own extents in another order: equal only where two extents are."""
    x = s.pick(least=2)
    order = s.permutation(s.rank(x))
    target = s.emit("Gather", s.extents(x), s.ints(*order))
    return s.emit("Reshape", x, target)


def compared_extents(s: Sketch) -> ir.Value:
    """A number that tells whether two extents are equal: decided early only if that is certain."""
    x, y = s.pick(least=1), s.pick(least=1)
    sizes = []
    for value in (x, y):
        at = s.constant(np.array(s.integer(0, s.rank(value) - 1), np.int64))
        sizes.append(s.emit("Gather", s.extents(value), at))
    test = s.emit(s.choose("Equal", "Less"), *sizes)
    return s.emit("Where", test, x, s.emit("Neg", x))


def extent_arithmetic(s: Sketch) -> ir.Value:
    """A number computed from extents, used as data."""
    x = s.pick(least=1)
    at = s.constant(np.array(s.integer(0, s.rank(x) - 1), np.int64))
    number = s.emit("Gather", s.extents(x), at)
    for _ in range(s.integer(1, 2)):
        op = s.choose("Add", "Mul", "Sub", "Div")
        number = s.emit(op, number, s.constant(np.array(s.choose(2, 3, 1), np.int64)))
    return s.emit("Mul", x, s.cast(number, FLOAT))


def slices(s: Sketch) -> ir.Value:
    """One slice or two, with steps and bounds from either end."""
    x = s.pick(least=1, where=lambda shape: shape[-1] == 8)
    for _ in range(s.integer(1, 2)):
        axis = s.axis(x) if s.rarely() else -1 if s.flip() else s.rank(x) - 1
        begin, end = s.choose((0, 6), (1, _END), (2, 5), (-5, _END), (0, -1), (0, _END))
        extent = s.shape(x)[axis]
        if not (isinstance(extent, int) and extent >= 6):
            axis, begin, end = s.rank(x) - 1, 0, s.choose(_END, 2)
        bounds = [s.ints(begin), s.ints(end)]
        if axis != 0 or s.flip():
            bounds.append(s.ints(axis))
            if s.flip():
                bounds.append(s.ints(s.choose(1, 2)))
        x = s.emit("Slice", x, *bounds)
    return x


def halves(s: Sketch) -> ir.Value:
    """Two parts of a value, put together in order or swapped."""
    x = s.pick(least=1, where=lambda shape: shape[-1] == 8)
    cut = s.choose(4, 3)
    axis = s.ints(s.choose(s.rank(x) - 1, -1))
    parts = [
        s.emit("Slice", x, s.ints(0), s.ints(cut), axis),
        s.emit("Slice", x, s.ints(cut), s.ints(_END), axis),
    ]
    if s.flip():
        parts.reverse()
    return s.emit("Concat", *parts, axis=-1)


def split_and_concat(s: Sketch) -> ir.Value:
    x = s.pick(least=1, where=lambda shape: shape[-1] == 8)
    count = s.choose(2, 4, 1)
    sizes = s.ints(*([8 // count] * count))
    parts = s.emit_all("Split", x, sizes, outputs=count, axis=s.choose(-1, s.rank(x) - 1))
    if s.flip():
        parts = [parts[i] for i in s.permutation(count)]
    if s.rarely():
        parts[0] = s.emit("Neg", parts[0])
    axis = s.integer(-s.rank(x), -1) if s.rarely() else -1
    return s.emit("Concat", *parts, axis=axis)


def concat(s: Sketch) -> ir.Value:
    """Concatenations of concatenations, along the same axis or another."""
    x = s.pick(least=1)
    axis = s.axis(x)
    inner = s.emit("Concat", x, x, axis=axis)
    if s.flip():
        axis = s.axis(x)
    same = [v for v in s.values if v is not inner and _alike(s, v, inner, axis)]
    other = s.choose(*same) if same and not s.flip() else inner
    return s.emit("Concat", *((inner, other) if s.flip() else (other, inner)), axis=axis)


def _alike(s: Sketch, a: ir.Value, b: ir.Value, axis: int) -> bool:
    """Tell whether two values can be joined along an axis."""
    first, second = s.shapes.shape(a), s.shape(b)
    if first is None or len(first) != len(second) or s.dtype(a) != s.dtype(b):
        return False
    skip = axis % len(second)
    return all(i == skip or equal(m, n) for i, (m, n) in enumerate(zip(first, second, strict=True)))


def empty_operand(s: Sketch) -> ir.Value:
    """A concatenation with a piece of extent 0."""
    x = s.pick(least=1)
    axis = s.axis(x)
    nothing = s.emit("Slice", x, s.ints(0), s.ints(0), s.ints(axis))
    operands = [x, nothing, s.emit("Neg", x)] if s.flip() else [nothing, x]
    return s.emit("Concat", *operands, axis=axis)


def single_operand(s: Sketch) -> ir.Value:
    x = s.pick(least=1)
    return s.emit("Concat", x, axis=s.axis(x))


def gather(s: Sketch) -> ir.Value:
    """One element, or several, of the last axis; its axis put back or not."""
    x = s.pick(least=1, where=lambda shape: shape[-1] == 8)
    axis = s.choose(s.rank(x) - 1, -1)
    if s.flip():
        return s.emit("Gather", x, s.ints(*s.choose((1, 3), (0,), (-1, 2))), axis=axis)
    one = s.emit("Gather", x, s.constant(np.array(s.choose(1, 0, -1), np.int64)), axis=axis)
    return s.emit("Unsqueeze", one, s.ints(s.choose(s.rank(x) - 1, 0) if s.rarely() else axis))


def table(s: Sketch) -> ir.Value:
    """Rows of a constant table."""
    rows = s.choose(4, 6)
    ids = s.pick(2, dtype=INT64) if s.rarely() else s.input(["N", "S"], INT64, "ids")
    kept = s.emit("Mod", s.emit("Abs", ids), s.constant(np.array(rows, np.int64)))
    return s.emit("Gather", s.weight(rows, 8, name="table"), kept)


def cast_chain(s: Sketch) -> ir.Value:
    """Through other types and back: exactly, or with a loss that must stay."""
    x = s.pick()
    if s.flip():
        x = s.emit("Mul", s.emit("Tanh", x), s.constant(np.float32(100.0)))
    through = s.choose(
        ir.DataType.DOUBLE, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT, BOOL
    )
    made = s.cast(x, through)
    if s.flip():
        second = s.choose(ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.INT8, FLOAT)
        if second == ir.DataType.INT8:
            made = s.cast(s.emit("Sign", s.cast(made, FLOAT)), second)
        else:
            made = s.cast(made, second)
    return s.cast(made, FLOAT)


def expand(s: Sketch) -> ir.Value:
    """A value expanded by hand to the extents of another, then combined with it."""
    x = s.pick(least=1)
    row = s.weight(*([1] * s.integer(0, s.rank(x) - 1)), 1 if s.flip() else 8)
    if not s.broadcasts(s.shape(x), s.shape(row)):
        row = s.constant(np.float32(s.choose(1.0, 0.5)))
    wide = s.emit("Expand", row, s.extents(x))
    return s.emit(s.choose("Mul", "Add", "Sub"), *((x, wide) if s.flip() else (wide, x)))


def expand_to_constant(s: Sketch) -> ir.Value:
    x = s.pick()
    target = [1] * s.choose(s.rank(x), s.rank(x) + 1, 1)
    if s.rarely():
        target = [3, *([1] * s.rank(x))]
    return s.emit("Expand", x, s.ints(*target))


def filled(s: Sketch) -> ir.Value:
    """A tensor of one number in the extents of another value."""
    x = s.pick()
    fill = ir.Tensor(np.array([s.choose(1.0, 0.0, 0.5)], np.float32))
    made = s.emit("ConstantOfShape", s.extents(x), value=None if s.rarely() else fill)
    op = s.choose("Mul", "Add", "Sub", "Where")
    if op == "Where":
        return s.emit("Where", s.emit("Greater", x, made), x, made)
    return s.emit(op, x, made)


def tile(s: Sketch) -> ir.Value:
    x = s.pick(least=1)
    return s.emit("Tile", x, s.ints(*(s.choose(1, 1, 2) for _ in range(s.rank(x)))))


def pad(s: Sketch) -> ir.Value:
    x = s.pick(least=1)
    pads = [s.choose(0, 0, 1) for _ in range(2 * s.rank(x))]
    fill = [s.constant(np.float32(s.choose(0.0, 1.0)))] if s.flip() else []
    return s.emit("Pad", x, s.ints(*pads), *fill)


def constants_only(s: Sketch) -> ir.Value:
    """Constants combined with constants: work that can be done ahead, small or large."""
    rows = s.choose(2, 1, 40)
    made = s.weight(rows, 8)
    for _ in range(s.integer(1, 3)):
        kind = s.choose("unary", "binary", "transpose", "slice", "reduce")
        if kind == "unary":
            made = s.emit(s.choose("Neg", "Tanh", "Abs"), made)
        elif kind == "binary":
            made = s.emit(s.choose("Mul", "Add", "Sub"), made, s.constant_for(made))
        elif kind == "transpose":
            made = s.emit("Transpose", s.emit("Transpose", made, perm=[1, 0]), perm=[1, 0])
        elif kind == "slice":
            made = s.emit("Slice", made, s.ints(0), s.ints(_END), s.ints(0))
        else:
            made = s.reduce("ReduceMean", made, [0], keepdims=1)
    if s.shapes.shape(made) is None or s.shape(made)[-1] != 8:
        return made
    row = s.reduce("ReduceSum", made, [0], keepdims=0) if s.rank(made) > 1 else made
    x = s.pick(least=1, where=lambda shape: shape[-1] == 8)
    return s.emit(s.choose("Add", "Mul"), x, row)


def duplicate(s: Sketch) -> ir.Value:
    """The same node twice, or nearly: other operands, another attribute."""
    x = s.pick(least=1)
    kind = s.choose("same", "swapped", "attribute")
    if kind == "attribute":
        axis = s.axis(x)
        a, b = s.emit("Softmax", x, axis=axis), s.emit("Softmax", x, axis=s.axis(x))
    else:
        y = s.partner(x)
        op = s.choose("Sub", "Add", "Mul")
        a = s.emit(op, x, y)
        b = s.emit(op, x, y) if kind == "same" else s.emit(op, y, x)
    return s.emit(s.choose("Add", "Sub"), a, s.emit("Tanh", b))


def equal_constants(s: Sketch) -> ir.Value:
    """Two constants of one content, of equal content in another type or shape, or nearly equal."""
    x = s.pick(least=1)
    number = s.choose(0.5, 0.0)
    a = s.constant(np.float32(number))
    b = s.constant(np.full((1,), -number if s.rarely() else number, np.float32))
    return s.emit("Add", s.emit("Mul", x, a), s.emit("Sub", b, x))


def identities(s: Sketch) -> ir.Value:
    x = s.pick()
    for _ in range(s.integer(1, 2)):
        x = s.emit("Identity", x)
    return x


def dropout(s: Sketch) -> ir.Value:
    """Dropout of inference: without a training flag, or with one that is false."""
    x = s.pick()
    inputs: list[ir.Value | None] = [x]
    if s.flip():
        inputs.append(s.constant(np.float32(0.5)) if s.flip() else None)
        if s.flip():
            inputs.append(s.constant(np.array(False)))
    outputs = s.emit_all("Dropout", *inputs, outputs=s.choose(1, 2))
    if len(outputs) == 2 and s.flip():
        return s.emit("Where", outputs[1], outputs[0], s.emit("Neg", x))
    return outputs[0]


def dead_branch(s: Sketch) -> None:
    """Something that nothing will read."""
    value = s.emit("Exp", s.emit("Tanh", s.pick()))
    s.values = [each for each in s.values if each is not value]


def two_unknown_extents(s: Sketch) -> ir.Value:
    """Two values with an unnamed extent each, which broadcast or are compared."""
    a = s.input([None, 8], name="left")
    b = s.input([None, 8], name="right")
    sizes = [s.emit("Gather", s.extents(v), s.ints(0)) for v in (a, b)]
    if s.flip():
        test = s.emit("Equal", *sizes)
        return s.emit("Where", test, a, s.emit("Neg", a))
    # A row of ones for `a` times a column for `b`: an outer product of the extents.
    row = s.emit(
        "ReduceMean" if s.opset < 18 else "Identity", a, axes=[1] if s.opset < 18 else None
    )
    if s.opset >= 18:
        row = s.reduce("ReduceMean", a, [1], keepdims=1)
    column = s.reduce("ReduceMean", b, [1], keepdims=1)
    grid = s.emit("MatMul", row, s.emit("Transpose", column, perm=[1, 0]))
    target = s.emit("Concat", *(sizes if s.flip() else sizes[::-1]), axis=0)
    return s.emit("Reshape", grid, target)


def integers(s: Sketch) -> ir.Value:
    """Integer arithmetic, whose division and remainder round in their own way."""
    x = s.input(["N", "S"], INT64, "numbers") if s.flip() else s.pick(dtype=INT64)
    op = s.choose("Add", "Mul", "Sub", "Div")
    made = s.emit(op, x, s.constant(np.array(s.choose(2, 1, 3), np.int64)))
    if s.flip():
        made = s.emit("Neg", s.emit("Neg", made))
    s.keep(made)
    return s.cast(made, FLOAT)


_STEPS: tuple[Step, ...] = (
    unary, repeated_unary, binary, with_constant, neutral_constant, two_constants, ratio, variadic,
    clip, comparison,
    constant_choice, reduction, reduction_of_ones, arg_max, softmax, transpose, there_and_back,
    unsqueeze, unsqueeze_and_squeeze, flatten, split_last, computed_reshape, swapped_reshape,
    compared_extents, extent_arithmetic, slices, halves, split_and_concat, concat, empty_operand,
    single_operand, gather, table, cast_chain, expand, expand_to_constant, filled, tile, pad,
    constants_only, duplicate, equal_constants, identities, dropout, dead_branch,
    two_unknown_extents, integers,
)  # fmt: skip

GRAMMAR: tuple[Motif, ...] = tuple(Motif(step.__name__.replace("_", "-"), step) for step in _STEPS)
