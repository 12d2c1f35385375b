"""Shape inference on small graphs: what is claimed, and what is left open."""

# ruff: noqa: E501 (a table reads best a case to a line)

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import run_pass, run_pass_to_the_end

from lwc.analysis.shapes import Shapes
from lwc.core.dims import Dim, Expr, add, evaluate, floor_div, multiply, symbol
from lwc.core.module import Module

A, B, S = symbol("a"), symbol("b"), symbol("s")


def module_of(text: str, opset: int = 18) -> Module:
    header = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1, "local": 1]>\n'
    return Module(ir.from_onnx_text(header + text))


def infer(text: str, opset: int = 18) -> tuple[Shapes, dict[str, ir.Value]]:
    module = module_of(text, opset)
    values = {v.name: v for g in module.graphs() for n in g for v in n.outputs if v.name}
    return Shapes.build(module), values


def shape_of(text: str, name: str = "y", opset: int = 18) -> object:
    shapes, values = infer(text, opset)
    assert not shapes.misfits, shapes.misfits
    return shapes.shape(values[name])


def content_of(text: str, name: str = "y", opset: int = 18) -> list[object]:
    shapes, values = infer(text, opset)
    known = shapes.known(values[name])
    assert known is not None
    assert known.shape == shapes.shape(values[name])
    return list(known.ravel())


@pytest.mark.parametrize(
    ("inputs", "body", "expected"),
    [
        # Broadcasting: a number above 1 wins over a symbol, that over 1; two symbols stay open.
        ("float[a,1] x, float[4] z", "y = Add(x, z)", (A, 4)),
        ("float[a] x, float[4] z", "y = Add(x, z)", (4,)),
        # An empty operand of Concat says nothing of the other extents.
        ("float[0,3] x, float[2,a] z", "y = Concat<axis=0>(x, z)", (2, A)),
        ("float[2,a] x, float[b,0] z", "y = Concat<axis=1>(x, z)", (2, A)),
        ("float[a] x, float[1] z", "y = Mul(x, z)", (A,)),
        ("float[a] x, float[a] z", "y = Sub(x, z)", (A,)),
        ("float[b,a] x, float[a] z", "y = Equal(x, z)", (B, A)),
        # Reshape: 0 copies, -1 is an exact quotient.
        ("float[b,s,384] x", "t = Constant<value_ints=[0,0,12,-1]>()\ny = Reshape(x,t)", (B, S, 12, 32)),
        ("float[b,s,12,32] x", "t = Constant<value_ints=[0,-1,384]>()\ny = Reshape(x,t)", (B, S, 384)),
        ("float[b,s,8] x", "t = Constant<value_ints=[-1,8]>()\ny = Reshape(x,t)", (B * S, 8)),
        (
            "float[0,3] x",
            "t = Constant<value_ints=[3,0]>()\ny = Reshape<allowzero=1>(x,t)",
            (3, 0),
        ),
        # Layout.
        ("float[a,b,s] x", "y = Transpose<perm=[2,0,1]>(x)", (S, A, B)),
        ("float[a,b,s] x", "y = Flatten<axis=2>(x)", (A * B, S)),
        ("float[a,b,s] x", "y = Flatten<axis=0>(x)", (1, A * B * S)),
        ("float[a,s] x, float[b,s] z", "y = Concat<axis=0>(x, z)", (A + B, S)),
        ("float[7] x", "y, z = Split<num_outputs=2>(x)", (4,)),
        ("float[a] x", "t = Constant<value_ints=[-1,0]>()\ny = Unsqueeze(x,t)", (1, A, 1)),
        ("float[1,a,1] x", "t = Constant<value_ints=[-1]>()\ny = Squeeze(x,t)", (1, A)),
        ("float[a,b] x", "r = Constant<value_ints=[2,3]>()\ny = Tile(x,r)", (2 * A, 3 * B)),
        ("float[a,b] x", "r = Constant<value_ints=[1,0,2,0]>()\ny = Pad(x,r)", (A + 3, B)),
        ("float[a,1] x", "t = Constant<value_ints=[3,1,5]>()\ny = Expand(x,t)", (3, A, 5)),
        ("float[9,a] x, int64[b,s] i", "y = Gather(x, i)", (B, S, A)),
        ("float[a,4,5] x, int64[a,b,1] i", "y = GatherND<batch_dims=1>(x, i)", (A, B, 5)),
        ("float[a,5] x", "k = Constant<value_ints=[3]>()\ny, z = TopK(x, k)", (A, 3)),
        ("int64[a,b] x, float[2] v", "d = Constant<value_int=6>()\ny = OneHot<axis=0>(x,d,v)", (6, A, B)),
        # Reductions and products.
        ("float[a,b,s] x", "t = Constant<value_ints=[-1]>()\ny = ReduceMean(x,t)", (A, B, 1)),
        ("float[a,b] x", "y = ReduceSum<keepdims=0>(x)", ()),
        ("float[a,b] x", "y = ReduceSum<noop_with_empty_axes=1>(x)", (A, B)),
        ("float[a,b] x", "y = ArgMax<axis=1,keepdims=0>(x)", (A,)),
        ("float[b,1,a,5] x, float[4,5,s] z", "y = MatMul(x, z)", (B, 4, A, S)),
        ("float[5] x, float[4,5,s] z", "y = MatMul(x, z)", (4, S)),
        ("float[a,5] x, float[s,a] z", "y = Gemm<transA=1,transB=1>(x, z)", (5, S)),
        ("float[b,a,5] x, float[b,s,5] z", 'y = Einsum<equation="bij,bkj->bik">(x, z)', (B, A, S)),
        ("float[b,a,5] x", 'y = Einsum<equation="...ij->...ji">(x)', (B, 5, A)),
        # Convolution and pooling.
        ("float[b,3,11,8] x, float[4,3,3,3] w", "y = Conv<pads=[1,1,1,1],strides=[2,2]>(x,w)", (B, 4, 6, 4)),
        ("float[b,3,11,8] x, float[4,3,3,3] w", 'y = Conv<auto_pad="SAME_UPPER",strides=[2,2]>(x,w)', (B, 4, 6, 4)),
        ("float[b,3,11,8] x, float[4,3,3,3] w", 'y = Conv<auto_pad="VALID",dilations=[2,2]>(x,w)', (B, 4, 7, 4)),
        ("float[b,3,6,6] x", "y = MaxPool<kernel_shape=[3,3],strides=[2,2]>(x)", (B, 3, 2, 2)),
        ("float[b,3,6,6] x", "y = MaxPool<kernel_shape=[3,3],strides=[2,2],ceil_mode=1>(x)", (B, 3, 3, 3)),
        ("float[b,3,5,a] x, float[3,2,4,4] w", "y = ConvTranspose<strides=[2,2],pads=[1,1,1,1]>(x,w)", (B, 2, 10, 2 * A)),
        ("float[b,3,a,5] x, float[3,2,1,2] w", 'y = ConvTranspose<auto_pad="SAME_UPPER",strides=[2,2]>(x,w)', (B, 2, 2 * A - 1, 10)),
        # Recurrent, attention, quantised.
        ("float[s,b,3] x, float[2,16,3] w, float[2,16,4] r", 'y, h, c = LSTM<hidden_size=4,direction="bidirectional">(x,w,r)', (S, 2, B, 4)),
        ("float[a,b] x", "sc = Constant<value_float=1.0>()\ny = QuantizeLinear(x,sc)", (A, B)),
        ("float[b,s,64] x, uint8[32,2,16] w, float[64] sc", "y = com.microsoft.MatMulNBits<K=64,N=32,bits=4,block_size=32>(x,w,sc)", (B, S, 32)),
        ("uint8[99,32] w, int64[b,s] i, float[99,2] sc", "y = com.microsoft.GatherBlockQuantized<bits=4,block_size=32>(w,i,sc)", (B, S, 64)),
        ("float[a,4,b] x, float[4,s] z", "y = com.microsoft.FusedMatMul<transA=1>(x,z)", (A, B, S)),
    ],
)  # fmt: skip
def test_shape_of_one_operator(inputs: str, body: str, expected: tuple[Dim, ...]) -> None:
    text = f"g ({inputs}) => (float[r] y) {{\n{body}\n}}"
    found = shape_of(text, opset=20)
    assert found == tuple(e if isinstance(e, int) else e.expand() for e in expected)


def test_two_different_symbols_broadcast_to_a_fresh_one_each_time_the_same() -> None:
    shapes, values = infer(
        "g (float[a] x, float[b] z) => (float[r] y) {\n y = Add(x,z)\n w = Mul(z,x)\n}"
    )
    (first,), (second,) = (shapes.shape(values[name]) or () for name in "yw")
    assert first not in (A, B)
    assert shapes.is_fresh(first)
    assert first is second


def test_a_symbol_that_cannot_be_one_wins_a_broadcast() -> None:
    text = (
        "g (float[a] x, float[b] z) => (float[r] y) {\n w = Concat<axis=0>(z,z)\n y = Add(x,w)\n}"
    )
    assert shape_of(text) == (2 * B,)


def test_a_table_cut_to_a_length_broadcasts_to_the_length() -> None:
    text = """g (float[b,s,8] x, float[1,512,8] t) => (float[r] y) {
        h = Shape<start=1,end=2>(x)
        z = Constant<value_ints=[0]>()
        o = Constant<value_ints=[1]>()
        c = Slice(t, z, h, o)
        y = Add(x, c)
    }"""
    assert shape_of(text) == (B, S, 8)


@pytest.mark.parametrize(
    ("start", "end", "step", "expected"),
    [
        (0, 2**63 - 1, 1, lambda s: s),
        (1, 2**63 - 1, 1, lambda s: max(0, s - 1)),
        (-1, 2**63 - 1, 1, lambda s: min(1, s)),
        (0, -1, 1, lambda s: max(0, s - 1)),
        (0, 3, 1, lambda s: min(3, s)),
        (2, -2, 1, lambda s: max(0, s - 4)),
        (0, 2**31 - 1, 2, lambda s: -(-s // 2)),
        (-1, -(2**63), -1, lambda s: s),
    ],
)
def test_slice_of_a_symbolic_axis(start: int, end: int, step: int, expected: object) -> None:
    text = f"""g (float[s] x) => (float[r] y) {{
        b = Constant<value_ints=[{start}]>()
        e = Constant<value_ints=[{end}]>()
        a = Constant<value_ints=[0]>()
        p = Constant<value_ints=[{step}]>()
        y = Slice(x,b,e,a,p)
    }}"""
    found = shape_of(text)
    assert isinstance(found, tuple)
    assert callable(expected)
    for size in range(12):
        assert evaluate(found[0], {"s": size}) == expected(size), size


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Shape(x)", [B, S, 6]),
        ("y = Shape<start=-2>(x)", [S, 6]),
        ("y = Size(x)", [6 * B * S]),
        ("h = Shape(x)\ni = Constant<value_ints=[-1,0]>()\ny = Gather(h,i)", [6, B]),
        ("h = Shape(x)\nk = Constant<value_ints=[2,3,3]>()\ny = Mul(h,k)", [2 * B, 3 * S, 18]),
        ("h = Shape(x)\nm = Constant<value_int=-1>()\ny = Equal(h,m)", [False, False, False]),
        ("h = Shape<start=2>(x)\nk = Constant<value_ints=[-4]>()\ny = Div(k,h)", [0]),
        ("k = Constant<value_ints=[-7]>()\nd = Constant<value_ints=[2]>()\ny = Div(k,d)", [-3]),
        ("k = Constant<value_ints=[-7]>()\nd = Constant<value_ints=[4]>()\ny = Mod(k,d)", [1]),
        ("h = Shape<end=2>(x)\ny = ReduceProd<keepdims=0>(h)", [B * S]),
        ("h = Shape<end=1>(x)\nf = Cast<to=1>(h)\ny = Cast<to=7>(f)", [B]),
        ("h = Shape<end=1>(x)\ny = ConstantOfShape(h)", None),
        ("z = Constant<value_int=0>()\ne = Constant<value_int=3>()\no = Constant<value_int=1>()\ny = Range(z,e,o)", [0, 1, 2]),
        ("k = Constant<value_ints=[9223372036854775807]>()\no = Constant<value_ints=[1]>()\ny = Add(k,o)", None),
    ],
)  # fmt: skip
def test_content(body: str, expected: list[object] | None) -> None:
    text = f"g (float[b,s,6] x) => (int64[r] y) {{\n{body}\n}}"
    if expected is None:
        shapes, values = infer(text)
        assert shapes.known(values["y"]) is None
    else:
        assert content_of(text) == expected


def test_where_over_an_expand_target_keeps_the_extents() -> None:
    text = """g (float[b,1] x, float[b,s] z) => (float[r] y) {
        h = Shape(z)
        m = Constant<value_int=-1>()
        q = Equal(h, m)
        o = Constant<value_ints=[1,1]>()
        t = Where(q, o, h)
        y = Expand(x, t)
    }"""
    assert shape_of(text) == (B, S)


def test_half_of_a_length_through_floats_is_rounded_down() -> None:
    text = """g (float[s] x) => (int64[r] y) {
        h = Shape(x)
        f = Cast<to=1>(h)
        two = Constant<value_float=2.0>()
        d = Div(f, two)
        r = Floor(d)
        y = Cast<to=7>(r)
    }"""
    (found,) = content_of(text)
    assert [evaluate(found, {"s": n}) for n in range(6)] == [0, 0, 1, 1, 2, 2]


def test_reshape_to_unknown_content_keeps_the_rank_only() -> None:
    shapes, values = infer("g (float[a,4] x, int64[3] t) => (float[r] y) {\n y = Reshape(x,t)\n}")
    found = shapes.shape(values["y"])
    assert found is not None
    assert len(set(found)) == 3
    assert all(map(shapes.is_fresh, found))


def test_anonymous_extents_are_each_their_own() -> None:
    module = module_of("g (float[b,3,h,w] x) => (float[r] y) {\n y = Relu(x)\n}")
    value = module.graph.inputs[0]
    value.shape = ir.Shape(["b", 3, "?", "?"])
    shapes = Shapes.build(module)
    _, _, height, width = shapes.shape(value) or ()
    assert not shapes.equal(height, width)
    assert shapes.shape(module.graph.outputs[0]) == shapes.shape(value)


def test_an_initializer_that_is_an_input_has_no_known_content() -> None:
    module = module_of("g (float[a] x, int64[1] t = {2}) => (float[r] y) {\n y = Reshape(x,t)\n}")
    shapes = Shapes.build(module)
    assert module.graph.inputs[1].is_initializer()
    assert shapes.known(module.graph.inputs[1]) is None


def test_if_keeps_what_its_branches_agree_on() -> None:
    text = """g (bool c, float[a,3] x, float[b,3] z) => (float[r,q] y) {
        y = If(c) <
            then_branch = t () => (float[n,m] p) { p = Relu(x) },
            else_branch = e () => (float[n,m] q) { q = Relu(z) }
        >
    }"""
    shapes, values = infer(text)
    first, second = shapes.shape(values["y"]) or ()
    assert shapes.is_fresh(first)
    assert second == 3
    assert shapes.shape(values["p"]) == (A, 3)


LOOP = """g (int64 n, float[a,3] x) => (float[r,q] y, float[i,j,k] all) {{
    c = Constant<value = bool {{1}}>()
    y, all = Loop(n, c, x) <body = l (int64 i, bool go, float[h,w] v) =>
        (bool go_on, float[h,w] v_out, float[h,w] each) {{
            go_on = Identity(go)
            {body}
            each = Relu(v_out)
        }}>
}}"""


def test_loop_keeps_the_shape_of_a_variable_that_keeps_it() -> None:
    shapes, values = infer(LOOP.format(body="v_out = Relu(v)"))
    assert shapes.shape(values["y"]) == (A, 3)
    stacked = shapes.shape(values["all"]) or ()
    assert shapes.is_fresh(stacked[0])
    assert stacked[1:] == (A, 3)


def test_loop_forgets_the_extent_of_a_variable_that_grows() -> None:
    shapes, values = infer(LOOP.format(body="v_out = Concat<axis=0>(v, v)"))
    for name, axis in (("y", 0), ("all", 1)):
        found = shapes.shape(values[name]) or ()
        assert shapes.is_fresh(found[axis]), name
        assert found[axis + 1] == 3
    inside = shapes.shape(values["v_out"]) or ()
    assert inside[0] not in (A, 2 * A, 4 * A)


def test_scan_slices_its_input() -> None:
    text = """g (float[b] h, float[s,b] x) => (float[r] y, float[q,r] all) {
        y, all = Scan(h, x) <num_scan_inputs=1, body = l (float[n] u, float[n] v) =>
            (float[n] u_out, float[n] each) {
                u_out = Add(u, v)
                each = Relu(u_out)
            }>
    }"""
    shapes, values = infer(text)
    assert shapes.shape(values["y"]) == (B,)
    assert shapes.shape(values["all"]) == (S, B)


def test_a_function_is_inferred_at_each_call() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18, "local": 1]>
        g (float[a,4] x, float[b,5] z) => (float[r,q] y, float[r,q] w) {
            y = local.twice(x)
            w = local.twice(z)
        }
        <domain: "local", opset_import: ["": 18]>
        twice (u) => (v) { v = Concat<axis=0>(u, u) }
    """)
    module = Module(ir.from_proto(model))
    shapes = Shapes.build(module)
    y, w = module.graph.outputs
    assert shapes.shape(y) == (2 * A, 4)
    assert shapes.shape(w) == (2 * B, 5)
    inner = next(iter(module.model.functions.values())).outputs[0]
    assert shapes.shape(inner) is None, "the calls do not agree"
    assert shapes.dtype(inner) == ir.DataType.FLOAT


def test_fresh_symbols_of_two_calls_are_different() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18, "local": 1]>
        g (float[4] x, float[4] z) => (int64[r,q] y, int64[r,q] w) {
            y = local.places(x)
            w = local.places(z)
        }
        <domain: "local", opset_import: ["": 18]>
        places (u) => (v) { v = NonZero(u) }
    """)
    module = Module(ir.from_proto(model))
    shapes = Shapes.build(module)
    (_, first), (_, second) = (shapes.shape(v) or () for v in module.graph.outputs)
    assert not shapes.equal(first, second)


def test_a_malformed_node_is_recorded_and_claims_nothing() -> None:
    shapes, values = infer("g (float[3] x, float[4] z) => (float[r] y) {\n y = Add(x,z)\n}")
    assert shapes.shape(values["y"]) is None
    ((node, reason),) = shapes.misfits
    assert node.op_type == "Add"
    assert "3 and 4" in reason


def test_onnx_infers_an_operator_without_a_rule() -> None:
    text = "g (float[b,2,6] x) => (float[r] y) {\n s = Constant<value_ints=[2,3]>()\n y = CenterCropPad<axes=[1,2]>(x,s)\n}"
    assert shape_of(text) == (B, 2, 3)


def test_a_node_made_during_a_rewrite_is_inferred_on_demand() -> None:
    module = module_of("g (float[b,s] x) => (float[r] y) {\n y = Relu(x)\n}")
    shapes = Shapes.build(module)
    value = module.graph.inputs[0]
    new = ir.node("Transpose", [value])
    shapes.infer(new)
    assert shapes.shape(new.outputs[0]) == (S, B)
    chained = ir.node("Shape", [ir.node("Transpose", [new.outputs[0]]).outputs[0]])
    known = shapes.known(chained.outputs[0])
    assert known is not None
    assert list(known) == [B, S]


def test_nbytes_packs_small_types() -> None:
    module = module_of("g (float[b,s] x) => (float[r] y) {\n y = Relu(x)\n}")
    shapes = Shapes.build(module)
    assert shapes.nbytes(module.graph.inputs[0]) == 4 * B * S
    value = ir.Value(
        name="w",
        const_value=ir.Tensor(np.zeros((3, 5), dtype=ir.DataType.INT4.numpy())),
    )
    module.graph.register_initializer(value)
    assert shapes.nbytes(value) == 8


def test_nested_floors_become_one() -> None:
    height: Expr = S
    for _ in range(4):
        height = add(floor_div(add(height, -1), 2), 1)
    assert str(height).count("floor") == 1
    for size in range(70):
        expected = size
        for _ in range(4):
            expected = (expected - 1) // 2 + 1
        assert evaluate(height, {"s": size}) == expected


def test_products_are_expanded_and_so_compare_equal() -> None:
    left = multiply(add(S, 1), B)
    assert left == add(multiply(S, B), B)


def test_infer_shapes_writes_what_it_knows() -> None:
    from lwc.passes.cleanup.infer_shapes import InferShapes

    module = module_of(
        "g (float[b,s,6] x) => (int64[r,q] y) {\n h = Relu(x)\n k = Shape(h)\n y = NonZero(h)\n}"
    )
    assert run_pass_to_the_end(InferShapes(), module).changed
    h, k = (module.graph.node(i).outputs[0] for i in (0, 1))
    assert h.shape == ir.Shape(["b", "s", 6])
    assert h.dtype == ir.DataType.FLOAT
    assert k.shape == ir.Shape([3])


def test_infer_shapes_tells_where_the_file_is_wrong() -> None:
    from lwc.passes.cleanup.infer_shapes import InferShapes

    module = module_of("g (float[b,6] x) => (float[r,q] y) {\n h = Relu(x)\n y = Relu(h)\n}")
    value = module.graph.node(0).outputs[0]
    value.shape, value.type = ir.Shape(["b", 7]), ir.TensorType(ir.DataType.FLOAT)
    run_pass(InferShapes(), module)
    assert value.shape == ir.Shape(["b", 6])
    (remark,) = module.remarks
    assert "7" in remark.message
    assert "6" in remark.message


def test_a_sequence_of_even_pieces_has_their_shape() -> None:
    text = """g (float[b,s,96] x) => (float[r] y) {
        n = Constant<value_int=32>()
        q = SplitToSequence<axis=2>(x, n)
        i = Constant<value_int=1>()
        y = SequenceAt(q, i)
    }"""
    assert shape_of(text) == (B, S, 32)
    shapes, values = infer(text.replace("=32>", "=40>"))
    assert shapes.shape(values["y"]) is None, "the last piece is shorter"


def test_the_rows_of_a_scalar_that_is_not_zero_are_left_open() -> None:
    shapes, values = infer("g (float x) => (int64[r,k] y) { y = NonZero(x) }")
    shape = shapes.shape(values["y"])
    assert shape is not None
    assert all(map(shapes.is_fresh, shape))


def test_an_operator_without_a_rule_may_state_a_sequence() -> None:
    shapes, values = infer("""g (seq(float[n]) x) => (seq(float[n]) y) {
        y = SequenceMap <body = b (float[n] a) => (float[n] c) { c = Identity(a) }> (x)
    }""")
    fact = shapes.fact(values["y"])
    assert fact.dtype is None
    assert fact.element is not None
    assert fact.element.dtype == ir.DataType.FLOAT


def test_getting_the_element_of_what_is_no_optional_gives_the_whole() -> None:
    shapes, values = infer("""g (seq(float[n]) x) => (seq(float[n]) y, float[n] z) {
        y = OptionalGetElement(x)
        o = Optional(x)
        s = OptionalGetElement(o)
        i = Constant<value_int = 0>()
        z = SequenceAt(s, i)
    }""")
    assert shapes.fact(values["y"]).element is not None
    assert shapes.fact(values["s"]).element is not None
    assert shapes.dtype(values["z"]) == ir.DataType.FLOAT


def test_an_operator_that_came_after_the_opset_has_the_shape_that_is_stated() -> None:
    module = module_of("g (float[n, 8] x) => (float[n, 4] y) { y = SwiGLU(x) }", 21)
    (value,) = module.graph.outputs
    assert [str(dim) for dim in Shapes.build(module).fact(value).shape or ()] == ["n", "4"]
