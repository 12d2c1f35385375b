"""Padding nodes become the padding of the convolution or pooling after them."""

from __future__ import annotations

import onnx_ir as ir

from lwc.rewrite import Editor, Miss, Outcome, Rule, attribute, producer_of, rule

__all__ = ["RULES"]


@rule("Conv", "AveragePool", "MaxPool")
def pad_before_window(node: ir.Node, edit: Editor) -> Outcome:
    """Pad by constants on spatial axes, then a window: one window with larger `pads`.

    A convolution pads by 0. AveragePool pads by 0 where padding is counted. MaxPool pads by the
    lowest value.
    """
    value = node.inputs[0]
    pad = producer_of(value, "Pad")
    if pad is None or value is None:
        return None
    rank = edit.rank(pad.inputs[0])
    if rank is None or rank < 3:
        return None
    added = _spatial_pads(pad, rank, edit)
    if isinstance(added, Miss):
        return added
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return Miss("auto_pad decides the padding", node)
    if not edit.single_use(value):
        return Miss("the padded value has other uses", pad)
    own = list(attribute(node, "pads", ()) or [0] * len(added))
    attributes = dict(node.attributes.items())
    attributes.pop("auto_pad", None)
    fill = _fill(pad, edit)
    if node.op_type == "MaxPool":
        if fill != float("-inf"):
            return Miss("MaxPool pads by the lowest value, this Pad does not", pad)
    elif fill != 0:
        return Miss("the padding is not 0", pad)
    if node.op_type == "AveragePool":
        if any(own) and not attribute(node, "count_include_pad", 0):
            return Miss("AveragePool leaves its own padding out of the mean", node)
        if attribute(node, "ceil_mode", 0):
            return Miss("ceil_mode counts positions beyond the padding", node)
        attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
    if len(node.outputs) > 1 and node.op_type == "MaxPool":
        return Miss("the indices of MaxPool count the padded positions", node)
    total = [a + b for a, b in zip(own, added, strict=True)]
    kernel = attribute(node, "kernel_shape", ())
    if node.op_type != "Conv" and any(
        pads >= extent for pads, extent in zip(total, [*kernel, *kernel], strict=True)
    ):
        return Miss("pooling windows must overlap more than padding", node)
    attributes["pads"] = ir.AttrInt64s("pads", total)
    return edit.op(node.op_type, [pad.inputs[0], *node.inputs[1:]], attributes)


def _fill(pad: ir.Node, edit: Editor) -> float | None:
    if len(pad.inputs) < 3 or pad.inputs[2] is None:
        return 0.0
    scalar = edit.scalar(pad.inputs[2])
    return None if scalar is None else float(scalar)


def _spatial_pads(pad: ir.Node, rank: int, edit: Editor) -> list[int] | Miss:
    """Return the added padding of the spatial axes: begins, then ends."""
    if attribute(pad, "mode", "constant") != "constant":
        return Miss(f"the padding mode is {attribute(pad, 'mode')}", pad)
    given = edit.ints(pad.inputs[1])
    if given is None:
        return Miss("the padding is computed", pad)
    axes = list(range(rank))
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        listed = edit.ints(pad.inputs[3])
        if listed is None:
            return Miss("the padded axes are computed", pad)
        axes = [axis % rank for axis in listed]
    begins, ends = [0] * rank, [0] * rank
    for index, axis in enumerate(axes):
        begins[axis], ends[axis] = given[index], given[index + len(axes)]
    if min(begins + ends) < 0:
        return Miss("a negative padding crops", pad)
    if any(begins[:2]) or any(ends[:2]):
        return Miss("it pads the batch or the channels", pad)
    return begins[2:] + ends[2:]


RULES: tuple[Rule, ...] = (pad_before_window,)
