"""`convert-dtype`: half precision where it is safe, Casts where it is not."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lwc.analysis.manager import AnalysisManager
from lwc.core.errors import PassError
from lwc.core.module import Module
from lwc.frontend.onnx_reader import from_proto
from lwc.passes.quantization.convert_dtype import ConvertDtype
from lwc.pipeline.passes import PassContext, PassResult
from lwc.verify.structure.well_formed import verify_structure

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'


def module_of(text: str, **weights: Any) -> Module:
    proto = onnx.parser.parse_model(HEAD + text)
    for name, content in weights.items():
        array = np.asarray(content, np.float32)
        proto.graph.initializer.append(ir.to_proto(ir.Tensor(array, name=name)))
    return from_proto(proto)


def converted(module: Module, **options: Any) -> PassResult:
    before = module.fingerprint()
    result = ConvertDtype(**options).run(
        module, PassContext(AnalysisManager(module), "convert-dtype")
    )
    assert result.changed == (module.fingerprint() != before)
    verify_structure(module)
    proto = ir.to_proto(module.model)
    del proto.graph.value_info[:]
    onnx.checker.check_model(proto, full_check=True)  # infers types strictly
    return result


def run(module: Module, **feed: Any) -> list[Any]:
    session = ort.InferenceSession(ir.to_proto(module.model).SerializeToString())
    return list(session.run(None, feed))


def ops(module: Module) -> list[str]:
    return [node.op_type for node in module.nodes()]


def remarks(module: Module, kind: str) -> list[str]:
    return [remark.message for remark in module.remarks if remark.kind == kind]


LINEAR = "g (float[n,8] x) => (float[n,4] y) { h = MatMul(x, w) y = Tanh(h) }"
WEIGHT = np.random.default_rng(0).standard_normal((8, 4))
X = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)


def test_keeps_inputs_and_outputs() -> None:
    module = module_of(LINEAR, w=WEIGHT)
    before = run(module, x=X)[0]
    result = converted(module)
    assert ops(module) == ["Cast", "MatMul", "Tanh", "Cast"]
    assert module.graph.inputs[0].dtype == ir.DataType.FLOAT
    assert [(v.name, v.dtype) for v in module.graph.outputs] == [("y", ir.DataType.FLOAT)]
    assert module.graph.initializers["w"].dtype == ir.DataType.FLOAT16
    np.testing.assert_allclose(run(module, x=X)[0], before, atol=5e-3)
    assert result.statistics["bytes after"] == WEIGHT.size * 2


def test_changes_inputs_and_outputs() -> None:
    module = module_of(LINEAR, w=WEIGHT)
    before = run(module, x=X)[0]
    converted(module, keep_io=False)
    assert ops(module) == ["MatMul", "Tanh"]
    (after,) = run(module, x=X.astype(np.float16))
    assert after.dtype == np.float16
    np.testing.assert_allclose(after, before, atol=5e-3)


@pytest.mark.parametrize("keep_io", [True, False])
def test_second_run_changes_nothing(keep_io: bool) -> None:
    module = module_of(LINEAR, w=WEIGHT)
    assert converted(module, keep_io=keep_io).changed
    again = ConvertDtype(keep_io=keep_io)
    fingerprint = module.fingerprint()
    result = again.run(module, PassContext(AnalysisManager(module), "convert-dtype"))
    assert not result.changed
    assert module.fingerprint() == fingerprint


def test_bfloat16_warns_that_no_kernel_exists() -> None:
    module = module_of(LINEAR, w=WEIGHT)
    converted(module, dtype="bfloat16")
    tensor = module.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(tensor.numpy().astype(np.float32), WEIGHT, rtol=2**-8)
    assert any("bfloat16 MatMul" in message for message in remarks(module, "warning"))


def test_positions_stay_exact() -> None:
    """Position 4001 is no float16; its rotary angle must not be that of 4000."""
    text = """g (int64[n] p, float[n,8] x) => (float[n,8] y) {
        real = Cast<to = 1>(p)  axes = Constant<value_ints = [1]>()
        column = Unsqueeze(real, axes)  angle = Mul(column, f)  c = Cos(angle)  y = Mul(x, c) }"""
    frequencies = 10000.0 ** (-np.arange(8) / 8)
    module = module_of(text, f=frequencies)
    feed = {"p": np.array([4001, 7, 2049]), "x": X}
    before = run(module, **feed)[0]
    converted(module)
    assert module.graph.initializers["f"].dtype == ir.DataType.FLOAT
    np.testing.assert_allclose(run(module, **feed)[0], before, rtol=3e-3, atol=2e-3)


def test_squares_do_not_overflow() -> None:
    text = """g (float[n,8] x) => (float[n,8] y) {
        two = Constant<value_float = 2.0>()  square = Pow(x, two)
        axes = Constant<value_ints = [-1]>()  mean = ReduceMean(square, axes)
        eps = Constant<value_float = 1e-12>()  sum = Add(mean, eps)
        root = Sqrt(sum)  y = Div(x, root) }"""
    module = module_of(text)
    big = X * 1000
    before = run(module, x=big)[0]
    converted(module)
    np.testing.assert_allclose(run(module, x=big)[0], before, rtol=5e-3)


def test_mask_filler_is_clamped_with_a_warning() -> None:
    text = """g (float[n,8] x, bool[n,8] m) => (float[n,8] y) {
        low = Constant<value_float = -3.4e38>()  zero = Constant<value_float = 0.0>()
        bias = Where(m, zero, low)  s = Add(x, bias)  y = Softmax(s) }"""
    module = module_of(text)
    mask = np.zeros((3, 8), bool)
    mask[0, :4] = mask[1, 0] = True  # row 2 is masked wholly: uniform, not NaN
    converted(module)
    (after,) = run(module, x=X, m=mask)
    assert np.isfinite(after).all()
    assert (after[0, 4:] == 0).all()
    assert any("beyond 65504" in message for message in remarks(module, "warning"))


def test_integer_made_mask_is_clamped_too() -> None:
    text = """g (float[n,8] x, int64[n,8] m) => (float[n,8] y) {
        real = Cast<to = 1>(m)  one = Constant<value_float = 1.0>()  off = Sub(one, real)
        low = Constant<value_float = -3.4e38>()  bias = Mul(off, low)
        s = Add(x, bias)  y = Softmax(s) }"""
    module = module_of(text)
    converted(module)
    (after,) = run(module, x=X, m=np.zeros((3, 8), np.int64))
    assert np.isfinite(after).all()


def test_variance_beyond_range_keeps_its_norm() -> None:
    text = "g (float[n,2,3] x) => (float[n,2,3] y) { y = BatchNormalization(x, s, b, m, v) }"
    module = module_of(text, s=[1, 1], b=[0, 0], m=[0, 0], v=[1e6, 1])
    x = np.full((1, 2, 3), 1000, np.float32)
    before = run(module, x=x)[0]
    converted(module)
    np.testing.assert_allclose(run(module, x=x)[0], before, rtol=2e-3)
    assert any("beyond float16's range" in message for message in remarks(module, "missed"))


def test_epsilon_does_not_become_zero() -> None:
    text = "g (float[n,8] x) => (float[n,8] y) { s = Abs(x) t = Add(s, e) y = Div(x, t) }"
    module = module_of(text, e=1e-12)
    converted(module)
    assert np.isfinite(run(module, x=np.zeros((1, 8), np.float32))[0]).all()
    assert any("not zero" in message for message in remarks(module, "warning"))


def test_operand_that_admits_no_half_stays() -> None:
    """Resize takes its scales as float32 only."""
    text = "g (float[1,1,4,4] x) => (float[1,1,8,8] y) { y = Resize(x, , s) }"
    module = module_of(text, s=[1, 1, 2, 2])
    x = np.random.default_rng(0).standard_normal((1, 1, 4, 4)).astype(np.float32)
    before = run(module, x=x)[0]
    converted(module)
    assert module.graph.initializers["s"].dtype == ir.DataType.FLOAT
    assert ops(module) == ["Cast", "Resize", "Cast"]
    np.testing.assert_allclose(run(module, x=x)[0], before, atol=2e-3)


def test_constant_read_both_ways_keeps_both() -> None:
    text = """g (float[4] x, float[1,1,2,2] i) => (float[1,1,4,4] y, float[4] z) {
        y = Resize(i, , s)  z = Mul(x, s) }"""
    module = module_of(text, s=[1, 1, 2, 2])
    converted(module)
    kinds = {value.dtype for value in module.graph.initializers.values()}
    assert kinds == {ir.DataType.FLOAT, ir.DataType.FLOAT16}


def test_branches_and_loops() -> None:
    text = """g (bool c, float[4] x) => (float[4] y, float[4] z) {
        y = If (c) <
            then_branch = a () => (float[4] p) { p = Add(x, w) },
            else_branch = b () => (float[4] q) { k = Constant<value_floats = [1.0,2.0,3.0,4.0]>()
                                                 q = Mul(x, k) }
        >
        trips = Constant<value_int = 3>()
        yes = Cast<to = 9>(trips)
        z = Loop (trips, yes, y) <
            body = l (int64 i, bool go, float[4] s) => (bool on, float[4] t) {
                on = Identity(go)
                t = Add(s, w)
            }
        >
    }"""
    module = module_of(text, w=[0.5, -1.0, 2.0, 0.25])
    x = np.array([1, 2, 3, 4], np.float32)
    for flag in (True, False):
        feed = {"c": np.array(flag), "x": x}
        before = run(module_of(text, w=[0.5, -1.0, 2.0, 0.25]), **feed)
        for keep_io in (True, False):
            module = module_of(text, w=[0.5, -1.0, 2.0, 0.25])
            converted(module, keep_io=keep_io)
            if not keep_io:
                feed = {"c": np.array(flag), "x": x.astype(np.float16)}
            for old, new in zip(before, run(module, **feed), strict=True):
                np.testing.assert_allclose(new, old, rtol=2e-3)


def test_output_read_inside_too() -> None:
    module = module_of("g (float[4] x) => (float[4] h, float[4] y) { h = Tanh(x) y = Mul(h, h) }")
    x = np.array([1, 2, 3, 4], np.float32)
    before = run(module, x=x)
    converted(module)
    assert [value.name for value in module.graph.outputs] == ["h", "y"]
    for old, new in zip(before, run(module, x=x), strict=True):
        np.testing.assert_allclose(new, old, rtol=3e-3)


def test_unknown_operator_stays_float32_with_a_remark() -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 21, "my.domain" : 1]>\n'
        "g (float[4] x) => (float[4] y) { h = Tanh(x) k = my.domain.Odd(h) y = Tanh(k) }"
    )
    proto = onnx.parser.parse_model(text)
    module = from_proto(proto)
    for node in module.nodes():
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    result = ConvertDtype().run(module, PassContext(AnalysisManager(module), "convert-dtype"))
    verify_structure(module)
    assert result.changed
    assert ops(module) == ["Cast", "Tanh", "Cast", "Odd", "Cast", "Tanh", "Cast"]
    assert any("Odd" in message for message in remarks(module, "missed"))


def test_second_run_keeps_islands_of_float32() -> None:
    text = """g (float[n,8] x) => (float[n,8] y) {
        h = Tanh(x)  two = Constant<value_float = 2.0>()
        square = Pow(h, two)  y = Mul(x, square) }"""
    module = module_of(text)
    assert converted(module).changed
    assert not converted(module).changed


def test_exclude() -> None:
    module = module_of(LINEAR, w=WEIGHT)
    converted(module, exclude=("MatMul",))
    assert ops(module) == ["MatMul", "Cast", "Tanh", "Cast"]
    assert module.graph.initializers["w"].dtype == ir.DataType.FLOAT


def test_exclude_that_matches_nothing_warns() -> None:
    module = module_of(LINEAR, w=WEIGHT)
    converted(module, exclude=("MatMul", "lm_haed"))
    assert remarks(module, "warning") == ["exclude=lm_haed matches no node"]


def test_nothing_to_do_says_so() -> None:
    module = module_of("g (int64[4] x) => (int64[4] y) { y = Neg(x) }")
    assert not converted(module).changed
    assert remarks(module, "note") == ["nothing to convert"]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("s = SequenceConstruct(x, x) y = SequenceAt(s, one)", "s"),
        ("s = SplitToSequence(x, one) y = SequenceAt(s, one)", "s"),
        ("e = SequenceEmpty() s = SequenceInsert(e, x) y = ConcatFromSequence<axis = 0>(s)", "e"),
        ("s = Optional(x) y = OptionalGetElement(s)", "s"),
        ("q = SequenceConstruct(x) o = Optional(q) y = SequenceAt(q, one)", "q"),
    ],
)
def test_sequences_of_float32_are_refused_without_a_stated_type(body: str, name: str) -> None:
    module = module_of(f"g (float[n,8] x) => (float[k,m] y) <int64 one = {{1}}> {{ {body} }}")
    with pytest.raises(PassError, match=f"'{name}' is a sequence or optional of float32"):
        ConvertDtype().run(module, PassContext(AnalysisManager(module), "convert-dtype"))


def test_sequences_of_integers_stay() -> None:
    text = """g (float[n,8] x) => (float[n,4] y, int64 size) <int64 one = {1}> {
        h = MatMul(x, w) y = Tanh(h)
        d = Shape(x) s = SplitToSequence<keepdims = 0>(d) size = SequenceAt(s, one) }"""
    module = module_of(text, w=WEIGHT)
    assert converted(module).changed
    assert run(module, x=X)[1] == 8


def test_bodies_may_return_constants() -> None:
    text = """g (float[8] x, bool c, int64 trips) => (float[8] y, float[k,2] z) {
        a = If(c) <then_branch = t () => (float[1] one) { one = Constant<value = float[1] {1}>() },
            else_branch = e () => (float[1] two) { two = Constant<value = float[1] {2}>() }>
        b, z = Loop(trips, , a) <body = l (int64 i, bool go, float[1] v)
            => (bool go_on, float[1] w, float[2] s) {
                go_on = Identity(go) w = Add(v, v) s = Constant<value = float[2] {3, 4}>() }>
        y = Mul(x, b) }"""
    module = module_of(text)
    feed = {"x": X[0], "c": np.array(True), "trips": np.array(3)}
    before = run(module, **feed)
    converted(module)
    for after, wanted in zip(run(module, **feed), before, strict=True):
        np.testing.assert_allclose(after, wanted, rtol=5e-3)


def test_constants_leave_the_graph_in_the_type_asked_for() -> None:
    text = """g (float[2] x) => (float[2] y, float[2] z, float[2] w) {
        y = Add(x, w)  z = Constant<value = float[2] {1, 2}>() }"""
    for keep, dtype in ((True, np.float32), (False, np.float16)):
        module = module_of(text, w=[1, 2])
        converted(module, keep_io=keep)
        outputs = run(module, x=np.ones(2, dtype))
        assert [output.dtype for output in outputs] == [dtype] * 3
        np.testing.assert_array_equal(outputs, [[2, 3], [1, 2], [1, 2]])


@pytest.mark.parametrize(
    "body",
    [
        "f = Cast<to = 1>(t) q = Mul(f, big) r = Mul(q, small) y = Mul(x, r)",
        """s = Shape(x) q = ConstantOfShape<value = float[1] {1e5}>(s)
        r = Mul(q, small) y = Mul(x, r)""",
        "q = Mul(x, big) y = Mul(q, small)",
    ],
)
def test_large_factors_are_not_taken_for_fillers(body: str) -> None:
    text = f"g (float[8] x, int64[8] t) => (float[8] y) {{ {body} }}"
    module = module_of(text, big=1e5, small=1e-5)
    feed = {"x": X[0], "t": np.arange(8)}
    before = run(module, **feed)[0]
    converted(module)
    np.testing.assert_allclose(run(module, **feed)[0], before, rtol=5e-3, atol=1e-3)
