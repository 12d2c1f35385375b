"""bind-dims: names become numbers everywhere, unknown names are refused."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from support import run_pass

from lwc.core.errors import PassError, UsageError
from lwc.core.module import Module
from lwc.passes.cleanup.bind_dims import BindDims
from lwc.pipeline.passes import PassResult

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[batch,sequence,4] x, float[batch,twice] z)
    => (float[batch,sequence,4] y, float[batch,twice] w)
{ y = Relu(x)
  w = Neg(z) }"""


def module_of() -> Module:
    module = Module(ir.from_proto(onnx.parser.parse_model(TEXT)))
    for value in (module.graph.inputs[1], module.graph.outputs[1]):
        value.shape = ir.Shape(["batch", "2*sequence"])
    return module


def bind(module: Module, **bindings: int) -> PassResult:
    return run_pass(BindDims(tuple(bindings.items())), module)


def shapes(module: Module) -> dict[str | None, list[object]]:
    values = [*module.graph.inputs, *module.graph.outputs]
    return {v.name: [d if isinstance(d, int) else d.value for d in v.shape or ()] for v in values}


def test_named_dimensions_become_numbers_in_expressions_too() -> None:
    module = module_of()
    assert bind(module, batch=2, sequence=8).changed
    assert shapes(module) == {"x": [2, 8, 4], "z": [2, 16], "y": [2, 8, 4], "w": [2, 16]}


def test_others_keep_their_names() -> None:
    module = module_of()
    bind(module, batch=3)
    assert shapes(module)["z"] == [3, "2*sequence"]


def test_binding_again_changes_nothing_and_another_number_is_refused() -> None:
    module = module_of()
    bind(module, batch=2)
    assert not bind(module, batch=2).changed
    with pytest.raises(PassError, match="bound to 2 already"):
        bind(module, batch=3)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean sequence"):
        bind(module_of(), sequense=4)


@pytest.mark.parametrize("extent", [0, -1, 2**63])
def test_numbers_that_are_no_extents_are_refused(extent: int) -> None:
    with pytest.raises(UsageError, match=f"cannot be {extent}"):
        bind(module_of(), batch=extent)


def test_unnamed_dimensions_are_bound_by_their_printed_name() -> None:
    module = module_of()
    module.graph.inputs[0].shape = ir.Shape([None, 8, 4])
    bind(module, x_dim0=5)
    assert shapes(module)["x"] == [5, 8, 4]
