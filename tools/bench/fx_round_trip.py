#!/usr/bin/env python3
"""Lower models of many transformer families to PyTorch and trace them back: what is left of them.

Small models with random weights (`tools/families.py`), by torch.export. The module that comes back
is run beside the one that went out at extents other than those it was traced at, and both are
fused, to see whether as much attention is found.

    python tools/bench/fx_round_trip.py [--families NAME ...] [--exporter NAME] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from families import EXPORTERS, FAMILIES, VOCABULARY, Variant, variant_path

import lwc
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.core.module import Module

FUSED = "canonicalize,fuse-norm,fuse-rotary,fuse-attention"
EXAMPLE = {"batch": 2, "sequence": 12, "decoder_sequence": 7}
EXTENTS = (
    {"batch": 3, "sequence": 9, "decoder_sequence": 5},
    {"batch": 1, "sequence": 17, "decoder_sequence": 11},
)


@dataclass(frozen=True)
class Row:
    """What became of a family.

    Attributes:
        family: Its name.
        nodes: Nodes of the module as it was read.
        nodes_back: Nodes of the one that came back.
        error: Largest difference of the outputs by the largest output, at all `EXTENTS`.
        error_fused: The same after `FUSED`, beside the module as it was read.
        attention: Attention operators that `FUSED` writes in the module as it was read.
        attention_back: In the one that came back.
        seconds: Time of lowering and tracing.
        warnings: What the trace warns of: extents at which its example led it wrong.
    """

    family: str
    nodes: int
    nodes_back: int
    error: float
    error_fused: float
    attention: int
    attention_back: int
    seconds: float
    warnings: int


def round_trip(module: Module) -> Module:
    """Lower a module of a family and trace it back, with its symbolic dimensions."""
    lowered = lwc.to_fx(module)
    names = lowered.meta["lwc"]["inputs"]
    feed = feed_of(module, EXAMPLE)
    return lwc.trace(
        lowered,
        [torch.from_numpy(feed[name]) for name in names],
        dynamic_shapes=tuple(_axes(module)[name] for name in names),
        input_names=names,
    )


def _axes(module: Module) -> dict[str, dict[int, str]]:
    return {
        value.name or "": {
            axis: str(dim.value)
            for axis, dim in enumerate(value.shape or ())
            if not isinstance(dim, int)
        }
        for value in module.graph.inputs
    }


def feed_of(module: Module, extents: Mapping[str, int]) -> dict[str, Any]:
    """Make a feed without padding."""
    random = np.random.default_rng(0)
    feed: dict[str, Any] = {}
    for value in module.graph.inputs:
        dims = value.shape or ()
        shape = [dim if isinstance(dim, int) else extents[str(dim.value)] for dim in dims]
        if value.name == "pixel_values":
            feed[value.name] = random.random(shape).astype(np.float32)
        elif value.name == "attention_mask":
            feed[value.name] = np.ones(shape, np.int64)
        else:
            feed[value.name or ""] = random.integers(3, VOCABULARY, shape)
    return feed


def difference(module: Module, reference: Module) -> float:
    """Return the largest difference of outputs by the largest output.

    Raises:
        ValueError: Types or shapes of outputs differ.
    """
    worst = 0.0
    backend = OnnxRuntimeBackend()
    with backend.compile(module, threads=1) as one, backend.compile(reference, threads=1) as other:
        for extents in EXTENTS:
            feed = feed_of(reference, extents)
            found, wanted = one.run(feed).values(), other.run(feed).values()
            for a, b in zip(found, wanted, strict=True):
                if (a.dtype, a.shape) != (b.dtype, b.shape):
                    raise ValueError(f"{a.dtype} {a.shape} came back of {b.dtype} {b.shape}")
                worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    return worst


def fused(module: Module) -> tuple[Module, int]:
    """Fuse a copy; return it and how many attention operators it has."""
    made = lwc.optimize(module.clone(), FUSED, grant="all").module
    return made, sum(node.op_type.endswith("Attention") for node in made.graph)


def row_of(family: str, exporter: str = "dynamo") -> Row:
    """Take a family out and back."""
    implementation = FAMILIES[family].implementations[-1]
    module = lwc.load(variant_path(Variant(family, implementation, exporter)))
    start = time.perf_counter()
    back = round_trip(module)
    seconds = time.perf_counter() - start
    _, attention = fused(module)
    fused_back, attention_back = fused(back)
    return Row(
        family,
        len(module.graph),
        len(back.graph),
        difference(back, module),
        difference(fused_back, module),
        attention,
        attention_back,
        seconds,
        sum(each.kind == "warning" for each in back.remarks),
    )


def rows_of(names: Sequence[str], exporter: str, console: Console) -> Iterator[Row]:
    """Take families out and back; say which cannot be."""
    for name in names:
        try:
            yield row_of(name, exporter)
        except Exception as error:  # one that fails must not hide the others
            console.print(f"{name}: {type(error).__name__}: {str(error)[:300]}", markup=False)


def show(rows: Sequence[Row], asked: int, console: Console) -> dict[str, Any]:
    """Print a table; return the worst errors."""
    columns = ("family", "nodes", "back", "error", "error, fused", "attention", "back", "seconds")
    table = Table(*columns)
    for row in rows:
        table.add_row(
            row.family,
            str(row.nodes),
            str(row.nodes_back),
            f"{row.error:.1e}",
            f"{row.error_fused:.1e}",
            str(row.attention),
            str(row.attention_back),
            f"{row.seconds:.1f}",
        )
    console.print(table)
    return {
        "families": asked,
        "came_back": len(rows),
        "error": max((row.error for row in rows), default=0.0),
        "error_fused": max((row.error_fused for row in rows), default=0.0),
        "same_attention": sum(row.attention == row.attention_back for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--exporter", choices=EXPORTERS, default="dynamo")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows = list(rows_of(arguments.families, arguments.exporter, console))
    summary = show(rows, len(arguments.families), console)
    console.print(
        f"{summary['came_back']} of {summary['families']} came back, "
        f"{summary['same_attention']} with as much attention"
    )
    if arguments.json:
        figures = {"summary": summary, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
