"""What 8 bits do to the embeddings of MiniLM: cosine to float32's, and the order of similarities.

A text's embedding is the mean of its last hidden states, of length 1. Texts are the evaluation's
lines of the news text, cut to 64 tokens; the similarities of all their pairs are ranked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.quantize_subjects import CALIBRATION_LINES
from fetch_models import model_path

import lwc
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.calibration.text import load_tokenizer, read_text, token_feed

CUT = 64
_FUSE = "canonicalize,fuse-norm,fuse-activation,fuse-attention,canonicalize"
CALIBRATION = 32
"""Texts of the calibration's half that static forms look at."""

FORMS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "lwc/8/rtn": ("lwc", {"passes": "quantize-weights{bits=8}"}, False),
    "lwc/w8a8/plain": ("lwc", {"passes": "smooth-quantize{alpha=none}"}, False),
    "lwc/w8a8/smooth-0.75": ("lwc", {"passes": "smooth-quantize{alpha=0.75}"}, True),
    "lwc/w8a8/products": ("lwc", {"passes": "smooth-quantize{products=true}"}, True),
    "lwc/w8a8/products-gptq": (
        "lwc", {"passes": "smooth-quantize{products=true method=gptq}"}, True,
    ),
    "lwc/w8a8/llm-int8": ("lwc", {"passes": "llm-int8"}, True),
    "ort/w8a8/dynamic": ("ort-dynamic", {"per_channel": True}, False),
    "ort/w8a8/dynamic-tensor": ("ort-dynamic", {"per_channel": False}, False),
    "onnxsim/w8a8/dynamic": ("onnxsim", {"method": "dynamic"}, False),
}  # fmt: skip
"""Quantizer, its options, and whether it looks at the data."""

Array = np.ndarray[Any, Any]


def embedding_rows(count: int, threads: int) -> list[dict[str, Any]]:
    """Return a row for each form of 8 bits.

    Args:
        count: Texts to embed.
        threads: Threads of one operator.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "float32", "model.onnx")
        lwc.optimize(model_path("minilm"), _FUSE).save(f"{base.parent}/")
        tokenize = load_tokenizer(model_path("minilm"))
        lines = read_text(model_path("lee")).splitlines()
        held_back = [tokenize(line)[:CUT] for line in lines[CALIBRATION_LINES:][:count]]
        feeds = Path(folder, "feeds")
        feeds.mkdir()
        module = lwc.load(base)
        for index, line in enumerate(lines[:CALIBRATION_LINES][:CALIBRATION]):
            ids = np.array([tokenize(line)[:CUT]], np.int64)
            np.savez(feeds / f"{index:03}.npz", **token_feed(module, ids))  # type: ignore[arg-type, unused-ignore]
        wanted = _embed(base, held_back, threads)
        rows = []
        for name, (quantizer, options, calibrated) in FORMS.items():
            target = Path(folder, name.replace("/", "-"), "model.onnx")
            target.parent.mkdir()
            given = feeds if calibrated else target.parent
            row: dict[str, Any] = {"section": "embeddings", "setting": name}
            try:
                _quantize(quantizer, base, target, given, options)
                found = _embed(target, held_back, threads)
            except (RuntimeError, lwc.LwcError) as error:
                rows.append({**row, "error": str(error).strip().splitlines()[-1][:300]})
                continue
            rows.append({**row, **_agreement(found, wanted), "texts": len(held_back)})
    return rows


def _quantize(
    quantizer: str, base: Path, target: Path, feeds: Path, options: Mapping[str, Any]
) -> None:
    request = {
        "quantizer": quantizer,
        "base": str(base),
        "target": str(target),
        "feeds": str(feeds),
        "options": dict(options),
    }
    script = Path(__file__).with_name("quantize_worker.py")
    words = [sys.executable, str(script), json.dumps(request)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


def _embed(model: Path, texts: Sequence[Sequence[int]], threads: int) -> Array:
    """Return the embeddings `[texts, size]`."""
    module = lwc.load(model)
    name = next(value.name or "" for value in module.graph.outputs if len(value.shape or ()) == 3)
    made = []
    with OnnxRuntimeBackend().compile(module, threads=threads) as compiled:
        for ids in texts:
            states = compiled.run(token_feed(module, np.array([ids], np.int64)), [name])[name]
            made.append(states[0].mean(axis=0))
    rows = np.stack(made).astype(np.float64)
    normed: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normed


def _agreement(found: Array, wanted: Array) -> dict[str, float]:
    cosines = (found * wanted).sum(axis=1)
    above = np.triu_indices(len(wanted), 1)
    ranks = [_ranks((each @ each.T)[above]) for each in (found, wanted)]
    return {
        "cosine": float(cosines.mean()),
        "smallest_cosine": float(cosines.min()),
        "spearman": float(np.corrcoef(ranks)[0, 1]),
    }


def _ranks(figures: Array) -> Array:
    """Return the place of each figure in ascending order; equal ones hardly occur."""
    ranks: Array = figures.argsort().argsort()
    return ranks


def show_embeddings(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the table, and what failed under it."""
    table = Table(title="MiniLM: embeddings compared with float32's")
    table.add_column("quantizer")
    for column in ("1 - cosine", "largest", "1 - Spearman"):
        table.add_column(column, justify="right")
    for row in rows:
        if "error" not in row:
            gaps = (1 - row[name] for name in ("cosine", "smallest_cosine", "spearman"))
            table.add_row(row["setting"], *(f"{gap:.2e}" for gap in gaps))
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['setting']}: {row['error']}", markup=False)
