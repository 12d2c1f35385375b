"""Small models with linear layers, quantized: shared by the tests of `quantize-weights`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import make_runner
from lwc.core.module import Module
from lwc.core.walk import constant_tensor
from lwc.frontend.onnx_reader import from_proto
from lwc.passes.quantization.packing import unpack_rows
from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.pipeline.passes import PassContext, PassResult
from lwc.verify.structure.well_formed import verify_structure

Arrays = dict[str, np.ndarray[Any, Any]]

INPUTS, OUTPUTS, ROWS = 96, 160, 64

TIED = """<ir_version: 10, opset_import: ["" : 21]>
tied (int64[batch,seq] ids, float[batch,seq,96] x)
    => (float[batch,seq,160] y, float[batch,seq,64] logits)
    <float[64,96] table, float[96,160] w>
{
    found = Gather(table, ids)
    h = Add(found, x)
    y = MatMul(h, w)
    turned = Transpose<perm = [1, 0]>(table)
    logits = MatMul(h, turned)
}"""

GEMM = """<ir_version: 10, opset_import: ["" : 21]>
gemm (float[rows,96] x) => (float[rows,160] y) <float[160,96] w, float[160] c>
{ y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, w, c) }"""

LINEAR = """<ir_version: 10, opset_import: ["" : 21]>
linear (float[rows,96] x) => (float[rows,160] y) <float[96,160] w>
{ y = MatMul(x, w) }"""

STACK = """<ir_version: 10, opset_import: ["" : 23]>
stack (float[rows,96] x) => (float[rows,64] y, float[rows,64] z)
    <float[96] scale, float[96,96] a, float[96,96] b, float[96,64] c, float[96,64] d>
{
    n = RMSNormalization<axis = -1>(x, scale)
    p = MatMul(n, a)
    r = Relu(p)
    q = MatMul(n, b)
    g = Mul(r, q)
    y = MatMul(g, c)
    z = MatMul(r, d)
}"""


def module_of(text: str, **weights: np.ndarray[Any, Any]) -> Module:
    """Parse `text`; the values it declares become initializers: those given, or normal numbers."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(7)
    for declared in proto.graph.value_info:
        array = weights.get(declared.name)
        if array is None:
            kind = ir.DataType(declared.type.tensor_type.elem_type).numpy()
            shape = [dim.dim_value for dim in declared.type.tensor_type.shape.dim]
            array = rng.standard_normal(shape).astype(kind)
        proto.graph.initializer.append(ir.to_proto(ir.Tensor(array, name=declared.name)))
    del proto.graph.value_info[:]
    return from_proto(proto)


def quantized(module: Module, **options: Any) -> PassResult:
    before = module.fingerprint()
    context = PassContext(AnalysisManager(module), source="quantize-weights")
    result = QuantizeWeights(**options).run(module, context)
    assert result.changed == (module.fingerprint() != before)
    verify_structure(module)
    return result


def outputs(module: Module, feed: Arrays) -> list[np.ndarray[Any, Any]]:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = ort.InferenceSession(ir.to_proto(module.model).SerializeToString(), options)
    return [np.asarray(value) for value in session.run(None, feed)]


def feed_of(module: Module) -> Arrays:
    rng = np.random.default_rng(3)
    feed: Arrays = {}
    for value in module.graph.inputs:
        assert value.shape is not None
        shape = [dim if isinstance(dim, int) else 2 + axis for axis, dim in enumerate(value.shape)]
        if value.dtype == ir.DataType.INT64:
            feed[value.name or ""] = rng.integers(0, ROWS, shape)
        else:
            assert value.dtype is not None
            feed[value.name or ""] = rng.standard_normal(shape).astype(value.dtype.numpy())
    return feed


def ops(module: Module) -> list[str]:
    return [node.op_type for node in module.nodes()]


def weight(module: Module, name: str) -> np.ndarray[Any, Any]:
    tensor = constant_tensor(module.graph.initializers[name])
    assert tensor is not None
    return tensor.numpy()


def dequantized(module: Module, name: str, bits: int, inputs: int) -> np.ndarray[Any, Any]:
    """Read a MatMulNBits weight back as [inputs, outputs], by the operator's documentation."""
    codes = weight(module, f"{name}_q{bits}")
    scales = weight(module, f"{name}_scales").astype(np.float64)
    blocks = scales.shape[1]
    values = unpack_rows(codes, bits, codes.shape[-1] * 8 // bits).astype(np.float64)
    values = values.reshape(len(codes), blocks, -1)
    zeros: Any = float(1 << (bits - 1))
    if f"{name}_zero_points" in module.graph.initializers:
        zeros = unpack_rows(weight(module, f"{name}_zero_points"), bits, blocks)[..., None]
    real = (values - zeros) * scales[..., None]
    matrix: np.ndarray[Any, Any] = real.reshape(len(codes), -1)[:, :inputs].T
    return matrix


def missed(module: Module) -> list[str]:
    return [remark.message for remark in module.remarks if remark.kind == "missed"]


def stack() -> Module:
    return module_of(STACK)


def correlated(rows: int = 300, count: int = 4, seed: int = 0) -> list[Arrays]:
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((96, 96)) * np.exp(
        np.random.default_rng(8).standard_normal(96)
    )
    made = random.standard_normal((count, rows, 96)) @ mixing
    return [{"x": each.astype(np.float32)} for each in made]


def calibrated(module: Module, **options: Any) -> PassResult:
    before = module.fingerprint()
    context = PassContext(
        AnalysisManager(module), source="quantize-weights", make_runner=make_runner,
        calibration=lambda module: correlated(),
    )  # fmt: skip
    result = QuantizeWeights(**options).run(module, context)
    assert result.changed == (module.fingerprint() != before)
    verify_structure(module)
    return result


def relative_error(module: Module, **options: Any) -> list[float]:
    """Error of the outputs on data that was not calibrated on."""
    (feed,) = correlated(count=1, seed=77)
    wanted = outputs(module.clone(), feed)
    calibrated(module, accuracy_level=1, **options)
    found = outputs(module, feed)
    return [
        float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, wanted, strict=True)
    ]
