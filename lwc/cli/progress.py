"""Progress on the terminal: shown only where a run takes longer than two seconds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any

from lwc.pipeline.instruments import Instrument

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from lwc.core.module import Module
    from lwc.pipeline.passes import Description, Pass

__all__ = ["ProgressDisplay"]


class ProgressDisplay(Instrument):
    """Shows on stderr the running phase or pass, and how far its long loop is.

    It is an instrument of the pipeline and the `Progress` that passes use.

    Args:
        enabled: Whether to show anything at all.
        delay: Seconds into a phase before anything is shown.
    """

    def __init__(self, *, enabled: bool, delay: float = 2.0) -> None:
        self._enabled = enabled
        self._delay = delay
        self._lock = threading.Lock()
        self._active = False
        self._bars: Bars | None = None
        self._main: TaskID | None = None
        self._label = ""

    @contextlib.contextmanager
    def phase(self, label: str) -> Iterator[Callable[[str], None]]:
        """Start the clock of a phase; nothing of it is left on the screen afterwards.

        What the block gets changes the label.
        """
        self._rename(label)
        self._active = self._enabled
        timer = threading.Timer(self._delay, self._show)
        timer.daemon = True
        if self._enabled:
            timer.start()
        try:
            yield self._rename
        finally:
            timer.cancel()
            with self._lock:
                self._active = False
                if self._bars is not None:
                    self._bars.stop()
                    self._bars = None

    def before_pass(self, pass_: Pass, module: Module, index: int) -> None:
        """Name the running pass."""
        self._rename(pass_.name)

    def track(
        self, items: Iterable[Any], description: Description, total: int | None = None
    ) -> Iterator[Any]:
        """Yield from `items`, with a bar once the display is on."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        bars: Bars | None = None
        task: TaskID | None = None
        for done, item in enumerate(items):
            yield item
            text = description if isinstance(description, str) else description()
            if task is None and self._bars is not None:
                bars = self._bars
                task = bars.add_task(text, total=total)
            if bars is not None and task is not None:
                bars.update(task, completed=done + 1, description=text)
        if bars is not None and task is not None:
            bars.remove_task(task)

    def _rename(self, label: str) -> None:
        with self._lock:
            self._label = label
            if self._bars is not None and self._main is not None:
                self._bars.update(self._main, description=label)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        with self._lock:
            if not self._active:
                return
            bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._main = bars.add_task(self._label, total=None)
            bars.start()
            self._bars = bars
