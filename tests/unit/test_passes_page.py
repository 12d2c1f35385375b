"""docs/passes.md says what the classes of the passes say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pass_table import builtin_passes, passes_page
from support import Idle

from lwc.pipeline.builtin import BUILTIN
from lwc.pipeline.passes import Approximate

PAGE = Path(__file__).parents[2] / "docs" / "passes.md"


@dataclass(frozen=True)
class Approach(Idle):
    """Approach it.

    Attributes:
        how: Either `a|b`.
        steps: How often.
    """

    name: ClassVar[str] = "approach"
    contract: ClassVar[Approximate] = Approximate(1e-3, 0.5, assumptions=("x is small.",))
    positional: ClassVar[str] = "how"
    changes_again: ClassVar[str] = "it comes nearer each time."
    never_more: ClassVar[frozenset[str]] = frozenset({"parameter-bytes", "nodes"})

    how: str
    steps: tuple[int, ...] = ()


def test_the_page_is_up_to_date() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == passes_page(builtin_passes()), "run tools/pass_table.py"


def test_every_pass_is_on_the_page() -> None:
    assert [cls.name for cls in builtin_passes()] == [info.name for info in BUILTIN]


def test_what_an_entry_says() -> None:
    _, entry = passes_page([Approach]).split("## approach\n")
    assert entry.splitlines() == [
        "",
        "Approach it.",
        "",
        "- Contract: approximate (within rtol 0.001, atol 0.5).",
        "- Assumes, where granted: x is small.",
        "- Never increases: nodes, parameter bytes.",
        "- A second run may change the result again: it comes nearer each time.",
        "",
        "| option | type | default | |",
        "|---|---|---|---|",
        "| `how`, or first without its name | str | required | Either `a\\|b`. |",
        "| `steps` | list of int | empty | How often. |",
    ]
