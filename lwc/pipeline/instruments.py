"""Instruments: what watches a pipeline without being part of any pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, TextIO

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import Pass
    from lwc.pipeline.record import PassRecord, PipelineRecord

__all__ = ["History", "Instrument", "IrPrinter", "StatisticsPrinter", "TimingPrinter"]


class Instrument:
    """Does nothing at every point of a run; subclasses override the points they need.

    Class attributes:
        needs_copy: Whether `on_error` needs the module as it was before the failing pass.
    """

    needs_copy: ClassVar[bool] = False

    def before_pipeline(self, module: Module, passes: Sequence[Pass]) -> None:
        """Called once, before the first pass."""

    def before_pass(self, pass_: Pass, module: Module, index: int) -> None:
        """Called before each pass; `index` counts from 0."""

    def after_pass(self, pass_: Pass, module: Module, record: PassRecord) -> None:
        """Called after each pass that succeeded and was verified."""

    def on_error(
        self, pass_: Pass, before: Module | None, rest: Sequence[Pass], error: BaseException
    ) -> None:
        """Called when a pass or its verification failed.

        Args:
            pass_: The pass.
            before: The module before it, if any instrument or the manager asked for a copy.
            rest: The failing pass and those after it.
            error: What was raised; it is raised on after this call.
        """

    def after_pipeline(self, record: PipelineRecord) -> None:
        """Called once, after the last pass."""


class History(Instrument):
    """Keeps the module at every point of a run; the copies share their weights.

    Attributes:
        passes: The passes of the run.
        modules: The input, then the module after each pass that ended; one that changed nothing
            repeats the module before it.
        failure: What ended the run, if it did not reach its end; the last of `modules` is then
            the module before the pass that failed.
    """

    def __init__(self) -> None:
        self.passes: Sequence[Pass] = ()
        self.modules: list[Module] = []
        self.failure: BaseException | None = None

    def before_pipeline(self, module: Module, passes: Sequence[Pass]) -> None:
        """Keep the input."""
        self.passes = tuple(passes)
        self.modules = [module.clone()]

    def after_pass(self, pass_: Pass, module: Module, record: PassRecord) -> None:
        """Keep the result."""
        self.modules.append(module.clone() if record.changed else self.modules[-1])

    def on_error(
        self, pass_: Pass, before: Module | None, rest: Sequence[Pass], error: BaseException
    ) -> None:
        """Keep the error."""
        self.failure = error


class IrPrinter(Instrument):
    """Prints the module's text around passes.

    Args:
        stream: Where to print.
        before: Names of the passes to print before.
        after: Names of the passes to print after.
        after_all: Print after every pass.
        after_change: Print after every pass that changed the module.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        before: Collection[str] = (),
        after: Collection[str] = (),
        after_all: bool = False,
        after_change: bool = False,
    ) -> None:
        self._stream = stream
        self._before = before
        self._after = after
        self._after_all = after_all
        self._after_change = after_change

    def before_pass(self, pass_: Pass, module: Module, index: int) -> None:
        """Print the module where asked."""
        if pass_.name in self._before:
            self._print(f"before {pass_.name}", module)

    def after_pass(self, pass_: Pass, module: Module, record: PassRecord) -> None:
        """Print the module where asked."""
        if self._after_all or pass_.name in self._after:
            self._print(f"after {pass_.name}", module)
        elif self._after_change and record.changed:
            self._print(f"after {pass_.name}, which changed it", module)

    def _print(self, when: str, module: Module) -> None:
        self._stream.write(f"// module {when}\n{str(module).rstrip()}\n\n")


class TimingPrinter(Instrument):
    """Prints how long each pass and its verification took."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def after_pipeline(self, record: PipelineRecord) -> None:
        """Print the table; what is in no line is reading fingerprints and the first check."""
        rows = [(each.name, each.seconds, each.verify_seconds) for each in record.passes]
        known = sum(seconds + verify for _, seconds, verify in rows)
        width = max([len(name) for name, _, _ in rows] + [len("(before)")])
        write = self._stream.write
        write(f"{'pass':<{width}}  {'run s':>9}  {'verify s':>9}\n")
        write(f"{'(before)':<{width}}  {'':>9}  {max(record.seconds - known, 0.0):>9.3f}\n")
        for name, seconds, verify in rows:
            write(f"{name:<{width}}  {seconds:>9.3f}  {verify:>9.3f}\n")
        write(f"{'total':<{width}}  {record.seconds:>9.3f}\n")


class StatisticsPrinter(Instrument):
    """Prints the statistics of each pass and its rewrites by rule."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def after_pipeline(self, record: PipelineRecord) -> None:
        """Print one block for each pass."""
        for each in record.passes:
            self._stream.write(f"{each.spec}\n")
            rows = {f"rewrites {rule}".rstrip(): count for rule, count in each.rewrites.items()}
            for name, value in (*rows.items(), *each.statistics.items()):
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                self._stream.write(f"  {shown:>12}  {name}\n")
            if not rows and not each.statistics:
                self._stream.write("  no statistics\n")
