"""Operator schemas: what the standard says of an operator, looked up once per operator."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import onnx

__all__ = [
    "STANDARD_DOMAINS",
    "FormalType",
    "OperatorTypes",
    "find_schema",
    "newest_opset",
    "operator_types",
    "signature_problem",
]

STANDARD_DOMAINS = frozenset({"", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training"})
"""Domains whose operators the onnx package knows all of; `ai.onnx` is written as ``."""

RUNTIME_OPERATORS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})
"""Operators that ONNX Runtime has in the standard domain where the standard has none."""


@functools.cache
def find_schema(domain: str, op_type: str, version: int) -> onnx.defs.OpSchema | None:
    """Return the schema of an operator at an opset version, or None where there is none."""
    import onnx

    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


@functools.cache
def newest_opset(domain: str) -> int:
    """Return the newest version of a standard domain that the installed onnx package knows."""
    import onnx

    return max(
        (s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.domain == domain),
        default=0,
    )


class FormalType(NamedTuple):
    """What types an operator takes at one formal input or output.

    Attributes:
        name: The name of the operand.
        variable: The type variable that ties operands of one type together, or None.
        allowed: The types, as the standard writes them: `tensor(float)`, `seq(tensor(int64))`.
    """

    name: str
    variable: str | None
    allowed: frozenset[str]

    @property
    def tensors_only(self) -> bool:
        """Whether it takes nothing but tensors."""
        return all(each.startswith("tensor(") for each in self.allowed)


class OperatorTypes(NamedTuple):
    """The formal inputs and outputs of an operator; a variadic last one stands for all the rest."""

    inputs: tuple[FormalType, ...]
    outputs: tuple[FormalType, ...]


@functools.cache
def operator_types(domain: str, op_type: str, version: int) -> OperatorTypes | None:
    """Return the types of an operator at an opset version, or None where there is no schema."""
    schema = find_schema(domain, op_type, version)
    if schema is None:
        return None
    return OperatorTypes(
        tuple(map(_formal, schema.inputs)),
        tuple(map(_formal, schema.outputs)),
    )


def _formal(operand: onnx.defs.OpSchema.FormalParameter) -> FormalType:
    """Read one operand: a variadic one whose members may differ in type ties nothing."""
    # The type is written out ("tensor(bool)") where it is no variable.
    tied = operand.is_homogeneous and "(" not in operand.type_str
    return FormalType(operand.name, operand.type_str if tied else None, frozenset(operand.types))


@functools.cache
def _required_inputs(domain: str, op_type: str, version: int) -> tuple[tuple[str, bool], ...]:
    """Return the name of each formal input, and whether it must be there."""
    import onnx

    schema = find_schema(domain, op_type, version)
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    return tuple((each.name, each.option != optional) for each in schema.inputs) if schema else ()


@functools.cache
def _signature(
    domain: str, op_type: str, version: int
) -> tuple[bool, int, int, int, int, dict[str, int], frozenset[str]] | None:
    schema = find_schema(domain, op_type, version)
    if schema is None:
        return None
    return (
        schema.deprecated,
        schema.min_input,
        schema.max_input,
        schema.min_output,
        schema.max_output,
        {
            name: int(attribute.type.value)  # type: ignore[attr-defined]
            for name, attribute in schema.attributes.items()
        },
        frozenset(name for name, attribute in schema.attributes.items() if attribute.required),
    )


def signature_problem(
    domain: str,
    op_type: str,
    version: int,
    *,
    inputs: int,
    outputs: int,
    attributes: Mapping[str, int],
    absent: Sequence[int] = (),
) -> str | None:
    """Say what is wrong with a use of a standard operator, or return None.

    Args:
        domain: A member of `STANDARD_DOMAINS`.
        op_type: The operator.
        version: Version of the domain that is imported.
        inputs: Number of inputs, absent ones before the last present one included.
        outputs: Number of outputs, likewise.
        attributes: Type of each attribute by name, as `onnx.AttributeProto.AttributeType`.
        absent: Positions of absent inputs. Only optional ones may be; those of a variadic operand
            may not, ONNX Runtime crashes on them.
    """
    signature = _signature(domain, op_type, version)
    if signature is None:
        if not domain and op_type in RUNTIME_OPERATORS:
            return None
        return f"operator {op_type} does not exist in opset {version} of {domain or 'ai.onnx'}"
    deprecated, min_in, max_in, min_out, max_out, known, required = signature
    if deprecated:
        return f"operator {op_type} was removed before opset {version} of {domain or 'ai.onnx'}"
    if not min_in <= inputs <= max_in:
        return f"has {inputs} inputs, {_range(min_in, max_in)} expected"
    formals = _required_inputs(domain, op_type, version) if absent else ()
    for index in absent:
        name, needed = formals[min(index, len(formals) - 1)]
        if needed:
            return f"lacks input {index} ('{name}'), which must be there"
    if not min_out <= outputs <= max_out:
        return f"has {outputs} outputs, {_range(min_out, max_out)} expected"
    for name, kind in attributes.items():
        if name not in known:
            return f"has an attribute '{name}' that opset {version} does not know"
        if known[name] != kind:
            return f"attribute '{name}' has the wrong type"
    if not required.issubset(attributes):
        return f"lacks the attribute '{min(required.difference(attributes))}'"
    return None


def _range(low: int, high: int) -> str:
    if low == high:
        return str(low)
    return f"at least {low}" if high >= 2**31 - 1 else f"{low} to {high}"
