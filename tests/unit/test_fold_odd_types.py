"""Folding to and from element types that numpy lacks."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto
from support import module_of, ops, run_pass_to_the_end

from lwc.passes.cleanup.canonicalize import Canonicalize


@pytest.mark.parametrize("saturate", [0, 1])
@pytest.mark.parametrize(
    ("to", "bits"),
    [
        # 1e6 is above the largest value of each type: infinity, or NaN where there is none.
        (TensorProto.FLOAT8E4M3FN, {0: [0x38, 0x7F], 1: [0x38, 0x7E]}),
        (TensorProto.FLOAT8E4M3FNUZ, {0: [0x40, 0x80], 1: [0x40, 0x7F]}),
        (TensorProto.FLOAT8E5M2, {0: [0x3C, 0x7C], 1: [0x3C, 0x7B]}),
        (TensorProto.FLOAT8E5M2FNUZ, {0: [0x40, 0x80], 1: [0x40, 0x7F]}),
    ],
)
def test_a_cast_to_float8_keeps_its_type_and_saturates_or_stays(
    to: int, bits: dict[int, list[int]], saturate: int
) -> None:
    module = module_of(
        f"""g () => (float8e4m3fn[2] y) <float[2] c = {{1.0, 1000000.0}}> {{
            y = Cast <to = {to}, saturate = {saturate}> (c)
        }}""",
        opset=19,
        ir_version=9,
    )
    (output,) = module.graph.outputs
    output.type = ir.TensorType(ir.DataType(to))
    run_pass_to_the_end(Canonicalize(), module)
    if ops(module) == ["Cast"]:  # ONNX Runtime's Python interface hands out some of them only.
        assert any("not evaluated" in each.message for each in module.remarks)
        return
    (folded,) = (value.const_value for value in module.graph.initializers.values())
    assert folded is not None
    assert folded.dtype == ir.DataType(to)
    assert folded.numpy().view(np.uint8).tolist() == bits[saturate]
