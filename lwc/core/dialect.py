"""The `lwc` operators: each is an ONNX function of standard operators, which is its meaning.

Any runtime computes a model with them through the functions; where lwc's native operators are
loaded, these take over. A function is made for the shapes and options of one use, told apart by its
`overload`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import onnx
import onnx_ir as ir

from lwc.core.quant_layout import STEP, TILE

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["DOMAIN", "Activation", "DynamicQuantMatMul"]

DOMAIN = "lwc"
VERSION = 1
Activation = Literal["none", "silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class DynamicQuantMatMul:
    """A product of activations, rounded to 8 bits as they come, with quantized weights.

    Inputs are `x` float32 `[..., K]`, `codes` and `scales` (float16 or float32) as
    `lwc.core.quant_layout` packs them, then, where the attributes say so, `zero_points` uint8 and
    `bias` float32 `[N]`. With `xs = max|x| / 127` over a row, or over each block of it, and
    `xq = round(x / xs)`, half to even:

        y[m, n] = sum over k of xs * xq[m, k] * scale[b, n] * (code[k, n] - zero[b, n]) + bias[n]

    where b is the block of k; then comes the activation. Without zero points they are
    `2**(bits - 1)`. A row with NaN or infinities gives NaN.

    Attributes:
        K: Inputs.
        N: Outputs, before gating.
        bits: Bits of a code: 2, 3, 4 or 8.
        block_size: Inputs that share a scale, a multiple of 32 up to 32768; 0 is one block for all.
        x_block: 1 gives each block of a row of `x` a scale of its own, 0 each row.
        zero_points: Whether there are zero points.
        bias: Whether there is a bias.
        activation: What follows the product.
        gated: 1 where columns lie as tiles of 16 of a gate and of what it gates, in turn. The
            result is `activation(gate) * other`, `[..., N / 2]`.
    """

    K: int
    N: int
    bits: Literal[2, 3, 4, 8]
    block_size: int = 0
    x_block: int = 0
    zero_points: int = 0
    bias: int = 0
    activation: Activation = "none"
    gated: int = 0

    name = "DynamicQuantMatMul"

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of a node."""
        return asdict(self)

    @property
    def overload(self) -> str:
        """Tell this variant from others."""
        parts = [f"k{self.K}", f"n{self.N}", f"b{self.bits}", f"g{self.block_size}"]
        for name in ("x_block", "zero_points", "bias", "gated"):
            if getattr(self, name):
                parts.append(name)
        if self.activation != "none":
            parts.append(self.activation)
        return "_".join(parts)

    def declare(self, module: Module) -> str:
        """Add the function to a module where it is not there yet; return its overload.

        Raises:
            PassError: The module declares another version of the domain.
        """
        module.import_opset(DOMAIN, VERSION)
        # Overloads of functions came with version 10.
        module.model.ir_version = max(module.model.ir_version or 0, 10)
        key = (DOMAIN, self.name, self.overload)
        if key not in module.model.functions:
            text = self.text(module.opset)
            function = onnx.parser.parse_function(text)
            module.model.functions[key] = ir.serde.deserialize_function(function)
        return self.overload

    def text(self, opset: int) -> str:
        """Return the function in ONNX's textual form."""
        inputs = ["x", "codes", "scales"]
        inputs += ["zero_points"] * self.zero_points + ["bias"] * self.bias
        attributes = ", ".join(self.attributes())
        body = "\n".join([*self._rounded(opset), *self._weights(), *self._product()])
        return f"""
            <domain: "{DOMAIN}", overload: "{self.overload}", opset_import: ["": {opset}]>
            {self.name} <{attributes}> ({", ".join(inputs)}) => (y)
            {{
            {body}
            }}"""

    @property
    def _blocks(self) -> int:
        return -(-self.K // self.block_size) if self.block_size else 1

    def _rounded(self, opset: int) -> list[str]:
        """Make `xr`, the activations rounded."""
        lines = []
        rows = "x"
        if self.x_block and self.block_size:
            padded = self._blocks * self.block_size
            lines += [
                f"""width = Constant <value = int64[1] {{{padded - self.K}}}> ()
                zero1 = Constant <value = int64[1] {{0}}> ()
                last = Constant <value = int64[1] {{-1}}> ()
                shape = Shape (x)
                leading = Slice (shape, zero1, last, zero1)
                tail_shape = Concat <axis = 0> (leading, width)
                tail = ConstantOfShape (tail_shape)
                whole = Concat <axis = -1> (x, tail)
                cut = Constant <value = int64[2] {{{self._blocks}, {self.block_size}}}> ()
                in_blocks = Concat <axis = 0> (leading, cut)
                rows = Reshape (whole, in_blocks)"""
            ]
            rows = "rows"
        if opset < 18:
            lines.append(f"magnitudes = Abs ({rows}) top = ReduceMax <axes = [-1]> (magnitudes)")
        else:
            lines.append(
                f"""axes = Constant <value = int64[1] {{-1}}> ()
                magnitudes = Abs ({rows}) top = ReduceMax (magnitudes, axes)"""
            )
        lines.append(
            f"""levels = Constant <value = float {{127}}> ()
            none = Constant <value = float {{0}}> ()
            unit = Constant <value = float {{1}}> ()
            xs = Div (top, levels)
            still = Equal (xs, none)
            step = Where (still, unit, xs)
            steps = Div ({rows}, step)
            whole_steps = Round (steps)
            back = Mul (whole_steps, step)"""
        )
        if rows == "x":
            return [*lines, "xr = Identity (back)"]
        return [
            *lines,
            f"""flat = Constant <value = int64[1] {{{self._blocks * self.block_size}}}> ()
            flat_shape = Concat <axis = 0> (leading, flat)
            joined = Reshape (back, flat_shape)
            stop = Constant <value = int64[1] {{{self.K}}}> ()
            xr = Slice (joined, zero1, stop, last)""",
        ]

    def _weights(self) -> list[str]:
        """Make `w`, float `[K, N]`."""
        tiles, depth = -(-self.N // TILE), -(-self.K // STEP) * STEP
        lines = self._codes(tiles, depth)
        block = self.block_size or depth
        lines.append(
            f"""all_codes = Constant <value = int64[2] {{{depth}, {tiles * TILE}}}> ()
            by_input = Transpose <perm = [1, 3, 0, 2]> (quads)
            padded = Reshape (by_input, all_codes)
            begin = Constant <value = int64[2] {{0, 0}}> ()
            end = Constant <value = int64[2] {{{self.K}, {self.N}}}> ()
            kept = Slice (padded, begin, end)
            numbers = Cast <to = 1> (kept)
            first = Constant <value = int64 {{0}}> ()
            limit = Constant <value = int64 {{{self.K}}}> ()
            by_one = Constant <value = int64 {{1}}> ()
            places = Range (first, limit, by_one)
            per_block = Constant <value = int64 {{{block}}}> ()
            which = Div (places, per_block)
            columns = Constant <value = int64[2] {{{self._blocks}, {tiles * TILE}}}> ()
            in_tiles3 = Constant <value = int64[3] {{{tiles}, {self._blocks}, {TILE}}}> ()
            column_end = Constant <value = int64[2] {{{self._blocks}, {self.N}}}> ()"""
        )
        for name in ["scales"] + ["zero_points"] * self.zero_points:
            lines.append(
                f"""{name}_tiles = Reshape ({name}, in_tiles3)
                {name}_by_block = Transpose <perm = [1, 0, 2]> ({name}_tiles)
                {name}_rows = Reshape ({name}_by_block, columns)
                {name}_kept = Slice ({name}_rows, begin, column_end)
                {name}_wide = Cast <to = 1> ({name}_kept)
                {name}_all = Gather <axis = 0> ({name}_wide, which)"""
            )
        if self.zero_points:
            zeros = "zero_points_all"
        else:
            zeros = "middle"
            lines.append(f"middle = Constant <value = float {{{1 << (self.bits - 1)}}}> ()")
        lines.append(f"centred = Sub (numbers, {zeros}) w = Mul (centred, scales_all)")
        return lines

    def _codes(self, tiles: int, depth: int) -> list[str]:
        """Make `quads`, uint8 `[tiles, depth / 4, 16, 4]`."""
        shape = f"{{{tiles}, {depth // 4}, {TILE}, 4}}"
        lines = [f"quads_shape = Constant <value = int64[4] {shape}> ()"]
        if self.bits == 8:
            return [*lines, "quads = Reshape (codes, quads_shape)"]
        if self.bits != 3:
            groups = 8 // self.bits
            lines += _fields("codes", self.bits, groups, f"{tiles}, {depth // 4 // groups}")
            return [*lines, "quads = Reshape (codes_fields, quads_shape)"]
        # Two planes of the two low bits and one of the high bit, for eight groups of four inputs.
        lines.append(
            f"""planes_shape = Constant <value = int64[4] {{{tiles}, {depth // 32}, 3, 64}}> ()
            planes = Reshape (codes, planes_shape)
            parts = Constant <value = int64[2] {{2, 1}}> ()
            low_planes, high_plane = Split <axis = 2> (planes, parts)"""
        )
        lines += _fields("low_planes", 2, 4, f"{tiles}, {depth // 16}")
        lines += _fields("high_plane", 1, 8, f"{tiles}, {depth // 32}")
        lines.append(
            """low = Reshape (low_planes_fields, quads_shape)
            high = Reshape (high_plane_fields, quads_shape)
            two_bits = Constant <value = uint8 {2}> ()
            worth = BitShift <direction = "LEFT"> (high, two_bits)
            low_number = Cast <to = 6> (low)
            high_number = Cast <to = 6> (worth)
            quads = Add (low_number, high_number)"""
        )
        return lines

    def _product(self) -> list[str]:
        lines = ["product = MatMul (xr, w)"]
        last = "product"
        if self.bias:
            lines.append("biased = Add (product, bias)")
            last = "biased"
        if not self.gated:
            return [*lines, *_activated(self.activation, last, "y")]
        lines.append(
            f"""in_tiles = Constant <value = int64[3] {{{self.N // TILE // 2}, 2, {TILE}}}> ()
            out_width = Constant <value = int64[1] {{{self.N // 2}}}> ()
            begin1 = Constant <value = int64[1] {{0}}> ()
            before_last = Constant <value = int64[1] {{-1}}> ()
            y_shape = Shape (product)
            y_leading = Slice (y_shape, begin1, before_last, begin1)
            tile_shape = Concat <axis = 0> (y_leading, in_tiles)
            in_pairs = Reshape ({last}, tile_shape)
            gates, others = Split <axis = -2> (in_pairs, halves)
            out_shape = Concat <axis = 0> (y_leading, out_width)
            gate = Reshape (gates, out_shape)
            other = Reshape (others, out_shape)"""
        )
        lines.insert(0, "halves = Constant <value = int64[2] {1, 1}> ()")
        return [*lines, *_activated(self.activation, "gate", "open"), "y = Mul (open, other)"]


def _fields(value: str, bits: int, count: int, rows: str) -> list[str]:
    """Take `count` fields of some bits out of bytes `[rows, 16, 4]`: uint8 `[rows, count, 16, 4]`.

    Shifting left drops what is above a field.
    """
    lines = [
        f"""{value}_rows = Constant <value = int64[5] {{{rows}, 1, {TILE}, 4}}> ()
        {value}_bytes = Reshape ({value}, {value}_rows)
        {value}_down = Constant <value = uint8 {{{8 - bits}}}> ()"""
    ]
    for place in range(count):
        lines.append(
            f"""{value}_up{place} = Constant <value = uint8 {{{8 - bits * (place + 1)}}}> ()
            {value}_top{place} = BitShift <direction = "LEFT"> ({value}_bytes, {value}_up{place})
            {value}_{place} = BitShift <direction = "RIGHT"> ({value}_top{place}, {value}_down)"""
        )
    names = ", ".join(f"{value}_{place}" for place in range(count))
    return [*lines, f"{value}_fields = Concat <axis = 2> ({names})"]


_ACTIVATIONS: dict[str, str] = {
    "none": "{y} = Identity ({x})",
    "relu": "{y} = Relu ({x})",
    "silu": "act_open = Sigmoid ({x}) {y} = Mul ({x}, act_open)",
    "gelu": """act_root = Constant <value = float {{1.4142135}}> ()
        act_one = Constant <value = float {{1}}> ()
        act_half = Constant <value = float {{0.5}}> ()
        act_scaled = Div ({x}, act_root)
        act_erf = Erf (act_scaled)
        act_sum = Add (act_erf, act_one)
        act_halved = Mul ({x}, act_half)
        {y} = Mul (act_halved, act_sum)""",
    "gelu_tanh": """act_root = Constant <value = float {{0.7978846}}> ()
        act_cubic = Constant <value = float {{0.044715}}> ()
        act_one = Constant <value = float {{1}}> ()
        act_half = Constant <value = float {{0.5}}> ()
        act_square = Mul ({x}, {x})
        act_bent = Mul (act_square, act_cubic)
        act_factor = Add (act_bent, act_one)
        act_inner = Mul ({x}, act_factor)
        act_scaled = Mul (act_inner, act_root)
        act_tanh = Tanh (act_scaled)
        act_sum = Add (act_tanh, act_one)
        act_halved = Mul ({x}, act_half)
        {y} = Mul (act_halved, act_sum)""",
}


def _activated(kind: str, x: str, y: str) -> list[str]:
    return [_ACTIVATIONS[kind].format(x=x, y=y)]
