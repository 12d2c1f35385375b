#!/usr/bin/env python3
"""What does a smaller KV cache cost? Perplexity of SmolLM2 with heavy hitters and with windows.

A text is predicted token by token, each from what the cache kept of those before: everything, a
sliding window, a window with attention sinks, or H2O's heavy hitters and recent tokens (half the
budget each). Then the heavy hitters' budget covers the text: each token's loss must be that of the
whole cache, bit by bit.

    python tools/bench/cache_policies.py [--tokens 2048] [--share 0.2 ...] [--layers N]
        [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import decode_models as models
from fetch_models import model_path

import lwc
from lwc.generate.perplexity import perplexity_with_cache
from lwc.generate.policies import CachePolicy, FullCache, HeavyHitters, WindowCache

SINK = 4
"""First tokens that the window with attention sinks keeps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the text")
    parser.add_argument(
        "--share", type=float, nargs="+", default=[0.2], help="of the tokens, what is kept"
    )
    parser.add_argument("--layers", type=int, help="use only the first layers, for a quick run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    source = models.open_source(model_path("smollm2"), arguments.layers)
    tokens = models.prompt_tokens(source, model_path("lee"), arguments.tokens)
    budgets = [round(share * len(tokens)) for share in arguments.share]
    if min(budgets) < 2 * SINK:
        parser.error(f"--share: a budget of {min(budgets)} tokens is too small to compare")
    module = lwc.load(models.lwc_model(source, "f32") / "model.onnx")
    policies: list[tuple[str, CachePolicy]] = [("full", FullCache())]
    for budget in budgets:
        policies += [
            ("h2o", HeavyHitters(budget - budget // 2, budget // 2)),
            ("window", WindowCache(budget, 0)),
            ("window and sinks", WindowCache(budget, SINK)),
        ]
    half = len(tokens) // 2
    policies.append(("h2o that holds all", HeavyHitters(len(tokens) - half, half)))
    rows: list[dict[str, Any]] = []
    losses = {}
    for name, policy in policies:
        start = time.perf_counter()
        found = perplexity_with_cache(module, tokens, policy, threads=arguments.threads)
        losses[name] = found.nll_per_token
        rows.append({
            "policy": name,
            "budget": policy.budget,
            "perplexity": found.value,
            "tokens_per_second": found.tokens / (time.perf_counter() - start),
        })  # fmt: skip
    same = bool(np.array_equal(losses["full"], losses["h2o that holds all"]))
    table = Table("cache", title=f"perplexity over {len(tokens)} tokens, one by one")
    for column in ("tokens kept", "perplexity", "tok/s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["policy"], str(row["budget"] or "all"), f"{row['perplexity']:.2f}",
            f"{row['tokens_per_second']:.1f}",
        )  # fmt: skip
    console = Console(width=None if os.isatty(1) else 100)
    console.print(table)
    console.print(f"a budget that holds all gives the losses of the whole cache bit by bit: {same}")
    if arguments.json:
        summary = {"tokens": len(tokens), "budgets": budgets, "bit_identical": same}
        arguments.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
