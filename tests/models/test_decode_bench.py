"""The benchmark of text generation: contenders run the same model, and one that fails is told."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from bench import decode
from bench.decode import Contender, Field, Turn, equal_tokens, measure, summarize
from bench.decode_models import Source, open_source, prompt_tokens
from bench.decode_peers import Absent, place
from fetch_models import model_path

NOTHING = Source(Path("none.gguf"), Path("none"))


def turn(first: float, rate: float, *tokens: int, peak: int = 0) -> Turn:
    return Turn(first, rate, tokens, peak)


def test_a_turn_is_timed_from_the_prompt_and_from_the_first_token() -> None:
    answer = {"tokens": [5, 6, 7], "seconds": [0.5, 0.75, 1.0], "peak": 9}
    assert Turn.of(answer) == turn(0.5, 4.0, 5, 6, 7, peak=9)
    assert Turn.of({"tokens": [5], "seconds": [0.5], "peak": 9}).rate == 0


@pytest.mark.parametrize(
    ("found", "count"), [([1, 2, 3], 3), ([1, 9, 3], 1), ([9, 2, 3], 0), ([1, 2], 2)]
)
def test_tokens_count_up_to_the_first_that_differs(found: list[int], count: int) -> None:
    assert equal_tokens(found, [1, 2, 3]) == count


def test_ratios_compare_the_same_round() -> None:
    timed = {
        "onnxruntime": [turn(1.0, 10.0, 1, 2), turn(2.0, 5.0, 1, 2), turn(4.0, 8.0, 1, 2)],
        "lwc-4bit": [turn(0.5, 40.0, 1, 2), turn(0.5, 10.0, 1, 2), turn(0.5, 16.0, 1, 3)],
    }
    warm = {name: [turn(9.0, 1.0, 1, 2, peak=7)] for name in timed}
    base, ours = summarize(8, timed, warm, "onnxruntime", [1, 2])
    assert base["prefill_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert ours["prefill_ratio"] == {"median": 4.0, "low": 2.0, "high": 8.0}
    assert ours["decode_ratio"] == {"median": 2.0, "low": 2.0, "high": 4.0}
    assert ours["prefill_per_second"] == 16
    assert (ours["equal_tokens"], ours["tokens"], ours["peak_bytes"]) == (1, 2, 7)


def test_a_contender_that_stopped_short_has_no_ratio() -> None:
    timed = {"onnxruntime": [turn(1.0, 10.0, 1, 2)] * 2, "lwc-4bit": [turn(1.0, 10.0, 1, 2)]}
    warm = {name: [turn(1.0, 1.0, 1, 2)] for name in timed}
    _, ours = summarize(8, timed, warm, "onnxruntime", [1, 2])
    assert ours["decode_ratio"] is None


def test_a_contender_without_its_peer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(lambda source, module: place(module).folder, module="no_such_runtime")
    absent = Contender("no_such_runtime", "onnxruntime", make)
    monkeypatch.setitem(decode.CONTENDERS, "absent", absent)
    entered = Field()
    entered.enter("absent", NOTHING, 1, 8)
    assert entered.skipped == {
        "absent": "no_such_runtime is not installed: run with --install-peers"
    }
    with pytest.raises(Absent):
        place("no_such_runtime")
    with pytest.raises(SystemExit, match="no contender"):
        entered.base("absent")


def test_a_model_that_does_not_load_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty = Contender("onnxruntime", "onnxruntime", lambda source: tmp_path)
    monkeypatch.setitem(decode.CONTENDERS, "empty", empty)
    entered = Field()
    entered.enter("empty", NOTHING, 1, 8)
    assert "model.onnx" in entered.skipped["empty"]
    assert not entered.players


@pytest.mark.models
@pytest.mark.slow
def test_contenders_in_float32_say_the_same() -> None:
    source = open_source(model_path("smollm2"), layers=2)
    prompt = prompt_tokens(source, model_path("lee"), 24)
    exact = [name for name, contender in decode.CONTENDERS.items() if contender.float32]
    entered = Field()
    try:
        for name in [*exact, "genai-int4-tuned", "lwc-8bit"]:
            entered.enter(name, source, 1, 40)
        assert set(entered.skipped) <= {"llama-f32"}  # compiled on request only
        assert entered.reference() == "pytorch"
        timed, warm = measure(entered, prompt, 12, 1)
        rows = summarize(len(prompt), timed, warm, "pytorch", warm["pytorch"][0].tokens)
    finally:
        entered.close()
    assert len(rows) == len(entered.versions)
    assert all(row["tokens"] == 12 for row in rows)
    equal = {row["contender"]: row["equal_tokens"] for row in rows if row["float32"]}
    assert set(equal.values()) == {12}, equal
    assert all(row["peak_bytes"] > 1e8 and row["decode_ratio"]["median"] > 0 for row in rows)
