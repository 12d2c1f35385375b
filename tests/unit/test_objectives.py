"""Losses and objectives: what is minimised, and what is taken of a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

import torch
from support import module_of

from lwc.core.errors import InputError, PassError
from lwc.train.lesson import Lesson, check_teacher
from lwc.train.losses import (
    kl_divergence,
    mean_squares,
    next_token_loss,
    reverse_kl_divergence,
)
from lwc.train.objective import (
    Objective,
    TextModel,
    TokenInputs,
    choose_objective,
    predicts_next,
    text_model,
)


def drawn(*shape: int, seed: int = 0) -> Any:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def test_next_token_loss_is_the_mean_of_what_each_position_says_of_the_next() -> None:
    logits, ids = drawn(2, 4, 5), torch.tensor([[1, 2, 3, 4], [0, 4, 2, 2]])
    chances = torch.softmax(logits, -1)
    said = [-float(chances[b, t, ids[b, t + 1]].log()) for b in range(2) for t in range(3)]
    assert float(next_token_loss(logits, ids)) == pytest.approx(np.mean(said))
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    # Neither the last token of the first row nor the first of the second is label or context.
    wanted = np.mean([said[0], said[1], said[4], said[5]])
    assert float(next_token_loss(logits, ids, mask)) == pytest.approx(wanted)
    # A feed of padding alone has nothing to predict.
    assert float(next_token_loss(logits, ids, torch.zeros_like(mask))) == 0


def test_divergences_by_their_formulas() -> None:
    teacher, student = drawn(2, 3, 7), drawn(2, 3, 7, seed=1)

    def kl(a: Any, b: Any, t: float) -> Any:
        p, q = torch.softmax(a / t, -1), torch.softmax(b / t, -1)
        return t * t * (p * (p / q).log()).sum(-1)

    for t in (1.0, 2.0):
        forward, backward = kl(teacher, student, t), kl(student, teacher, t)
        assert float(kl_divergence(teacher, student, t)) == pytest.approx(float(forward.mean()))
        assert float(reverse_kl_divergence(teacher, student, t)) == pytest.approx(
            float(backward.mean())
        )
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    masked = kl_divergence(teacher, student, mask=mask)
    assert float(masked) == pytest.approx(float(kl(teacher, student, 1.0)[0, :2].mean()))
    assert float(kl_divergence(teacher, teacher)) == pytest.approx(0, abs=1e-12)


def test_mean_squares_have_no_unit() -> None:
    teacher, student = drawn(3, 4), drawn(3, 4, seed=1)
    wanted = float((teacher - student).square().sum() / teacher.square().sum())
    assert float(mean_squares(teacher, student)) == pytest.approx(wanted)
    for unit in (1e3, 1e-9):
        assert float(mean_squares(unit * teacher, unit * student)) == pytest.approx(wanted)
    assert float(mean_squares(torch.zeros(2), torch.tensor([1.0, 1.0]))) == 1


def test_rows_that_do_not_count_may_be_no_numbers() -> None:
    """Where attention masks everything, logits of padding are NaN."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    teacher, student = drawn(2, 4, 5), drawn(2, 4, 5, seed=1)
    ids = torch.tensor([[1, 2, 3, 4], [0, 4, 2, 2]])
    losses: tuple[Callable[[Any, Any], Any], ...] = (
        lambda _, logits: next_token_loss(logits, ids, mask),
        lambda given, logits: kl_divergence(given, logits, 2.0, mask),
        lambda given, logits: reverse_kl_divergence(given, logits, 2.0, mask),
        lambda given, outputs: mean_squares(given, outputs, mask),
    )
    for loss in losses:
        wanted, found = student.clone().requires_grad_(), student.clone()
        found[mask == 0] = float("nan")
        found.requires_grad_()
        holed = teacher.masked_fill((mask == 0)[..., None], float("nan"))
        plain, value = loss(teacher, wanted), loss(holed, found)
        assert value.item() == plain.item()
        plain.backward()
        value.backward()
        assert torch.equal(found.grad, wanted.grad)


@pytest.mark.parametrize("loss", [kl_divergence, reverse_kl_divergence])
def test_what_is_impossible_to_both_adds_nothing_to_a_divergence(loss: Any) -> None:
    """As if there were no such class; one that is possible to one alone may be infinitely far."""
    teacher, student = drawn(2, 3, 4), drawn(2, 3, 4, seed=1).requires_grad_()
    never = torch.full((2, 3, 1), -torch.inf, dtype=torch.float64)
    wider = torch.cat((student.detach(), never), -1).requires_grad_()
    wanted, found = loss(teacher, student), loss(torch.cat((teacher, never), -1), wider)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    wanted.backward()
    found.backward()
    torch.testing.assert_close(wider.grad[..., :4], student.grad, rtol=1e-12, atol=1e-15)
    assert not wider.grad[..., 4].any()


def test_what_the_student_alone_thinks_impossible_is_infinitely_far() -> None:
    one, other = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])
    assert float(kl_divergence(other, one)) == torch.inf
    assert float(kl_divergence(one, other)) == pytest.approx(np.log(2))
    assert float(reverse_kl_divergence(other, one)) == pytest.approx(np.log(2))


LANGUAGE = """g (int64[b, s] ids, int64[b, s] attention_mask) => (float[b, s, 7] logits, float[b] z)
    <float[7, 4] table = {0}, float[4, 7] head = {0}> {
        x = Gather(table, ids) logits = MatMul(x, head)
        f = Cast<to = 1>(attention_mask) axes = Constant<value = int64[1] {1}>()
        z = ReduceSum<keepdims = 0>(f, axes)
    }""".replace("= {0}, ", "= {" + ",".join(["1"] * 28) + "}, ").replace(
    "= {0}>", "= {" + ",".join(["1"] * 28) + "}>"
)


def test_a_model_of_text_is_known_by_its_inputs_and_outputs() -> None:
    assert text_model(module_of(LANGUAGE)) == TextModel(
        "logits", TokenInputs("ids", "attention_mask")
    )
    plain = module_of("g (float[n, 2] x) => (float[n, 2] y) { y = Tanh(x) }")
    assert text_model(plain) is None


class Shown:
    """A runner that answers by a function of the ids."""

    def __init__(self, logits: Callable[[Any], Any]) -> None:
        self._logits = logits

    def run(self, feed: Any, outputs: Any = None) -> Any:
        assert np.all(feed["mask"] == 1)
        return {"logits": self._logits(feed["ids"])}


@pytest.mark.parametrize(
    ("ids", "answer", "causal"),
    [
        ([[1, 2, 3, 4]], lambda ids: np.cumsum(ids, axis=1)[..., None], True),
        ([[1, 2, 3, 4]], lambda ids: np.cumsum(ids[:, ::-1], axis=1)[..., None], False),
        ([[2, 2, 2, 2]], lambda ids: np.cumsum(ids, axis=1)[..., None], True),
        ([[2, 2, 2, 2]], lambda ids: np.cumsum(ids[:, ::-1], axis=1)[..., None], False),
        ([[0, 0]], lambda ids: np.cumsum(ids, axis=1)[..., None] + [1, 2], True),
        ([[0, 0]], lambda ids: np.cumsum(ids[:, ::-1], axis=1)[..., None] + [1, 2], False),
        ([[5, 3, 3]], lambda ids: np.cumsum(ids, axis=1)[:, -1:, None], False),
        ([[1, 2, 3, 3]], lambda ids: (ids * 0 + ids[:, 2:3] * ids[:, 3:])[..., None], False),
        ([[1, 2, 3, 4]], lambda ids: (ids + ids.sum(axis=1, keepdims=True))[..., None], False),
        (
            [[1, 2, 3, 4]],
            lambda ids: (ids + ids.sum(1, keepdims=True) * [0, 1, 1, 1])[..., None],
            False,
        ),
        ([[0, 1, 0, 1]], lambda ids: (ids + ids.sum(1, keepdims=True))[..., None] + [1, 2], False),
    ],
    ids=[
        "earlier tokens",
        "later tokens",
        "earlier tokens, all the same",
        "later tokens, all the same",
        "earlier tokens, all 0",
        "later tokens, all 0",
        "last logits",
        "palindrome",
        "a bag of words",
        "a bag of words, but for the first token",
        "a bag of all words there are",
    ],
)
def test_next_tokens_are_predicted_where_no_later_one_matters(
    ids: Any, answer: Any, causal: bool
) -> None:
    feeds = {2: {"ids": np.array([[1]]), "mask": np.array([[1]])},
             3: {"ids": np.array(ids), "mask": np.zeros_like(ids)}}  # fmt: skip
    model = TextModel("logits", TokenInputs("ids", "mask"))
    assert predicts_next(model, feeds, Shown(lambda each: answer(each) * 1.0)) == causal


def test_logits_may_rule_tokens_out_but_must_be_numbers() -> None:
    """A token that is never said has a logit of -inf, whatever comes later."""
    feeds = {1: {"ids": np.array([[1, 2, 3, 4]]), "mask": np.ones((1, 4), np.int64)}}
    model = TextModel("logits", TokenInputs("ids", "mask"))

    def said(odd: float, causal: bool) -> bool:
        def logits(ids: Any) -> Any:
            sums = np.cumsum(ids if causal else ids[:, ::-1], axis=1, dtype=np.float32)
            return np.stack((sums, np.full_like(sums, odd)), -1)

        return predicts_next(model, feeds, Shown(logits))

    assert said(-np.inf, causal=True)
    assert not said(-np.inf, causal=False)
    for odd in (np.inf, np.nan):
        with pytest.raises(PassError, match=r"feed 1 .*'logits' has numbers that are not finite"):
            said(odd, causal=True)
    with pytest.raises(PassError, match="numbers that are not finite"):
        predicts_next(model, feeds, Shown(lambda ids: np.full((*ids.shape, 2), -np.inf)))


def test_objectives() -> None:
    language, plain = (
        module_of(text)
        for text in (LANGUAGE, "g (float[n, 2] x) => (float[n, 2] y) { y = Tanh(x) }")
    )

    def chosen(module: Any, loss: Any, taught: bool, causal: bool) -> tuple[str, Any, float]:
        found = choose_objective(module, loss, 0.25, 2.0, taught=taught, causal=causal)
        assert found.temperature == 2
        return found.told, found.outputs, found.weight

    both = ("0.75 cross-entropy + 0.25 kl", ("logits",), 0.25)
    assert chosen(language, "auto", True, True) == both
    assert chosen(language, "auto", True, False) == ("kl", ("logits",), 1.0)
    assert chosen(language, "auto", False, True) == ("cross-entropy", ("logits",), 0.0)
    assert chosen(language, "mse", True, False) == ("mse", ("logits", "z"), 1.0)
    assert chosen(plain, "auto", True, False) == ("mse", ("y",), 1.0)
    assert chosen(plain, "reverse-kl", True, False) == ("reverse-kl", ("y",), 1.0)
    for module, loss, words in (
        (plain, "auto", "no logits for the next token, and has no teacher"),
        (language, "cross-entropy", "no logits for the next token"),
        *((language, each, f"loss={each} needs a teacher") for each in ("kl", "reverse-kl", "mse")),
    ):
        with pytest.raises(PassError, match=words):
            chosen(module, loss, False, False)


def test_an_objective_mixes_and_masks() -> None:
    student, teacher = drawn(1, 4, 5), drawn(1, 4, 5, seed=1)
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 1, 1, 0]])
    tokens = TokenInputs("ids", "mask")
    objective = Objective("kl", ("logits",), "logits", tokens, 0.25, 2.0)
    found = objective({"logits": student}, {"ids": ids, "mask": mask}, {"logits": teacher.numpy()})
    own = mask[:, 1:]  # the first place is of a past
    wanted = 0.75 * next_token_loss(student, ids, own) + 0.25 * kl_divergence(
        teacher, student, 2.0, own
    )
    assert float(found) == pytest.approx(float(wanted))


def test_padding_counts_in_no_distance() -> None:
    """Of outputs with a row for each token; a row for each text has no padding."""
    ones = ", ".join(["1"] * 28)
    encoder = module_of(
        f"""g (int64[b, s] input_ids, int64[b, s] attention_mask)
        => (float[b, s, 4] states, float[b, 4] pooled)
        <float[7, 4] table = {{{ones}}}> {{ states = Gather(table, input_ids)
        axes = Constant<value = int64[1] {{1}}>() pooled = ReduceMean<keepdims = 0>(states, axes)
        f = Cast<to = 1>(attention_mask) }}"""
    )
    objective = choose_objective(encoder, "auto", 0.5, 1.0, taught=True, causal=False)
    assert objective.told == "mse"
    feed = {"input_ids": torch.tensor([[1, 2, 3], [4, 0, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}  # fmt: skip
    states, taught = drawn(2, 3, 4), drawn(2, 3, 4, seed=1)
    pooled, also = drawn(2, 4, seed=2), drawn(2, 4, seed=3)
    given = {"states": taught.numpy(), "pooled": also.numpy()}
    found = objective({"states": states, "pooled": pooled}, feed, given)
    kept = feed["attention_mask"].bool()
    wanted = mean_squares(taught[kept], states[kept]) + mean_squares(also, pooled)
    assert float(found) == pytest.approx(float(wanted))
    states[1, 1:] += 100
    assert float(objective({"states": states, "pooled": pooled}, feed, given)) == pytest.approx(
        float(wanted)
    )
    assert float(wanted) != pytest.approx(
        float(mean_squares(taught, drawn(2, 3, 4)) + mean_squares(also, pooled))
    )


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)])
def test_outputs_that_are_no_rows_for_tokens_have_no_padding(shape: tuple[int, ...]) -> None:
    """Of three axes the first two are those of tokens; of others that is not known."""
    objective = Objective("mse", ("y",), None, TokenInputs("ids", "mask"), 1.0)
    feed = {"ids": torch.tensor([[1, 2, 3], [4, 0, 0]]),
            "mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}  # fmt: skip
    student, teacher = drawn(*shape), drawn(*shape, seed=1)
    found = objective({"y": student}, feed, {"y": teacher.numpy()})
    assert float(found) == pytest.approx(float(mean_squares(teacher, student)))


def test_one_token_has_no_label() -> None:
    logits = drawn(1, 1, 5).requires_grad_()
    for mask in (None, torch.tensor([[1]])):
        loss = next_token_loss(logits, torch.tensor([[2]]), mask)
        assert loss.item() == 0
        loss.backward()
    objective = Objective("kl", ("logits",), "logits", TokenInputs("ids", None), 0.25)
    for length, labels in ((1, 0), (2, 2), (3, 4)):
        feed = {"ids": np.zeros((2, length), np.int64)}
        assert objective.positions(feed) == labels
        assert replace(objective, weight=1.0).positions(feed) == 2 * length
        assert replace(objective, tokens=None).positions(feed) == 1
    masked = replace(objective, tokens=TokenInputs("ids", "mask"))
    feed = {"ids": np.zeros((2, 3), np.int64), "mask": np.array([[1, 1, 0, 1], [1, 0, 1, 1]])}
    assert masked.positions(feed) == 1  # the first place is of a past
    assert replace(masked, weight=1.0).positions(feed) == 4


def test_outputs_of_other_shapes_are_not_broadcast() -> None:
    objective = Objective("mse", ("y",), None, None, 1.0)
    with pytest.raises(
        PassError, match=r"gives 'y' of shape \[2, 1\], the model of shape \[2, 4\]"
    ):
        objective({"y": drawn(2, 4)}, {}, {"y": np.ones((2, 1), np.float32)})


def test_a_teacher_is_fed_what_it_takes_and_asked_only_where_it_has_a_share() -> None:
    asked = []

    class Teacher:
        def run(self, feed: Any, outputs: Any = None) -> Any:
            asked.append((sorted(feed), outputs))
            return {"y": np.zeros((2, 3), np.float32)}

    feed = {"x": np.ones(1), "z": np.ones(1)}
    objective = Objective("mse", ("y",), None, None, 1.0)
    lesson = Lesson(objective, Teacher(), ("x", "unfed"))
    assert float(lesson.loss(feed)({"y": torch.ones(2, 3)}, {})) == 1
    assert asked == [(["x"], ("y",))]
    replace(lesson, objective=replace(objective, weight=0.0)).loss(feed)
    assert len(asked) == 1


def test_an_output_without_numbers_is_no_comparison() -> None:
    objective = Objective("mse", ("y",), None, None, 1.0)
    with pytest.raises(InputError, match="output 'y' is empty"):
        objective({"y": drawn(0, 4)}, {}, {"y": np.ones((0, 4), np.float32)})


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("float[n, 5] y", r"as float \[n,5\], the model as float \[n,4\]"),
        ("float[n] y", r"as float \[n\], the model"),
        ("int64[n, 4] y", "as int64"),
    ],
)
def test_teachers_of_other_shapes_are_refused(output: str, told: str) -> None:
    kinds = {"float": 1, "int64": 7}
    text = "g (float[n, 4] x) => (float[n, 4] y) { y = Identity(x) }"
    student = module_of(text)
    taught = module_of(text)
    (value,) = taught.graph.outputs
    kind, _, rest = output.partition("[")
    extents = rest.partition("]")[0].split(", ")
    value.dtype = ir.DataType(kinds[kind])
    value.shape = ir.Shape([int(each) if each.isdigit() else each for each in extents])
    with pytest.raises(PassError, match=told):
        check_teacher(taught, student)
    value.dtype, value.shape = ir.DataType.FLOAT16, ir.Shape(["m", "k"])
    assert check_teacher(taught, student) == ("x",)


def test_teachers_take_and_give_what_the_model_does() -> None:
    student = module_of("g (float[n] x, float[n] z) => (float[n] y) { y = Add(x, z) }")
    narrow = module_of("g (float[n] x) => (float[n] y) { y = Tanh(x) }")
    assert check_teacher(narrow, student) == ("x",)
    with pytest.raises(PassError, match="takes 'z', which is no input"):
        check_teacher(student, narrow)
    other = module_of("g (float[n] x) => (float[n] w) { w = Tanh(x) }")
    with pytest.raises(PassError, match="does not give 'y'"):
        check_teacher(other, student)
