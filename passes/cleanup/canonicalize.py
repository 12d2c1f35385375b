"""canonicalize: the same function with the fewest nodes that exact rewriting finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lwc.analysis.shapes import Shapes
from lwc.core.collector import without_collections
from lwc.core.errors import PassError
from lwc.core.module import Module
from lwc.passes.cleanup.canonical import (
    casts,
    control,
    identities,
    layout,
    sequences,
    shape_values,
    slices,
    tidy,
)
from lwc.passes.cleanup.canonical.duplicates import merge_duplicates
from lwc.passes.cleanup.canonical.folding import Folding
from lwc.passes.cleanup.infer_shapes import annotate
from lwc.pipeline.passes import Exact, Pass, PassContext, PassResult
from lwc.rewrite import (
    MIN_OPSET,
    Rewriting,
    RuleSet,
    remove_unused,
    rewrite,
)

__all__ = ["Canonicalize", "canonicalize"]

_ROUNDS = 8


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Fold constants, merge duplicates, drop what does nothing, simplify shape computations.

    Attributes:
        decompress: Also fold constants into weights larger than those they are made of.
        fold_memory: Bound in MiB on the memory one constant folding may take.
    """

    decompress: bool = False
    fold_memory: int = 1024

    name: ClassVar[str] = "canonicalize"
    contract: ClassVar[Exact] = Exact()
    never_more: ClassVar[frozenset[str]] = frozenset({"nodes"})

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """Rewrite until nothing changes.

        Raises:
            PassError: The module is older than the operator set the rules speak.
        """
        if module.graph.opset_imports.get("", MIN_OPSET) < MIN_OPSET:
            raise PassError(
                f"the module is at opset {module.opset}, but canonicalize needs {MIN_OPSET}",
                remedy="lwc.load raises older models",
            )
        memory = self.fold_memory << 20
        if ctx.max_memory is not None:
            memory = min(memory, ctx.max_memory)
        with without_collections():
            changed, outcome = canonicalize(module, ctx, Folding(self.decompress, memory))
        ctx.report(outcome)
        if not changed:
            ctx.note("nothing to simplify")
        return PassResult(changed, rewrites=dict(sorted(outcome.hits.items())))


def canonicalize(module: Module, ctx: PassContext, folding: Folding) -> tuple[bool, Rewriting]:
    """Rewrite `module` to a fixed point of every rule of this pass.

    Facts are inferred anew after a round that changed something: what a rewrite uncovered may
    let the analysis prove more than the updates on the way did. At the end of a run that changed
    something they are written on the values: runtimes fuse more where shapes are stated.

    Returns:
        Whether anything changed, and what was done.
    """
    rules = RuleSet(
        [
            *tidy.RULES,
            *shape_values.RULES,
            folding.rule(),
            *identities.RULES,
            *casts.RULES,
            *layout.RULES,
            *slices.RULES,
            *sequences.RULES,
            *control.RULES,
        ]
    )
    total = Rewriting()
    changed = False
    for _ in range(_ROUNDS):
        editor = ctx.editor()
        done = rewrite(editor, rules, sweep=merge_duplicates)
        unused = remove_unused(module)
        total.hits += done.hits + unused
        total.erased += done.erased
        total.applied += done.applied
        total.missed = done.missed
        if not editor.changed and not unused:
            break
        changed = True
        ctx.analyses.invalidate()
    if total.erased:
        total.hits["dead-code"] = total.erased
    if changed:
        annotate(module, ctx.analyses.get(Shapes))
    return changed, total
