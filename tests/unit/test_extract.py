"""Extraction: a piece of a module computes what it computed in the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import module_of, ops

from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.core.module import Module
from lwc.verify.reduction.extract import ExtractError, extract
from lwc.verify.reduction.observe import observe
from lwc.verify.structure.well_formed import verify_structure

Array = np.ndarray[Any, Any]


def run(module: Module, feed: Mapping[str, Array], names: Iterable[str] = ()) -> dict[str, Array]:
    with OnnxRuntimeBackend().compile(
        module, threads=1, expose=list(names), optimize="none"
    ) as executable:
        return executable.run({v.name: feed[v.name] for v in module.graph.inputs if v.name})


def picked(module: Module, *op_types: str) -> set[ir.Node]:
    return {node for node in module.graph if node.op_type in op_types}


def names(values: Iterable[ir.Value]) -> list[str | None]:
    return [value.name for value in values]


_UNARY = ("Relu", "Sigmoid", "Tanh", "Neg")
_BINARY = ("Add", "Mul", "Sub")
_SHAPES = ('"batch", 4, 6', '"batch", 6, 4')


@st.composite
def texts(draw: Callable[[Any], Any]) -> str:
    """Draw the text of a graph with computed shapes, shared weights and captured values."""
    flat: dict[int, list[str]] = {0: ["x", "w"], 1: ["u"]}
    lines: list[str] = []

    def add(form: int, right_side: str) -> None:
        name = f"v{len(lines)}"
        lines.append(f"{name} = {right_side}")
        flat[form].append(name)

    for index in range(draw(st.integers(2, 14))):
        form = draw(st.integers(0, 1))
        kind = draw(st.sampled_from(["unary", "binary", "transpose", "reshape", "if"]))
        value = draw(st.sampled_from(flat[form]))
        other = draw(st.sampled_from(flat[form]))
        if kind == "unary":
            add(form, f"{draw(st.sampled_from(_UNARY))}({value})")
        elif kind == "binary":
            add(form, f"{draw(st.sampled_from(_BINARY))}({value}, {other})")
        elif kind == "transpose":
            add(1 - form, f"Transpose<perm = [0, 2, 1]>({value})")
        elif kind == "reshape":
            lines += [
                f"s{index} = Shape(x)",
                f"b{index} = Gather<axis = 0>(s{index}, first)",
                f"t{index} = Concat<axis = 0>(b{index}, {'tail' if form else 'liat'})",
            ]
            add(1 - form, f"Reshape({value}, t{index})")
        else:
            then = f"(float[n, {'4, 6' if form == 0 else '6, 4'}] r{index})"
            lines += [f"total{index} = ReduceSum<keepdims = 0>({value})"]
            lines += [f"positive{index} = Greater(total{index}, zero)"]
            add(
                form,
                f"If(positive{index})<then_branch = yes () => {then} {{ r{index} = Add({value}, "
                f"{other}) }}, else_branch = no () => {then.replace(f'r{index}', f'q{index}')} "
                f"{{ q{index} = Neg({other}) }}>",
            )
    last = [values[-1] for values in flat.values()]
    results = dict.fromkeys(last)
    outputs = ", ".join(
        f"float[{_SHAPES[form]}] {value}" for form, value in enumerate(last) if value in results
    )
    body = "\n".join(lines)
    weights = ", ".join(f"{0.1 * i - 1:.1f}" for i in range(24))
    return f"""
        g (float["batch", 4, 6] x, float["batch", 6, 4] u) => ({outputs})
        <float[1, 4, 6] w = {{{weights}}}, int64[1] first = {{0}}, float zero = {{0}},
         int64[2] tail = {{4, 6}}, int64[2] liat = {{6, 4}}> {{
            {body}
        }}"""


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts(), st.data())
def test_a_piece_computes_what_it_did_in_the_whole(text: str, data: st.DataObject) -> None:
    module = module_of(text)
    verify_structure(module)
    observed = observe(module, threads=1)
    assert observed.failure is None
    inner = [v.name or "" for node in module.graph for v in node.outputs]
    whole = {**observed.feed, **run(module, observed.feed, inner)}
    nodes = list(module.graph)
    keep = data.draw(st.sets(st.sampled_from(range(len(nodes))), min_size=1))
    try:
        piece = extract(module, {nodes[i] for i in keep}, observed)
    except ExtractError:
        # Nothing that is kept is read by what is not, or leaves the graph.
        kept = {nodes[i] for i in keep}
        assert not any(
            value.is_graph_output() or any(use.node not in kept for use in value.uses())
            for node in kept
            for value in node.outputs
        )
        return
    verify_structure(piece)
    assert piece.graph.num_nodes() == len(keep)
    for name, result in run(piece, whole).items():
        np.testing.assert_array_equal(result, whole[name], err_msg=name)


def test_the_whole_is_kept_as_it_is() -> None:
    module = module_of("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    copy = extract(module, set(module.graph), observe(module))
    assert copy.fingerprint() == module.fingerprint()


def test_what_a_branch_captures_becomes_an_input() -> None:
    module = module_of("""
        g (float[n, 4] x, bool c) => (float[n, 4] y) {
            outer = Relu(x)
            y = If(c) <
                then_branch = yes () => (float[n, 4] a) { a = Neg(outer) },
                else_branch = no () => (float[n, 4] b) { b = Add(outer, outer) }
            >
        }""")
    piece = extract(module, picked(module, "If"), observe(module))
    verify_structure(piece)
    assert names(piece.graph.inputs) == ["c", "outer"]
    assert str(piece.graph.inputs[1].shape) == "[n,4]"
    kept = extract(module, picked(module, "Relu"), observe(module))
    assert names(kept.graph.outputs) == ["outer"]


def test_a_shared_weight_stays_one_and_an_unused_one_goes() -> None:
    module = module_of("""
        g (float[n, 2] x) => (float[n, 2] y)
        <float[2] w = {1, 2}, float[2] v = {3, 4}> {
            a = Add(x, w)
            b = Mul(a, w)
            y = Sub(b, v)
        }""")
    piece = extract(module, picked(module, "Add", "Mul"), observe(module))
    assert list(piece.graph.initializers) == ["w"]
    assert piece.graph.initializers["w"].const_value is module.graph.initializers["w"].const_value
    assert names(piece.graph.outputs) == ["b"]


def test_an_output_that_is_an_input_stays() -> None:
    module = module_of("""
        g (float[n] x, float[n] z) => (float[n] x, float[n] y) {
            a = Relu(z)
            y = Neg(a)
        }""")
    piece = extract(module, picked(module, "Neg"), observe(module))
    assert names(piece.graph.inputs) == ["x", "a"]
    assert names(piece.graph.outputs) == ["x", "y"]


def test_named_dimensions_keep_their_names_and_unknown_ones_get_their_own() -> None:
    module = module_of("""
        g (float[batch, 3] x, float[batch, 3] u) => (float[k, 2] y, float[m, 2] z) {
            s = Sigmoid(x)
            p = NonZero(x)
            q = NonZero(u)
            f = Cast<to = 1>(p)
            h = Cast<to = 1>(q)
            y = Transpose<perm = [1, 0]>(f)
            z = Transpose<perm = [1, 0]>(h)
            t = Relu(s)
        }""")
    piece = extract(module, picked(module, "Transpose", "Relu"), observe(module))
    dims = {value.name: [str(dim) for dim in value.shape or ()] for value in piece.graph.inputs}
    assert dims["s"] == ["batch", "3"]
    assert dims["f"][0] == dims["h"][0] == "2"
    assert len({dims["f"][1], dims["h"][1], "batch", "?", "None", ""}) == 6


def test_anonymous_dimensions_of_inputs_are_not_joined() -> None:
    module = module_of("""
        g (float["?", "?"] x) => (float["?", "?"] y) {
            a = Relu(x)
            y = Neg(a)
        }""")
    piece = extract(module, picked(module, "Neg"), observe(module))
    (shape,) = (value.shape for value in piece.graph.inputs)
    assert shape is not None
    assert shape[0] != shape[1]


def test_a_computed_shape_is_baked_and_binds_what_it_depends_on() -> None:
    module = module_of("""
        g (float[batch, time, 4] x, float[other] u) => (float[batch, k] y, float[other] v)
        <int64[1] first = {0}, int64[1] rest = {-1}> {
            s = Shape(x)
            b = Gather(s, first)
            t = Concat<axis = 0>(b, rest)
            y = Reshape(x, t)
            v = Relu(u)
        }""")
    observed = observe(module)
    piece = extract(module, picked(module, "Reshape", "Relu"), observed)
    target = piece.graph.initializers["t"].const_value
    assert target is not None
    assert target.numpy().tolist() == [observed.extents["batch"], -1]
    shapes = {value.name: str(value.shape) for value in piece.graph.inputs}
    assert shapes == {"x": f"[{observed.extents['batch']},time,4]", "u": "[other]"}


def test_what_weights_alone_decide_stays_a_weight() -> None:
    module = module_of("""
        g (float[n, 2] x) => (float[n, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}> {
            t = Transpose(w)
            y = MatMul(x, t)
        }""")
    piece = extract(module, picked(module, "MatMul"), observe(module))
    tensor = piece.graph.initializers["t"].const_value
    assert tensor is not None
    assert tensor.numpy().tolist() == [[1, 3], [2, 4]]


def test_inference_alone_where_the_module_does_not_run() -> None:
    module = module_of("""
        g (float[2, 3] x) => (float[2, 3] y) {
            a = Relu(x)
            b = my.domain.Secret(a)
            c = Neg(a)
            y = Add(b, c)
        }""")
    module.model.graph.opset_imports["my.domain"] = 1
    observed = observe(module)
    assert observed.failure is not None
    piece = extract(module, picked(module, "Neg"), observed)
    assert str(piece.graph.inputs[0].shape) == "[2,3]"
    with pytest.raises(ExtractError, match="'b' is not known"):
        extract(module, picked(module, "Add"), observed)


def test_nothing_left_to_return_is_refused() -> None:
    module = module_of("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    with pytest.raises(ExtractError, match="nothing is left"):
        extract(module, set(), observe(module))


def test_a_substitute_takes_the_place_of_a_dropped_node() -> None:
    module = module_of("""
        g (float[n] x) => (float[n] y) {
            a = Relu(x)
            b = Neg(a)
            y = Exp(b)
        }""")
    piece = extract(
        module,
        picked(module, "Relu", "Exp"),
        observe(module),
        outputs=["y"],
        substitutes={"b": "a"},
    )
    verify_structure(piece)
    assert ops(piece) == ["Relu", "Exp"]
    assert names(piece.graph.inputs) == ["x"]
