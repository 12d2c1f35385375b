"""Fixtures shared by the whole suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fetch_models
import pytest


@pytest.fixture(scope="session")
def model_file() -> Callable[[str], Path]:
    """Return a function from a model's name to its path, fetched on first use."""
    return fetch_models.model_path
