"""Errors a user can act on: one line with the place, the fact and the remedy."""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "InputError",
    "LwcError",
    "MissingExtraError",
    "PassError",
    "RequirementError",
    "Terminated",
    "UsageError",
    "VerificationError",
    "one_line",
]


class LwcError(Exception):
    """An expected failure, printed as one line without a traceback.

    Args:
        message: What is wrong, as a fact.
        file: The file it was found in.
        node: The node it was found at, as `describe` of `lwc.core.diagnostics` names it.
        remedy: What the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        node: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.node = node
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [part for part in (self.file, self.node, self.message) if part]
        text = ": ".join(parts)
        text = f"{text} ({self.remedy})" if self.remedy else text
        return " ".join(text.split("\n")) if self.single_line else text

    single_line: ClassVar[bool] = True


class Terminated(SystemExit):
    """The program was told to end; unlike the SystemExit of a pass, it goes all the way up."""


class UsageError(LwcError):
    """The command, a pipeline or an option is spelled wrong.

    Args:
        message: What is wrong.
        text: The text that was being read; printed under the message.
        position: Index in `text` that the caret points at.
        remedy: What the user can do about it, such as the nearest known name.
    """

    exit_code = 2
    single_line = False

    def __init__(
        self,
        message: str,
        *,
        text: str | None = None,
        position: int | None = None,
        remedy: str | None = None,
        file: object = None,
    ) -> None:
        super().__init__(message, remedy=remedy, file=file)
        self.text = text
        self.position = position

    def __str__(self) -> str:
        line = super().__str__()
        if self.text is None or self.position is None:
            return line
        before = self.text[: self.position].rpartition("\n")[2]
        shown = before + self.text[self.position :].partition("\n")[0]
        return f"{line}\n  {shown}\n  {' ' * len(before)}^"


class InputError(LwcError):
    """A file cannot be read as a model, a text or a set of feeds."""

    exit_code = 2


class MissingExtraError(LwcError):
    """A feature needs an optional dependency that is not installed."""

    exit_code = 2

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs an optional dependency",
            remedy=f"pip install -e '.[{extra}]' in a clone of lwc",
        )


class PassError(LwcError):
    """A pass could not do its work; the module is as it was before the pass."""


class VerificationError(LwcError):
    """A module is malformed, or a pass did not keep what its contract promises."""

    single_line = False


class RequirementError(LwcError):
    """A required match, target or budget was missed."""

    exit_code = 3


def one_line(error: BaseException) -> str:
    """Describe an unexpected exception in one line: its type and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
