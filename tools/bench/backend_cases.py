"""ONNX's own backend tests as data: models, feeds, expected outputs, and variants of each.

Feeds and outputs are numpy arrays, lists of them (sequences) or None (absent optionals). Types
that numpy lacks are those of ml_dtypes.
"""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnx.backend.test import loader

__all__ = ["KINDS", "VARIANTS", "Case", "Variant", "VariantName", "cases_of", "variant_of"]

VariantName: TypeAlias = Literal["as it is", "all constant", "half constant", "unknown extents"]
VARIANTS: tuple[VariantName, ...] = get_args(VariantName)
"""`unknown extents` is `half constant` with no shapes declared but the ranks of the inputs."""

KINDS = ("node", "light", "simple", "pytorch-operator", "pytorch-converted")
"""`light` are whole networks whose weights are ConstantOfShape; the others lie in folders."""

_IR_WITH_CONSTANTS = 4
"""From this IR version on, an initializer that is also an input is only its default value."""


@dataclass(frozen=True)
class Case:
    """A model with one feed and the outputs that ONNX expects of it.

    Attributes:
        name: Unique among the cases of its kind.
        model: The model; it must not be changed.
        feed: Values of the graph's inputs, by name.
        expected: The outputs, in order.
        rtol: Relative tolerance that the test states.
        atol: Absolute tolerance that the test states.
    """

    name: str
    model: onnx.ModelProto
    feed: Mapping[str, Any]
    expected: Sequence[Any]
    rtol: float
    atol: float


@dataclass(frozen=True)
class Variant:
    """A case's model with some inputs made constants.

    Attributes:
        name: Which variant.
        model: The model.
        feed: Values of the inputs that are left.
        constants: Names of the inputs that became initializers.
    """

    name: VariantName
    model: onnx.ModelProto
    feed: Mapping[str, Any]
    constants: tuple[str, ...]


def cases_of(kind: str, only: str = "") -> list[Case]:
    """Return the cases of one kind whose name contains `only`, sorted by name.

    Making the node cases takes a few seconds: ONNX computes their outputs then.
    """
    make = {"node": _node_case, "light": _light_case}.get(kind, _folder_case)
    return [make(test) for test in _tests(kind) if only in test.name]


@functools.cache
def _tests(kind: str) -> list[Any]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        tests = loader.load_model_tests(kind="real" if kind == "light" else kind)
    return sorted(tests, key=lambda test: str(test.name))


def variant_of(case: Case, name: VariantName) -> Variant:
    """Make a variant. Which half becomes constant depends on the case's name alone.

    Only tensors can be initializers: sequences and optionals stay inputs in every variant.
    """
    types = {value.name: value.type.WhichOneof("value") for value in case.model.graph.input}
    tensors = [
        key
        for key, given in case.feed.items()
        if types[key] == "tensor_type" and isinstance(given, np.ndarray)
    ]
    chosen: tuple[str, ...] = ()
    if name == "all constant":
        chosen = tuple(tensors)
    elif name != "as it is":
        random = np.random.default_rng(zlib.crc32(case.name.encode()))
        count = (len(tensors) + int(random.integers(2))) // 2
        picked = set(random.permutation(len(tensors))[:count].tolist())
        chosen = tuple(key for index, key in enumerate(tensors) if index in picked)
    if name == "as it is":
        return Variant(name, case.model, case.feed, ())
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    if name == "unknown extents":
        _forget_extents(model.graph, chosen)
    for key in chosen:
        model.graph.initializer.append(_initializer(key, case.feed[key]))
    if model.ir_version >= _IR_WITH_CONSTANTS:
        kept = [value for value in model.graph.input if value.name not in chosen]
        del model.graph.input[:]
        model.graph.input.extend(kept)
    feed = {key: given for key, given in case.feed.items() if key not in chosen}
    return Variant(name, model, feed, chosen)


def _forget_extents(graph: onnx.GraphProto, constants: Collection[str]) -> None:
    del graph.value_info[:]
    for value in graph.input:
        if value.name not in constants:
            for dim in value.type.tensor_type.shape.dim:
                dim.Clear()
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")


def _initializer(name: str, array: np.ndarray[Any, Any]) -> onnx.TensorProto:
    if array.dtype.kind in "OUS":
        return numpy_helper.from_array(array.astype(object), name)
    return ir.to_proto(ir.tensor(array, name=name))


def _node_case(test: Any) -> Case:
    inputs, outputs = test.data_sets[0]
    return _case(test, test.model, inputs, outputs)


def _light_case(test: Any) -> Case:
    """Take a network, with the inputs that ONNX's runner makes up for it: 0 to 1, evenly."""
    file = Path(loader.DATA_DIR) / "light" / Path(test.url).name
    model = onnx.load(file)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = []
    for value in model.graph.input:
        if value.name not in constants:
            shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
            size = int(np.prod(shape))
            inputs.append((np.arange(size).reshape(shape) / size).astype(np.float32))
    outputs = [
        onnx.load_tensor(file.with_name(f"{file.stem}_output_{index}.pb"))
        for index in range(len(model.graph.output))
    ]
    return _case(test, model, inputs, outputs)


def _folder_case(test: Any) -> Case:
    folder = Path(test.model_dir)
    model = onnx.load(folder / "model.onnx")
    data = folder / "test_data_set_0"
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [
        _stored(data / f"input_{index}.pb", value.type)
        for index, value in enumerate(
            value for value in model.graph.input if value.name not in constants
        )
    ]
    outputs = [
        _stored(data / f"output_{index}.pb", value.type)
        for index, value in enumerate(model.graph.output)
    ]
    return _case(test, model, inputs, outputs)


def _stored(file: Path, kind: onnx.TypeProto) -> Any:
    content = file.read_bytes()
    if kind.WhichOneof("value") == "sequence_type":
        return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
    return onnx.TensorProto.FromString(content)


def _case(test: Any, model: onnx.ModelProto, inputs: Sequence[Any], outputs: Sequence[Any]) -> Case:
    constants = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in constants]
    if len(inputs) != len(names) or len(outputs) != len(model.graph.output):
        raise ValueError(f"{test.name} has data for other inputs or outputs than its model's")
    feed = {key: _array(given) for key, given in zip(names, inputs, strict=True)}
    expected = [_array(given) for given in outputs]
    return Case(str(test.name), model, feed, expected, test.rtol, test.atol)


def _array(given: Any) -> Any:
    if given is None or isinstance(given, np.ndarray):
        return given
    if isinstance(given, onnx.TensorProto):
        return numpy_helper.to_array(given)
    if isinstance(given, list | tuple):
        return [_array(item) for item in given]
    return np.asarray(given)
