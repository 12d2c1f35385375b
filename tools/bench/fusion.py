#!/usr/bin/env python3
"""Fusions expected and found in models of many families, exported in every way.

Every variant of `tools/families.py`, every transformer among the files of `fetch_models.py`, and
SmolLM2 and MiniLM as torch exports them are canonicalized and go through the fusing passes that are
registered. What there is to fuse is counted from the configuration; what was found are the fused
operators of the result, whether the exporter or a pass made them. The outputs are compared with
the original's at batches of 1 and 3 and lengths of 1, 7 and 64, for masks that show everything, pad
on the right, pad on the left and hide a row as a whole; rows for which the original has no numbers
are not compared. Once more with every assumption granted, for masks that pad on the right: there
all outputs must be finite, and those of tokens that are no padding the same (`granted`). Decoders
get a KV cache, and are fed 40 tokens: ten at once, then one by one, against the whole at once
(`cached`).

    python tools/bench/fusion.py [--models NAME ...] [--passes NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.fusion_subjects import FILES, Subject, real_models, small_model
from families import EXPORTERS, FAMILIES, IMPLEMENTATIONS, VOCABULARY, variants

import lwc
from lwc.analysis.manager import AnalysisManager
from lwc.core.module import Module
from lwc.frontend.load import load
from lwc.generate.feeding import Feeder
from lwc.generate.policies import FullCache
from lwc.pipeline.passes import PassContext
from lwc.pipeline.registry import default_registry
from lwc.pipeline.spec import parse

Array = np.ndarray[Any, Any]

KINDS: dict[str, tuple[str, frozenset[str]]] = {
    "attention": (
        "fuse-attention",
        frozenset({"MultiHeadAttention", "GroupQueryAttention", "Attention"}),
    ),
    "norm": (
        "fuse-norm",
        frozenset(
            {
                "LayerNormalization",
                "RMSNormalization",
                "SimplifiedLayerNormalization",
                "SkipLayerNormalization",
                "SkipSimplifiedLayerNormalization",
            }
        ),
    ),
    "activation": (
        "fuse-activation",
        frozenset({"Gelu", "FastGelu", "BiasGelu", "QuickGelu", "Swish"}),
    ),
    "rotary": ("fuse-rotary", frozenset({"RotaryEmbedding"})),
}
"""What is counted: the pass that fuses it, and the operators it becomes."""

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest of them: float32 through two layers."""

EXTENTS = tuple((batch, length) for batch in (1, 3) for length in (1, 7, 64))
"""Batch and length that outputs are compared at; 64 is beyond the sliding windows."""

PADDINGS = ("none", "right", "left", "row")

DECODER = (
    "canonicalize,fuse-norm,fuse-activation,fuse-rotary,fuse-attention,add-kv-cache,last-logits,"
    "canonicalize,pack-projections{when=decode}"
)


def registered(names: Iterable[str]) -> list[str]:
    """Return those of the names that are passes."""
    known = {info.name for info in default_registry().infos()}
    return [name for name in names if name in known]


def fuse(
    path: Path, passes: Sequence[str], granted: Iterable[str] = ()
) -> tuple[Module, list[str]]:
    """Canonicalize a model and run passes on it; return it with what they missed."""
    module = load(path)
    analyses = AnalysisManager(module)
    for text in ("canonicalize", *passes):
        for each in parse(text):
            ctx = PassContext(analyses, source=each.name, granted=frozenset(granted))
            if each.run(module, ctx).changed:
                analyses.invalidate()
    missed = [each for each in module.remarks if each.kind == "missed"]
    return module, [
        each.message for each in missed if any(name.startswith(each.source) for name in passes)
    ]


def count(module: Module) -> dict[str, int]:
    """Count fused operators by kind."""
    ops = Counter(node.op_type for node in module.nodes())
    return {kind: sum(ops[op] for op in made) for kind, (_, made) in KINDS.items()}


def feeds(module: Module, paddings: Sequence[str] = PADDINGS) -> Iterator[dict[str, Array]]:
    """Yield feeds of several extents, each with several masks."""
    random = np.random.default_rng(0)
    for batch, length in EXTENTS:
        for padded in paddings:
            feed: dict[str, Array] = {}
            for value in module.graph.inputs:
                name = value.name or ""
                if value.dtype == ir.DataType.FLOAT:
                    free = (48, 48 + 8 * length)  # height and width; lines of text are 48 high
                    sizes = zip((value.shape or ())[2:], free, strict=True)
                    shape = [size if isinstance(size, int) else other for size, other in sizes]
                    feed[name] = random.random((batch, 3, *shape)).astype(np.float32)
                elif "mask" in name:
                    feed[name] = _mask(batch, length, padded)
                elif "position" in name:
                    feed[name] = np.tile(np.arange(length), (batch, 1))
                elif "token_type" in name:
                    feed[name] = random.integers(0, 2, (batch, length))
                else:
                    width = 2 if "decoder" in name else length
                    feed[name] = random.integers(3, VOCABULARY, (batch, width))
            yield feed


def _mask(batch: int, length: int, padded: str) -> Array:
    mask = np.ones((batch, length), np.int64)
    hidden = length if padded == "row" else length // 2
    if padded in ("right", "row"):
        mask[-1, length - hidden :] = 0
    elif padded == "left":
        mask[-1, :hidden] = 0
    return mask


def difference(module: Module, original: Module, *, granted: bool = False) -> float:
    """Return the largest difference of outputs, relative to the largest number in them.

    Args:
        module: The fused model.
        original: The model before.
        granted: Assumptions were: compare tokens that are no padding, on the right, and return
            infinity where an output is not finite.
    """
    sessions = [_session(each) for each in (module, original)]
    worst = 0.0
    for feed in feeds(original, ("none", "right") if granted else PADDINGS):
        found, wanted = (session.run(None, feed) for session in sessions)
        for a, b in zip(found, wanted, strict=True):
            there = np.isfinite(b)
            mask = feed.get("attention_mask")
            if granted and mask is not None and b.ndim == 3 and mask.shape == b.shape[:2]:
                there &= mask.astype(bool)[..., None]
            apart = np.abs(a[there] - b[there])
            scale = float(np.abs(b[there]).max(initial=1.0))
            lost = np.isnan(apart).any() or (granted and not np.isfinite(a).all())
            worst = max(worst, float("inf") if lost else apart.max(initial=0) / scale)
    return float(worst)


def cached_difference(path: Path, tokens: int = 40, prompt: int = 10) -> float:
    """Return the largest difference of logits with a cache, relative to the largest of them.

    Raises:
        LwcError: A pass refuses; the decoder gets no cache.
    """
    ids = np.random.default_rng(0).integers(3, VOCABULARY, tokens)
    feed = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, tokens), np.int64),
        "position_ids": np.arange(tokens)[None],
    }
    original = load(path)
    taken = {value.name: feed[value.name] for value in original.graph.inputs if value.name in feed}
    wanted = _session(original).run(None, taken)[0][0, prompt - 1 :]
    module = lwc.optimize(load(path), DECODER, grant=["all"]).module
    with Feeder(module, FullCache(), threads=1) as feeder:
        feeder.start(tokens)
        steps = [ids[:prompt], *ids[prompt:, None]]
        found = np.stack([feeder.feed(step.tolist()) for step in steps])
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _session(module: Module) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(
        ir.to_proto(module.model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def measure(subject: Subject, passes: Sequence[str]) -> dict[str, Any]:
    """Fuse one model; count and compare."""
    path = subject.path()
    module, missed = fuse(path, passes)
    found = count(module)
    original = load(path)
    error = difference(module, original)
    granted, _ = fuse(path, passes, ("all",))
    granted_error = difference(granted, original, granted=True)
    cached_error = cached_difference(path) if subject.decodes else None
    return {
        "model": subject.model,
        "exporter": subject.exporter,
        "implementation": subject.implementation,
        "expected": {kind: getattr(subject.expected, kind) for kind in KINDS},
        "found": found,
        "missed": missed,
        "error": error,
        "granted_error": granted_error,
        "cached_error": cached_error,
        "agrees": max(error, granted_error, cached_error or 0.0) <= TOLERANCE,
    }


def summarize(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> dict[str, Any]:
    """Add the rows up."""
    cached = sum(row["cached_error"] is not None for row in rows)
    agree = sum(row["agrees"] for row in rows)
    summary: dict[str, Any] = {"models": len(rows), "agree": agree, "cached": cached}
    for kind in kinds:
        expected = sum(row["expected"][kind] for row in rows)
        found = sum(min(row["found"][kind], row["expected"][kind]) for row in rows)
        summary[kind] = {"expected": expected, "found": found}
    return summary


def _error(error: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.1e}" + ("" if error <= TOLERANCE else " differs")


def show(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str], console: Console) -> None:
    """Print the table."""
    table = Table(title="fusions, found of expected")
    for column in ("model", "exporter", "implementation"):
        table.add_column(column)
    for column in (*kinds, "error", "granted", "cached"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row['found'][kind]}/{row['expected'][kind]}" for kind in kinds]
        cells += [_error(row[each]) for each in ("error", "granted_error", "cached_error")]
        table.add_row(row["model"], row["exporter"], row["implementation"], *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = {"small": list(FAMILIES), "real": list(FILES)}
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        choices=[*known, *known["small"], *known["real"]],
        default=list(known),
        help=f"'small', 'real', or of {', '.join(known['small'] + known['real'])}; default: all",
    )
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS
    )
    parser.add_argument("--exporters", nargs="+", choices=("file", *EXPORTERS))
    parser.add_argument("--passes", nargs="+", help="by default every fusing pass there is")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    passes = arguments.passes or registered(name for name, _ in KINDS.values())
    kinds = [kind for kind, (name, _) in KINDS.items() if any(p.startswith(name) for p in passes)]
    models = {name for each in arguments.models for name in known.get(each, [each])}
    rows = []
    for subject in [*map(small_model, variants()), *real_models()]:
        spelled = subject.implementation in ("", *arguments.implementations)
        written = not arguments.exporters or subject.exporter in arguments.exporters
        if subject.model in models and spelled and written:
            rows.append(measure(subject, passes))
            print(subject.name, file=sys.stderr)
    summary = summarize(rows, kinds)
    show(rows, kinds, console)
    for kind in kinds:
        console.print(f"{kind}: {summary[kind]['found']} of {summary[kind]['expected']}")
    for row in rows:
        for reason, times in Counter(row["missed"]).items():
            console.print(f"{row['model']}: missed {times} times: {reason}")
    console.print(
        f"{summary['agree']} of {summary['models']} agree, {summary['cached']} with a cache, too"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
