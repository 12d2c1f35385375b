#!/usr/bin/env python3
"""Runs a page of the documentation: its files, commands and what they print.

tools/run_page.py docs/writing_a_pass.md            print where the page and its commands differ
tools/run_page.py docs/writing_a_pass.md --write    write what the commands print into the page

A fenced block's first word says what is done with it, a second one is a file's name:

* `console`: lines that begin with `$ ` are run, a `\\` at the end continues them, and the lines
  that follow are what they print. A line `…` stands for any number of lines. `console sample`
  compares less strictly: names, numbers and shapes may be others.
* `python FILE`, `text FILE`, `toml FILE`: the file is written.
* `diff FILE`: the lines of the file that begin with `-` are replaced by those with `+`.
* `python`: a script that must run through.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Page", "PageError"]

HOME = "/home/me/swish"
"""What the page shows in the place of the folder it is run in."""

_BLOCK = re.compile(r"^```(\w+)(?: ([^\n]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ANY = "…"
_SECONDS = 300

_VARIES = [
    (re.compile(r"\d+(\.\d+)? (s|ms|µs)\b"), "0 s"),
    (re.compile(r"\d+(\.\d+)?s\b( \(\d+:\d+:\d+\))?"), "0s"),
    (re.compile(r"(within|of its bound,?) [\d.]+(e[-+]?\d+)?"), r"\1 0"),
    (re.compile(r"-[0-9a-f]{8}\."), "-0."),
]
_SAMPLE = [
    (re.compile(r"%?\b[a-z]+(_?\d+|_lwc\d+)+\b|%\w+"), "v"),
    (re.compile(r"[a-z]+_node"), "v"),
    (re.compile(r"\[[^\]]*\]"), "[]"),
    (re.compile(r"-?\d[\d.,]*(e[-+]?\d+)?"), "0"),
    (re.compile(r" *(\[\]|# v)"), ""),
]


class PageError(AssertionError):
    """A page does not say what is."""


@dataclass
class Page:
    """A page and the folder in which it is run.

    Attributes:
        path: The page.
        folder: Where its files are written and its commands run.
        environment: Of the commands.
        write: Put what the commands print into the page instead of comparing.
        differences: Where the page shows something else than was printed.
    """

    path: Path
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    write: bool = False
    differences: list[str] = field(default_factory=list)
    _status: int = 0

    def run(self) -> None:
        """Run every block in order.

        Raises:
            PageError: A block cannot be carried out, or the page shows what is not printed.
        """
        text = self.path.read_text(encoding="utf-8")
        made, end = [], 0
        for block in _BLOCK.finditer(text):
            kind, word, body = block.groups()
            line = text.count("\n", 0, block.start()) + 1
            made += [text[end : block.start(3)], self._block(kind, word, body, line)]
            end = block.end(3)
        if self.write:
            self.path.write_text("".join(made) + text[end:], encoding="utf-8")
        elif self.differences:
            raise PageError("\n".join(self.differences))

    def _block(self, kind: str, word: str | None, body: str, line: int) -> str:
        place = f"{self.path.name}:{line}"
        if kind == "console":
            return self._console(body, word == "sample", place)
        if kind == "diff" and word:
            self._patch(self.folder / word, body, place)
        elif word:
            file = self.folder / word
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(body, encoding="utf-8")
        elif kind == "python":
            done = self._call([sys.executable, "-c", body])
            if done.returncode:
                raise PageError(f"{place}: the script fails:\n{done.stdout}")
        return body

    def _console(self, body: str, sample: bool, place: str) -> str:
        lines = []
        for command, shown in _commands(body):
            script = f"(exit {self._status})\n" + command
            done = self._call(["bash", "-c", script])
            self._status = done.returncode
            printed = done.stdout.replace(str(self.folder), HOME).rstrip().splitlines()
            lines += [f"$ {command}", *_with_gaps(shown, printed)]
            if not self.write and not _agree(shown, printed, sample):
                wanted, got = "\n".join(shown), "\n".join(printed)
                self.differences.append(
                    f"{place}: $ {command}\n--- the page shows\n{wanted}\n--- printed\n{got}\n"
                )
        return "".join(f"{each}\n" for each in lines)

    def _call(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
        # A machine that was measured before would show predicted times, too.
        environment["LWC_CACHE"] = str(self.folder / ".cache")
        return subprocess.run(
            words,
            cwd=self.folder,
            env={**environment, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=_SECONDS,
            check=False,
        )

    @staticmethod
    def _patch(file: Path, body: str, place: str) -> None:
        lines = body.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if not line.startswith("+"))
        new = "".join(line[1:] for line in lines if not line.startswith("-"))
        text = file.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise PageError(f"{place}: the lines to change are not in {file.name}, or not once")
        file.write_text(text.replace(old, new), encoding="utf-8")


def _commands(body: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of a console block with the lines shown below each."""
    command, shown = "", list[str]()
    for line in body.splitlines():
        if command.endswith("\\"):
            command += f"\n{line}"
        elif line.startswith("$ "):
            if command:
                yield command, shown
            command, shown = line[2:], []
        else:
            shown.append(line)
    if command:
        yield command, shown


def _agree(shown: list[str], printed: list[str], sample: bool) -> bool:
    """Tell whether the lines on a page are those printed, where `…` stands for any lines."""
    parts = [""]
    for line in shown:
        if line.strip() == _ANY:
            parts.append("")
        else:
            parts[-1] += f"{_settled(line, sample)}\n"
    pattern = "(?:.*\n)*".join(re.escape(part) for part in parts)
    return (
        re.fullmatch(pattern, "".join(f"{_settled(each, sample)}\n" for each in printed))
        is not None
    )


def _settled(line: str, sample: bool) -> str:
    for pattern, text in [*_VARIES, *(_SAMPLE if sample else [])]:
        line = pattern.sub(text, line)
    return line.rstrip()


def _with_gaps(shown: list[str], printed: list[str]) -> list[str]:
    """Return what was printed, left out where the page leaves out the beginning or the end."""
    if _ANY not in shown:
        return printed
    if shown == [_ANY]:  # Not written yet: an error begins with the last line that is not indented.
        starts = [n for n, line in enumerate(printed) if not line.startswith(" ")]
        return [_ANY, *printed[starts[-1] if starts else 0 :]]
    first, last = shown[0] == _ANY, shown[-1] == _ANY
    kept = len(shown) - first - last
    if _ANY in shown[1:-1] or not kept:
        return shown
    if first and last:
        return shown
    return [_ANY, *printed[-kept:]] if first else [*printed[:kept], _ANY]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a page of the documentation.")
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true", help="write what is printed into the page")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            Page(options.page.absolute(), Path(folder).resolve(), write=options.write).run()
        except PageError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
