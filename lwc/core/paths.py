"""Folders outside the project that lwc uses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return where lwc keeps what it can make again: `$LWC_CACHE`, or the platform's folder."""
    chosen = os.environ.get("LWC_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lwc"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "lwc"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lwc"
