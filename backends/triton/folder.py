"""The folder that code is emitted to: what lies in it, and whether it may be replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from lwc.core.errors import UsageError

__all__ = ["FORMAT", "MANIFEST", "check_folder", "files_in"]

MANIFEST = "manifest.json"
FORMAT = 2
"""Of the manifest."""

_CACHE = "__pycache__"
"""Python makes it where `model.py` is imported."""


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Check that nothing is lost where code is emitted to `folder`.

    It may be absent, empty, or have what its manifest says was emitted before, and nothing else.

    Raises:
        UsageError: It is a file, or has files that were not emitted.
    """
    place = Path(folder)
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise UsageError(f"cannot emit to '{place}': it is a file", remedy="name a folder")
    others = sorted(set(files_in(place)) - _emitted(place))
    if others:
        named = f"'{others[0]}'" + (f" and {len(others) - 1} more" if others[1:] else "")
        raise UsageError(
            f"cannot emit to '{place}': {named} in it would be lost",
            remedy="name a new folder, or move what was not emitted",
        )


def files_in(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it, but for Python's own caches."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in [*files, *links]:
            path = Path(place, name)
            if not _is_cache(path):
                yield path.relative_to(folder).as_posix()


def _is_cache(path: Path) -> bool:
    """Tell whether Python made a file, and makes it anew: from a module that is there."""
    source = path.parent.parent / f"{path.name.partition('.')[0]}.py"
    return path.parent.name == _CACHE and path.suffix == ".pyc" and source.is_file()


def _emitted(folder: Path) -> set[str]:
    """Return what the manifest of a folder lists; nothing where it has none of lwc's."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return set()
    listed = manifest.get("files")
    if "lwc" not in manifest or not isinstance(listed, list):
        return set()
    return {MANIFEST, *(name for name in listed if isinstance(name, str))}
