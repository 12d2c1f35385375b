"""recover: training on calibration data, by adapters and by weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

from support import module_of, run_plain

import lwc
from lwc.cli.opt import main
from lwc.core.errors import InputError, MissingExtraError, PassError, UsageError
from lwc.core.module import Module
from lwc.evaluate.perplexity import token_losses
from lwc.frontend.onnx_writer import save
from lwc.passes.training.recover import Recover
from lwc.passes.training.trainable import weights_to_train

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).parents[2]
WORDS, WIDTH = 11, 16
WHEN = ("before", "after")
BODY = """x = Gather(table, ids) h = MatMul(x, up) t = Tanh(h) d = MatMul(t, down) r = Add(x, d)
    logits = MatMul(r, head)"""


def language(seed: int = 0, dead: bool = False) -> Module:
    """Make a model of the next token by the last one; `dead` neurons are zero."""
    drawn = np.random.default_rng(seed)
    shapes = {"table": (WORDS, WIDTH), "up": (WIDTH, WIDTH), "down": (WIDTH, WIDTH),
              "head": (WIDTH, WORDS)}  # fmt: skip
    declared = ", ".join(f"float{list(shape)} {name}" for name, shape in shapes.items())
    module = module_of(
        f"g (int64[b, s] ids, {declared}) => (float[b, s, {WORDS}] logits) {{ {BODY} }}"
    )
    for value in list(module.graph.inputs)[1:]:
        module.graph.inputs.remove(value)
        name = value.name or ""
        content = drawn.normal(size=shapes[name]).astype(np.float32) / 2
        if dead and name == "up":
            content[:, ::2] = 0
        if dead and name == "down":
            content[::2] = 0
        value.const_value = ir.Tensor(content, name=name)
        module.graph.register_initializer(value)
    return module


def texts(count: int = 6) -> list[dict[str, Array]]:
    """Draw texts in which each word is mostly followed by the next one."""
    drawn = np.random.default_rng(5)
    start = drawn.integers(0, WORDS, (count, 4, 1))
    steps = drawn.choice([1, 3], (count, 4, 11), p=[0.9, 0.1])
    ids = np.concatenate([start, start + np.cumsum(steps, axis=2)], axis=2) % WORDS
    return [{"ids": each} for each in ids]


def weight(module: Module, name: str) -> Array:
    found = module.graph.initializers[name].const_value
    assert found is not None
    return np.array(found.numpy())


def scattered(share: float) -> tuple[Module, Array]:
    """Make a model of which some weights of `up` are zero here and there; tell which."""
    module = language()
    gone = np.random.default_rng(2).random((WIDTH, WIDTH)) < share
    pruned = ir.Tensor(np.where(gone, 0, weight(module, "up")).astype(np.float32), name="up")
    module.replace_initializer(module.graph.initializers["up"], pruned)
    return module, gone


def recovered(module: Module, options: str, **given: Any) -> tuple[Module, dict[str, Any], str]:
    result = lwc.optimize(
        module, f"recover{{{options}}}", calibration=given.pop("data", texts()), threads=1, **given
    )
    (record,) = result.record.passes
    told = "\n".join(f"{each.kind}: {each.message}" for each in record.remarks)
    assert record.changed == (result.module.fingerprint() != module.fingerprint())
    return result.module, dict(record.statistics), told


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    save(language(), tmp_path / "teacher.onnx")
    return tmp_path / "teacher.onnx"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_next_tokens_are_learned(method: str) -> None:
    module, found, _ = recovered(
        language(), f"method={method} rank=4 steps=60 learning-rate=1e-2 batch=2"
    )
    assert found["loss"] == "cross-entropy"
    assert (found["feeds trained on"], found["feeds held out"]) == (5, 1)
    assert found["held-out loss after"] < 0.8 * found["held-out loss before"]
    names = {"table", "up", "down", "head"}
    assert set(module.graph.initializers) == names
    changed = {n for n in names if not np.array_equal(weight(module, n), weight(language(), n))}
    assert changed == ({"up", "down"} if method == "lora" else {"up", "down", "head"})
    counts = {"lora": 2 * 4 * 2 * WIDTH, "full": 2 * WIDTH**2 + WIDTH * WORDS}
    assert found["trained parameters"] == counts[method]


def judged(module: Module, *feeds: dict[str, Array]) -> float:
    """Return the cross-entropy of a module's next tokens, over all tokens of some feeds."""
    losses = []
    for feed in feeds:
        logits = run_plain(module, feed)[0][:, :-1].reshape(-1, WORDS)
        losses.append(token_losses(logits, feed["ids"][:, 1:].ravel()))
    return float(np.concatenate(losses).mean())


def test_the_reported_loss_is_that_of_the_result() -> None:
    module, found, _ = recovered(language(), "rank=4 steps=20 learning-rate=1e-2")
    assert found["held-out loss after"] == pytest.approx(judged(module, texts()[-1]), rel=1e-5)


def test_held_out_perplexity_is_over_tokens_whatever_feeds_they_are_in() -> None:
    """As that of `lwc.evaluate`; the mean of the losses of both feeds is another one."""
    data = texts(4)
    data[-1] = {"ids": data[-1]["ids"][:1, :3]}
    options = "rank=4 steps=20 learning-rate=1e-2 held-out=0.5"
    module, found, _ = recovered(language(), options, data=data)
    for when, judge in zip(WHEN, (language(), module), strict=True):
        wanted = judged(judge, *data[2:])
        assert found[f"held-out loss {when}"] == pytest.approx(wanted, rel=1e-5)
        assert found[f"held-out perplexity {when}"] == pytest.approx(np.exp(wanted), rel=1e-5)
        apart = np.mean([judged(judge, feed) for feed in data[2:]])
        assert abs(apart - wanted) > 1e-3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_teacher_teaches_and_dead_neurons_stay_dead(method: str, teacher: Path) -> None:
    options = f"method={method} rank=4 steps=60 learning-rate=1e-2 teacher={teacher} kd-weight=1"
    module, found, _ = recovered(language(dead=True), options)
    assert found["loss"] == "kl"
    assert found["held-out loss after"] < 0.7 * found["held-out loss before"]
    assert not weight(module, "up")[:, ::2].any()
    assert not weight(module, "down")[::2].any()
    assert weight(module, "up")[:, 1::2].all()
    if method == "lora":  # no gradient reaches a neuron of which all weights are 0
        free, _, _ = recovered(language(dead=True), f"{options} keep-zeros=false")
        assert weight(free, "up")[:, ::2].any()


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
    given = lwc.optimize(language(dead=True), "add-lora{rank=2 layers=up,down}").module
    module, _, told = recovered(given, "steps=10 learning-rate=1e-2")
    assert "warning" not in told
    assert not weight(module, "up")[:, ::2].any()


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


def test_feeds_of_one_token_are_left_out() -> None:
    short = [{"ids": np.array([[3]])}, *texts(), {"ids": np.array([[1]])}]
    _, found, told = recovered(language(), "rank=4 steps=4", data=short)
    assert "warning: 2 of 8 feeds are left out: they have one token" in told
    _, wanted, _ = recovered(language(), "rank=4 steps=4")
    assert found["held-out loss after"] == wanted["held-out loss after"]
    with pytest.raises(InputError, match="every feed has one token"):
        recovered(language(), "rank=4", data=[{"ids": np.array([[3]])}] * 4)


def padded(module: Module) -> Module:
    """Give a model a mask of padding, which changes nothing in it."""
    mask = ir.Value(name="attention_mask", shape=ir.Shape(["b", "s"]),
                    type=ir.TensorType(ir.DataType.INT64))  # fmt: skip
    module.graph.inputs.append(mask)
    module.graph.append(ir.node("Identity", [mask], outputs=[ir.Value(name="mask_out")]))
    out = module.graph[-1].outputs[0]
    out.type, out.shape = mask.type, mask.shape
    module.graph.outputs.append(out)
    return module


@pytest.mark.parametrize("taught", [False, True])
def test_feeds_of_padding_alone_judge_nothing(taught: bool, tmp_path: Path) -> None:
    data = [{**feed, "attention_mask": np.ones_like(feed["ids"])} for feed in texts()]
    blank = {name: np.zeros_like(array) for name, array in data[0].items()}
    options = "rank=4 steps=4"
    if taught:
        save(padded(language()), tmp_path / "teacher.onnx")
        options += f" kd-weight=1 teacher={tmp_path / 'teacher.onnx'}"
    student = padded(language(1))
    _, wanted, _ = recovered(student, options, data=data)
    _, found, told = recovered(student, options, data=[*data, blank, blank])
    assert "warning: 2 of 8 feeds are left out: they have one token, after which" in told
    assert "or nothing but padding" in told
    assert found["held-out loss after"] == wanted["held-out loss after"]
    with pytest.raises(InputError, match="two feeds or more, of which some are held out, not 0"):
        recovered(student, options, data=[blank] * 3)


def test_padding_may_have_logits_that_are_no_numbers() -> None:
    """As where attention finds nothing to look at; the loss is that of the tokens all the same."""
    holed = padded(language())
    (logits,) = [node for node in holed.graph if node.outputs[0].name == "logits"]
    value = logits.outputs[0]
    nan = holed.add_initializer("nan", ir.Tensor(np.array(np.nan, np.float32)))
    to = {"to": ir.AttrInt64("to", ir.DataType.BOOL)}
    there = ir.node("Cast", [holed.graph.inputs[-1]], to)
    axis = holed.add_initializer("axis", ir.Tensor(np.array([-1])))
    rows = ir.node("Unsqueeze", [there.outputs[0], axis])
    value.name = "all_logits"
    end = ir.node("Where", [rows.outputs[0], value, nan], outputs=[ir.Value(name="logits")])
    end.outputs[0].type, end.outputs[0].shape = value.type, value.shape
    holed.graph.extend([there, rows, end])
    holed.graph.outputs[0] = end.outputs[0]
    data = []
    for feed in texts():
        mask = np.ones_like(feed["ids"])
        mask[0, 7:], mask[1, :3] = 0, 0
        data.append({**feed, "attention_mask": mask})
    options = "rank=4 steps=4 learning-rate=1e-2"
    plain, wanted, _ = recovered(padded(language()), options, data=data)
    module, found, _ = recovered(holed, options, data=data)
    assert found["held-out loss after"] == wanted["held-out loss after"]
    assert np.array_equal(weight(module, "up"), weight(plain, "up"))


def test_the_module_before_the_pipeline_is_the_teacher() -> None:
    result = lwc.optimize(
        language(),
        "quantize-weights{bits=2 block-size=16 embeddings=none symmetric=true},"
        "recover{rank=4 steps=40 learning-rate=1e-2}",
        calibration=texts(),
        threads=1,
    )
    first, second = result.record.passes
    assert first.changed
    assert second.statistics["loss"] == "0.5 cross-entropy + 0.5 kl"
    told = " ".join(each.message for each in second.remarks)
    assert "quantized" in told or second.statistics["adapters merged"] == 2


def test_a_module_that_gives_the_same_is_no_teacher() -> None:
    module = language()
    result = lwc.optimize(
        module, "fold-linear,add-lora{rank=2},recover{steps=2}", calibration=texts(), threads=1
    )
    assert "on every feed, so it is no teacher" in " ".join(
        r.message for r in result.record.passes[-1].remarks
    )
    assert result.record.passes[-1].statistics["loss"] == "cross-entropy"


def test_a_first_feed_of_one_repeated_token_changes_no_objective(teacher: Path) -> None:
    blank = [{"ids": np.full((4, 12), 3)}, *texts()]
    _, found, _ = recovered(language(), f"rank=4 steps=2 teacher={teacher}", data=blank)
    assert found["loss"] == "0.5 cross-entropy + 0.5 kl"
    _, found, _ = recovered(language(), "rank=4 steps=2", data=blank)
    assert found["loss"] == "cross-entropy"


@pytest.mark.parametrize("rows", [4, 0], ids=["zeros", "no rows"])
def test_a_first_feed_on_which_all_outputs_agree_drops_no_teacher(rows: int) -> None:
    drawn = np.random.default_rng(0)
    feeds = [{"x": np.zeros((rows, 16), np.float32)}]
    feeds += [{"x": drawn.normal(size=(4, 16)).astype(np.float32)} for _ in range(6)]
    small = "quantize-weights{bits=2 block-size=16 format=matmulnbits}"
    result = lwc.optimize(
        numbers(), f"{small},recover{{rank=4 steps=5}}", calibration=feeds, threads=1
    )
    assert result.record.passes[-1].statistics["loss"] == "mse"


def test_adapters_that_are_there_are_trained_further() -> None:
    options = "steps=10 learning-rate=1e-2 merge=false"
    once, found, _ = recovered(language(), f"rank=2 {options}")
    twice, again, _ = recovered(once, f"rank=7 {options}")
    assert set(twice.graph.initializers) == set(once.graph.initializers)
    assert again["held-out loss before"] == pytest.approx(found["held-out loss after"], rel=1e-6)
    assert again["held-out loss after"] < again["held-out loss before"]
    assert again["trained parameters"] == found["trained parameters"]
    merged, _, _ = recovered(once, "steps=10 learning-rate=1e-2")
    assert set(merged.graph.initializers) == {"table", "up", "down", "head"}
    feed = texts()[0]
    # Products are of sixteen numbers of size 1.
    np.testing.assert_allclose(
        run_plain(merged, feed)[0], run_plain(twice, feed)[0], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("rate", ["30", "1e9"])
def test_worse_is_refused(rate: str, tmp_path: Path) -> None:
    options = f"rank=4 steps=30 learning-rate={rate}"
    module, found, told = recovered(language(), options, resume=tmp_path / "kept")
    assert not found["held-out loss after"] < found["held-out loss before"]
    (words,) = re.findall(r"missed: (the held-out loss did not fall.*)", told)
    assert ", as training diverged: " in words
    assert f"the module stays as it is (lower learning-rate={float(rate):g})" in words
    assert "applied" not in told  # not even of the adapters that the copy got
    assert set(module.graph.initializers) == {"table", "up", "down", "head"}
    assert np.array_equal(weight(module, "up"), weight(language(), "up"))
    _, found, told = recovered(language(), options, resume=tmp_path / "kept")
    assert found["training resumed"] == 30
    assert "as training diverged" in told


def test_what_is_learned_by_heart_and_what_is_not_learned_have_other_remedies() -> None:
    drawn = np.random.default_rng(0)
    noise = [{"ids": drawn.integers(0, WORDS, (1, 8))} for _ in range(3)]
    _, found, told = recovered(language(), "rank=8 steps=150 learning-rate=1e-2", data=noise)
    (ended,) = re.findall(r"where the training loss ended at (\S+);", told)
    assert float(ended) < found["held-out loss before"] < found["held-out loss after"]
    assert "diverged" not in told
    assert "as it is (give more data, or take fewer steps)" in told
    # Every feed is the same, so a loss that stays ends where it was.
    blank = [{"ids": np.full((1, 8), 3)}] * 3
    _, found, told = recovered(language(), "rank=4 steps=2 learning-rate=1e-30", data=blank)
    assert found["held-out loss before"] == found["held-out loss after"]
    assert "as it is (take more steps, or another learning-rate than 1e-30)" in told


def test_killed_and_resumed_it_gives_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lwc.calibration.checkpoint import CheckpointFolder

    options = "rank=4 steps=20 learning-rate=1e-2"

    def run(**given: Any) -> tuple[bytes, dict[str, Any]]:
        module, found, _ = recovered(language(), options, **given)
        save(module, tmp_path / "out.onnx")
        return (tmp_path / "out.onnx").read_bytes(), found

    wanted, plain = run()
    put, left = CheckpointFolder.put, [3]

    class Killed(BaseException):
        pass

    def dying(self: Any, *words: Any) -> str:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return put(self, *words)

    monkeypatch.setattr(CheckpointFolder, "put", dying)
    with pytest.raises(Killed):
        run(resume=tmp_path / "kept")
    monkeypatch.setattr(CheckpointFolder, "put", put)
    made, found = run(resume=tmp_path / "kept")
    assert made == wanted
    assert found["training resumed"] == 6
    assert found["held-out loss after"] == plain["held-out loss after"]
    assert run(resume=tmp_path / "kept")[1]["training resumed"] == 20
    other = recovered(language(1), options, resume=tmp_path / "kept")[1]
    assert other["training resumed"] == 0


@pytest.mark.parametrize("what", ["nothing", "teacher", "loss", "seed", "data", "memory"])
def test_what_is_kept_holds_for_the_same_run_alone(what: str, tmp_path: Path) -> None:
    """A teacher is known by its content: another one under the name of the first is another."""

    def run(changed: str) -> int:
        save(language(3 if changed == "teacher" else 2), tmp_path / "teacher.onnx")
        options = f"rank=4 steps=10 teacher={tmp_path / 'teacher.onnx'}"
        options += " loss=reverse-kl" if changed == "loss" else ""
        found = recovered(
            language(),
            options,
            resume=tmp_path / "kept",
            seed=int(changed == "seed"),
            max_memory=10**9 if changed == "memory" else None,
            data=texts(7 if changed == "data" else 6),
        )[1]
        resumed = found["training resumed"]
        assert isinstance(resumed, int)
        return resumed

    assert run("nothing") == 0
    assert run(what) == (10 if what == "nothing" else 0)


def test_memory_bound_changes_nothing_but_rounding() -> None:
    plain, _, _ = recovered(language(), "rank=4 steps=10 learning-rate=1e-2")
    bound, _, _ = recovered(language(), "rank=4 steps=10 learning-rate=1e-2", max_memory=20000)
    np.testing.assert_allclose(weight(bound, "up"), weight(plain, "up"), atol=1e-4)


def numbers() -> Module:
    """Make a model that takes and gives numbers."""
    body = "a = Tanh(x) y = MatMul(a, w)"
    text = f"g (float[n, 16] x, float[16, 16] w) => (float[n, 16] y) {{ {body} }}"
    module = module_of(text, 21, 10)
    value = module.graph.inputs.pop()
    drawn = np.random.default_rng(0)
    value.const_value = ir.Tensor(drawn.normal(size=(16, 16)).astype(np.float32), name="w")
    module.graph.register_initializer(value)
    return module


def test_outputs_that_are_no_logits_are_learned_from_a_teacher() -> None:
    module = numbers()
    drawn = np.random.default_rng(0)
    feeds = [{"x": drawn.normal(size=(8, 16)).astype(np.float32)} for _ in range(5)]
    result = lwc.optimize(
        module,
        "quantize-weights{bits=2 block-size=16 format=matmulnbits},recover{rank=6 steps=60 "
        "learning-rate=1e-2}",
        calibration=feeds,
        threads=1,
    )
    found = result.record.passes[-1].statistics
    assert found["loss"] == "mse"
    assert found["held-out loss after"] < 0.8 * found["held-out loss before"]  # type: ignore[operator]
    # What is said of the loss is said of the file too, which ONNX Runtime runs.
    y, wanted = (run_plain(each, feeds[-1])[0] for each in (result.module, module))
    share = ((y - wanted) ** 2).mean() / (wanted**2).mean()
    assert share == pytest.approx(found["held-out loss after"], rel=1e-3)
    with pytest.raises(PassError, match="has no teacher"):
        lwc.optimize(module, "recover{rank=4}", calibration=feeds)


def test_errors(monkeypatch: pytest.MonkeyPatch, teacher: Path, tmp_path: Path) -> None:
    module = language()
    with pytest.raises(UsageError, match="no calibration data"):
        lwc.optimize(module, "recover")
    with pytest.raises(InputError, match="two feeds or more"):
        recovered(module, "rank=4", data=texts(1))
    with pytest.raises(PassError, match="no layer to train: no adapter: its 16 inputs and 16 out"):
        recovered(module, "rank=99")
    with pytest.raises(
        PassError, match=r"layer to train: layers=no\* matches no node and no weight"
    ):
        recovered(module, "rank=2 layers=no*")
    broken = language()
    content = weight(broken, "head")
    content[0, 0] = np.nan
    broken.replace_initializer(broken.graph.initializers["head"], ir.Tensor(content, name="head"))
    with pytest.raises(PassError, match="'logits' has numbers that are not finite"):
        recovered(broken, "rank=4")
    save(broken, tmp_path / "broken.onnx")
    with pytest.raises(PassError, match="the held-out loss is nan before any training"):
        recovered(module, f"rank=4 teacher={tmp_path / 'broken.onnx'}")
    with pytest.raises(PassError, match="is no finite number at step"):
        recovered(module, "rank=4 steps=99 method=full learning-rate=1e38")
    for method in ("lora", "full"):
        with pytest.raises(
            PassError, match=r"'up' is float16, in which .* \(run recover before convert-dtype"
        ):
            lwc.optimize(
                module, f"convert-dtype,recover{{rank=4 method={method}}}", calibration=texts()
            )
    for options, words in (
        ({"rank": 0}, "rank=0"),
        ({"steps": 0}, "steps=0"),
        ({"alpha": 0.0}, "alpha=0"),
        ({"kd_weight": 1.5}, "kd-weight=1.5"),
        ({"held_out": 1.0}, "held-out=1"),
        ({"learning_rate": 0.0}, "learning-rate=0"),
        ({"loss": "cross-entropy", "teacher": str(teacher)}, "no use for a teacher"),
        ({"kd_weight": 0.0, "teacher": str(teacher)}, "kd-weight=0 leaves no share to a teacher"),
        ({"kd_weight": 0.0, "loss": "kl"}, "kd-weight=0 leaves no share to a teacher"),
        ({"method": "full", "layers": ("up",)}, "layers= is of new adapters"),
    ):
        with pytest.raises(UsageError, match=words):
            Recover(**options)
    Recover(kd_weight=0.0, teacher="auto")
    Recover(kd_weight=0.0, teacher=None, loss="cross-entropy")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match="gradient"):
        recovered(module, "rank=4")


def test_errors_name_the_file(tmp_path: Path) -> None:
    save(language(), tmp_path / "model.onnx")
    for options, data in (
        ("rank=99", texts()),
        ("rank=4", texts(1)),
        ("rank=4 loss=kl teacher=none", texts()),
        ("rank=4 steps=99 method=full learning-rate=1e38", texts()),
        ("rank=4", [{"ids": np.array([[3]])}] * 4),
    ):
        with pytest.raises((PassError, InputError)) as caught:
            lwc.optimize(tmp_path / "model.onnx", f"recover{{{options}}}", calibration=data)
        assert caught.value.file == str(tmp_path / "model.onnx")


def test_what_has_no_number_for_a_loss_names_the_feed() -> None:
    """Feeds of one token are left out, and counted all the same."""
    module = numbers()
    next(iter(module.graph)).op_type = "Identity"  # Tanh of infinity is 1
    feeds = [{"x": np.ones((2, 16), np.float32)} for _ in range(20)]
    feeds[18]["x"][1, 3] = np.inf
    small = "quantize-weights{bits=2 block-size=16 format=matmulnbits}"
    with pytest.raises(
        PassError, match="feed 19 of the calibration data: the held-out loss is nan before"
    ):
        lwc.optimize(module, f"{small},recover{{rank=2 steps=2}}", calibration=feeds)
    broken = language()
    content = weight(broken, "head")
    content[0, 0] = np.nan
    broken.replace_initializer(broken.graph.initializers["head"], ir.Tensor(content, name="head"))
    with pytest.raises(PassError, match="feed 2 of the calibration data: 'logits' has numbers"):
        recovered(broken, "rank=4", data=[{"ids": np.array([[3]])}, *texts()])


def noise(count: int) -> list[dict[str, Array]]:
    drawn = np.random.default_rng(0)
    return [{"x": drawn.normal(size=(4, 16)).astype(np.float32)} for _ in range(count)]


SMALL = "quantize-weights{bits=2 block-size=16 format=matmulnbits}"


def test_a_feed_with_a_number_that_is_none_is_refused_by_its_number(tmp_path: Path) -> None:
    feeds = noise(8)
    feeds[2]["x"][1, 3] = np.nan
    with pytest.raises(InputError, match="feed 3 of the calibration data gives input 'x' a NaN"):
        lwc.optimize(numbers(), f"{SMALL},recover{{rank=2 steps=2}}", calibration=feeds)
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"x": feed["x"].tolist()}) for feed in feeds))
    with pytest.raises(InputError, match=r"data.jsonl: .*line 3 gives input 'x' a NaN"):
        lwc.optimize(numbers(), f"{SMALL},recover{{rank=2 steps=2}}", calibration=path)


def test_a_loss_that_is_no_number_before_any_update_names_the_feed() -> None:
    feeds = noise(8)
    for number in range(7):
        feeds[number]["x"] = feeds[number]["x"] * np.float32("inf")
    plain = numbers()
    next(iter(plain.graph)).op_type = "Identity"
    with pytest.raises(PassError, match=r"step 1, on feed \d of .* \(nothing was updated yet"):
        lwc.optimize(plain, f"{SMALL},recover{{rank=2 steps=2}}", calibration=feeds)


def test_feeds_without_rows_are_left_out_and_named() -> None:
    empty = {"x": np.zeros((0, 16), np.float32)}
    data = [empty, *noise(3), empty, *noise(3)]
    result = lwc.optimize(numbers(), f"{SMALL},recover{{rank=2 steps=9}}", calibration=data)
    record = result.record.passes[-1]
    told = [each.message for each in record.remarks if each.kind == "warning"]
    assert "2 of 8 feeds are left out: they have no rows (feed 1, 5)" in told
    assert record.statistics["feeds trained on"] == 5
    with pytest.raises(InputError, match=r"two feeds or more, .*, not 1"):
        lwc.optimize(numbers(), f"{SMALL},recover{{rank=2}}", calibration=[*noise(1), empty])


def test_an_id_that_is_not_in_the_vocabulary_is_bad_data_and_names_the_feed() -> None:
    for odd in (WORDS, -100):
        data = texts()
        data[1]["ids"][2, 4] = odd
        with pytest.raises(
            InputError, match=f"feed 2 of the calibration data gives input 'ids' the id {odd} "
        ):
            recovered(language(), "rank=4", data=data)


@pytest.mark.parametrize("through", ["memory", "a file"])
def test_initializers_that_share_a_tensor_are_trained_as_one_and_stay_one(
    through: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    module = language()
    for one, other in (("up", "down"), ("head", "spare")):
        shared = module.graph.initializers[one].const_value
        assert shared is not None
        if other == "spare":  # not trained by itself, but the same weight
            spare = module.add_initializer(other, shared)
            module.graph.append(ir.node("Abs", [spare], outputs=[ir.Value(name="more")]))
            more = next(reversed(module.graph)).outputs[0]
            more.dtype, more.shape = ir.DataType.FLOAT, ir.Shape([WIDTH, WORDS])
            module.graph.outputs.append(more)
        else:
            module.graph.initializers[other].const_value = shared
    options = "method=full steps=30 learning-rate=1e-2"
    trained, found, _ = recovered(module, options)
    assert found["trained parameters"] == WIDTH**2 + WIDTH * WORDS
    assert not [each for each in recwarn if "duplicate" in str(each.message)]
    if through == "a file":
        save(trained, tmp_path / "out.onnx")
        trained = lwc.load(tmp_path / "out.onnx")
    held = trained.graph.initializers
    for one, other in (("up", "down"), ("head", "spare")):
        assert np.array_equal(weight(trained, one), weight(trained, other))
        assert not np.array_equal(weight(trained, one), weight(module, one))
        if through == "memory":
            assert held[one].const_value is held[other].const_value
    # What was judged is what came out.
    wanted = judged(trained, texts()[-1])
    assert found["held-out loss after"] == pytest.approx(wanted, rel=1e-5)


def test_what_fails_on_a_feed_names_the_feed_and_the_teacher(tmp_path: Path) -> None:
    body = {
        "one": "s = Constant<value_ints = [4, 8]>() r = Reshape(x, s) y = MatMul(r, w)",
        "two": "k = Constant<value_ints = [0]>() y = ReduceSum<keepdims = 1>(x, k)",
    }
    feeds = [{"x": np.ones((2, 16), np.float32)} for _ in range(5)]
    for name, text in body.items():
        path = tmp_path / f"{name}.onnxtxt"
        path.write_text(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 16] x) => (float[a, 16] y)'
            f"<float[8, 16] w = {{{', '.join(['1'] * 128)}}}> {{ {text} }}"
        )
        with pytest.raises(PassError) as caught:
            lwc.optimize(numbers(), f"recover{{rank=2 teacher={path}}}", calibration=feeds)
        assert str(path) in str(caught.value)
        assert "feed 5 of the calibration data: the teacher" in str(caught.value)


def test_on_the_command_line(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(language(dead=True), tmp_path / "dead.onnx")
    lines = [str(feed["ids"][0].tolist()) for feed in texts(8)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.onnx"
    words = [
        str(tmp_path / "dead.onnx"),
        "-o",
        str(out),
        "--calibrate",
        str(tmp_path / "text.jsonl"),
    ]
    pipeline = f"recover{{rank=4 steps=20 learning-rate=1e-2 teacher='{teacher}'}}"
    assert main([*words, "-p", pipeline, "--verify", "numeric", "-q"]) == 0
    assert not np.array_equal(weight(lwc.load(out), "up"), weight(language(dead=True), "up"))
    for options, figure in (
        (f"kd-weight=1 teacher='{teacher}'", "loss"),
        ("teacher=none", "perplexity"),
    ):
        report = tmp_path / "report.json"
        pipeline = f"recover{{rank=4 steps=20 learning-rate=1e-2 {options}}}"
        assert main([*words, "-p", pipeline, "--report", str(report)]) == 0
        (found,) = re.findall(rf", held-out {figure} (\S+) -> (\S+), ", capsys.readouterr().err)
        figures = json.loads(report.read_text())["passes"][0]["statistics"]
        assert found == tuple(f"{figures[f'held-out {figure} {when}']:.4g}" for when in WHEN)
        if figure == "perplexity":
            assert np.log(float(found[1])) == pytest.approx(
                figures["held-out loss after"], rel=1e-3
            )


def test_the_page_runs() -> None:
    script, page = ROOT / "tools" / "run_page.py", ROOT / "docs" / "training.md"
    subprocess.run([sys.executable, script, page], check=True, capture_output=True)


def test_convolutions_are_weights_and_tables_of_angles_are_none() -> None:
    module = module_of("""g (float[1, 1, 8, 8] x, float[n, 1] p)
        => (float[1, 2, 7, 7] y, float[n, 3] z)
        <float[2, 1, 2, 2] kernel = {1, 0, 2, 3, 4, 5, 6, 7}, float[1, 3] angles = {1, 2, 3}> {
        y = Conv(x, kernel) z = MatMul(p, angles) }""")
    (chosen,) = weights_to_train(module, keep_zeros=True)
    assert chosen.value.name == "kernel"
    assert chosen.mask is not None
    assert chosen.mask.sum() == 7
    (free,) = weights_to_train(module, keep_zeros=False)
    assert free.mask is None
