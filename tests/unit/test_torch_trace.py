"""Tracing PyTorch modules: same outputs, named dimensions, shared weights, clear errors."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import onnxruntime
import torch
from support import ops, run_plain

import lwc
from lwc.core.errors import InputError, LwcError
from lwc.core.module import Module
from lwc.frontend.onnx_writer import save
from lwc.frontend.torch_trace import DEFAULT_OPSET, trace

Dim = torch.export.Dim
RTOL, ATOL = 1e-5, 1e-6


class Base(torch.nn.Module):  # type: ignore[misc]
    pass


class Linear(Base):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 5)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: Any, y: Any) -> Any:
        return self.dropout(self.linear(x)) + y.sum(), torch.cat([x, x])


class Tied(Base):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Any) -> Any:
        return self.head(self.table(ids))


class Branching(Base):
    def forward(self, x: Any) -> Any:
        return x + 1 if x.sum() > 0 else x


class Unsupported(Base):
    def forward(self, x: Any) -> Any:
        return torch.linalg.svd(x)


class Constant(Base):
    """Its outputs are a tensor and a number."""

    def forward(self, x: Any) -> Any:
        return x * 2, 3


class Fixed(Base):
    def forward(self, x: Any) -> Any:
        return x + torch.ones(3, 1)


def run(module: Module, folder: Path, *inputs: Any) -> list[np.ndarray[Any, Any]]:
    path = folder / "model.onnx"
    save(module, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return session.run(None, feed)  # type: ignore[no-any-return]


def dims(value: Any) -> list[Any]:
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


@pytest.mark.parametrize("form", ["module", "graph_module", "exported_program"])
@pytest.mark.parametrize("rows", [1, 6])
def test_every_form_computes_what_torch_does(form: str, rows: int, tmp_path: Path) -> None:
    model = Linear().eval()
    example = torch.ones(3, 4), torch.ones(3)
    shapes = ({0: Dim("batch")}, {0: Dim("width")})
    if form == "module":
        module = trace(model, example, dynamic_shapes=shapes)
    elif form == "graph_module":
        module = trace(torch.fx.symbolic_trace(model), example, dynamic_shapes=shapes)
    else:
        module = trace(torch.export.export(model, example, dynamic_shapes=shapes))
    feed = torch.randn(rows, 4), torch.randn(rows + 1)
    with torch.no_grad():
        expected = model(*feed)
    for got, want in zip(run(module, tmp_path, *feed), expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=RTOL, atol=ATOL)
    assert [dims(value) for value in module.graph.inputs] == [["batch", 4], ["width"]]
    assert [dims(value) for value in module.graph.outputs] == [["batch", 5], ["2*batch", 4]]
    assert module.opset == DEFAULT_OPSET


def test_strings_name_dimensions_and_hints_get_the_inputs_name() -> None:
    module = trace(
        Linear(), (torch.ones(3, 4), torch.ones(3)), dynamic_shapes=({0: "rows"}, {0: Dim.AUTO})
    )
    assert [dims(value) for value in module.graph.inputs] == [["rows", 4], ["y_dim0"]]
    assert dims(module.graph.outputs[1]) == ["2*rows", 4]


def test_names_of_inputs_and_outputs_can_be_chosen() -> None:
    module = trace(
        Linear(),
        (torch.ones(3, 4),),
        {"y": torch.ones(3)},
        input_names=["left", "right"],
        output_names=["sum", "twice"],
    )
    assert [value.name for value in module.graph.inputs] == ["left", "right"]
    assert [value.name for value in module.graph.outputs] == ["sum", "twice"]


def test_training_mode_is_left_as_it_was_and_dropout_is_off() -> None:
    model = Linear().train()
    module = trace(model, (torch.ones(3, 4), torch.ones(3)))
    assert model.training
    assert model.dropout.training
    assert "Dropout" not in {node.op_type for node in module.graph}


def test_weights_are_shared_with_torch_and_tied_ones_are_one_initializer() -> None:
    model = Tied()
    module = trace(model, (torch.ones(2, 3, dtype=torch.int64),))
    (weight,) = [v for v in module.graph.initializers.values() if v.shape == (7, 4)]
    assert weight.const_value is not None
    content = weight.const_value.numpy()
    assert np.shares_memory(content, model.table.weight.detach().numpy())
    assert sorted(use.node.op_type for use in weight.uses()) == ["Gather", "Transpose"]


def test_provenance_is_the_module_path_and_nothing_heavy() -> None:
    module = trace(Linear(), (torch.ones(3, 4), torch.ones(3)))
    gemm = next(node for node in module.graph if node.op_type == "Gemm")
    assert dict(gemm.metadata_props) == {"torch.op": "linear.default", "torch.module": "linear"}
    allowed = {"torch.op", "torch.module"}
    for node in module.graph:
        assert set(node.metadata_props) <= allowed
        assert not any(value.metadata_props for value in node.outputs)
        assert not node.meta
    assert not module.graph.metadata_props


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("model", "shapes", "words"),
    [
        (Branching(), None, ["Branching", "data-dependent", "torch.where"]),
        (Unsupported(), None, ["aten._linalg_svd", "no ONNX translation"]),
        (
            torch.nn.Sequential(torch.nn.Identity(), Unsupported()),
            None,
            ["module '1'", "aten._linalg_svd", "no ONNX translation"],
        ),
        (Constant(), None, ["output 1 of the module is 3", "return a tensor"]),
        (Fixed(), ({0: Dim("rows")},), ["Fixed", "rows", "dynamic_shapes"]),
        (Fixed(), ({0: "rows"},), ["Fixed", "dynamic_shapes"]),
    ],
)
def test_failures_are_one_line_with_the_culprit(
    model: Any, shapes: Any, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as caught:
        trace(model, (torch.ones(3, 3),), dynamic_shapes=shapes)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text
    assert capfd.readouterr() == ("", "")
    assert gc.isenabled()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_bits_are_shifted_right(dtype: Any) -> None:
    x = torch.tensor([-128, -3, -1, 0, 5, 127, 100]).to(dtype)
    module = trace(Written(lambda x: (x >> 2, x >> torch.ones_like(x))), (x,))
    found = run_plain(module, {str(module.graph.inputs[0].name): x.numpy()})
    for array, wanted in zip(found, (x >> 2, x >> 1), strict=True):
        assert array.dtype == wanted.numpy().dtype
        np.testing.assert_array_equal(array, wanted.numpy())


def test_experts_without_a_translation_have_another_implementation() -> None:
    @torch.library.custom_op("lwc_test::grouped_mm_fallback", mutates_args=())  # type: ignore[untyped-decorator]
    def grouped(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    grouped.register_fake(torch.empty_like)
    with pytest.raises(InputError, match=r'experts_implementation="batched_mm"'):
        trace(Written(grouped), (torch.ones(2, 3),))


def test_missing_arguments_and_other_objects_are_refused() -> None:
    with pytest.raises(InputError, match="missing a required argument: 'x'"):
        trace(Fixed())
    with pytest.raises(LwcError, match="cannot trace a int"):
        trace(3)


@pytest.mark.parametrize(
    "call", [lwc.to_fx, lwc.to_triton, lambda module: lwc.optimize(module, "canonicalize")]
)
def test_modules_without_inputs_are_to_be_traced_first(call: Any) -> None:
    told = r"a Linear is traced with example inputs, .* \(make a module of it by lwc\.trace\("
    if call is lwc.to_triton:
        pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")
    with pytest.raises(InputError, match=told):
        call(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("args", [torch.ones(1, 4), 5])
def test_a_bare_input_is_no_tuple_of_inputs(args: Any) -> None:
    with pytest.raises(InputError, match=r"args is a tuple .*, not a (Tensor|int) \(give \(x,\)"):
        trace(Branching(), args)


def test_an_opset_out_of_reach_is_refused() -> None:
    for opset in (99, 17):
        with pytest.raises(InputError, match="opset"):
            trace(Fixed(), (torch.ones(3, 3),), opset=opset)


class Named(Base):
    """Its weights are called as the exporter calls its own values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for index in range(6):
            self.register_buffer(f"val_{index}", torch.randn(4, 4))
        self.matmul = torch.nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Any) -> Any:
        for index in range(6):
            x = torch.nn.functional.linear(x, getattr(self, f"val_{index}")).mean(0, keepdim=True)
        return torch.matmul(x, self.matmul)


def test_names_are_unique_whatever_weights_are_called(tmp_path: Path) -> None:
    model = Named().eval()
    module = trace(model, (torch.ones(3, 4),))
    names = [value.name for node in module.graph for value in node.outputs]
    names += [*module.graph.initializers]
    assert len(set(names)) == len(names)
    feed = torch.randn(3, 4)
    wanted = model(feed).detach().numpy()
    np.testing.assert_allclose(run(module, tmp_path, feed)[0], wanted, RTOL, ATOL)


def test_a_quotient_of_extents_is_rounded_down() -> None:
    class Halved(Base):
        def forward(self, x: Any) -> Any:
            return x[:, : -(-x.shape[1] // 2)], x[:, : x.shape[1] // 2]

    module = trace(
        Halved(), (torch.ones(2, 6),), dynamic_shapes=({1: torch.export.Dim("n", min=2)},)
    )
    (name,) = (value.name for value in module.graph.inputs)
    for n in (5, 6, 7):
        x = np.arange(2 * n, dtype=np.float32).reshape(2, n)
        up, down = run_plain(module, {str(name): x})
        np.testing.assert_array_equal(up, x[:, : (n + 1) // 2])
        np.testing.assert_array_equal(down, x[:, : n // 2])
    # What is never negative is divided as it stands.
    assert ops(module).count("Mod") == 1


class Written(Base):
    """What a function computes."""

    def __init__(self, compute: Any) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Any) -> Any:
        return self.compute(x)


def traced(compute: Any, asked: Any) -> Module:
    return trace(Written(compute), (torch.ones(4, 8),), dynamic_shapes=({0: asked},))


def halved(x: Any) -> Any:
    return torch.zeros(x.shape[0] // 2) + (1 if x.shape[0] // 2 == 2 else 0)


def checked(x: Any) -> Any:
    torch._check(x.shape[0] <= 100)
    return x + 1


def told(module: Module) -> list[tuple[str, str]]:
    """Return kinds and messages of remarks, without the line numbers of this file."""
    return [
        (each.kind, re.sub(r"(test_torch_trace\.py):\d+", r"\1", each.message))
        for each in module.remarks
    ]


@pytest.mark.parametrize(
    ("compute", "asked", "kind", "condition"),
    [
        (lambda x: x + 1 if x.shape[0] > 3 else x, "n", "warning", "n > 3"),
        (lambda x: x + 1 if x.shape[0] > 3 else x, Dim.AUTO, "warning", "x_dim0 > 3"),
        (lambda x: x + 1 if x.shape[0] % 2 == 0 else x, Dim("n"), "warning", "Mod(n, 2) == 0"),
        (halved, Dim.DYNAMIC, "warning", "(x_dim0//2) == 2"),
        (checked, "n", "note", "n <= 100"),
        (lambda x: x[2], Dim.DYNAMIC, "note", "x_dim0 > 2"),
    ],
)
def test_what_narrows_a_dimension_is_told(
    compute: Any, asked: Any, kind: str, condition: str
) -> None:
    module = traced(compute, asked)
    words = "right only where" if kind == "warning" else "the module itself asks for"
    assert told(module) == [(kind, f"{words} {condition} (test_torch_trace.py)")]
    assert isinstance(dims(module.graph.inputs[0])[0], str)


def test_what_leaves_out_an_extent_of_1_is_a_note() -> None:
    module = traced(lambda x: x + 1 if x.shape[0] > 1 else x, "n")
    message = "right where n > 1 (test_torch_trace.py), perhaps not at 1"
    assert told(module) == [("note", message)]


@pytest.mark.parametrize(
    ("compute", "asked"),
    [
        (lambda x: x.transpose(0, 1).reshape(2, -1), "n"),
        (lambda x: torch.softmax(x @ x.T, -1) @ x + x.mean(0, keepdim=True), "n"),
        (lambda x: x[:3] + x.new_ones(x.shape[0], 1)[:3], Dim.AUTO),
        (lambda x: x[2], Dim("n", min=3)),
        (lambda x: x[2], Dim.DYNAMIC(min=3, max=100)),
        (lambda x: x + 1 if x.shape[0] <= 100 else x, Dim("n", min=1, max=100)),
    ],
)
def test_nothing_is_told_of_what_the_user_said_or_always_holds(compute: Any, asked: Any) -> None:
    assert told(traced(compute, asked)) == []


def of_four(x: Any) -> Any:
    """Take a way that only an extent of 4 goes, by an equation that PyTorch does not solve."""
    return x + 1 if x.shape[0] + x.shape[0] // 2 == 6 else x


@pytest.mark.parametrize("asked", ["n", Dim.DYNAMIC, Dim("n")])
@pytest.mark.parametrize(
    "compute", [lambda x: x + 1 if x.shape[0] == 4 else x, lambda x: x.view(4, 8), of_four]
)
def test_a_dynamic_dimension_that_is_fixed_is_an_error(compute: Any, asked: Any) -> None:
    with pytest.raises(InputError) as caught:
        traced(compute, asked)
    text = str(caught.value)
    assert re.search(r"\bn\b|'x'", text), text
    assert "dynamic_shapes" in text
    assert "test_torch_trace.py:" in text


def test_what_may_be_fixed_is_fixed() -> None:
    module = traced(of_four, Dim.AUTO)
    ((kind, message),) = told(module)
    assert kind == "note"
    assert message.startswith("dimension 0 of 'x' is fixed at 4: ")
    assert dims(module.graph.inputs[0]) == dims(module.graph.outputs[0]) == [4, 8]


class Two(Base):
    def forward(self, x: Any, y: Any) -> Any:
        return x.sum(1), y.sum(1)


def test_names_go_to_the_inputs_they_were_given_for() -> None:
    x, y = torch.ones(3, 2), torch.ones(5, 4)
    shapes = {"y": {0: "of_y"}, "x": {0: "of_x"}}
    for args, kwargs in (((x, y), {}), ((), {"y": y, "x": x})):
        module = trace(Two(), args, kwargs, dynamic_shapes=shapes)
        found = {value.name: dims(value)[0] for value in module.graph.inputs}
        assert found == {"x": "of_x", "y": "of_y"}
        assert [dims(value) for value in module.graph.outputs] == [["of_x"], ["of_y"]]


class Difference(Base):
    def forward(self, x: Any, y: Any) -> Any:
        return x - 2 * y


def test_a_tensor_that_is_given_twice_is_two_inputs() -> None:
    x = torch.ones(4, 2)
    for args, kwargs in (((x, x), {}), ((x,), {"y": x})):
        module = trace(Difference(), args, kwargs)
        feed = {"x": np.full((4, 2), 5, np.float32), "y": np.ones((4, 2), np.float32)}
        np.testing.assert_array_equal(run_plain(module, feed)[0], feed["x"] - 2 * feed["y"])


class Sum(Base):
    def forward(self, x: Any, y: Any) -> Any:
        return x.reshape(-1, 4) + y


def test_dimensions_of_two_names_that_depend_on_each_other_are_told() -> None:
    given = torch.ones(3, 8), torch.ones(6, 4)
    module = trace(Sum(), given, dynamic_shapes=({0: "n"}, {0: "m"}))
    assert ("warning", "right only where m == 2*n, as dimension 0 of 'y' is called") in told(module)
    # Names of PyTorch's own say what depends on what.
    assert not told(trace(Sum(), given, dynamic_shapes=({0: "n"}, {0: Dim.AUTO})))


class Sums(Base):
    def forward(self, x: Any, y: Any) -> Any:
        return x.sum(1) + y.sum(1)


def test_one_name_is_one_extent() -> None:
    given, shapes = (torch.ones(2, 5), torch.ones(2, 6)), ({1: "n"}, {1: "n"})
    told = r"'n' names dimension 1 of 'x', whose example has 5, and dimension 1 of 'y', .* has 6"
    with pytest.raises(InputError, match=told):
        trace(Sums(), given, dynamic_shapes=shapes)


@pytest.mark.parametrize("axis", [-2, 2])
def test_a_dimension_that_is_not_there_is_told(axis: int) -> None:
    with pytest.raises(InputError, match=f"has a dimension {axis} for 'x', whose 2 dimensions"):
        trace(Fixed(), (torch.ones(3, 3),), dynamic_shapes=({axis: "n"},))


class Counting(Base):
    """It counts its calls, and keeps a part of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("kept", torch.zeros(4))
        self.register_buffer("same", torch.ones(()))

    def forward(self, x: Any) -> Any:
        self.calls.add_(1)
        self.kept[1:3] = x
        return x * self.calls + self.kept[:2].add(self.same)


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_state_that_a_graph_has_not_is_told(decomposed: bool) -> None:
    program = torch.export.export(Counting(), (torch.ones(2),))
    found = told(trace(program.run_decompositions() if decomposed else program))
    assert [(kind, message.split(",")[0]) for kind, message in found] == [
        ("warning", f"each call changes buffer '{name}'") for name in ("calls", "kept")
    ]


@pytest.mark.parametrize("deferred", [False, True])
def test_a_program_that_was_captured_elsewhere_tells_too(deferred: bool) -> None:
    program = torch.export.export(
        Written(lambda x: x + 1 if x.shape[0] % 2 == 0 else x),
        (torch.ones(4, 8),),
        dynamic_shapes=({0: Dim.AUTO},),
        prefer_deferred_runtime_asserts_over_guards=deferred,
    )
    assert told(trace(program)) == [("warning", "right only where Mod(x_dim0, 2) == 0")]


def test_a_program_is_left_as_it_was() -> None:
    def cut(x: Any) -> Any:
        return torch.cond(
            x.sum() > 0,
            lambda x: x[: -(-x.shape[0] // 2)].sum(0),
            lambda x: x[: -(-x.shape[0] // 3)].sum(0),
            (x,),
        ) + x[: -(-x.shape[0] // 2)].sum(0)

    program = torch.export.export(
        Written(cut),
        (torch.ones(5, 8),),
        dynamic_shapes=({0: Dim.DYNAMIC},),
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    before = str(program)
    twice = [trace(program) for _ in range(2)]
    assert str(program) == before
    assert ops(twice[0]) == ops(twice[1])
    x = -np.arange(56, dtype=np.float32).reshape(7, 8)
    (found,) = run_plain(twice[1], {str(twice[1].graph.inputs[0].name): x})
    np.testing.assert_array_equal(found, program.module()(torch.from_numpy(x)).numpy())
