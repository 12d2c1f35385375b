"""The faults of tools/bench/mutations.py: each fits the code once, and counts only on merit."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest

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
