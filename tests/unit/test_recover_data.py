"""recover: feeds that say nothing or are wrong, and other errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

from recovering import WORDS, Array, language, numbers, recovered, teacher_in, texts, weight

import lwc
from lwc.core.errors import InputError, MissingExtraError, PassError, UsageError
from lwc.core.module import Module
from lwc.frontend.onnx_writer import save
from lwc.passes.training.recover import Recover


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


def noise(count: int) -> list[dict[str, Array]]:
    drawn = np.random.default_rng(0)
    return [{"x": drawn.normal(size=(4, 16)).astype(np.float32)} for _ in range(count)]


SMALL = "quantize-weights{bits=2 block-size=16 format=matmulnbits}"


def test_feeds_of_one_token_are_left_out() -> None:
    short = [{"ids": np.array([[3]])}, *texts(), {"ids": np.array([[1]])}]
    _, found, told = recovered(language(), "rank=4 steps=4", data=short)
    assert "warning: 2 of 8 feeds are left out: they have one token" in told
    _, wanted, _ = recovered(language(), "rank=4 steps=4")
    assert found["held-out loss after"] == wanted["held-out loss after"]
    with pytest.raises(InputError, match="every feed has one token"):
        recovered(language(), "rank=4", data=[{"ids": np.array([[3]])}] * 4)


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


def test_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    teacher = teacher_in(tmp_path)
    module = language()
    with pytest.raises(UsageError, match="no calibration data"):
        lwc.optimize(module, "recover")
    with pytest.raises(InputError, match="two feeds or more"):
        recovered(module, "rank=4", data=texts(1))
    for chosen, words in (
        ("rank=99", r"no layer to train: no adapter: its 16 .* rank=99 \(try another rank="),
        ("rank=4 layers=none", r"no layer to train: layers=none matches no node .* \(try another"),
    ):
        with pytest.raises(PassError, match=words):
            recovered(module, chosen)
    with pytest.raises(PassError, match=r"no layer to train \(method=lora trains adapters"):
        lwc.optimize(numbers(), f"{SMALL},recover{{method=full}}", calibration=noise(4))
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
