"""Are the analyses that a pass claims to preserve what they would be if built anew?"""

from __future__ import annotations

from collections.abc import Iterable

from lwc.analysis.manager import Analysis, AnalysisManager
from lwc.core.errors import VerificationError

__all__ = ["verify_preserved"]


def verify_preserved(analyses: AnalysisManager, preserved: Iterable[type[Analysis]]) -> None:
    """Build each analysis that would be kept anew, and compare.

    An analysis rests on those it requires, so they come first, and it is built on the cached
    ones: they have been found equal by then, and share its symbols. What is not cached costs
    nothing, and nothing is put into the cache.

    Args:
        analyses: The analyses as the pass left them.
        preserved: What the pass claims to preserve.

    Raises:
        VerificationError: An analysis differs; it is named, with one fact.
    """
    kept = analyses.surviving(preserved)
    scratch = AnalysisManager(analyses.module)
    for kind in _bases_first(kept):
        difference = kept[kind].differs_from(kind.build(analyses.module, scratch))
        if difference is not None:
            raise VerificationError(
                f"it claims to preserve {kind.__name__}, but {difference}",
                file=analyses.module.source.path,
            )
        scratch.keep(kept[kind])


def _bases_first(kinds: Iterable[type[Analysis]]) -> list[type[Analysis]]:
    """Order analyses so that each comes after those that it requires."""
    left, ordered = list(kinds), list[type[Analysis]]()
    while left:
        ready = next(
            (kind for kind in left if not any(base in left for base in kind.requires())), left[0]
        )
        left.remove(ready)
        ordered.append(ready)
    return ordered
