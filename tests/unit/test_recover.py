"""recover: training on calibration data, by adapters and by weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

import torch
from recovering import (
    WHEN,
    WIDTH,
    WORDS,
    judged,
    language,
    numbers,
    recovered,
    teacher_in,
    texts,
    weight,
)
from support import run_plain

import lwc
from lwc.cli.opt import main
from lwc.core.errors import PassError
from lwc.frontend.onnx_writer import save
from lwc.optimizer import RunSettings, make_context
from lwc.passes.training.recover import Recover
from lwc.passes.training.recovery import _worse
from lwc.rewrite import RewriteLimit
from lwc.train import loop

ROOT = Path(__file__).parents[2]


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


def test_what_gives_nearly_the_same_is_still_a_teacher() -> None:
    """Eight bits are wrong by a half of 1/127 of the largest weight of a block at most."""
    steps = "quantize-weights{bits=8 block-size=16 embeddings=none},recover{rank=4 steps=2}"
    result = lwc.optimize(language(), steps, calibration=texts(), threads=1)
    assert result.record.passes[-1].statistics["loss"] == "0.5 cross-entropy + 0.5 kl"


def test_a_module_that_gives_the_same_is_no_teacher() -> None:
    module = language()
    result = lwc.optimize(
        module, "fold-linear,add-lora{rank=2},recover{steps=2}", calibration=texts(), threads=1
    )
    assert "on every feed, so it is no teacher" in " ".join(
        r.message for r in result.record.passes[-1].remarks
    )
    assert result.record.passes[-1].statistics["loss"] == "cross-entropy"


def test_a_first_feed_of_one_repeated_token_changes_no_objective(tmp_path: Path) -> None:
    teacher = teacher_in(tmp_path)
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


def test_the_loop_gets_what_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW hides by how much gradients are multiplied, and most of the rest."""
    seen: list[Any] = []

    def spy(
        parameters: dict[str, torch.nn.Parameter],
        backward: Callable[[int, float], float],
        feeds: list[int],
        schedule: loop.Schedule,
        **_: object,
    ) -> list[float]:
        taken = []
        for factor in (1.0, 0.5):
            backward(feeds[0], factor)
            taken.append([each.grad for each in parameters.values()])
            for each in parameters.values():
                each.grad = None
        for whole, half in zip(*taken, strict=True):
            torch.testing.assert_close(half, whole / 2)
        seen.append((feeds, schedule))
        return []

    monkeypatch.setattr(loop, "train", spy)
    for options, feeds, wanted in (
        ("rank=4", 5, (100, 1, 1e-3)),
        ("rank=4 steps=7 batch=3 learning-rate=0.2 held-out=0.25", 4, (7, 3, 0.2)),
        ("method=full held-out=0.99", 1, (100, 1, 1e-5)),
    ):
        _, found, _ = recovered(language(), options, seed=9)
        assert seen.pop() == (list(range(1, feeds + 1)), loop.Schedule(*wanted, seed=9))
        assert (found["feeds trained on"], found["feeds held out"]) == (feeds, 6 - feeds)


@pytest.mark.parametrize("rate", ["30", "1e9"])
def test_worse_is_refused(rate: str, tmp_path: Path) -> None:
    options = f"rank=4 steps=30 learning-rate={rate}"
    module, found, told = recovered(language(), options, resume=tmp_path / "kept")
    assert not found["held-out loss after"] < found["held-out loss before"]
    (words,) = re.findall(r"missed: (the held-out loss did not fall.*)", told)
    assert ", as training diverged: " in words
    assert f"the module stays as it is (lower learning-rate={float(rate):g})" in words
    assert "applied" not in told  # not even of the adapters that the copy got
    assert "missed: no adapter: it gives a number for each token" in told
    assert set(module.graph.initializers) == {"table", "up", "down", "head"}
    assert np.array_equal(weight(module, "up"), weight(language(), "up"))
    _, found, told = recovered(language(), options, resume=tmp_path / "kept")
    assert found["training resumed"] == 30
    assert "as training diverged" in told
    assert "the training loss ended" not in told  # no step was taken in this run


@pytest.mark.parametrize(
    ("before", "after", "ended", "words"),
    [
        (1.0, 2.1, 2.1, "as training diverged"),
        (1.0, 2.1, None, "as training diverged"),
        (1.0, float("nan"), float("nan"), "as training diverged"),
        (1.0, 2.1, 1.9, "give more data"),
        (1.0, 2.1, 0.0, "give more data"),
        (1.0, 1.9, 2.1, "give more data"),
        (1e-5, 1.9e-5, 1e-5, "give more data"),
        (1e-7, 1.0, 1.0, "nothing to learn"),
    ],
)
def test_advice_where_nothing_was_gained(
    before: float, after: float, ended: float | None, words: str
) -> None:
    """A loss has diverged that doubled on both; nothing is to learn where outputs are the same."""
    assert words in _worse(before, after, ended, 0.1)


def test_what_is_learned_by_heart_has_not_diverged() -> None:
    drawn = np.random.default_rng(0)
    noise = [{"ids": drawn.integers(0, WORDS, (1, 8))} for _ in range(3)]
    _, found, told = recovered(language(), "rank=8 steps=150 learning-rate=1e-2", data=noise)
    (ended,) = re.findall(r"where the training loss ended at (\S+);", told)
    assert float(ended) < found["held-out loss before"] < found["held-out loss after"]
    assert "diverged" not in told
    assert "as it is (give more data, or other steps and learning-rate than 0.01)" in told


def test_a_teacher_that_gives_the_same_has_nothing_to_teach(tmp_path: Path) -> None:
    """As the file that adapters were added to; AdamW makes steps even of rounding."""
    options = f"rank=4 steps=9 kd-weight=1 teacher={teacher_in(tmp_path)}"
    _, found, told = recovered(language(), options)
    assert found["held-out loss before"] < 1e-6 < found["held-out loss after"]
    assert "diverged" not in told
    assert "as it is (there was nothing to learn: see whether teacher= is the right file)" in told


@pytest.mark.parametrize(
    ("rate", "allowed", "done"), [(1e-2, 0, 0), (1e-2, None, 1), (30.0, None, 0)]
)
def test_training_is_one_rewrite_or_none_where_it_did_not_help(
    rate: float, allowed: int | None, done: int
) -> None:
    module = language()
    ctx = replace(
        make_context(module, RunSettings(threads=1)),
        calibration=lambda _: texts(),
        limit=RewriteLimit(allowed),
    )
    assert Recover(rank=4, steps=9, learning_rate=rate).run(module, ctx).changed == bool(done)
    assert ctx.limit.count == done


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


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = teacher_in(tmp_path)
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
        what = r" \(kl\)" if figure == "loss" else ""
        line = rf", held-out {figure} (\S+) -> (\S+){what}, "
        (found,) = re.findall(line, capsys.readouterr().err)
        figures = json.loads(report.read_text())["passes"][0]["statistics"]
        assert found == tuple(f"{figures[f'held-out {figure} {when}']:.4g}" for when in WHEN)
        if figure == "perplexity":
            assert np.log(float(found[1])) == pytest.approx(
                figures["held-out loss after"], rel=1e-3
            )


def test_the_page_runs() -> None:
    script, page = ROOT / "tools" / "run_page.py", ROOT / "docs" / "training.md"
    subprocess.run([sys.executable, script, page], check=True, capture_output=True)
