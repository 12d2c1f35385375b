"""Bisection: the first wrong pass, and the first wrong rewrite in it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import module_of

import lwc
from lwc.analysis.manager import AnalysisManager
from lwc.cli.opt import main
from lwc.core.errors import PassError, VerificationError
from lwc.core.module import Module
from lwc.pipeline.bisect import Culprit, bisect
from lwc.pipeline.instruments import History
from lwc.pipeline.manager import PassManager
from lwc.pipeline.passes import Lossy, Pass, PassContext, PassResult
from lwc.pipeline.registry import default_registry
from lwc.pipeline.rule_pass import RulePass
from lwc.rewrite import ANY, Editor, Outcome, Rule, rule
from lwc.wiring import numeric_check

COUNT = 300
"""Rewrites of the planted pass."""


def chains(count: int = COUNT) -> Module:
    """Make `count` negations of `x + i`, each with a name, summed up in groups."""
    lines = []
    for i in range(count):
        lines += [f"[a{i}] s{i} = Add(x, c{i})", f"[n{i}] t{i} = Neg(s{i})"]
    groups = [range(first, min(first + 30, count)) for first in range(0, count, 30)]
    for index, group in enumerate(groups):
        lines.append(f"u{index} = Concat <axis = 0> ({', '.join(f't{i}' for i in group)})")
    outputs = ", ".join(f"float[m{index}] u{index}" for index in range(len(groups)))
    weights = ", ".join(f"float[1] c{i} = {{{i}}}" for i in range(count))
    return module_of(f"g (float[1] x) => ({outputs}) <{weights}> {{\n" + "\n".join(lines) + "\n}")


def negate(node: ir.Node, edit: Editor, factor: float = -1.0) -> ir.Value:
    return edit.op("Mul", [node.inputs[0], edit.constant(np.array([factor], np.float32), "f")])


@rule("Neg")
def neg_to_mul(node: ir.Node, edit: Editor) -> Outcome:
    """-x = x * -1, except where the test planted a fault."""
    return negate(node, edit, -2.0 if node.name == "n217" else -1.0)


class Faulty(RulePass):
    """Wrong at one node."""

    rules = (neg_to_mul,)


class Idle(Pass):
    """Does nothing."""

    name: ClassVar[str] = "idle"

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """Do nothing."""
        return PassResult(False)


@rule("Mul")
def swap(node: ir.Node, edit: Editor) -> Outcome:
    """x * c = c * x."""
    if not edit.is_constant(node.inputs[1]):
        return None
    return edit.op("Mul", [node.inputs[1], node.inputs[0]])


class Swap(RulePass):
    """Right."""

    rules = (swap,)


@lwc.function_pass
def rename(module: Module) -> int:
    """Rename a node: right, and no rewrite that is counted."""
    node = next(iter(module.nodes()))
    node.outputs[0].name = module.fresh_name("renamed")
    return 1


def run_and_bisect(
    passes: list[Pass], module: Module, *, seen: list[Module] | None = None
) -> Culprit | None:
    """Run passes as the command line does, then look for the wrong one."""
    history = History()
    try:
        PassManager(passes, instruments=[history], rollback=False).run(module)
    except VerificationError:
        assert history.failure is not None
    compare = numeric_check(threads=1)

    def check(before: Module, after: Module, contract: Any) -> str:
        if seen is not None:
            seen.append(after)
        return compare(before, after, contract)

    return bisect(history, check)


def test_the_faulty_rewrite_among_300_in_the_fourth_of_six_passes() -> None:
    passes = [Idle(), rename(), Idle(), Faulty(), Swap(), Idle()]
    seen: list[Module] = []
    found = run_and_bisect(passes, chains(), seen=seen)
    assert found is not None
    assert (found.index, found.spec, found.broken) == (3, "faulty", False)
    assert found.rewrite is not None
    assert (found.rewrite.number, found.rewrite.total) == (218, COUNT)
    assert (found.rewrite.rule, found.rewrite.node) == ("neg-to-mul", "Neg 'n217'")
    assert "output 'u7'" in found.message
    # Passes, the whole pass and none of it, and the search.
    assert len(seen) <= math.ceil(math.log2(6)) + 1 + 2 + math.ceil(math.log2(COUNT))


def faulty_at(number: int, kind: str) -> RulePass:
    """Make a pass whose rewrite `number` is wrong in the given way."""

    def apply(node: ir.Node, edit: Editor) -> Outcome:
        if node.name != f"n{number - 1}":
            return negate(node, edit)
        if kind == "outputs":
            return negate(node, edit, 3.0)
        if kind == "dangling":
            return edit.op("Abs", [ir.Value(name="nowhere")])
        if kind == "type":
            return edit.op("Cast", [negate(node, edit)], {"to": int(ir.DataType.DOUBLE)})
        raise PassError("the node is gone")

    class Planted(RulePass):
        """Wrong at one of its rewrites."""

        rules = (Rule("plant", ("Neg",), apply),)

    return Planted()


@pytest.mark.parametrize("kind", ["outputs", "dangling", "type"])
@pytest.mark.parametrize(("number", "total"), [(1, 1), (1, 7), (4, 7), (7, 7), (16, 16)])
def test_every_kind_of_fault_is_found_at_every_place(kind: str, number: int, total: int) -> None:
    found = run_and_bisect([Idle(), faulty_at(number, kind), Idle()], chains(total))
    assert found is not None
    assert found.index == 1
    assert found.rewrite is not None
    assert (found.rewrite.number, found.rewrite.total) == (number, total)
    assert found.rewrite.node == f"Neg 'n{number - 1}'"
    assert found.broken == (kind != "outputs")


def test_a_pass_that_verification_refuses_is_searched() -> None:
    @rule("Neg")
    def loses_the_output(node: ir.Node, edit: Editor) -> Outcome:
        if node.name == "n5":
            edit.module.graph.outputs[0].name = "other"
        return negate(node, edit)

    class Renames(RulePass):
        """Changes the interface."""

        rules = (loses_the_output,)

    found = run_and_bisect([Idle(), Renames()], chains(12))
    assert found is not None
    assert (found.index, found.broken) == (1, True)
    assert "of the graph's outputs changed" in found.message
    assert not found.message.startswith("pass '")
    assert found.rewrite is not None
    assert (found.rewrite.number, found.rewrite.node) == (6, "Neg 'n5'")


def test_a_pass_that_counts_nothing_is_named_alone() -> None:
    @lwc.function_pass
    def double(module: Module) -> int:
        """Wrong."""
        value = module.graph.initializers["c0"]
        assert value.const_value is not None
        module.replace_initializer(value, ir.tensor(value.const_value.numpy() + np.float32(1)))
        return 1

    found = run_and_bisect([Idle(), double()], chains(3))
    assert found is not None
    assert (found.index, found.rewrite) == (1, None)
    assert "counts no rewrites" in (found.why_no_rewrite or "")


def test_a_fault_beside_the_rewrites_is_told_from_one_in_them() -> None:
    class Beside(Faulty):
        """Changes a weight after its rules."""

        rules = (Rule("right", ("Neg",), negate),)

        def run(self, module: Module, ctx: PassContext) -> PassResult:
            """Rewrite rightly, then spoil a weight."""
            super().run(module, ctx)
            value = module.graph.initializers["c0"]
            module.replace_initializer(value, ir.tensor(np.array([9], np.float32)))
            return PassResult(True)

    found = run_and_bisect([Beside()], chains(3))
    assert found is not None
    assert found.rewrite is None
    assert "before its first rewrite, or it does not stop" in (found.why_no_rewrite or "")


def test_a_pass_that_ignores_the_limit_is_told_so() -> None:
    class Endless(Pass):
        """Counts its rewrites, and goes on after the last that it may do."""

        name: ClassVar[str] = "endless"

        def run(self, module: Module, ctx: PassContext) -> PassResult:
            """Spoil every weight."""
            for value in list(module.graph.initializers.values()):
                ctx.limit.spend("spoil")
                module.replace_initializer(value, ir.tensor(np.array([9], np.float32)))
            return PassResult(True)

    found = run_and_bisect([Endless()], chains(3))
    assert found is not None
    assert found.rewrite is None
    assert (found.why_no_rewrite or "").startswith("it does not stop at the limit of rewrites")


def test_a_fault_that_does_not_come_again_is_called_what_it_is() -> None:
    runs: list[int] = []

    class Fickle(RulePass):
        """Wrong the first time only."""

        def find_rules(self) -> list[Rule]:
            """Make rules that differ from run to run."""
            runs.append(1)
            factor = 5.0 if len(runs) == 1 else -1.0
            return [Rule("fickle", ("Neg",), lambda node, edit: negate(node, edit, factor))]

    found = run_and_bisect([Fickle()], chains(3))
    assert found is not None
    assert found.rewrite is None
    assert "not deterministic" in (found.why_no_rewrite or "")


def test_the_search_starts_anew_behind_a_lossy_pass() -> None:
    class Rough(RulePass):
        """Changes outputs by design."""

        contract: ClassVar[Lossy] = Lossy()
        rules = (
            Rule("rough", ("Add",), lambda node, edit: edit.op("Sub", list(node.inputs))),
        )  # fmt: skip

    found = run_and_bisect([Rough(), faulty_at(2, "outputs")], chains(4))
    assert found is not None
    assert found.index == 1
    assert found.rewrite is not None
    assert found.rewrite.node == "Neg 'n1'"
    assert run_and_bisect([Rough(), Swap()], chains(4)) is None


def test_a_lossy_pass_after_which_nothing_runs_is_found() -> None:
    def out_of_range(node: ir.Node, edit: Editor) -> Outcome:
        index = 9 if node.name == "n2" else 0
        return edit.op("Gather", [node.inputs[0], edit.constant([index])], {"axis": 0})

    class Loses(RulePass):
        """Changes outputs by design, and one of them so that no runtime takes it."""

        contract: ClassVar[Lossy] = Lossy()
        rules = (Rule("gather", ("Neg",), out_of_range),)

    found = run_and_bisect([Idle(), Loses(), Idle()], chains(6))
    assert found is not None
    assert (found.index, found.broken) == (1, False)
    assert "does not run after it" in found.message
    assert found.rewrite is not None
    assert (found.rewrite.number, found.rewrite.node) == (3, "Neg 'n2'")


def test_a_rule_that_raises_is_named_with_its_node() -> None:
    history = History()
    passes = [faulty_at(3, "raise")]
    with pytest.raises(PassError, match="the node is gone"):
        PassManager(passes, instruments=[history]).run(chains(4))

    @rule(ANY)
    def divides(node: ir.Node, edit: Editor) -> Outcome:
        return None if node.op_type != "Neg" else [edit.constant(np.ones(1 // 0))]

    class Divides(RulePass):
        """Raises."""

        rules = (divides,)

    with pytest.raises(PassError) as caught:
        PassManager([Divides()]).run(chains(1))
    assert str(caught.value).startswith(
        "Neg 'n0': pass 'divides': rule 'divides' raised ZeroDivisionError"
    )


PLUGIN = '''
import numpy as np

import lwc


class Double(lwc.PatternRule):
    """x * c1 * c2 = x * (c1 * c2), wrong for one of them."""

    def pattern(self, op, x, a, b):
        return op.Mul(op.Mul(x, a), b)

    def check(self, edit, x, a, b):
        if edit.tensor(a) is None or edit.tensor(b) is None:
            return lwc.Miss("a factor is computed", x.producer())

    def rewrite(self, edit, x, a, b):
        product = edit.array(a) * edit.array(b)
        return edit.op("Mul", [x, edit.constant(product + (edit.root.name == "m23"))])


class MergeFactors(lwc.RulePass):
    """Merge constant factors."""

    rules = (Double,)


@lwc.function_pass
def look(module):
    """Look at the module."""
    return 0


@lwc.function_pass
def break_output(module):
    """Break what a pass promises."""
    module.graph.outputs[0].name = "other"
    return 1
'''


def factors(count: int) -> onnx.ModelProto:
    """Make `count` pairs of products with constants."""
    lines = []
    for i in range(count):
        lines += [f"[k{i}] p{i} = Mul(x, a{i})", f"[m{i}] q{i} = Mul(p{i}, b{i})"]
    lines.append(f"y = Concat <axis = 0> ({', '.join(f'q{i}' for i in range(count))})")
    weights = ", ".join(f"float[1] {v}{i} = {{{i + 2}}}" for i in range(count) for v in "ab")
    body = "\n".join(lines)
    module = module_of(f"g (float[1] x) => (float[m] y) <{weights}> {{\n{body}\n}}")
    return ir.to_proto(module.model)


def test_the_command_line_names_pass_and_rewrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    default_registry.cache_clear()
    onnx.save(factors(40), "in.onnx")
    Path("lwc_test_merge.py").write_text(PLUGIN)
    plugin = "--load-pass-plugin=lwc_test_merge.py"
    pipeline = "look,infer-shapes,merge-factors,look,canonicalize,infer-shapes"
    code = main(["in.onnx", plugin, "-p", pipeline, "--bisect", "-q"])
    out = capsys.readouterr().out
    assert code == 1
    first, second = out.splitlines()
    assert first.startswith("pass 3, merge-factors, is the first to differ: output 'y'")
    assert second == "  rewrite 24 of 40, double at Mul 'm23', is the first after which it does"
    default_registry.cache_clear()
    code = main(["in.onnx", plugin, "-p", "look,break-output", "--bisect", "-q"])
    first, second = capsys.readouterr().out.splitlines()
    assert code == 1
    assert first.startswith("pass 2, break-output, is the first to fail verification: ")
    assert "counts no rewrites" in second
    default_registry.cache_clear()


def test_context_of_reruns_is_that_of_the_run() -> None:
    seeds: list[int] = []

    class Seeded(RulePass):
        """Wrong at one rewrite; notes its seed."""

        rules = faulty_at(2, "outputs").rules

        def run(self, module: Module, ctx: PassContext) -> PassResult:
            """Run as usual."""
            seeds.append(ctx.seed)
            return super().run(module, ctx)

    history = History()
    module = chains(4)
    context = PassContext(AnalysisManager(module), seed=7)
    PassManager([Seeded()], instruments=[history]).run(module, context)
    found = bisect(
        history, numeric_check(threads=1), lambda each: PassContext(AnalysisManager(each), seed=7)
    )
    assert found is not None
    assert found.rewrite is not None
    assert len(seeds) > 3
    assert set(seeds) == {7}
