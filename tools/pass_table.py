"""Writes lwc/pipeline/builtin.py: the built-in passes as data, from their classes.

python tools/pass_table.py
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

from lwc.pipeline.passes import Pass
from lwc.pipeline.registry import describe_pass

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


def main() -> int:
    infos = []
    for file in sorted((ROOT / "passes").glob("*/*.py")):
        if file.stem == "__init__":
            continue
        module = importlib.import_module(f"lwc.passes.{file.parent.name}.{file.stem}")
        infos.extend(
            describe_pass(value)
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, Pass)
            and not inspect.isabstract(value)
            and value.__module__ == module.__name__
        )
    infos.sort(key=lambda info: info.name)
    table = "".join(f"    {info!r},\n" for info in infos).replace(", positional=False", "")
    target = ROOT / "lwc" / "pipeline" / "builtin.py"
    target.write_text(f"{HEADER}BUILTIN: tuple[PassInfo, ...] = (\n{table})\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", str(target)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
