"""The check of `--bisect`: it keeps what could not be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lwc.verify.numeric.comparer import Comparer

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import Contract

__all__ = ["OutputCheck"]


class OutputCheck:
    """Compares the outputs of two modules on ONNX Runtime.

    Args:
        seed: Seed of the feeds.
        threads: Threads of one operator.
    """

    def __init__(self, *, seed: int, threads: int | None) -> None:
        self._comparer = Comparer(seed=seed, threads=threads)
        self._compared = 0
        self._skipped: list[str] = []

    def __call__(self, before: Module, after: Module, contract: Contract) -> str:
        """Return why the outputs were not compared, or nothing.

        Raises:
            VerificationError: They differ by more than `contract` allows.
        """
        reason = self._comparer(before, after, contract).skipped
        if reason is None:
            self._compared += 1
            return ""
        self._skipped.append(reason)
        return reason

    def agreement(self) -> str:
        """Say that nothing differed, as far as outputs were compared."""
        if not self._skipped:
            return "the outputs agree after every pass"
        reasons = "; ".join(dict.fromkeys(self._skipped))
        if not self._compared:
            return f"outputs not compared: {reasons}"
        return f"the outputs agree where they were compared; not everywhere: {reasons}"
