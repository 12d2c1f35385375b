"""Compare `quantize-weights` on SmolLM2-135M with ONNX Runtime's own quantizer.

    tools/bench/quantize_weights.py --json quantize.json

For each variant: bytes on disk, perplexity of a news text (windows of 512, no overlap), and the
latency of one token, all variants timed in turns. ONNX Runtime's quantizer does the linear layers
at 4 bits in asymmetric blocks of 32; it cannot reach a tied head, so embedding and head come from
lwc at 8 bits in both.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx_ir as ir
from bench.decode_models import open_source
from fetch_models import model_path
from rich.console import Console
from rich.table import Table

from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.calibration.text import load_tokenizer, token_feed
from lwc.core.module import Module
from lwc.core.walk import constant_tensor
from lwc.core.weights import reading
from lwc.evaluate.latency import compare_latency
from lwc.evaluate.perplexity import perplexity
from lwc.frontend.load import load
from lwc.frontend.onnx_reader import from_proto
from lwc.frontend.onnx_writer import save
from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.passes.quantization.weight_uses import find_weights
from lwc.pipeline.passes import PassContext

LAYERS = "model.layers.*"


def ours(**options: Any) -> Callable[[Module], Module]:
    """Return a function that quantizes a module with lwc."""

    def apply(module: Module) -> Module:
        context = PassContext(AnalysisManager(module), source="quantize-weights")
        QuantizeWeights(**options).run(module, context)
        return module

    return apply


def onnxruntime_quantizer(module: Module) -> Module:
    """Quantize the layers with ONNX Runtime, embedding and head with lwc."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    module = ours(embeddings=8, exclude=(LAYERS,))(module)
    _untranspose(module)
    logging.disable(logging.INFO)  # it logs a line for each node
    quantizer = MatMulNBitsQuantizer(
        ir.to_proto(module.model),
        bits=4,
        block_size=32,
        is_symmetric=False,
        accuracy_level=4,
        op_types_to_quantize=("MatMul",),
    )
    quantizer.process()
    return from_proto(quantizer.model.model)


def _untranspose(module: Module) -> None:
    """Store weights that are read through a Transpose transposed: the quantizer sees no others."""
    for weight in list(find_weights(module)):
        for user, _ in list(weight.value.uses()):
            tensor = constant_tensor(weight.value)
            if user.op_type != "Transpose" or tensor is None:
                continue
            with reading(tensor) as array:
                turned = np.ascontiguousarray(array.T)
            twin = module.add_initializer(f"{weight.value.name}_transposed", turned)
            for reader, index in list(user.outputs[0].uses()):
                reader.replace_input_with(index, twin)
            module.graph.remove(user, safe=True)
        if not weight.value.uses():
            module.graph.initializers.pop(str(weight.value.name))


VARIANTS: dict[str, Callable[[Module], Module]] = {
    "float32": lambda module: module,
    "4 bits": ours(),
    "4 bits, search=none": ours(search="none"),
    "4 bits, symmetric": ours(symmetric=True),
    "4 bits, ONNX Runtime's quantizer": onnxruntime_quantizer,
    "8 bits": ours(bits=8),
}


def measure(gguf: Path, variants: list[str], threads: int, tokens: int) -> list[dict[str, Any]]:
    """Return a row for each variant."""
    source = load(gguf)
    tokenizer = load_tokenizer(gguf)
    text = model_path("lee").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = []
    backend = OnnxRuntimeBackend()
    compiled: dict[str, Any] = {}
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        for name in variants:
            module = source.clone()
            begun = time.perf_counter()
            module = VARIANTS[name](module)
            seconds = time.perf_counter() - begun
            saved = save(module, Path(folder) / f"{len(rows)}.onnx")
            found = perplexity(module, tokenizer, text, max_tokens=tokens, threads=threads)
            reference = reference or found
            compiled[name] = backend.compile(load(saved.path), threads=threads)
            rows.append(
                {
                    "variant": name,
                    "quantize_seconds": seconds,
                    "megabytes": saved.nbytes / 1e6,
                    "perplexity": found.value,
                    "perplexity_ratio": found.over(reference).ratio,
                }
            )
        feed = token_feed(source, np.array([[504]], np.int64))
        latencies = compare_latency({name: (each, feed) for name, each in compiled.items()})
        for row in rows:
            row["token_ms"] = 1e3 * latencies.latencies[row["variant"]].median
            row["latency_ratio"] = latencies.ratios[row["variant"]].median
            row["size_ratio"] = row["megabytes"] / rows[0]["megabytes"]
            compiled[row["variant"]].close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--layers", type=int, help="use only the first layers, for a quick run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4097, help="tokens of the text to use")
    parser.add_argument("--json", type=Path, help="write the summary and rows here")
    options = parser.parse_args()
    gguf = open_source(model_path("smollm2"), options.layers).gguf
    rows = measure(gguf, options.variants, options.threads, options.tokens)
    table = Table(title=f"SmolLM2-135M, {options.threads} threads")
    for column in rows[0]:
        table.add_column(
            column.replace("_", " "), justify="left" if column == "variant" else "right"
        )
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.3f}" for v in row.values()))
    Console(width=140).print(table)
    if options.json is not None:
        by_name = {row["variant"]: row for row in rows}
        summary: dict[str, Any] = {"tokens": options.tokens, "threads": options.threads}
        if {"4 bits", "4 bits, ONNX Runtime's quantizer"} <= set(by_name):
            theirs = by_name["4 bits, ONNX Runtime's quantizer"]["perplexity"]
            summary["perplexity_over_onnxruntime"] = by_name["4 bits"]["perplexity"] / theirs
        document = {"summary": summary, "rows": rows}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
