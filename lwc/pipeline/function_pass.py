"""Passes made of one function over the module."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any, overload

from lwc.core.errors import PassError, UsageError
from lwc.core.text import kebab_case
from lwc.pipeline.passes import Contract, Exact, Pass, PassContext, PassResult

__all__ = ["function_pass"]


_EXACT = Exact()


@overload
def function_pass(function: Callable[..., int | PassResult], /) -> type[Any]: ...
@overload
def function_pass(
    *,
    name: str | None = None,
    contract: Contract = ...,
    positional: str | None = None,
    changes_again: str | None = None,
    never_more: frozenset[str] = ...,
) -> Callable[[Callable[..., int | PassResult]], type[Any]]: ...
def function_pass(
    function: Callable[..., int | PassResult] | None = None,
    /,
    *,
    name: str | None = None,
    contract: Contract = _EXACT,
    positional: str | None = None,
    changes_again: str | None = None,
    never_more: frozenset[str] = frozenset(),
) -> Any:
    """Make a pass of a function: `def drop_dropouts(module): ...` becomes `drop-dropouts`.

    The function takes the module and, where it has a second positional parameter, the
    `PassContext`. Its other parameters are the pass's options; they need a type. It returns how
    many rewrites it did, or whether it changed anything, or a `PassResult`. The docstring becomes
    that of the pass, its `Args:` the help of the options. For `--bisect` to find a single rewrite
    the function stops at `ctx.limit.exhausted` and calls `ctx.limit.spend` before each.

    Args:
        function: The function.
        name: The pass's name; by default the function's in kebab case.
        contract: See `Pass`.
        positional: See `Pass`.
        changes_again: See `Pass`.
        never_more: See `Pass`.

    Raises:
        UsageError: The function has parameters that fit no pass.
    """

    def wrap(wrapped: Callable[..., int | PassResult]) -> type[Pass]:
        attributes = {
            "name": name or kebab_case(wrapped.__name__),
            "contract": contract,
            "positional": positional,
            "changes_again": changes_again,
            "never_more": never_more,
        }
        return _make_class(wrapped, attributes)

    return wrap if function is None else wrap(function)


def _make_class(
    function: Callable[..., int | PassResult], attributes: dict[str, Any]
) -> type[Pass]:
    parameters = list(inspect.signature(function).parameters.values())
    wants_context, options = _split(function, parameters)

    def run(self: Pass, module: Any, ctx: PassContext) -> PassResult:
        given = {each.name: getattr(self, each.name) for each in options}
        positional = (module, ctx) if wants_context else (module,)
        return _result(function(*positional, **given), self.name)

    fields = [
        (each.name, each.annotation)
        if each.default is inspect.Parameter.empty
        else (each.name, each.annotation, dataclasses.field(default=each.default))
        for each in options
    ]
    namespace = {
        **attributes,
        "run": run,
        "__doc__": re.sub(
            r"^(\s*)Args:$", r"\1Attributes:", inspect.getdoc(function) or "", flags=re.MULTILINE
        ),
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
    }
    return dataclasses.make_dataclass(
        function.__name__, fields, bases=(Pass,), namespace=namespace, frozen=True, kw_only=True
    )


def _split(
    function: Callable[..., Any], parameters: list[inspect.Parameter]
) -> tuple[bool, list[inspect.Parameter]]:
    """Tell whether the function takes the context, and which parameters are options.

    A parameter after the module with neither a default nor a `*` before it is the context.
    """
    title = f"function '{function.__name__}' makes no pass"
    remedy = "def my_pass(module, ctx, *, option: int = 1) -> int"
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in by_place:
        raise UsageError(f"{title}: its first parameter must be the module", remedy=remedy)
    rest = parameters[1:]
    wants_context = bool(rest) and rest[0].kind in by_place and _has_no_default(rest[0])
    options = rest[1:] if wants_context else rest
    taken = {name for name in dir(Pass) if not name.startswith("_")} | {"name"}
    for each in options:
        if each.kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
            inspect.Parameter.POSITIONAL_ONLY,
        ):
            shown = each.replace(annotation=inspect.Parameter.empty)
            raise UsageError(f"{title}: '{shown}' is no option", remedy=remedy)
        if each.kind in by_place and _has_no_default(each):
            raise UsageError(
                f"{title}: '{each.name}' is neither the module, the context nor an option",
                remedy="give it a default, or a * before it",
            )
        if each.annotation is inspect.Parameter.empty:
            raise UsageError(f"{title}: option '{each.name}' has no type", remedy=remedy)
        if each.name in taken:
            raise UsageError(f"{title}: an option cannot be called '{each.name}'")
    return wants_context, options


def _has_no_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def _result(returned: object, name: str) -> PassResult:
    if isinstance(returned, PassResult):
        return returned
    if isinstance(returned, bool):
        return PassResult(returned)
    if isinstance(returned, int) and returned >= 0:
        return PassResult(returned > 0, rewrites={name: returned} if returned else {})
    raise PassError(
        f"the function returned {returned!r}",
        remedy="return the number of rewrites, or whether anything changed",
    ) from TypeError(type(returned).__name__)
