"""Fixtures shared by the whole suite."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import fetch_models  # type: ignore[import-not-found,unused-ignore]  # noqa: E402


@pytest.fixture(scope="session")
def model_file() -> Callable[[str], Path]:
    """Return a function from a model's name to its path, fetched on first use."""
    return fetch_models.model_path  # type: ignore[no-any-return,unused-ignore]
