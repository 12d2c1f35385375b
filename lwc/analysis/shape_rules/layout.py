"""Operators that lay a tensor out anew: reshaping, turning, repeating, padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from lwc.analysis.shape_rules.registry import (
    Fact,
    Misfit,
    Outcome,
    Site,
    SymbolicArray,
    axis_of,
    element_count,
    extent,
    rule,
    static_size,
    trackable,
)
from lwc.core.dims import Dim, DimShape, add, at_least, multiply, product, quotient

__all__: list[str] = []


@rule("Reshape")
def _reshape(site: Site) -> Outcome:
    source, dtype = site.shape(0), site.dtype(0)
    target = site.known(1)
    if target is None:
        length = site.shape(1)
        rank = length[0] if length and isinstance(length[0], int) else None
        return Fact(dtype, None if rank is None else site.fresh_shape(rank))
    shape = _reshaped(site, source, target.tolist())
    return Fact(dtype, shape, _relaid(site.known(0), shape))


def _reshaped(site: Site, source: DimShape | None, target: list[Any]) -> DimShape:
    """Return the shape Reshape gives for `target`, -1 and 0 resolved where they can be."""
    copies = not site.attribute("allowzero", 0)
    shape: list[Dim | None] = []
    for axis, element in enumerate(target):
        if isinstance(element, int):
            if element == 0 and copies:
                if source is not None and axis >= len(source):
                    raise Misfit("a 0 in the target shape lies outside the input's rank")
                shape.append(site.fresh() if source is None else source[axis])
            else:
                shape.append(None if element == -1 else extent(site, element))
        elif site.shapes.is_unknown(element) or not _is_extent(element):
            shape.append(None)
        else:
            shape.append(element)
    open_axes = [axis for axis, dim in enumerate(shape) if dim is None]
    if not open_axes:
        return tuple(dim for dim in shape if dim is not None)
    rest = product(dim for dim in shape if dim is not None)
    if len(open_axes) > 1 or source is None or rest == 0:
        return tuple(site.fresh() if dim is None else dim for dim in shape)
    return tuple(_missing_factor(source, shape) if dim is None else dim for dim in shape)


def _is_extent(element: Any) -> bool:
    """Tell whether a Reshape target is an extent and cannot be -1: it is provably above that."""
    return at_least(element, 0)


def _missing_factor(source: DimShape, shape: list[Dim | None]) -> Dim:
    """Return product(source) / product of the known extents, equal ones struck out first."""
    over = list(source)
    under: list[Dim] = []
    for dim in shape:
        if dim is None:
            continue
        match = next((i for i, other in enumerate(over) if other is dim or other == dim), None)
        if match is None:
            under.append(dim)
        else:
            over.pop(match)
    numerator, denominator = product(over), product(under)
    if isinstance(numerator, int) and isinstance(denominator, int):
        if denominator == 0 or numerator % denominator:
            raise Misfit(f"{numerator} elements do not divide by {denominator}")
        return numerator // denominator
    return quotient(numerator, denominator)


def _relaid(known: SymbolicArray | None, shape: DimShape | None) -> SymbolicArray | None:
    """Give content another static shape of the same size."""
    if known is None or shape is None or static_size(shape) != known.size:
        return None
    return known.reshape(shape)


@rule("Flatten")
def _flatten(site: Site) -> Outcome:
    shape = site.shape(0)
    if shape is None:
        return Fact(site.dtype(0), site.fresh_shape(2))
    axis = site.attribute("axis", 1)
    axis = axis if axis == len(shape) else axis_of(axis, len(shape))
    result = (element_count(shape[:axis]), element_count(shape[axis:]))
    return Fact(site.dtype(0), result, _relaid(site.known(0), result))


@rule("Unsqueeze")
def _unsqueeze(site: Site) -> Outcome:
    source, axes = site.shape(0), site.axes(1)
    if source is None:
        return Fact(site.dtype(0))
    if axes is None:
        given = site.shape(1)
        count = given[0] if given else 1
        rank = len(source) + count if isinstance(count, int) else None
        return Fact(site.dtype(0), None if rank is None else site.fresh_shape(rank))
    rank = len(source) + len(axes)
    places = {axis_of(axis, rank) for axis in axes}
    if len(places) != len(axes):
        raise Misfit("an axis is named twice")
    remaining = iter(source)
    shape = tuple(1 if axis in places else next(remaining) for axis in range(rank))
    return Fact(site.dtype(0), shape, _relaid(site.known(0), shape))


@rule("Squeeze")
def _squeeze(site: Site) -> Outcome:
    source, axes = site.shape(0), site.axes(1)
    if source is None or axes is None:
        return Fact(site.dtype(0))
    if axes:
        places = {axis_of(axis, len(source)) for axis in axes}
    elif all(isinstance(dim, int) or at_least(dim, 2) for dim in source):
        places = {axis for axis, dim in enumerate(source) if isinstance(dim, int) and dim == 1}
    else:
        return Fact(site.dtype(0))
    shape = tuple(dim for axis, dim in enumerate(source) if axis not in places)
    return Fact(site.dtype(0), shape, _relaid(site.known(0), shape))


@rule("Transpose")
def _transpose(site: Site) -> Outcome:
    source = site.shape(0)
    order = site.attribute("perm")
    if source is None:
        return Fact(site.dtype(0), None if order is None else site.fresh_shape(len(order)))
    order = tuple(range(len(source)))[::-1] if order is None else tuple(order)
    if sorted(order) != list(range(len(source))):
        raise Misfit(f"perm {list(order)} does not permute {len(source)} axes")
    known = site.known(0)
    moved = None if known is None else known.transpose(order)
    return Fact(site.dtype(0), tuple(source[axis] for axis in order), moved)


@rule("Expand")
def _expand(site: Site) -> Outcome:
    dtype, source = site.dtype(0), site.shape(0)
    target = site.known(1)
    if target is None:
        length = site.shape(1)
        if source is None or not length or not isinstance(length[0], int):
            return Fact(dtype)
        return Fact(dtype, site.fresh_shape(max(len(source), length[0])))
    wanted = tuple(extent(site, element) for element in target.tolist())
    shape = site.broadcast(source, wanted)
    known, size = site.known(0), static_size(shape)
    if known is None or shape is None or size is None or not trackable(dtype, size):
        return Fact(dtype, shape)
    return Fact(dtype, shape, np.broadcast_to(known, shape))


@rule("Tile")
def _tile(site: Site) -> Outcome:
    dtype, source, repeats = site.dtype(0), site.shape(0), site.known(1)
    if source is None:
        return Fact(dtype)
    if repeats is None:
        return Fact(dtype, site.fresh_shape(len(source)))
    times = [extent(site, element) for element in repeats.tolist()]
    if len(times) != len(source):
        raise Misfit("one repeat is needed for each axis")
    shape = tuple(multiply(dim, n) for dim, n in zip(source, times, strict=True))
    known, size = site.known(0), static_size(shape)
    if known is None or size is None or not trackable(dtype, size):
        return Fact(dtype, shape)
    return Fact(dtype, shape, np.tile(known, [int(n) for n in times]))


@rule("Pad")
def _pad(site: Site) -> Outcome:
    source, dtype = site.shape(0), site.dtype(0)
    if source is None:
        return Fact(dtype)
    pads = site.known(1)
    if pads is None:
        return Fact(dtype, site.fresh_shape(len(source)))
    axes = site.axes(3) if site.has(3) else list(range(len(source)))
    if axes is None:
        return Fact(dtype, site.fresh_shape(len(source)))
    amounts = pads.tolist()
    if len(amounts) != 2 * len(axes):
        raise Misfit("two pads are needed for each axis")
    shape = list(source)
    for place, named in enumerate(axes):
        axis = axis_of(named, len(source))
        amount = add(amounts[place], amounts[place + len(axes)])
        if not isinstance(amount, int) and site.shapes.mentions_fresh(amount):
            shape[axis] = site.fresh()
        else:
            shape[axis] = add(shape[axis], amount)
    return Fact(dtype, tuple(shape))


@rule("DepthToSpace SpaceToDepth")
def _blocks_moved(site: Site) -> Outcome:
    source, block = site.shape(0), site.attribute("blocksize", 1)
    if source is None:
        return Fact(site.dtype(0), site.fresh_shape(4))
    n, c, h, w = source
    if site.node.op_type == "DepthToSpace":
        shape = (n, quotient(c, block * block), multiply(h, block), multiply(w, block))
    else:
        shape = (n, multiply(c, block * block), quotient(h, block), quotient(w, block))
    return Fact(site.dtype(0), shape)
