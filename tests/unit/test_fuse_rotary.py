"""fuse-rotary: every spelling agrees with float64, and what only looks like one is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import module_of, ops, plain_session, run_pass, run_pass_to_the_end, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.core.errors import UsageError
from lwc.core.module import Module
from lwc.passes.attention.fuse_attention import FuseAttention
from lwc.passes.attention.fuse_rotary import POSITIONS_FIT, FuseRotary
from lwc.passes.attention.rotary_in_attention import POSITIONS_COUNT
from lwc.pipeline.passes import PassContext
from lwc.verify import check_pass, sketches, with_near_misses
from lwc.verify.generate.motifs import rotary

Array = np.ndarray[Any, Any]

ATOL = 2e-6
"""float32: two products of numbers up to 5 and a cosine, whose own error is half a unit."""

LAST = 2**63 - 1
HEADS, SIZE = 3, 16


class Graph:
    """Builds a model of rotary embeddings from nodes; every method returns a name."""

    def __init__(self, opset: int = 18, dtype: type[Any] = np.float32) -> None:
        self.opset, self.dtype = opset, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str], dtype: Any = None) -> str:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, content: Any, dtype: Any = np.int64) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(content, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [f"v{len(self.nodes)}_{n}" for n in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0]

    def cut(self, x: str, begin: int, end: int, step: int = 1) -> str:
        numbers = (self.constant([n]) for n in (begin, end, -1, step))
        return self.op("Slice", x, *numbers)

    def module(self, *outputs: str) -> Module:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        results = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, results, self.weights)
        imports = [helper.make_opsetid("", self.opset)]
        return Module(ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10)))

    # Parts of rotary embeddings

    def counted(self, x: str, axis: int = 2) -> str:
        """Return positions `[S]`, counted along an axis."""
        length = self.op("Gather", self.op("Shape", x), self.constant(axis))
        return self.op("Range", self.constant(0), length, self.constant(1))

    def angles(self, places: str, count: int, axes: Sequence[int] = (-1,)) -> str:
        wide = self.op("Unsqueeze", places, self.constant(list(axes)))
        wide = self.op("Cast", wide, to=TensorProto.FLOAT)
        return self.op("Mul", wide, self.constant(frequencies(count), np.float32))

    def waves(self, angles: str, axes: Sequence[int] = (0, 1)) -> tuple[str, str]:
        made = [self.op(kind, angles) for kind in ("Cos", "Sin")]
        if self.dtype != np.float32:
            to = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
            made = [self.op("Cast", wave, to=to) for wave in made]
        cos, sin = (self.op("Unsqueeze", wave, self.constant(list(axes))) for wave in made)
        return cos, sin

    def halves(self, x: str, cos: str, sin: str, size: int = SIZE) -> str:
        """Return `x · cos + rotate_half(x) · sin`, with waves of the whole size."""
        low, high = self.cut(x, 0, size // 2), self.cut(x, size // 2, LAST)
        turned = self.op("Concat", self.op("Neg", high), low, axis=-1)
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin))

    def pairs(self, x: str, cos: str, sin: str, size: int = SIZE) -> str:
        """Return neighbours turned with each other, with waves of half the size."""
        even, odd = self.cut(x, 0, LAST, 2), self.cut(x, 1, LAST, 2)
        first = self.op("Sub", self.op("Mul", even, cos), self.op("Mul", odd, sin))
        second = self.op("Add", self.op("Mul", even, sin), self.op("Mul", odd, cos))
        axis = self.constant([-1])
        both = [self.op("Unsqueeze", part, axis) for part in (first, second)]
        return self.op("Reshape", self.op("Concat", *both, axis=-1), self.constant([0, 0, 0, size]))

    def usual(self, x: str, places: str | None = None, size: int = SIZE) -> str:
        """Return the halves of heads `[N, H, S, size]`, as Llama has them."""
        angles = self.angles(places or self.counted(x), size // 2)
        axes = (0, 1) if places is None else (1,)
        cos, sin = self.waves(self.op("Concat", angles, angles, axis=-1), axes)
        return self.halves(x, cos, sin, size)


def frequencies(count: int) -> Array:
    return 10000.0 ** (-np.arange(count) / count)


def turned(x: Array, positions: Array, *, pairs: bool = False, size: int | None = None) -> Array:
    """Turn heads `[N, H, S, D]` in float64 at positions `[N, S]`, by angles rounded to float32."""
    size = size or x.shape[-1]
    places = positions[:, None, :, None].astype(np.float32)
    angles = (places * frequencies(size // 2).astype(np.float32)).astype(np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    rest = x[..., size:]
    a, b = (x[..., :size:2], x[..., 1:size:2]) if pairs else np.split(x[..., :size], 2, axis=-1)
    parts = a * cos - b * sin, b * cos + a * sin
    joined = (
        np.stack(parts, -1).reshape(*x.shape[:-1], size) if pairs else np.concatenate(parts, -1)
    )
    return np.concatenate([joined, rest], -1)


def heads(batch: int = 2, length: int = 5, size: int = SIZE) -> Array:
    return np.random.default_rng(0).standard_normal((batch, HEADS, length, size)).astype(np.float32)


def counted(x: Array, start: int = 0) -> Array:
    return np.broadcast_to(start + np.arange(x.shape[2]), (x.shape[0], x.shape[2]))


def usual(**options: Any) -> Module:
    graph = Graph(**options)
    return graph.module(graph.usual(graph.input("x", ["N", HEADS, "S", SIZE])))


def node_of(module: Module) -> ir.Node:
    (node,) = (node for node in module.graph if node.op_type == "RotaryEmbedding")
    return node


def missed(module: Module) -> str:
    return "\n".join(each.message for each in module.remarks if each.kind == "missed")


def test_halves() -> None:
    module, x = usual(), heads()
    run_pass_to_the_end(FuseRotary(), module)
    assert ops(module) == ["RotaryEmbedding"]
    np.testing.assert_allclose(run_plain(module, {"x": x})[0], turned(x, counted(x)), atol=ATOL)


def test_pairs() -> None:
    graph = Graph()
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    waves = graph.waves(graph.angles(graph.counted(x), SIZE // 2))
    module, feed = graph.module(graph.pairs(x, *waves)), heads()
    run_pass_to_the_end(FuseRotary(), module)
    assert ops(module) == ["RotaryEmbedding"]
    wanted = turned(feed, counted(feed), pairs=True)
    np.testing.assert_allclose(run_plain(module, {"x": feed})[0], wanted, atol=ATOL)


def test_pairs_turned_in_place_as_gptj_has_it() -> None:
    """Heads `[N, S, H, D]`, cosines repeated for both of a pair, and Stack by Unsqueeze."""
    graph = Graph()
    x = graph.input("x", ["N", "S", HEADS, SIZE])
    angles = graph.angles(graph.counted(x, 1), SIZE // 2)
    wide = graph.op("Unsqueeze", angles, graph.constant([-1]))
    twice = graph.op("Expand", wide, graph.constant([1, 1, 2]))
    cos, sin = graph.waves(graph.op("Reshape", twice, graph.constant([-1, SIZE])), (1,))
    even, odd = graph.cut(x, 0, LAST, 2), graph.op("Neg", graph.cut(x, 1, LAST, 2))
    both = [graph.op("Unsqueeze", part, graph.constant([-1])) for part in (odd, even)]
    shape = graph.constant([0, 0, HEADS, SIZE])
    other = graph.op("Reshape", graph.op("Concat", *both, axis=-1), shape)
    y = graph.op("Add", graph.op("Mul", x, cos), graph.op("Mul", other, sin))
    module, feed = graph.module(y), heads()
    run_pass_to_the_end(FuseRotary(), module)
    assert ops(module) == ["Reshape", "RotaryEmbedding", "Reshape"]
    assert node_of(module).attributes["interleaved"].value == 1
    (result,) = run_plain(module, {"x": feed.transpose(0, 2, 1, 3)})
    wanted = turned(feed, counted(feed), pairs=True)
    np.testing.assert_allclose(result.transpose(0, 2, 1, 3), wanted, atol=ATOL)


def test_products_of_halves() -> None:
    graph = Graph()
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    cos, sin = graph.waves(graph.angles(graph.counted(x), SIZE // 2))
    half = graph.constant([SIZE // 2, SIZE // 2])
    graph.op("Split", x, half, outputs=2, axis=-1)
    low, high = graph.nodes[-1].output
    first = graph.op("Sub", graph.op("Mul", low, cos), graph.op("Mul", sin, high))
    second = graph.op("Add", graph.op("Mul", cos, high), graph.op("Mul", low, sin))
    module, feed = graph.module(graph.op("Concat", first, second, axis=3)), heads()
    run_pass_to_the_end(FuseRotary(), module)
    assert ops(module) == ["RotaryEmbedding"]
    (result,) = run_plain(module, {"x": feed})
    np.testing.assert_allclose(result, turned(feed, counted(feed)), atol=ATOL)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("opset", [18, 23])
def test_part_of_a_head(pairs: bool, opset: int) -> None:
    graph = Graph(opset)
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    part, rest = graph.cut(x, 0, 6), graph.cut(x, 6, LAST)
    angles = graph.angles(graph.counted(x), 3)
    if not pairs:
        angles = graph.op("Concat", angles, angles, axis=-1)
    cos, sin = graph.waves(angles)
    y = (graph.pairs if pairs else graph.halves)(part, cos, sin, 6)
    module, feed = graph.module(graph.op("Concat", y, rest, axis=-1)), heads()
    result = run_pass_to_the_end(FuseRotary(), module)
    assert result.rewrites == {"rotary": 1}
    assert node_of(module).attributes["rotary_embedding_dim"].value == 6
    wanted = turned(feed, counted(feed), pairs=pairs, size=6)
    np.testing.assert_allclose(run_plain(module, {"x": feed})[0], wanted, atol=ATOL)


def test_positions_of_an_input() -> None:
    graph = Graph()
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    places = graph.input("places", ["N", "S"], np.int32)
    module, feed = graph.module(graph.usual(x, places)), heads()
    run_pass_to_the_end(FuseRotary(), module)
    assert ops(module) == ["Cast", "RotaryEmbedding"]
    at = np.array([[0, 3, 1, 4095, 2], [7, 8, 9, 10, 11]], np.int32)
    (result,) = run_plain(module, {"x": feed, "places": at})
    np.testing.assert_allclose(result, turned(feed, at), atol=ATOL)


@pytest.mark.parametrize(
    ("less", "swapped", "exclusive"), [(1, False, 0), (3, False, 0), (1, True, 0), (1, False, 1)]
)
def test_positions_counted_in_a_mask(less: int, swapped: bool, exclusive: int) -> None:
    """As Hugging Face has them for padding on the left: -1 never arrives, -3 may.

    Counted without the token itself, the first one is at -1.
    """
    graph = Graph()
    x, mask = graph.input("x", ["N", HEADS, "S", SIZE]), graph.input("mask", ["N", "S"], np.int64)
    places = graph.op("CumSum", mask, graph.constant(1), exclusive=exclusive)
    places = graph.op("Sub", places, graph.constant(less))
    hidden = graph.op("Equal", mask, graph.constant(0))
    branches = [graph.constant(1), places]
    places = graph.op("Where", hidden, *(branches[::-1] if swapped else branches))
    module, feed = graph.module(graph.usual(x, places)), heads()
    result = run_pass(FuseRotary(), module)
    legal = less == 1 and not swapped and not exclusive
    assert bool(result.rewrites) == legal
    if not legal:
        assert "below 0" in missed(module)
        return
    (found,) = run_plain(module, {"x": feed, "mask": np.array([[0, 0, 1, 1, 1], [1] * 5])})
    at = np.array([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    np.testing.assert_allclose(found, turned(feed, at), atol=ATOL)


def test_positions_that_all_sequences_share() -> None:
    graph = Graph()
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    places = graph.input("places", [1, "S"], np.int64)
    module, feed = graph.module(graph.usual(x, places)), heads()
    run_pass_to_the_end(FuseRotary(), module)
    at = np.array([[4, 0, 2, 9, 1]])
    (result,) = run_plain(module, {"x": feed, "places": at})
    np.testing.assert_allclose(result, turned(feed, np.repeat(at, 2, 0)), atol=ATOL)


def test_positions_counted_from_a_number_on() -> None:
    graph = Graph()
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    places = graph.op("Add", graph.counted(x), graph.constant(7))
    places = graph.op("Unsqueeze", places, graph.constant([0]))
    module, feed = graph.module(graph.usual(x, places)), heads()
    run_pass_to_the_end(FuseRotary(), module)
    assert ops(module) == ["RotaryEmbedding"]
    (result,) = run_plain(module, {"x": feed})
    np.testing.assert_allclose(result, turned(feed, counted(feed, 7)), atol=ATOL)


@pytest.mark.parametrize("constant", [False, True])
def test_tables_that_the_graph_has(constant: bool) -> None:
    """Gathered at positions, or the first rows of them; never longer than they were."""
    graph = Graph()
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    angles = np.tile(np.arange(12)[:, None] * frequencies(SIZE // 2), 2)
    tables = [graph.constant(f(angles), np.float32) for f in (np.cos, np.sin)]
    places = graph.counted(x) if constant else graph.input("places", ["N", "S"], np.int64)
    rows = [graph.op("Gather", table, places) for table in tables]
    axes = graph.constant([0, 1] if constant else [1])
    cos, sin = (graph.op("Unsqueeze", each, axes) for each in rows)
    module, feed = graph.module(graph.halves(x, cos, sin)), heads()
    run_pass_to_the_end(FuseRotary(max_positions=100), module)
    assert ops(module) == ["RotaryEmbedding"]
    assert module.graph.initializers["cos_table"].shape == ir.Shape([12, SIZE // 2])
    at = counted(feed) if constant else np.array([[0, 3, 1, 4, 11]] * 2)
    (result,) = run_plain(module, {"x": feed} if constant else {"x": feed, "places": at})
    np.testing.assert_allclose(result, turned(feed, at), atol=ATOL)


def test_frequencies_by_matmul_and_a_factor() -> None:
    graph = Graph()
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    row = graph.op("Unsqueeze", graph.counted(x), graph.constant([0, 1]))
    row = graph.op("Cast", row, to=TensorProto.FLOAT)
    column = graph.constant(frequencies(SIZE // 2).reshape(1, -1, 1), np.float32)
    angles = graph.op("Transpose", graph.op("MatMul", column, row), perm=[0, 2, 1])
    waves = graph.waves(graph.op("Concat", angles, angles, axis=-1), (1,))
    factor = graph.constant(1.25, np.float32)
    cos, sin = (graph.op("Mul", wave, factor) for wave in waves)
    module, feed = graph.module(graph.halves(x, cos, sin)), heads()
    run_pass_to_the_end(FuseRotary(), module)
    assert ops(module) == ["RotaryEmbedding"]
    wanted = 1.25 * turned(feed, counted(feed))
    np.testing.assert_allclose(run_plain(module, {"x": feed})[0], wanted, atol=2 * ATOL)


def test_frequencies_by_einsum() -> None:
    graph = Graph()
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    row = graph.op("Cast", graph.counted(x), to=TensorProto.FLOAT)
    column = graph.constant(frequencies(SIZE // 2), np.float32)
    angles = graph.op("Einsum", row, column, equation="i,j->ij")
    y = graph.halves(x, *graph.waves(graph.op("Concat", angles, angles, axis=-1)))
    module = graph.module(y)
    run_pass_to_the_end(FuseRotary(), module)
    assert ops(module) == ["RotaryEmbedding"]


def test_standard_form() -> None:
    module, x = usual(opset=23), heads()
    run_pass_to_the_end(FuseRotary(), module)
    assert node_of(module).domain == ""
    np.testing.assert_allclose(run_plain(module, {"x": x})[0], turned(x, counted(x)), atol=ATOL)
    forced = usual(opset=23)
    run_pass(FuseRotary(form="contrib"), forced)
    assert node_of(forced).domain == "com.microsoft"
    refused = usual()
    assert not run_pass(FuseRotary(form="standard"), refused).rewrites
    assert "needs opset 23" in missed(refused)


def test_half_precision() -> None:
    """Products of float16 have 11 bits; up to 5 times 2 units of them."""
    module, x = usual(dtype=np.float16), heads().astype(np.float16)
    run_pass_to_the_end(FuseRotary(), module)
    assert ops(module) == ["RotaryEmbedding"]
    wanted = turned(x.astype(np.float64), counted(x))
    np.testing.assert_allclose(run_plain(module, {"x": x})[0], wanted, atol=5e-3)


@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
def test_types_without_a_kernel_stay(dtype: type[Any]) -> None:
    assert not run_pass(FuseRotary(), usual(dtype=dtype)).rewrites


def test_the_table_holds_what_the_graph_computes() -> None:
    """Far out the angle is what float32 makes of the product, not what it should be."""
    module, before, x = usual(), usual(), heads(1, 5000)
    run_pass(FuseRotary(max_positions=5000), module)
    (wanted,), (found,) = (run_plain(each, {"x": x}) for each in (before, module))
    np.testing.assert_allclose(found, wanted, atol=ATOL)


def test_behind_the_table_is_an_error() -> None:
    module = usual()
    run_pass(FuseRotary(max_positions=8), module)
    session = plain_session(module)
    session.run(None, {"x": heads(length=8)})
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.RuntimeException):
        session.run(None, {"x": heads(length=9)})


@pytest.mark.parametrize("position", [-1, 8])
@pytest.mark.parametrize("opset", [18, 23])
def test_a_position_outside_the_table_is_an_error(position: int, opset: int) -> None:
    graph = Graph(opset)
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    module = graph.module(graph.usual(x, graph.input("places", ["N", "S"], np.int64)))
    run_pass(FuseRotary(max_positions=8), module)
    session = plain_session(module)
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument):
        session.run(None, {"x": heads(1, 1), "places": np.array([[position]])})


def test_a_length_that_is_known_needs_no_assumption() -> None:
    graph = Graph()
    module = graph.module(graph.usual(graph.input("x", ["N", HEADS, 6, SIZE])))
    run_pass(FuseRotary(), module)
    assert module.graph.initializers["cos_table"].shape == ir.Shape([6, SIZE // 2])
    assert "positions" not in "\n".join(each.message for each in module.remarks)


def test_positions_that_begin_behind_the_tables() -> None:
    graph = Graph()
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    places = graph.op("Add", graph.counted(x), graph.constant(20))
    axes = graph.op("Unsqueeze", places, graph.constant([0]))
    module = graph.module(graph.usual(x, axes))
    assert not run_pass(FuseRotary(8), module).rewrites
    assert "begin at 20, behind tables of 8" in missed(module)
    assert run_pass(FuseRotary(21), module).rewrites


def test_what_is_assumed_is_said() -> None:
    module = usual()
    run_pass(FuseRotary(), module)
    (warning,) = (each.message for each in module.remarks if each.kind == "warning")
    assert "tables hold 4096 positions" in warning
    granted = usual()
    context = PassContext(AnalysisManager(granted), source="x", granted=frozenset({"Positions"}))
    FuseRotary(128).run(granted, context)
    assert POSITIONS_FIT in "\n".join(each.message for each in granted.remarks)
    with pytest.raises(UsageError, match="max-positions cannot be -1"):
        FuseRotary(-1)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ('{"max_position_embeddings": 96}', 96),
        ('{"text_config": {"max_position_embeddings": 48}}', 48),
        ('{"max_position_embeddings": 1048576}', 131072),
        ('{"n_positions": 0}', None),
        ('{"n_positions": true}', None),
        ("[1]", None),
        ("{", None),
    ],
)
def test_the_configuration_says_how_far_positions_reach(
    config: str, positions: int | None, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(config)
    module = usual().with_source(companions={"config.json": str(file)})
    run_pass(FuseRotary(), module)
    assert module.graph.initializers["cos_table"].shape == ir.Shape([positions or 4096, SIZE // 2])
    warned = "warning" in [each.kind for each in module.remarks]
    assert warned == (positions is None or positions == 131072)
    module = usual().with_source(path=str(tmp_path / "model.onnx"))
    run_pass(FuseRotary(), module)
    assert module.graph.initializers["cos_table"].shape == ir.Shape([positions or 4096, SIZE // 2])
    run_pass(FuseRotary(32), module := usual().with_source(companions={"config.json": str(file)}))
    assert module.graph.initializers["cos_table"].shape == ir.Shape([32, SIZE // 2])


def test_queries_and_keys_share_tables() -> None:
    graph = Graph()
    results = []
    for name, count in (("q", HEADS), ("k", 1)):
        results.append(graph.usual(graph.input(name, ["N", count, "S", SIZE])))
    module = graph.module(*results)
    assert run_pass(FuseRotary(), module).rewrites == {"rotary": 2}
    assert [each.kind for each in module.remarks].count("warning") == 1
    tables = [name for name in module.graph.initializers if "table" in name]
    assert sorted(tables) == ["cos_table", "sin_table"]


NEAR = {
    "sign": "other signs",
    "swapped-halves": "other signs",
    "swapped-waves": "in each other's place",
    "other-axis": "number of heads is not known",
    "frequencies": "not made of a position and constants alone",
    "positions": "different positions",
    "angles": "different angles",
    "negative": "below 0",
}


@pytest.mark.parametrize("change", NEAR)
def test_near_misses_stay(change: str) -> None:
    graph = Graph()
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    places = graph.counted(x, 1 if change == "other-axis" else 2)
    if change == "negative":
        places = graph.op("Sub", places, graph.constant(1))
    angles = graph.angles(places, SIZE // 2)
    if change == "frequencies":
        angles = graph.op("Mul", angles, graph.input("factor", [1]))
    cos, sin = graph.waves(
        graph.op("Concat", angles, angles, axis=-1), (0, 2) if change == "other-axis" else (0, 1)
    )
    if change in ("positions", "angles"):
        other = graph.op("Add", places, graph.constant(1)) if change == "positions" else places
        wide = graph.angles(other, SIZE // 2)
        if change == "angles":
            wide = graph.op("Mul", wide, graph.constant(2, np.float32))
        _, sin = graph.waves(graph.op("Concat", wide, wide, axis=-1))
    if change == "swapped-waves":
        cos, sin = sin, cos
    low, high = graph.cut(x, 0, SIZE // 2), graph.cut(x, SIZE // 2, LAST)
    parts = [graph.op("Neg", high), low]
    if change == "swapped-halves":
        parts = [high, graph.op("Neg", low)]
    other = graph.op("Concat", *parts, axis=-1)
    last = "Sub" if change == "sign" else "Add"
    y = graph.op(last, graph.op("Mul", x, cos), graph.op("Mul", other, sin))
    module = graph.module(y)
    result = run_pass(FuseRotary(), module)
    assert not result.rewrites
    assert NEAR[change] in missed(module)


def test_tables_that_begin_elsewhere_stay() -> None:
    """A table whose first row is turned is no table of positions from 0 on."""
    graph = Graph()
    x = graph.input("x", ["N", HEADS, "S", SIZE])
    angles = np.tile((1 + np.arange(12)[:, None]) * frequencies(SIZE // 2), 2)
    tables = [graph.constant(f(angles), np.float32) for f in (np.cos, np.sin)]
    places = graph.input("places", ["N", "S"], np.int64)
    axes = graph.constant([1])
    rows = (graph.op("Gather", table, places) for table in tables)
    cos, sin = (graph.op("Unsqueeze", each, axes) for each in rows)
    module = graph.module(graph.halves(x, cos, sin))
    assert not run_pass(FuseRotary(), module).rewrites
    assert "at position 0 it turns" in missed(module)


def test_one_position_that_is_a_number_stays() -> None:
    """Found by check_pass: what is known of a float scalar is a number, not an index."""
    graph = Graph()
    x = graph.input("x", ["N", HEADS, 1, SIZE])
    row = graph.op("Unsqueeze", graph.constant([0.0], np.float32), graph.constant([1]))
    row = graph.op("MatMul", row, graph.constant([frequencies(SIZE // 2)], np.float32))
    waves = [graph.op(kind, graph.op("Concat", row, row, axis=-1)) for kind in ("Cos", "Sin")]
    module = graph.module(graph.halves(x, waves[0], waves[1]))
    assert not run_pass(FuseRotary(), module).rewrites
    assert "depend on no position" in missed(module)


# Inside attention

ATTENTION = """
g (float[N, S, 64] x, int64[N, S] places, float[32, W] cos, float[32, W] sin)
    => (float[N, 4, S, 16] y)
<int64[4] shape = {0, 0, 4, 16}, float scale = {0.25}, int64[1] first = {0}> {
    h = Reshape (x, shape)
    heads = Transpose <perm = [0, 2, 1, 3]> (h)
    q = com.microsoft.RotaryEmbedding <interleaved = %d> (heads, %s, cos, sin)
    other = Neg (heads)
    k = com.microsoft.RotaryEmbedding <interleaved = %d> (other, %s, cos, sin)
    t = Transpose <perm = [0, 1, 3, 2]> (k)
    scores = MatMul (q, t)
    scaled = Mul (scores, scale)
    shares = Softmax <axis = -1> (scaled)
    y = MatMul (shares, heads)
}"""


def attention(places: str, pairs: tuple[int, int] = (0, 0), columns: int = 8) -> Module:
    """Return attention whose queries and keys are turned."""
    text = ATTENTION.replace("W]", f"{columns}]") % (pairs[0], places, pairs[1], places)
    if columns != 8:
        text = text.replace("<interleaved", "<num_heads = 4, rotary_embedding_dim = 8, interleaved")
    module = module_of(text, opset=21, ir_version=10)
    module.import_opset("com.microsoft", 1)
    return module


def absorbed(module: Module, *grant: str) -> Module:
    context = PassContext(
        AnalysisManager(module), source="fuse-attention", granted=frozenset(grant)
    )
    FuseAttention(form="gqa").run(module, context)
    return module


def attention_feed() -> dict[str, Array]:
    x = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
    angles = np.arange(32)[:, None] * frequencies(8)
    tables = {name: f(angles).astype(np.float32) for name, f in (("cos", np.cos), ("sin", np.sin))}
    return {"x": x, "places": np.broadcast_to(np.arange(5), (2, 5)).copy(), **tables}


@pytest.mark.parametrize("pairs", [0, 1])
def test_attention_turns_queries_and_keys(pairs: int) -> None:
    before, module = (attention("first", (pairs, pairs)) for _ in range(2))
    absorbed(module)
    assert "RotaryEmbedding" not in ops(module)
    (node,) = (node for node in module.graph if node.op_type == "GroupQueryAttention")
    assert node.attributes.get_int("do_rotary") == 1
    assert node.attributes.get_int("rotary_interleaved", 0) == pairs
    feed = attention_feed()
    np.testing.assert_allclose(run_plain(module, feed)[0], run_plain(before, feed)[0], atol=1e-5)


def test_positions_that_an_input_says_are_vouched_for() -> None:
    refused = absorbed(attention("places"))
    assert ops(refused).count("RotaryEmbedding") == 2
    assert "may not count from 0 on" in missed(refused)
    before, module = attention("places"), absorbed(attention("places"), "Positions")
    assert "RotaryEmbedding" not in ops(module)
    assert POSITIONS_COUNT in "\n".join(each.message for each in module.remarks)
    feed = attention_feed()
    np.testing.assert_allclose(run_plain(module, feed)[0], run_plain(before, feed)[0], atol=1e-5)


def test_queries_and_keys_turned_differently_stay() -> None:
    module = absorbed(attention("first", (0, 1)))
    assert ops(module).count("RotaryEmbedding") == 2
    assert "in other pairs" in missed(module)


def test_tables_that_attention_does_not_take_stay() -> None:
    module = absorbed(attention("first", columns=4))
    assert ops(module).count("RotaryEmbedding") == 2
    assert "tables have 4 columns, no multiple of 8" in missed(module)


# On graphs that hypothesis draws


def test_contract_holds_on_every_spelling() -> None:
    graphs = with_near_misses(sketches(rotary.MOTIFS, steps=(1, 1), evenly=True, opset=18), most=1)
    report = check_pass(FuseRotary(), graphs=graphs, examples=70, seconds=60)
    assert report.rewrites["rotary"] > 20
    assert report.missed["rotary"]


def test_contract_holds_on_default_graphs() -> None:
    assert check_pass(FuseRotary(), examples=50, seconds=60).rewrites["rotary"]
