"""lwc-opt: passes over a model, from the command line.

Nothing heavy is imported before the arguments are read: `--help` and `--list-passes` stay fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lwc.cli.arguments import PROGRAM, parse_arguments
from lwc.cli.guard import guarded

if TYPE_CHECKING:
    import argparse

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(PROGRAM, lambda: _run(words), debug="--debug" in words)


def _run(words: Sequence[str]) -> int:
    options = parse_arguments(words)
    from lwc.pipeline.registry import default_registry

    registry = default_registry()
    for plugin in options.load_pass_plugin:
        registry.load_plugin(plugin)
    if options.list_passes:
        from lwc.cli.listing import list_passes

        print(list_passes(registry.infos(), options.list_passes))
        return 0
    return _act(options)


def _act(options: argparse.Namespace) -> int:
    from lwc.cli.session import Session

    session = Session(options)
    if options.plan:
        return session.plan()
    if options.explain:
        return session.explain()
    if options.bisect:
        return session.bisect()
    if options.reduce:
        return session.reduce()
    if options.check_contract:
        return session.check_contract()
    return session.optimize()


if __name__ == "__main__":
    sys.exit(main())
