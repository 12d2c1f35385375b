"""What paths mean: lwc's cache folder, and targets that are folders."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["cache_folder", "is_folder_target"]


def is_folder_target(path: str) -> bool:
    """Say whether a path to write to stands for a folder: it ends in a slash or is one."""
    return path.endswith(("/", os.sep)) or os.path.isdir(path)


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
