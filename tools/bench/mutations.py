"""Realistic faults to plant into passes on graphs, which `mutants.py` asks `check_pass` to find.

Each one changes a few words of one module's source. The text to replace must occur exactly once,
so that a fault that no longer fits the code is an error and not a fault that nobody plants.
Those of passes that compute new weights are in `weight_mutations.py`.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["GRAPH_MUTATIONS", "Mutation"]

CANONICAL = "lwc.passes.cleanup.canonical."


class Mutation(NamedTuple):
    """A fault.

    Attributes:
        name: Names it in the table.
        kind: What sort of mistake it is.
        module: The module that is changed.
        old: A text that occurs in it exactly once.
        new: What takes its place.
        spec: The pass that shows the fault, as pipeline text.
    """

    name: str
    kind: str
    module: str
    old: str
    new: str
    spec: str = "canonicalize"


GRAPH_MUTATIONS: tuple[Mutation, ...] = (
    # Legality checks dropped
    Mutation(
        "neutral operand that broadcasts", "dropped legality check", CANONICAL + "identities",
        "        if not edit.same_shape(node.inputs[kept], node.outputs[0]):\n"
        '            return Miss("it may broadcast its operand")\n',
        "",
    ),
    Mutation(
        "neutral element on the left of a difference", "dropped legality check",
        CANONICAL + "identities",
        '_COMMUTES = {"Mul", "Add", "And", "Or"}',
        '_COMMUTES = {"Mul", "Add", "And", "Or", "Sub", "Div", "Pow"}',
    ),
    Mutation(
        "where with a branch that broadcasts", "dropped legality check", CANONICAL + "identities",
        "    if not edit.same_shape(chosen, node.outputs[0]):\n"
        '        return Miss("the chosen branch may be broadcast")\n',
        "",
    ),
    Mutation(
        "slice of a slice that others read", "dropped legality check", CANONICAL + "slices",
        "    plain = inner.step == outer.step == 1 and min(*inner, *outer) >= 0\n",
        "    plain = True\n",
    ),
    Mutation(
        "exact casts that are not", "dropped legality check", CANONICAL + "casts",
        "between not in _CONTAINS.get(start, ())",
        "between == start",
    ),
    Mutation(
        "concat of a split in any order", "dropped legality check", CANONICAL + "slices",
        "split is None or list(node.inputs) != list(split.outputs)",
        "split is None or len(node.inputs) != len(split.outputs)",
    ),
    Mutation(
        "dropout whose mask is used", "dropped legality check", CANONICAL + "identities",
        "    if len(node.outputs) > 1 and (node.outputs[1].uses() "
        "or node.outputs[1].is_graph_output()):\n"
        '        return Miss("its mask is used")\n',
        "",
    ),
    Mutation(
        "duplicates by operator and inputs only", "dropped legality check",
        CANONICAL + "duplicates",
        "tuple(sorted((name, _attribute_key(each)) for name, each in node.attributes.items()))",
        "tuple(sorted(node.attributes))",
    ),
    Mutation(
        "if decided by a shape that is not known", "dropped legality check",
        CANONICAL + "control",
        "    scalar = edit.scalar(value)\n    return None if scalar is None else bool(scalar)\n",
        "    scalar = edit.scalar(value)\n    return True if scalar is None else bool(scalar)\n",
    ),
    # Swapped and misplaced
    Mutation(
        "swapped slice halves", "swapped operands", CANONICAL + "slices",
        '        [merged[axis].start for axis in axes],\n'
        '        [merged[axis].end for axis in axes],\n',
        '        [merged[axis].end for axis in axes],\n'
        '        [merged[axis].start for axis in axes],\n',
    ),
    Mutation(
        "branches of a decided if", "swapped operands", CANONICAL + "control",
        '"then_branch" if condition else "else_branch"',
        '"else_branch" if condition else "then_branch"',
    ),
    Mutation(
        "branches of a decided where", "swapped operands", CANONICAL + "identities",
        "        chosen = yes if decided else no\n",
        "        chosen = no if decided else yes\n",
    ),
    Mutation(
        "permutations composed the wrong way round", "swapped operands", CANONICAL + "layout",
        "    both = [first[axis] for axis in second]\n",
        "    both = [second[axis] for axis in first]\n",
    ),
    Mutation(
        "operands of a concat tree reversed", "swapped operands", CANONICAL + "slices",
        "            stack.extend(reversed(inner.inputs))\n",
        "            stack.extend(inner.inputs)\n",
    ),
    # Off by one, wrong axis
    Mutation(
        "axis of merged unsqueezes", "axis off by one", CANONICAL + "layout",
        "        return sorted(added | {kept[axis % middle] for axis in first})\n",
        "        return sorted(added | {axis % middle for axis in first})\n",
    ),
    Mutation(
        "axis of merged squeezes", "axis off by one", CANONICAL + "layout",
        "    return sorted(removed | {kept[axis % len(kept)] for axis in second})\n",
        "    return sorted(removed | {axis % len(kept) for axis in second})\n",
    ),
    Mutation(
        "end of a composed slice", "axis off by one", CANONICAL + "slices",
        "    end = min(inner.end, inner.start + outer.end)\n",
        "    end = min(inner.end, outer.end)\n",
    ),
    Mutation(
        "unsqueezed gather on another axis", "axis off by one", CANONICAL + "slices",
        "    if len(axes) != 1 or axes[0] % rank != axis or not edit.single_use(value):\n",
        "    if len(axes) != 1 or not edit.single_use(value):\n",
    ),
    # Attributes
    Mutation(
        "reduction of ones keeps the axis", "missing keepdims", CANONICAL + "identities",
        '    return edit.op("Squeeze", [node.inputs[0], edit.constant(list(axes), "axes")])\n',
        "    return node.inputs[0]\n",
    ),
    Mutation(
        "squeeze with axes as an attribute", "wrong opset attribute", CANONICAL + "identities",
        '    return edit.op("Squeeze", [node.inputs[0], edit.constant(list(axes), "axes")])\n',
        '    return edit.op("Squeeze", [node.inputs[0]], {"axes": list(axes)})\n',
    ),
    Mutation(
        "concat without its axis", "wrong opset attribute", CANONICAL + "slices",
        '    return edit.op("Concat", operands, {"axis": axis})\n',
        '    return edit.op("Concat", operands)\n',
    ),
    Mutation(
        "gather that forgets its axis", "lost attribute", CANONICAL + "slices",
        '    return edit.op("Gather", [gather.inputs[0], indices], {"axis": axis})\n',
        '    return edit.op("Gather", [gather.inputs[0], indices])\n',
    ),
    # Consumers and outputs
    Mutation(
        "erased with all that fed it", "lost consumer", "lwc.rewrite.editor",
        "producer.graph is not None and self.is_dead(producer):\n",
        "producer.graph is not None:\n",
    ),
    Mutation(
        "axis of a gather without its sign", "axis off by one", CANONICAL + "slices",
        'axis = attribute(gather, "axis", 0) % rank\n',
        'axis = abs(attribute(gather, "axis", 0))\n',
    ),
    Mutation(
        "graph output left behind", "graph output dropped", "lwc.rewrite.editor",
        "                if output is old:\n                    graph.outputs[index] = new\n",
        "                if output is old:\n                    pass\n",
    ),
    Mutation(
        "graph output renamed", "graph output dropped", "lwc.rewrite.editor",
        "            self._take_name(old, new)\n        elif fresh",
        "            pass\n        elif fresh",
    ),
    Mutation(
        "identity of an output removed with it", "graph output dropped",
        CANONICAL + "duplicates",
        "        if old.is_graph_output() and not editor.may_become_output(new, graph):\n"
        "            return False\n",
        "        if old.is_graph_output():\n"
        "            graph.outputs.pop()\n",
    ),
    Mutation(
        "used nodes erased as dead", "lost consumer", "lwc.rewrite.editor",
        "return not any(use_count(value) or value.is_graph_output() for value in node.outputs)",
        "return not any(use_count(value) > 1 or value.is_graph_output() for value in node.outputs)",
    ),
    Mutation(
        "weights that are outputs removed", "graph output dropped", "lwc.rewrite.unused",
        "or value.is_graph_output() or value.is_graph_input()",
        "or value.is_graph_input()",
    ),
    # Shapes and types
    Mutation(
        "shapes from before the rewrite", "stale shape", "lwc.passes.cleanup.infer_shapes",
        "        value.shape = ir.Shape([_written(dim, shapes) for dim in fact.shape])\n",
        "        value.shape = value.shape or ir.Shape([_written(dim, shapes) for dim in fact.shape[::-1]])\n",
        "infer-shapes",
    ),
    Mutation(
        "shape kept by what takes its place", "stale shape", "lwc.rewrite.editor",
        "            new.type = old.type or new.type\n",
        "            new.type = old.type or new.type\n            old.shape = ir.Shape([1])\n",
    ),
    Mutation(
        "two unknown extents taken as equal", "unknown dimensions as equal",
        "lwc.analysis.shapes",
        '        base = f"{name}_dim{axis}" if name else "dim"\n'
        "        while base in self._taken:\n"
        '            base += "_"\n',
        '        base = "unknown"\n',
    ),
    Mutation(
        "fresh extents of two broadcasts taken as equal", "unknown dimensions as equal",
        "lwc.analysis.shapes",
        "            else:\n                found = self.fresh()\n            self._broadcasts[a, b]",
        "            else:\n                found = a\n            self._broadcasts[a, b]",
    ),
    Mutation(
        "reshape target that copies the wrong extent", "unknown dimensions as equal",
        CANONICAL + "layout",
        "        elif index < len(source) and edit.same_dim(source[index], dim):\n"
        "            target.append(0)\n"
        "        else:\n"
        "            target.append(-1)\n",
        "        elif index < len(source):\n"
        "            target.append(0)\n"
        "        else:\n"
        "            target.append(-1)\n",
    ),
    Mutation(
        "expand that was needed", "broadcast ignored", CANONICAL + "shape_values",
        "        if shape is None or not _broadcasts_to([shape, *others], result, edit):\n",
        "        if shape is None:\n",
    ),
    Mutation(
        "cast dropped with the type it gave", "dtype lost", CANONICAL + "casts",
        'return node.inputs[0] if have is not None and have == attribute(node, "to") else None',
        "return node.inputs[0] if have is not None and not node.outputs[0].is_graph_output() "
        "else None",
    ),
    Mutation(
        "folded constants in float64", "dtype lost", CANONICAL + "folding",
        "            return edit.constant(result)\n",
        "            return edit.constant(result.astype(np.float64) if result.dtype == np.float32 "
        "else result)\n",
    ),
    Mutation(
        "filled tensor as an integer", "dtype lost", CANONICAL + "evaluate",
        "    return np.full(inputs[0].tolist(), value.reshape(()), dtype=value.dtype)\n",
        "    return np.full(inputs[0].tolist(), int(value.reshape(())))\n",
    ),
    # Arithmetic
    Mutation(
        "zero that changes a sign", "wrong arithmetic", CANONICAL + "identities",
        "            if negative_zero != (op == \"Add\"):\n",
        "            if False and negative_zero != (op == \"Add\"):\n",
    ),
    Mutation(
        "one is neutral for addition", "wrong arithmetic", CANONICAL + "identities",
        '"Pow": 1, "Add": 0,',
        '"Pow": 1, "Add": 1,',
    ),
    Mutation(
        "tanh is idempotent", "wrong arithmetic", CANONICAL + "identities",
        '@rule("Relu", "Abs", "Ceil", "Floor", "Round", "Sign")',
        '@rule("Relu", "Abs", "Ceil", "Floor", "Round", "Sign", "Tanh")',
    ),
    Mutation(
        "integer division rounds down", "wrong arithmetic", CANONICAL + "evaluate",
        "    return np.asarray(quotient + (inexact & ((a < 0) != (b < 0))).astype(a.dtype))\n",
        "    return np.asarray(quotient + 0 * inexact.astype(a.dtype))\n",
    ),
    Mutation(
        "loop that runs once for a count of two", "wrong arithmetic", CANONICAL + "control",
        "    if trips is None or trips[0] != 1 or go_on is None:\n",
        "    if trips is None or go_on is None:\n",
    ),
    Mutation(
        "first iteration is number one", "wrong arithmetic", CANONICAL + "control",
        '    first = edit.constant(np.array(0, dtype=np.int64), "iteration")\n',
        '    first = edit.constant(np.array(1, dtype=np.int64), "iteration")\n',
    ),
    Mutation(
        "loop whose condition is not known", "dropped legality check", CANONICAL + "control",
        "    if trips is None or trips[0] != 1 or go_on is None:\n",
        "    if trips is None or trips[0] != 1:\n",
    ),
    Mutation(
        "scan output of one turn without its axis", "stale shape", CANONICAL + "control",
        'value if index < len(carried) else edit.op("Unsqueeze", [value, axis])',
        "value",
    ),
    Mutation(
        "outputs of a smaller if in reverse", "swapped operands", CANONICAL + "tidy",
        "    replacements = iter(made.outputs)\n",
        "    replacements = reversed(made.outputs)\n",
    ),
    Mutation(
        "unused output taken from one branch only", "graph output dropped", CANONICAL + "tidy",
        'in (attribute(node, "then_branch"), attribute(node, "else_branch")):\n',
        'in (attribute(node, "then_branch"),):\n',
    ),
    Mutation(
        "every operator commutes", "swapped operands", CANONICAL + "duplicates",
        "        tuple(map(id, node.inputs)),\n",
        "        tuple(sorted(map(id, node.inputs))),\n",
    ),
    Mutation(
        "folded outputs in reverse", "swapped operands", CANONICAL + "folding",
        "for result, output in zip(results, node.outputs, strict=False)",
        "for result, output in zip(reversed(results), node.outputs, strict=False)",
    ),
    Mutation(
        "where that nothing decides", "dropped legality check", CANONICAL + "identities",
        "        if decided is None:\n            return None\n        chosen",
        "        chosen",
    ),
    # What a pass says of itself, and how it works
    Mutation(
        "weights copied for nothing", "shared initializer mutated", "lwc.rewrite.unused",
        "    gone: Counter[str] = Counter()\n",
        "    import onnx_ir as ir\n\n"
        "    gone: Counter[str] = Counter()\n"
        "    for _, value in list(module.initializers()):\n"
        "        if value.const_value is not None:\n"
        "            value.const_value = ir.Tensor(value.const_value.numpy().copy(), "
        "name=value.name)\n",
    ),
    Mutation(
        "order of a set", "non-determinism", CANONICAL + "slices",
        "    axes = sorted(merged)\n",
        "    axes = sorted(merged, key=lambda axis: hash((axis, id(node))))\n",
    ),
    Mutation(
        "names in the order of a set", "non-determinism", "lwc.core.module",
        "        self._counters[stem] = count\n        names.add(name)\n",
        "        name = f\"{name}_{id(self) % 9973}\"\n"
        "        self._counters[stem] = count\n        names.add(name)\n",
    ),
    Mutation(
        "rule that looks at names", "non-determinism", CANONICAL + "identities",
        "    training = node.inputs[2] if len(node.inputs) > 2 else None\n",
        "    training = node.inputs[2] if len(node.inputs) > 2 else None\n"
        "    if (node.name or \"\").endswith(\"_node\"):\n        return None\n",
    ),
    Mutation(
        "change denied", "changed lying", "lwc.passes.cleanup.infer_shapes",
        "            changed=annotated > 0,\n",
        "            changed=annotated > 3,\n",
        "infer-shapes",
    ),
    Mutation(
        "change claimed", "changed lying", "lwc.passes.cleanup.canonicalize",
        "        if not changed:\n            ctx.note(\"nothing to simplify\")\n",
        "        if not changed:\n            changed = True\n",
    ),
    Mutation(
        "neighbours not visited again", "not idempotent", "lwc.rewrite.editor",
        "        self.touch(*(user for user, _ in value.uses()))\n",
        "        pass\n",
    ),
    Mutation(
        "reduction over all axes forgotten", "crash", CANONICAL + "identities",
        "    if not axes:\n        return None\n",
        "",
    ),
    Mutation(
        "trip count that is not known", "crash", CANONICAL + "control",
        "    if go_on is False or (trips is not None and trips[0] <= 0):\n",
        "    if go_on is False or trips[0] <= 0:\n",
    ),
)  # fmt: skip
