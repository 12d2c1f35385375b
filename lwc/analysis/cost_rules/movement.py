"""Operators that move, index, generate or only rename data: no FLOPs, only traffic."""

from __future__ import annotations

from lwc.analysis.cost_rules.base import MS, Operands, Work, cost_rule, packed_bytes, total
from lwc.core.dims import Dim

__all__ = ["VIEWS"]

VIEWS = frozenset(
    (
        *("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Constant"),
        *("Optional", "OptionalGetElement", "SequenceConstruct", "SequenceAt"),
    )
)
"""Operators that hand on their input's bytes."""

_NO_DATA = ("Shape", "Size", "OptionalHasElement", "SequenceLength", "SequenceEmpty")


@cost_rule(*VIEWS, *_NO_DATA)
def _free(node: Operands) -> Work:
    return Work(read=0, written=0, kernel="view")


@cost_rule("ConstantOfShape", "Range", "EyeLike", "RandomNormal", "RandomUniform")
@cost_rule("RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
def _generate(node: Operands) -> Work:
    return Work(read=0, kernel="copy", problem=(node.out_nbytes(),))


@cost_rule("Concat", "Pad", "Tile", "Expand", "Slice", "Split", "Trilu", "DepthToSpace")
@cost_rule("SpaceToDepth", "ReverseSequence", "Compress", "ConcatFromSequence")
@cost_rule("SplitToSequence", "SequenceInsert", "Col2Im", "CenterCropPad")
@cost_rule("com.microsoft.nchwc::ReorderInput", "com.microsoft.nchwc::ReorderOutput")
def _copy(node: Operands) -> Work:
    """Only what is written is read; an expanded axis is read again from the cache."""
    written = _written(node)
    return Work(read=written, written=written, kernel="copy", problem=(written,))


@cost_rule("Transpose")
def _transpose(node: Operands) -> Work:
    return Work(kernel="transpose", problem=(node.out_nbytes(),))


@cost_rule("Gather", "GatherND", "GatherElements")
def _gather(node: Operands) -> Work:
    """The picked elements are read, not the table."""
    written = node.out_nbytes()
    return Work(read=written + node.nbytes(1), kernel="gather", problem=(written,))


@cost_rule("ScatterND", "ScatterElements", "TensorScatter")
def _scatter(node: Operands) -> Work:
    """Copy the data, then overwrite a part."""
    written = node.out_nbytes()
    return Work(kernel="copy", problem=(written,))


@cost_rule("Resize", "Upsample", "com.microsoft.nchwc::Upsample")
def _resize(node: Operands) -> Work:
    """Interpolation weighs 2 neighbours per image axis (4 if cubic); nearest only copies."""
    mode = _text(node.attr("mode", "nearest"))
    taps = {"linear": 4, "cubic": 16}.get(mode, 0)  # of an image; other axes keep their size
    elements = node.out_size()
    return Work(macs=elements * taps, kernel=f"resize_{mode}", problem=(elements,))


@cost_rule("GridSample")
def _grid_sample(node: Operands) -> Work:
    taps = {"nearest": 1, "cubic": 16, "bicubic": 16}.get(_text(node.attr("mode", "linear")), 4)
    elements = node.out_size()
    return Work(macs=elements * taps, kernel="resize_linear", problem=(elements,))


@cost_rule("NonZero", "OneHot", "Unique")
def _scan(node: Operands) -> Work:
    return Work(other_flops=node.size(0), kernel="copy", problem=(node.nbytes(0),))


@cost_rule(f"{MS}GatherBlockQuantized")
def _gather_quantized(node: Operands) -> Work:
    """Pick rows and dequantize them: subtract, multiply."""
    elements = node.out_size()
    packed = packed_bytes(elements, int(node.attr("bits", 4)))
    return Work(
        other_flops=elements * 2,
        read=packed + node.nbytes(1),
        kernel="dequantize",
        problem=(elements,),
    )


def _written(node: Operands) -> Dim:
    present = [i for i, dtype in enumerate(node.output_types) if dtype is not None]
    return total([node.out_nbytes(index) for index in present])


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
