"""The pytest plugin: a fixture that checks passes and keeps counterexamples with the test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from lwc.pipeline.passes import Pass
    from lwc.verify.contract.property import CheckReport

__all__ = ["PassChecker", "check_pass"]


class PassChecker(Protocol):
    """What the fixture gives: `lwc.verify.check_pass` with a folder for counterexamples."""

    def __call__(self, pass_: Pass | type[Pass], **settings: Any) -> CheckReport:
        """Check a pass; see `lwc.verify.check_pass`."""


@pytest.fixture
def check_pass(tmp_path: Path) -> PassChecker:
    """Return `lwc.verify.check_pass`; its counterexamples go into the test's own folder."""

    def check(pass_: Pass | type[Pass], **settings: Any) -> CheckReport:
        from lwc.verify.contract.property import check_pass

        return check_pass(pass_, **{"folder": tmp_path, **settings})

    return check
