"""What the report says of quantized weights."""

from __future__ import annotations

from dataclasses import dataclass

from lwc.passes.quantization.streaming import QuantizedWeight, WeightSpec
from lwc.passes.quantization.weight_uses import WeightUses

__all__ = ["Tally"]


@dataclass
class Tally:
    """Counts for the report."""

    requested: int
    skipped: int
    layers: int = 0
    nodes: int = 0
    weights: int = 0
    before: int = 0
    after: int = 0
    error: float = 0.0
    output_error: float = 0.0
    measured: int = 0
    worst: float = 0.0
    worst_name: str = ""

    def add(
        self,
        weight: WeightUses,
        spec: WeightSpec,
        result: QuantizedWeight,
        output_error: float | None,
    ) -> None:
        """Count a weight; `output_error` is None where its outputs were not measured."""
        inputs, outputs = weight.extents
        self.layers += 1
        self.nodes += len(weight.uses)
        self.weights += inputs * outputs
        self.before += weight.tensor.nbytes
        self.after += result.nbytes
        self.error += result.relative_error * inputs * outputs
        if output_error is not None:
            self.output_error += output_error
            self.measured += 1
        if result.relative_error >= self.worst:
            self.worst, self.worst_name = result.relative_error, weight.value.name or ""

    def statistics(self) -> dict[str, int | float | str]:
        """Return the figures by name."""
        if not self.layers:
            return {"weights quantized": 0, "weights skipped": self.skipped}
        measured: dict[str, int | float | str] = {}
        if self.measured:
            measured["mean relative error of outputs"] = self.output_error / self.measured
        return {
            "weights quantized": self.layers,
            "weights skipped": self.skipped,
            "nodes lowered": self.nodes,
            "bits requested": self.requested,
            "bits per weight": 8 * self.after / self.weights,
            "bytes before": self.before,
            "bytes after": self.after,
            "mean relative error": self.error / self.weights,
            "worst relative error": self.worst,
            "worst weight": self.worst_name,
            **measured,
        }
