"""A lesson: an objective, and the teacher whose outputs it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lwc.calibration.inputs import fed_inputs
from lwc.core.errors import LwcError, PassError

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.gradients import Loss
    from lwc.pipeline.passes import Feed, Runner
    from lwc.train.objective import Objective

__all__ = ["Lesson", "check_teacher"]


@dataclass(frozen=True)
class Lesson:
    """What a module is to learn.

    Attributes:
        objective: The loss.
        teacher: Runs the teacher, or None.
        inputs: What the teacher is fed.
        file: Where the teacher comes from.
    """

    objective: Objective
    teacher: Runner | None = None
    inputs: tuple[str, ...] = ()
    file: str | None = None

    def loss(self, feed: Feed) -> Loss:
        """Run the teacher on a feed, and return the loss on it.

        Raises:
            LwcError: The teacher cannot be run on it; the loss raises `PassError` where outputs
                have other shapes than the teacher's. Both name its file.
        """
        taught: Mapping[str, Any] = {}
        if self.teacher is not None and self.objective.weight > 0:
            given = {name: feed[name] for name in self.inputs if name in feed}
            try:
                taught = self.teacher.run(given, self.objective.outputs)
            except LwcError as error:
                error.message = f"the teacher: {error.message}"
                raise

        def compared(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
            try:
                return self.objective(outputs, inputs, taught)
            except PassError as error:
                error.file = self.file
                raise

        return compared


def check_teacher(teacher: Module, student: Module) -> tuple[str, ...]:
    """Return the inputs that a teacher takes of the student's feeds.

    Raises:
        PassError: It needs other inputs, or gives other outputs: by name, type, or an extent that
            both state.
    """
    named = f"the teacher '{teacher.source.path}'" if teacher.source.path else "the teacher"
    known = {value.name for value in student.graph.inputs}
    for value in fed_inputs(teacher):
        if value.name not in known:
            raise PassError(
                f"{named} takes '{value.name}', which is no input of the model",
                remedy="give one of the same inputs, or teacher=none",
            )
    given = {value.name: value for value in teacher.graph.outputs}
    for value in student.graph.outputs:
        taught = given.get(value.name)
        if taught is None:
            wrong = f"does not give '{value.name}', as the model does"
        elif not _may_agree(taught, value):
            wrong = f"gives '{value.name}' as {_told(taught)}, the model as {_told(value)}"
        else:
            continue
        raise PassError(f"{named} {wrong}", remedy="give one of the same outputs, or teacher=none")
    return tuple(value.name or "" for value in teacher.graph.inputs if value.name in known)


def _may_agree(one: ir.Value, other: ir.Value) -> bool:
    """Tell whether two values may have the same shape and be numbers of one kind."""
    floats = [each.dtype.is_floating_point() for each in (one, other) if each.dtype is not None]
    if len(set(floats)) > 1:
        return False
    if one.shape is None or other.shape is None:
        return True
    return len(one.shape) == len(other.shape) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int))
        for a, b in zip(one.shape, other.shape, strict=True)
    )


def _told(value: ir.Value) -> str:
    kind = "any type" if value.dtype is None else value.dtype.name.lower()
    return kind if value.shape is None else f"{kind} {value.shape}"
