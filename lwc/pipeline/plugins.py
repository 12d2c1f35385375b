"""Importing what other people wrote: every failure is one line that says where."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from lwc.core.errors import LwcError, Terminated, UsageError
from lwc.core.extensions import extends_lwc, noting_import
from lwc.pipeline.pass_class import FILE_PLUGIN
from lwc.pipeline.passes import Pass

__all__ = ["import_installed", "import_plugin", "import_trouble", "passes_of"]

_DECORATED = (
    "a function with op of lwc.backends.fx.registry, or with kernel of "
    "lwc.backends.triton.lowerings.registry"
)


def import_plugin(name: str) -> ModuleType:
    """Import a module by name, or a `.py` file.

    A file becomes a module under a name of its own, made from its path: one called `json.py`
    hides no other module, and files of one name in two folders are two plugins.

    Raises:
        UsageError: It cannot be imported.
    """
    try:
        if name.endswith(".py"):
            return _import_file(Path(name))
        with noting_import(name):
            return importlib.import_module(name)
    except (LwcError, Terminated):
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"plugin '{name}' cannot be imported: {import_trouble(error)}") from error


@functools.cache
def import_installed(group: str) -> None:
    """Import, once, the modules that installed packages name under a group of entry points.

    Raises:
        UsageError: One cannot be imported, or registers no operator and no kernel.
    """
    for point in importlib.metadata.entry_points(group=group):
        owner = "" if point.dist is None else f" of package '{point.dist.name}'"
        what = f"entry point '{point.name}' in {group}{owner}"
        try:
            with noting_import(point.module):
                importlib.import_module(point.module)
        except (LwcError, Terminated):
            raise
        except (Exception, SystemExit) as error:
            raise UsageError(f"{what} cannot be imported: {import_trouble(error)}") from error
        if not extends_lwc(point.module):
            raise UsageError(
                f"{what}: {point.module} defines no operator and no kernel",
                remedy=f"decorate {_DECORATED}",
            )


def _import_file(path: Path) -> ModuleType:
    path = path.absolute()
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    name = f"{FILE_PLUGIN}{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up to read its annotations.
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        with noting_import(name):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    return module


def import_trouble(error: BaseException) -> str:
    """Describe in one line what an import raised, with the file and line of the culprit."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {kind}: {error.msg}"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, SystemExit):
        reason = f"it ends the program with {error.code!r}"
    reason = " ".join(reason.split())
    place = _place(error)
    if place is None:
        return reason or kind
    return f"{place}: {kind}: {reason}" if reason else f"{place}: {kind}"


def _place(error: BaseException) -> str | None:
    """Return the innermost line of the imported code on the way to an error, if there is one.

    Frames of libraries below it are left out: the user can change the plugin.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen ")
        and Path(frame.filename).parent
        not in (Path(__file__).parent, Path(importlib.__file__).parent)
    ]
    if not frames:
        return None
    first = Path(frames[0].filename)
    own = [
        frame
        for frame in frames
        if frame.filename == str(first)
        or (first.name == "__init__.py" and first.parent in Path(frame.filename).parents)
    ]
    return f"{own[-1].filename}:{own[-1].lineno}"


def passes_of(module: ModuleType, name: str) -> list[type[Pass]]:
    """Return the classes of a plugin that are meant as passes, in the order of their definition.

    Classes that it imports from elsewhere are not its passes, nor are bases: abstract classes
    without a name. One that registers operators or kernels need not have any.

    Raises:
        UsageError: There are none, and nothing else is registered.
    """
    own = [
        value
        for value in dict.fromkeys(v for v in vars(module).values() if isinstance(v, type))
        if f"{value.__module__}.".startswith(f"{module.__name__}.")
    ]
    found = [
        cls
        for cls in own
        if issubclass(cls, Pass)
        and not (getattr(cls, "__abstractmethods__", ()) and not hasattr(cls, "name"))
    ]
    if found or extends_lwc(module.__name__):
        return found
    for cls in own:
        if callable(getattr(cls, "run", None)):
            raise UsageError(
                f"plugin '{name}' defines no pass: its class {cls.__qualname__} has a run method "
                "but is no Pass",
                remedy="derive it from lwc.Pass",
            )
    raise UsageError(
        f"plugin '{name}' defines no pass, no operator and no kernel",
        remedy=f"derive a class from lwc.Pass, or decorate {_DECORATED}",
    )
