"""Reduction: small modules and pipelines that still fail, and what a failure is."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import faulty_passes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from layers import transformer
from support import Idle, module_of, ops

from lwc.core.errors import InputError, LwcError, PassError
from lwc.core.module import Module
from lwc.frontend.load import load
from lwc.pipeline.passes import Pass, PassContext, PassResult
from lwc.verify.reduction.failure import Failure, Trial
from lwc.verify.reduction.reduce import count_nodes, minimize, reduce_module, reduce_pipeline
from lwc.verify.reduction.reproduce import reproduce

CHAIN = """
    g (float[n, 4] x) => (float[n, 4] y) {
        a = Relu(x)
        b = Sigmoid(a)
        c = Tanh(b)
        d = Neg(c)
        e = Exp(d)
        y = Add(e, a)
    }"""


def has(*wanted: str) -> Callable[[Module], bool]:
    return lambda module: set(wanted) <= set(ops(module))


# Modules


def test_one_operator_in_the_middle_is_found() -> None:
    assert ops(reduce_module(module_of(CHAIN), has("Tanh"))) == ["Tanh"]


def test_what_lies_between_two_needed_nodes_is_bypassed() -> None:
    def chained(module: Module) -> bool:
        """A Relu somewhere upstream of the Exp."""
        for node in module.graph:
            if node.op_type == "Exp":
                while (maker := node.inputs[0].producer() if node.inputs[0] else None) is not None:
                    if maker.op_type == "Relu":
                        return True
                    node = maker  # noqa: PLW2901
        return False

    assert ops(reduce_module(module_of(CHAIN), chained)) == ["Relu", "Exp"]


def test_a_node_that_no_output_needs_is_kept_where_it_fails() -> None:
    module = module_of("""
        g (float[n] x) => (float[n] y) {
            a = Relu(x)
            dead = Tanh(a)
            y = Neg(a)
        }""")

    def dead(candidate: Module) -> bool:
        return any(
            node.op_type == "Tanh"
            and not node.outputs[0].uses()
            and not node.outputs[0].is_graph_output()
            for node in candidate.graph
        )

    reduced = reduce_module(module, dead)
    assert "Tanh" in ops(reduced)
    assert count_nodes(reduced) <= 2


def test_a_branch_takes_the_place_of_its_if() -> None:
    module = module_of("""
        g (float[2, 4] x, bool c) => (float[2, 4] y) {
            outer = Relu(x)
            z = If(c) <
                then_branch = yes () => (float[2, 4] a) { b = Tanh(outer) a = Neg(b) },
                else_branch = no () => (float[2, 4] d) { d = Add(outer, outer) }
            >
            y = Exp(z)
        }""")
    assert ops(reduce_module(module, has("Tanh"))) == ["Tanh"]
    assert ops(reduce_module(module, has("If", "Add"))) in (["If", "Add"], ["If", "Tanh", "Add"])


def test_bodies_that_must_stay_are_emptied() -> None:
    module = module_of("""
        g (float[2, 4] x, bool c) => (float[2, 4] y) {
            y = If(c) <
                then_branch = yes () => (float[2, 4] a) {
                    p = Tanh(x)
                    q = Sigmoid(p)
                    r = Relu(q)
                    a = Neg(r)
                },
                else_branch = no () => (float[2, 4] d) { d = Exp(x) }
            >
        }""")
    reduced = reduce_module(module, has("If", "Relu"))
    assert sorted(ops(reduced)) == ["Exp", "If", "Relu"]


def test_a_turn_takes_the_place_of_its_loop() -> None:
    module = module_of("""
        g (float[2, 4] x) => (float[2, 4] y)
        <int64 trips = {3}, bool go = {1}> {
            y = Loop(trips, go, x) <body = turn (int64 i, bool on, float[2, 4] s)
                => (bool same, float[2, 4] next) {
                same = Identity(on)
                t = Tanh(s)
                next = Neg(t)
            }>
        }""")
    assert ops(reduce_module(module, has("Tanh"))) == ["Tanh"]


def test_functions_are_inlined_where_that_still_fails() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17, "f" : 1]>
        g (float[2] x) => (float[2] y) { a = f.both(x) y = Neg(a) }
        <domain: "f", opset_import: ["" : 17]>
        both (p) => (q) { r = Tanh(p) q = Relu(r) }
    """
    module = Module(ir.from_proto(onnx.parser.parse_model(text)))
    reduced = reduce_module(module, has("Tanh"))
    assert ops(reduced) == ["Tanh"]
    assert not reduced.model.functions
    assert ops(reduce_module(module, lambda m: bool(m.model.functions)))[0] == "both"


def test_extents_and_weights_become_small() -> None:
    rng = np.random.default_rng(0)
    module = module_of(
        "g (float[n, 64] x, float[64, 48] w) => (float[n, 48] y) { y = MatMul(x, w) }"
    )
    weight = module.graph.inputs.pop()
    weight.const_value = ir.Tensor(rng.standard_normal((64, 48), np.float32), name="w")
    module.graph.register_initializer(weight)
    reduced = reduce_module(module, has("MatMul"))
    content = reduced.graph.initializers["w"].const_value
    assert content is not None
    assert content.shape.numpy() == (2, 2)
    assert all(float(f"{x:.2g}") == pytest.approx(x, rel=1e-6) for x in content.numpy().flat)


def test_inputs_and_optional_inputs_go() -> None:
    module = module_of("""
        g (float[4] x, float low, float high, int64[1] k) => (float[4] y, int64[1] z) {
            y = Clip(x, low, high)
            z = Neg(k)
        }""")
    reduced = reduce_module(module, has("Clip"))
    assert ops(reduced) == ["Clip"]
    assert len(reduced.graph.inputs) == 1
    assert sum(value is not None for value in reduced.graph.node(0).inputs) == 1


def test_symbolic_dimensions_stay_where_the_failure_needs_them() -> None:
    def symbolic(module: Module) -> bool:
        return "Relu" in ops(module) and any(
            not isinstance(dim, int) for value in module.graph.inputs for dim in value.shape or ()
        )

    reduced = reduce_module(module_of(CHAIN), symbolic)
    assert ops(reduced) == ["Relu"]
    assert str(reduced.graph.inputs[0].shape)[:3] == "[n,"
    bound = reduce_module(module_of(CHAIN), has("Relu"))
    assert isinstance((bound.graph.inputs[0].shape or [None])[0], int)


def test_each_candidate_is_well_formed_and_its_own() -> None:
    from lwc.verify.structure.well_formed import verify_structure

    module = Module(ir.from_proto(transformer(60)))
    before = module.fingerprint()

    def fails(candidate: Module) -> bool:
        verify_structure(candidate)
        found = "Softmax" in ops(candidate)
        candidate.graph.outputs[:] = []
        return found

    assert ops(reduce_module(module, fails)) == ["Softmax"]
    assert module.fingerprint() == before


def test_the_result_is_the_same_on_every_run() -> None:
    results = {
        str(reduce_module(Module(ir.from_proto(transformer(60))), has("Softmax", "Pow")))
        for _ in range(2)
    }
    assert len(results) == 1


def test_time_bounds_the_search_and_the_best_is_returned() -> None:
    module = Module(ir.from_proto(transformer(60)))
    calls = 0

    def slow(candidate: Module) -> bool:
        nonlocal calls
        calls += 1
        time.sleep(0.5)
        return "Softmax" in ops(candidate)

    start = time.monotonic()
    reduced = reduce_module(module, slow, seconds=3)
    assert time.monotonic() - start < 20
    assert 1 < calls < 9
    assert "Softmax" in ops(reduced)
    assert count_nodes(reduce_module(module, slow, seconds=0)) == count_nodes(module)


def test_a_module_that_does_not_fail_is_refused() -> None:
    with pytest.raises(LwcError, match="does not fail"):
        reduce_module(module_of(CHAIN), has("Conv"))


def test_an_error_while_judging_counts_as_no() -> None:
    def fails(module: Module) -> bool:
        if "Tanh" not in ops(module):
            raise InputError("no feed")
        return True

    assert ops(reduce_module(module_of(CHAIN), fails)) == ["Tanh"]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_minimize_leaves_what_is_needed(count: int) -> None:
    needed = {0, count // 2, count - 1}
    assert minimize(range(count), lambda left: needed <= set(left)) == sorted(needed)
    assert len(minimize(range(count), lambda left: True)) == 1


# Pipelines


@dataclass(frozen=True)
class Mark(Idle):
    """Does nothing."""

    name: ClassVar[str] = "mark"
    number: int = 0


def numbers(passes: Sequence[Pass]) -> list[int]:
    return [each.number for each in passes if isinstance(each, Mark)]


def test_a_pipeline_keeps_the_passes_that_fail_together() -> None:
    passes = [Mark(number) for number in range(9)]
    assert numbers(reduce_pipeline(passes, lambda left: 4 in numbers(left))) == [4]
    both = reduce_pipeline(passes, lambda left: {2, 7} <= set(numbers(left)))
    assert numbers(both) == [2, 7]


# Failures


class Misbehaving(Pass):
    """Does what its test says."""

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        return PassResult(bool(self.act(module)))

    def act(self, module: Module) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Crashing(Misbehaving):
    name: ClassVar[str] = "crashing"

    def act(self, module: Module) -> Any:
        scales: dict[str, float] = {}
        return scales["scale"]


@dataclass(frozen=True)
class Refusing(Misbehaving):
    name: ClassVar[str] = "refusing"

    def act(self, module: Module) -> Any:
        raise PassError("no")


@dataclass(frozen=True)
class Malforming(Misbehaving):
    name: ClassVar[str] = "malforming"

    def act(self, module: Module) -> Any:
        module.graph.outputs[0].name = ""
        return True


@dataclass(frozen=True)
class Lying(Misbehaving):
    name: ClassVar[str] = "lying"

    def act(self, module: Module) -> Any:
        return True


@dataclass(frozen=True)
class Renaming(Misbehaving):
    name: ClassVar[str] = "renaming"

    def act(self, module: Module) -> Any:
        module.graph.outputs[0].name = "other"
        return True


@dataclass(frozen=True)
class Negating(Misbehaving):
    name: ClassVar[str] = "negating"

    def act(self, module: Module) -> Any:
        node = module.graph.outputs[0].producer()
        assert node is not None
        node.op_type = "Neg"
        return True


@dataclass(frozen=True)
class Inventing(Misbehaving):
    name: ClassVar[str] = "inventing"

    def act(self, module: Module) -> Any:
        node = module.graph.outputs[0].producer()
        assert node is not None
        node.domain, node.op_type = "nowhere", "Nothing"
        module.graph.opset_imports["nowhere"] = 1
        return True


SMALL = "g (float[n, 4] x) => (float[n, 4] y) { a = Relu(x) y = Tanh(a) }"


@pytest.mark.parametrize(
    ("chosen", "kind", "detail"),
    [
        (Crashing(), "crash", "KeyError"),
        (Refusing(), "refused", ""),
        (Malforming(), "structure", ""),
        (Negating(), "numeric", ""),
        (Inventing(), "unrunnable", ""),
    ],
)
def test_kinds_of_failures(chosen: Pass, kind: str, detail: str) -> None:
    failure = Trial(threads=1).run(module_of(SMALL), [Mark(), chosen])
    assert failure is not None
    assert (failure.kind, failure.pass_name, failure.detail) == (kind, chosen.name, detail)


def test_broken_contracts_are_told_apart() -> None:
    lie = Trial(threads=1).run(module_of(SMALL), [Lying()])
    rename = Trial(threads=1).run(module_of(SMALL), [Renaming()])
    assert lie is not None
    assert rename is not None
    assert lie.kind == rename.kind == "contract"
    assert lie.detail != rename.detail
    assert not lie.same_as(rename)
    again = Trial(threads=1).run(module_of(CHAIN), [Lying()])
    assert lie.same_as(again)


def test_what_works_is_no_failure_and_outputs_are_compared_on_demand() -> None:
    module = module_of(SMALL)
    before = module.fingerprint()
    assert Trial(threads=1).run(module, [Mark()]) is None
    assert Trial(numeric=False).run(module, [Negating()]) is None
    assert module.fingerprint() == before


def test_a_module_that_does_not_run_is_no_failure_of_a_pass() -> None:
    module = module_of(
        "g (float[n, 4] x) => (float[n, 4] y) { a = nowhere.Nothing(x) y = Tanh(a) }"
    )
    module.model.graph.opset_imports["nowhere"] = 1
    with pytest.raises(LwcError):
        Trial(threads=1).run(module, [Negating()])
    assert not Trial().runs(module)
    assert Trial(threads=1).run(module, [Mark()]) is None


def test_sameness() -> None:
    failure = Failure("crash", "a", "KeyError: 'x'", "KeyError")
    assert failure.same_as(Failure("crash", "a", "KeyError: 'y'", "KeyError"))
    assert not failure.same_as(Failure("crash", "a", "IndexError", "IndexError"))
    assert not failure.same_as(Failure("refused", "a", "", "KeyError"))
    assert not failure.same_as(None)


# Reproducers


@dataclass(frozen=True)
class Swapping(Pass):
    """Makes the Relu a Neg, which `Choking` cannot bear."""

    name: ClassVar[str] = "swapping"

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        node = next(node for node in module.graph if node.op_type == "Relu")
        node.replace_input_with(0, node.inputs[0])
        double = ir.node("Neg", [ir.node("Neg", [node.inputs[0]]).outputs[0]])
        inner = double.inputs[0].producer() if double.inputs[0] else None
        assert inner is not None
        for number, each in enumerate((inner, double)):
            each.outputs[0].name = module.fresh_name(f"n{number}")
        module.graph.insert_before(node, [inner, double])
        node.replace_input_with(0, double.outputs[0])
        return PassResult(True)


@dataclass(frozen=True)
class Choking(Pass):
    """Crashes at two Neg in a row."""

    name: ClassVar[str] = "choking"

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        for node in module.graph:
            maker = node.inputs[0].producer() if node.inputs[0] else None
            if node.op_type == "Neg" and maker is not None and maker.op_type == "Neg":
                raise IndexError("Neg")
        return PassResult(False)


def test_passes_before_the_failing_one_are_applied_for_good() -> None:
    found = reproduce(module_of(CHAIN), [Mark(), Swapping(), Mark(), Choking()], Trial(threads=1))
    assert found is not None
    assert [each.name for each in found.passes] == ["choking"]
    assert ops(found.module) == ["Neg", "Neg"]
    assert found.failure.detail == "IndexError"
    assert (found.nodes_before, found.nodes) == (6, 2)


def test_what_is_written_fails_in_the_same_way(tmp_path: Path) -> None:
    module = Module(ir.from_proto(transformer(100)))
    found = reproduce(module, [faulty_passes.ReadAxis()], Trial(threads=1))
    assert found is None
    softmax = next(node for node in module.graph if node.op_type == "Softmax")
    del softmax.attributes["axis"]
    found = reproduce(module, [faulty_passes.ReadAxis()], Trial(threads=1))
    assert found is not None
    file = tmp_path / "small.onnxtxt"
    assert found.write(file).same_as(found.failure)
    assert ops(load(file)) == ops(found.module) == ["Mul", "Softmax"]


# The command line


def lwc_opt(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lwc.cli.opt", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """The graph of 500 nodes and more that the acceptance test reduces."""
    path = tmp_path / "big.onnx"
    onnx.save(transformer(500), path)
    return path


PLUGIN = faulty_passes.__file__


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [
        ("faulty-fold-scale", "numeric", 4),
        ("faulty-read-axis", "crash", 2),
        ("faulty-spell-swish", "structure", 3),
    ],
)
def test_five_hundred_nodes_become_a_few_in_time(
    big: Path, tmp_path: Path, name: str, kind: str, most: int
) -> None:
    small = tmp_path / "small.onnxtxt"
    pipeline = f"infer-shapes,{name},canonicalize"
    start = time.monotonic()
    done = lwc_opt(
        str(big), "-p", pipeline, "--load-pass-plugin", PLUGIN, f"--reduce={small}", "--threads=1"
    )
    assert time.monotonic() - start < 120
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f"{kind}: ")
    assert "542 nodes reduced to " in done.stdout
    assert count_nodes(load(small)) <= most
    replay = shlex.split(done.stdout.splitlines()[-1].removeprefix("replay with: "))
    assert replay[0] == "lwc-opt"
    again = lwc_opt(*replay[1:])
    assert again.returncode == 1
    assert name in again.stderr


def test_nothing_to_reduce(tmp_path: Path) -> None:
    model, small = tmp_path / "m.onnxtxt", tmp_path / "small.onnxtxt"
    header = '<ir_version: 8, opset_import: ["" : 17]>\n'
    model.write_text(f"{header}{SMALL}")
    done = lwc_opt(str(model), "-p", "canonicalize", f"--reduce={small}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "no pass fails, and the outputs agree after each\n"
    assert not small.exists()


@pytest.mark.parametrize(
    ("text", "words", "code", "message"),
    [
        ("a = nowhere.Nothing(x) y = Tanh(a)", [], 1, "outputs were not compared: "),
        ("a = nowhere.Nothing(x) y = Tanh(a)", ["--verify=structural"], 0, "not compared: --ver"),
        ("a = RandomNormalLike(x) y = Add(a, x)", [], 0, "draws random numbers"),
    ],
)
def test_outputs_that_were_not_compared_are_not_said_to_agree(
    text: str, words: list[str], code: int, message: str, tmp_path: Path
) -> None:
    model, small = tmp_path / "m.onnxtxt", tmp_path / "small.onnxtxt"
    model.write_text(
        '<ir_version: 8, opset_import: ["" : 17, "nowhere" : 1]>\n'
        f"g (float[n, 4] x) => (float[n, 4] y) {{ {text} }}"
    )
    done = lwc_opt(str(model), "-p", "infer-shapes", f"--reduce={small}", *words)
    assert done.returncode == code
    assert message in done.stdout + done.stderr
    assert "agree" not in done.stdout + done.stderr
    assert not small.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reduce=m.onnxtxt"], "is the input itself (name another file)"),
        (["--reduce=small.txt"], "suffix names no format"),
        (["--reduce=/no/such/small.onnxtxt"], "there is no folder"),
        (["--reduce=small.onnxtxt"], "needs passes that fail"),
        (["--reduce=small.onnxtxt", "--verify=none", "-p", "canonicalize"], "needs checks"),
        (["--reduce=small.onnxtxt", "--bisect"], "do not go together"),
        (["--reduce=small.onnxtxt", "-o", "-"], "writes its own file only"),
    ],
)
def test_wrong_usage(words: list[str], message: str, tmp_path: Path) -> None:
    model = tmp_path / "m.onnxtxt"
    model.write_text(f'<ir_version: 8, opset_import: ["" : 17]>\n{SMALL}')
    command = [sys.executable, "-m", "lwc.cli.opt", str(model), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_replay_repeats_every_setting() -> None:
    from lwc.cli.reduce import replay_command

    trial = Trial(threads=1, seed=3, max_memory=1000, granted=frozenset(["the mask is 0/1"]))
    found = reproduce(module_of(CHAIN), [Mark(4), Crashing()], trial)
    assert found is not None
    words = shlex.split(replay_command(found, "a b.onnxtxt", ["plugin.py", "other"]))
    assert words == [
        *("lwc-opt", "a b.onnxtxt", "-p", "crashing", "--verify=numeric"),
        *("--load-pass-plugin", "plugin.py", "--load-pass-plugin", "other"),
        *("--grant", "the mask is 0/1"),
        *("--seed", "3", "--threads", "1", "--max-memory", "1000"),
    ]
