"""Gradients for passes: by weights, activations and masks, with and without checkpointing."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from support import module_of
from tiny_llama import as_module, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from lwc.analysis.manager import AnalysisManager
from lwc.backends.fx.convert import make_gradient_runner
from lwc.calibration.feeds import make_feed
from lwc.calibration.text import token_feed
from lwc.core.errors import LwcError, MissingExtraError, PassError, UsageError
from lwc.core.module import Module
from lwc.frontend.load import load
from lwc.optimizer import RunSettings, make_context
from lwc.pipeline.gradients import GradientRequest, Gradients
from lwc.pipeline.passes import PassContext

Array = np.ndarray[Any, Any]

MLP = """g (float[n, 4] x) => (float[n, 2] y)
    <float[4, 3] w = {1,-2,3,4,0.5,6,-7,8,9,-1,2,3}, float[3] bias = {1,-2,3},
     float[3, 2] v = {0.5,1,-1,2,0.3,1}> {
        a = MatMul(x, w) b = Add(a, bias) h = Tanh(b) y = MatMul(h, v)
    }"""
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32) / 4


def squares(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
    return sum(each.square().mean() for each in outputs.values() if each.is_floating_point())


def gradients(module: Module, *feeds: Mapping[str, Array], **asked: Any) -> Gradients:
    with make_gradient_runner(module, GradientRequest(**asked)) as runner:
        return runner.total(feeds, squares)


def test_equal_to_autograd_of_the_same_network_in_torch() -> None:
    module = module_of(MLP)
    w, bias, v = (
        torch.tensor(module.graph.initializers[name].const_value.numpy(), requires_grad=True)  # type: ignore[union-attr]
        for name in ("w", "bias", "v")
    )
    mask = torch.tensor([1.0, 0.5, 2.0], requires_grad=True)
    b = torch.tensor(X) @ w + bias
    h = torch.tanh(b)
    h.retain_grad()
    loss = ((h * mask) @ v).square().mean()
    loss.backward()
    found = gradients(
        module,
        {"x": X},
        weights=("w", "bias", "v"),
        values=("h",),
        masks={"h": mask.detach().numpy()},
    )
    assert found.loss == loss.item()
    for name, wanted in (("w", w), ("bias", bias), ("v", v)):
        np.testing.assert_array_equal(found.weights[name], wanted.grad)
    # The value is what the node gives, before it is masked.
    np.testing.assert_array_equal(found.values["h"], h.grad)
    np.testing.assert_array_equal(found.masks["h"], mask.grad)


def test_finite_differences_in_float64() -> None:
    text = """g (double[2, 3] x) => (double[2, 2] y) <double[3, 2] w = {1,2,-1,0.5,0.3,1}> {
        a = MatMul(x, w) b = Sin(a) c = Mul(b, a) y = Exp(c) }"""
    module = module_of(text)
    feed = {"x": np.random.default_rng(1).normal(size=(2, 3))}
    mask = np.array([0.9, 1.2])

    def loss(mask: Array, x: Array) -> float:
        return gradients(module, {"x": x}, weights=("w",), masks={"b": mask}).loss

    found = gradients(module, feed, values=("x",), masks={"b": mask})
    cases: list[tuple[Array, Array, Callable[[Array], float]]] = [
        (mask, found.masks["b"], lambda each: loss(each, feed["x"])),
        (feed["x"], found.values["x"], lambda each: loss(mask, each)),
    ]
    for given, gradient, of in cases:
        for place in np.ndindex(given.shape):
            step = np.zeros_like(given)
            step[place] = 1e-6
            rise = (of(given + step) - of(given - step)) / 2e-6
            # Central differences: 1e-12 of the third derivative, 1e-10 of rounding.
            assert gradient[place] == pytest.approx(rise, rel=1e-6, abs=1e-8)


@pytest.fixture(scope="module")
def llama() -> tuple[Module, dict[str, Array]]:
    pytest.importorskip("transformers")
    module = as_module(tiny_llama(), "plain", cache=False)
    return module, token_feed(module, np.arange(24).reshape(2, 12))


@pytest.mark.parametrize("segments", [2, 7, 1000])
def test_segments_change_only_the_order_of_sums(
    llama: tuple[Module, dict[str, Array]], segments: int
) -> None:
    module, feed = llama
    values = [n.outputs[0].name or "" for n in module.graph if n.op_type in ("MatMul", "Softmax")]
    asked: dict[str, Any] = {
        "weights": tuple(n for n in module.graph.initializers if "_proj" in n or "embed" in n),
        "values": tuple(values),
        "masks": {values[0]: np.linspace(0.5, 1.5, 64, dtype=np.float32)},
    }
    whole = gradients(module, feed, **asked)
    assert len(whole.weights) == 15
    cut = gradients(module, feed, **asked, segments=segments)
    assert cut.loss == whole.loss
    for kind in ("weights", "values", "masks"):
        for name, array in getattr(whole, kind).items():
            assert np.any(array), name
            # What several nodes read adds up their gradients in the order they come.
            far = np.abs(array - getattr(cut, kind)[name]).max() / np.abs(array).max()
            assert far < 1e-6, name


def test_memory_bound_decides_the_number_of_segments(
    llama: tuple[Module, dict[str, Array]],
) -> None:
    module, feed = llama
    with make_gradient_runner(
        module, GradientRequest(("model.embed_tokens",), segments=1)
    ) as runner:
        runner.backward(feed, squares)
        whole = runner.kept
    for bound in (whole, whole // 2, 1):
        asked = GradientRequest(("model.embed_tokens",), max_memory=bound)
        with make_gradient_runner(module, asked) as runner:
            runner.backward(feed, squares)
            assert (runner.segments == 1) == (bound == whole)
            assert runner.kept <= bound or bound == 1
            small, cut = runner.kept, runner.segments
            runner.backward({name: array[:1] for name, array in feed.items()}, squares)
            assert (runner.kept, runner.segments) == (small, cut)
    assert small < whole / 2


def test_masks_of_samples_give_gradients_of_samples() -> None:
    """Each row's gradient, as Fisher information needs it, out of one run."""
    module = module_of(MLP)
    each = gradients(module, {"x": X}, masks={"h": np.ones((len(X), 3), np.float32)})
    with make_gradient_runner(
        module, GradientRequest(masks={"h": np.ones(3, np.float32)})
    ) as runner:
        rows = [{"x": X[i : i + 1]} for i in range(len(X))]
        alone = list(runner.each(rows, squares))
        total = runner.total(iter(rows), squares)
        mean = runner.total(rows, squares, "mean")
    for index, found in enumerate(alone):
        # The mean over all rows weighs each with a fifth; sums are in another order.
        np.testing.assert_allclose(each.masks["h"][index] * 5, found.masks["h"], rtol=1e-5)
    summed = sum(found.masks["h"] for found in alone)
    np.testing.assert_allclose(total.masks["h"], summed, rtol=1e-6)
    np.testing.assert_allclose(mean.masks["h"] * 5, total.masks["h"], rtol=1e-6)
    assert total.loss == pytest.approx(sum(found.loss for found in alone))
    assert mean.loss * 5 == pytest.approx(total.loss)


def test_a_tensor_of_two_names_is_one_weight() -> None:
    text = """g (float[n, 2] x) => (float[n, 2] y)
        <float[2, 2] w = {1,2,3,4}, float[2, 2] u = {0,0,0,0}> {
        a = MatMul(x, w) y = MatMul(a, u) }"""
    module = module_of(text)
    shared = module.graph.initializers["w"].const_value
    module.graph.initializers["u"].const_value = shared
    x = np.array([[1.0, -2.0]], np.float32)
    found = gradients(module, {"x": x}, weights=("w", "u"))
    w = torch.tensor(shared.numpy(), requires_grad=True)  # type: ignore[union-attr]
    (torch.tensor(x) @ w @ w).square().mean().backward()
    np.testing.assert_array_equal(found.weights["w"], w.grad)
    np.testing.assert_array_equal(found.weights["u"], w.grad)


BRANCHED = """g (float[1, 4] x, bool c) => (float[1, 4] y) <float[4, 4] w = {
    2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2}> {
    a = MatMul(x, w)
    y = If(c) <then_branch = t () => (float[1, 4] p) { p = If(c) <
            then_branch = u () => (float[1, 4] q) { q = MatMul(a, w) },
            else_branch = v () => (float[1, 4] r) { r = Identity(a) }> },
        else_branch = e () => (float[1, 4] s) { s = Identity(a) }> }"""


@pytest.mark.parametrize("segments", [None, 2])
def test_gates_and_taps_of_a_weight_reach_what_nested_graphs_read_of_it(
    segments: int | None,
) -> None:
    """The sum of four times (2 · gate)² is 4 where the gate is 0.5."""
    module = module_of(BRANCHED)
    feed = {"x": np.ones((1, 4), np.float32), "c": np.array(True)}
    gate = np.full((4, 4), 0.5, np.float32)

    def found(**asked: Any) -> Gradients:
        request = GradientRequest(**asked, segments=segments)
        with make_gradient_runner(module, request) as runner:
            return runner.total([feed], lambda outputs, _: outputs["y"].sum())

    masked = found(masks={"w": gate}, weights=("w",))
    assert masked.loss == 4
    # By a gate of the diagonal 8 · gate; off it the weight is 0.
    np.testing.assert_array_equal(masked.masks["w"], np.eye(4) * 4)
    plain = found(weights=("w",))
    assert plain.weights["w"].sum() == 64
    np.testing.assert_array_equal(found(values=("w",)).values["w"], plain.weights["w"])


def test_gates_reach_constants_that_are_else_written_into_the_calls() -> None:
    module = module_of(
        "g () => (float[n] y) <float zero = {0}, float end = {4}, float one = {1}> "
        "{ y = Range(zero, end, one) }"
    )
    request = GradientRequest(masks={"end": np.array(0.5, np.float32)})
    with make_gradient_runner(module, request) as runner:
        assert runner.loss({}, lambda outputs, _: outputs["y"].sum()) == 0 + 1


def test_rounding_passes_gradients_on_unless_told_otherwise() -> None:
    text = "g (float[n] x) => (float[n] y) <float[1] w = {2}> { a = Mul(x, w) y = Round(a) }"
    feed = {"x": np.array([1.0, 3.0], np.float32)}
    through = gradients(module_of(text), feed, weights=("w",))
    exact = gradients(module_of(text), feed, weights=("w",), straight_through=False)
    assert through.weights["w"] == [20.0]
    assert exact.weights["w"] == [0.0]


def test_what_is_not_reached_has_a_gradient_of_zeros() -> None:
    text = """g (float[n] x) => (float[n] y, float[n] z) <float[1] w = {2}, float[1] v = {3}> {
        y = Mul(x, w) z = Mul(x, v) }"""
    with make_gradient_runner(module_of(text), GradientRequest(("w", "v"), ("z",))) as runner:
        found = runner.total([{"x": np.ones(3, np.float32)}], lambda out, _: out["y"].sum())
    assert found.weights["w"] == [3.0]
    assert found.weights["v"] == [0.0]
    assert found.values["z"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"weights": ("wv",)}, "no weight 'wv'"),
        ({"weights": ("count",)}, "weight 'count' is int64, which has no gradient"),
        ({"values": ("nowhere",)}, "no value 'nowhere'"),
        ({"masks": {"k": np.ones(1, np.float32)}}, "value 'k' is no floating-point tensor"),
        ({"masks": {"a": np.ones((2, 1, 1), np.float32)}}, "does not fit value 'a'"),
        ({"masks": {"a": np.ones(3, np.float32)}}, "does not fit value 'a'"),
        ({"masks": {"a": np.ones(4, np.int64)}}, "the mask of value 'a' is int64, which has no"),
        ({"masks": {"a": np.ones(4, np.bool_)}}, r"is bool, which has no gradient \(give an array"),
        ({"masks": {"a": [1.0, 1.0]}}, r"is list, which has no gradient \(give an array of floats"),
    ],
)
def test_errors_name_what_is_wrong(asked: dict[str, Any], words: str) -> None:
    text = """g (float[n] x, int64[n] i) => (float[n] y) <float[1] w = {2}, int64[1] count = {3}> {
        a = Mul(x, w) k = Add(i, count) c = Cast<to = 1>(k) y = Add(a, c) }"""
    feed: dict[str, Array] = {"x": np.ones(2, np.float32), "i": np.ones(2, np.int64)}
    with pytest.raises(LwcError, match=words):
        gradients(module_of(text), feed, **asked)


def test_errors_of_losses_feeds_and_segments() -> None:
    module, feed = module_of(MLP), {"x": X}
    with make_gradient_runner(module, GradientRequest(("w",))) as runner:
        with pytest.raises(LwcError, match="no tensor of one number"):
            runner.backward(feed, lambda outputs, _: outputs["y"])
        with pytest.raises(LwcError, match="does not depend"):
            runner.backward(feed, lambda _, inputs: inputs["x"].sum())
        with pytest.raises(LwcError, match="no feeds"):
            runner.total([], squares)
        with pytest.raises(LwcError, match="'x'"):
            runner.backward({}, squares)
    with make_gradient_runner(module, GradientRequest(values=("h",))) as runner:
        (once,), twice = runner.each([feed], squares), runner.total([feed, feed], squares)
        np.testing.assert_array_equal(twice.values["h"], 2 * once.values["h"])
        with pytest.raises(LwcError, match="other shapes in other feeds"):
            runner.total([feed, {"x": X[:2]}], squares)
    with pytest.raises(UsageError, match="segments=0"):
        make_gradient_runner(module, GradientRequest(("w",), segments=0))


def test_losses_that_ask_for_what_is_not_there_are_told_what_is() -> None:
    with make_gradient_runner(module_of(MLP), GradientRequest(("w",))) as runner:
        for loss, words in (
            (lambda out, _: out["z"].sum(), r"the loss asks for output 'z', where there is 'y'"),
            (
                lambda out, given: (out["y"] * given["X"]).sum(),
                r"for input 'X', where there is 'x'",
            ),
        ):
            with pytest.raises(LwcError, match=words) as caught:
                runner.backward({"x": X}, loss)
            assert "\n" not in str(caught.value)
        # What a loss asks for in its own mappings is its own affair, and it may ask what there is.
        own: dict[str, float] = {}
        with pytest.raises(KeyError, match="mine"):
            runner.backward({"x": X}, lambda out, _: out["y"].sum() * own["mine"])
        found = runner.loss({"x": X}, lambda out, given: out.get("z", given.get("x")).sum())
        assert found == pytest.approx(X.sum(), rel=1e-5)


ROOTS = """g (float[n] x) => (float[n] y) <float[1] w = {1}, float[1] v = {0}> {
    a = Mul(x, w) r = Sqrt(a) s = Mul(x, v) y = Add(r, s) }"""


@pytest.mark.parametrize("kind", ["weights", "values", "masks"])
def test_gradients_that_are_no_numbers_are_errors_that_name_what_they_are_of(kind: str) -> None:
    """The root rises without bound at 0, and the chain rule multiplies that by 0."""
    asked = {
        "weights": {"weights": ("v", "w")},
        "values": {"values": ("s", "a")},
        "masks": {"masks": {"s": np.ones(1, np.float32), "a": np.ones(1, np.float32)}},
    }[kind]
    named = {"weights": "weight 'w'", "values": "value 'a'", "masks": "the mask of value 'a'"}[kind]
    good, bad = ({"x": np.array([each], np.float32)} for each in (1.0, 0.0))
    with make_gradient_runner(module_of(ROOTS), GradientRequest(**asked)) as runner:  # type: ignore[arg-type]
        runner.total([good, good], squares_of_roots)
        for taken in (runner.total, lambda *given: list(runner.each(*given))):
            with pytest.raises(LwcError, match=f"gradient by {named} is (nan|inf).*look for"):
                taken([good, bad], squares_of_roots)


def squares_of_roots(outputs: Mapping[str, Any], _: object) -> Any:
    return outputs["y"].sum()


def test_a_failing_node_is_named_in_any_segment() -> None:
    text = """g (float[n, 2] x, float[m, 2] z) => (float[n, 2] y) <float[2, 2] w = {1,2,3,4}> {
        a = MatMul(x, w) b = Tanh(a) y = Add(b, z) }"""
    module = module_of(text)
    list(module.graph)[-1].name = "the sum"
    with make_gradient_runner(module, GradientRequest(("w",), segments=2)) as runner:
        good = {"x": np.ones((3, 2), np.float32), "z": np.ones((3, 2), np.float32)}
        runner.backward(good, squares)
        assert runner.segments == 2
        with pytest.raises(LwcError, match="the sum"):
            runner.backward({**good, "z": np.ones((2, 2), np.float32)}, squares)


def test_the_context_gives_runners(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(MLP)
    ctx = make_context(module, RunSettings(threads=1, max_memory=100))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with ctx.gradient_runner(module, weights=["w"]) as runner:
        assert torch.get_num_threads() == 1
        assert list(runner.parameters) == ["w"]
        assert runner.backward({"x": X}, squares) == runner.loss({"x": X}, squares)
        assert runner.kept == 4 * 5 * 3  # measured, as there is a bound: h
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    for bare in (
        PassContext(AnalysisManager(module), source="prune"),
        make_context(module, RunSettings(backend=None)),
    ):
        with pytest.raises(PassError, match="needs gradients, but the pipeline has no backend"):
            bare.gradient_runner(module, weights=["w"])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match="a gradient needs"):
        ctx.gradient_runner(module, weights=["w"])


class Peak(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of tensors that are alive at once, out of those made while it is active."""

    def __init__(self, others: list[Any]) -> None:
        super().__init__()
        self.alive = self.most = 0
        self._known: dict[int, Any] = {each.untyped_storage()._cdata: None for each in others}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.most = max(self.most, self.alive)
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.alive -= size

        self._known[key] = weakref.ref(storage, gone)
        self.alive += size


@pytest.mark.models
def test_checkpointing_lowers_the_peak_of_a_real_model() -> None:
    from fetch_models import model_path

    module = load(model_path("paraphrase-MiniLM-L3-v2"))
    feed = make_feed(module, {"batch_size": 4, "sequence_length": 128})
    first = next(n.outputs[0].name for n in module.graph if n.op_type == "LayerNormalization")
    masks = {first or "": np.ones(384, np.float32)}
    most, kept = {}, {}
    for segments in (1, 6):
        asked = GradientRequest(masks=masks, segments=segments)
        with make_gradient_runner(module, asked) as runner:
            runner.loss(feed, squares)  # measures and cuts
            with Peak(list(runner._whole.parameters())) as peak:
                runner.backward(feed, squares)
            assert peak.alive < 1e5  # the gradient and the loss
            most[segments], kept[segments] = peak.most, runner.kept
    # Beside what is kept there is what a few operators are at work on: 4.7 MB each here.
    assert kept[1] < most[1] < kept[1] + 2e7
    assert kept[6] < most[6] < kept[6] + 2e7
    assert kept[6] < kept[1] / 3
    assert most[6] < most[1] / 2
