"""Which passes exist: a static table, the entry points `lwc.passes`, and plugins.

Nothing here imports a pass before it is asked for by name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import re
from dataclasses import dataclass

from lwc.core.errors import LwcError, Terminated, UsageError, one_line
from lwc.pipeline.grammar import Place, print_scalar
from lwc.pipeline.options import (
    did_you_mean,
    format_value,
    free_value_type,
    options_of,
    type_name,
)
from lwc.pipeline.pass_class import check_pass_class, target_of
from lwc.pipeline.passes import Pass
from lwc.pipeline.plugins import import_plugin, import_trouble, passes_of

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
        info = self._describe(cls)
        self._check_free(info)
        self._infos[info.name] = info
        self._classes[info.name] = cls

    def load_plugin(self, name: str) -> list[type[Pass]]:
        """Import a module, or a `.py` file, and add every pass it defines, or none of them.

        Operators and kernels register themselves as it is imported; it may have these alone.

        Raises:
            UsageError: It cannot be imported, defines nothing of these, or a pass that is
                malformed or has the name of another.
        """
        found = passes_of(import_plugin(name), name)
        infos: dict[str, PassInfo] = {}
        for cls in found:
            info = self._describe(cls)
            self._check_free(info, infos.get(info.name))
            infos[info.name] = info
        self._infos.update(infos)
        self._classes.update((cls.name, cls) for cls in found)
        return found

    def _describe(self, cls: type[Pass]) -> PassInfo:
        check_pass_class(cls)
        try:
            return describe_pass(cls)
        except UsageError as error:
            raise UsageError(f"{target_of(cls)}: {error.message}", remedy=error.remedy) from error
        except Exception as error:
            raise UsageError(
                f"the options of {target_of(cls)} cannot be read: {one_line(error)}"
            ) from error

    def _check_free(self, info: PassInfo, sibling: PassInfo | None = None) -> None:
        """Check that no other class has the name of one that comes in."""
        self._find_entry_points()
        for known in (self._infos.get(info.name), sibling):
            if known is not None and known.target != info.target:
                raise UsageError(
                    f"two passes are named '{info.name}': {known.target} and {info.target}"
                )

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
    return PassInfo(cls.name, target_of(cls), doc.partition("\n")[0], contract, tuple(options))


def _attribute_docs(doc: str) -> dict[str, str]:
    """Read the `Attributes:` section of a docstring: one text for each field."""
    section = re.search(r"^Attributes:\n((?:[ ].*\n?|\n)*)", doc, re.MULTILINE)
    if section is None:
        return {}
    items = re.findall(r"^ {4}(\w+): ((?:.*)(?:\n {5,}.*)*)", section[1], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}


def _import_class(info: PassInfo, place: Place) -> type[Pass]:
    module_name, _, class_name = info.target.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (LwcError, Terminated):
        raise
    except (Exception, SystemExit) as error:
        raise place.error(
            f"pass '{info.name}' cannot be loaded from {info.target}: {import_trouble(error)}"
        ) from error
    try:
        check_pass_class(cls)
    except UsageError as error:
        raise place.error(
            f"pass '{info.name}' cannot be loaded: {error.message}", error.remedy
        ) from error
    found: type[Pass] = cls
    if found.name != info.name:
        raise place.error(f"pass '{info.name}' of {info.target} calls itself '{found.name}'")
    return found
