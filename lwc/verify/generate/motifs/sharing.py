"""Weights and values that several places share: residuals, aliases, duplicates."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lwc.core.walk import constant_tensor
from lwc.verify.generate.motifs.activations import any_activation
from lwc.verify.generate.motifs.common import WIDTH, either, hidden, weighted
from lwc.verify.generate.motifs.norms import any_norm
from lwc.verify.generate.sketch import Motif, Sketch

__all__ = ["MOTIFS"]


def shared_weights(sketch: Sketch) -> list[ir.Value]:
    """Two linear layers with one weight, on one value or on two."""
    x = hidden(sketch, None)
    weights, bias = sketch.weight(WIDTH, WIDTH), sketch.weight(WIDTH, name="bias")
    first = sketch.emit("Add", sketch.emit("MatMul", x, weights), bias)
    source = first if sketch.flip() else hidden(sketch, None)
    second = sketch.emit("MatMul", source, weights)
    form = sketch.choose("bias", "transpose", "scaled")
    if form == "bias":
        second = either(sketch, "Add", second, bias)
    elif form == "transpose":
        turned = sketch.emit("Transpose", weights, perm=[1, 0])
        second = sketch.emit("MatMul", second, turned)
    else:
        second = sketch.emit("Mul", second, bias)
    return [first, second]


def aliased_weights(sketch: Sketch) -> list[ir.Value]:
    """Two initializers that hold one tensor, or equal ones; one scaled after its use, or not."""
    x = hidden(sketch, None)
    weights = sketch.weight(WIDTH, WIDTH)
    tensor = constant_tensor(weights)
    assert tensor is not None
    if not sketch.flip():
        alias = sketch.module.add_initializer("weight", tensor)
    else:
        alias = sketch.module.add_initializer("weight", np.array(tensor.numpy()))
    first = sketch.emit("MatMul", x, weights)
    second = sketch.emit("MatMul", x if sketch.flip() else first, alias)
    if sketch.flip():
        second = sketch.emit("Mul", second, sketch.constant(np.full(WIDTH, 0.5, np.float32)))
    return [first, second]


def duplicated(sketch: Sketch) -> ir.Value:
    """One computation twice, both used."""
    x = hidden(sketch, None)
    weights = sketch.weight(WIDTH, WIDTH)
    op = sketch.choose("Tanh", "Relu", "Softmax")
    twins = [sketch.emit(op, sketch.emit("MatMul", x, weights)) for _ in range(2)]
    return either(sketch, "Mul", *twins)


def residual(sketch: Sketch) -> ir.Value:
    """The block of a transformer: norm, layer, sum; norm before it or after."""
    x = hidden(sketch)
    y = any_norm(sketch) if sketch.rarely() else x
    y = y if sketch.shape(y) == sketch.shape(x) else x
    y = any_activation(sketch, weighted(sketch, y))
    y = either(sketch, "Add", x, y)
    scale = sketch.constant(np.full(WIDTH, 0.5, np.float32), name="scale")
    return either(sketch, "Mul", y, scale) if sketch.flip() else y


def default_input(sketch: Sketch) -> ir.Value:
    """An initializer that is also a graph input: a default that a feed may override."""
    x = hidden(sketch, None)
    bias = sketch.module.add_initializer("bias", np.full(WIDTH, 0.5, np.float32))
    sketch.module.graph.inputs.append(bias)
    return either(sketch, sketch.choose("Add", "Mul"), x, bias)


def both_kinds(sketch: Sketch) -> list[ir.Value]:
    """A weight that is read as it is and through a computation on it."""
    x = hidden(sketch, None)
    weights = sketch.weight(WIDTH, WIDTH)
    first = sketch.emit("MatMul", x, weights)
    halved = sketch.emit("Mul", weights, sketch.constant(np.float32(0.5)))
    second = sketch.emit("MatMul", x, halved)
    return [first, second] if sketch.flip() else [sketch.emit("Sub", first, second)]


MOTIFS = (
    Motif("shared-weights", shared_weights),
    Motif("aliased-weights", aliased_weights),
    Motif("duplicated", duplicated),
    Motif("residual", residual),
    Motif("default-input", default_input),
    Motif("weight-twice", both_kinds),
)
