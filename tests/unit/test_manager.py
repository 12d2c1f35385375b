"""The pass manager: order, checks, truthfulness, rollback, records, instruments."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

import lwc
from lwc.analysis.manager import Analysis, AnalysisManager
from lwc.analysis.shapes import Shapes
from lwc.core.errors import PassError, UsageError, VerificationError
from lwc.core.module import Module
from lwc.frontend.load import load
from lwc.frontend.onnx_reader import from_proto
from lwc.pipeline.bisect import bisect
from lwc.pipeline.config import PipelineConfig, read_config
from lwc.pipeline.instruments import (
    History,
    Instrument,
    IrPrinter,
    StatisticsPrinter,
    TimingPrinter,
)
from lwc.pipeline.manager import PassManager
from lwc.pipeline.passes import (
    Approximate,
    Contract,
    Exact,
    Lossy,
    Pass,
    PassContext,
    PassResult,
    Verify,
)
from lwc.pipeline.record import Snapshot, take_snapshot
from lwc.pipeline.registry import Registry
from lwc.pipeline.reproducer import CrashReproducer
from lwc.verify.reduction.failure import Trial
from lwc.verify.structure.interface import Interface

MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[n, 4] x) => (float[n, 4] y)
<float[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}>
{
  a = Relu(x)
  b = Relu(a)
  c = MatMul(b, w)
  y = Relu(c)
}
"""

BRANCHES = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[2] x, bool k) => (float[2] y)
{
  one = Constant<value = float[2] {1, 2}>()
  y = If(k) <
    then_branch = t () => (float[2] u) { u = Add(x, one) },
    else_branch = e () => (float[2] v) { v = Neg(x) }
  >
}
"""


@pytest.fixture
def module() -> Module:
    return from_proto(onnx.parser.parse_model(MODEL))


@dataclass(frozen=True)
class DropRelu(Pass):
    """Drop a Relu that another one feeds."""

    name: ClassVar[str] = "drop-relu"
    contract: ClassVar[Contract] = Exact(("inputs are finite",))

    times: int = 1

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        dropped = 0
        for node in list(module.graph):
            source = node.inputs[0]
            producer = source.producer() if source is not None else None
            if dropped == self.times or node.op_type != "Relu" or producer is None:
                continue
            assert source is not None
            if producer.op_type == "Relu":
                ctx.applied("two in a row", node, rule="twins")
                ir.convenience.replace_all_uses_with(node.outputs[0], source)
                module.graph.remove(node, safe=True)
                dropped += 1
            else:
                ctx.missed("it follows no Relu", node)
        return PassResult(dropped > 0, statistics={"dropped": dropped})


@dataclass(frozen=True)
class Act(Pass):
    """Do what a test says; the key names the function, as the fields must be options."""

    name: ClassVar[str] = "act"
    actions: ClassVar[dict[str, Callable[[Module, PassContext], PassResult]]] = {}

    key: str = ""

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        return self.actions[self.key](module, ctx)


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply the weight."""

    name: ClassVar[str] = "scale"

    by: float = 1.0

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        if self.by == 1.0:
            return PassResult(False)
        scale_weight(module, self.by)
        return PassResult(True)


@dataclass(frozen=True)
class LossyScale(Scale):
    """Multiply the weight, as a lossy pass."""

    name: ClassVar[str] = "lossy-scale"
    contract: ClassVar[Contract] = Lossy()


@dataclass(frozen=True)
class RoughScale(Scale):
    """Multiply the weight, as an approximate pass."""

    name: ClassVar[str] = "rough-scale"
    contract: ClassVar[Contract] = Approximate(rtol=0.25, atol=0.0)


def scale_weight(module: Module, by: float) -> None:
    weight = module.graph.initializers["w"]
    assert weight.const_value is not None
    module.replace_initializer(weight, ir.tensor(weight.const_value.numpy() * np.float32(by)))


def acting(action: Callable[[Module, PassContext], PassResult]) -> Act:
    key = str(len(Act.actions))
    Act.actions[key] = action
    return Act(key)


def weight_of(module: Module) -> float:
    weight = module.graph.initializers["w"].const_value
    assert weight is not None
    return float(weight.numpy()[0, 0])


def weight_check(before: Module, after: Module, contract: Contract) -> str:
    """Stand in for running the models: their only difference is the weight's scale."""
    bound = contract.rtol if isinstance(contract, Approximate) else 1e-6
    error = abs(weight_of(after) / weight_of(before) - 1)
    if error > bound and not isinstance(contract, Lossy):
        raise VerificationError(f"off by {error:.2f}")
    return f"off by {error:.2f}"


def test_a_record_says_what_happened(module: Module) -> None:
    record = PassManager([DropRelu(), DropRelu(times=2)]).run(module)
    assert [node.op_type for node in module.graph] == ["Relu", "MatMul", "Relu"]
    assert record.pipeline == "drop-relu,drop-relu{times=2}"
    assert record.input == Snapshot(4, {"Relu": 3, "MatMul": 1}, 16, 64)
    assert record.output == Snapshot(3, {"Relu": 2, "MatMul": 1}, 16, 64)
    first, second = record.passes
    assert (first.before, first.after) == (record.input, record.output)
    assert (second.before, second.after) == (record.output, record.output)
    assert (first.changed, second.changed) == (True, False)
    assert first.statistics == {"dropped": 1}
    assert first.rewrites == {"twins": 1}
    assert (first.applied, second.applied) == (1, 0)
    assert [remark.message for remark in second.missed] == ["it follows no Relu"]
    assert first.contract == "exact"
    assert first.assumptions == ("inputs are finite",)
    assert 0 < first.seconds < record.seconds
    assert first.verify_seconds > 0
    plain = json.loads(json.dumps(record.to_dict()))
    assert plain["passes"][0]["after"]["ops"] == {"Relu": 2, "MatMul": 1}
    assert plain["passes"][1]["remarks"][0]["kind"] == "missed"


def test_subgraphs_count_and_constants_are_parameters() -> None:
    module = from_proto(onnx.parser.parse_model(BRANCHES))
    assert take_snapshot(module) == Snapshot(3, {"Add": 1, "If": 1, "Neg": 1}, 2, 8)


def test_a_shared_tensor_counts_once(module: Module) -> None:
    tensor = module.graph.initializers["w"].const_value
    assert tensor is not None
    twin = ir.Value(name="w2", type=ir.TensorType(tensor.dtype), shape=ir.Shape([4, 4]))
    twin.const_value = tensor
    module.graph.register_initializer(twin)
    assert take_snapshot(module).parameters == 16


def test_a_pass_that_did_nothing_says_so(module: Module) -> None:
    record = PassManager([Scale()]).run(module)
    (remark,) = record.passes[0].remarks
    assert str(remark) == "note: scale: found nothing to do"


def test_front_end_remarks_are_not_the_first_pass_s(module: Module) -> None:
    PassContext(AnalysisManager(module), source="onnx").warn("a custom domain")
    record = PassManager([Scale()]).run(module)
    assert [remark.source for remark in record.remarks] == ["onnx"]
    assert [remark.source for remark in record.passes[0].remarks] == ["scale"]


def test_a_hidden_change_is_found(module: Module) -> None:
    def lie(module: Module, ctx: PassContext) -> PassResult:
        scale_weight(module, 2.0)
        return PassResult(False)

    with pytest.raises(VerificationError, match="pass 'act': it reports no change, but"):
        PassManager([acting(lie)]).run(module)
    assert weight_of(module) == 1.0


def test_a_claimed_change_is_found(module: Module) -> None:
    with pytest.raises(VerificationError, match="pass 'act': it reports a change, but"):
        PassManager([acting(lambda module, ctx: PassResult(True))]).run(module)


def break_graph(module: Module, ctx: PassContext) -> PassResult:
    module.graph.outputs[0].name = "a"
    return PassResult(True)


def test_a_malformed_module_is_found_and_rolled_back(module: Module) -> None:
    text = str(module)
    with pytest.raises(VerificationError, match="pass 'act': ") as caught:
        PassManager([DropRelu(times=0), acting(break_graph)]).run(module)
    assert caught.value.exit_code == 1
    assert str(module) == text


def test_without_verification_the_passes_are_trusted(module: Module) -> None:
    record = PassManager([acting(break_graph)], verify="none").run(module)
    assert record.passes[0].changed


def test_a_malformed_input_is_refused(module: Module) -> None:
    break_graph(module, PassContext(AnalysisManager(module)))
    with pytest.raises(VerificationError):
        PassManager([]).run(module)


def rename_output(module: Module, ctx: PassContext) -> PassResult:
    module.graph.outputs[0].name = "z"
    return PassResult(True)


def test_the_interface_must_stay(module: Module) -> None:
    with pytest.raises(VerificationError, match=r"the order .* outputs changed: \['y'\] to"):
        PassManager([acting(rename_output)]).run(module)


def test_a_pass_may_declare_another_interface(module: Module) -> None:
    @dataclass(frozen=True)
    class Rename(Act):
        @property
        def keeps_interface(self) -> bool:
            return False

    key = acting(rename_output).key
    PassManager([Rename(key)]).run(module)
    assert module.graph.outputs[0].name == "z"


def declare(dims: list[int | str | None], *, output: bool = True) -> Act:
    """Return a pass that declares another shape of the output, or of the input."""

    def run(module: Module, ctx: PassContext) -> PassResult:
        (value,) = module.graph.outputs if output else module.graph.inputs
        value.shape = ir.Shape(dims)
        return PassResult(True)

    return acting(run)


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize(
    ("dims", "words"),
    [
        (["n", 5], r"declared shape of graph (in|out)put '[xy]' changed: \[n, 4\] to \[n, 5\]"),
        (["n", 4, 1], r"declared shape of graph (in|out)put '[xy]' changed: \[n, 4\] to"),
        ([3, 4], None),
        ([None, 4], None),
        (["m", 4], None),
    ],
)
def test_declared_shapes_may_only_become_more_or_less_definite(
    module: Module, dims: list[int | str | None], words: str | None, output: bool
) -> None:
    manager = PassManager([declare(dims, output=output)])
    if words is None:
        manager.run(module)
        return
    before = module.fingerprint()
    with pytest.raises(VerificationError, match=words):
        manager.run(module)
    assert module.fingerprint() == before


def test_a_changed_element_type_of_an_input_is_found(module: Module) -> None:
    def run(module: Module, ctx: PassContext) -> PassResult:
        module.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
        return PassResult(True)

    with pytest.raises(VerificationError, match=r"type of graph input 'x' changed: .*FLOAT"):
        PassManager([acting(run)]).run(module)


def misstate(module: Module, ctx: PassContext) -> PassResult:
    (value,) = (v for node in module.graph for v in node.outputs if v.name == "b")
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 5])
    return PassResult(True)


def test_a_stated_shape_that_contradicts_inference_is_found(module: Module) -> None:
    before = module.fingerprint()
    with pytest.raises(VerificationError, match=r"pass 'act': 'b' is stated with shape \[n,5\]"):
        PassManager([acting(misstate)]).run(module)
    assert module.fingerprint() == before
    PassManager([acting(misstate)], verify="none").run(module)


def test_a_stated_shape_that_the_file_got_wrong_is_not_the_pass_s_fault(module: Module) -> None:
    misstate(module, PassContext(AnalysisManager(module)))
    record = PassManager([DropRelu(), LossyScale(by=2.0)]).run(module)
    assert [each.changed for each in record.passes] == [True, True]


def test_the_shapes_of_the_check_are_there_for_the_next_pass(
    module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    build = Shapes.build.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Shapes], module: Module, analyses: AnalysisManager | None = None) -> Any:
        built.append(1)
        return build(cls, module, analyses)

    monkeypatch.setattr(Shapes, "build", classmethod(counted))

    def look(module: Module, ctx: PassContext) -> PassResult:
        ctx.analyses.get(Shapes)
        return PassResult(False)

    passes = [acting(look), DropRelu(), acting(look), acting(look)]
    PassManager(passes).run(module)
    assert len(built) == 2
    built.clear()
    PassManager([], verify="structural").run(module)
    PassManager([Scale(by=2.0)], verify="none").run(module)
    assert built == []


def test_notes_beside_the_graph_count_as_changes(module: Module) -> None:
    def note(module: Module, ctx: PassContext) -> PassResult:
        module.graph.metadata_props["seen"] = "yes"
        return PassResult(ctx.seed == 1)

    with pytest.raises(VerificationError, match="it reports no change, but the module differs"):
        PassManager([acting(note)]).run(module)
    PassManager([acting(note)]).run(module, PassContext(AnalysisManager(module), seed=1))


@pytest.mark.parametrize("rollback", [True, False])
def test_any_exception_becomes_a_pass_error(module: Module, rollback: bool) -> None:
    def crash(module: Module, ctx: PassContext) -> PassResult:
        scale_weight(module, 2.0)
        raise KeyError("no such\nthing")

    manager = PassManager([acting(crash)], rollback=rollback)
    with pytest.raises(PassError, match="pass 'act': KeyError: 'no such") as caught:
        manager.run(module)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    assert weight_of(module) == (1.0 if rollback else 2.0)


def test_a_pass_that_returns_no_result_is_named(module: Module) -> None:
    def forget(module: Module, ctx: PassContext) -> PassResult:
        return None  # type: ignore[return-value]

    with pytest.raises(PassError, match="pass 'act': run returned NoneType, not a PassResult"):
        PassManager([acting(forget)]).run(module)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_what_is_not_the_pass_s_fault_is_not_renamed(
    module: Module, error: type[BaseException]
) -> None:
    def fail(module: Module, ctx: PassContext) -> PassResult:
        scale_weight(module, 2.0)
        raise error

    with pytest.raises(error):
        PassManager([acting(fail)]).run(module)
    assert weight_of(module) == 1.0


class NodeCount(Analysis):
    """How many nodes there are."""

    def __init__(self, count: int) -> None:
        self.count = count

    @classmethod
    def build(cls, module: Module, analyses: AnalysisManager) -> NodeCount:
        return cls(sum(1 for _ in module.nodes()))


def test_analyses_are_dropped_unless_preserved(module: Module) -> None:
    seen: list[int] = []

    def look(module: Module, ctx: PassContext) -> PassResult:
        seen.append(ctx.analyses.get(NodeCount).count)
        return PassResult(False)

    def drop(*, preserved: frozenset[type[Analysis]]) -> Act:
        def run(module: Module, ctx: PassContext) -> PassResult:
            result = DropRelu().run(module, ctx)
            return PassResult(result.changed, preserved=preserved)

        return acting(run)

    PassManager([acting(look), drop(preserved=frozenset()), acting(look)]).run(module)
    assert seen == [4, 3]
    seen.clear()
    fresh = from_proto(onnx.parser.parse_model(MODEL))
    keep = drop(preserved=frozenset([NodeCount]))
    PassManager([acting(look), keep, acting(look)], verify="none").run(fresh)
    assert seen == [4, 4]


def test_numeric_verification_runs_after_changes_only(module: Module) -> None:
    calls: list[tuple[float, float]] = []

    def check(before: Module, after: Module, contract: Contract) -> str:
        calls.append((weight_of(before), weight_of(after)))
        return weight_check(before, after, contract)

    manager = PassManager([Scale(), LossyScale(by=2.0), Scale()], verify="numeric", numeric=check)
    record = manager.run(module)
    assert calls == [(1.0, 2.0)]
    assert [each.verification for each in record.passes] == [None, "off by 1.00", None]
    with pytest.raises(VerificationError, match=r"pass 'scale': off by 2\.00"):
        PassManager([Scale(by=3.0)], verify="numeric", numeric=check).run(module)
    assert weight_of(module) == 2.0


def test_numeric_verification_needs_a_check() -> None:
    with pytest.raises(UsageError, match="needs a numeric check"):
        PassManager([], verify="numeric")


@pytest.mark.parametrize("verify", ["structural", "numeric"])
def test_a_pass_that_writes_into_a_weight_is_named(verify: Verify) -> None:
    """The module before the pass shares the weight, so that a comparison sees no difference."""

    def triple(module: Module, ctx: PassContext) -> PassResult:
        tensor = module.graph.initializers["w"].const_value
        assert tensor is not None
        tensor.numpy()[...] *= 3
        module.graph.node(0).name = "renamed"
        return PassResult(True)

    fresh = from_proto(onnx.parser.parse_model(MODEL))
    fresh.graph.initializers["w"].const_value = ir.Tensor(np.eye(4, dtype=np.float32), name="w")
    with pytest.raises(VerificationError, match="pass 'act': it writes into weight 'w'"):
        lwc.optimize(fresh, [DropRelu(), acting(triple)], verify=verify)


def test_bisection_and_reduction_name_what_writes_into_a_weight() -> None:
    def triple(module: Module, ctx: PassContext) -> PassResult:
        tensor = module.graph.initializers["w"].const_value
        assert tensor is not None
        tensor.numpy()[...] *= 3
        return PassResult(False)

    def fresh() -> Module:
        made = from_proto(onnx.parser.parse_model(MODEL))
        made.graph.initializers["w"].const_value = ir.Tensor(np.eye(4, dtype=np.float32), name="w")
        return made

    passes, history = [DropRelu(), acting(triple)], History()
    with pytest.raises(VerificationError):
        PassManager(passes, instruments=[history], rollback=False).run(fresh())
    found = bisect(history, weight_check)
    assert found is not None
    assert (found.index, found.broken) == (1, True)
    assert "writes into weight 'w'" in found.message
    failure = Trial().run(fresh(), passes)
    assert failure is not None
    assert (failure.kind, failure.pass_name) == ("contract", "act")


def test_a_weight_in_a_constant_is_not_written_into_either() -> None:
    def shift(module: Module, ctx: PassContext) -> PassResult:
        node = next(node for node in module.graph if node.op_type == "Constant")
        node.attributes["value"].as_tensor().numpy()[...] += 1
        return PassResult(False)

    fresh = from_proto(onnx.parser.parse_model(BRANCHES))
    node = next(node for node in fresh.graph if node.op_type == "Constant")
    tensor = ir.Tensor(np.ones(2, np.float32), name="one")
    node.attributes["value"] = ir.AttrTensor("value", tensor)
    with pytest.raises(VerificationError, match="it writes into weight 'one'"):
        PassManager([acting(shift)]).run(fresh)


def two_inputs(*names: str | int | None) -> Module:
    graph = "g (float[a, 4] x, float[a, 4] z) => (float[a, 4] y) { y = Add(x, z) }"
    made = Module(ir.from_onnx_text(f'<ir_version: 9, opset_import: ["" : 17]>\n{graph}'))
    for value, name in zip(made.graph.inputs, names, strict=True):
        value.shape = ir.Shape([name, 4])
    return made


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        (("a", "a"), ("b", "b"), None),
        (("a", "a"), (3, 3), None),
        (("a", "a"), (None, "a"), None),
        (("a", "a"), ("b", "a"), "dimension 'a' of the graph's inputs became 'b' and 'a'"),
        (("a", "b"), ("b", "b"), "dimensions 'a' and 'b' of the graph's inputs became one, 'b'"),
        (("a", "b"), ("b", "a"), None),
    ],
)
def test_names_of_input_dimensions_keep_what_they_say(
    before: tuple[str, ...], after: tuple[str | int | None, ...], complaint: str | None
) -> None:
    """Two inputs of one extent, or of two: renaming some of the places says something else."""
    found = Interface.of(two_inputs(*before)).change_to(Interface.of(two_inputs(*after)))
    assert found == complaint


def test_instruments_see_everything_in_order(module: Module) -> None:
    class Log(Instrument):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def before_pipeline(self, module: Module, passes: Sequence[Pass]) -> None:
            self.lines.append(f"start {len(passes)}")

        def before_pass(self, pass_: Pass, module: Module, index: int) -> None:
            self.lines.append(f"before {index} {pass_.name}")

        def after_pass(self, pass_: Pass, module: Module, record: Any) -> None:
            self.lines.append(f"after {pass_.name} {record.changed}")

        def on_error(
            self, pass_: Pass, before: Module | None, rest: Sequence[Pass], error: BaseException
        ) -> None:
            self.lines.append(f"error {pass_.name} {len(rest)} {type(error).__name__}")

        def after_pipeline(self, record: Any) -> None:
            self.lines.append("end")

    log = Log()
    PassManager([DropRelu(), Scale()], instruments=[log]).run(module)
    assert log.lines == [
        "start 2",
        "before 0 drop-relu",
        "after drop-relu True",
        "before 1 scale",
        "after scale False",
        "end",
    ]
    log.lines.clear()
    with pytest.raises(VerificationError):
        PassManager([Scale(), acting(break_graph), Scale()], instruments=[log]).run(module)
    assert log.lines[-2:] == ["before 1 act", "error act 2 VerificationError"]


@pytest.mark.parametrize(
    ("options", "titles"),
    [
        ({"before": ["scale"]}, ["before scale"]),
        ({"after": ["drop-relu"]}, ["after drop-relu"]),
        ({"after_all": True}, ["after drop-relu", "after scale"]),
        ({"after_change": True}, ["after drop-relu, which changed it"]),
    ],
)
def test_ir_is_printed_where_asked(
    module: Module, options: dict[str, Any], titles: list[str]
) -> None:
    stream = io.StringIO()
    PassManager([DropRelu(), Scale()], instruments=[IrPrinter(stream, **options)]).run(module)
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("// ")] == [f"// module {t}" for t in titles]
    assert stream.getvalue().count(str(module).rstrip()) == len(titles)


def test_timing_and_statistics(module: Module) -> None:
    timing, statistics = io.StringIO(), io.StringIO()
    instruments = [TimingPrinter(timing), StatisticsPrinter(statistics)]
    record = PassManager([DropRelu(), Scale()], instruments=instruments).run(module)
    rows = [line.split() for line in timing.getvalue().splitlines()]
    assert [row[0] for row in rows] == ["pass", "(before)", "drop-relu", "scale", "total"]
    assert float(rows[-1][1]) == pytest.approx(record.seconds, abs=1e-3)
    assert [line.split() for line in statistics.getvalue().splitlines()] == [
        ["drop-relu"],
        ["1", "rewrites", "twins"],
        ["1", "dropped"],
        ["scale"],
        ["no", "statistics"],
    ]


def test_history_keeps_every_state(module: Module) -> None:
    history = History()
    passes = [LossyScale(by=2.0), Scale(), LossyScale(by=2.0)]
    PassManager(passes, instruments=[history]).run(module)
    assert [weight_of(each) for each in history.modules] == [1.0, 2.0, 2.0, 4.0]
    assert history.modules[1] is history.modules[2]


@pytest.mark.parametrize(
    ("passes", "culprit"),
    [
        ([Scale(), Scale()], None),
        ([Scale(by=1.0000001), Scale(by=2.0), Scale(by=1.0000001), Scale(by=1.0000001)], 1),
        ([Scale(by=2.0)], 0),
        ([Scale(by=1.0000001)] * 6 + [Scale(by=2.0)], 6),
        ([LossyScale(by=2.0), Scale()], None),
        ([LossyScale(by=2.0), Scale(by=2.0)], 1),
        ([Scale(by=2.0), LossyScale(by=2.0)], 0),
        ([RoughScale(by=1.2), RoughScale(by=1.2)], None),
        ([RoughScale(by=1.2), RoughScale(by=1.5)], 1),
    ],
)
def test_bisection_finds_the_first_bad_pass(
    module: Module, passes: list[Pass], culprit: int | None
) -> None:
    history = History()
    PassManager(passes, instruments=[history]).run(module)
    found = bisect(history, weight_check)
    assert (None if found is None else found.index) == culprit


def test_bisection_checks_few_modules(module: Module) -> None:
    history = History()
    PassManager([Scale(by=1.0 + 1e-7 * k) for k in range(1, 33)], instruments=[history]).run(module)
    calls = []

    def check(before: Module, after: Module, contract: Contract) -> str:
        calls.append(after)
        if after in history.modules[20:]:
            raise VerificationError("bad")
        return ""

    found = bisect(history, check)
    assert found is not None
    assert found.index == 19
    assert found.spec.startswith("scale{by=")
    assert len(calls) <= 6


def test_the_crash_reproducer_replays(module: Module, tmp_path: Path) -> None:
    stream = io.StringIO()
    settings = PipelineConfig(seed=5, bind={"n": 2})
    reproducer = CrashReproducer(str(tmp_path / "crash.onnx"), settings, stream)
    bad = Scale(by=3.0)
    manager = PassManager(
        [DropRelu(), bad, DropRelu()],
        verify="numeric",
        numeric=lambda before, after, contract: (
            ""
            if isinstance(contract, Exact) and contract.assumptions
            else weight_check(before, after, contract)
        ),
        instruments=[reproducer],
        rollback=False,
    )
    with pytest.raises(VerificationError):
        manager.run(module)
    model, script = tmp_path / "crash.onnx", tmp_path / "crash.yaml"
    assert stream.getvalue() == f"reproduce with: lwc-opt {model} --config {script}\n"
    registry = Registry()
    registry.add(DropRelu)
    registry.add(Scale)
    config = read_config(str(script), registry)
    assert config == PipelineConfig(passes=(bad, DropRelu()), seed=5)
    replayed = load(model)
    assert [node.op_type for node in replayed.graph] == ["Relu", "MatMul", "Relu"]
    assert weight_of(replayed) == 1.0
    replay = PassManager(config.passes, verify="numeric", numeric=weight_check)
    with pytest.raises(VerificationError, match=r"pass 'scale': off by 2\.00"):
        replay.run(replayed)


def test_the_crash_reproducer_leaves_other_failures_alone(module: Module, tmp_path: Path) -> None:
    def interrupt(module: Module, ctx: PassContext) -> PassResult:
        raise KeyboardInterrupt

    reproducer = CrashReproducer(str(tmp_path / "c.onnx"), PipelineConfig(), io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        PassManager([acting(interrupt)], instruments=[reproducer]).run(module)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match=r"is an \.onnx file"):
        CrashReproducer("crash.mlir", PipelineConfig(), io.StringIO())


def test_a_reproducer_that_cannot_be_written_does_not_hide_the_failure(module: Module) -> None:
    stream = io.StringIO()
    reproducer = CrashReproducer("/nonexistent/c.onnx", PipelineConfig(), stream)
    with pytest.raises(VerificationError):
        PassManager([acting(break_graph)], instruments=[reproducer]).run(module)
    assert "cannot be written" in stream.getvalue()


@dataclass(frozen=True)
class Presuming(Pass):
    """Needs what it cannot prove."""

    name: ClassVar[str] = "presuming"
    contract: ClassVar[Exact] = Exact(assumptions=("the mask is right-padded",))

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        ctx.assume("the mask is right-padded")
        return PassResult(False)


@pytest.mark.parametrize(
    ("granted", "refused"),
    [((), True), (("positions",), True), (("the mask",), False), (("all",), False)],
)
def test_a_pass_refuses_what_nobody_granted(granted: tuple[str, ...], refused: bool) -> None:
    module = lwc.Module(ir.from_onnx_text(GRANT_MODEL))
    if refused:
        with pytest.raises(PassError, match="assume: the mask is right-padded"):
            lwc.optimize(module, [Presuming()], grant=granted)
        return
    (record,) = lwc.optimize(module, [Presuming()], grant=granted).record.passes
    assert record.assumptions == ("the mask is right-padded",)
    assert [r.message for r in record.remarks] == ["assumes, as granted: the mask is right-padded"]


GRANT_MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
graph (float[n] x) => (float[n] y) { y = Relu (x) }
"""


@pytest.mark.parametrize(("granted", "held"), [((), ()), (("The mask",), ("The mask is 0 or 1.",))])
def test_the_numeric_check_takes_for_granted_what_the_user_granted(
    module: Module, granted: tuple[str, ...], held: tuple[str, ...]
) -> None:
    """What a pass would assume, but may not, excuses nothing: it is compared on every mask."""

    @dataclass(frozen=True)
    class Assumes(Pass):
        """Rename a node."""

        name = "assumes"
        contract = Exact(assumptions=("The mask is 0 or 1.",))

        def run(self, module: Module, ctx: PassContext) -> PassResult:
            next(iter(module.graph)).name = module.fresh_name("another")
            return PassResult(True)

    seen: list[tuple[str, ...]] = []

    def check(before: Module, after: Module, contract: Contract) -> str:
        seen.append(contract.assumptions)
        return "compared"

    ctx = PassContext(AnalysisManager(module), granted=frozenset(granted))
    PassManager([Assumes()], verify="numeric", numeric=check).run(module, ctx)
    assert seen == [held]
