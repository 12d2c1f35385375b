"""The Python that a lowered module is written as, whatever its names are."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import onnx
import onnx.helper
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are for Triton's interpreter here", allow_module_level=True)

from support import run_interpreted  # noqa: E402

from lwc.backends.triton.architectures import architecture  # noqa: E402
from lwc.backends.triton.convert import to_triton  # noqa: E402
from lwc.backends.triton.emit import emit  # noqa: E402
from lwc.backends.triton.source import python_source  # noqa: E402
from lwc.core.errors import LwcError  # noqa: E402
from lwc.core.module import Module  # noqa: E402

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)


def made(graph: str, x: str, y: str, extent: str) -> Module:
    """x and its double, of one dimension with a name."""
    nodes = [onnx.helper.make_node("Add", [x, x], [y], name=y)]
    kind = onnx.TensorProto.FLOAT
    first, last = (onnx.helper.make_tensor_value_info(each, kind, [extent]) for each in (x, y))
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, graph, [first], [last]),
        opset_imports=[onnx.helper.make_opsetid("", 21)],
    )
    return Module(ir.from_proto(proto))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(NAMES, NAMES, NAMES, NAMES)
@example("path", "torch", "Path", "n")
@example("Path", "self", "forward", "n")
@example('a"""b', "x", "y", '"""')
@example('"', '"', "\\", "\\")
@example("\\", "x\\", "y\n", "n")
@example("日本", "日本", "本", "日")
@example("1st", "1", "2", "n")
@example("None", "fx_elementwise", "attach", "n")
@example('"""\nimport os\n"""', "x\nimport os\n", "#", '"""\nimport os\n"""')
def test_any_names_make_python(graph: str, x: str, y: str, extent: str) -> None:
    if x == y:
        y += "_"
    net = to_triton(made(graph, x, y, extent))
    told = {"inputs": {x: f"float [{extent}]"}, "outputs": {y: f"float [{extent}]"}}
    tree = ast.parse(python_source(net, f"{graph}, lowered.", told))
    document, *imports, folder, model, load = tree.body
    assert isinstance(document, ast.Expr)
    assert isinstance(folder, ast.Assign)
    assert isinstance(model, ast.ClassDef)
    assert isinstance(load, ast.FunctionDef)
    assert all(isinstance(each, ast.Import | ast.ImportFrom) for each in imports)
    assert "import os" not in map(ast.unparse, imports)
    told_of = ast.get_docstring(model, clean=False) or ""
    if all(map(str.isprintable, (graph, x, extent))):
        assert told_of.startswith(f"{graph}, lowered.")
        assert f"    {x}: float [{extent}]\n" in told_of


def test_a_model_without_weights_runs(tmp_path: Path) -> None:
    emit(made("double", "x", "y", "n"), tmp_path / "out", architectures=[architecture("sm_90")])
    program = "import torch, model; print(model.load(device='cpu')(torch.ones(2)).tolist())"
    assert run_interpreted(program, tmp_path / "out") == "[2.0, 2.0]\n"


def test_what_a_plugin_file_defines_cannot_be_imported() -> None:
    def doubled(x: Any) -> Any:
        return x + x

    doubled.__module__ = "lwc_plugin_mine_0a1b"
    net = to_triton(made("g", "x", "y", "n"))
    for node in net.graph.nodes:
        if node.op == "call_function":
            node.target, node.args, node.kwargs = doubled, node.args[:1], {}
    net.recompile()
    with pytest.raises(LwcError, match="cannot import doubled, which a file given as a plugin"):
        python_source(net, "g", {"inputs": {"x": "float [n]"}, "outputs": {"y": "float [n]"}})
