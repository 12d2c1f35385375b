"""Checks that a module is well formed, that a pass kept its meaning, and that it always does.

`check_pass` and `passes_hold` check a pass on graphs that hypothesis draws; `FeedSpec` describes
the inputs they may have; `sketches`, `Motif` and `Sketch` make other graphs. Attributes load on
first use: hypothesis is an extra, and most runs of lwc need none of this.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lwc.calibration.feeds import FeedSpec
    from lwc.core.errors import VerificationError
    from lwc.verify.contract.clauses import (
        ContractOutcome,
        ContractSettings,
        ContractViolation,
        check_contract,
    )
    from lwc.verify.contract.counterexample import Counterexample
    from lwc.verify.contract.property import CheckReport, PassBrokenError, check_pass, passes_hold
    from lwc.verify.generate.default import graphs_for
    from lwc.verify.generate.grammar import GRAMMAR
    from lwc.verify.generate.motifs import MOTIFS
    from lwc.verify.generate.near_misses import with_near_misses
    from lwc.verify.generate.patterns import matching
    from lwc.verify.generate.sketch import Motif, Sketch, sketches
    from lwc.verify.numeric.comparer import NumericReport, compare
    from lwc.verify.reduction.reduce import reduce_module
    from lwc.verify.structure.types import verify_types
    from lwc.verify.structure.well_formed import verify_structure

_HOME = {
    "CheckReport": "lwc.verify.contract.property",
    "ContractOutcome": "lwc.verify.contract.clauses",
    "ContractSettings": "lwc.verify.contract.clauses",
    "ContractViolation": "lwc.verify.contract.clauses",
    "Counterexample": "lwc.verify.contract.counterexample",
    "FeedSpec": "lwc.calibration.feeds",
    "GRAMMAR": "lwc.verify.generate.grammar",
    "MOTIFS": "lwc.verify.generate.motifs",
    "Motif": "lwc.verify.generate.sketch",
    "NumericReport": "lwc.verify.numeric.comparer",
    "PassBrokenError": "lwc.verify.contract.property",
    "Sketch": "lwc.verify.generate.sketch",
    "VerificationError": "lwc.core.errors",
    "check_contract": "lwc.verify.contract.clauses",
    "check_pass": "lwc.verify.contract.property",
    "compare": "lwc.verify.numeric.comparer",
    "graphs_for": "lwc.verify.generate.default",
    "matching": "lwc.verify.generate.patterns",
    "passes_hold": "lwc.verify.contract.property",
    "reduce_module": "lwc.verify.reduction.reduce",
    "sketches": "lwc.verify.generate.sketch",
    "verify_structure": "lwc.verify.structure.well_formed",
    "verify_types": "lwc.verify.structure.types",
    "with_near_misses": "lwc.verify.generate.near_misses",
}

__all__ = [
    "GRAMMAR",
    "MOTIFS",
    "CheckReport",
    "ContractOutcome",
    "ContractSettings",
    "ContractViolation",
    "Counterexample",
    "FeedSpec",
    "Motif",
    "NumericReport",
    "PassBrokenError",
    "Sketch",
    "VerificationError",
    "check_contract",
    "check_pass",
    "compare",
    "graphs_for",
    "matching",
    "passes_hold",
    "reduce_module",
    "sketches",
    "verify_structure",
    "verify_types",
    "with_near_misses",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'lwc.verify' has no attribute '{name}'")
    try:
        return getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        from lwc.core.errors import MissingExtraError

        raise MissingExtraError(f"lwc.verify.{name}", "verify") from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
