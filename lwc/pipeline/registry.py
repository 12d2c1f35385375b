"""Which passes exist: a static table, the entry points `lwc.passes`, and plugins.

Nothing here imports a pass before it is asked for by name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lwc.core.errors import LwcError, UsageError
from lwc.pipeline.grammar import Place, print_scalar
from lwc.pipeline.options import (
    did_you_mean,
    format_value,
    free_value_type,
    options_of,
    type_name,
)
from lwc.pipeline.passes import Pass

__all__ = ["OptionInfo", "PassInfo", "Registry", "default_registry", "describe_pass"]

ENTRY_POINTS = "lwc.passes"


@dataclass(frozen=True)
class OptionInfo:
    """One option, for people.

    Attributes:
        name: The kebab-case name; `*` for the free options.
        type: What a value looks like, such as `int` or `4|8`.
        default: The default as written in a pipeline, or None where it must be given.
        help: What it means; from the docstring of the class.
        positional: Whether it may come first without its name.
    """

    name: str
    type: str
    default: str | None
    help: str = ""
    positional: bool = False


@dataclass(frozen=True)
class PassInfo:
    """One pass, for people and for loading it.

    Attributes:
        name: The kebab-case name.
        target: Where the class is: `module:Class`.
        summary: One line.
        contract: `exact`, `approximate` or `lossy`; empty where the pass is not loaded yet.
        options: The options in the order of the fields.
    """

    name: str
    target: str
    summary: str
    contract: str = ""
    options: tuple[OptionInfo, ...] = ()


class Registry:
    """Finds passes by name.

    Args:
        builtin: The passes of the static table.
        entry_points: Whether to look for passes of installed packages.
    """

    def __init__(self, builtin: tuple[PassInfo, ...] = (), *, entry_points: bool = False) -> None:
        self._infos = {info.name: info for info in builtin}
        self._classes: dict[str, type[Pass]] = {}
        self._search = entry_points

    def infos(self) -> list[PassInfo]:
        """List every known pass by name; passes of other packages are not imported."""
        self._find_entry_points()
        return [self._infos[name] for name in sorted(self._infos)]

    def load(self, name: str, place: Place | None = None) -> type[Pass]:
        """Return the class of a pass.

        Args:
            name: Its kebab-case name.
            place: Where the name was written, for the error.

        Raises:
            UsageError: No pass has that name, or its module does not give it.
        """
        place = place or Place()
        found = self._classes.get(name)
        if found is not None:
            return found
        if name not in self._infos:
            self._find_entry_points()
        info = self._infos.get(name)
        if info is None:
            remedy = did_you_mean(name, self._infos) or "lwc-opt --list-passes shows what there is"
            raise place.error(f"unknown pass '{name}'", remedy)
        cls = _import_class(info, place)
        self._classes[name] = cls
        return cls

    def add(self, cls: type[Pass]) -> None:
        """Make a class known under its name.

        Raises:
            UsageError: It is no pass, or another pass has its name.
        """
        _check_class(cls)
        known = self._infos.get(cls.name)
        if known is not None and known.target != _target(cls):
            raise UsageError(
                f"two passes are named '{cls.name}': {known.target} and {_target(cls)}"
            )
        self._infos[cls.name] = describe_pass(cls)
        self._classes[cls.name] = cls

    def load_plugin(self, name: str) -> list[type[Pass]]:
        """Import a module, or a `.py` file, and add every pass it defines.

        Raises:
            UsageError: It cannot be imported or defines no pass.
        """
        module = _import_plugin(name)
        found = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, Pass)
            and not inspect.isabstract(value)
            and f"{value.__module__}.".startswith(f"{module.__name__}.")
        ]
        if not found:
            raise UsageError(f"plugin '{name}' defines no pass")
        for cls in found:
            self.add(cls)
        return found

    def _find_entry_points(self) -> None:
        if not self._search:
            return
        self._search = False
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
            origin = point.dist.name if point.dist is not None else point.module
            known = self._infos.get(point.name)
            if known is not None and known.target != point.value:
                raise UsageError(
                    f"two passes are named '{point.name}': {known.target} and {point.value} "
                    f"of package '{origin}'",
                    remedy="uninstall one of the packages",
                )
            self._infos.setdefault(
                point.name, PassInfo(point.name, point.value, f"(of package '{origin}')")
            )


@functools.cache
def default_registry() -> Registry:
    """Return the registry of built-in and installed passes."""
    from lwc.pipeline.builtin import BUILTIN

    return Registry(BUILTIN, entry_points=True)


def describe_pass(cls: type[Pass]) -> PassInfo:
    """Read a pass class into the form of the static table."""
    doc = inspect.getdoc(cls) or ""
    helps = _attribute_docs(doc)
    options = []
    for option in options_of(cls):
        text = helps.get(option.field, "")
        if option.field == cls.free_options:
            options.append(OptionInfo("*", type_name(free_value_type(option.type)), "", text))
            continue
        default = None
        if not option.required:
            default = ",".join(map(print_scalar, format_value(option.type, option.default)))
        first = option.field == cls.positional
        options.append(OptionInfo(option.name, type_name(option.type), default, text, first))
    contract = type(cls.contract).__name__.lower()
    return PassInfo(cls.name, _target(cls), doc.partition("\n")[0], contract, tuple(options))


def _attribute_docs(doc: str) -> dict[str, str]:
    """Read the `Attributes:` section of a docstring: one text for each field."""
    section = re.search(r"^Attributes:\n((?:[ ].*\n?|\n)*)", doc, re.MULTILINE)
    if section is None:
        return {}
    items = re.findall(r"^ {4}(\w+): ((?:.*)(?:\n {5,}.*)*)", section[1], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}


def _target(cls: type[Pass]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _check_class(cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise UsageError(f"{cls!r} is not a Pass")
    if "__dataclass_fields__" not in vars(cls) and _adds_fields(cls):
        raise UsageError(f"{_target(cls)} is not a dataclass")
    if inspect.isabstract(cls) or not isinstance(getattr(cls, "name", None), str):
        raise UsageError(f"{_target(cls)} lacks a name or a run method")


def _adds_fields(cls: type) -> bool:
    """Tell whether a class annotates fields of its own: without any it inherits its bases'."""
    return any(
        "ClassVar" not in str(each) for each in vars(cls).get("__annotations__", {}).values()
    )


def _import_class(info: PassInfo, place: Place) -> type[Pass]:
    module_name, _, class_name = info.target.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except LwcError:
        raise
    except Exception as error:
        raise place.error(
            f"pass '{info.name}' cannot be loaded from {info.target}: "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        _check_class(cls)
    except UsageError as error:
        raise place.error(f"pass '{info.name}' cannot be loaded: {error.message}") from error
    found: type[Pass] = cls
    if found.name != info.name:
        raise place.error(f"pass '{info.name}' of {info.target} calls itself '{found.name}'")
    return found


def _import_plugin(name: str) -> ModuleType:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UsageError(
            f"plugin '{name}' cannot be imported: {' '.join(reason.split())}"
        ) from error
    return module
