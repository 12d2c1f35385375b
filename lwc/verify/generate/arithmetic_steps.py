"""Small steps of arithmetic: one operator, a few that undo each other, constants.

Each keeps numbers tame (no logarithm of a negative, no exponential of a large number), so that a
difference is a difference and not an overflow.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lwc.verify.generate.sketch import BOOL, FLOAT, INT64, Sketch, Step

__all__ = ["STEPS"]

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
        last = s.shape(x)[-1] if rank else 1
        shape[-1] = 8 if not isinstance(last, int) or last in (1, 8) else 1
    neutral = s.constant(np.full(shape, -number if s.rarely() else number, np.float32))
    if not s.broadcasts(s.shape(x), s.shape(neutral)):
        neutral = s.constant(np.float32(number))
    if op in ("Div", "Pow") or not s.flip():
        return s.emit(op, x, neutral)
    return s.emit(op, neutral, x)


def signed_zero(s: Sketch) -> ir.Value:
    """A zero of either sign, and what tells one from the other."""
    x = s.emit("Relu", s.pick())
    zero = s.emit("Neg", x) if s.flip() else x
    moved = s.emit(s.choose("Add", "Sub"), zero, s.constant(np.float32(s.choose(0.0, -0.0))))
    return s.emit("Reciprocal", moved)


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
    kind = s.choose("input", "reduced", "unsqueezed")
    if kind == "input":
        at = s.integer(0, 2)
        shape: list[int | str | None] = ["N", "S", 8]
        shape[at] = 1
        wide = s.input(shape)
    else:
        x = s.pick(least=1)
        at = s.integer(0, s.rank(x) - 1)
        if kind == "reduced":
            wide = s.reduce("ReduceMax", x, [at], keepdims=1)
        else:
            wide = s.emit("Unsqueeze", x, s.ints(at))
    axes = [at - s.rank(wide) if s.flip() else at]
    return s.reduce(s.choose(*_REDUCTIONS[:4]), wide, axes, keepdims=int(s.flip()))


def arg_max(s: Sketch) -> ir.Value:
    x = s.pick(least=1)
    found = s.emit("ArgMax", x, axis=s.axis(x), keepdims=int(s.flip()))
    return s.cast(found, FLOAT)


def softmax(s: Sketch) -> ir.Value:
    x = s.pick(least=1)
    return s.emit("Softmax", x, axis=s.axis(x))


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


def constant_parts(s: Sketch) -> ir.Value:
    """A constant split in two, its parts used apart."""
    x = s.pick(least=1, where=lambda shape: shape[-1] == 8)
    parts = s.emit_all("Split", s.weight(16), s.ints(8, 8), outputs=2, axis=0)
    return s.emit("Add", s.emit("Mul", x, parts[0]), parts[s.choose(1, 1, 0)])


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


def integers(s: Sketch) -> ir.Value:
    """Integer arithmetic, whose division and remainder round in their own way."""
    x = s.input(["N", "S"], INT64, "numbers") if s.flip() else s.pick(dtype=INT64)
    op = s.choose("Add", "Mul", "Sub", "Div")
    made = s.emit(op, x, s.constant(np.array(s.choose(2, 1, 3), np.int64)))
    if s.flip():
        made = s.emit("Neg", s.emit("Neg", made))
    s.keep(made)
    return s.cast(made, FLOAT)


def constant_integers(s: Sketch) -> ir.Value:
    """Integer arithmetic of constants of both signs, which folding must round as runtimes do."""
    a = s.constant(np.array(s.choose([7, -7], [-5, 4], [-3, -8]), np.int64))
    b = s.constant(np.array(s.choose([2, 3], [3], [-2, -2]), np.int64))
    op = s.choose("Div", "Mod", "Sub", "Mul")
    return s.cast(s.emit(op, a, b), FLOAT)


STEPS: tuple[Step, ...] = (
    unary,
    repeated_unary,
    binary,
    with_constant,
    neutral_constant,
    signed_zero,
    two_constants,
    ratio,
    variadic,
    clip,
    comparison,
    constant_choice,
    reduction,
    reduction_of_ones,
    arg_max,
    softmax,
    cast_chain,
    constants_only,
    constant_parts,
    duplicate,
    equal_constants,
    identities,
    dropout,
    dead_branch,
    integers,
    constant_integers,
)
