"""Text as tokens arrive: no half characters, and nothing that may begin a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

__all__ = ["Decode", "Detokenizer", "StopStrings"]

Decode: TypeAlias = Callable[[Sequence[int]], str]
"""Turns token ids into text, without special tokens."""

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 32
"""Tokens after which bytes that make no character are given as they are."""


class Detokenizer:
    """Turns tokens into pieces of text, one after the other.

    The text of a token depends on those before it, and a character may lie in several tokens, so
    the last tokens are decoded again with each new one. What ends in an incomplete character is
    held back until it is complete.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._whole = 0  # tokens whose text was given as a whole
        self._given = 0  # characters given of the text of `_tokens`

    def add(self, token: int) -> str:
        """Return the text that is certain with this token; it may be empty."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        certain = text.rstrip(_BROKEN)
        if len(self._tokens) - self._whole > _LONGEST:
            certain = text
        piece = certain[self._given :]
        self._given = max(self._given, len(certain))
        if len(certain) == len(text):
            self._tokens = self._tokens[self._whole :]
            self._whole = len(self._tokens)
            self._given = len(self._decode(self._tokens))
        return piece

    def end(self) -> str:
        """Return what was held back."""
        return self._decode(self._tokens)[self._given :]


class StopStrings:
    """Holds back text that may be the beginning of a stop string, and ends before one.

    The first to be complete counts, so that it does not matter in what pieces the text comes.

    Attributes:
        found: The stop string that was found.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [each for each in strings if each]
        self._held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """Return the text that is certain; nothing once a stop string was found."""
        if self.found is not None:
            return ""
        self._held += text
        places = [
            (at + len(each), at, each)
            for each in self._strings
            if (at := self._held.find(each)) >= 0
        ]
        if places:
            _, at, self.found = min(places)
            certain, self._held = self._held[:at], ""
            return certain
        keep = max((_beginning(self._held, each) for each in self._strings), default=0)
        at = len(self._held) - keep
        certain, self._held = self._held[:at], self._held[at:]
        return certain

    def end(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str, string: str) -> int:
    """Return how many of the last characters of `text` begin `string`."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
