"""How fast the models of `quantize.py` generate, in turns, by the processes of `decode.py`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.decode import Contender, Field, measure, show, summarize
from bench.decode_models import Source, run
from bench.decode_peers import Absent
from bench.quantize_results import Results, Unmade
from bench.quantize_settings import REFERENCE, Setting

DECODE = "add-kv-cache,last-logits,canonicalize,pack-projections{when=decode}"
"""What makes a decoder of a model without a cache, whoever quantized it."""


def contender(results: Results, setting: Setting) -> Contender:
    """Return how a row's model generates.

    Raises:
        Unmade: There is no model.
    """
    model = results.make(setting)["model"]
    exact = setting.name == REFERENCE
    if setting.quantizer == "gguf":
        cache = {"cache": "f32"} if setting.options["kind"] == "f32" else {}
        return Contender("llama_cpp", "llama.cpp", lambda source: model, bool(cache), cache)
    if setting.quantizer == "genai":
        return Contender("onnxruntime_genai", "genai", lambda source: model.parent)
    return Contender("onnxruntime", "lwc", partial(_decoder, model=model), exact)


def _decoder(source: Source, model: Path) -> Path:
    """Return a folder with the model and a cache, made anew each time: lwc may have changed."""
    folder = source.home / "quantize" / f"decoder-{model.parent.name}"
    shutil.rmtree(folder, ignore_errors=True)
    words = [sys.executable, "-m", "lwc.cli.opt", str(model), "-q", "-o", f"{folder}/"]
    run([*words, "-p", DECODE, "--grant", "all"])
    return folder


def speed_rows(
    results: Results,
    settings: Sequence[Setting],
    *,
    prompt: int,
    tokens: int,
    rounds: int,
    console: Console,
) -> list[dict[str, Any]]:
    """Let all models continue the same prompt, print the table and return a row for each.

    Ratios are to float32 within each round, with their smallest and largest.
    """
    contenders, rows = {}, []
    for setting in settings:
        try:
            contenders[setting.name] = contender(results, setting)
        except (Unmade, Absent) as error:
            rows.append({"section": "speed", "setting": setting.name, "error": str(error)})
    entered = Field(contenders=contenders)
    try:
        for name in contenders:
            entered.enter(name, results.subject.source, results.threads, prompt + tokens)
        base, reference = entered.base(REFERENCE), entered.reference()
        ids = results.subject.ids(calibration=False)[:prompt]
        timed, warm = measure(entered, ids, tokens, rounds)
        wanted = next((turn.tokens for turn in warm[reference]), ())
        found = summarize(prompt, timed, warm, base, wanted, contenders=contenders)
    finally:
        entered.close()
    title = f"{prompt} tokens of prompt, {tokens} more, {results.threads} threads"
    show(found, f"{title} (median, ratio to {base}; equal to {reference}'s)", console)
    for name, reason in entered.skipped.items():
        rows.append({"section": "speed", "setting": name, "error": reason})
    for row in rows:
        console.print(f"{row['setting']}: {row['error']}", markup=False)
    return [{"section": "speed", "setting": row.pop("contender"), **row} for row in found] + rows
