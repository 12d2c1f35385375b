"""lwc.to_fx: names, weights, provenance, errors, and the ways on from a GraphModule."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

import torch
from fx_agreement import MLP, assert_agrees, mlp, parsed, renamed
from support import module_of, run_plain

import lwc
from lwc.backends.fx.convert import to_fx
from lwc.backends.fx.session import FxBackend
from lwc.core.errors import InputError, LwcError, UsageError
from lwc.frontend.onnx_writer import save
from lwc.wiring import find_backend

ROOT = Path(__file__).parents[2]


def calls(lowered: Any) -> list[Any]:
    return [node for node in lowered.graph.nodes if node.op == "call_function"]


def test_paths_and_results_of_passes_are_lowered_too(tmp_path: Path) -> None:
    save(mlp(), tmp_path / "mlp.onnx")
    result = lwc.optimize(mlp(), "canonicalize")
    x = torch.ones(2, 4)
    for graph in (tmp_path / "mlp.onnx", result):
        torch.testing.assert_close(to_fx(graph)(x), to_fx(mlp())(x))
    with pytest.raises(LwcError, match="a int is no model"):
        to_fx(3)


def test_one_call_per_node_that_keeps_its_name() -> None:
    lowered = lwc.to_fx(mlp())
    assert isinstance(lowered, torch.fx.GraphModule)
    assert [node.name for node in calls(lowered)] == ["enc_MatMul", "add_it", "c", "Relu", "Relu_1"]
    assert "torch.add(" in lowered.code


def test_inputs_keep_their_order_and_one_output_is_no_tuple() -> None:
    lowered = lwc.to_fx(module_of("g (float[2] b, float[2] a) => (float[2] y) { y = Sub(b, a) }"))
    assert [n.name for n in lowered.graph.nodes if n.op == "placeholder"] == ["b", "a"]
    assert lowered(torch.ones(2), torch.zeros(2)).tolist() == [1, 1]
    assert lowered(a=torch.ones(2), b=torch.zeros(2)).tolist() == [-1, -1]


def test_provenance() -> None:
    module = mlp()
    next(iter(module.graph)).metadata_props["lwc.pass"] = "fold-linear"
    first = calls(lwc.to_fx(module))[0]
    assert first.meta["onnx"] == {
        "name": "/enc/MatMul",
        "op": "MatMul",
        "outputs": ["a"],
        "lwc.pass": "fold-linear",
    }


def test_weights_are_parameters_by_their_names_and_others_buffers() -> None:
    module = module_of(
        """g (float[n, 4] x) => (float[n, 2] y)
        <float[4, 2] w = {1,2,3,4,5,6,7,8}, float e = {0.5}, int8[2] codes = {1, 2}>
        { p = MatMul(x, w) q = Mul(p, e) f = Cast<to = 1>(codes) y = Add(q, f) }"""
    )
    lowered = lwc.to_fx(renamed(module, "w", "a.b.weight"))
    assert {name: p.requires_grad for name, p in lowered.named_parameters()} == {
        "a.b.weight": True,
        "e": False,
    }
    assert [name for name, _ in lowered.named_buffers()] == ["codes"]
    with torch.no_grad():
        lowered.a.b.weight.zero_()
    weight = module.graph.initializers["a.b.weight"].const_value
    assert weight is not None
    assert weight.numpy()[0, 0] == 1


def test_a_weight_read_twice_is_one_parameter() -> None:
    text = """g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {1,2,3,4}> {
        a = MatMul(x, w) s = ReduceSum<keepdims = 0>(a) z = Constant<value = float {0}>()
        c = Greater(s, z)
        y = If(c) <then_branch = t () => (float[n, 2] p) { p = MatMul(a, w) },
                   else_branch = e () => (float[n, 2] q) { q = Add(a, w) }> }"""
    module = module_of(text)
    lowered = lwc.to_fx(module)
    (weight,) = (p for p in lowered.parameters() if p.requires_grad)
    assert_agrees(module, {"x": np.ones((2, 2), np.float32)})
    assert_agrees(module, {"x": -np.ones((2, 2), np.float32)})
    lowered(torch.ones(2, 2)).sum().backward()
    twice = weight.grad.clone()
    assert not torch.equal(twice, torch.full((2, 2), 2.0))  # what the first product alone gives


@pytest.mark.parametrize(
    "names",
    [
        ("a", "a.b"),
        ("forward", "training"),
        ("0", "class"),
        ("", "/"),
        ("graph", "graph.weight"),
        ("meta.weight", "code"),
        ("recompile", "print_readable.0"),
        ("self", "_graph"),
    ],
)
def test_odd_names_of_weights(names: tuple[str, str]) -> None:
    module = module_of("g (float[2] x) => (float[2] y) { p = Add(x, x) y = Add(p, p) }")
    for node, name, number in zip(module.graph, names, (1, 2), strict=True):
        value = module.add_initializer(name or "w", np.full(2, number, np.float32))
        node.replace_input_with(1, value)
    lowered = lwc.to_fx(module)
    assert lowered(torch.zeros(2)).tolist() == [3, 3]
    with torch.no_grad():
        for parameter in lowered.parameters():
            parameter.mul_(2)
    assert len(module.update_weights(lowered)) == 2
    assert lwc.to_fx(module)(torch.zeros(2)).tolist() == [6, 6]


def test_extents_stay_integers() -> None:
    module = module_of(
        """g (float[batch, length, 6] x) => (float y) <int64 zero = {0}, int64 one = {1},
            int64[1] axis = {0}, int64[2] rest = {2, -1}>
        { s = Shape(x) b = Gather(s, zero) n = Gather(s, one) p = Mul(b, n)
          q = Unsqueeze(p, axis) t = Concat<axis = 0>(q, rest) y = Reshape(x, t) }""".replace(
            "(float y)", "(float[a, 2, 3] y)"
        )
    )
    lowered = lwc.to_fx(module)
    assert "tolist" not in lowered.code
    assert "numbers" not in lowered.code
    assert_agrees(module, {"x": np.ones((2, 3, 6), np.float32)})
    program = torch.export.export(
        lowered,
        (torch.ones(2, 3, 6),),
        dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},),
    )
    assert program.module()(torch.ones(5, 4, 6)).shape == (20, 2, 3)


def test_functions_are_inlined() -> None:
    module = parsed(
        """<ir_version: 9, opset_import: ["": 17, "own": 1]>
        g (float[n, 2] x) => (float[n, 2] y) { a = own.twice <by = 3.0> (x) y = own.twice (a) }
        <domain: "own", opset_import: ["": 17]>
        twice <by: float = 2.0> (x) => (y) {
            k = Constant <value_float: float = @by> () y = Mul(x, k) }
        """
    )
    assert_agrees(module, {"x": np.ones((3, 2), np.float32)})


def test_a_default_of_an_input() -> None:
    module = module_of(
        "g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {2, 3}> { y = Mul(x, w) }"
    )
    lowered = lwc.to_fx(module)
    ones = torch.ones(2)
    assert lowered(ones).tolist() == [2, 3]
    assert lowered(ones, w=5 * ones).tolist() == [5, 5]


def test_sequences_and_optionals() -> None:
    module = module_of(
        """g (float[n, 2] x) => (float[m, 2] y, int64 count) <int64 one = {1}>
        { s = SequenceConstruct(x, x) a = SequenceAt(s, one) t = SequenceInsert(s, a)
          count = SequenceLength(t) y = ConcatFromSequence<axis = 0>(t) }"""
    )
    assert_agrees(module, {"x": np.ones((3, 2), np.float32)})


def test_a_constant_place_in_a_sequence_needs_no_value_when_exported() -> None:
    module = module_of(
        """g (float[n, 6] x) => (float[n, 2] y) <int64 one = {1}, int64[3] parts = {2, 2, 2}>
        { s = SplitToSequence<axis = 1>(x, parts) a = SequenceAt(s, one)
          t = SequenceErase(s, one) u = SequenceInsert(t, a, one) y = SequenceAt(u, one) }"""
    )
    x = torch.ones(3, 6)
    exported = torch.export.export(
        lwc.to_fx(module), (x,), dynamic_shapes=({0: torch.export.Dim("n", max=9)},)
    )
    assert exported.module()(x).shape == (3, 2)


LOOP = """g (float[n, 2] x, int64 most) => (float[n, 2] y, float[m, n, 2] rows)
    <bool go = {1}, float two = {2}, float limit = {50}> {
    y, rows = Loop(most, go, x) <body = b (int64 i, bool c, float[n, 2] v) =>
        (bool k, float[n, 2] w, float[n, 2] r) {
        w = Mul(v, two) t = ReduceSum<keepdims = 0>(w) k = Less(t, limit) r = Add(w, x) }> }"""


@pytest.mark.parametrize("most", [0, 1, 3, 9])
def test_loops(most: int) -> None:
    assert_agrees(module_of(LOOP), {"x": np.ones((2, 2), np.float32), "most": np.array(most)})


def test_scans() -> None:
    module = module_of(
        """g (float[2] s, float[n, 2] x) => (float[2] e, float[n, 2] y) {
        e, y = Scan<num_scan_inputs = 1, scan_input_directions = [1], body = b (float[2] a,
            float[2] v) => (float[2] c, float[2] w) { c = Add(a, v) w = Mul(c, v) }>(s, x) }"""
    )
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert_agrees(module, {"s": np.ones(2, np.float32), "x": x})


# Errors


def test_an_operator_without_a_lowering_is_named_with_its_node() -> None:
    module = module_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    (node,) = module.graph
    node.domain, node.op_type, node.name = "com.own", "Grok", "deep"
    module.model.graph.opset_imports["com.own"] = 1
    with pytest.raises(LwcError, match=r"com.own::Grok 'deep': .*no lowering.*registry"):
        lwc.to_fx(module)


def test_an_attribute_that_is_not_known_is_named() -> None:
    module = module_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    (node,) = module.graph
    node.attributes["shade"] = ir.AttrInt64("shade", 1)
    with pytest.raises(LwcError, match=r"Relu -> 'y': .*attribute 'shade'"):
        lwc.to_fx(module)


def test_a_type_that_pytorch_lacks_is_named_with_the_node() -> None:
    module = module_of("g (float[2] x) => (string[2] y) { y = Cast<to = 8>(x) }")
    with pytest.raises(LwcError, match=r"Cast -> 'y': PyTorch has no tensors of type STRING"):
        lwc.to_fx(module)


def test_a_failure_at_run_time_names_the_node() -> None:
    module = mlp()
    module.graph.inputs[0].shape = None
    with pytest.raises(LwcError, match=r"MatMul '/enc/MatMul': RuntimeError: mat1 and mat2"):
        lwc.to_fx(module)(torch.ones(2, 5))


def test_a_failure_inside_of_a_branch_names_the_inner_node() -> None:
    module = module_of(
        """g (float[n] x, bool c) => (float[m] y) <int64[1] s = {7}> {
        y = If(c) <then_branch = t () => (float[m] p) { p = Reshape(x, s) },
                   else_branch = e () => (float[m] q) { q = Identity(x) }> }"""
    )
    with pytest.raises(LwcError, match=r"Reshape -> 'p'"):
        lwc.to_fx(module)(torch.ones(3), torch.tensor(True))


def test_values_that_are_not_there_cannot_be_exposed() -> None:
    with pytest.raises(LwcError, match="no value 'nowhere'"):
        to_fx(mlp(), expose=["nowhere"])
    with pytest.raises(UsageError, match="takes a list of names, not 'b'"):
        to_fx(mlp(), expose="b")


def test_without_torch_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import lwc, onnx, onnx_ir as ir\n"
        'text = \'<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) '
        "{ y = Relu(x) }'\n"
        "module = lwc.Module(ir.from_proto(onnx.parser.parse_model(text)))\n"
        "for call in (lwc.to_fx, module.update_weights):\n"
        "    try:\n        call(module)\n"
        "    except lwc.LwcError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("pip install -e '.[torch]'" in line for line in lines)


# Ways on


def test_it_compiles_and_copies() -> None:
    lowered = lwc.to_fx(mlp())
    x = torch.ones(3, 4)
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), lowered(x))
    torch.testing.assert_close(copy.deepcopy(lowered)(x), lowered(x))


@pytest.mark.parametrize("text", [LOOP, MLP])
def test_it_is_saved_and_read(text: str) -> None:
    lowered = lwc.to_fx(module_of(text))
    file = io.BytesIO()
    torch.save(lowered, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    given = (torch.ones(2, 2), torch.tensor(3)) if text == LOOP else (torch.ones(2, 4),)
    found, wanted = again(*given), lowered(*given)
    torch.testing.assert_close(found, wanted)
    assert [node.target for node in calls(again)] == [node.target for node in calls(lowered)]


def test_the_page_runs() -> None:
    script, page = ROOT / "tools" / "run_page.py", ROOT / "docs" / "fx.md"
    subprocess.run([sys.executable, script, page], check=True, capture_output=True)


def test_it_traces_back() -> None:
    module = mlp()
    lowered = lwc.to_fx(module)
    again = lwc.trace(lowered, (torch.ones(3, 4),), dynamic_shapes=({0: "n"},))
    x = np.random.default_rng(2).normal(size=(5, 4)).astype(np.float32)
    (name,) = (value.name for value in again.graph.inputs)
    (found,), (wanted,) = run_plain(again, {str(name): x}), run_plain(module, {"x": x})
    np.testing.assert_allclose(found, wanted, 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("y, z = Split <axis = 2, num_outputs = 2> (x)", "y z"),
        ('y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_UPPER"> (x)', "y"),
        (
            "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], "
            "ceil_mode = 1> (x)",
            "y",
        ),
        (
            "scales = Constant <value_floats = [1.0, 1.0, 1.5, 2.0]> () "
            'y = Resize <mode = "linear"> (x, , scales)',
            "y",
        ),
    ],
)
def test_extents_that_are_rounded_trace_back(body: str, outputs: str) -> None:
    """The exporter's `//` cuts toward zero, so that minus the floor of minus is no ceiling."""
    results = ", ".join(f"float[1, 1, {name}h, {name}w] {name}" for name in outputs.split())
    module = module_of(f"g (float[1, 1, h, 8] x) => ({results}) {{ {body} }}", opset=19)
    again = lwc.trace(
        lwc.to_fx(module), (torch.ones(1, 1, 6, 8),), dynamic_shapes=({2: torch.export.Dim("h")},)
    )
    for extent in (6, 7, 8, 9):
        x = np.random.default_rng(2).normal(size=(1, 1, extent, 8)).astype(np.float32)
        wanted = run_plain(module, {"x": x})
        for found, array in zip(run_plain(again, {"x": x}), wanted, strict=True):
            np.testing.assert_allclose(found, array, 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("outputs", "body"),
    [
        ("float[n, 3] y, int64[n, 3] z", "y, z = TopK (x, three)"),
        ("float[n, 3] y, int64[n, 3] z", "y, z = TopK <largest = 0> (x, three)"),
        ("int64[n, 1] y", "y = ArgMax <axis = 1, select_last_index = 1> (x)"),
        ("uint8[n, 5] y, float z, uint8 w", "y, z, w = DynamicQuantizeLinear (x)"),
        (
            "float[a, 5] y, int64[b] z, int64[c] v, int64[d] w",
            "y, z, v, w = Unique <axis = 0> (x)",
        ),
        ("float[k] y", "y, z, v, w = Unique <sorted = 0> (x)"),
        ("int64[2, k] y", "y = NonZero (x)"),
    ],
)
def test_what_the_exporter_lacks_traces_back(outputs: str, body: str) -> None:
    module = module_of(
        f"g (float[n, 5] x) => ({outputs}) <int64[1] three = {{3}}> {{ {body} }}", opset=18
    )
    again = lwc.trace(lwc.to_fx(module), (torch.ones(4, 5),), dynamic_shapes=({0: "n"},))
    # Of few values, so that there are equal ones in every row.
    x = np.random.default_rng(3).integers(-1, 2, (7, 5)).astype(np.float32)
    wanted = run_plain(module, {"x": x})
    for found, array in zip(run_plain(again, {"x": x}), wanted, strict=True):
        np.testing.assert_array_equal(found, array)


def test_a_node_without_a_translation_is_named() -> None:
    module = module_of(
        """g (float[4] x) => (float[4] y) <int64 axis = {0}>
        { a = Relu (x) y = CumProd (a, axis) }""",
        opset=26,
    )
    with pytest.raises(InputError, match=r"^CumProd -> 'y': .* no ONNX translation of prims.prod"):
        lwc.trace(lwc.to_fx(module), (torch.ones(4),))


def test_a_node_that_cannot_be_captured_is_named() -> None:
    module = module_of(
        """g (float[2, 4] x, int64[1] size) => (float[a, b] y)
        { z = Relu (x) y = CenterCropPad <axes = [1]> (z, size) }""",
        opset=18,
    )
    with pytest.raises(InputError, match=r"^CenterCropPad -> 'y': torch.export cannot capture"):
        lwc.trace(lwc.to_fx(module), (torch.ones(2, 4), torch.tensor([3])))


def test_a_node_that_fixes_a_dynamic_extent_is_named() -> None:
    module = module_of(
        """g (float[n, 2] x) => (float[m, 2] y) <int64 one = {1}>
        { s = SplitToSequence <axis = 0> (x) y = SequenceAt (s, one) }"""
    )
    lowered = lwc.to_fx(module)
    with pytest.raises(InputError, match=r"'x'.*change SplitToSequence -> 's', which fixes it"):
        lwc.trace(lowered, (torch.ones(3, 2),), dynamic_shapes=({0: "n"},))
    again = lwc.trace(lowered, (torch.ones(3, 2),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert again.graph.inputs[0].shape == (3, 2)
    assert [each.kind for each in again.remarks] == ["note"]


def test_negative_extents_are_divided_toward_zero_in_exports() -> None:
    module = module_of(
        """g (float[n] x) => (int64[1] y) <int64[1] two = {2}> {
        extent = Shape (x)  below = Neg (extent)  y = Div (below, two) }"""
    )
    exported = torch.export.export(
        lwc.to_fx(module), (torch.ones(6),), dynamic_shapes=({0: torch.export.Dim("n")},)
    ).module()
    for n in (5, 6, 7):
        assert exported(torch.ones(n)).tolist() == [-(n // 2)]


def test_export_keeps_both_branches() -> None:
    """Padding by extents inside of a branch: PyTorch's max of symbols goes wrong there."""
    module = module_of(
        """g (float[2, n] x, bool c) => (float[2, m] y) <int64[4] p = {0, 0, 0, 3}> {
        y = If(c) <then_branch = t () => (float[2, m] u) { u = Pad<mode = "reflect">(x, p) },
                   else_branch = e () => (float[2, m] v) { v = Pad<mode = "edge">(x, p) }> }"""
    )
    lowered = lwc.to_fx(module)
    x = torch.arange(10.0).reshape(2, 5)
    program = torch.export.export(lowered, (x, torch.tensor(True)), strict=False)
    for chosen in (True, False):
        given = (x, torch.tensor(chosen))
        assert torch.equal(program.module()(*given), lowered(*given))


# The backend


def test_the_backend_runs_profiles_and_exposes() -> None:
    make = find_backend("fx")
    assert make is not None
    backend = make()
    assert isinstance(backend, FxBackend)
    feed = {"x": np.ones((2, 4), np.float32)}
    with backend.compile(mlp(), threads=1, expose=["b"]) as executable:
        executable.warm_up(feed)
        found = executable.run(feed)
        assert list(found) == ["y", "b"]
        assert list(executable.run(feed, ["b"])) == ["b"]
        executable.bind(feed)()
        times = executable.profile(feed, runs=2)
        assert [time.op for time in times] == ["MatMul", "Add", "Mul", "Relu", "Slice"]
        assert times[0].node == "/enc/MatMul"
        with pytest.raises(LwcError, match="'z' is no output"):
            executable.run(feed, ["z"])
        with pytest.raises(LwcError, match="the feed lacks input 'x'"):
            executable.run({})
        with pytest.raises(LwcError, match="which is no input"):
            executable.run({**feed, "z": feed["x"]})
        with pytest.raises(LwcError, match="fed an array of type float64"):
            executable.run({"x": np.ones((2, 4))})
    with pytest.raises(LwcError, match="closed"):
        executable.run(feed)


def test_a_pass_may_run_the_model_on_it(tmp_path: Path) -> None:
    module = mlp()
    feed = {"x": np.random.default_rng(3).normal(size=(2, 4)).astype(np.float32)}
    result = lwc.optimize(module.clone(), "smooth-quantize", calibration=[feed], backend="fx")
    save(result.module, tmp_path / "m.onnx")
    assert_agrees(lwc.load(tmp_path / "m.onnx"), feed)
