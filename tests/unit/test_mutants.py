"""The faults of tools/bench/mutants.py: each fits the code once, and counts only on merit."""

from __future__ import annotations

import functools
import importlib.util
import io
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

RUN = subprocess.run
MUTANTS = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "bench" / "mutants.py"))


@pytest.mark.parametrize("mutation", MUTANTS["MUTATIONS"], ids=lambda each: each.name)
def test_a_fault_fits_the_code_once_and_compiles(mutation: Any) -> None:
    spec = importlib.util.find_spec(mutation.module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1
    compile(source.replace(mutation.old, mutation.new), spec.origin, "exec")


def test_there_are_enough_faults_and_names_are_their_own() -> None:
    names = [mutation.name for mutation in MUTANTS["MUTATIONS"]]
    assert len(names) >= 70
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("clause", "message", "counts"),
    [
        ("crash", "NameError: name 'ir' is not defined", False),
        ("crash", "AttributeError: 'NoneType' object has no attribute 'shape'", False),
        ("crash", "ModuleNotFoundError: No module named 'x'", False),
        ("crash", "IndexError: list index out of range", True),
        ("outputs", "output 'NameError' is off by 2", True),
    ],
)
def test_a_fault_that_does_not_run_is_not_found(clause: str, message: str, counts: bool) -> None:
    result = MUTANTS["on_merit"]({"found": True, "clause": clause, "message": message})
    assert result["found"] is counts
    assert result.get("error") == (None if counts else "the fault itself does not run")


@pytest.mark.parametrize("how", [[], ["--clean"]])
def test_words_that_choose_nothing_are_an_error(
    how: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mutants.py", "--only", "no such fault", *how])
    with pytest.raises(SystemExit) as caught:
        MUTANTS["main"]()
    assert caught.value.code == 2
    assert "--only: nothing has 'no such fault' in its name or pass" in capsys.readouterr().err


def test_faults_are_chosen_by_name_or_pass() -> None:
    choose, mutations = MUTANTS["choose"], MUTANTS["MUTATIONS"]
    assert choose(None) == list(mutations)
    by_pass = choose("fold-linear")
    assert {each.spec for each in mutations if "fold-linear" in each.spec} == {
        each.spec for each in by_pass if "fold-linear" in each.spec
    }
    assert len(by_pass) >= 2
    assert mutations[0] in choose(mutations[0].name)


def test_a_process_that_dies_in_silence_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(
        subprocess, "run", functools.partial(run_instead, [sys.executable, "-c", code])
    )
    result = MUTANTS["run_child"]([], 60.0)
    assert (result["found"], result["error"]) == (False, "exit -9")


def run_instead(command: list[str], asked: list[str], **settings: Any) -> Any:
    """Run one command in place of another."""
    return RUN(command, **settings)


def test_the_table_says_how_many_graphs_found_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = iter(
        [
            {"found": False, "graphs": 17, "changed": 3, "seconds": 40.0},
            {"found": False, "error": "exit -9", "seconds": 0.0},
        ]
    )
    monkeypatch.setitem(MUTANTS["run_mutants"].__globals__, "run_child", lambda *_: next(rows))
    written = io.StringIO()
    console = Console(file=written, width=200)
    MUTANTS["run_mutants"](list(MUTANTS["MUTATIONS"][:2]), 1, [], console)
    table = written.getvalue()
    assert "NOT FOUND on 17 graphs, 3 of them changed" in table
    assert "exit -9" in table
