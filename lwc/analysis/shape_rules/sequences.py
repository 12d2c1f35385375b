"""Sequences and optionals: one fact for all elements."""

from __future__ import annotations

import onnx_ir as ir

from lwc.analysis.shape_rules.control_flow import joined
from lwc.analysis.shape_rules.elementwise import object_array
from lwc.analysis.shape_rules.registry import UNKNOWN, Fact, Outcome, Site, axis_of, rule
from lwc.core.dims import Dim, DimShape

__all__: list[str] = []


def _forgotten(fact: Fact) -> Fact:
    return fact._replace(known=None)


@rule("SequenceConstruct")
def _construct(site: Site) -> Outcome:
    element = _forgotten(site.fact(0))
    for index in range(1, len(site.inputs)):
        element = joined(element, _forgotten(site.fact(index)), site.shapes)
    return Fact(element=_own(site, element))


def _own(site: Site, element: Fact) -> Fact:
    """Drop what need not hold of each element alike: fresh extents may differ between them."""
    shape = element.shape
    if shape is not None and any(site.shapes.mentions_fresh(dim) for dim in shape):
        shape = None
    return Fact(element.dtype, shape)


@rule("SequenceInsert")
def _insert(site: Site) -> Outcome:
    element = site.fact(0).element
    if element is None:
        return Fact(element=UNKNOWN)
    return Fact(element=_own(site, joined(element, _forgotten(site.fact(1)), site.shapes)))


@rule("SequenceErase")
def _erase(site: Site) -> Outcome:
    return Fact(element=site.fact(0).element or UNKNOWN)


@rule("SequenceEmpty")
def _empty(site: Site) -> Outcome:
    return Fact(element=Fact(ir.DataType(site.attribute("dtype", ir.DataType.FLOAT))))


@rule("SequenceAt")
def _at(site: Site) -> Outcome:
    return site.fact(0).element or UNKNOWN


@rule("SequenceLength")
def _length(site: Site) -> Outcome:
    return Fact(ir.DataType.INT64, ())


@rule("SplitToSequence")
def _split(site: Site) -> Outcome:
    shape = site.shape(0)
    if shape is None:
        return Fact(element=Fact(site.dtype(0)))
    axis = axis_of(site.attribute("axis", 0), len(shape))
    middle: DimShape = (1,) if site.attribute("keepdims", 1) else ()
    if site.has(1):
        size = _piece(site.ints(1), site.shape(1), shape[axis])
        if size is None:
            return Fact(element=Fact(site.dtype(0)))
        if site.shape(1) != () or size > 1:
            middle = (size,)  # ONNX Runtime treats a scalar 1 as if it were not there
    return Fact(element=Fact(site.dtype(0), (*shape[:axis], *middle, *shape[axis + 1 :])))


def _piece(sizes: list[int] | None, given: DimShape | None, whole: Dim) -> int | None:
    """Return the extent all pieces have, None where they may differ."""
    if not sizes or len(set(sizes)) > 1:
        return None
    even = given != () or (isinstance(whole, int) and sizes[0] > 0 and whole % sizes[0] == 0)
    return sizes[0] if even else None


@rule("ConcatFromSequence")
def _concat(site: Site) -> Outcome:
    element = site.fact(0).element
    if element is None or element.shape is None:
        return Fact(None if element is None else element.dtype)
    shape = list(element.shape)
    stacked = bool(site.attribute("new_axis", 0))
    axis = axis_of(site.attribute("axis"), len(shape) + stacked)
    if stacked:
        shape.insert(axis, site.fresh())
    else:
        shape[axis] = site.fresh()
    return Fact(element.dtype, tuple(shape))


@rule("Optional")
def _optional(site: Site) -> Outcome:
    return Fact(element=site.fact(0) if site.has(0) else UNKNOWN)


@rule("OptionalGetElement")
def _get(site: Site) -> Outcome:
    fact, value = site.fact(0), site.node.inputs[0]
    if fact.element is None or value is None or isinstance(value.type, ir.SequenceType):
        return fact  # it may be applied to what is no optional
    producer = value.producer()
    made = producer is not None and producer.op_type == "Optional"
    return fact.element if made or isinstance(value.type, ir.OptionalType) else UNKNOWN


@rule("OptionalHasElement")
def _has(site: Site) -> Outcome:
    known = None if site.has(0) else object_array(False)
    return Fact(ir.DataType.BOOL, (), known)
