"""A lesson: an objective, and the teacher whose outputs it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lwc.calibration.inputs import fed_inputs
from lwc.core.errors import PassError

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
    """

    objective: Objective
    teacher: Runner | None = None
    inputs: tuple[str, ...] = ()

    def loss(self, feed: Feed) -> Loss:
        """Run the teacher on a feed, and return the loss on it."""
        taught: Mapping[str, Any] = {}
        if self.teacher is not None and self.objective.weight > 0:
            given = {name: feed[name] for name in self.inputs if name in feed}
            taught = self.teacher.run(given, self.objective.outputs)
        return lambda outputs, inputs: self.objective(outputs, inputs, taught)


def check_teacher(teacher: Module, student: Module) -> tuple[str, ...]:
    """Return the inputs that a teacher takes of the student's feeds.

    Raises:
        PassError: It needs other inputs, or lacks an output.
    """
    known = {value.name for value in student.graph.inputs}
    for value in fed_inputs(teacher):
        if value.name not in known:
            raise PassError(
                f"the teacher takes '{value.name}', which is no input of the model",
                remedy="give one of the same inputs, or teacher=none",
            )
    given = {value.name for value in teacher.graph.outputs}
    for value in student.graph.outputs:
        if value.name not in given:
            raise PassError(
                f"the teacher does not give '{value.name}', as the model does",
                remedy="give one of the same outputs, or teacher=none",
            )
    return tuple(value.name or "" for value in teacher.graph.inputs if value.name in known)
