"""Analyses: facts about a module, built on demand and dropped when a pass invalidates them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["Analysis", "AnalysisManager"]


class Analysis(ABC):
    """A fact about a whole module. It never changes the module."""

    @classmethod
    @abstractmethod
    def build(cls, module: Module, analyses: AnalysisManager) -> Self:
        """Compute the analysis; other analyses it needs come from `analyses`."""

    @classmethod
    def requires(cls) -> tuple[type[Analysis], ...]:
        """Name the analyses this one is built from: dropping one of them drops this one too."""
        return ()

    def differs_from(self, other: Self) -> str | None:
        """Name one fact in which two analyses of the same module differ; None if there is none.

        The check of what a pass claims to preserve rests on it. An analysis that defines neither
        this nor `__eq__` cannot be preserved.
        """
        if type(self).__eq__ is object.__eq__:
            return "it cannot be compared with one built anew (it defines no differs_from)"
        return None if self == other else "it is not equal to one built anew"


AnalysisT = TypeVar("AnalysisT", bound=Analysis)


class AnalysisManager:
    """Builds and caches the analyses of one module."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._cache: dict[type[Analysis], Analysis] = {}

    def get(self, kind: type[AnalysisT]) -> AnalysisT:
        """Return the analysis, built now unless it is cached."""
        found = self._cache.get(kind)
        if found is None:
            found = kind.build(self.module, self)
            self._cache[kind] = found
        assert isinstance(found, kind)
        return found

    def cached(self) -> dict[type[Analysis], Analysis]:
        """Return the analyses that are built, in the order in which they were."""
        return dict(self._cache)

    def keep(self, analysis: Analysis) -> None:
        """Take an analysis of this module that was built elsewhere."""
        self._cache[type(analysis)] = analysis

    def surviving(self, preserved: Iterable[type[Analysis]]) -> dict[type[Analysis], Analysis]:
        """Return the cached analyses that are in `preserved` and rest on none that is not."""
        kept = set(preserved)
        return {
            kind: analysis
            for kind, analysis in self._cache.items()
            if kind in kept and all(base in kept for base in kind.requires())
        }

    def invalidate(self, preserved: Iterable[type[Analysis]] = ()) -> None:
        """Drop every analysis that is not in `preserved` or rests on one that is not."""
        self._cache = self.surviving(preserved)
