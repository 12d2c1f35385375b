"""Types and shapes: what is stated against what is inferred, and what a pass brought in."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx.backend.test.loader import load_model_tests
from support import module_of

import lwc
from lwc.analysis.shapes import Shapes
from lwc.core.errors import VerificationError
from lwc.core.module import Module
from lwc.frontend.onnx_reader import from_proto
from lwc.verify.structure.types import check_types, verify_types
from lwc.verify.structure.well_formed import verify_structure


def problems(module: Module) -> list[str]:
    return [str(clash) for clash in check_types(module, Shapes.build(module)).clashes]


def value(module: Module, name: str) -> ir.Value:
    return next(v for node in module.nodes() for v in node.outputs if v.name == name)


def state(
    module: Module, name: str, dims: list[Any] | None, dtype: ir.DataType | None = None
) -> None:
    """State a shape, and a type, on a value."""
    found = value(module, name)
    found.shape = None if dims is None else ir.Shape(dims)
    found.type = ir.TensorType(dtype or ir.DataType.FLOAT)


CHAIN = "g (float[N, 4, ?] x, float[N, M] z) => (float[N, 4, ?] y) { a = Relu(x) y = Neg(a) }"


@pytest.mark.parametrize(
    ("dims", "wrong"),
    [
        (None, False),
        (["N", 4, None], False),
        (["N", 4, "?"], False),
        (["?", "?", "?"], False),
        (["unk__1", "unk__1", "unk__1"], False),
        ([None, None, None], False),
        # A number and a symbol, and two symbols, may be equal: operators may require it.
        ([1, 4, 7], False),
        (["M", "M", "M"], False),
        (["rows", 4, 4], False),
        (["x_dim2", 4, "x_dim2"], False),
        (["N", 5, None], True),
        (["N*2", 4, None], True),
        (["N + 1", 4, None], True),
        (["N", 4], True),
        (["N", 4, 1, 1], True),
        ([], True),
    ],
)
def test_stated_shapes(dims: list[Any] | None, wrong: bool) -> None:
    module = module_of(CHAIN)
    state(module, "a", dims)
    found = problems(module)
    assert bool(found) == wrong, found
    if wrong:
        assert found[0].startswith("'a' is stated with shape")
        assert "[N, 4, x_dim2]" in found[0]


def test_an_anonymous_extent_is_equal_to_no_other() -> None:
    """Height and width are both `?`: a value that swaps them is another shape, not a wrong one."""
    module = module_of(
        "g (float[?, ?] x) => (float[?, ?] y) { a = Transpose<perm=[1, 0]>(x) y = Relu(a) }"
    )
    assert problems(module) == []
    state(module, "a", ["x_dim0", "x_dim0"])
    assert problems(module) == []
    state(module, "a", ["x_dim1 + 1", "x_dim0"])
    assert len(problems(module)) == 1


def test_equal_at_what_operators_require_is_no_contradiction() -> None:
    """Concat requires h to be even; there, and only there, the two extents are equal."""
    module = module_of(HALVES)
    state(module, "r", [1, 1, "h", 4])
    assert problems(module) == []


@pytest.mark.parametrize(
    ("dtype", "wrong"), [(ir.DataType.FLOAT, False), (ir.DataType.FLOAT16, True)]
)
def test_stated_types(dtype: ir.DataType, wrong: bool) -> None:
    module = module_of(CHAIN)
    state(module, "a", None, dtype)
    found = problems(module)
    assert bool(found) == wrong
    if wrong:
        assert any("FLOAT16" in each or "float16" in each for each in found)


def test_graph_outputs_state_too() -> None:
    module = module_of("g (float[N, 4] x) => (float[N, 5] y) { y = Relu(x) }")
    assert problems(module) == ["'y' is stated with shape [N,5], but it is [N, 4]: 5 and 4 differ"]
    with pytest.raises(VerificationError, match=r"Relu -> 'y': 'y' is stated") as caught:
        verify_types(module)
    assert str(caught.value).splitlines()[1] == "--> %y = Relu(%x)"


def test_a_sequence_is_no_tensor() -> None:
    text = "g (float[N] x) => (seq(float[N]) y) { y = SequenceConstruct(x) }"
    module = module_of(text)
    assert problems(module) == []
    value(module, "y").type = ir.TensorType(ir.DataType.FLOAT)
    assert any("it is a sequence" in each for each in problems(module))
    value(module, "y").type = ir.SequenceType(ir.TensorType(ir.DataType.INT64))
    assert problems(module) == ["'y' is stated as INT64, but it is FLOAT"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "g (int64[2] x, float[2] z) => (int64[2] y) { y = Add(x, z) }",
            "input 'B' is tensor(float), but input 'A' is tensor(int64)",
        ),
        (
            "g (bool[2, 2] x) => (bool[2, 2] y) { y = MatMul(x, x) }",
            "input 'A' cannot be tensor(bool)",
        ),
        (
            "g (bool[2] c, float[2] x, double[2] z) => (float[2] y) { y = Where(c, x, z) }",
            "input 'Y' is tensor(double), but input 'X' is tensor(float)",
        ),
        (
            "g (float[2] c, float[2] x) => (float[2] y) { y = Where(c, x, x) }",
            "input 'condition' cannot be tensor(float)",
        ),
        (
            "g (float[2] x, float[2] z) => (float[4] y) { i = Cast<to=6>(z) "
            "y = Concat<axis=0>(x, i) }",
            "input 'inputs' is tensor(int32), but input 'inputs' is tensor(float)",
        ),
        (
            "g (float[2, 3] x, float[1] i) => (float[1, 3] y) { y = Gather(x, i) }",
            "input 'indices' cannot be tensor(float)",
        ),
        (
            "g (seq(float[2]) x) => (float[2] y) { y = Relu(x) }",
            "input 'X' cannot be a sequence or optional",
        ),
        (
            "g (float[2] x, int64 i) => (float[2] y) { y = SequenceAt(x, i) }",
            "input 'input_sequence' cannot be tensor(float)",
        ),
    ],
)
def test_operators_and_the_types_they_take(text: str, problem: str) -> None:
    assert problem in problems(module_of(text))


@pytest.mark.parametrize(
    "text",
    [
        # Where types may differ, they do.
        "g (float[2] x, int64[2] z) => (float[2] y) { y = Pow(x, z) }",
        "g (int64 m, bool c, float[2] x) => (float[2] y) { y = Loop(m, c, x) <body = b "
        "(int64 i, bool k, float[2] v) => (bool k2, float[2] v2) "
        "{ k2 = Identity(k) v2 = Relu(v) }> }",
        "g (bool c, float[2] x, int64[2] z) => (float[2] y) { y = If(c) <then_branch = t () => "
        "(float[2] p) { p = Relu(x) }, else_branch = e () => (float[2] q) "
        "{ q = Cast<to=1>(z) }> }",
        # What nobody knows is not wrong.
        "g (float[2] x) => (y) { a = com.example.What(x) y = Add(a, x) }",
    ],
)
def test_what_is_allowed(text: str) -> None:
    assert problems(module_of(text)) == []


def test_misfits() -> None:
    module = module_of("g (float[2, 3] x, float[2, 3] z) => (float[2, 3] y) { y = MatMul(x, z) }")
    assert problems(module)[0].startswith("its inputs do not fit the operator: ")


def test_bodies_and_functions_are_checked() -> None:
    module = Module(
        ir.from_onnx_text("""<ir_version: 9, opset_import: ["" : 17, "d" : 1]>
        g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <then_branch = t () => (float[3] p) { p = Relu(x) },
                       else_branch = e () => (float[2] q) { q = d.f(x) }>
        }
        <domain: "d", opset_import: ["" : 17]> f (a) => (b) { n = Not(a) b = Neg(a) }""")
    )
    found = problems(module)
    assert any(each.startswith("'p' is stated with shape [3]") for each in found)
    assert "input 'X' cannot be tensor(float)" in found
    assert len(found) == 2


# What a pass brought in


def after(text: str, change: Callable[[Module], None]) -> list[str]:
    """Return the contradictions that `change` introduces into the module of `text`."""
    module = module_of(text)
    before = check_types(module, Shapes.build(module))
    change(module)
    now = check_types(module, Shapes.build(module))
    found = [str(clash) for clash in now.introduced(before)]
    if found:
        with pytest.raises(VerificationError):
            verify_types(module, before=before)
    else:
        verify_types(module, before=before)
    return found


WRONG = """
g (float[N, 4] x, float[K, 4] z) => (float[N, 4] y) {
    a = Relu(x)
    b = Add(a, z)
    c = Cast<to=1>(b)
    y = Neg(c)
}
"""


def wrongly_stated(text: str = WRONG) -> Module:
    module = module_of(text)
    state(module, "a", ["N", 5])
    return module


def test_what_the_file_got_wrong_is_forgiven() -> None:
    module = wrongly_stated()
    before = check_types(module, Shapes.build(module))
    assert len(before.clashes) == 1
    verify_types(module, before=before)
    with pytest.raises(VerificationError):
        verify_types(module)


def test_what_the_file_got_wrong_may_move_to_another_value() -> None:
    module = wrongly_stated()
    before = check_types(module, Shapes.build(module))
    value(module, "a").name = "a_lwc1"
    verify_types(module, before=before)


def test_what_a_pass_gets_wrong_elsewhere_is_not() -> None:
    module = wrongly_stated()
    before = check_types(module, Shapes.build(module))
    state(module, "c", ["N", 7])
    with pytest.raises(VerificationError, match=r"'c' is stated with shape \[N,7\]"):
        verify_types(module, before=before)


def test_one_contradiction_of_the_file_forgives_no_second() -> None:
    """Mul of float and int64 stands in the file once; a pass adds another, worded alike."""
    module = module_of(
        """g (float[5] x, int64[5] i) => (float[5] y, float[5] z)
        { z = Mul(x, i) b = Sqrt(x) y = Neg(b) }"""
    )
    before = check_types(module, Shapes.build(module))
    assert len(before.clashes) == 1
    neg = value(module, "y").producer()
    assert neg is not None
    mixed = ir.node("Mul", [neg.inputs[0], module.graph.inputs[1]])
    mixed.outputs[0].name = "mixed"
    module.graph.insert_before(neg, mixed)
    neg.replace_input_with(0, mixed.outputs[0])
    with pytest.raises(VerificationError, match="mixed"):
        verify_types(module, before=before)
    module.graph.outputs.pop(1)
    first = module.graph.node(0)
    module.graph.remove(first, safe=True)
    verify_types(module, before=before)  # the first is gone: it may have moved


def bind(module: Module) -> None:
    """Set K, as bind-dims does: what depends on it becomes better known."""
    module.graph.inputs[1].shape = ir.Shape([3, 4])
    module.graph.inputs[0].shape = ir.Shape([3, 4])


def test_what_a_binding_brings_to_light_is_forgiven() -> None:
    def stated(module: Module) -> None:
        bind(module)

    text = WRONG.replace("float[N, 4] y", "float[8, 4] y")
    assert after(text, stated) == []
    misfit = "g (float[N, 4] x, float[2, 4] z) => (float[?, 4] y) { y = Add(x, z) }"

    def bind_first(module: Module) -> None:
        module.graph.inputs[0].shape = ir.Shape([3, 4])

    module = module_of(misfit)
    bind_first(module)
    assert len(problems(module)) == 1
    assert after(misfit, bind_first) == []


HALVES = """
g (float[1, 1, h, 4] x, float[1, 1, h, 4] s) => (float[1, 2, ?, 4] y) {
    p = MaxPool<kernel_shape=[2, 1], strides=[2, 1]>(x)
    half = Constant<value_floats=[1.0, 1.0, 2.0, 1.0]>()
    r = Resize<mode="nearest">(p, , half)
    y = Concat<axis=1>(r, s)
}
"""


@pytest.mark.parametrize(("stated", "forgiven"), [("h", True), ("2*floor(h/2)", False)])
def test_a_bound_statement_is_as_wrong_as_it_was(stated: str, forgiven: bool) -> None:
    """At h = 3 the model cannot run, which is not the binding's fault; a wrong number is."""
    module = module_of(HALVES)
    state(module, "r", [1, 1, stated, 4])
    before = check_types(module, Shapes.build(module))
    assert before.clashes == []
    for each in module.graph.inputs:
        each.shape = ir.Shape([1, 1, 3, 4])
    state(module, "r", [1, 1, 3, 4])
    now = check_types(module, Shapes.build(module))
    assert any(str(clash).startswith("'r' is stated") for clash in now.clashes)
    introduced = [str(clash) for clash in now.introduced(before)]
    assert any(each.startswith("'r'") for each in introduced) != forgiven


def replace_op(op_type: str, **attributes: Any) -> Callable[[Module], None]:
    """Return a change: the node that makes `a` becomes another operator."""

    def change(module: Module) -> None:
        node = value(module, "a").producer()
        assert node is not None
        node.op_type = op_type
        for name in list(node.attributes):
            del node.attributes[name]
        for attribute in ir.convenience.convert_attributes(attributes):
            node.attributes[attribute.name] = attribute

    return change


STALE = "g (float[N, 4] x) => (float[N, 4] y) { a = Softmax<axis=1>(x) y = Abs(a) }"


def stated_as(dims: list[Any], change: Callable[[Module], None]) -> Callable[[], list[str]]:
    def run() -> list[str]:
        module = module_of(STALE)
        state(module, "a", dims)
        before = check_types(module, Shapes.build(module))
        assert before.clashes == []
        change(module)
        return [
            str(clash) for clash in check_types(module, Shapes.build(module)).introduced(before)
        ]

    return run


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replace_op("Concat", axis=1), None),
        (replace_op("Concat", axis=5), "do not fit"),
        (replace_op("Flatten", axis=0), None),  # [1, 4 N]: right where N is 1
        (replace_op("ArgMax", axis=1, keepdims=0), "'a' is stated"),
        (replace_op("Size"), "'a' is stated"),
        (replace_op("Cast", to=10), "'a' is stated as FLOAT, but it is FLOAT16"),
    ],
)
def test_stale_statements_and_wrong_attributes(
    change: Callable[[Module], None], words: str | None
) -> None:
    found = stated_as(["N", 4], change)()
    if words is None:
        assert found == []
    else:
        assert any(words in each for each in found), found


def test_a_doubled_extent_is_found_although_it_is_symbolic() -> None:
    module = module_of("g (float[N, 4] x) => (float[N, 4] y) { a = Concat<axis=0>(x) y = Abs(a) }")
    state(module, "a", ["N", 4])
    before = check_types(module, Shapes.build(module))
    node = value(module, "a").producer()
    assert node is not None
    node.resize_inputs(2)
    node.replace_input_with(1, node.inputs[0])
    found = [str(c) for c in check_types(module, Shapes.build(module)).introduced(before)]
    assert found[0] == "'a' is stated with shape [N,4], but it is [2*N, 4]: N and 2*N differ"


def lose_the_cast(module: Module) -> None:
    cast = value(module, "f").producer()
    assert cast is not None
    source = cast.inputs[0]
    assert source is not None
    ir.convenience.replace_all_uses_with(cast.outputs[0], source)
    module.graph.remove(cast, safe=True)


def test_a_lost_cast_is_found() -> None:
    text = "g (int64[2] i, float[2] x) => (float[2] y) { f = Cast<to=1>(i) y = Mul(f, x) }"
    found = after(text, lose_the_cast)
    assert "input 'B' is tensor(float), but input 'A' is tensor(int64)" in found


def test_a_lost_cast_of_the_only_input_is_found() -> None:
    text = "g (int64[2] i) => (float[2] y) { f = Cast<to=1>(i) y = Neg(f) }"
    assert any(
        "'y' is stated as FLOAT, but it is INT64" in each for each in after(text, lose_the_cast)
    )


def test_another_target_is_no_better_knowledge() -> None:
    """The shape of the operands is what it was; their content is not."""
    text = """g (float[2, 6] x) => (float[?, ?] y) <int64[2] t = {2, 6}> { y = Expand(x, t) }"""

    def retarget(module: Module) -> None:
        weight = module.graph.initializers["t"]
        module.replace_initializer(weight, ir.tensor([3, 6], dtype=ir.DataType.INT64))

    assert any("do not fit" in each for each in after(text, retarget))


def test_cost_is_linear() -> None:
    """20,000 nodes take at most 30 times as long as 2,000 (10 times, and noise)."""

    def seconds(length: int) -> float:
        body = "\n".join(f"v{i + 1} = Softmax<axis=-1>(v{i})" for i in range(length))
        module = module_of(f"g (float[N, 4] v0) => (float[N, 4] v{length}) {{ {body} }}")
        shapes = Shapes.build(module)
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            check_types(module, shapes)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(20_000) < 30 * seconds(2_000)


def test_the_standards_own_cases_agree_with_inference() -> None:
    """Node tests of the onnx package, one in three, are well formed and well typed."""
    checked = 0
    for case in load_model_tests(kind="node")[::3]:
        assert isinstance(case.model, onnx.ModelProto)
        module = from_proto(case.model)
        verify_structure(module)
        assert problems(module) == [], case.name
        checked += 1
    assert checked > 500


@pytest.mark.models
@pytest.mark.parametrize("name", ["silero_vad", "tagger", "320n", "ch_PP-OCRv4_rec_infer"])
def test_passes_bring_nothing_into_real_models(
    model_file: Callable[[str], Path], name: str
) -> None:
    lwc.optimize(model_file(name), "canonicalize,fold-linear,convert-dtype,infer-shapes")
