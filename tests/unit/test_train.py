"""Losses, objectives and the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch
from support import module_of

from lwc.analysis.manager import AnalysisManager
from lwc.calibration.checkpoint import CheckpointFolder, Trail
from lwc.core.errors import InputError, PassError
from lwc.pipeline.passes import PassContext
from lwc.train.lesson import check_teacher
from lwc.train.loop import Schedule, train
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

SILENT = PassContext(
    AnalysisManager(module_of("g (float[1] x) => (float[1] y) { y = Tanh(x) }"))
).progress
NOTHING = Trail(None, "", lambda _: None)


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
    assert float(mean_squares(1e3 * teacher, 1e3 * student)) == pytest.approx(wanted)
    assert float(mean_squares(torch.zeros(2), torch.tensor([1.0, 1.0]))) == 1


@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    distance=st.floats(2.0, 3.0),
    side=st.sampled_from([-1, 1]),
    seed=st.integers(0, 1000),
)
def test_forward_kl_covers_both_modes_and_reverse_kl_picks_one(
    distance: float, side: int, seed: int
) -> None:
    """The best single bell for a teacher of two: wide across both, or narrow on one of them."""
    places = torch.linspace(-10, 10, 201, dtype=torch.float64)
    bells = [-((places - mode) ** 2) / (2 * 0.5**2) for mode in (-distance, distance)]
    teacher = torch.logsumexp(torch.stack(bells), 0)
    found = {}
    for loss in (kl_divergence, reverse_kl_divergence):
        start = 0.5 * side * distance + 0.1 * np.random.default_rng(seed).normal()
        centre = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
        spread = torch.nn.Parameter(torch.tensor([-0.7], dtype=torch.float64))

        def backward(_: int, factor: float, loss: Any = loss, own: Any = (centre, spread)) -> float:
            student = -((places - own[0]) ** 2) / (2 * own[1].exp() ** 2)
            value = loss(teacher, student)
            (value * factor).backward()
            return float(value.detach())

        schedule = Schedule(steps=150, batch=1, learning_rate=0.08, clip=10.0)
        train(
            {"centre": centre, "spread": spread}, backward, [1], schedule,
            trail=NOTHING, progress=SILENT,
        )  # fmt: skip
        found[loss.__name__] = (float(centre.detach()), float(spread.detach().exp()))
    centre_, spread_ = found["kl_divergence"]
    # The moments of both bells together: mean 0, variance distance² + 0.25.
    assert abs(centre_) < 0.15 * distance
    assert spread_ == pytest.approx((distance**2 + 0.25) ** 0.5, rel=0.1)
    centre_, spread_ = found["reverse_kl_divergence"]
    assert centre_ == pytest.approx(side * distance, rel=0.1)
    assert spread_ == pytest.approx(0.5, rel=0.2)


def test_schedule_rises_falls_and_draws_every_feed_once_an_epoch() -> None:
    schedule = Schedule(steps=20, batch=3, learning_rate=1.0, seed=3)
    factors = [schedule.factor(step) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert 0 < factors[-1] < 0.02
    seen = [feed for step in range(20) for feed in schedule.feeds(step, 6)]
    epochs = [seen[start : start + 6] for start in range(0, 60, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    assert seen == [feed for step in range(20) for feed in schedule.feeds(step, 6)]
    assert Schedule(1, 1, 1.0).factor(0) == 1


def problem(
    start: Any = None,
) -> tuple[dict[str, torch.nn.Parameter], Callable[[int, float], float]]:
    """Least squares of eight feeds."""
    x, wanted = drawn(8, 5, 3), drawn(8, 5, 2, seed=1)
    weight = torch.nn.Parameter(drawn(3, 2, seed=2) if start is None else start)

    def backward(index: int, factor: float) -> float:
        loss = (x[index] @ weight - wanted[index]).square().mean()
        (loss * factor).backward()
        return float(loss.detach())

    return {"weight": weight}, backward


def test_a_step_is_that_of_adamw_on_the_mean_gradient() -> None:
    parameters, backward = problem()
    train(
        parameters, backward, range(8), Schedule(1, 8, 0.1, weight_decay=0.1),
        trail=NOTHING, progress=SILENT,
    )  # fmt: skip
    twin, backward = problem()
    optimizer = torch.optim.AdamW(twin.values(), lr=0.1, weight_decay=0.1)
    for index in range(8):
        backward(index, 1 / 8)
    torch.nn.utils.clip_grad_norm_(twin.values(), 1.0)
    optimizer.step()
    torch.testing.assert_close(parameters["weight"], twin["weight"], rtol=1e-12, atol=0)


def test_masked_entries_stay() -> None:
    start = drawn(3, 2, seed=2)
    mask = torch.tensor([[1.0], [0.0], [1.0]])
    parameters, backward = problem(start.clone())
    losses = train(
        parameters, backward, range(8), Schedule(30, 2, 0.1),
        trail=NOTHING, progress=SILENT, masks={"weight": mask},
    )  # fmt: skip
    assert torch.equal(parameters["weight"][1], start[1])
    assert not torch.any(parameters["weight"][0] == start[0])
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


@pytest.mark.parametrize("killed", [1, 7, 19, 20])
def test_killed_and_resumed_it_ends_at_the_same_bits(killed: int, tmp_path: Path) -> None:
    schedule = Schedule(20, 3, 0.05, weight_decay=0.01)
    whole, backward = problem()
    train(whole, backward, range(8), schedule, trail=NOTHING, progress=SILENT)

    class Killed(BaseException):
        pass

    def trail() -> Trail:
        return Trail(CheckpointFolder(tmp_path / "kept"), "state", lambda _: None)

    parameters, plain = problem()
    calls = 0

    def dying(index: int, factor: float) -> float:
        nonlocal calls
        calls += 1
        if calls > 3 * killed:
            raise Killed
        return plain(index, factor)

    if killed < 20:
        with pytest.raises(Killed):
            train(parameters, dying, range(8), schedule, trail=trail(), progress=SILENT)
    else:
        train(parameters, plain, range(8), schedule, trail=trail(), progress=SILENT)
    # Kept after every second step, each time in the place of the one before.
    assert len(list((tmp_path / "kept").iterdir())) == min(1, killed // 2)
    again, backward = problem()
    losses = train(again, backward, range(8), schedule, trail=trail(), progress=SILENT)
    assert len(losses) == 20 - killed // 2 * 2
    assert torch.equal(again["weight"], whole["weight"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_an_error_that_names_the_step(where: str) -> None:
    parameters, plain = problem()
    calls = 0

    def backward(index: int, factor: float) -> float:
        nonlocal calls
        calls += 1
        loss = plain(index, factor)
        if calls == 4 and where == "gradient":
            gradient = parameters["weight"].grad
            assert gradient is not None
            gradient[0, 0] = float("inf")
        return float("nan") if calls == 4 and where == "loss" else loss

    schedule = Schedule(5, 2, 0.1)
    seen = schedule.feeds(1, 8)  # one of them is the feed in which a loss is not finite
    told = f"feed {seen[1] if where == 'loss' else ', '.join(map(str, sorted(seen)))} of"
    with pytest.raises(
        PassError, match=f"{where} is no finite number at step 2, on {told}.*learning-rate"
    ):
        train(parameters, backward, range(8), schedule, trail=NOTHING, progress=SILENT)


def test_before_any_update_no_learning_rate_is_to_blame() -> None:
    parameters, plain = problem()

    def backward(number: int, factor: float) -> float:
        return plain(number - 10, factor) * float("inf")

    (first,) = Schedule(5, 1, 0.1).feeds(0, 8)
    told = f"the loss is no finite number at step 1, on feed {first + 10} of"
    with pytest.raises(PassError, match=told) as caught:
        train(parameters, backward, range(10, 18), Schedule(5, 1, 0.1), trail=NOTHING,
              progress=SILENT)  # fmt: skip
    assert "nothing was updated yet" in str(caught.value)
    assert "learning-rate" not in str(caught.value)


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
        (language, "kl", "loss=kl needs a teacher"),
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
    assert not objective.teaches({"ids": np.zeros((1, 1), np.int64)})
    assert objective.teaches({"ids": np.zeros((1, 2), np.int64)})
    assert replace(objective, weight=1.0).teaches({"ids": np.zeros((1, 1), np.int64)})


def test_outputs_of_other_shapes_are_not_broadcast() -> None:
    objective = Objective("mse", ("y",), None, None, 1.0)
    with pytest.raises(
        PassError, match=r"gives 'y' of shape \[2, 1\], the model of shape \[2, 4\]"
    ):
        objective({"y": drawn(2, 4)}, {}, {"y": np.ones((2, 1), np.float32)})


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
