"""Small steps of layout: views, slices, concatenations, and the extents they are computed from."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lwc.core.dims import equal
from lwc.verify.generate.sketch import FLOAT, INT64, Sketch, Step

__all__ = ["STEPS"]

_END = 2**63 - 1


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


def unsqueezes(s: Sketch) -> ir.Value:
    """Two unsqueezes, whose axes count in the result of each."""
    x = s.pick(where=lambda shape: len(shape) <= 3)
    for _ in range(2):
        rank = s.rank(x) + 1
        axis = s.integer(0, rank - 1)
        x = s.emit("Unsqueeze", x, s.ints(axis - rank if s.flip() else axis))
    return x


def squeezes(s: Sketch) -> ir.Value:
    """Two squeezes, whose axes count in the input of each."""
    shape: list[int | str | None] = ["N", "S", 8]
    for _ in range(2):
        shape.insert(s.integer(0, len(shape)), 1)
    x = s.input(shape)
    for _ in range(2):
        ones = [axis for axis, dim in enumerate(s.shape(x)) if isinstance(dim, int) and dim == 1]
        axis = s.choose(*ones)
        x = s.emit("Squeeze", x, s.ints(axis - s.rank(x) if s.flip() else axis))
    return x


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


def nested_slices(s: Sketch) -> ir.Value:
    """A slice of a slice, mostly of one axis, its bounds counted from the front."""
    x = s.pick(least=1, where=lambda shape: shape[-1] == 8)
    axis = s.ints(s.choose(s.rank(x) - 1, -1))
    first, second = s.choose((0, 6), (1, _END), (2, 7)), s.choose((1, _END), (0, 3), (2, 5))
    x = s.emit("Slice", x, s.ints(first[0]), s.ints(first[1]), axis)
    if s.flip() and s.rank(x) > 1:
        axis, second = s.ints(0), s.choose((0, 1), (0, _END))
    return s.emit("Slice", x, s.ints(second[0]), s.ints(second[1]), axis)


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
    inner = s.emit("Concat", x, s.emit("Neg", x) if s.flip() else x, axis=axis)
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
    """Several elements of the last axis."""
    x = s.pick(least=1, where=lambda shape: shape[-1] == 8)
    axis = s.choose(s.rank(x) - 1, -1)
    return s.emit("Gather", x, s.ints(*s.choose((1, 3), (0,), (-1, 2))), axis=axis)


def gather_one(s: Sketch) -> ir.Value:
    """One element of any axis, and that axis put back, or another."""
    x = s.pick(least=3 if s.flip() else 1)
    rank = s.rank(x)
    axis = s.integer(-rank, rank - 1)
    one = s.emit("Gather", x, s.constant(np.array(s.choose(0, -1), np.int64)), axis=axis)
    return s.emit("Unsqueeze", one, s.ints(axis if s.flip() else s.integer(0, rank - 1)))


def table(s: Sketch) -> ir.Value:
    """Rows of a constant table."""
    rows = s.choose(4, 6)
    ids = s.pick(2, dtype=INT64) if s.rarely() else s.input(["N", "S"], INT64, "ids")
    kept = s.emit("Mod", s.emit("Abs", ids), s.constant(np.array(rows, np.int64)))
    return s.emit("Gather", s.weight(rows, 8, name="table"), kept)


def expand(s: Sketch) -> ir.Value:
    """A value expanded by hand to the extents of another, then combined with it, or with less."""
    x = s.pick(least=1)
    row = s.weight(*([1] * s.integer(0, s.rank(x) - 1)), 1 if s.flip() else 8)
    if not s.broadcasts(s.shape(x), s.shape(row)):
        row = s.constant(np.float32(s.choose(1.0, 0.5)))
    wide = s.emit("Expand", row, s.extents(x))
    if s.rarely():
        x = s.constant(np.full(s.choose((), (1,)), 0.5, np.float32))
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


def two_unknown_extents(s: Sketch) -> ir.Value:
    """Two values with an unnamed extent each, which broadcast or are compared."""
    a = s.input([None, 8], name="left")
    b = s.input([None, 8], name="right")
    sizes = [s.emit("Gather", s.extents(v), s.ints(0)) for v in (a, b)]
    form = s.choose("grid", "compared", "broadcast")
    if form == "compared":
        test = s.emit("Equal", *sizes)
        return s.emit("Where", test, a, s.emit("Neg", a))
    if form == "broadcast":
        # Valid where one of the extents is 1, or both are equal.
        both = s.emit("Add", *((a, b) if s.flip() else (b, a)))
        wide = s.emit("Gather", s.extents(both), s.ints(0))
        return s.emit("Mul", both, s.cast(s.emit("Sub", wide, s.choose(*sizes)), FLOAT))
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


STEPS: tuple[Step, ...] = (
    transpose,
    there_and_back,
    unsqueeze,
    unsqueezes,
    squeezes,
    unsqueeze_and_squeeze,
    flatten,
    split_last,
    computed_reshape,
    swapped_reshape,
    compared_extents,
    extent_arithmetic,
    slices,
    nested_slices,
    halves,
    split_and_concat,
    concat,
    empty_operand,
    single_operand,
    gather,
    gather_one,
    table,
    expand,
    expand_to_constant,
    filled,
    tile,
    pad,
    two_unknown_extents,
)
