"""If, Loop, Scan and sequences: decided, undecided, nested, with values from the graphs around."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from lwc.verify.generate.motifs.common import WIDTH, either, extent, solid, weighted
from lwc.verify.generate.sketch import Motif, Sketch

__all__ = ["MOTIFS", "condition"]

BOOL, FLOAT, INT64 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT64


def condition(sketch: Sketch, x: ir.Value) -> ir.Value:
    """Add a scalar boolean: constant, decided by what is known of `x`, or up to the feed."""
    form = sketch.choose("input", "constant", "rank", "extent", "elements", "comparison")
    if form == "constant":
        value = sketch.constant(np.bool_(sketch.flip()))
        return sketch.emit("Not", value) if sketch.rarely() else value
    if form == "rank":
        rank = sketch.emit("Size", sketch.extents(x))
        return sketch.emit("Equal", rank, sketch.constant(sketch.choose(sketch.rank(x), 1)))
    if form == "extent":
        axis = sketch.choose(-1, 0)
        number = sketch.constant(sketch.choose(WIDTH, 1, 0))
        return sketch.emit(
            sketch.choose("Equal", "Greater"), extent(sketch, x, axis, vector=False), number
        )
    if form == "elements":
        total = sketch.emit("ReduceMax", sketch.emit("Abs", x), keepdims=0)
        return sketch.emit("Greater", total, sketch.constant(np.float32(1)))
    if form == "comparison":
        count = sketch.input([], INT64, name="flag")
        return sketch.emit("Equal", count, sketch.constant(sketch.choose(0, 1)))
    return sketch.input([], BOOL, name="use_cache")


def _step(sketch: Sketch, x: ir.Value) -> ir.Value:
    """Add one to three nodes that keep the shape of `x`, with weights where its width is known."""
    for _ in range(sketch.integer(1, 3)):
        form = sketch.choose("unary", "scale", "linear", "double")
        shape = sketch.shapes.shape(x)
        if form == "unary":
            x = sketch.emit(sketch.choose("Tanh", "Neg", "Identity", "Abs", "Sigmoid"), x)
        elif form == "linear" and shape and shape[-1] == WIDTH:
            x = weighted(sketch, x)
        elif form == "double":
            x = sketch.emit("Mul", x, sketch.constant(np.float32(0.5)))
        else:
            x = either(sketch, "Add", x, sketch.constant(np.float32(sketch.choose(0.0, 1.0))))
    return x


def branch(sketch: Sketch) -> list[ir.Value]:
    """An If with one to three outputs, some of them unused; nested or not."""
    x = sketch.pick(where=solid(sketch))
    count = sketch.integer(1, 3)
    made = _if(sketch, x, count, nested=sketch.rarely())
    kept = made[: sketch.integer(1, count)]
    return [sketch.emit("Tanh", value) if sketch.flip() else value for value in kept]


def _if(sketch: Sketch, x: ir.Value, count: int, nested: bool) -> list[ir.Value]:
    chosen = condition(sketch, x)

    def grow() -> list[ir.Value]:
        results = []
        for index in range(count):
            form = sketch.choose("step", "outer", "inner")
            if nested and index == 0:
                results.append(_if(sketch, x, 1, nested=False)[0])
            elif form == "outer":
                results.append(x)
            elif form == "inner" and results:
                results.append(sketch.emit("Add", x, results[-1]))
            else:
                results.append(_step(sketch, x))
        return results

    then_branch, else_branch = sketch.body([], grow), sketch.body([], grow)
    return sketch.emit_all(
        "If", chosen, outputs=count, then_branch=then_branch, else_branch=else_branch
    )


def reshaping_branch(sketch: Sketch) -> ir.Value:
    """An If as exporters write for squeezing where an axis is 1: its branches differ in rank."""
    x = sketch.pick(3, where=solid(sketch))
    y = sketch.reduce("ReduceMean", x, [-1])
    last = extent(sketch, y, -1, vector=False)
    chosen = sketch.emit("Equal", last, sketch.constant(1))
    squeezed = sketch.body([], lambda: [sketch.emit("Squeeze", y, sketch.ints(-1))])
    kept = sketch.body([], lambda: [sketch.emit("Identity", y)])
    return sketch.emit("If", chosen, then_branch=squeezed, else_branch=kept)


def _trips(sketch: Sketch, x: ir.Value) -> ir.Value | None:
    form = sketch.choose("constant", "extent", "input", "constant", "none")
    if form == "constant":
        return sketch.constant(sketch.choose(2, 1, 0, 3), name="trips")
    if form == "extent":
        return extent(sketch, x, 0, vector=False)
    return sketch.input([], INT64, name="trips") if form == "input" else None


def loop(sketch: Sketch) -> list[ir.Value]:
    """A Loop: known and unknown trips, carried values, collected values, an early end."""
    x = sketch.pick(where=solid(sketch))
    trips = _trips(sketch, x)
    begins = None
    if trips is not None:
        form = sketch.choose("true", "none", "false", "input")
        if form == "input":
            begins = sketch.input([], BOOL, name="starts")
        elif form != "none":
            begins = sketch.constant(np.bool_(form == "true"), name="condition")
    carried = sketch.integer(1, 2)
    collected = sketch.integer(0, 1)
    invariant = sketch.rarely()
    shape = sketch.shape(x)
    step = sketch.parameter("iteration", INT64, ())
    goes_on = sketch.parameter("condition", BOOL, ())
    states = [sketch.parameter("state", FLOAT, shape) for _ in range(carried)]

    def grow() -> list[ir.Value]:
        counted = sketch.cast(step, FLOAT)
        after = [_step(sketch, state) for state in states]
        if invariant:
            after[-1] = states[-1]
        if sketch.flip():
            share = sketch.emit("Mul", counted, sketch.constant(np.float32(0.25)))
            after[0] = sketch.emit("Add", after[0], share)
        if sketch.flip():
            after[0] = sketch.emit("Sub", after[0], x)
        if trips is None or sketch.rarely():
            again = sketch.emit("Less", step, sketch.constant(sketch.choose(1, 0, 2)))
        elif sketch.flip():
            again = sketch.constant(np.bool_(True))
        else:
            again = sketch.emit("Identity", goes_on)
        scanned = [sketch.emit("Tanh", after[0])] * collected
        return [again, *after, *scanned]

    body = sketch.body([step, goes_on, *states], grow)
    outputs = sketch.emit_all(
        "Loop", trips, begins, *[x] * carried, outputs=carried + collected, body=body
    )
    if collected:
        # What no iteration collected has no shape: ONNX Runtime makes every extent 0.
        outputs[-1] = sketch.emit("ReduceSum", outputs[-1], keepdims=0)
    return outputs if sketch.flip() else outputs[:1]


def single_turn(sketch: Sketch) -> list[ir.Value]:
    """A Loop of one turn or two that uses the iteration number; whether it begins may be open."""
    x = sketch.pick(where=solid(sketch))
    trips = sketch.constant(sketch.choose(1, 1, 2))
    begins = sketch.choose("none", "true", "input")
    condition = None
    if begins == "true":
        condition = sketch.constant(np.bool_(True), name="condition")
    elif begins == "input":
        condition = sketch.input([], BOOL, name="starts")
    step = sketch.parameter("iteration", INT64, ())
    goes_on = sketch.parameter("condition", BOOL, ())
    state = sketch.parameter("state", FLOAT, sketch.shape(x))
    collects = begins != "input" and sketch.flip()

    def grow() -> list[ir.Value]:
        share = sketch.emit("Add", sketch.cast(step, FLOAT), sketch.constant(np.float32(0.5)))
        after = sketch.emit("Mul", sketch.emit("Tanh", state), share)
        collected = [sketch.emit("Neg", after)] if collects else []
        return [sketch.emit("Identity", goes_on), after, *collected]

    body = sketch.body([step, goes_on, state], grow)
    return sketch.emit_all("Loop", trips, condition, x, outputs=1 + collects, body=body)


def wide_branch(sketch: Sketch) -> list[ir.Value]:
    """An If of three outputs, not all of which are read, decided by an input."""
    x = sketch.pick()
    test = sketch.input([], BOOL, name="chosen")
    ops = ("Tanh", "Neg", "Abs", "Sigmoid")
    turn = sketch.integer(0, 3)

    def grow(shift: int) -> list[ir.Value]:
        return [sketch.emit(ops[(turn + shift + i) % 4], x) for i in range(3)]

    yes = sketch.body([], functools.partial(grow, 0))
    no = sketch.body([], functools.partial(grow, 1))
    outputs = sketch.emit_all("If", test, outputs=3, then_branch=yes, else_branch=no)
    return [outputs[i] for i in sketch.choose((0, 2), (1, 2), (0, 1), (2,), (0, 1, 2))]


def scan(sketch: Sketch) -> list[ir.Value]:
    """A running sum along an axis by Scan, forwards or backwards."""
    x = sketch.pick(3, where=solid(sketch))
    axis = sketch.choose(1, 0)
    start = sketch.reduce("ReduceMean", x, [axis], keepdims=0)
    shape = sketch.shape(start)
    state = sketch.parameter("state", FLOAT, shape)
    item = sketch.parameter("item", FLOAT, shape)

    def grow() -> list[ir.Value]:
        half = sketch.emit("Mul", state, sketch.constant(np.float32(0.5)))
        total = sketch.emit("Add", half, item)
        return [total, _step(sketch, total)]

    body = sketch.body([state, item], grow)
    directions = [1] if sketch.flip() else None
    return sketch.emit_all(
        "Scan",
        start,
        x,
        outputs=2,
        body=body,
        num_scan_inputs=1,
        scan_input_axes=[axis] if axis or sketch.flip() else None,
        scan_input_directions=directions,
        scan_output_axes=[axis] if axis else None,
    )


def sequence(sketch: Sketch) -> ir.Value:
    """A value put into a sequence and taken out of it again."""
    x = sketch.pick(least=2, where=lambda s: s[-1] == WIDTH and solid(sketch)(s))
    form = sketch.choose("construct", "split", "insert")
    if form == "split":
        pieces = sketch.emit("SplitToSequence", x, sketch.constant(4, name="sizes"), axis=-1)
        item = sketch.constant(sketch.choose(0, 1, -1), name="indices")
        return sketch.emit("SequenceAt", pieces, item)
    pieces = sketch.emit("SequenceConstruct", x, sketch.emit("Neg", x))
    if form == "insert":
        pieces = sketch.emit("SequenceInsert", pieces, sketch.emit("Tanh", x))
    return sketch.emit("ConcatFromSequence", pieces, axis=-1)


def hidden_function(sketch: Sketch) -> ir.Value:
    """A function of one value, called twice."""
    x = sketch.pick(where=solid(sketch))

    def grow(value: ir.Value) -> list[ir.Value]:
        return [sketch.emit("Mul", value, sketch.emit("Sigmoid", value))]

    function = sketch.function("Swish", 1, grow)
    y = sketch.call(function, x)[0]
    return sketch.call(function, y)[0] if sketch.choose(True, False) else y


def normalizing_function(sketch: Sketch) -> ir.Value:
    """A function with parameters, one of them by default, that may call another one."""
    x = sketch.pick(least=1, where=lambda s: s[-1] == WIDTH)
    inner: ir.Function | None = None
    if sketch.flip():
        inner = sketch.function("Square", 1, lambda value: [sketch.emit("Mul", value, value)])

    def grow(value: ir.Value, scale: ir.Value) -> list[ir.Value]:
        square = sketch.call(inner, value)[0] if inner else sketch.emit("Mul", value, value)
        total = sketch.emit(
            "ReduceSumSquare" if sketch.rarely() else "ReduceL1",
            square,
            keepdims=ir.RefAttr("keepdims", "keep", ir.AttributeType.INT),
        )
        epsilon = sketch.constant(np.float32(1))
        grown = sketch.emit("Add", total, epsilon)
        scaled = sketch.emit("Mul", sketch.emit("Div", value, grown), scale)
        slope = ir.RefAttr("alpha", "slope", ir.AttributeType.FLOAT)
        return [sketch.emit("LeakyRelu", scaled, alpha=slope)]

    function = sketch.function("Shrink", 2, grow, keep=ir.AttributeType.INT, slope=0.1)
    weight = sketch.weight(WIDTH)
    y = sketch.call(function, x, weight, keep=sketch.choose(0, 1))[0]
    if sketch.flip():
        y = sketch.call(function, y, weight, keep=0, slope=0.5)[0]
    return y


MOTIFS = (
    Motif("branch", branch),
    Motif("reshaping-branch", reshaping_branch),
    Motif("wide-branch", wide_branch),
    Motif("loop", loop),
    Motif("single-turn", single_turn),
    Motif("scan", scan),
    Motif("sequence", sequence),
    Motif("function", hidden_function),
    Motif("function-with-parameters", normalizing_function),
)
