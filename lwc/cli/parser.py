"""What the command lines of all programs have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from lwc.core.errors import UsageError

__all__ = ["Parser", "Version"]


class Parser(argparse.ArgumentParser):
    """Raises a UsageError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser`."""
        raise UsageError(message, remedy=f"{self.prog} --help lists the options")


class Version(argparse.Action):
    """Prints the program and its version, which is imported only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """See `argparse.Action`."""
        from lwc import __version__

        print(f"{parser.prog} {__version__}")
        parser.exit()
