#!/usr/bin/env python3
"""Do lwc's greedy tokens equal those of transformers' `generate`, and the logits of every step?

SmolLM2-135M-Instruct in float32 continues prompts greedily, once by transformers and once by what
lwc made of the same GGUF file (attention fused, with a KV cache), token by token. Every step gets
the tokens that transformers chose, so that the logits of all steps compare. Where lwc would choose
another token, both logits must lie within 1e-3 of each other: a tie, which rounding decides.

    python tools/bench/greedy.py [--prompts 20] [--tokens 200] [--layers N] [--threads 1]
        [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import decode_models as models
from fetch_models import model_path

import lwc
from lwc.frontend.huggingface import offline
from lwc.generate.feeding import Feeder
from lwc.generate.policies import FullCache

Array: TypeAlias = np.ndarray[Any, Any]

TIE = 1e-3
"""Logits as close as this are a tie."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "To make a good cup of coffee, first",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics say that",
    "Dear Sir or Madam,\n",
    "1, 1, 2, 3, 5, 8,",
    "Water boils at",
    "A compiler is a program that",
    "Q: What is the largest planet?\nA:",
    "In 1969,",
    "The quick brown fox",
    "SELECT name FROM",
    "Translate to French: Good morning.\n",
    "The difference between a crocodile and an alligator is",
    "import numpy as np\n\n",
    "Two trains leave the station at the same time.",
    "My favourite season is autumn because",
    "<html>\n<head>\n",
    "Photosynthesis is the process by which",
)


def choose(
    folder: Path, prompts: Sequence[str], tokens: int, threads: int
) -> tuple[list[tuple[list[int], list[int], Array]], list[int]]:
    """Let transformers continue the prompts.

    Returns:
        For each prompt its ids, the tokens that were chosen, and the logits of each step. And the
        tokens that end a text, which are barred so that there are as many tokens as asked for.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    with offline():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            made = model.generate(
                ids, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        chosen = made.sequences[0, ids.shape[1] :].tolist()
        logits = np.stack([step[0].numpy() for step in made.logits])
        found.append((ids[0].tolist(), chosen, logits))
    ends = np.atleast_1d(model.generation_config.eos_token_id)
    return found, ends.tolist()


def follow(
    feeder: Feeder, ids: list[int], chosen: list[int], wanted: Array, barred: list[int]
) -> dict[str, Any]:
    """Compare the logits of every step that leads to the chosen tokens."""
    feeder.start(len(ids) + len(chosen))
    error, equal, ties, others = 0.0, 0, 0, 0
    logits = feeder.feed(ids)
    for step, token in enumerate(chosen):
        error = max(error, float(np.abs(logits - wanted[step]).max()))
        logits[barred] = -np.inf
        best = int(logits.argmax())
        equal += best == token
        if best != token:
            close = abs(float(logits[best] - logits[token])) <= TIE
            ties, others = ties + close, others + (not close)
        if step + 1 < len(chosen):
            logits = feeder.feed([token])
    return {
        "tokens": len(chosen),
        "equal": equal,
        "ties": ties,
        "others": others,
        "max_logit_error": error,
        "largest_logit": float(np.abs(wanted).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="the first so many")
    parser.add_argument("--tokens", type=int, default=200, help="tokens after each prompt")
    parser.add_argument("--layers", type=int, help="use only the first layers, for a quick run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    source = models.open_source(model_path("smollm2"), arguments.layers)
    prompts = list(islice(PROMPTS, arguments.prompts))
    folder = models.huggingface_folder(source)
    wanted, ends = choose(folder, prompts, arguments.tokens, arguments.threads)
    module = lwc.load(models.lwc_model(source, "f32") / "model.onnx")
    rows = []
    with Feeder(module, FullCache(), arguments.threads) as feeder:
        for prompt, (ids, chosen, logits) in zip(prompts, wanted, strict=True):
            rows.append({"prompt": prompt, **follow(feeder, ids, chosen, logits, ends)})
    counts = ("tokens", "equal", "ties", "others")
    table = Table("prompt", title="greedy tokens of lwc and transformers, float32")
    for column in (*counts, "largest logit error"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = [str(row[each]) for each in counts]
        table.add_row(repr(row["prompt"]), *figures, f"{row['max_logit_error']:.2g}")
    console = Console(width=None if os.isatty(1) else 120)
    console.print(table)
    total = {each: sum(row[each] for row in rows) for each in counts}
    worst = max(row["max_logit_error"] for row in rows)
    console.print(
        f"{total['equal']} of {total['tokens']} tokens equal, {total['ties']} ties within {TIE:g}, "
        f"{total['others']} others; largest error of a logit {worst:.2g}"
    )
    if arguments.json:
        summary = {"model": source.gguf.name, **total, "max_logit_error": worst}
        arguments.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
