"""Is a class a pass that the manager can trust to run? Checked once, where it is met."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import sys
from collections.abc import Set
from typing import Any

from lwc.core.errors import UsageError
from lwc.pipeline.passes import Approximate, Exact, Lossy, Pass

__all__ = ["FILE_PLUGIN", "check_pass_class", "target_of"]

FILE_PLUGIN = "lwc_plugin_"
"""How the names of modules begin that stand for plugin files."""

MEASURES = frozenset({"nodes", "flops", "parameter-bytes"})
"""What a pass may promise never to increase."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def target_of(cls: type) -> str:
    """Return where a class is: `module:Class`, or `file.py:Class` for one of a plugin file."""
    home = cls.__module__
    if home.startswith(FILE_PLUGIN) and home in sys.modules:
        home = str(getattr(sys.modules[home], "__file__", home))
    return f"{home}:{cls.__qualname__}"


@functools.cache
def check_pass_class(cls: Any) -> None:
    """Check what can be known of a pass before it runs.

    Raises:
        UsageError: It is no pass, is abstract or no frozen dataclass, or its name, its contract,
            the parameters of its `run` or its special options are not what they must be.
    """
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise UsageError(f"{cls!r} is not a Pass")
    problem, remedy = _problem(cls)
    if problem is not None:
        raise UsageError(f"{target_of(cls)} {problem}", remedy=remedy)


def _problem(cls: type[Pass]) -> tuple[str | None, str | None]:
    """Return the first thing that is wrong with a subclass of `Pass`, and a remedy."""
    if "__dataclass_fields__" not in vars(cls) and _adds_fields(cls):
        return "is not a dataclass", "put @dataclass(frozen=True) above it"
    name = getattr(cls, "name", None)
    if not isinstance(name, str):
        return "lacks a name", 'write name: ClassVar[str] = "its-name"'
    if _NAME.fullmatch(name) is None:
        return f"has the name {name!r}, which is not in kebab-case", "write it like fuse-swish"
    abstract = sorted(getattr(cls, "__abstractmethods__", ()))
    if abstract:
        return f"lacks a {abstract[0]} method", None
    problem = _run_problem(cls)
    if problem is not None:
        return problem, "write def run(self, module, ctx)"
    if callable(vars(cls).get("keeps_interface")):
        return "has a method keeps_interface", "make it a property"
    problem = _contract_problem(cls.contract)
    if problem is not None:
        return f"has no valid contract: {problem}", None
    measures: object = cls.never_more
    if not isinstance(measures, Set) or not MEASURES.issuperset(measures):
        named = ", ".join(sorted(MEASURES))
        return f"says never_more = {measures!r}, which is no set out of {named}", None
    reason: object = cls.changes_again
    if not isinstance(reason, str | None):
        return "has a changes_again that is no reason", "say in a sentence why it does"
    fields = {field.name for field in dataclasses.fields(cls)}
    for role in ("positional", "free_options"):
        field = getattr(cls, role, None)
        if field is not None and field not in fields:
            return f"says {role} = {field!r}, which is no field of it", None
    return None, None


def _adds_fields(cls: type) -> bool:
    """Tell whether a class annotates fields of its own: without any it inherits its bases'."""
    annotations = vars(cls).get("__annotations__", {})
    return any("ClassVar" not in str(each) for each in annotations.values())


def _run_problem(cls: type[Pass]) -> str | None:
    run: object = cls.run
    if not callable(run):
        return "has a run that is no method"
    if inspect.iscoroutinefunction(run) or inspect.isgeneratorfunction(run):
        return "has a run that returns before it is done"
    try:
        signature = inspect.signature(run)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(None, None, None)
    except TypeError:
        names = ", ".join(map(str, signature.parameters))
        return f"has a run that takes ({names}), not (self, module, ctx)"
    return None


def _contract_problem(contract: object) -> str | None:
    if not isinstance(contract, Exact | Approximate | Lossy):
        if contract in (Exact, Approximate, Lossy):
            return f"it is the class {getattr(contract, '__name__', contract)}, not an object of it"
        return f"{contract!r} is none of Exact, Approximate and Lossy"
    if not isinstance(contract.assumptions, tuple) or not all(
        isinstance(each, str) for each in contract.assumptions
    ):
        return f"assumptions are a tuple of strings, not {contract.assumptions!r}"
    bounds: dict[str, object] = {}
    if isinstance(contract, Approximate):
        bounds = {"rtol": contract.rtol, "atol": contract.atol}
    elif isinstance(contract, Lossy) and contract.noise is not None:
        bounds = {"noise": contract.noise}
    for name, bound in bounds.items():
        number = isinstance(bound, int | float) and not isinstance(bound, bool)
        if not number or not 0 <= bound < math.inf:  # type: ignore[operator]
            return f"{name} is a number from 0 on, not {bound!r}"
    return None
