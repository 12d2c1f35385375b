"""Raising models below opset 13 where onnx's version converter alone would go wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import pytest
from support import run_pass, run_plain

from lwc.core.errors import InputError
from lwc.frontend.onnx_reader import MIN_OPSET, from_proto
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.verify.structure.well_formed import verify_structure

SCAN = """<ir_version: 3, opset_import: ["" : 8]>
g (float[B, 2] start, float[B, 3, 2] x, float[B, 3, 2] w)
    => (float[B, 2] last, float[B, 3, 2] all) {
  doubled = Add(x, x)
  last, raw = Scan <num_scan_inputs = 2, DIRECTIONS body = step
    (float[2] s, float[2] a, float[2] b) => (float[2] next, float[2] out) {
      scaled = Mul(a, b)
      next = Add(s, scaled)
      raised = Unsqueeze <axes = [0]> (next)
      out = Squeeze <axes = [0]> (raised)
    }> (LENGTHS, start, doubled, w)
  all = Neg(raw)
}"""


def scan(batch: str = "B", lengths: str = '""', directions: str = "") -> onnx.ModelProto:
    text = SCAN.replace("B,", f"{batch},").replace("LENGTHS", lengths)
    return onnx.parser.parse_model(text.replace("DIRECTIONS", directions))


@pytest.mark.parametrize("directions", ["", "directions = [1, 0],"])
@pytest.mark.parametrize("batch", ["1", "3", "n"])
def test_a_batched_scan_keeps_its_batch(batch: str, directions: str) -> None:
    proto = scan(batch, directions=directions)
    size = 2 if batch == "n" else int(batch)
    random = np.random.default_rng(0)
    feed: dict[str, Any] = {
        value.name: random.standard_normal(shape).astype(np.float32)
        for value, shape in zip(
            proto.graph.input, [(size, 2), (size, 3, 2), (size, 3, 2)], strict=True
        )
    }
    wanted = run_plain(proto, feed)
    module = from_proto(proto)
    assert module.opset == MIN_OPSET
    verify_structure(module)
    for _ in range(2):
        for found, array in zip(run_plain(module, feed), wanted, strict=True):
            np.testing.assert_allclose(found, array, rtol=1e-6)
        run_pass(Canonicalize(), module)


def test_a_batched_scan_inside_a_branch() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 3, opset_import: ["" : 8]>
    g (bool c, float[2, 2] start, float[2, 3, 2] x) => (float[2, 3, 2] y) {
      y = If (c) <then_branch = t () => (float[2, 3, 2] p) {
        q, p = Scan <num_scan_inputs = 1, body = step
          (float[2] s, float[2] a) => (float[2] next, float[2] out) {
            next = Add(s, a)
            out = Neg(next)
          }> ("", start, x)
      }, else_branch = e () => (float[2, 3, 2] r) { r = Relu(x) }>
    }""")
    random = np.random.default_rng(0)
    feed = {
        "c": np.array(True),
        "start": random.standard_normal((2, 2)).astype(np.float32),
        "x": random.standard_normal((2, 3, 2)).astype(np.float32),
    }
    (wanted,) = run_plain(proto, feed)
    module = from_proto(proto)
    verify_structure(module)
    np.testing.assert_allclose(run_plain(module, feed)[0], wanted, rtol=1e-6)


def test_a_batched_scan_of_unequal_lengths_is_refused() -> None:
    proto = scan(lengths="lengths")
    proto.graph.input.add().CopyFrom(
        onnx.helper.make_tensor_value_info("lengths", onnx.TensorProto.INT64, ["n"])
    )
    with pytest.raises(InputError, match=r"sequence lengths.*opset 13 or newer"):
        from_proto(proto)


def test_types_the_converter_guesses_in_branches_are_dropped() -> None:
    """It writes scalar types on values it makes there; the analysis would believe them."""
    proto = onnx.parser.parse_model("""<ir_version: 6, opset_import: ["" : 11]>
    g (bool c, float[2, 3, 4] x) => (float[n] y) {
      y = If (c) <
        then_branch = t () => (float[n] p) <float[2, 3, 4] s> {
          s = Softmax <axis = 1> (x)
          flat = Constant <value = int64[1] {-1}> ()
          p = Reshape(s, flat)
        },
        else_branch = e () => (float[n] q) {
          w = Constant <value = int64[1] {-1}> ()
          q = Reshape(x, w)
        }
      >
    }""")
    feed = {"c": np.array(True), "x": np.random.default_rng(0).random((2, 3, 4), np.float32)}
    (wanted,) = run_plain(proto, feed)
    module = from_proto(proto)
    shapes = {v.name: v.shape for node in module.nodes() for v in node.outputs}
    assert shapes.pop("s") is not None
    assert [name for name, shape in shapes.items() if shape is not None and not shape] == []
    run_pass(Canonicalize(), module)
    np.testing.assert_allclose(run_plain(module, feed)[0], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("opset", "body", "x"),
    [
        (11, "Hardmax (x)", (2, 3, 4)),
        (12, "Hardmax <axis = 2> (x)", (2, 3, 4, 2)),
        (9, 'Upsample <mode = "linear"> (x, s)', (1, 1, 3, 4)),
        (9, 'Upsample <mode = "nearest"> (x, s)', (1, 1, 3, 4)),
        (10, 'Resize <mode = "linear"> (x, s)', (1, 1, 3, 4)),
        (10, 'Resize <mode = "nearest"> (x, s)', (1, 1, 3, 4)),
    ],
)
def test_what_operators_meant_before_is_kept(opset: int, body: str, x: tuple[int, ...]) -> None:
    """The converter gives them the defaults of later versions, which mean something else."""
    extents = ", ".join("abcd"[: len(x)])
    text = f"""<ir_version: 6, opset_import: ["" : {opset}]>
        g (float[{extents}] x, bool c) => (float[{extents}] y)
        <float[4] s = {{1.0, 1.0, 1.7, 2.0}}> {{
          y = If (c) <
            then_branch = t () => (float[{extents}] r) {{ r = {body} }},
            else_branch = e () => (float[{extents}] r) {{ r = Neg (x) }}
          >
        }}"""
    proto = onnx.parser.parse_model(text)
    feed: dict[str, Any] = {
        "x": np.random.default_rng(0).standard_normal(x).astype(np.float32),
        "c": np.array(True),
    }
    wanted = run_plain(proto, feed)
    module = from_proto(proto)
    verify_structure(module)
    for found, array in zip(run_plain(module, feed), wanted, strict=True):
        np.testing.assert_allclose(found, array, rtol=1e-6, atol=1e-6)
