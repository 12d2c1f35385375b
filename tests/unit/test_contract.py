"""Every clause of a pass's contract: a pass that breaks just that one is named for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from support import module_of

from lwc.calibration.feeds import FeedSpec
from lwc.core.errors import LwcError, PassError
from lwc.core.module import Module
from lwc.passes.cleanup.bind_dims import BindDims
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.pipeline.passes import Approximate, Contract, Exact, Lossy, Pass, PassContext, PassResult
from lwc.verify.contract.clauses import ContractSettings, ContractViolation, check_contract
from lwc.verify.contract.isomorphism import renamed, structure

GRAPH = """g (float[N, 4] x) => (float[N, 4] y)
<float[4] w = {1, 2, 3, 4}, float[4] v = {4, 3, 2, 1}>
{ a = Mul(x, w) b = Add(a, v) c = Identity(b) y = Relu(c) }"""


def example() -> Module:
    """Return the graph, its weights in memory that may be written to."""
    module = module_of(GRAPH)
    for _, value in module.initializers():
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
    return module


def drop_identity(module: Module) -> bool:
    """Remove the Identity, as a right pass would; tell whether it was there."""
    for node in list(module.graph):
        if node.op_type == "Identity":
            for user, index in list(node.outputs[0].uses()):
                user.replace_input_with(index, node.inputs[0])
            module.graph.remove(node, safe=True)
            return True
    return False


def node_of(module: Module, op: str) -> ir.Node:
    return next(node for node in module.graph if node.op_type == op)


def broken(change: Callable[[Module], Any], **attributes: Any) -> Pass:
    """Make a pass of a change; other class attributes by keyword."""

    def run(self: Pass, module: Module, ctx: PassContext) -> PassResult:
        if change(module) is False:
            return PassResult(False)
        return PassResult(True)

    members: dict[str, Any] = {"name": "broken", "run": run, "__doc__": "Broken.", **attributes}
    made: Any = type("Broken", (Pass,), members)
    pass_: Pass = dataclass(frozen=True)(made)()
    return pass_


def right(module: Module) -> bool:
    return drop_identity(module)


def wrong_operator(module: Module) -> bool:
    done = drop_identity(module)
    if done:
        node_of(module, "Relu").op_type = "Abs"
    return done


def crash(module: Module) -> None:
    drop_identity(module)
    raise ZeroDivisionError("half way")


def undeclared(module: Module) -> None:
    node_of(module, "Relu").op_type = "Reluu"


def write_weight(module: Module) -> bool:
    done = drop_identity(module)
    if done:
        tensor = module.graph.initializers["w"].const_value
        assert tensor is not None
        tensor.numpy()[:] *= 2
    return done


def copy_weight(module: Module) -> bool:
    done = drop_identity(module)
    if done:
        value = module.graph.initializers["w"]
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy().copy(), name="w")
    return done


def unserializable(module: Module) -> bool:
    done = drop_identity(module)
    if done:
        node_of(module, "Relu").metadata_props["note"] = 5  # type: ignore[assignment]
    return done


COUNTER = itertools.count()


def count_up(module: Module) -> bool:
    done = drop_identity(module)
    if done:
        node_of(module, "Relu").name = f"number{next(COUNTER)}"
    return done


def by_name(module: Module) -> bool:
    node = next((node for node in module.graph if node.op_type == "Identity"), None)
    return drop_identity(module) if node and node.outputs[0].name == "c" else False


def narrow(module: Module) -> bool:
    done = drop_identity(module)
    module.graph.inputs[0].shape = ir.Shape([1, 4])
    return done


def again_and_again(module: Module) -> bool:
    relu = node_of(module, "Relu")
    made = ir.node("Relu", [relu.inputs[0]])
    made.outputs[0].name = module.fresh_name("again")
    module.graph.insert_before(relu, made)
    relu.replace_input_with(0, made.outputs[0])
    return True


CASES: list[tuple[str, Pass, str]] = [
    ("outputs", broken(wrong_operator), "times its bound"),
    ("crash", broken(crash), "ZeroDivisionError: half way"),
    ("structure", broken(undeclared), "operator Reluu does not exist"),
    ("structure", broken(lambda module: True), "reports a change, but the module is the same"),
    ("weights", broken(write_weight), "writes into a weight"),
    ("weights", broken(copy_weight), "makes a new tensor of 'w'"),
    ("structure", broken(narrow), "bind 'N' to 1, which no assumption of its contract says"),
    ("crash", broken(lambda module: None, run=lambda self, module, ctx: None), "not a PassResult"),
    ("structure", broken(unserializable), "its result breaks lwc"),
    ("repetition", broken(count_up), "gives another result"),
    ("names", broken(by_name), "depends on the names"),
    ("idempotence", broken(again_and_again), "changes it again"),
    (
        "cost",
        broken(again_and_again, never_more=frozenset({"nodes"}), changes_again="it adds"),
        "nodes grow from 4 to 5",
    ),
]


@pytest.mark.parametrize(("clause", "pass_", "words"), CASES, ids=[f"{c}-{w}" for c, _, w in CASES])
def test_each_clause_is_named(clause: str, pass_: Pass, words: str) -> None:
    with pytest.raises(ContractViolation) as caught:
        check_contract(pass_, example())
    assert caught.value.clause == clause
    assert words in caught.value.message


def test_a_right_pass_holds() -> None:
    outcome = check_contract(broken(right), module_of(GRAPH))
    assert outcome.changed
    assert outcome.float64
    assert outcome.feeds == 6


def test_a_pass_may_say_that_it_changes_again() -> None:
    assert check_contract(
        broken(again_and_again, changes_again="it adds"), module_of(GRAPH)
    ).changed


def test_nothing_to_do() -> None:
    module = module_of("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    outcome = check_contract(broken(right), module)
    assert not outcome.changed
    assert outcome.record is not None


def test_the_module_is_not_changed() -> None:
    module = module_of(GRAPH)
    before = module.fingerprint()
    check_contract(broken(right), module)
    assert module.fingerprint() == before


def test_a_pass_may_narrow_its_inputs_where_it_says_so() -> None:
    pass_ = broken(narrow, contract=Exact(("N is 1",)))
    assert check_contract(pass_, module_of(GRAPH)).changed
    assert check_contract(BindDims((("N", 3),)), module_of(GRAPH)).changed


@pytest.mark.parametrize("atol", [1e-3, 5e-4])
def test_a_stated_absolute_error_is_allowed_however_small_the_output(atol: float) -> None:
    """Among the feeds are numbers a thousandth as large: the error does not shrink with them."""

    def shift(module: Module) -> bool:
        relu = node_of(module, "Relu")
        added = module.add_initializer("shift", np.array(9e-4, np.float32))
        node = ir.node("Add", [relu.inputs[0], added])
        node.outputs[0].name = "shifted"
        module.graph.insert_before(relu, node)
        relu.replace_input_with(0, node.outputs[0])
        return True

    pass_ = broken(shift, contract=Approximate(rtol=0.0, atol=atol), changes_again="it adds")
    if atol > 9e-4:
        assert check_contract(pass_, module_of(RELU)).changed
        return
    with pytest.raises(ContractViolation, match="times its bound"):
        check_contract(pass_, module_of(RELU))


def test_sequences_of_tensors_of_several_shapes() -> None:
    def ragged(tail: str) -> Module:
        return module_of(
            f"""g (float[N, 8] x) => (seq(float[M, 8]) y)
            {{ c = Identity(x) a = Relu(c) b = Concat<axis = 0>(a, {tail})
               y = SequenceConstruct(a, b) }}"""
        )

    assert check_contract(broken(right), ragged("a")).feeds == 6
    with pytest.raises(ContractViolation, match=r"output 'y\[0\]' is .* times its bound"):
        check_contract(broken(wrong_operator), ragged("x"))


ASSUMPTION = "x is not negative"


@dataclass(frozen=True)
class DropRelu(Pass):
    """Drop Relu, which is right where the input is not negative."""

    asks: bool = True

    name: ClassVar[str] = "drop-relu"
    contract: ClassVar[Contract] = Exact((ASSUMPTION,))

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        relu = next((node for node in module.graph if node.op_type == "Relu"), None)
        if relu is None:
            return PassResult(False)
        if self.asks:
            ctx.assume(ASSUMPTION)
        relu.op_type = "Identity"
        return PassResult(True)


RELU = "g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"


def test_outside_its_assumptions_a_pass_refuses() -> None:
    outcome = check_contract(DropRelu(), module_of(RELU))
    assert outcome.refused is not None
    assert ASSUMPTION in outcome.refused


def test_a_pass_that_does_not_ask_is_caught_outside_its_assumptions() -> None:
    with pytest.raises(ContractViolation, match="times its bound"):
        check_contract(DropRelu(asks=False), module_of(RELU))


def test_inside_its_assumptions_the_outputs_agree() -> None:
    settings = ContractSettings(FeedSpec(ranges={"x": (0, 5)}), frozenset({"all"}))
    assert check_contract(DropRelu(), module_of(RELU), settings).changed
    with pytest.raises(ContractViolation, match="times its bound"):
        check_contract(DropRelu(), module_of(RELU), ContractSettings(granted=frozenset({"all"})))


def test_a_refusal_is_no_violation() -> None:
    def refuse(module: Module) -> None:
        drop_identity(module)
        raise PassError("not today")

    assert check_contract(broken(refuse), module_of(GRAPH)).refused is not None


def matmul(rest: str = "y = Identity(a)") -> Module:
    text = f"g (float[N, 64] x) => (float[N, 64] y) {{ a = Identity(x) {rest} }}"
    graph = module_of(text).graph
    module = Module(ir.Model(graph, ir_version=8))
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    node = module.graph[0]
    node.op_type = "MatMul"
    node.resize_inputs(2)
    node.replace_input_with(1, module.add_initializer("w", weights))
    return module


@dataclass(frozen=True)
class Shrink(Pass):
    """A lossy pass that multiplies every weight by a factor."""

    factor: ClassVar[float] = 0.9
    name: ClassVar[str] = "shrink"
    contract: ClassVar[Contract] = Lossy(noise=0.01)
    changes_again: ClassVar[str | None] = "it shrinks again"

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        value = module.graph.initializers["w"]
        assert value.const_value is not None
        module.replace_initializer(
            value, ir.Tensor(value.const_value.numpy() * np.float32(self.factor))
        )
        return PassResult(True)


def test_a_lossy_pass_is_held_to_the_noise_it_states() -> None:
    with pytest.raises(ContractViolation) as caught:
        check_contract(Shrink(), matmul())
    assert caught.value.clause == "noise"


def test_quantization_is_within_the_noise_it_states() -> None:
    outcome = check_contract(QuantizeWeights(), matmul())
    assert outcome.changed


class Spoil(Shrink):
    factor: ClassVar[float] = float("nan")


@pytest.mark.parametrize("rest", ["b = Relu(a) y = Reciprocal(b)", "y = Reciprocal(a)"])
@pytest.mark.parametrize("seed", range(12))
def test_noise_may_take_an_element_across_a_pole(rest: str, seed: int) -> None:
    """Some of the many elements change their sign here, or nearly, that did not under the draws."""
    settings = ContractSettings(seed=seed)
    assert check_contract(QuantizeWeights(), matmul(rest), settings).changed


@pytest.mark.parametrize("rest", ["y = Identity(a)", "b = Abs(a) y = Sqrt(b)"])
def test_infinities_that_noise_does_not_make_are_reported(rest: str) -> None:
    with pytest.raises(ContractViolation, match="ceases to be finite") as caught:
        check_contract(Spoil(), matmul(rest))
    assert caught.value.clause == "noise"


def test_a_model_that_does_not_run_is_no_example() -> None:
    module = module_of(
        "g (float[N, 4] x) => (float[N, 4] y) <float[3, 4] w = {1,2,3,4,5,6,7,8,9,1,2,3}>\n"
        "{ a = MatMul(x, w) y = Identity(a) }"
    )
    with pytest.raises(LwcError):
        check_contract(Canonicalize(), module)


def test_random_nodes_are_not_compared() -> None:
    module = module_of(
        "g (float[N, 4] x) => (float[N, 4] y)\n"
        "{ r = RandomNormalLike(x) a = Identity(r) y = Add(x, a) }"
    )
    outcome = check_contract(Canonicalize(), module)
    assert outcome.changed
    assert outcome.feeds == 0


def test_structure_is_blind_to_names_and_nothing_else() -> None:
    module = module_of(GRAPH)
    other = renamed(module, 3)
    assert {node.name for node in other.graph}.isdisjoint({"a", "b"})
    assert set(other.graph.initializers).isdisjoint({"w", "v"})
    assert [v.name for v in other.graph.outputs] == ["y"]
    assert structure(other) == structure(module)
    for change in (wrong_operator, drop_identity, undeclared):
        changed = module.clone()
        change(changed)
        assert structure(changed) != structure(module)


def test_renaming_reaches_into_bodies() -> None:
    module = module_of(
        """g (bool c, float[N] x) => (float[N] y) <float[1] k = {2}>
        { y = If(c) <then_branch = t () => (float[N] a) { a = Mul(x, k) },
                     else_branch = e () => (float[N] b) { b = Neg(x) }> }"""
    )
    other = renamed(module)
    names = {value.name for node in other.nodes() for value in node.outputs}
    assert "a" not in names
    assert "y" in names
    assert structure(other) == structure(module)
    (node,) = other.graph
    body = node.attributes["then_branch"].as_graph()
    next(iter(body)).op_type = "Div"
    assert structure(other) != structure(module)


def test_a_weight_written_into_is_named_whatever_else_is_wrong() -> None:
    def write_and_lie(module: Module) -> bool:
        write_weight(module)
        return False

    with pytest.raises(ContractViolation) as caught:
        check_contract(broken(write_and_lie), example())
    assert caught.value.clause == "weights"


def test_a_lossy_pass_over_operators_without_a_reference() -> None:
    """A convolution beside the weights: no float64, and all feeds are judged."""
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    graph = module_of(
        """g (float[N, 1, 64] x) => (float[N, 1, 64] y) <float[1, 1, 1] k = {2}>
        { z = Conv(x, k) y = Identity(z) }"""
    )
    node = node_of(graph, "Identity")
    node.op_type = "MatMul"
    node.resize_inputs(2)
    node.replace_input_with(1, graph.add_initializer("w", weights))
    assert check_contract(QuantizeWeights(), graph).changed
