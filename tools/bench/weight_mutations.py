"""Realistic faults to plant into passes that compute new weights; see `mutations.py`."""

from __future__ import annotations

from mutations import Mutation

__all__ = ["WEIGHT_MUTATIONS"]

LINEAR = "lwc.passes.cleanup.linear."
QUANTIZATION = "lwc.passes.quantization."

WEIGHT_MUTATIONS: tuple[Mutation, ...] = (
    # Legality checks dropped
    Mutation(
        "linear operator whose result has other uses", "dropped legality check",
        "lwc.passes.cleanup.fold_linear",
        "    if not edit.single_use(linear.node.outputs[0]):\n",
        "    if False:\n",
        "fold-linear",
    ),
    Mutation(
        "constant along another axis than the channels", "dropped legality check",
        "lwc.passes.cleanup.fold_linear",
        "    if affine.axis is not None and affine.axis != linear.channel_axis:\n"
        '        return Miss("the constant does not vary along the output channels", linear.node)\n',
        "",
        "fold-linear",
    ),
    Mutation(
        "shift before a convolution that pads", "dropped legality check",
        "lwc.passes.cleanup.fold_linear",
        '    if shifted and (node.op_type == "ConvTranspose" or _pads(node)):',
        '    if shifted and node.op_type == "ConvTranspose":',
        "fold-linear",
    ),
    Mutation(
        "pad by any number", "dropped legality check", LINEAR + "padding",
        "    elif fill != 0:\n",
        "    elif fill is None:\n",
        "fold-linear",
    ),
    Mutation(
        "pad of batch or channels", "dropped legality check", LINEAR + "padding",
        "    if any(begins[:2]) or any(ends[:2]):\n",
        "    if False:\n",
        "fold-linear",
    ),
    Mutation(
        "gemm with a bias by row", "dropped legality check", LINEAR + "linear_ops",
        "return all(dim == 1 for dim in shape[:-1]) and (not shape or shape[-1] in (1, outputs))",
        "return not shape or shape[-1] in (1, outputs)",
        "fold-linear",
    ),
    # Swapped and misplaced
    Mutation(
        "subtrahend and minuend", "swapped operands", LINEAR + "affine",
        "return Affine(source, one, -c, axis) if index else Affine(source, -one, c, axis)",
        "return Affine(source, one, -c, axis)",
        "fold-linear",
    ),
    # Off by one, wrong axis
    Mutation(
        "mean of a batch norm not scaled", "wrong arithmetic", LINEAR + "affine",
        "    return Affine(source, scale, beta - mean * scale, 1)\n",
        "    return Affine(source, scale, beta - mean, 1)\n",
        "fold-linear",
    ),
    Mutation(
        "scale of the output channels on the inputs", "scale on the wrong axis",
        LINEAR + "linear_ops",
        '        if op == "MatMul" or (op == "Gemm" and not attribute(linear.node, "transB", 0)):\n'
        "            return weight * scale\n"
        '        if op == "ConvTranspose":\n',
        '        if op == "MatMul" or (op == "Gemm" and not attribute(linear.node, "transB", 0)):\n'
        "            return weight * (scale if weight.shape[0] != scale.size else scale[:, None])\n"
        '        if op == "ConvTranspose":\n',
        "fold-linear",
    ),
    Mutation(
        "scale of a transposed gemm", "scale on the wrong axis", LINEAR + "linear_ops",
        'return weight * (scale if attribute(linear.node, "transB", 0) else scale[:, None])',
        "return weight * scale[:, None]",
        "fold-linear",
    ),
    Mutation(
        "groups of a transposed convolution", "scale on the wrong axis", LINEAR + "linear_ops",
        "            grouped = weight.reshape(linear.groups, -1, *weight.shape[1:])\n"
        "            factors = scale.reshape(linear.groups, 1, -1, *([1] * (weight.ndim - 2)))\n",
        "            grouped = weight.reshape(1, -1, *weight.shape[1:])\n"
        "            factors = scale[: weight.shape[1]].reshape(1, 1, -1, *([1] * (weight.ndim - 2)))\n",
        "fold-linear",
    ),
    # Attributes
    Mutation(
        "beta of a gemm forgotten", "lost attribute", LINEAR + "linear_ops",
        "        return bias * beta\n",
        "        return bias * 1.0\n",
        "fold-linear",
    ),
    Mutation(
        "epsilon of a batch norm forgotten", "lost attribute", LINEAR + "affine",
        "    scale = gamma / np.sqrt(variance + epsilon)\n",
        "    scale = gamma / np.sqrt(variance)\n",
        "fold-linear",
    ),
    Mutation(
        "padding of the window itself forgotten", "lost attribute", LINEAR + "padding",
        "    total = [a + b for a, b in zip(own, added, strict=True)]\n",
        "    total = list(added)\n",
        "fold-linear",
    ),
    # Shapes and types
    Mutation(
        "wider constant read as a row", "broadcast ignored", LINEAR + "affine",
        "        if rank is None or len(tensor.shape) > rank:\n            return None\n"
        "        shape = (1,) * (rank - len(tensor.shape)) + tuple(tensor.shape.numpy())\n",
        "        if rank is None:\n            return None\n"
        "        shape = ((1,) * (rank - len(tensor.shape)) + tuple(tensor.shape.numpy()))[-rank:]\n",
        "fold-linear",
    ),
    # Arithmetic
    Mutation(
        "bias not scaled", "wrong arithmetic", "lwc.passes.cleanup.fold_linear",
        "        bias = folder.bias(linear) * affine.scale + affine.shift\n",
        "        bias = folder.bias(linear) + affine.shift\n",
        "fold-linear",
    ),
    Mutation(
        "merged factors added", "wrong arithmetic", "lwc.passes.cleanup.fold_linear",
        'both = inner.scale * outer.scale if node.op_type == "Mul" else inner.shift + outer.shift',
        'both = inner.scale + outer.scale if node.op_type == "Mul" else inner.shift + outer.shift',
        "fold-linear",
    ),
    Mutation(
        "factor of the inputs on the outputs", "scale on the wrong axis",
        "lwc.passes.cleanup.fold_linear",
        "    weight = folder.scale_inputs(linear, affine.scale)\n",
        "    weight = folder.scale_outputs(linear, affine.scale)\n",
        "fold-linear",
    ),
    Mutation(
        "bias on the way not scaled", "wrong arithmetic", "lwc.passes.cleanup.fold_linear",
        "(array.astype(np.float64) * affine.scale.item()).astype(array.dtype)",
        "array.copy()",
        "fold-linear",
    ),
    Mutation(
        "own bias lost before a shift", "wrong arithmetic", "lwc.passes.cleanup.fold_linear",
        "folder.bias(linear) + folder.response(linear, affine.shift) if shifted",
        "folder.response(linear, affine.shift) if shifted",
        "fold-linear",
    ),
    Mutation(
        "response summed over the outputs", "scale on the wrong axis", LINEAR + "linear_ops",
        "            return np.asarray(weight.sum(axis=0))\n",
        "            return np.asarray(weight.sum(axis=1))\n",
        "fold-linear",
    ),
    Mutation(
        "beta applied once more", "wrong arithmetic", LINEAR + "linear_ops",
        '            attributes.pop("beta", None)\n',
        "",
        "fold-linear",
    ),
    Mutation(
        "begins and ends of a pad exchanged", "swapped operands", LINEAR + "padding",
        "    return begins[2:] + ends[2:]\n",
        "    return ends[2:] + begins[2:]\n",
        "fold-linear",
    ),
    # What a pass says of itself, and how it works
    Mutation(
        "initializer written into", "shared initializer mutated", LINEAR + "linear_ops",
        "        if scale.size == 1:\n            return weight * scale.reshape(())\n"
        '        if op == "MatMul" or',
        "        if scale.size == 1:\n"
        "            original = self._edit.tensor(linear.weight).numpy()\n"
        "            original.setflags(write=True)\n"
        "            original *= scale.reshape(()).astype(original.dtype)\n"
        "            return original.astype(np.float64)\n"
        '        if op == "MatMul" or',
        "fold-linear",
    ),
    Mutation(
        "names of the second node", "name clash", "lwc.rewrite.editor",
        "ir.Value(name=self.module.fresh_name(base)) for",
        'ir.Value(name=f"{base}_new") for',
        "fold-linear",
    ),
    # Quantization
    Mutation(
        "alpha of a gemm with a plain bias", "lost attribute", QUANTIZATION + "lowering",
        "    plain = alpha == beta == 1 and",
        "    plain = beta == 1 and",
        "quantize-weights",
    ),
    Mutation(
        "blocks of twice the size", "wrong block size", QUANTIZATION + "lowering",
        '"N": packed.outputs, "block_size": packed.block_size}',
        '"N": packed.outputs, "block_size": 2 * packed.block_size}',
        "quantize-weights",
    ),
    Mutation(
        "scale of the negative weights only", "wrong arithmetic", QUANTIZATION + "rounding",
        "        largest = np.maximum(-low, high)\n",
        "        largest = np.maximum(-low, 0)\n",
        "quantize-weights{symmetric=true}",
    ),
    Mutation(
        "scales per input", "scale on the wrong axis", QUANTIZATION + "weight_uses",
        'uses.append(WeightUse(node, "MatMul", flipped))',
        'uses.append(WeightUse(node, "MatMul", not flipped))',
        "quantize-weights",
    ),
    Mutation(
        "nibbles in the wrong order", "swapped operands", QUANTIZATION + "packing",
        "    codes = _joined(codes, bits)\n",
        "    codes = _joined(codes if bits == 8 else codes[np.arange(len(codes)) ^ 1], bits)\n",
        "quantize-weights",
    ),
    Mutation(
        "alpha of a gemm forgotten", "lost attribute", QUANTIZATION + "lowering",
        "    if alpha != 1:\n",
        "    if False:\n",
        "quantize-weights",
    ),
    Mutation(
        "transposed gemm read as it lies", "axis off by one", QUANTIZATION + "weight_uses",
        'flipped != bool(_integer(node, "transB", 0))',
        "flipped",
        "quantize-weights",
    ),
    Mutation(
        "zero point off by one", "axis off by one", QUANTIZATION + "rounding",
        "        return Codes(codes, best.scales, best.zeros.astype(np.uint8), error, squared_weight)\n",
        "        return Codes(\n"
        "            codes, best.scales, best.zeros.astype(np.uint8) ^ 3, error, squared_weight\n"
        "        )\n",
        "quantize-weights",
    ),
    Mutation(
        "bias lost with the gemm", "lost consumer", QUANTIZATION + "lowering",
        "    if addend is not None:\n",
        "    if addend is not None and bias is None:\n",
        "quantize-weights",
    ),
)  # fmt: skip
