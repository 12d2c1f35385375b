"""Activations, and the two-layer networks that they stand in."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from lwc.verify.generate.motifs.common import WIDTH, either, hidden, weighted
from lwc.verify.generate.sketch import Motif, Sketch

__all__ = ["MOTIFS", "any_activation"]

FLOAT = ir.DataType.FLOAT


def _number(sketch: Sketch, number: float) -> ir.Value:
    return sketch.constant(np.full(sketch.choose((), (1,)), number, np.float32), name="constant")


def _gelu(sketch: Sketch, x: ir.Value) -> ir.Value:
    """The exact GELU: the half and the product in any order."""
    if sketch.opset >= 20 and sketch.rarely():
        return sketch.emit("Gelu", x, approximate=sketch.choose("none", "tanh", None))
    root = math.sqrt(2)
    if sketch.flip():
        scaled = sketch.emit("Div", x, _number(sketch, root))
    else:
        scaled = either(sketch, "Mul", x, _number(sketch, 1 / root))
    grown = either(sketch, "Add", sketch.emit("Erf", scaled), _number(sketch, 1))
    if sketch.flip():
        return either(sketch, "Mul", either(sketch, "Mul", x, grown), _number(sketch, 0.5))
    if sketch.flip():
        return either(sketch, "Mul", either(sketch, "Mul", x, _number(sketch, 0.5)), grown)
    return either(sketch, "Mul", x, either(sketch, "Mul", grown, _number(sketch, 0.5)))


def _gelu_tanh(sketch: Sketch, x: ir.Value) -> ir.Value:
    if sketch.flip():
        cube = sketch.emit("Pow", x, _number(sketch, 3))
    else:
        cube = either(sketch, "Mul", sketch.emit("Mul", x, x), x)
    inner = either(sketch, "Add", x, either(sketch, "Mul", cube, _number(sketch, 0.044715)))
    inner = either(sketch, "Mul", inner, _number(sketch, math.sqrt(2 / math.pi)))
    grown = either(sketch, "Add", sketch.emit("Tanh", inner), _number(sketch, 1))
    return either(sketch, "Mul", either(sketch, "Mul", x, _number(sketch, 0.5)), grown)


def _gelu_quick(sketch: Sketch, x: ir.Value) -> ir.Value:
    scaled = either(sketch, "Mul", x, _number(sketch, 1.702))
    return either(sketch, "Mul", x, sketch.emit("Sigmoid", scaled))


def _silu(sketch: Sketch, x: ir.Value) -> ir.Value:
    return either(sketch, "Mul", x, sketch.emit("Sigmoid", x))


def _mish(sketch: Sketch, x: ir.Value) -> ir.Value:
    return either(sketch, "Mul", x, sketch.emit("Tanh", sketch.emit("Softplus", x)))


def _hard_swish(sketch: Sketch, x: ir.Value) -> ir.Value:
    if sketch.opset >= 14 and sketch.flip():
        return sketch.emit("HardSwish", x)
    if sketch.flip():
        gate = sketch.emit("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    else:
        low, high = sketch.constant(np.float32(0)), sketch.constant(np.float32(6))
        gate = sketch.emit("Clip", sketch.emit("Add", x, _number(sketch, 3)), low, high)
        gate = sketch.emit("Div", gate, _number(sketch, 6))
    return either(sketch, "Mul", x, gate)


def _clipped(sketch: Sketch, x: ir.Value) -> ir.Value:
    low = sketch.constant(np.float32(0)) if sketch.choose(True, False) else None
    high = sketch.constant(np.float32(6)) if low is None or sketch.flip() else None
    inputs = [x, low] if high is None else [x, low, high]
    y = sketch.emit("Clip", *inputs)
    return sketch.emit("Relu", y) if sketch.flip() else y


def _simple(sketch: Sketch, x: ir.Value) -> ir.Value:
    op = sketch.choose("Relu", "Tanh", "Sigmoid", "LeakyRelu", "Elu", "Softplus", "PRelu")
    if op == "PRelu":
        return sketch.emit(op, x, sketch.constant(np.full(1, 0.25, np.float32), name="slope"))
    return sketch.emit(op, x, alpha=sketch.choose(None, 0.2) if op == "LeakyRelu" else None)


_ALL = (_simple, _gelu, _silu, _gelu_tanh, _gelu_quick, _mish, _hard_swish, _clipped)


def any_activation(sketch: Sketch, x: ir.Value) -> ir.Value:
    """Add one of the activations."""
    return sketch.choose(*_ALL)(sketch, x)


def gelu(sketch: Sketch) -> ir.Value:
    """GELU: exact, by tanh, or by a logistic."""
    x = sketch.pick()
    return sketch.choose(_gelu, _gelu_tanh, _gelu_quick)(sketch, x)


def gate(sketch: Sketch) -> ir.Value:
    """SiLU, Mish or HardSwish: a value times a squashed one."""
    x = sketch.pick()
    return sketch.choose(_silu, _mish, _hard_swish)(sketch, x)


def squashed(sketch: Sketch) -> ir.Value:
    """A plain activation or a Clip."""
    x = sketch.pick()
    return sketch.choose(_simple, _clipped)(sketch, x)


def mlp(sketch: Sketch) -> ir.Value:
    """Two linear layers around an activation, added to what came in or not."""
    x = hidden(sketch)
    y = weighted(sketch, any_activation(sketch, weighted(sketch, x, 4)), WIDTH)
    return either(sketch, "Add", x, y) if sketch.flip() else y


def gated_mlp(sketch: Sketch) -> ir.Value:
    """The gated network of decoders: two layers side by side, or one that is split."""
    x = hidden(sketch)
    if sketch.flip():
        both = weighted(sketch, x, WIDTH)
        if sketch.flip():
            first, second = _halves(sketch, both)
        elif sketch.opset >= 18 and sketch.flip():
            first, second = sketch.emit_all("Split", both, outputs=2, axis=-1, num_outputs=2)
        else:
            sizes = sketch.ints(4, 4)
            first, second = sketch.emit_all("Split", both, sizes, outputs=2, axis=-1)
    else:
        first, second = weighted(sketch, x, 4), weighted(sketch, x, 4)
    y = either(sketch, "Mul", any_activation(sketch, first), second)
    y = weighted(sketch, y, WIDTH)
    return either(sketch, "Add", x, y) if sketch.flip() else y


def _halves(sketch: Sketch, x: ir.Value) -> list[ir.Value]:
    axes = sketch.ints(sketch.choose(-1, sketch.rank(x) - 1))
    end = sketch.choose(2**63 - 1, WIDTH)
    return [
        sketch.emit("Slice", x, sketch.ints(0), sketch.ints(4), axes),
        sketch.emit("Slice", x, sketch.ints(4), sketch.ints(end), axes),
    ]


MOTIFS = (
    Motif("gelu", gelu),
    Motif("gate", gate),
    Motif("squashed", squashed),
    Motif("mlp", mlp),
    Motif("gated-mlp", gated_mlp),
)
