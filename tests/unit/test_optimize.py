"""`lwc.optimize`: every kind of model in, every spelling of a pipeline, what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support import ops

import lwc
from lwc.core.errors import (
    InputError,
    PassError,
    RequirementError,
    UsageError,
    VerificationError,
)
from lwc.core.module import Module
from lwc.optimizer import check_required
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.pipeline.passes import Pass, PassContext, PassResult

MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[n, 2] x) => (float[n, 2] y)
<float[2, 2] w = {1, 2, 3, 4}>
{
  a = Identity(x)
  b = Identity(a)
  y = MatMul(b, w)
}
"""


@pytest.fixture
def proto() -> onnx.ModelProto:
    return onnx.parser.parse_model(MODEL)


@pytest.fixture
def path(proto: onnx.ModelProto, tmp_path: Path) -> Path:
    file = tmp_path / "in.onnx"
    onnx.save(proto, file)
    return file


@dataclass(frozen=True)
class Spoil(Pass):
    """Double a weight and call that exact."""

    name: ClassVar[str] = "spoil"

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        weight = module.graph.initializers["w"]
        assert weight.const_value is not None
        module.replace_initializer(weight, ir.tensor(weight.const_value.numpy() * 2))
        return PassResult(True)


@dataclass(frozen=True)
class Watch(Pass):
    """Run the model and report the largest element of an inner value."""

    name: ClassVar[str] = "watch"

    value: str = "b"

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        feed = {"x": np.array([[1.0, 5.0]], dtype=np.float32)}
        with ctx.runner(module, [self.value]) as runner:
            found = runner.run(feed, [self.value])[self.value]
        ctx.note(f"{self.value} reaches {found.max():g}; seed {ctx.seed}; {ctx.max_memory}")
        return PassResult(False)


def from_path(path: Path) -> Any:
    return path


def from_text(path: Path) -> Any:
    return str(path)


def from_module(path: Path) -> Any:
    return lwc.load(path)


def from_ir(path: Path) -> Any:
    return ir.load(path)


def from_onnx(path: Path) -> Any:
    return onnx.load(path)


@pytest.mark.parametrize("read", [from_path, from_text, from_module, from_ir, from_onnx])
def test_every_kind_of_graph(read: Callable[[Path], Any], path: Path) -> None:
    result = lwc.optimize(read(path), "canonicalize")
    assert ops(result.module) == ["MatMul"]
    assert [each.name for each in result.record.passes] == ["canonicalize"]


@pytest.mark.parametrize(
    "passes",
    [
        "canonicalize,infer-shapes",
        ["canonicalize", "infer-shapes"],
        [Canonicalize(), "infer-shapes"],
        ["canonicalize,infer-shapes"],
    ],
)
def test_every_spelling_of_a_pipeline(passes: Any, path: Path) -> None:
    assert lwc.optimize(path, passes).record.pipeline == "canonicalize,infer-shapes"


@pytest.mark.parametrize(
    "settings",
    [
        {"verify": "always"},
        {"verify": True},
        {"threads": 0},
        {"threads": "2"},
        {"seed": -1},
        {"bind": ["batch=2"]},
        {"bind": {"batch": "2"}},
        {"bind": {"batch": 2.5}},
        {"passes": None},
        {"passes": 5},
        {"require_match": "1"},
    ],
)
def test_wrong_settings_are_errors_of_usage(settings: dict[str, Any], path: Path) -> None:
    with pytest.raises(UsageError):
        lwc.optimize(path, **{"passes": "canonicalize", **settings})


def test_numpy_integers_bind(path: Path) -> None:
    extent: Any = np.int64(2)
    result = lwc.optimize(path, bind={"n": extent})
    assert list(result.module.graph.inputs[0].shape or ()) == [2, 2]


def test_no_passes_at_all(path: Path) -> None:
    result = lwc.optimize(path)
    assert ops(result.module) == ["Identity", "Identity", "MatMul"]
    assert result.record.passes == ()


def test_the_input_object_stays_as_it_is(path: Path) -> None:
    module, model, proto = lwc.load(path), ir.load(path), onnx.load(path)
    before = module.fingerprint()
    text = proto.SerializeToString()
    for graph in (module, model, proto):
        lwc.optimize(graph, [Canonicalize(), Spoil()])
    assert module.fingerprint() == before
    assert ops(module) == [node.op_type for node in model.graph] == ["Identity"] * 2 + ["MatMul"]
    assert proto.SerializeToString() == text


def test_results_and_paths_are_models_too(path: Path) -> None:
    result = lwc.optimize(path, "canonicalize")
    again = lwc.optimize(result, "canonicalize")
    assert ops(again.module) == ops(result.module) == ["MatMul"]
    assert again.module is not result.module


def test_remarks_of_the_front_end_are_kept(path: Path) -> None:
    module = lwc.load(path)
    module.remarks.emit(lwc.Remark("warning", "onnx", "something odd"))
    result = lwc.optimize(module, "canonicalize")
    assert [remark.message for remark in result.record.remarks] == ["something odd"]
    assert len(list(module.remarks)) == 1


@pytest.mark.parametrize("graph", [3, None, object(), [1]])
def test_no_model_is_an_input_error(graph: object) -> None:
    with pytest.raises(InputError, match="is no model"):
        lwc.optimize(graph, "canonicalize")
    with pytest.raises(InputError, match="is no path"):
        lwc.load(graph)  # type: ignore[arg-type]


def test_an_unknown_pass_is_found_before_the_model_is_read() -> None:
    with pytest.raises(UsageError, match="unknown pass 'canonicalise'"):
        lwc.optimize("no-such-file.onnx", "canonicalise")


def test_numeric_verification_runs_the_models(path: Path) -> None:
    result = lwc.optimize(path, "canonicalize", verify="numeric")
    verification = result.record.passes[0].verification
    assert verification is not None
    assert verification.startswith("outputs within 0 on ")
    with pytest.raises(VerificationError, match="pass 'spoil': "):
        lwc.optimize(path, ["canonicalize", Spoil()], verify="numeric")


def test_a_pass_can_run_the_model(path: Path) -> None:
    result = lwc.optimize(path, [Watch()], seed=7, max_memory=1000, threads=1)
    assert [r.message for r in result.record.passes[0].remarks] == ["b reaches 5; seed 7; 1000"]
    with pytest.raises(PassError, match="must run the model, but the pipeline has no backend"):
        lwc.optimize(path, [Watch()], backend=None)
    with pytest.raises(UsageError, match=r"did you mean 'onnxruntime'\?"):
        lwc.optimize(path, [Watch()], backend="onxruntime")


def test_a_backend_object_is_used(path: Path) -> None:
    class Constant:
        def run(self, feed: Any, outputs: Sequence[str] | None = None) -> dict[str, Any]:
            return {"b": np.array([42.0])}

    class Backend:
        def compile(
            self, module: Module, *, threads: int | None = None, expose: Sequence[str] = ()
        ) -> AbstractContextManager[Any]:
            assert (threads, tuple(expose)) == (3, ("b",))
            return nullcontext(Constant())

    result = lwc.optimize(path, [Watch()], backend=Backend(), threads=3)  # type: ignore[arg-type]
    assert result.record.passes[0].remarks[0].message.startswith("b reaches 42")


def test_dimensions_are_bound_first(path: Path) -> None:
    result = lwc.optimize(path, "canonicalize", bind={"n": 3})
    assert result.record.pipeline == "bind-dims{n=3},canonicalize"
    assert list(result.module.graph.inputs[0].shape or ()) == [3, 2]


def test_required_matches(path: Path) -> None:
    lwc.optimize(path, "canonicalize", require_match={"canonicalize": 2})
    with pytest.raises(RequirementError, match="99 are required") as caught:
        lwc.optimize(path, "canonicalize", require_match=99)
    assert caught.value.exit_code == 3
    with pytest.raises(UsageError, match=r"not in the pipeline \(did you mean 'canonicalize'\?\)"):
        lwc.optimize(path, "canonicalize", require_match={"canonicalise": 1})


def test_matches_of_one_pass_add_up(path: Path) -> None:
    record = lwc.optimize(path, "canonicalize,canonicalize").record
    first, second = record.passes
    assert first.applied > 0
    assert second.applied == 0
    check_required(record, {"canonicalize": first.applied})
    with pytest.raises(RequirementError):
        check_required(record, {"canonicalize": first.applied + 1})


def test_it_saves_and_the_result_computes_the_same(path: Path, tmp_path: Path) -> None:
    result = lwc.optimize(path, "canonicalize")
    saved = result.save(tmp_path / "out.onnx")
    assert saved.nbytes == (tmp_path / "out.onnx").stat().st_size
    x = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    outputs = [ort.InferenceSession(file).run(None, {"x": x})[0] for file in (path, saved.path)]
    np.testing.assert_array_equal(*outputs)


def test_it_saves_a_folder(path: Path, tmp_path: Path) -> None:
    lwc.optimize(path, "canonicalize").save(f"{tmp_path}/new/")
    assert ops(lwc.load(tmp_path / "new")) == ["MatMul"]
    lwc.optimize(path, []).save(tmp_path / "new")
    assert len(ops(lwc.load(tmp_path / "new"))) == 3


def test_the_report_has_the_figures_of_every_step(path: Path) -> None:
    result = lwc.optimize(path, "canonicalize,infer-shapes")
    report = result.report
    assert report is result.report
    assert [entry.name for entry in report.passes] == ["canonicalize", "infer-shapes"]
    first = report.passes[0]
    assert (first.before.nodes, first.after.nodes) == (3, 1)
    assert report.input.path == str(path)


def test_a_torch_module_is_traced() -> None:
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            return torch.relu(x) + 0 * x.sum()

    args = (torch.ones(2, 3),)
    program = torch.export.export(Net(), args)
    graph_module = torch.fx.symbolic_trace(Net())
    expected = {"Relu"}
    for graph, given in ((Net(), args), (graph_module, args), (program, ())):
        result = lwc.optimize(graph, "canonicalize", args=given, verify="numeric")
        assert expected <= set(ops(result.module))
