"""`rotate`: the residual stream in another basis, in which no channel stands out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lwc.core.errors import UsageError
from lwc.pipeline.passes import Contract, Exact, Pass, PassContext, PassResult

if TYPE_CHECKING:
    import onnx_ir as ir

    from lwc.core.module import Module
    from lwc.passes.quantization.hadamard import Rotation
    from lwc.passes.quantization.residual_stream import Stream
    from lwc.rewrite import Editor

__all__ = ["Rotate"]

_RECORD = "lwc.rotated"
"""Property of the graph: the streams that were turned, as JSON."""


@dataclass(frozen=True)
class Rotate(Pass):
    """Turn the residual stream by an orthogonal matrix, which spreads outliers over all channels.

    Everything that writes the stream (embeddings, positions, output and down projections) is
    multiplied by a matrix Q, everything that reads it through a norm (query, key, value, gate and
    up projections, the head) by its transpose, after the norm's scale was folded into it (Ashkboos
    et al. 2024, SliceGPT and QuaRot). LayerNorm becomes RMSNorm: what writes is centered, and the
    norm's bias goes into the layers behind. A table that embedding and head share is stored twice
    afterwards. Run it after canonicalize and fuse-norm, and before quantize-weights. Post-norm
    models stay as they are.

    Attributes:
        kind: Which matrix: `hadamard` has entries of one magnitude and random signs, `orthogonal`
            is drawn from all orthogonal ones alike, for widths that have no known Hadamard matrix.
        seed: Of the random numbers.
    """

    name: ClassVar[str] = "rotate"
    contract: ClassVar[Contract] = Exact()
    positional: ClassVar[str | None] = "kind"

    kind: Literal["hadamard", "orthogonal"] = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"seed={self.seed} is negative")

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """See the class.

        Raises:
            PassError: A weight in half precision would overflow.
        """
        from lwc.passes.quantization.residual_stream import find_streams
        from lwc.rewrite import remove_unused

        if _RECORD in module.graph.metadata_props:
            ctx.note(f"already rotated: {_told(module.graph.metadata_props[_RECORD])}")
            return PassResult(changed=False)
        edit = ctx.editor()
        before = _weight_bytes(module)
        found = weights = 0
        turned: list[dict[str, int | str]] = []
        rotations: dict[int, Rotation | None] = {}
        for value, stream in find_streams(edit):
            found += 1
            if ctx.limit.exhausted:
                break
            written = self._turn(value, stream, rotations, edit, ctx)
            if written:
                weights += written
                turned.append({"width": stream.width, "kind": self.kind, "seed": self.seed})
        if not found:
            ctx.note("no residual stream: no sum of activations that a norm reads")
        if turned:
            module.graph.metadata_props[_RECORD] = json.dumps(turned)
            remove_unused(module)
        return PassResult(
            changed=bool(turned),
            statistics={
                "streams found": found, "streams rotated": len(turned),
                "weights rotated": weights, "bytes before": before,
                "bytes after": _weight_bytes(module),
            },
        )  # fmt: skip

    def _turn(
        self,
        value: ir.Value,
        stream: Stream,
        rotations: dict[int, Rotation | None],
        edit: Editor,
        ctx: PassContext,
    ) -> int:
        """Turn one stream; return how many constants were written, 0 where it stays."""
        from lwc.passes.quantization.hadamard import rotation
        from lwc.passes.quantization.norm_bias import absorb_biases
        from lwc.passes.quantization.residual_stream import follow
        from lwc.passes.quantization.stream_edits import turn

        place = stream.norms[0] if stream.norms else value.producer()
        if stream.objection is not None:
            words = f"a stream of width {stream.width} stays: {stream.objection.reason}"
            ctx.missed(words, stream.objection.node or place)
            return 0
        if stream.width not in rotations:
            rotations[stream.width] = rotation(self.kind, stream.width, self.seed)
        matrix = rotations[stream.width]
        if matrix is None:
            ctx.missed(
                f"a stream of width {stream.width} stays: no Hadamard matrix of that order is "
                "known here; rotate{orthogonal} takes any width",
                place,
            )
            return 0
        ctx.applied(
            f"{len(stream.norms)} norms and {len(stream.reads)} layers read a stream of width "
            f"{stream.width}, turned by {self._told(matrix)}",
            place,
            "rotate",
        )
        ctx.limit.spend("rotate", place)
        if absorb_biases(stream, edit):
            # Layers that both read and write it may have been replaced.
            stream = follow(_alive(stream), stream.width, edit)
            assert stream.objection is None
        done = turn(stream, matrix, edit)
        for name, nbytes in done.copies:
            ctx.note(f"'{name}' is read in two ways and now stored twice: {nbytes} B more")
        return done.weights

    def _told(self, matrix: Rotation) -> str:
        if self.kind == "orthogonal":
            return "an orthogonal matrix"
        return f"a Hadamard matrix ({' x '.join(str(len(each)) for each in matrix.factors)})"


def _alive(stream: Stream) -> ir.Value:
    """Return a value of the stream that is still in the graph."""
    makers = ((value, value.producer()) for value in stream.values)
    return next(value for value, node in makers if node is not None and node.graph is not None)


def _told(record: str) -> str:
    return ", ".join(
        f"width {each['width']} by {each['kind']}, seed {each['seed']}"
        for each in json.loads(record)
    )


def _weight_bytes(module: Module) -> int:
    return sum(
        value.const_value.nbytes
        for _, value in module.initializers()
        if value.const_value is not None
    )
