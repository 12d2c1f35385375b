"""What every executable checks before it runs: the feed, and the names of outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lwc.calibration.inputs import misfit, wanted
from lwc.core.errors import LwcError

if TYPE_CHECKING:
    import onnx_ir as ir

    from lwc.pipeline.passes import Feed

__all__ = ["check_array", "check_feed", "check_outputs"]


def check_feed(inputs: Mapping[str, ir.Value], feed: Feed, file: str | None) -> None:
    """Check that a feed has the inputs of a model and nothing else.

    Args:
        inputs: The graph inputs by name; those with a default value may be left out.
        feed: Arrays by name.
        file: The model's, for messages.

    Raises:
        LwcError: It does not; the message names the input and what would fit.
    """
    for name in feed:
        if name not in inputs:
            raise LwcError(
                f"the feed has '{name}', which is no input",
                file=file,
                remedy=f"the inputs are {', '.join(inputs)}",
            )
    for name, value in inputs.items():
        if name in feed:
            check_array(value, feed[name], file)
        elif value.const_value is None:
            raise LwcError(
                f"the feed lacks input '{name}'", file=file, remedy=f"it is {wanted(value)}"
            )


def check_array(value: ir.Value, array: object, file: str | None) -> None:
    """Check that an input takes an array.

    Raises:
        LwcError: Its type or shape does not fit.
    """
    wrong = misfit(value, array)
    if wrong is not None:
        raise LwcError(
            f"input '{value.name}' was fed an array {wrong}",
            file=file,
            remedy=f"feed {wanted(value)}",
        )


def check_outputs(names: Iterable[str], known: Sequence[str], file: str | None) -> None:
    """Check that all names are outputs.

    Raises:
        LwcError: One is not.
    """
    for name in names:
        if name not in known:
            raise LwcError(
                f"'{name}' is no output of the compiled module",
                file=file,
                remedy="name it in expose= when compiling",
            )
