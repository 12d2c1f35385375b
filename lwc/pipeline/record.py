"""What a pipeline did, as plain data: the report is made from it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lwc.core.diagnostics import Remark
from lwc.pipeline.passes import Approximate, Contract

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["PassRecord", "PipelineRecord", "Snapshot", "describe_contract", "take_snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """The size of a module at one point.

    Attributes:
        nodes: Number of nodes, subgraphs and functions counted; Constant nodes and what operators
            of the lwc dialect mean are not.
        ops: The same by operator, the most frequent first.
        parameters: Number of weight elements, in initializers and Constant nodes.
        parameter_bytes: Their bytes. A tensor that two names share counts once.
    """

    nodes: int
    ops: dict[str, int]
    parameters: int
    parameter_bytes: int


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: The pass's name.
        spec: The pass with its options, as pipeline text.
        contract: See `describe_contract`.
        assumptions: What the contract takes for granted of the inputs.
        seconds: Time of the pass itself.
        verify_seconds: Time of the checks after it.
        changed: Whether the module differs from before.
        statistics: The pass's own counts and figures.
        rewrites: Rewrites that happened, by rule ("" where the pass names none).
        remarks: What it reported, in order.
        verification: What the numeric check found, or None where there was none.
        before: Size before the pass.
        after: Size after the pass.
    """

    name: str
    spec: str
    contract: str
    assumptions: tuple[str, ...]
    seconds: float
    verify_seconds: float
    changed: bool
    statistics: Mapping[str, int | float | str]
    rewrites: Mapping[str, int]
    remarks: tuple[Remark, ...]
    verification: str | None
    before: Snapshot
    after: Snapshot

    @property
    def applied(self) -> int:
        """Number of rewrites that happened."""
        return sum(self.rewrites.values())

    @property
    def missed(self) -> tuple[Remark, ...]:
        """The rewrites that did not happen, with their reasons."""
        return tuple(remark for remark in self.remarks if remark.kind == "missed")


@dataclass(frozen=True)
class PipelineRecord:
    """What a whole pipeline did.

    Attributes:
        pipeline: The passes as text.
        verify: `none`, `structural` or `numeric`.
        seed: Seed of everything random.
        seconds: Time of all passes and checks.
        remarks: What the front end reported before the first pass.
        passes: One record for each pass.
        input: Size before the first pass.
        output: Size after the last pass.
    """

    pipeline: str
    verify: str
    seed: int
    seconds: float
    remarks: tuple[Remark, ...]
    passes: tuple[PassRecord, ...]
    input: Snapshot
    output: Snapshot

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain dictionaries, lists, strings and numbers, fit for JSON."""
        plain = _plain(self)
        assert isinstance(plain, dict)
        return plain


def describe_contract(contract: Contract) -> str:
    """Name a contract with its bounds: `exact`, `approximate (rtol 0.001, atol 0)`, `lossy`."""
    name = type(contract).__name__.lower()
    if isinstance(contract, Approximate):
        return f"{name} (rtol {contract.rtol:g}, atol {contract.atol:g})"
    return name


def take_snapshot(module: Module) -> Snapshot:
    """Measure a module; no weight is read."""
    from lwc.core.dialect import DOMAIN
    from lwc.core.walk import constant_tensor, op_name

    meanings = {each.graph for key, each in module.model.functions.items() if key[0] == DOMAIN}
    ops: Counter[str] = Counter()
    tensors = {}
    for node in module.nodes():
        if node.graph in meanings:
            continue
        name = op_name(node)
        if name != "Constant":
            ops[name] += 1
        elif (tensor := constant_tensor(node.outputs[0])) is not None:
            tensors[id(tensor)] = tensor
    for _, value in module.initializers():
        if value.const_value is not None:
            tensors[id(value.const_value)] = value.const_value
    return Snapshot(
        nodes=ops.total(),
        ops=dict(sorted(ops.items(), key=lambda item: (-item[1], item[0]))),
        parameters=sum(int(tensor.size) for tensor in tensors.values()),
        parameter_bytes=sum(int(tensor.nbytes) for tensor in tensors.values()),
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    return int(value) if hasattr(value, "__index__") else float(value)
