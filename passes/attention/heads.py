"""Where the heads of attention come from: reshapes, transposes and repetitions read as one view.

A view says of each axis of a value which pieces of the axes of its source it is made of. `[N, H,
S, D]` made of a projection `[N, S, H·D]` by a reshape and a transpose is the view `(N)(H)(S)(D)`
whose second and fourth axes are pieces of the source's last. Whatever chain of operators gives
the same view means the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import onnx_ir as ir

from lwc.core.dims import Dim, multiply, product, quotient
from lwc.rewrite import Editor, attribute, producer_of

__all__ = ["Heads", "Layout", "Piece", "View", "find_heads", "views"]

_VIEWS = (
    "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Identity", "Flatten",
)  # fmt: skip


class Piece(NamedTuple):
    """A part of an axis of the source.

    Attributes:
        axis: The source's axis; None for a repetition.
        stride: Places of the source's axis between neighbours.
        extent: How many there are.
    """

    axis: int | None
    stride: Dim
    extent: Dim


Layout: TypeAlias = Literal["flat", "apart", "turned"]
View: TypeAlias = tuple[tuple[Piece, ...], ...]


def views(value: ir.Value, edit: Editor) -> Iterator[tuple[ir.Value, View]]:
    """Yield every value that `value` is a view of, with that view, itself first."""
    chain: list[ir.Node] = []
    source = value
    while True:
        view = _view(source, chain, edit)
        if view is None:
            return
        yield source, view
        node = producer_of(source, *_VIEWS)
        if node is None or node.inputs[0] is None or source is not node.outputs[0]:
            return
        chain.insert(0, node)
        source = node.inputs[0]


def _view(source: ir.Value, chain: Sequence[ir.Node], edit: Editor) -> View | None:
    shape = edit.shape(source)
    if shape is None:
        return None
    view: View | None = tuple(
        () if dim == 1 else (Piece(axis, 1, dim),) for axis, dim in enumerate(shape)
    )
    for node in chain:
        view = None if view is None else _through(view, node, edit)
    return None if view is None else tuple(map(_merged, view))


def _merged(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Join neighbours that lie next to each other in the source."""
    made: list[Piece] = []
    for piece in pieces:
        last = made[-1] if made else None
        if (
            last is not None
            and last.axis is not None
            and last.axis == piece.axis
            and last.stride == multiply(piece.stride, piece.extent)
        ):
            made[-1] = Piece(piece.axis, piece.stride, multiply(last.extent, piece.extent))
        else:
            made.append(piece)
    return tuple(made)


def _through(view: View, node: ir.Node, edit: Editor) -> View | None:
    shape = edit.shape(node.outputs[0])
    if shape is None:
        return None
    if node.op_type == "Transpose":
        perm = attribute(node, "perm", list(reversed(range(len(view)))))
        return tuple(view[axis] for axis in perm)
    if node.op_type == "Expand":
        return _expanded(view, shape)
    pieces = [piece for axis in view for piece in axis]
    return _grouped(pieces, shape, edit)


def _expanded(view: View, shape: Sequence[Dim]) -> View | None:
    made: list[tuple[Piece, ...]] = [()] * (len(shape) - len(view)) + list(view)
    for axis, dim in enumerate(shape):
        if not made[axis] and dim != 1:
            made[axis] = (Piece(None, 0, dim),)
    return tuple(made)


def _grouped(pieces: list[Piece], shape: Sequence[Dim], edit: Editor) -> View | None:
    """Deal pieces, in memory order, to axes of these extents; split those that span several."""
    queue = list(pieces)
    made: list[tuple[Piece, ...]] = []
    for dim in shape:
        group: list[Piece] = []
        size: Dim = 1
        while not edit.same_dim(size, dim):
            if not queue:
                return None
            piece = queue.pop(0)
            whole = multiply(size, piece.extent)
            needed = _exact(dim, size)
            if needed is None:
                return None
            if _exact(needed, piece.extent) is not None:
                group.append(piece)
                size = whole
                continue
            rest = _exact(piece.extent, needed)
            if rest is None:
                return None
            group.append(Piece(piece.axis, multiply(piece.stride, rest), needed))
            queue.insert(0, Piece(piece.axis, piece.stride, rest))
            size = multiply(size, needed)
        made.append(tuple(group))
    return None if queue else tuple(made)


def _exact(a: Dim, b: Dim) -> Dim | None:
    """Return `a / b` where b divides a whatever the dimensions are."""
    if b == 0:
        return None
    ratio = quotient(a, b)
    return ratio if isinstance(ratio, int) or ratio.as_numer_denom()[1] == 1 else None


class Heads(NamedTuple):
    """Heads of queries, keys or values.

    Attributes:
        value: Where they are, before they are repeated.
        layout: Axes of `value`: `flat` is `[batch, length, heads · size]`, `apart` is
            `[batch, heads, length, size]`, `turned` is `[batch, heads, size, length]`.
        heads: How many there are before repetition.
        repeats: How often each is repeated, one after the other.
        size: Extent of a head.
        whole: What the product reads: `[batch, heads · repeats, length, size]`, or with fewer
            heads, or flat, where the product repeats them.
        turned: Whether `whole` is `[batch, heads · repeats, size, length]`.
    """

    value: ir.Value
    layout: Layout
    heads: int
    repeats: int
    size: int
    whole: ir.Value
    turned: bool


def find_heads(value: ir.Value, edit: Editor, *, turned: bool = False) -> Heads | None:
    """Find where an operand of attention has its heads from.

    Args:
        value: `[batch, heads, length, size]`; `turned`: `[batch, heads, size, length]`.
        edit: Knows shapes.
        turned: See `value`.

    Returns:
        The heads, flat where possible, and before their repetition. None where heads or sizes are
        not known, or where the operand is turned and nothing before it is not.
    """
    found: Heads | None = None
    for source, view in views(value, edit):
        if len(view) != 4:
            return None
        batch, heads, length, size = view
        if turned:
            length, size = size, length
        repeats: Dim = 1
        if heads and heads[-1].axis is None:
            repeats, heads = heads[-1].extent, heads[:-1]
        if any(piece.axis is None for axis in (batch, heads, length, size) for piece in axis):
            continue
        count, extent = _extent(heads), _extent(size)
        if not all(isinstance(each, int) for each in (count, extent, repeats)):
            continue
        apart = (batch, heads, length, size)
        layout = _layout(apart, edit.shape(source) or (), edit)
        if layout is not None:
            made = Heads(source, layout, int(count), int(repeats), int(extent), value, turned)
            if layout == "flat":
                return made
            found = made if layout == "apart" or found is None else found
    return found


def _layout(view: View, shape: Sequence[Dim], edit: Editor) -> Layout | None:
    """Say how `(batch)(heads)(length)(size)` lie in a source of this shape."""
    batch, heads, length, size = view
    if len(shape) == 3:
        rows, columns, width = map(_extent, (batch, length, (*heads, *size)))
        fits = all(map(edit.same_dim, shape, (rows, columns, width)))
        together = _merged((*heads, *size))
        return "flat" if fits and _are((batch, length, together), (0, 1, 2), shape) else None
    if len(shape) != 4:
        return None
    if _are(view, (0, 1, 2, 3), shape):
        return "apart"
    return "turned" if _are(view, (0, 1, 3, 2), shape) else None


def _are(view: View, order: Sequence[int], shape: Sequence[Dim]) -> bool:
    """Tell whether each part of a view is one whole axis of the source."""
    return all(
        axis == (Piece(place, 1, shape[place]),) or (not axis and shape[place] == 1)
        for place, axis in zip(order, view, strict=True)
    )


def _extent(pieces: Sequence[Piece]) -> Dim:
    return product(piece.extent for piece in pieces)
