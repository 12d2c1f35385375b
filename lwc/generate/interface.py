"""The interface of a decoder, read from a module: which input and output is what.

Names are those of Hugging Face's exports and of ONNX Runtime GenAI: they are the interface. What
takes the token ids is read from the graph where nothing is called `input_ids`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from lwc.analysis.shapes import Shapes
from lwc.backends.decoding import CacheInterface, CacheTensor
from lwc.calibration.inputs import fed_inputs
from lwc.calibration.text import id_input
from lwc.core.errors import LwcError
from lwc.core.walk import op_name

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["GQA", "NO_CACHE", "POSITIONS", "find_interface"]

POSITIONS = "position_ids"
GQA = "com.microsoft::GroupQueryAttention"

NO_CACHE = (
    "the model has no cache: every step computes the whole sequence anew "
    "(fuse-attention and then add-kv-cache give it one)"
)

_IDS, _MASK, _KEEP, _LOGITS = "input_ids", "attention_mask", "num_logits_to_keep", "logits"
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_PRESENT = re.compile(r"present\.(\d+)\.(key|value)")
_WRITES_IN_PLACE = {GQA: {3: 1, 4: 2}}
"""The operators that write new entries into the past's buffer if the present has the same one, with
the outputs of their presents by the inputs of their pasts."""


def find_interface(module: Module) -> CacheInterface:
    """Read what a decoder takes and gives.

    Raises:
        LwcError: An input or output is missing or unknown, or has another shape; the message
            names it.
    """
    inputs = {value.name or "": value for value in fed_inputs(module)}
    outputs = {value.name or "": value for value in module.graph.outputs}
    pasts = {name: value for name, value in inputs.items() if _PAST.fullmatch(name)}
    presents = {name: value for name, value in outputs.items() if _PRESENT.fullmatch(name)}
    ids = _IDS if _IDS in inputs else id_input(module).name or ""
    known = {ids, _MASK, POSITIONS, _KEEP, *pasts}
    unknown = [name for name in inputs if name not in known]
    if unknown:
        raise LwcError(
            f"input '{unknown[0]}' is none of a decoder's",
            file=module.source.path,
            remedy=f"these are {_IDS}, {_MASK}, {POSITIONS}, {_KEEP}, past_key_values.N.key and "
            ".value",
        )
    for name in known & inputs.keys() - pasts.keys():
        if inputs[name].dtype != ir.DataType.INT64:
            raise LwcError(
                f"input '{name}' is {inputs[name].dtype}",
                file=module.source.path,
                remedy="token ids, masks and positions are INT64",
            )
    tensors = _tensors(module, pasts, presents)
    return CacheInterface(
        ids=ids,
        logits=_logits(module, [name for name in outputs if name not in presents]),
        mask=_MASK if _MASK in inputs else None,
        positions=POSITIONS if POSITIONS in inputs else None,
        keep=_KEEP if _KEEP in inputs else None,
        tensors=tensors,
        in_place=bool(tensors)
        and _MASK in inputs
        and all(_in_place(pasts[each.past], presents[each.present]) for each in tensors),
    )


def _logits(module: Module, names: Sequence[str]) -> str:
    found = _LOGITS if _LOGITS in names else next(iter(names), None)
    if found is None:
        raise LwcError(
            f"there is no output '{_LOGITS}'",
            file=module.source.path,
            remedy="give a causal language model",
        )
    return found


def _tensors(
    module: Module, pasts: dict[str, ir.Value], presents: dict[str, ir.Value]
) -> tuple[CacheTensor, ...]:
    layers = {int(match[1]) for name in pasts if (match := _PAST.fullmatch(name))}
    layers |= {int(match[1]) for name in presents if (match := _PRESENT.fullmatch(name))}
    infer = functools.cache(lambda: Shapes.build(module))
    tensors = []
    for layer in sorted(layers):
        for part in ("key", "value"):
            past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            for name, have, what in ((past, pasts, "input"), (present, presents, "output")):
                if name not in have:
                    raise LwcError(
                        f"layer {layer} of the cache has no {what} '{name}'",
                        file=module.source.path,
                        remedy="a cache has past_key_values.N.key and .value, and present.N.key "
                        "and .value, for each layer N",
                    )
            tensors.append(_tensor(module, pasts[past], present, infer))
    return tuple(tensors)


def _tensor(
    module: Module, past: ir.Value, present: str, infer: Callable[[], Shapes]
) -> CacheTensor:
    shape = () if past.shape is None else tuple(past.shape)
    heads, size = (shape[1], shape[3]) if len(shape) == 4 else (None, None)
    if not isinstance(size, int):
        size = _size_in_attention(past, infer())
    if (
        not isinstance(heads, int)
        or size is None
        or isinstance(shape[2], int)
        or past.dtype is None
    ):
        shown = ", ".join(str(each if isinstance(each, int) else each.value) for each in shape)
        raise LwcError(
            f"'{past.name}' has shape [{shown}]",
            file=module.source.path,
            remedy="a cache is [batch, heads, past, size], with numbers for heads and size, and "
            "any past",
        )
    return CacheTensor(str(past.name), present, heads, size, past.dtype.numpy())


def _size_in_attention(past: ir.Value, shapes: Shapes) -> int | None:
    """Return the size of a head where the file does not state it: from the queries' width."""
    use = next(iter(past.uses()), None)
    if use is None or op_name(use.node) != GQA:
        return None
    query, key = use.node.inputs[:2]
    shape = None if query is None else shapes.shape(query)
    width = shape[-1] if shape else None
    heads, shared = (use.node.attributes.get_int(n, 0) for n in ("num_heads", "kv_num_heads"))
    parts = heads + 2 * shared * (key is None)
    return width // parts if isinstance(width, int) and parts else None


def _in_place(past: ir.Value, present: ir.Value) -> bool:
    """Tell whether one operator, and nothing else, reads the past and makes the present."""
    uses = list(past.uses())
    if len(uses) != 1:
        return False
    node, index = uses[0].node, uses[0].idx
    places = _WRITES_IN_PLACE.get(op_name(node), {})
    return present.producer() is node and places.get(index) == present.index()
