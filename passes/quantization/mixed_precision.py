"""`mixed-precision`: bits for each layer, by what rounding it costs, within a budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lwc.core.errors import PassError, UsageError
from lwc.core.text import parse_size, size
from lwc.passes.quantization.quantize_weights import Bits, QuantizeWeights
from lwc.pipeline.passes import Contract, Lossy, Pass, PassContext, PassResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from lwc.core.module import Module
    from lwc.passes.quantization.sensitivity import Candidate, Sensitivity

__all__ = ["MixedPrecision"]


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Round each linear layer to bits of its own, so that a budget buys the most quality.

    What each layer costs is measured: it alone is rounded by the method, the model behind it is run
    on a sample of the calibration data, and the outputs are compared with those before (KL
    divergence of the logits, or else the relative squared error). The bits of least summed cost
    within the budget are found exactly, and `quantize-weights` does the rest. That costs of layers
    add up is an assumption.

    Attributes:
        budget: Bits per weight of the layers that are rounded, scales and zero points included
            (`5.5`; in blocks of 32 these take 1.125 of them in MatMulNBits, 0.75 in `lwc`); or
            bytes of all weights of the model, embeddings included (`80MB`).
        bits: What a layer may have.
        method: See `quantize-weights`; costs of `awq` are measured with its clipping alone.
        embeddings: Bits of tables read by Gather, and of what is tied to them.
        block_size: See `quantize-weights`.
        symmetric: See `quantize-weights`.
        search: See `quantize-weights`.
        exclude: Patterns of names of nodes or weights to leave alone.
        format: See `quantize-weights`; 3 bits need `lwc`.
        accuracy_level: See `quantize-weights`.
        samples: Feeds of the calibration data to measure on.
        window: Tokens of each, where feeds are plain token ids.
    """

    name: ClassVar[str] = "mixed-precision"
    contract: ClassVar[Contract] = Lossy()
    positional: ClassVar[str | None] = "budget"

    budget: float | str
    bits: tuple[Bits, ...] = (4, 8)
    method: Literal["rtn", "gptq", "awq"] = "rtn"
    embeddings: Literal[4, 8] | None = 8
    block_size: int | None = None
    symmetric: bool = False
    search: Literal["none", "mse"] = "mse"
    exclude: tuple[str, ...] = ()
    format: Literal["matmulnbits", "qdq", "lwc"] = "matmulnbits"
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    samples: int = 2
    window: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            parse_size(self.budget)
        elif not 0 < self.budget <= 32:
            raise UsageError(
                f"budget={self.budget:g} is no number of bits per weight",
                remedy="such as 4.5; a size has a unit, such as 80MB",
            )
        if not self.bits or len(set(self.bits)) < len(self.bits):
            raise UsageError("bits lists what a layer may have, each once", remedy="bits=4,8")
        for name, number in (("samples", self.samples), ("window", self.window)):
            if number < 1:
                raise UsageError(f"{name}={number} is no number above 0")
        for bits in self.bits:
            self.quantizer(bits)

    def quantizer(self, bits: Bits) -> QuantizeWeights:
        """Return the pass that rounds all layers to some bits.

        Raises:
            UsageError: The format does not have them.
        """
        return QuantizeWeights(
            bits=bits,
            method=self.method,
            embeddings=self.embeddings,
            block_size=self.block_size,
            symmetric=self.symmetric,
            search=self.search,
            exclude=self.exclude,
            format=self.format,
            accuracy_level=self.accuracy_level,
        )

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """See the class."""
        from lwc.passes.quantization.sensitivity import find_candidates, measure

        quantizer = self.quantizer(max(self.bits))
        candidates = find_candidates(module, ctx, quantizer, sorted(self.bits))
        if not candidates:
            ctx.note("no weight to quantize")
            return PassResult(changed=False)
        limit, fixed = self._limit(module, ctx, candidates)
        self._check(candidates, limit, fixed)
        found = measure(
            module, candidates, ctx, quantizer.how, samples=self.samples, window=self.window
        )
        assigned, cost = _solve(candidates, found, limit)
        for each in candidates:
            value, node = each.weight.value, each.weight.uses[0].node
            if value not in found.costs:
                ctx.note(
                    f"'{value.name}' gets {assigned[value]} bits without being measured: "
                    "it is no initializer that the main graph alone reads, or multiplies a "
                    "constant",
                    node,
                )
        used = sum(each.forms[assigned[each.weight.value]].nbytes for each in candidates)
        achieved = self._achieved(candidates, used, fixed)
        if all(assigned[each.weight.value] == max(each.forms) for each in candidates):
            shown = size(achieved) if isinstance(self.budget, str) else f"{achieved:.4g}"
            ctx.note(f"every layer has its most bits: {shown} of budget={self.budget} is used")
        layers, skipped = quantizer.choose(module, ctx, assigned)
        result = quantizer.quantize(module, ctx, layers, skipped=skipped)
        statistics = dict(result.statistics)
        statistics.pop("bits requested", None)
        chosen = Counter(assigned.values())
        return PassResult(
            changed=result.changed,
            statistics={
                "budget": self.budget,
                "achieved": achieved,
                **{f"layers of {bits} bits": chosen[bits] for bits in sorted(self.bits)},
                "expected cost": cost,
                "measure": found.measure,
                "feeds measured on": found.feeds,
                **statistics,
            },
        )

    def _limit(
        self, module: Module, ctx: PassContext, candidates: Sequence[Candidate]
    ) -> tuple[int, int]:
        """Return the bytes that the candidates may take, and those of all other weights."""
        from lwc.passes.quantization.weight_uses import find_weights

        if not isinstance(self.budget, str):
            return int(self.budget * _weights(candidates) / 8), 0
        editor, quantizer = ctx.editor(), self.quantizer(max(self.bits))
        own = {each.weight.value for each in candidates}
        other = {value: value.const_value for _, value in module.initializers()}
        fixed = sum(
            tensor.nbytes
            for value, tensor in other.items()
            if value not in own and tensor is not None
        )
        for weight in find_weights(module):
            form = quantizer.form(weight, editor)
            if weight.value not in own and not isinstance(form, str):
                fixed += form[1] - weight.tensor.nbytes
        return parse_size(self.budget) - fixed, fixed

    def _check(self, candidates: Sequence[Candidate], limit: int, fixed: int) -> None:
        least = sum(min(form.nbytes for form in each.forms.values()) for each in candidates)
        if least > limit:
            smallest = self._achieved(candidates, least, fixed)
            shown = size(smallest) if isinstance(self.budget, str) else f"{smallest:.4g}"
            raise PassError(
                f"budget={self.budget} is too small: the least possible is {shown}",
                remedy="raise it, add fewer bits to bits=, or take larger blocks",
            )

    def _achieved(self, candidates: Sequence[Candidate], used: int, fixed: int) -> float:
        if isinstance(self.budget, str):
            return used + fixed
        return 8 * used / _weights(candidates)


def _weights(candidates: Sequence[Candidate]) -> int:
    import math

    return sum(math.prod(each.weight.tensor.shape.numpy()) for each in candidates)


def _solve(
    candidates: Sequence[Candidate], found: Sensitivity, limit: int
) -> tuple[Mapping[ir.Value, Bits], float]:
    """Return the bits of each weight, and the sum of their costs.

    What could not be measured counts as dearer than all that was, and less so with more bits.
    """
    from lwc.passes.quantization.bit_budget import Option, choose

    dearest = 1 + sum(max(costs.values()) for costs in found.costs.values())
    things = []
    for each in candidates:
        costs = found.costs.get(each.weight.value)
        things.append(
            [
                Option(form.nbytes, dearest / 4**bits if costs is None else costs[bits])
                for bits, form in each.forms.items()
            ]
        )
    taken = choose(things, limit)
    assert taken is not None, "the least possible was compared with the limit"
    assigned = {
        each.weight.value: list(each.forms)[index]
        for each, index in zip(candidates, taken, strict=True)
    }
    cost = sum(costs[assigned[value]] for value, costs in found.costs.items())
    return assigned, cost
