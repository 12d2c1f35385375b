"""`--emit`: code for a backend, written to a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lwc.analysis.shapes import Shapes
from lwc.calibration.feeds import check_dimensions, dim_names, usual_extents
from lwc.cli.plan_phases import token_dimensions
from lwc.core.errors import LwcError
from lwc.generate.interface import find_interface
from lwc.pipeline.instruments import Instrument

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import Pass

__all__ = ["ShapesCheck", "emit_code", "example_shapes"]

CONTEXT = 512
"""Tokens of a prompt, and of a cache, that kernels are compiled for where nothing is said."""


def emit_code(
    module: Module,
    folder: str,
    architectures: Sequence[str],
    shapes: Sequence[Mapping[str, int]],
    progress: Callable[[str], None],
) -> list[str]:
    """Write code for the `triton` backend; return lines for people.

    Args:
        module: The module.
        folder: Where to write.
        architectures: What kernels are compiled for, by target or product; all when empty.
        shapes: Numbers for symbolic dimensions; `example_shapes` when empty.
        progress: Told what is being done.

    Raises:
        LwcError: It cannot be lowered, compiled or written.
    """
    from lwc.backends.triton.architectures import ARCHITECTURES, architecture
    from lwc.backends.triton.availability import require_triton

    require_triton()
    from lwc.backends.triton.emit import emit

    emitted = emit(
        module,
        folder,
        architectures=[architecture(name) for name in architectures] or ARCHITECTURES,
        shapes=shapes or example_shapes(module),
        progress=progress,
    )
    inside = sum(bool(placement.kernels) for placement in emitted.placements)
    outside = len(emitted.placements) - inside
    counts = ", ".join(f"{count} for {target}" for target, count in emitted.kernels.items())
    lines = [f"wrote {folder}: {inside} nodes in kernels, {outside} in PyTorch; compiled {counts}"]
    if emitted.spilling:
        names = ", ".join(sorted(set(emitted.spilling)))
        lines.append(f"some spill registers, which is slow: {names}")
    return lines


class ShapesCheck(Instrument):
    """Checks the dimensions of `--shapes` once no pass to come gives or takes any.

    Args:
        shapes: Numbers for symbolic dimensions.

    Raises:
        InputError: No input has a dimension.
    """

    def __init__(self, shapes: Sequence[Mapping[str, int]]) -> None:
        self._shapes = shapes
        self._first = 0

    def before_pipeline(self, module: Module, passes: Sequence[Pass]) -> None:
        """Find the pass before which they are checked."""
        for index, pass_ in enumerate(passes, 1):
            if pass_.name == "bind-dims" or not pass_.keeps_interface:
                self._first = index

    def before_pass(self, pass_: Pass, module: Module, index: int) -> None:
        """Check them."""
        if index == self._first:
            for shape in self._shapes:
                check_dimensions(module, shape)


def example_shapes(module: Module) -> list[dict[str, int]]:
    """Return the numbers that kernels are compiled for by default.

    A model with lengths gets a prompt of 512 tokens; one with a cache, one token behind 512 too.
    Other dimensions are the usual ones (see `lwc.calibration.feeds.usual_extents`).
    """
    kinds, usual = dim_names(module), usual_extents(module)
    total = _dimension_of_all_tokens(module)

    def bound(tokens: int, past: int) -> dict[str, int]:
        extents = {"length": tokens, "past": past}
        found = {name: extents.get(kinds[name], extent) for name, extent in usual.items()}
        return found | ({total: tokens + past} if total in found else {})

    if "past" in kinds.values():
        return [bound(CONTEXT, 0), bound(1, CONTEXT)]
    return [bound(CONTEXT, 0)]


def _dimension_of_all_tokens(module: Module) -> str:
    """Return a decoder's name for new and cached tokens together, "" where it has none."""
    try:
        interface = find_interface(module)
    except LwcError:
        return ""
    names = token_dimensions(module, interface, Shapes.build(module))
    return "" if names is None else names[2]
