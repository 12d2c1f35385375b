"""rotate: which streams are turned, that the function stays the same, and what is refused."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import module_of, ops, run_pass, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.core.errors import PassError, UsageError
from lwc.core.module import Module
from lwc.core.weights import SpilledTensor
from lwc.frontend.load import load
from lwc.frontend.onnx_writer import save
from lwc.passes.quantization.hadamard import (
    Kind,
    hadamard_matrix,
    hadamard_orders,
    known_orders,
    rotation,
)
from lwc.passes.quantization.rotate import Rotate
from lwc.pipeline.passes import PassContext, PassResult
from lwc.rewrite import RewriteLimit

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-5
"""Of the largest output: float32 rounds at 6e-8, in sums of up to 64 terms through a few layers."""

WIDTH, WORDS = 8, 11
IDS = np.random.default_rng(1).integers(0, WORDS, (2, 5))

SIZES: dict[str, tuple[int, ...]] = {
    "E": (WORDS, WIDTH), "P": (1, 5, WIDTH), "g1": (WIDTH,), "g2": (WIDTH,), "g3": (WIDTH,),
    "b1": (WIDTH,), "b2": (WIDTH,), "b3": (WIDTH,), "wu": (WIDTH, 12), "wv": (WIDTH, 12),
    "wd": (12, WIDTH), "bd": (WIDTH,), "bu": (12,), "wm": (WIDTH, WIDTH), "bm": (WIDTH,),
    "wo": (12, WIDTH), "bo": (WIDTH,), "wh": (WIDTH, WORDS), "wht": (WORDS, WIDTH), "bh": (WORDS,),
}  # fmt: skip


def model(
    body: str,
    outputs: str = "float[b, s, 11] y",
    dtype: str = "float",
    given: Mapping[str, Array] | None = None,
) -> Module:
    """Read a graph on tokens `i`; weights are those of `SIZES`, random where they are not given."""
    given = given or {}
    names = [name for name in SIZES if re.search(rf"\b{name}[,)]", body)]
    listed = ", ".join(f"{dtype}[1] {name} = {{0}}" for name in names)
    module = module_of(f"g (int64[b, s] i) => ({outputs}) <{listed}> {{ {body} }}", opset=17)
    module.import_opset("com.microsoft", 1)
    random = np.random.default_rng(0)
    for name, value in module.graph.initializers.items():
        array = given[name] if name in given else random.standard_normal(SIZES[name])
        kind = np.float16 if dtype == "float16" else np.float32
        module.replace_initializer(value, ir.Tensor(np.asarray(array).astype(kind)))
    return module


def rotated(
    module: Module,
    chosen: Rotate | None = None,
    streams: int = 1,
    tolerance: float = TOLERANCE,
) -> PassResult:
    """Run the pass twice: the outputs stay, and the second run changes nothing."""
    chosen = chosen or Rotate()
    before = run_plain(module, {"i": IDS})
    result = run_pass(chosen, module)
    assert result.statistics["streams rotated"] == streams, remarks(module)
    assert result.changed == (streams > 0)
    for a, b in zip(run_plain(module, {"i": IDS}), before, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())
    assert not run_pass(chosen, module).changed
    if streams:
        assert "already rotated: width" in remarks(module)
    return result


def remarks(module: Module, kind: str = "") -> str:
    return "\n".join(each.message for each in module.remarks if kind in ("", each.kind))


def weight(module: Module, name: str) -> Array:
    tensor = module.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


# Matrices


def test_hadamard_matrices_are_orthogonal_in_integers() -> None:
    """Exact: sums of up to 1024 ones are integers in float64."""
    orders = known_orders(1024)
    assert {1, 2, 4, 8, 12, 20, 28, 36, 64, 384, 576, 768, 896, 960, 1024} <= set(orders)
    assert not {3, 6, 10, 50} & set(orders)
    for order in orders:
        found = rotation("hadamard", order, 0)
        assert found is not None
        matrix = found.turn(np.eye(order) / found.scale).round(9)
        assert set(np.unique(matrix)) <= {-1.0, 1.0}
        assert np.array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 60, 76, 84])
def test_constructions(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert matrix.dtype == np.int64
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order, dtype=np.int64))


def test_orders() -> None:
    assert hadamard_orders(576) == (12, 12, 2, 2)
    assert hadamard_orders(28) == (28,)
    assert hadamard_orders(6) is None
    assert hadamard_orders(0) is None
    with pytest.raises(ValueError, match="order 16"):
        hadamard_matrix(16)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_a_matrix_follows_its_seed(kind: Kind) -> None:
    first, again, other = (rotation(kind, 24, seed) for seed in (3, 3, 4))
    assert first is not None
    assert again is not None
    assert other is not None
    unit = np.eye(24)
    matrix = first.turn(unit)
    np.testing.assert_allclose(matrix @ matrix.T, unit, atol=1e-14)
    assert np.array_equal(matrix, again.turn(unit))
    assert not np.array_equal(matrix, other.turn(unit))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_is_scaled_centered_and_turned(axis: int) -> None:
    found = rotation("hadamard", 24, 0)
    assert found is not None
    shape = [5, 6, 7]
    shape[axis] = 24
    array = np.random.default_rng(0).standard_normal(shape)
    factors = np.arange(24.0)
    along = np.moveaxis(array, axis, -1) * factors
    along = (along - along.mean(-1, keepdims=True)) @ found.turn(np.eye(24))
    turned = found.apply(array, axis, factors, centered=True, dtype=array.dtype)
    np.testing.assert_allclose(turned, np.moveaxis(along, -1, axis), atol=1e-12)


# Streams

LLAMA = """
    x = Gather (E, i)
    n1 = SimplifiedLayerNormalization <axis = -1> (x, g1)
    u = MatMul (n1, wu) v = MatMul (n1, wv) s = Sigmoid (u) h = Mul (s, v)
    d = MatMul (h, wd) x2 = Add (x, d)
    n2 = SimplifiedLayerNormalization <axis = -1> (x2, g2)
"""
HEAD = "y = MatMul (n2, wh)"


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_weights_of_a_decoder(kind: Kind) -> None:
    module = model(LLAMA + HEAD)
    before = {name: weight(module, name).astype(np.float64) for name in module.graph.initializers}
    result = rotated(module, Rotate(kind, seed=5))
    assert result.statistics["weights rotated"] == 5
    found = rotation(kind, WIDTH, 5)
    assert found is not None
    q = found.turn(np.eye(WIDTH))
    wanted = {
        "E": before["E"] @ q,
        "wu": q.T @ (before["g1"][:, None] * before["wu"]),
        "wv": q.T @ (before["g1"][:, None] * before["wv"]),
        "wd": before["wd"] @ q,
        "wh": q.T @ (before["g2"][:, None] * before["wh"]),
    }
    for name, array in wanted.items():
        np.testing.assert_allclose(weight(module, name), array, rtol=1e-6, atol=1e-6)
    assert "g1" not in module.graph.initializers
    assert weight(module, "ones").tolist() == [1] * WIDTH


def test_a_tied_table_is_stored_twice() -> None:
    module = model(LLAMA + "t = Transpose <perm = [1, 0]> (E) y = MatMul (n2, t)")
    result = rotated(module)
    more = WORDS * WIDTH * 4
    assert f"'E' is read in two ways and now stored twice: {more} B more" in remarks(module)
    scales = 4 * WIDTH  # two went, one of ones came
    assert result.statistics["bytes after"] == result.statistics["bytes before"] + more - scales  # type: ignore[operator]


def test_a_tied_table_stays_one_where_the_scale_is_one_number() -> None:
    body = LLAMA + "t = Transpose <perm = [1, 0]> (E) y = MatMul (n2, t)"
    module = model(body, given={"g2": np.full(WIDTH, 3.0)})
    rotated(module)
    assert "stored twice" not in remarks(module)
    assert [n for n in module.graph.initializers if n.startswith("E")] == ["E"]


def test_a_table_that_something_else_reads_is_copied() -> None:
    module = model(
        LLAMA + HEAD + " z = Gather (E, i)", outputs="float[b, s, 11] y, float[b, s, 8] z"
    )
    before = weight(module, "E").copy()
    rotated(module, streams=1)
    np.testing.assert_array_equal(weight(module, "E"), before)


SPELLED = {
    "positions and biases": LLAMA.replace("x = Gather (E, i)", "e = Gather (E, i) x = Add (e, P)")
    .replace("d = MatMul (h, wd)", "f = MatMul (h, wd) d = Add (bd, f)")
    + "c = MatMul (n2, wh) y = Add (c, bh)",
    "a gemm on rows": """
        e = Gather (E, i) w8 = Constant <value_ints = [-1, 8]> () x = Reshape (e, w8)
        n1 = SimplifiedLayerNormalization <axis = 1> (x, g1)
        u = Gemm <alpha = 0.5, beta = 2.0> (n1, wu, bu) r = Relu (u)
        d = Gemm <alpha = 2.0, beta = 0.5> (r, wd, bd) x2 = Add (d, x)
        n2 = SimplifiedLayerNormalization (x2, g2)
        z = Gemm <transB = 1> (n2, wht)
        o = Constant <value_ints = [2, 5, 11]> () y = Reshape (z, o)""",
    "a gemm that adds the stream": """
        e = Gather (E, i) w8 = Constant <value_ints = [-1, 8]> () x = Reshape (e, w8)
        n1 = SimplifiedLayerNormalization (x, g1)
        u = Gemm (n1, wu) r = Relu (u) x2 = Gemm <beta = 1.5> (r, wd, x)
        n2 = SimplifiedLayerNormalization (x2, g2) z = MatMul (n2, wh) n3 = Add (x, x)
        n4 = SimplifiedLayerNormalization (n3, g3) z3 = MatMul (n4, wh) z4 = Add (z, z3)
        o = Constant <value_ints = [2, 5, 11]> () y = Reshape (z4, o)""",
    "residuals in the norms": """
        x = Gather (E, i) n1 = SimplifiedLayerNormalization (x, g1)
        u = MatMul (n1, wu) r = Relu (u) d = MatMul (r, wd)
        n2, m, k, x2 = com.microsoft.SkipSimplifiedLayerNormalization (x, d, g2, bd)
        u2 = MatMul (n2, wv) r2 = Relu (u2) d2 = MatMul (r2, wo)
        n3 = com.microsoft.SkipSimplifiedLayerNormalization (x2, d2, g3) y = MatMul (n3, wh)""",
    "layers beside each other": LLAMA.replace(
        "x2 = Add (x, d)",
        "n3 = SimplifiedLayerNormalization (x, g3) w = MatMul (n3, wu) r = Relu (w) "
        "o = MatMul (r, wo) z = Add (o, bo) t = Sum (x, z, d) x2 = Identity (t)",
    )
    + HEAD,
    "a layer that reads and writes": """
        x = Gather (E, i) n1 = SimplifiedLayerNormalization (x, g1)
        d = MatMul (n1, wm) x2 = Add (d, x) d2 = MatMul (x2, wm) x3 = Sub (x2, d2)
        n2 = SimplifiedLayerNormalization (x3, g2) y = MatMul (n2, wh)""",
    "a scaled norm": LLAMA + """
        k = Constant <value_floats = [4.0]> () n3 = Div (n2, k) n4 = Neg (n3)
        y = MatMul (n4, wh)""",
    "the last token": LLAMA + """
        last = Constant <value_ints = [-1]> () n3 = Gather <axis = 1> (n2, last)
        z = MatMul (n3, wh) one = Constant <value_ints = [1, 5, 1]> () y = Tile (z, one)""",
    "operators on tokens": """
        e = Gather (E, i) k = Constant <value_float = 2.5> () x0 = Mul (k, e)
        q = Constant <value_ints = [5, 2, 8]> () xr = Transpose <perm = [1, 0, 2]> (x0)
        xq = Reshape (xr, q) f = Cast <to = 11> (xq) xf = Cast <to = 1> (f)
        xb = Transpose <perm = [1, 0, 2]> (xf) neg = Neg (xb) two = Concat <axis = 1> (neg, xb)
        a, c = Split <axis = 1> (two) twice = Sub (c, a)
        ax = Constant <value_ints = [1]> () from = Constant <value_ints = [0]> ()
        to = Constant <value_ints = [9]> () x = Slice (twice, from, to, ax)
        cast = Cast <to = 1> (i) un = Constant <value_ints = [2]> ()
        token = Unsqueeze (cast, un) m = Sigmoid (token)
        n1 = SimplifiedLayerNormalization (x, g1) u = MatMul (n1, wu) r = Relu (u)
        d = MatMul (r, wd) masked = Mul (d, m) x2 = Add (x, masked) x3 = Div (x2, m)
        n2 = SimplifiedLayerNormalization (x3, g2) s = Shape (n2) y = MatMul (n2, wh)""",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("spelling", SPELLED)
def test_spellings(spelling: str, kind: Kind) -> None:
    rotated(model(SPELLED[spelling]), Rotate(kind))


LAYER = """
    e = Gather (E, i) x = Add (e, P)
    n1 = LayerNormalization <axis = -1, epsilon = 0.001> (x, g1, b1)
    u = MatMul (n1, wu) a = Add (u, bu) h = Relu (a)
    f = MatMul (h, wd) d = Add (f, bd) x2 = Add (x, d)
    n2 = LayerNormalization <axis = -1> (x2, g2, b2)
"""
LAYERED = {
    "biases": LAYER + "y = MatMul (n2, wh)",
    "a tied head": LAYER + "t = Transpose <perm = [1, 0]> (E) y = MatMul (n2, t)",
    "no bias": LAYER.replace("g1, b1", "g1") + "z = MatMul (n2, wh) y = Add (bh, z)",
    "residuals in the norms": """
        x = Gather (E, i) n1 = LayerNormalization (x, g1, b1)
        u = MatMul (n1, wu) r = Relu (u) d = MatMul (r, wd)
        n2, m, k, x2 = com.microsoft.SkipLayerNormalization (x, d, g2, b2, bd)
        u2 = MatMul (n2, wv) r2 = Relu (u2) d2 = MatMul (r2, wo)
        n3 = com.microsoft.SkipLayerNormalization (x2, d2, g3, b3) y = MatMul (n3, wh)""",
    "a gemm": """
        e = Gather (E, i) w8 = Constant <value_ints = [-1, 8]> () x = Reshape (e, w8)
        n1 = LayerNormalization (x, g1, b1)
        u = Gemm <alpha = 0.5, beta = 2.0> (n1, wu, bu) r = Relu (u) d = MatMul (r, wd)
        x2 = Add (d, x) n2 = LayerNormalization (x2, g2, b2)
        z = Gemm <transB = 1, beta = 0.0> (n2, wht, bh)
        o = Constant <value_ints = [2, 5, 11]> () y = Reshape (z, o)""",
    "a layer that reads and writes": """
        x = Gather (E, i) n1 = LayerNormalization (x, g1, b1)
        d = MatMul (n1, wm) x2 = Add (d, x) n2 = LayerNormalization (x2, g2, b2)
        y = MatMul (n2, wh)""",
    "one norm, two layers": LAYER.replace("h = Relu (a)", "v = MatMul (n1, wv) h = Mul (a, v)")
    + "y = MatMul (n2, wh)",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("spelling", LAYERED)
def test_layer_norms_become_rms_norms(spelling: str, kind: Kind) -> None:
    """Also where what is added has a mean, far larger than the rest."""
    module = model(LAYERED[spelling])
    table = weight(module, "E") + 30
    module.replace_initializer(module.graph.initializers["E"], ir.Tensor(table))
    # The mean of 30 costs the reference itself five bits.
    rotated(module, Rotate(kind), tolerance=32 * TOLERANCE)
    assert not [name for name in ops(module) if name.endswith("LayerNormalization") and (
        not name.endswith("SimplifiedLayerNormalization"))]  # fmt: skip


def test_a_newer_opset_gets_its_own_norm() -> None:
    module = model(LAYERED["biases"])
    module.graph.opset_imports[""] = 23
    assert run_pass(Rotate(), module).changed
    assert ops(module).count("RMSNormalization") == 2


def test_float16() -> None:
    """Every weight is rounded anew, to 11 bits."""
    module = model(LLAMA + HEAD, outputs="float16[b, s, 11] y", dtype="float16")
    rotated(module, tolerance=2e-2)
    kinds = {v.const_value.dtype for v in module.graph.initializers.values() if v.const_value}
    assert kinds == {ir.DataType.FLOAT16}


def test_a_weight_that_would_overflow() -> None:
    large = np.full((12, WIDTH), 60000.0)
    module = model(LLAMA + HEAD, "float16[b, s, 11] y", "float16", {"wd": large})
    with pytest.raises(PassError, match="'wd' would not be finite in its type"):
        Rotate().run(module, PassContext(AnalysisManager(module), source="rotate"))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_outliers_are_spread(norm: str) -> None:
    """A channel a hundred times as large as the others stands out of the stream; then not."""
    body = LLAMA + HEAD if norm == "rms" else LAYERED["biases"]
    size = 64
    random = np.random.default_rng(3)
    shapes = {
        name: tuple(size if extent == WIDTH else extent for extent in shape)
        for name, shape in SIZES.items()
    }
    given = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    given["E"][:, 7] *= 100
    given["wd"][:, 7] *= 100
    module = model(body, given=given)

    def peak() -> float:
        seen = module.clone()
        value = next(v for node in seen.graph for v in node.outputs if v.name == "x2")
        seen.graph.outputs.append(value)
        x = run_plain(seen, {"i": IDS})[-1].astype(np.float64)
        x -= x.mean(-1, keepdims=True) if norm == "layer" else 0
        return float((np.abs(x).max(-1) / np.sqrt((x * x).mean(-1))).max())

    before = peak()
    rotated(module)
    assert before > 7.5  # all in one channel would be 8
    assert peak() < 2.5


def test_big_weights_are_spilled() -> None:
    table = np.random.default_rng(0).standard_normal((20000, WIDTH))
    module = model(LLAMA + HEAD, given={"E": table})
    rotated(module)
    assert isinstance(module.graph.initializers["E"].const_value, SpilledTensor)


def test_the_record_is_saved(tmp_path: Path) -> None:
    module = model(LLAMA + HEAD)
    run_pass(Rotate(), module)
    save(module, tmp_path / "rotated.onnx")
    again = load(tmp_path / "rotated.onnx")
    assert not run_pass(Rotate("orthogonal"), again).changed
    assert "already rotated: width 8 by hadamard, seed 0" in remarks(again)


def two_streams(*outputs: str) -> Module:
    second = re.sub(r"\b(n1|n2|x2|x|u|v|s|h|d)\b", r"o\1", LLAMA)
    return model(
        f"{LLAMA} {HEAD} {second} z = MatMul (on2, wh)",
        ", ".join(["float[b, s, 11] y, float[b, s, 11] z", *outputs]),
    )


def test_streams_are_turned_one_by_one() -> None:
    module = two_streams()
    assert rotated(module, streams=2).statistics["weights rotated"] == 10
    limited = two_streams()
    ctx = PassContext(AnalysisManager(limited), source="rotate", limit=RewriteLimit(1))
    before = run_plain(limited, {"i": IDS})
    assert Rotate().run(limited, ctx).statistics["streams rotated"] == 1
    for a, b in zip(run_plain(limited, {"i": IDS}), before, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * np.abs(b).max())


def test_one_stream_stays_and_the_other_is_turned() -> None:
    module = two_streams("float[b, s, 8] ox2")
    rotated(module, streams=1)
    assert "'ox2' is an output of the graph" in remarks(module, "missed")


def test_a_width_without_a_hadamard_matrix() -> None:
    random = np.random.default_rng(0)
    given = {
        name: random.standard_normal([6 if extent == WIDTH else extent for extent in shape])
        for name, shape in SIZES.items()
    }
    module = model(LLAMA + HEAD, given=given)
    rotated(module, streams=0)
    assert "rotate{orthogonal} takes any width" in remarks(module, "missed")
    rotated(module, Rotate("orthogonal"))


# What stays

BLOCK = """
    n1 = SimplifiedLayerNormalization <axis = -1> (x, g1) u = MatMul (n1, wu) r = Relu (u)
    d = MatMul (r, wd) x2 = Add (x, d) n2 = SimplifiedLayerNormalization <axis = -1> (x2, g2)
    y = MatMul (n2, wh)
"""
PLAIN = "x = Gather (E, i)" + BLOCK
BETWEEN = "e = Gather (E, i) {} " + BLOCK
LOGITS = "float[b, s, 11] y"
K = "k = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]> ()"

REFUSED = {
    "an output": (PLAIN, f"{LOGITS}, float[b, s, 8] x2", "'x2' is an output of the graph"),
    "a norm's result as output": (
        PLAIN, f"{LOGITS}, float[b, s, 8] n2", "the norm's result 'n2' is an output of the graph"
    ),
    "post-norm": (
        PLAIN.replace("Add (x, d)", "Add (n1, d)"), LOGITS,
        "a norm's result is part of it (post-norm)",
    ),
    "post-norm behind the layer": (
        PLAIN.replace("d = MatMul (r, wd)", "f = MatMul (r, wd) "
                      "d = SimplifiedLayerNormalization (f, g3)"),
        LOGITS, "(post-norm): the norm's scale lies between what writes the stream",
    ),
    "a norm of a norm": (
        PLAIN.replace("u = MatMul (n1",
                      "n3 = SimplifiedLayerNormalization (n1, g3) u = MatMul (n3"),
        LOGITS, "(post-norm)",
    ),
    "a norm spelled out": (
        PLAIN.replace("n1 = SimplifiedLayerNormalization <axis = -1> (x, g1)",
                      "sq = Mul (x, x) ms = ReduceMean <axes = [-1]> (sq) rt = Sqrt (ms) "
                      "n1 = Div (x, rt)"),
        LOGITS, "if it is part of a norm, run fuse-norm first",
    ),
    "an activation": (
        BETWEEN.format("x = Relu (e)"), LOGITS, "Relu does not treat all channels alike"
    ),
    "a number for each channel": (
        BETWEEN.format(K + "x = Mul (e, k)"), LOGITS, "scales each channel by a number of its own"
    ),
    "a product": (
        BETWEEN.format("x = Mul (e, e)"), LOGITS, "Mul multiplies channels of two activations"
    ),
    "one number for all channels": (
        BETWEEN.format("k = Constant <value_floats = [2.0]> () x = Add (e, k)"), LOGITS,
        "'k' has no number for each channel",
    ),
    "a cast to integers": (
        BETWEEN.format("c = Cast <to = 7> (e) x = Cast <to = 1> (c)"), LOGITS,
        "Cast makes it of integers",
    ),
    "channels in another order": (
        BETWEEN.format("k = Constant <value_ints = [7, 6, 5, 4, 3, 2, 1, 0]> () "
                       "x = Gather <axis = 2> (e, k)"),
        LOGITS, "Gather acts on the axis of channels",
    ),
    "channels cut": (
        BETWEEN.format("a, c = Split <axis = -1> (e) x = Concat <axis = -1> (c, a)"), LOGITS,
        "Concat acts on the axis of channels",
    ),
    "channels sliced": (
        BETWEEN.format("f = Constant <value_ints = [0]> () t = Constant <value_ints = [8]> () "
                       "a = Constant <value_ints = [-1]> () x = Slice (e, f, t, a)"),
        LOGITS, "Slice acts on the axis of channels",
    ),
    "channels turned away": (
        BETWEEN.format("t = Transpose <perm = [0, 2, 1]> (e) x = Transpose <perm = [0, 2, 1]> (t)"),
        LOGITS, "Transpose acts on the axis of channels",
    ),
    "channels dealt anew": (
        BETWEEN.format("q = Constant <value_ints = [2, 5, 2, 4]> () a = Reshape (e, q) "
                       "w = Constant <value_ints = [2, 5, 8]> () x = Reshape (a, w)"),
        LOGITS, "'a' does not provably have the channels last",
    ),
    "a product of activations": (
        PLAIN.replace("d = MatMul (r, wd)", "c = Cast <to = 1> (i) w = ReduceMax <keepdims = 0> "
                      "(c) wx = Mul (wd, w) d = MatMul (r, wx)"),
        LOGITS, "a MatMul has no constant matrix on its right",
    ),
    "a quantized weight": (
        PLAIN.replace("d = MatMul (r, wd)", "w8 = Constant <value_float = 0.5> () "
                      "q = QuantizeLinear (wd, w8) w = DequantizeLinear (q, w8) d = MatMul (r, w)"),
        LOGITS, "no constant matrix on its right; rotate before quantizing",
    ),
    "a scale that varies": (
        PLAIN.replace("n1 = ", "c = Cast <to = 1> (i) w = ReduceMax <keepdims = 0> (c) "
                      "gx = Mul (g1, w) n1 = ").replace("(x, g1)", "(x, gx)"),
        LOGITS, "the scale of its norm is no constant",
    ),
    "two kinds of norms": (
        PLAIN.replace("n1 = Simplified", "n1 = "), LOGITS, "LayerNorm and RMSNorm both read it"
    ),
    "a layer that sees the mean": (
        PLAIN.replace("SimplifiedLayerN", "LayerN").replace("MatMul (n1", "MatMul (x"), LOGITS,
        "a linear layer reads it with its mean, which its norms subtract",
    ),
    "a norm over tokens": (
        BETWEEN.replace("<axis = -1> (x2", "<axis = 1> (x2").format("x = Add (e, P)"), LOGITS,
        "its norm is over several axes",
    ),
    "the deviation": (
        PLAIN.replace("n2 = Simplified", "n2, m, w = ").replace("n1 = Simplified", "n1 = "),
        f"{LOGITS}, float[b, s, 1] w", "the mean or deviation that its norm finds is read",
    ),
    "an activation behind a norm": (
        PLAIN.replace("u = MatMul (n1", "t = Tanh (n1) u = MatMul (t"), LOGITS,
        "Tanh reads the result of its norm, which is no linear layer",
    ),
    "a number for each channel behind a norm": (
        PLAIN.replace("u = MatMul (n1", K + "t = Mul (n1, k) u = MatMul (t"),
        LOGITS,
        "after its norm, Mul scales each channel by a number of its own",
    ),
    "a bias that is scaled": (
        PLAIN.replace("SimplifiedLayerN", "LayerN")
        .replace("(x, g1)", "(x, g1, b1)")
        .replace("u = MatMul (n1", "t = Neg (n1) u = MatMul (t"),
        LOGITS,
        "Neg reads the result of its norm, which is no linear layer",
    ),
    "channels cut behind a norm": (
        PLAIN.replace("u = MatMul (n1", "t = Transpose <perm = [0, 2, 1]> (n1) "
                      "v = Transpose <perm = [0, 2, 1]> (t) u = MatMul (v"),
        LOGITS, "after its norm, Transpose acts on the axis of channels",
    ),
    "a branch": (
        PLAIN + "c = Constant <value_ints = [1]> () f = Cast <to = 9> (c) z = If (f) <"
        "then_branch = t () => (float[b, s, 8] o) { o = Identity (x2) },"
        "else_branch = e () => (float[b, s, 8] p) { p = Neg (x2) }>",
        f"{LOGITS}, float[b, s, 8] z", "a subgraph reads it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays(case: str) -> None:
    body, outputs, reason = REFUSED[case]
    module = model(body, outputs)
    assert not run_pass(Rotate(), module).changed
    missed = remarks(module, "missed")
    assert missed.startswith("a stream of width 8 stays: ")
    assert reason in missed


def test_a_stream_that_comes_in() -> None:
    body = BLOCK.replace("x2 = Add (x, d)", "x1 = Add (x, d) x2 = Identity (x1)")
    module = model("x = Gather (E, i) " + body)
    gather = next(node for node in module.graph if node.op_type == "Gather")
    given = ir.Value(
        name="embedded", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "s", 8])
    )
    module.graph.inputs.append(given)
    gather.outputs[0].replace_all_uses_with(given)
    assert not run_pass(Rotate(), module).changed
    assert "'embedded' comes from outside of the graph" in remarks(module, "missed")


def test_without_a_stream() -> None:
    module = model("x = Gather (E, i) y = MatMul (x, wh)")
    assert not run_pass(Rotate(), module).changed
    assert "no residual stream" in remarks(module)


def test_options() -> None:
    with pytest.raises(UsageError, match="seed=-1"):
        Rotate(seed=-1)


# Drawn streams


class _Drawn:
    """Draws a stream: writers, readers, norms and operators on tokens in any order and spelling."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.layered = self.random.random() < 0.5
        self.steps: list[str] = []
        self.count = 0

    def text(self) -> str:
        x = self.say("Gather (E, i)")
        if self.random.random() < 0.5:
            x = self.say(self.random.choice([f"Add ({x}, P)", f"Add (P, {x})"]))
        for _ in range(self.random.randint(1, 3)):
            x = self.block(self.moved(x))
        n = self.viewed(self.normed(self.moved(x)))
        head = self.random.choice(["wh", "tied", "gemm"])
        if head == "gemm":
            rows = self.say(f"Flatten <axis = 2> ({n})")
            rows = self.say(f"Gemm <transB = 1> ({rows}, {self.random.choice(['wht', 'E'])}, bh)")
            shape = self.say("Constant <value_ints = [2, 5, 11]> ()")
            self.steps.append(f"y = Reshape ({rows}, {shape})")
        else:
            head = self.say("Transpose <perm = [1, 0]> (E)") if head == "tied" else head
            self.steps.append(f"y = MatMul ({n}, {head})")
        return " ".join(self.steps)

    def say(self, expression: str) -> str:
        self.count += 1
        self.steps.append(f"t{self.count} = {expression}")
        return f"t{self.count}"

    def block(self, x: str) -> str:
        if self.random.random() < 0.2:
            d = self.say(f"MatMul ({self.normed(x)}, wm)")
        else:
            n = self.viewed(self.normed(x))
            h = self.say(f"MatMul ({n}, {self.random.choice(['wu', 'wv'])})")
            if self.random.random() < 0.5:
                h = self.say(f"Add ({h}, bu)")
            if self.random.random() < 0.5:
                h = self.say(f"Mul ({h}, {self.say(f'MatMul ({n}, wv)')})")
            d = self.say(f"MatMul ({self.say(f'Tanh ({h})')}, {self.random.choice(['wd', 'wo'])})")
        if self.random.random() < 0.5:
            d = self.say(f"Add ({d}, {self.random.choice(['bd', 'bo'])})")
        form = self.random.choice(["Add ({0}, {1})", "Add ({1}, {0})", "Sub ({0}, {1})", "skip"])
        if form != "skip":
            return self.say(form.format(x, self.moved(d)))
        self.count += 1
        n, total = f"n{self.count}", f"t{self.count}"
        rest = "SkipLayerNormalization ({}, {}, g3, b3)" if self.layered else (
            "SkipSimplifiedLayerNormalization ({}, {}, g3, bd)")  # fmt: skip
        self.steps.append(f"{n}, , , {total} = com.microsoft.{rest.format(x, d)}")
        return self.say(f"Add ({total}, {self.say(f'MatMul ({n}, wm)')})")

    def normed(self, x: str) -> str:
        scale, bias = self.random.choice(["g1", "g2"]), self.random.choice(["b1", "b2"])
        if not self.layered:
            return self.say(f"SimplifiedLayerNormalization <axis = -1> ({x}, {scale})")
        if self.random.random() < 0.3:
            return self.say(f"LayerNormalization <axis = 2> ({x}, {scale})")
        return self.say(f"LayerNormalization <epsilon = 0.01> ({x}, {scale}, {bias})")

    def moved(self, x: str) -> str:
        """Send the stream through operators that give it back in its shape, times a number."""
        kind = self.random.choice(["", "", "", "Identity", "Scale", "Turn", "Regroup", "Halves"])
        if kind == "Identity":
            return self.say(f"Identity ({x})")
        if kind == "Scale":
            return self.say(f"Mul ({self.say('Constant <value_float = 1.5> ()')}, {x})")
        if kind == "Turn":
            turned = self.say(f"Transpose <perm = [1, 0, 2]> ({x})")
            return self.say(f"Transpose <perm = [1, 0, 2]> ({turned})")
        if kind == "Regroup":
            rows = self.say(f"Reshape ({x}, {self.say('Constant <value_ints = [-1, 8]> ()')})")
            return self.say(f"Reshape ({rows}, {self.say('Constant <value_ints = [2, 5, 8]> ()')})")
        if kind == "Halves":
            self.count += 1
            first, second = f"a{self.count}", f"b{self.count}_"
            sizes = self.say("Constant <value_ints = [1, 1]> ()")
            self.steps.append(f"{first}, {second} = Split <axis = 0> ({x}, {sizes})")
            return self.say(f"Concat <axis = 0> ({second}, {first})")
        return x

    def viewed(self, n: str) -> str:
        """Look at what a norm gives in other ways, which keep its channels."""
        return self.say(f"Identity ({n})") if self.random.random() < 0.3 else n


@pytest.mark.parametrize("seed", range(60))
def test_drawn_streams(seed: int) -> None:
    """Depth and products of activations magnify rounding; a wrong weight errs by the whole."""
    module = model(_Drawn(seed).text())
    rotated(module, Rotate("hadamard" if seed % 2 else "orthogonal", seed), tolerance=2e-3)
