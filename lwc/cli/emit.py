"""`--emit`: code for a backend, written to a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lwc.analysis.shapes import Shapes
from lwc.calibration.feeds import check_dimensions, dim_names, usual_extents
from lwc.cli.plan_phases import token_dimensions
from lwc.core.errors import LwcError, UsageError
from lwc.generate.interface import find_interface

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["check_shapes", "emit_code", "example_shapes"]

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


def check_shapes(
    module: Module, shapes: Sequence[Mapping[str, int]], bound: Mapping[str, int]
) -> None:
    """Check before passes run that the dimensions of `--shapes` are there, and stay.

    Args:
        module: The input; the passes keep its interface.
        shapes: Numbers for symbolic dimensions.
        bound: Dimensions that become numbers before the first pass.

    Raises:
        UsageError: One is bound.
        InputError: There is no such dimension.
    """
    for shape in shapes:
        check_dimensions(module, shape)
        for name in shape:
            if name in bound:
                raise UsageError(
                    f"dimension '{name}' is bound to {bound[name]}", remedy="drop it from --shapes"
                )


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
