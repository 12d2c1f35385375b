"""The report as data: plain records that become JSON, Markdown or HTML.

`docs/report.schema.json` is generated from these classes; a test keeps the two together.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from lwc.evaluate.latency import Spread

__all__ = [
    "Figures",
    "LatencyComparison",
    "LayerSensitivity",
    "Machine",
    "MissedRewrite",
    "ModelEntry",
    "PassEntry",
    "Quality",
    "Report",
    "from_dict",
    "json_schema",
]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Machine:
    """Where the figures were taken."""

    cpu: str
    cores: int
    system: str
    python: str
    onnxruntime: str
    lwc: str


@dataclass(frozen=True)
class Figures:
    """What the cost model says of a module at one point of the pipeline.

    `None` means that it was not computed or depends on a dimension without a binding.

    Attributes:
        nodes: Number of nodes, Constant nodes left out, subgraphs and functions counted.
        nodes_by_op: The same by operator.
        parameters: Number of weight elements.
        parameter_bytes: Bytes of all weights, shared ones once.
        flops: Floating-point operations of one run at the bindings of the report.
        flops_formula: The same in the model's own dimensions.
        peak_activation_bytes: Largest sum of live activations of one run.
        traffic_bytes: Bytes read and written by all nodes of one run.
        predicted_seconds: Predicted time of one run on the measured target.
        uncounted: Operators without a cost rule, with their number of nodes.
    """

    nodes: int
    nodes_by_op: dict[str, int]
    parameters: int
    parameter_bytes: int
    flops: float | None = None
    flops_formula: str | None = None
    peak_activation_bytes: float | None = None
    traffic_bytes: float | None = None
    predicted_seconds: float | None = None
    uncounted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelEntry:
    """A model at one end of the pipeline.

    Attributes:
        path: File or folder, or None for a model in memory.
        format: `onnx`, `onnxtxt`, `gguf`, `huggingface`, `torch` or `memory`.
        file_bytes: Size on disk, external data included.
        dense_bytes: Bytes the weights would take unquantized in float32.
        peak_rss_bytes: Peak resident memory of a child process that loads the model and runs it.
    """

    path: str | None
    format: str
    file_bytes: int | None = None
    dense_bytes: int | None = None
    peak_rss_bytes: int | None = None


@dataclass(frozen=True)
class MissedRewrite:
    """Rewrites that did not happen for one reason.

    Attributes:
        reason: Why.
        count: How many times.
        example: One of the nodes.
        rule: The rule within the pass.
    """

    reason: str
    count: int
    example: str | None = None
    rule: str | None = None


@dataclass(frozen=True)
class PassEntry:
    """One pass of the pipeline.

    Attributes:
        name: Kebab-case name.
        spec: The pass with its options, as a pipeline text.
        contract: `exact`, `approximate` or `lossy`, with its bound.
        assumptions: What the pass took for granted of the inputs.
        seconds: Time of the pass itself.
        verify_seconds: Time of the checks after it.
        changed: Whether it changed the module.
        applied: Rewrites that happened, by rule.
        missed: Rewrites that did not happen, by reason.
        notes: Notes and warnings.
        statistics: The pass's own counts and figures.
        before: Figures before the pass.
        after: Figures after the pass.
    """

    name: str
    spec: str
    contract: str
    assumptions: list[str]
    seconds: float
    verify_seconds: float
    changed: bool
    applied: dict[str, int]
    missed: list[MissedRewrite]
    notes: list[str]
    statistics: dict[str, Any]
    before: Figures
    after: Figures


@dataclass(frozen=True)
class LatencyComparison:
    """Time of one run before and after, measured in turn in one process.

    Attributes:
        bindings: The numbers given to the symbolic dimensions.
        threads: Threads of the runtime.
        rounds: Number of interleaved rounds.
        before: Seconds of the input model.
        after: Seconds of the output model.
        ratio: after / before, round by round.
        predicted_before: Predicted seconds of the input model.
        predicted_after: Predicted seconds of the output model.
    """

    bindings: dict[str, int]
    threads: int
    rounds: int
    before: Spread
    after: Spread
    ratio: Spread
    predicted_before: float | None = None
    predicted_after: float | None = None


@dataclass(frozen=True)
class Quality:
    """One measure of how well the models do, before and after.

    Attributes:
        metric: `perplexity`, `cosine`, `top-1 agreement`, `max abs error`, or `differing NaN,
            infinite or text elements`, which no error counts.
        before: Value of the input model; None where the metric compares the two.
        after: Value of the output model, or of the comparison; None in a file where it is NaN or
            infinite.
        detail: What it was measured on.
    """

    metric: str
    before: float | None
    after: float | None
    detail: str


@dataclass(frozen=True)
class LayerSensitivity:
    """What rounding one layer alone costs.

    Attributes:
        weight: The layer's weight.
        node: The first node that reads it.
        bits: Bits of a weight.
        cost: How far the outputs then are from those of the model with all weights as they were.
        measure: What the cost is.
        bytes_saved: Bytes by which the weight shrinks.
    """

    weight: str
    node: str
    bits: int
    cost: float
    measure: str
    bytes_saved: int


@dataclass(frozen=True)
class Report:
    """Everything one run did and what it measured."""

    pipeline: str
    machine: Machine
    input: ModelEntry
    output: ModelEntry
    bindings: dict[str, int]
    passes: list[PassEntry]
    before: Figures
    after: Figures
    seconds: float
    notes: list[str] = field(default_factory=list)
    latency: list[LatencyComparison] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    sensitivity: list[LayerSensitivity] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dictionaries and lists."""
        return dataclasses.asdict(self)


def from_dict(data: dict[str, Any]) -> Report:
    """Read a report back from `Report.to_dict` or from its JSON.

    Raises:
        ValueError: It was written by another version of the schema.
    """
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"report has schema version {data.get('schema_version')}, not {SCHEMA_VERSION}"
        )
    report = _read(Report, data)
    assert isinstance(report, Report)
    return report


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a report."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lwc report",
        **_schema(Report),
    }


def _read(kind: Any, data: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(
            **{f.name: _read(hints[f.name], data[f.name]) for f in dataclasses.fields(kind)}
        )  # type: ignore[operator]
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        return [_read(item, entry) for entry in data]
    return data


_JSON_NAMES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    types.NoneType: "null",
}


def _schema(kind: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        return {
            "type": "object",
            "description": (kind.__doc__ or "").strip().splitlines()[0],
            "properties": {name: _schema(hints[name]) for name in names},
            "required": names,
            "additionalProperties": False,
        }
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return {"type": "array", "items": _schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1])}
    if origin is types.UnionType:
        return {"type": [_JSON_NAMES[argument] for argument in arguments]}
    return {} if kind is Any else {"type": _JSON_NAMES[kind]}
