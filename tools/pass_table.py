"""Writes what is known of the built-in passes, from their classes.

That is lwc/pipeline/builtin.py, the table that lists them, and docs/passes.md, the page.

python tools/pass_table.py
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lwc.pipeline.passes import Approximate, Lossy, Pass
from lwc.pipeline.registry import OptionInfo, describe_pass

__all__ = ["builtin_passes", "passes_page"]

ROOT = Path(__file__).parents[1]

HEADER = '''\
"""The built-in passes as data, so that listing them imports none of them.

Written by tools/pass_table.py; a test compares it with the classes.
"""

# ruff: noqa: E501

from __future__ import annotations

from lwc.pipeline.registry import OptionInfo, PassInfo

__all__ = ["BUILTIN"]

'''

INTRODUCTION = """\
# Passes

The passes that come with lwc. `lwc-opt --list-passes` lists these and those of installed packages.
[pipeline_syntax.md](pipeline_syntax.md) tells how pipelines are written,
[writing_a_pass.md](writing_a_pass.md) what a contract means.

This page is written by `tools/pass_table.py`.
"""


def builtin_passes() -> list[type[Pass]]:
    """Return every pass of the folder `passes`, by name."""
    found: list[type[Pass]] = []
    for file in sorted((ROOT / "passes").glob("*/*.py")):
        if file.stem == "__init__":
            continue
        module = importlib.import_module(f"lwc.passes.{file.parent.name}.{file.stem}")
        found += [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, Pass)
            and not inspect.isabstract(value)
            and value.__module__ == module.__name__
        ]
    return sorted(found, key=lambda cls: cls.name)


def passes_page(passes: list[type[Pass]]) -> str:
    """Return the page that documents passes: summary, contract, options."""
    lines = [INTRODUCTION]
    for cls in passes:
        info = describe_pass(cls)
        area = re.match(r"lwc\.passes\.(\w+)", cls.__module__)
        title = info.summary if area is None else f"{info.summary} *({area[1]})*"
        lines += [f"## {info.name}\n", f"{title}\n", *_promises(cls)]
        if info.options:
            lines += ["", "| option | type | default | |", "|---|---|---|---|"]
            lines += [_row(option) for option in info.options]
        lines.append("")
    return "\n".join(lines)


def _promises(cls: type[Pass]) -> Iterator[str]:
    contract = cls.contract
    text = type(contract).__name__.lower()
    if isinstance(contract, Approximate):
        text += f" (within rtol {contract.rtol:g}, atol {contract.atol:g})"
    elif isinstance(contract, Lossy) and contract.noise is not None:
        text += f" (no worse than a relative change of {contract.noise:g} in every weight)"
    yield f"- Contract: {text}."
    for assumption in contract.assumptions:
        yield f"- Assumes, where granted: {assumption.rstrip('.')}."
    if cls.never_more:
        measures = ", ".join(each.replace("-", " ") for each in sorted(cls.never_more))
        yield f"- Never increases: {measures}."
    if cls.changes_again is not None:
        yield f"- A second run may change the result again: {cls.changes_again.rstrip('.')}."


def _row(option: OptionInfo) -> str:
    name = "any name" if option.name == "*" else f"`{option.name}`"
    if option.positional:
        name += ", or first without its name"
    default = "required" if option.default is None else f"`{option.default}`"
    if not option.default and option.default is not None:
        default = "none" if option.name == "*" else "empty"
    return f"| {name} | {_cell(option.type)} | {default} | {_cell(option.help)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    passes = builtin_passes()
    infos = [describe_pass(cls) for cls in passes]
    table = "".join(f"    {info!r},\n" for info in infos).replace(", positional=False", "")
    target = ROOT / "lwc" / "pipeline" / "builtin.py"
    target.write_text(f"{HEADER}BUILTIN: tuple[PassInfo, ...] = (\n{table})\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", str(target)], check=True)
    (ROOT / "docs" / "passes.md").write_text(passes_page(passes), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
