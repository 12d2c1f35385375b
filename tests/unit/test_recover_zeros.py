"""recover: what is trained, and what of that stays zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

from recovering import WIDTH, WORDS, Array, judged, language, recovered, teacher_in, texts, weight
from support import module_of

import lwc
from lwc.analysis.manager import AnalysisManager
from lwc.core.module import Module
from lwc.passes.training.trainable import weights_to_train
from lwc.pipeline.passes import PassContext


def scattered(share: float) -> tuple[Module, Array]:
    """Make a model of which some weights of `up` are zero here and there; tell which."""
    module = language()
    gone = np.random.default_rng(2).random((WIDTH, WIDTH)) < share
    pruned = ir.Tensor(np.where(gone, 0, weight(module, "up")).astype(np.float32), name="up")
    module.replace_initializer(module.graph.initializers["up"], pruned)
    return module, gone


def with_adapters(module: Module, seed: int = 7) -> Module:
    """Give each of both layers an adapter of rank 2 that is 0 nowhere."""
    made = lwc.optimize(module, "add-lora{rank=2 layers=up,down}").module
    drawn = np.random.default_rng(seed)
    for name, value in made.graph.initializers.items():
        if name.endswith(("lora_A", "lora_B")):
            assert value.shape is not None
            content = drawn.normal(size=value.shape.numpy()).astype(np.float32) / 9
            made.replace_initializer(value, ir.Tensor(content, name=name))
    return made


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_teacher_teaches_and_dead_neurons_stay_dead(method: str, tmp_path: Path) -> None:
    teacher = teacher_in(tmp_path)
    options = f"method={method} rank=4 steps=60 learning-rate=1e-2 teacher={teacher} kd-weight=1"
    module, found, _ = recovered(language(dead=True), options)
    assert found["loss"] == "kl"
    assert found["held-out loss after"] < 0.7 * found["held-out loss before"]
    assert not weight(module, "up")[:, ::2].any()
    assert not weight(module, "down")[::2].any()
    assert weight(module, "up")[:, 1::2].all()
    # Half of what is on one side of each adapter, or of each weight but the head.
    counts = {"lora": 2 * (4 * WIDTH + 4 * WIDTH // 2), "full": WIDTH**2 + WIDTH * WORDS}
    assert found["trained parameters"] == counts[method]
    if method == "lora":  # no gradient reaches a neuron of which all weights are 0
        free, _, _ = recovered(language(dead=True), f"{options} keep-zeros=false")
        assert weight(free, "up")[:, ::2].any()


def test_the_head_gets_an_adapter_where_it_is_named() -> None:
    module, _, _ = recovered(language(), "rank=2 layers=head steps=20 learning-rate=1e-2")
    for name in ("up", "down", "head"):
        same = np.array_equal(weight(module, name), weight(language(), name))
        assert same == (name != "head")


def test_scattered_zeros_get_no_adapter_but_full_training_keeps_them() -> None:
    sparse, gone = scattered(0.5)
    before = weight(sparse, "up")
    module, _, told = recovered(sparse, "rank=4 steps=10 learning-rate=1e-2")
    assert "of its weights are 0, which keep-zeros keeps" in told
    assert np.array_equal(weight(module, "up"), before)
    module, _, _ = recovered(sparse, "method=full steps=10 learning-rate=1e-2")
    assert np.array_equal(weight(module, "up") == 0, gone)
    assert not np.array_equal(weight(module, "up"), before)


def test_a_few_scattered_zeros_count_as_chance_and_a_note_says_so() -> None:
    sparse, gone = scattered(0.1)
    _, _, told = recovered(sparse, "rank=4 steps=10 learning-rate=1e-2")
    assert f"note: {gone.mean():.1%} of its weights are 0 here and there" in told
    assert told.count("here and there") == 1
    assert "here and there" not in recovered(language(), "rank=4 steps=2")[2]


def test_adapters_that_were_there_bring_no_zeros_back_and_a_warning_says_so() -> None:
    given = with_adapters(language(dead=True))
    module, found, told = recovered(given, "steps=60 learning-rate=1e-2")
    assert not weight(module, "up")[:, ::2].any()
    assert not weight(module, "down")[::2].any()
    assert weight(module, "up")[:, 1::2].all()
    assert told.count("warning: its adapter, which was there before, is not 0 in rows") == 2
    # What is judged before is the model as it came, which is not what training starts from.
    wanted = judged(given, texts()[-1])
    assert found["held-out loss before"] == pytest.approx(wanted, rel=1e-5)
    free, _, told = recovered(given, "steps=60 learning-rate=1e-2 keep-zeros=false")
    assert weight(free, "up")[:, ::2].all()
    assert "was there before" not in told


def test_full_training_beside_adapters_says_that_they_may_fill_zeros() -> None:
    given = with_adapters(language(dead=True))
    module, _, told = recovered(given, "method=full steps=10 learning-rate=1e-2")
    assert "they fill zeros of the weights beside them (run merge-lora first)" in told
    assert not weight(module, "up")[:, ::2].any()
    merged = lwc.optimize(module, "merge-lora").module
    assert weight(merged, "up")[:, ::2].all()


def test_new_adapters_that_do_nothing_yet_are_no_warning() -> None:
    for start in (language(dead=True), scattered(0.5)[0]):
        given = lwc.optimize(start, "add-lora{rank=2 layers=up,down}").module
        module, _, told = recovered(given, "steps=10 learning-rate=1e-2")
        assert "warning" not in told
        assert not weight(module, "up")[weight(start, "up") == 0].any()


def test_an_adapter_beside_scattered_zeros_fills_them_when_merged_and_a_warning_says_so() -> None:
    sparse, gone = scattered(0.5)
    module, _, told = recovered(with_adapters(sparse), "steps=10 learning-rate=1e-2")
    assert "missed: its adapter is not trained" in told
    assert told.count("warning: its adapter, which was there before, is not 0: merged, it") == 1
    assert weight(module, "up")[gone].all()


def test_what_is_0_of_quantized_weights_is_not_seen_and_a_note_says_so() -> None:
    small = lwc.optimize(language(), "quantize-weights{bits=4 block-size=16}").module
    _, _, told = recovered(small, "rank=2 steps=2")
    assert told.count("note: its weights are quantized, so keep-zeros does not see which") == 2
    assert "keep-zeros" not in recovered(small, "rank=2 steps=2 keep-zeros=false")[2]


def test_weights_that_are_no_initializers_are_not_trained_and_a_remark_says_so() -> None:
    module = language()
    up = module.graph.initializers.pop("up")
    node = ir.node("Constant", [], {"value": ir.AttrTensor("value", up.const_value)})  # type: ignore[arg-type]
    (made,) = node.outputs
    made.name, made.type, made.shape = "c", up.type, up.shape
    module.graph.insert_before(module.graph[0], node)
    up.replace_all_uses_with(made)
    _, found, told = recovered(module, "method=full steps=2")
    assert found["trained parameters"] == WIDTH**2 + WIDTH * WORDS
    assert "missed: 'c' is not trained: it is no initializer that the main graph" in told
    ready = lwc.optimize(module, "canonicalize").module
    assert "is not trained" not in recovered(ready, "method=full steps=2")[2]


def test_convolutions_are_weights_and_tables_of_angles_are_none() -> None:
    module = module_of("""g (float[1, 1, 8, 8] x, float[n, 1] p)
        => (float[1, 2, 7, 7] y, float[n, 2] z)
        <float[2, 1, 2, 2] kernel = {1, 0, 2, 3, 4, 5, 6, 7}, float[1, 2] angles = {1, 2},
         float[2, 2] square = {1, 2, 3, 4}> {
        y = Conv(x, kernel) t = MatMul(p, angles) z = MatMul(t, square) }""")
    ctx = PassContext(AnalysisManager(module))
    other, chosen = weights_to_train(module, ctx, keep_zeros=True)
    assert (other.value.name, chosen.value.name) == ("square", "kernel")
    assert other.mask is None
    assert chosen.mask is not None
    assert chosen.mask.sum() == 7
    assert [each.mask for each in weights_to_train(module, ctx, keep_zeros=False)] == [None, None]
