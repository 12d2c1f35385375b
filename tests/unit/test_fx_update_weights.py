"""Module.update_weights: trained weights of a GraphModule go back where they came from."""

from __future__ import annotations

import copy

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

import torch
from fx_agreement import mlp, parsed, run_fx
from support import module_of, run_plain

import lwc
from lwc.core.errors import LwcError
from lwc.core.walk import constant_tensor


def test_update_weights_takes_what_changed_and_nothing_else() -> None:
    module = mlp()
    before, kept = module.fingerprint(), module.graph.initializers["bias"].const_value
    lowered = lwc.to_fx(module)
    assert module.update_weights(lowered) == []
    assert module.fingerprint() == before
    twin = copy.deepcopy(lowered)
    with torch.no_grad():
        twin.encoder.dense.weight.mul_(2)
    assert module.update_weights(twin) == ["encoder.dense.weight"]
    assert module.graph.initializers["bias"].const_value is kept
    x = np.ones((2, 4), np.float32)
    (found,) = run_plain(module, {"x": x})
    np.testing.assert_allclose(found, twin(torch.from_numpy(x)).detach().numpy())


def test_update_weights_reaches_constants_functions_and_branches() -> None:
    module = parsed(
        """<ir_version: 9, opset_import: ["": 17, "own": 1]>
        g (float[n, 2] x, bool c) => (float[n, 2] y) {
            a = own.moved (x)
            y = If(c) <then_branch = t () => (float[n, 2] p) {
                           w = Constant <value = float[2, 2] {1, 2, 3, 4}> () p = MatMul(a, w) },
                       else_branch = e () => (float[n, 2] q) {
                           w = Constant <value = float[2, 2] {5, 6, 7, 8}> () q = MatMul(a, w) }>
        }
        <domain: "own", opset_import: ["": 17]>
        moved (x) => (y) { b = Constant <value = float[2] {1, 2}> () y = Add(x, b) }"""
    )
    lowered = lwc.to_fx(module)
    with torch.no_grad():
        for index, parameter in enumerate(lowered.parameters()):
            parameter.add_(index + 1)
    assert sorted(module.update_weights(lowered)) == ["b", "w", "w"]
    for chosen in (True, False):
        x = np.ones((2, 2), np.float32)
        (found,) = run_plain(module, {"x": x, "c": np.array(chosen)})
        (wanted,) = run_fx(module, {"x": x, "c": np.array(chosen)})
        trained = lowered(torch.from_numpy(x), torch.tensor(chosen)).detach().numpy()
        np.testing.assert_allclose(found, wanted)
        np.testing.assert_allclose(found, trained)


@pytest.mark.parametrize(
    ("spelled", "content"),
    [
        ("value_floats = [1.0, 2.0, 3.0]", [1, 2, 3]),
        ("value_float = 2.0", 2),
        ("value = float[3] {1, 2, 3}", [1, 2, 3]),
    ],
)
def test_update_weights_reaches_constants_however_they_are_spelled(
    spelled: str, content: object
) -> None:
    module = parsed(
        f"""<ir_version: 9, opset_import: ["": 17, "own": 1]>
        g (float[2, 3] x) => (float[2, 3] y) {{ a = own.scaled (x) y = own.scaled (a) }}
        <domain: "own", opset_import: ["": 17]>
        scaled (x) => (y) {{ k = Constant <{spelled}> () y = Mul(x, k) }}"""
    )
    lowered = lwc.to_fx(module)
    (parameter,) = lowered.parameters()  # one constant, however often its function is called
    assert parameter.tolist() == content
    with torch.no_grad():
        parameter.mul_(10)
    assert module.update_weights(lowered) == ["k"]
    assert module.update_weights(lowered) == []
    x = np.ones((2, 3), np.float32)
    (found,) = run_plain(module, {"x": x})
    np.testing.assert_allclose(found[0], np.broadcast_to(np.square(10.0 * np.array(content)), 3))


def test_what_a_call_gives_its_function_cannot_be_taken_back_so_it_is_no_parameter() -> None:
    module = parsed(
        """<ir_version: 9, opset_import: ["": 17, "own": 1]>
        g (float[2, 3] x) => (float[2, 3] y) { y = own.scaled <by = [1.0, 2.0, 3.0]> (x) }
        <domain: "own", opset_import: ["": 17]>
        scaled <by> (x) => (y) { k = Constant <value_floats: floats = @by> () y = Mul(x, k) }"""
    )
    lowered = lwc.to_fx(module)
    assert not list(lowered.parameters())
    assert [each.tolist() for each in lowered.buffers()] == [[1, 2, 3]]
    assert lowered(torch.ones(2, 3))[0].tolist() == [1, 2, 3]


def test_update_weights_tells_constants_of_equal_integers_apart() -> None:
    module = module_of(
        """g (int64[2, 2] x) => (int64[2, 2] y, int64[2, 2] z) {
        a = Constant <value_int = 5> () b = Constant <value_int = 5> ()
        c = Constant <value_ints = [5, 6]> () p = Mul(x, a) y = Mul(p, b) z = Mul(x, c) }"""
    )
    lowered = lwc.to_fx(module)
    with torch.no_grad():
        lowered.b.add_(1)
        lowered.c.add_(1)
    assert module.update_weights(lowered) == ["b", "c"]
    y, z = run_plain(module, {"x": np.ones((2, 2), np.int64)})
    assert y[0].tolist() == [30, 30]
    assert z[0].tolist() == [6, 7]


def test_update_weights_leaves_no_old_content_at_the_output_of_a_constant() -> None:
    module = module_of(
        "g (float[2] x) => (float[2] y) { k = Constant <value = float[2] {1, 2}> () y = Mul(x, k) }"
    )
    (held,) = next(iter(module.graph)).outputs
    held.const_value = constant_tensor(held)  # as onnxscript's optimizer leaves it
    lowered = lwc.to_fx(module)
    with torch.no_grad():
        lowered.k.mul_(10)
    assert module.update_weights(lowered) == ["k"]
    assert held.const_value is not None
    assert held.const_value.numpy().tolist() == [10, 20]


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int4"])
def test_update_weights_of_other_types(kind: str) -> None:
    dtype = ir.DataType[kind.upper()]
    module = module_of(
        "g (float[2] x) => (float[2] y) { w = Cast<to = 1>(x) y = Mul(x, w) }", 21, 10
    )
    first = next(iter(module.graph))
    held = module.add_initializer("k", np.array([1, -2]).astype(dtype.numpy()))
    first.replace_input_with(0, held)
    lowered = lwc.to_fx(module)
    assert module.update_weights(lowered) == []
    with torch.no_grad():
        lowered.k.copy_(torch.tensor([3, -4]))
    assert module.update_weights(lowered) == ["k"]
    assert held.const_value is not None
    assert held.const_value.dtype == dtype
    assert held.const_value.numpy().astype(np.float32).tolist() == [3, -4]


@pytest.mark.parametrize("change", ["type", "shape"])
def test_update_weights_refuses_other_types_and_shapes(change: str) -> None:
    module = mlp()
    before = module.fingerprint()
    lowered = lwc.to_fx(module)
    if change == "type":
        lowered.half()
    else:
        lowered.bias = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(LwcError, match=r"weight '.*' is float .*, but '.*' is float"):
        module.update_weights(lowered)
    assert module.fingerprint() == before


@pytest.mark.parametrize("kind", ["float", "bfloat16", "float8e5m2"])
@pytest.mark.parametrize("odd", [np.nan, -np.inf])
def test_update_weights_refuses_new_numbers_that_are_not_finite(odd: float, kind: str) -> None:
    """Those that a weight had stay: a mask is 0 or -inf."""
    dtype = ir.DataType[kind.upper()]
    module = module_of(
        "g (float[3] x) => (float[3] y) { m = Cast<to = 1>(x) z = Cast<to = 1>(x) a = Add(x, m) "
        "y = Add(a, z) }",
        21,
        10,
    )
    for node, name in zip(module.graph, ("masked", "other"), strict=False):
        content = np.array([1, odd if name == "masked" else 3, 2]).astype(dtype.numpy())
        node.replace_input_with(0, module.add_initializer(name, content))
    lowered = lwc.to_fx(module)
    before = module.fingerprint()
    assert module.update_weights(lowered) == []
    for name, place in (("masked", 2), ("other", 1)):
        kept = getattr(lowered, name).detach().clone()
        with torch.no_grad():
            getattr(lowered, name)[place] = odd
        with pytest.raises(LwcError, match=rf"weight '{name}' has {odd} at \[{place}\]"):
            module.update_weights(lowered)
        assert module.fingerprint() == before
        with torch.no_grad():
            getattr(lowered, name).copy_(kept)
    with torch.no_grad():
        lowered.masked.copy_(lowered.masked.float().mul(2).to(lowered.masked.dtype))
    assert module.update_weights(lowered) == ["masked"]


def test_update_weights_refuses_what_is_of_another_module() -> None:
    module = mlp()
    with pytest.raises(LwcError, match=r"give what lwc\.to_fx returned"):
        module.update_weights(torch.nn.Linear(2, 2))
    other = module_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(LwcError, match="the module has no weight"):
        other.update_weights(lwc.to_fx(module))
    lacking = lwc.to_fx(module.with_source(path="mlp.onnx"))
    name = next(iter(lacking.meta["lwc"]["weights"]))
    owner, _, last = name.rpartition(".")
    delattr(lacking.get_submodule(owner), last)
    told = rf"mlp.onnx: the graph module has no weight '{name}' any more \(train what lwc.to_fx"
    with pytest.raises(LwcError, match=told):
        module.update_weights(lacking)


def test_a_large_weight_that_changed_goes_to_the_spill_file() -> None:
    module = module_of("g (float[n, 200] x) => (float[n, 200] y) { y = MatMul(x, x) }")
    weight = module.add_initializer("w", np.ones((200, 200), np.float32))
    next(iter(module.graph)).replace_input_with(1, weight)
    lowered = lwc.to_fx(module)
    with torch.no_grad():
        lowered.w.add_(1)
    module.update_weights(lowered)
    assert weight.const_value is not None
    assert module.store.offset(weight.const_value) is not None
