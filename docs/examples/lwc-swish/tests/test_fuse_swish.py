"""What fuse-swish does on one graph, and that it keeps its contract on hundreds."""

import lwc
import lwc.verify
import onnx_ir as ir
import pytest

from lwc_swish.fuse_swish import FuseSwish

GRAPH = """
<ir_version: 10, opset_import: ["" : OPSET]>
gates (TYPE[batch, 8] x) => (TYPE[batch, 8] y) <TYPE quick = {1.702}> {
    opening = Sigmoid (x)
    plain = Mul (x, opening)
    faster = Mul (quick, plain)
    closing = Sigmoid (faster)
    y = Mul (closing, plain)
}
"""


def fused(opset, dtype="float"):
    text = GRAPH.replace("OPSET", str(opset)).replace("TYPE", dtype)
    result = lwc.optimize(ir.from_onnx_text(text), FuseSwish(), verify="numeric")
    return result.record.passes[0], [node.op_type for node in result.module.nodes()]


@pytest.mark.parametrize(("opset", "operator"), [(18, "QuickGelu"), (24, "Swish")])
def test_both_spellings_are_fused(opset, operator):
    record, operators = fused(opset)
    assert record.rewrites == {"plain-swish": 1, "scaled-swish": 1}
    assert operators == [operator, operator]


def test_other_element_types_stay():
    record, operators = fused(18, "double")
    assert not record.changed
    assert "Sigmoid" in operators
    assert [remark.message for remark in record.missed][:1] == ["x is not float32"]


@lwc.verify.passes_hold(FuseSwish, examples=300)
def test_the_contract_holds(report):
    assert report.rewrites["plain-swish"] > 10
    assert report.rewrites["scaled-swish"] > 5


def swish(sketch):
    x = sketch.pick()
    return sketch.emit("Mul", x, sketch.emit("Sigmoid", x))


@lwc.verify.passes_hold(
    FuseSwish, graphs=lwc.verify.sketches([lwc.verify.Motif("swish", swish)], opset=24), examples=50
)
def test_the_contract_holds_at_opset_24(report):
    assert report.rewrites["plain-swish"] > 10
